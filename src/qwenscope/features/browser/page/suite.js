// Overview: the language model's depth, and one card per SAE in a grid of kinds by depth.

import { h, link, number, percent, place, kindName, section, stat } from "./dom.js";
import { sparkline } from "./charts.js";
import * as api from "./api.js";

// Neighbouring hooked layers stand in one column: they are what is compared.
function columns(saes) {
  const byLayer = Object.entries(saes).sort((a, b) => a[1].layer - b[1].layer);
  const groups = [];
  for (const entry of byLayer) {
    const last = groups.at(-1);
    if (last && entry[1].layer - last.at(-1)[1].layer <= 1) last.push(entry);
    else groups.push([entry]);
  }
  return groups;
}

function ladder(kinds, saes) {
  const ids = Object.keys(saes);
  return h(
    "ol",
    { class: "ladder", "aria-label": "Layers of the language model" },
    kinds.map((kind, layer) => {
      const here = ids.filter((id) => saes[id].layer === layer);
      const names = here.join(", ");
      const cell = {
        class: `${kind ?? "plain"}${names ? " hooked" : ""}`,
        title: `layer ${layer}, ${kindName(kind)}${names ? `: ${names}` : ""}`,
      };
      return h(
        "li",
        cell,
        names ? h("a", { href: link.sae(here[0]), "aria-label": `${names}, layer ${layer}` }, String(layer)) : null,
      );
    }),
  );
}

function quality(sae) {
  const splits = Object.entries(sae.quality);
  if (!splits.length) return h("p", { class: "faint" }, "not evaluated");
  const rows = [
    ["explained variance", "explained_variance"],
    ["CE recovered", "ce_recovered_mean"],
  ];
  return h(
    "table",
    { class: "quality" },
    h(
      "thead",
      null,
      h(
        "tr",
        null,
        h("td"),
        splits.map(([split]) => h("th", { scope: "col" }, split.replace("_", " "))),
      ),
    ),
    h(
      "tbody",
      null,
      rows.map(([name, key]) =>
        h(
          "tr",
          null,
          h("th", { scope: "row" }, name),
          splits.map(([, figures]) =>
            h("td", { class: "num" }, figures[key] === undefined ? "–" : figures[key].toFixed(3)),
          ),
        ),
      ),
    ),
  );
}

function card([id, sae]) {
  const active = sae.activation ? `${sae.activation} ` : "";
  return h(
    "article",
    { class: `card ${sae.kind ?? "plain"}` },
    h("h3", null, h("a", { href: link.sae(id) }, id)),
    h("p", { class: "faint" }, `layer ${place(sae)} · ${number(sae.dict_size)} latents · ${active}k ${sae.k}`),
    sparkline(sae.density),
    quality(sae),
    h("p", { class: "faint" }, `${percent(1 - sae.dead / sae.dict_size)} of latents alive · L0 ${sae.l0.toFixed(1)}`),
  );
}

export async function render() {
  const { meta, saes } = await api.suite();
  const groups = columns(saes);
  const kinds = [...new Set(Object.values(saes).map((sae) => sae.kind))];
  const grid = h(
    "div",
    { class: "grid", vars: { "--columns": String(groups.length) } },
    kinds.flatMap((kind, row) =>
      groups.map((group, column) => {
        const mine = group.filter(([, sae]) => sae.kind === kind);
        return mine.length
          ? h(
              "div",
              { class: "cell", vars: { "--row": String(row + 1), "--column": String(column + 1) } },
              mine.map(card),
            )
          : null;
      }),
    ),
  );
  const legend = h(
    "p",
    { class: "legend" },
    [...new Set(meta.language_model.layers)].map((kind) =>
      h("span", { class: `kind ${kind ?? "plain"}` }, h("i", { "aria-hidden": "true" }), kindName(kind)),
    ),
  );
  return {
    title: meta.name,
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        h("p", { class: "eyebrow" }, "Feature index"),
        h("h1", null, meta.name),
        h(
          "dl",
          { class: "stats" },
          stat("language model", meta.language_model.name),
          stat("SAEs", String(Object.keys(saes).length)),
          stat("latents", number(Object.values(saes).reduce((sum, sae) => sum + sae.dict_size, 0))),
          stat("tokens read", number(meta.tokens)),
          stat("corpus", meta.data),
        ),
      ),
      section(
        "Depth",
        `${meta.language_model.layers.length} layers; hooked ones are numbered`,
        ladder(meta.language_model.layers, saes),
        legend,
      ),
      section("SAEs", "rows by layer kind, columns by depth; bars: latents by density", grid),
    ),
  };
}
