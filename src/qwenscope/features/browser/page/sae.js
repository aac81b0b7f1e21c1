// One SAE: density histogram, map, and the table of its latents, filtered, sorted and paged in the browser.

import { h, link, nats, number, percent, kindBadge, stat, token, section, written, ROLE_NAMES } from "./dom.js";
import { densities } from "./charts.js";
import { COLORS, latentMap } from "./map.js";
import { listed, readState, textsOf, walkable, writeState } from "./walk.js";
import * as api from "./api.js";

const PAGE = 100;
const COLUMNS = [
  ["latent", "latent"],
  ["peaks", "peaks at"],
  ["promoted", "promotes"],
  ["density", "density"],
  ["max", "max"],
  ["role", "role by lift"],
  ["split", "split by lift"],
  ["output", "output score"],
  ["confidence", "Δ confidence"],
];
const spaced = (name) => name.replace("_", " ");

function stats(sae) {
  return h(
    "dl",
    { class: "stats" },
    stat("latents", number(sae.dict_size)),
    stat("k", String(sae.k)),
    sae.activation ? stat("activation", sae.activation) : null,
    stat("alive", percent(1 - sae.dead / sae.dict_size)),
    stat("L0", sae.l0.toFixed(1), "mean number of active latents per token"),
    stat("tokens read", number(sae.tokens)),
    Object.entries(sae.quality).map(([split, { explained_variance: value }]) =>
      value === undefined ? null : stat(`explained variance, ${spaced(split)}`, value.toFixed(3)),
    ),
  );
}

// A choice among names, nothing of them at first.
function choice(id, text, names, chosen, onChange) {
  const select = h(
    "select",
    { id, "aria-label": text, onchange: () => onChange(select.value) },
    h("option", { value: "" }, text),
    names.map(([name, shown]) => h("option", { value: name, selected: name === chosen }, shown)),
  );
  return select;
}

