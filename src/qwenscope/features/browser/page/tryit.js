// Try it: run the language model on a text and see which latents are active on each token.

import { h, field, known, link, needsModel, number, percent, token, visible, section, ROLE_NAMES } from "./dom.js";
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
        share: Math.min(1, value / (columns.max[latent] || value)),
        density: Math.max(columns.density[latent], leastDensity),
      })),
    ),
  );
}

// Each latent once, with its largest share and how often it fires beside its density.
function overText(rows) {
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

// The tokens as buttons, and beside them what is active on one of them or on all.
function view(reading, tables, leastDensity, order, chosen, onPick) {
  const columnsOf = Object.fromEntries(tables);
  const rows = activeRows(reading, tables, leastDensity);
  const detail = h("div", { class: "active" });
  const line = h("p", { class: "text readable", role: "group", "aria-label": "Tokens" });
  let at = null;

  const heat = (share) => rows.forEach((row, i) => line.children[i].style.setProperty("--heat", String(share(row))));
  const shade = ({ id, latent }) =>
    heat((row) => row.find((other) => other.id === id && other.latent === latent)?.share ?? 0);
  const most = order === "lift" ? "lift" : "share";

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
              vars: { "--share": String(bar) },
              onmouseenter: () => shade(one),
              onfocusin: () => shade(one),
            },
            h(
              "a",
              { href: link.latent(one.id, one.latent) },
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
        h("p", { class: "faint" }, ORDERS[order]),
        list(overText(rows), (one) => percent(one.share)),
      );
      heat((row) => 0.8 * Math.max(0, ...row.map((one) => one.share)));
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
    [...line.children].forEach((button, j) => button.setAttribute("aria-pressed", String(j === i)));
    onPick(i);
    show(i);
  }

  line.append(
    ...reading.tokens.map((text, i) =>
      h(
        "button",
        {
          type: "button",
          class: "tok",
          "aria-pressed": "false",
          "aria-label": `token ${i}: ${visible(text)}`,
          onclick: () => pick(at === i ? null : i),
          onmouseenter: () => at === null && show(i),
        },
        text === "" ? "⋯" : text.replaceAll("\n", "↵"),
      ),
    ),
  );
  line.addEventListener("mouseleave", () => at === null && show(null));
  pick(chosen !== null && chosen < reading.tokens.length ? chosen : null);
  return h(
    "div",
    { class: "columns" },
    h("div", { class: "column" }, section("Tokens", "point at one, or pick it", line)),
    h("aside", { class: "column", "aria-label": "Active latents" }, h("section", null, detail)),
  );
}

export async function render(query) {
  const { saes, live, meta } = await api.suite();
  const title = h(
    "header",
    { class: "title" },
    h("h1", null, "Try it"),
    h("p", { class: "lead" }, "Which latents are active on your text?"),
  );
  if (!live) return { title: "Try it", node: h("div", { class: "page" }, title, needsModel()) };
  const ids = Object.keys(saes);
  const area = h("textarea", { id: "text", rows: "4", maxlength: "8000", placeholder: "Any text" });
  area.value = query.get("text") ?? "";
  const chat = h("input", { type: "checkbox", id: "chat", checked: query.get("chat") === "1" });
  const options = (names, selected) =>
    names.map((name) => h("option", { value: name, selected: name === selected }, name));
  const choose = h("select", { id: "sae" }, options([...ids, ALL], query.get("sae") ?? ids[0]));
  const order = h("select", { id: "order" }, options(Object.keys(ORDERS), query.get("by")));
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  const go = h("button", { type: "submit" }, "Read");
  let reading = null;
  let at = null;

  async function show() {
    if (!reading) return;
    const kept = new URLSearchParams({ text: area.value, sae: choose.value, by: order.value });
    if (chat.checked) kept.set("chat", "1");
    history.replaceState(null, "", `#/try?${kept}`);
    const wanted = choose.value === ALL ? ids : [choose.value];
    const tables = await Promise.all(wanted.map(async (id) => [id, await api.table(id)]));
    const keep = (i) => {
      at = i;
    };
    out.replaceChildren(view(reading, tables, 1 / meta.tokens, order.value, at, keep));
  }

  async function run(event) {
    event?.preventDefault();
    if (!area.value.trim()) return;
    go.disabled = true;
    said.textContent = "running the language model…";
    try {
      reading = await api.read(area.value, chat.checked);
      at = null;
      said.textContent = `${reading.tokens.length} tokens`;
      await show();
    } catch (error) {
      said.textContent = api.reason(error);
    } finally {
      go.disabled = false;
    }
  }

  choose.addEventListener("change", show);
  order.addEventListener("change", show);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) run();
  });
  if (area.value) run();
  const asked = h(
    "form",
    { onsubmit: run },
    h("label", { class: "hidden", for: "text" }, "Text"),
    area,
    h(
      "div",
      { class: "fields" },
      field("SAE", choose),
      field("Order by", order),
      h("label", { class: "check" }, chat, " as a user's message"),
      go,
      said,
    ),
  );
  return { title: "Try it", node: h("div", { class: "page" }, title, asked, out) };
}
