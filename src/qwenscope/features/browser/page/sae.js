// One SAE: density histogram and the table of its latents, filtered, sorted and paged in the browser.

import { h, link, number, percent, kindBadge, stat, token, section, written, ROLE_NAMES } from "./dom.js";
import { densities } from "./charts.js";
import * as api from "./api.js";

const PAGE = 100;
const COLUMNS = [
  ["latent", "latent"],
  ["peaks", "peaks at"],
  ["promoted", "promotes"],
  ["density", "density"],
  ["max", "max"],
  ["role", "role by lift"],
];

function order(rows, columns, sort, down) {
  const value =
    sort === "latent"
      ? (i) => i
      : sort === "peaks" || sort === "promoted"
        ? (i) => (columns[sort][i][0] ?? "\uffff").trim().toLowerCase()
        : (i) => columns[sort][i] ?? -1;
  const sign = down ? -1 : 1;
  return rows.sort((a, b) => {
    const x = value(a),
      y = value(b);
    return x < y ? -sign : x > y ? sign : a - b;
  });
}

export async function render(id, query) {
  const [{ saes, roles }, columns] = await Promise.all([api.suite(), api.table(id)]);
  const sae = saes[id];
  const state = {
    q: query.get("q") ?? "",
    sort: query.get("sort") ?? "density",
    down: query.get("down") !== "0",
    dead: query.get("dead") === "1",
    bin: query.has("bin") ? Number(query.get("bin")) : null,
    shown: PAGE,
  };
  const body = h("tbody");
  const count = h("p", { class: "faint", role: "status" });
  const more = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: () => {
        state.shown += PAGE;
        update();
      },
    },
    "Show more",
  );
  const chart = h("div");
  const texts = columns.peaks.map((peaks, i) =>
    [String(i), columns.label[i] ?? "", ...peaks, ...columns.promoted[i]].join("\n").toLowerCase(),
  );
  const binOf = (density) =>
    Math.min(
      sae.density.counts.length - 1,
      Math.max(0, Math.floor((Math.log10(density) - sae.density.first) * sae.density.per_decade)),
    );

  const heads = COLUMNS.map(([name, text]) => {
    const button = h(
      "button",
      {
        type: "button",
        onclick: () => {
          state.down = state.sort === name ? !state.down : name === "density" || name === "max";
          state.sort = name;
          update();
        },
      },
      text,
    );
    return { name, head: h("th", { scope: "col", class: name }, button) };
  });

  function row(i) {
    const cells = [
      h("td", { class: "num latent" }, h("a", { href: link.latent(id, i) }, String(i))),
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
    ];
    return h("tr", null, cells);
  }

  function update() {
    const wanted = state.q.trim().toLowerCase();
    let rows = [...columns.density.keys()].filter(
      (i) => (state.dead || columns.density[i] > 0) && (!wanted || texts[i].includes(wanted)),
    );
    if (state.bin !== null)
      rows = rows.filter((i) => columns.density[i] > 0 && binOf(columns.density[i]) === state.bin);
    order(rows, columns, state.sort, state.down);
    rows.sort((a, b) => (String(b) === wanted) - (String(a) === wanted)); // the latent of that number before all
    body.replaceChildren(...rows.slice(0, state.shown).map(row));
    count.textContent = `${number(rows.length)} of ${number(columns.density.length)} latents`;
    more.hidden = rows.length <= state.shown;
    for (const { name, head } of heads) {
      if (name === state.sort) head.setAttribute("aria-sort", state.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    }
    chart.replaceChildren(
      densities(sae.density, {
        picked: (i) => i === state.bin,
        onPick: (i) => {
          state.bin = state.bin === i ? null : i;
          update();
        },
      }),
    );
    const kept = new URLSearchParams();
    if (state.q) kept.set("q", state.q);
    if (state.sort !== "density") kept.set("sort", state.sort);
    if (!state.down) kept.set("down", "0");
    if (state.dead) kept.set("dead", "1");
    if (state.bin !== null) kept.set("bin", state.bin);
    history.replaceState(null, "", link.sae(id) + (kept.size ? `?${kept}` : ""));
  }

  const filter = h("input", {
    type: "search",
    id: "filter",
    value: state.q,
    placeholder: "token, label or number",
    autocomplete: "off",
    spellcheck: "false",
    oninput: (event) => {
      state.q = event.target.value;
      state.shown = PAGE;
      update();
    },
  });
  const dead = h("input", {
    type: "checkbox",
    id: "dead",
    checked: state.dead,
    onchange: (event) => {
      state.dead = event.target.checked;
      update();
    },
  });
  update();
  return {
    title: id,
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        h("p", { class: "eyebrow" }, kindBadge(sae)),
        h("h1", null, id),
        h(
          "dl",
          { class: "stats" },
          stat("latents", number(sae.dict_size)),
          stat("k", String(sae.k)),
          sae.activation ? stat("activation", sae.activation) : null,
          stat("alive", percent(1 - sae.dead / sae.dict_size)),
          stat("L0", sae.l0.toFixed(1), "mean number of active latents per token"),
          stat("tokens read", number(sae.tokens)),
          Object.entries(sae.quality).map(([split, { explained_variance: value }]) =>
            value === undefined ? null : stat(`explained variance, ${split.replace("_", " ")}`, value.toFixed(3)),
          ),
        ),
      ),
      section("Density", "share of tokens a latent fires on; pick a bar to see its latents", chart),
      section(
        "Latents",
        null,
        h(
          "div",
          { class: "tools" },
          h("label", { for: "filter", class: "hidden" }, "Filter latents"),
          filter,
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
    keys: {
      ArrowDown: () => step(body, 1),
      ArrowUp: () => step(body, -1),
      j: () => step(body, 1),
      k: () => step(body, -1),
    },
  };
}

function step(body, by) {
  const links = [...body.querySelectorAll("a")];
  const next = links[links.indexOf(document.activeElement) + by];
  next?.focus();
}