export async function render(id, query) {
  const [suite, columns, lists] = await Promise.all([api.suite(), api.table(id), api.lists()]);
  const { saes, roles, meta } = suite;
  const sae = saes[id];
  const state = readState(query);
  let color = query.get("color") in COLORS ? query.get("color") : "density";
  let at = query.get("at");
  let shown = PAGE;
  let latents = [];
  let walk = "";
  const body = h("tbody");
  const count = h("p", { class: "faint", role: "status" });
  const showMore = () => {
    shown += PAGE;
    fill();
  };
  const more = h("button", { type: "button", class: "quiet", onclick: showMore }, "Show more");
  const chart = h("div");
  const texts = textsOf(columns);
  const set = (change) => {
    Object.assign(state, change);
    shown = PAGE;
    update();
  };

  const heads = COLUMNS.filter(([name]) => name === "latent" || columns[name]).map(([name, text]) => {
    const onclick = () =>
      set({
        sort: name,
        down: state.sort === name ? !state.down : ["density", "max", "output", "confidence"].includes(name),
      });
    return { name, head: h("th", { scope: "col", class: name }, h("button", { type: "button", onclick }, text)) };
  });
  const map =
    columns.x &&
    latentMap(columns, sae, suite, color, {
      href: (i) => `${link.latent(id, i)}?${walk}`,
      onColor: (kind) => {
        color = kind;
        write();
      },
      onPick: (i) => {
        at = i;
        write();
      },
    });

  function row(i) {
    const cells = [
      h("td", { class: "num latent" }, h("a", { href: `${link.latent(id, i)}?${walk}` }, String(i))),
      h(
        "td",
        { class: "peaks" },
        written(columns.label[i]) ? h("span", { class: "label" }, columns.label[i]) : null,
        columns.peaks[i].map((text) => token(text)),
      ),
      h(
        "td",
        { class: "promoted" },
        columns.promoted[i].map((text) => token(text, { class: "chip plain" })),
      ),
      h("td", { class: "num density" }, columns.density[i] ? percent(columns.density[i]) : "dead"),
      h("td", { class: "num max" }, number(columns.max[i])),
      h("td", { class: "role" }, columns.role[i] === null ? "" : ROLE_NAMES[roles[columns.role[i]]]),
      columns.split
        ? h("td", { class: "split" }, columns.split[i] === null ? "" : spaced(meta.splits[columns.split[i]]))
        : null,
      columns.output ? h("td", { class: "num output" }, number(columns.output[i])) : null,
      columns.confidence ? h("td", { class: "num confidence" }, nats(columns.confidence[i])) : null,
    ];
    return h("tr", null, cells);
  }

  function fill() {
    body.replaceChildren(...latents.slice(0, shown).map(row));
    more.hidden = latents.length <= shown;
  }

  function write() {
    const kept = writeState(state);
    if (color !== "density") kept.set("color", color);
    if (at !== null) kept.set("at", at);
    history.replaceState(null, "", link.sae(id) + (kept.size ? `?${kept}` : ""));
  }

  function update() {
    latents = listed(id, columns, texts, state, suite, lists);
    walk = walkable(id, state, latents);
    fill();
    count.textContent = `${number(latents.length)} of ${number(columns.density.length)} latents`;
    for (const { name, head } of heads) {
      if (name === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    chart.replaceChildren(
      densities(sae.density, {
        picked: (i) => i === state.bin,
        onPick: (i) => set({ bin: state.bin === i ? null : i }),
      }),
    );
    map?.show(latents);
    write();
  }

  const filter = h("input", {
    type: "search",
    id: "filter",
    value: state.q,
    placeholder: "token, label or number",
    autocomplete: "off",
    spellcheck: "false",
    oninput: (event) => set({ q: event.target.value }),
  });
  const dead = h("input", {
    type: "checkbox",
    id: "dead",
    checked: state.dead,
    onchange: (event) => set({ dead: event.target.checked }),
  });
  const found = (column, names) => names.filter((_, i) => columns[column]?.includes(i));
  const choices = [
    ["role", "any role", found("role", roles).map((role) => [role, ROLE_NAMES[role]])],
    ["split", "any split", found("split", meta.splits).map((split) => [split, spaced(split)])],
    ["list", "any list", Object.keys(lists).map((name) => [name, name])],
  ].map(([name, text, names]) =>
    names.length || state[name] ? choice(name, text, names, state[name], (value) => set({ [name]: value })) : null,
  );
  update();
  if (at !== null) map?.pick(Number(at));
  const step = (by) => () => {
    const links = [...body.querySelectorAll("a")];
    const next = links.indexOf(document.activeElement) + by;
    if (next === links.length && latents.length > shown) showMore();
    body.querySelectorAll("a")[next]?.focus();
  };
  return {
    title: id,
    node: h(
      "div",
      { class: "page" },
      h("header", { class: "title" }, h("p", { class: "eyebrow" }, kindBadge(sae)), h("h1", null, id), stats(sae)),
      h(
        "div",
        { class: "overview" },
        section("Density", "share of tokens a latent fires on; pick a bar to see its latents", chart),
        section(
          "Map",
          "decoder directions on their first two principal components; those of the list below stand out",
          map
            ? map.node
            : h("p", null, "This index has no map: build it again with ", h("code", null, "qwenscope index"), "."),
        ),
      ),
      section(
        "Latents",
        null,
        h(
          "div",
          { class: "tools" },
          h("label", { for: "filter", class: "hidden" }, "Filter latents"),
          filter,
          choices,
          h("label", { class: "check" }, dead, " dead ones too"),
          count,
        ),
        h(
          "div",
          { class: "scroll", tabindex: "0", role: "region", "aria-label": "Latents" },
          h(
            "table",
            { class: "latents" },
            h(
              "thead",
              null,
              h(
                "tr",
                null,
                heads.map(({ head }) => head),
              ),
            ),
            body,
          ),
        ),
        h("p", null, more),
      ),
    ),
    keys: { ArrowDown: step(1), ArrowUp: step(-1), j: step(1), k: step(-1) },
  };
}
