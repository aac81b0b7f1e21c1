// Try it: run the language model on a text or conversation and see which latents are active on each token.

import { h, field, known, link, needsModel, number, percent, token, visible, section, ROLE_NAMES } from "./dom.js";
import { addressed, addressOf, givenBox } from "./conversation.js";
import { latentCard } from "./card.js";
import { templateSwitch, turns } from "./turns.js";
import * as api from "./api.js";

const SHOWN = 12;
const ALL = "all SAEs";
const ORDERS = {
  activation: "activation over the largest one in the index",
  lift: "how much more often than in the index: times",
};

// Active latents per token: activation, its share of the largest one in the index, and density there (of a latent that
// never fired, as if it had once).
function activeRows(reading, tables, leastDensity) {
  return reading.tokens.map((_, i) =>
    tables.flatMap(([id, columns]) =>
      reading.saes[id][i].map(([latent, value]) => ({
        id,
        latent,
        value,
        share: value / (columns.max[latent] || value),
        density: Math.max(columns.density[latent], leastDensity),
      })),
    ),
  );
}

// Each latent once, with its largest share and how often it fires beside its density; what the chat template writes is
// left out.
function overText(all, roles) {
  const rows = all.filter((_, i) => roles?.[i] !== "template");
  const found = new Map();
  for (const row of rows)
    for (const one of row) {
      const key = `${one.id}/${one.latent}`;
      const before = found.get(key) ?? { ...one, share: 0, times: 0 };
      found.set(key, { ...before, share: Math.max(before.share, one.share), times: before.times + 1 });
    }
  const read = rows.filter((row) => row.length).length;
  return [...found.values()].map((one) => ({ ...one, lift: one.times / read / one.density }));
}

const best = (active, order) => active.sort((a, b) => b[order] - a[order]).slice(0, SHOWN);

// The tokens as buttons in their turns; each shade(share of token i) colors them and the marks of folded ones.
function tokenLine(reading, { onPick, onPoint, onLeave }) {
  const buttons = reading.tokens.map((text, i) =>
    h(
      "button",
      {
        type: "button",
        class: "tok",
        "aria-pressed": "false",
        "aria-label": `token ${i}: ${visible(text)}`,
        onclick: () => onPick(i),
        onmouseenter: () => onPoint(i),
        onfocus: () => onPoint(i),
      },
      text === "" ? "∅" : text.replaceAll("\n", "↵"),
    ),
  );
  const line = turns(reading.roles, reading.tokens.length, (i) => buttons[i]);
  line.classList.add("readable");
  line.setAttribute("role", "group");
  line.setAttribute("aria-label", "Tokens");
  line.addEventListener("mouseleave", onLeave);
  const folds = line.querySelectorAll(".fold");
  const shade = (share) => {
    const shares = reading.tokens.map((_, i) => Math.min(1, share(i)));
    shares.forEach((value, i) => buttons[i].style.setProperty("--heat", String(value)));
    for (const { style, dataset } of folds)
      style.setProperty("--heat", String(Math.max(...shares.slice(Number(dataset.from), Number(dataset.to)))));
  };
  return {
    line,
    shade,
    press: (i) => buttons.forEach((button, j) => button.setAttribute("aria-pressed", String(j === i))),
  };
}

// The tokens, and beside them what is active on one of them or on all; a latent that is picked opens there, too.
function view(reading, tables, leastDensity, order, chosen, onPick) {
  const columnsOf = Object.fromEntries(tables);
  const rows = activeRows(reading, tables, leastDensity);
  const detail = h("div", { class: "active" });
  const opened = h("div");
  const most = order === "lift" ? "lift" : "share";
  let at = null;

  const { line, shade, press } = tokenLine(reading, {
    onPick: (i) => pick(at === i ? null : i),
    onPoint: (i) => at === null && show(i),
    onLeave: () => at === null && show(null),
  });
  const shareOf =
    ({ id, latent }) =>
    (i) =>
      rows[i].find((other) => other.id === id && other.latent === latent)?.share ?? 0;

  async function open(event, { id, latent }) {
    if (event.ctrlKey || event.metaKey || event.shiftKey) return; // a tab of its own, as links do
    event.preventDefault();
    const close = h("button", { type: "button", class: "quiet", onclick: () => opened.replaceChildren() }, "Close");
    try {
      opened.replaceChildren(h("section", null, await latentCard(id, latent), close));
      shade(shareOf({ id, latent }));
      opened.scrollIntoView({ block: "nearest" });
    } catch (error) {
      opened.replaceChildren(h("p", { class: "faint" }, error.message));
    }
  }

  function list(active, text) {
    const longest = Math.max(1, ...active.map((one) => one.lift));
    return h(
      "div",
      { class: tables.length > 1 ? "wide" : null },
      h(
        "ol",
        { class: "peers" },
        best(active, most).map((one) => {
          const { label, peaks } = columnsOf[one.id];
          const bar = order === "lift" ? one.lift / longest : one.share;
          return h(
            "li",
            {
              class: "entry",
              vars: { "--share": String(Math.min(1, bar)) },
              onmouseenter: () => shade(shareOf(one)),
              onfocusin: () => shade(shareOf(one)),
            },
            h(
              "a",
              { href: link.latent(one.id, one.latent), onclick: (event) => open(event, one) },
              tables.length > 1 ? `${one.id} / ${one.latent}` : String(one.latent),
            ),
            known({ label: label[one.latent], peaks: peaks[one.latent] ?? [] }),
            h("span", { class: "num" }, order === "lift" ? `${number(one.lift)} ×` : text(one)),
          );
        }),
      ),
    );
  }

  function show(i) {
    if (i === null) {
      detail.replaceChildren(
        h("h3", null, order === "lift" ? "Beyond their base rate" : "Strongest in this text"),
        h("p", { class: "faint" }, ORDERS[order], reading.roles ? "; template tokens left out" : null),
        list(overText(rows, reading.roles), (one) => percent(one.share)),
      );
      shade((j) => 0.8 * Math.min(1, Math.max(0, ...rows[j].map((one) => one.share))));
      return;
    }
    const role = reading.roles ? ` · ${ROLE_NAMES[reading.roles[i]]}` : "";
    const active = rows[i].map((one) => ({ ...one, lift: 1 / one.density }));
    detail.replaceChildren(
      h("h3", null, "Active on ", token(reading.tokens[i]), h("small", null, role)),
      active.length
        ? list(active, (one) => number(one.value))
        : h("p", { class: "faint" }, "The first position is left out: it is a sink in many models."),
      h("button", { type: "button", class: "quiet", onclick: () => pick(null) }, "Whole text"),
    );
  }

  function pick(i) {
    at = i;
    press(i);
    onPick(i);
    show(i);
    line.querySelector("[aria-pressed='true']")?.closest(".template")?.classList.add("open");
  }

  pick(chosen !== null && chosen < reading.tokens.length ? chosen : null);
  const text = h("div", null, reading.roles?.includes("template") ? templateSwitch(line) : null, line);
  return h(
    "div",
    { class: "columns" },
    h("div", { class: "column" }, section("Tokens", "point at one, or pick it", text)),
    h("aside", { class: "column", "aria-label": "Active latents" }, opened, h("section", null, detail)),
  );
}

// What the address says is to be read: {text}, {messages, tools} or {conversation}.
function givenBy(query) {
  if (query.has("conversation")) return { conversation: Number(query.get("conversation")) };
  return addressed(query.get("given"), query.get("text") ?? "");
}

export async function render(query) {
  const { saes, live, meta } = await api.suite();
  const title = h(
    "header",
    { class: "title" },
    h("h1", null, "Try it"),
    h("p", { class: "lead" }, "Which latents are active on your text or conversation?"),
  );
  if (!live) return { title: "Try it", node: h("div", { class: "page" }, title, needsModel()) };
  const ids = Object.keys(saes);
  let given = givenBy(query);
  let kept = given.conversation === undefined ? null : given; // of the index, until something else is read
  const box = givenBox(kept ? { text: "" } : given);
  const options = (names, selected) =>
    names.map((name) => h("option", { value: name, selected: name === selected }, name));
  const choose = h("select", { id: "sae" }, options([ALL, ...ids], query.get("sae") ?? ALL));
  const order = h("select", { id: "order" }, options(Object.keys(ORDERS), query.get("by")));
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  const go = h("button", { type: "submit" }, "Read");
  let reading = null;
  let at = query.has("token") ? Number(query.get("token")) : null;

  async function show() {
    if (!reading) return;
    const [name, value] = given.conversation === undefined ? addressOf(given, "text") : Object.entries(given)[0];
    const address = new URLSearchParams({ [name]: value, sae: choose.value, by: order.value });
    history.replaceState(null, "", `#/try?${address}`);
    const wanted = choose.value === ALL ? ids : [choose.value];
    const tables = await Promise.all(wanted.map(async (id) => [id, await api.table(id)]));
    const keep = (i) => {
      at = i;
    };
    out.replaceChildren(view(reading, tables, 1 / meta.tokens, order.value, at, keep));
  }

  async function run(event) {
    event?.preventDefault();
    go.disabled = true;
    try {
      if (!kept && box.empty()) return;
      given = kept ?? box.value();
      said.textContent = "running the language model…";
      reading = await api.read(given);
      if (event) at = null;
      const count = `${number(reading.tokens.length)} tokens`;
      said.textContent =
        (kept ? `conversation ${kept.conversation} of the index, ` : "") +
        (reading.truncated ? `the first ${count}; the rest is cut off` : count);
      kept = null;
      await show();
    } catch (error) {
      said.textContent = api.reason(error);
    } finally {
      go.disabled = false;
    }
  }

  choose.addEventListener("change", show);
  order.addEventListener("change", show);
  box.node.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) run(event);
  });
  run();
  const asked = h(
    "form",
    { onsubmit: run },
    box.node,
    h("div", { class: "fields" }, field("SAE", choose), field("Order by", order), go, said),
  );
  return { title: "Try it", node: h("div", { class: "page" }, title, asked, out) };
}
