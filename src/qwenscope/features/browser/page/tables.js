// Tables of latents and of what they are compared with, as results show them.

import { h, known, link, number } from "./dom.js";
import { whisker } from "./charts.js";

const FIRST = 10;

export const fixed = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toFixed(digits));
export const small = (value) => (value === null ? "–" : number(Number(value.toPrecision(2))));
export const between = (interval, form = fixed) =>
  interval ? h("small", null, `${form(interval[0])} to ${form(interval[1])}`) : null;

// A table that scrolls by itself where the page is narrow. rows: [cell or [class, cell]] each; a list of one is a heading.
export function table(name, heads, rows) {
  return h(
    "div",
    { class: "scroll", tabindex: "0", role: "region", "aria-label": name },
    h(
      "table",
      { class: "latents figured" },
      h(
        "thead",
        null,
        h(
          "tr",
          null,
          heads.map((text) => (text ? h("th", { scope: "col" }, text) : h("td"))),
        ),
      ),
      h(
        "tbody",
        null,
        rows.map((cells) =>
          cells.length === 1
            ? h("tr", { class: "group" }, h("th", { colspan: String(heads.length), scope: "rowgroup" }, cells[0]))
            : h(
                "tr",
                null,
                cells.map((cell) => h("td", { class: typeof cell === "string" ? "num" : null }, cell)),
              ),
        ),
      ),
    ),
  );
}

// A long table's first rows, so that what stands below it is seen; a button shows the rest.
export function brief(name, heads, rows, first = rows.slice(0, FIRST)) {
  if (rows.length <= first.length + 2) return table(name, heads, rows);
  const box = h("div", null, table(name, heads, first));
  const all = () => box.replaceChildren(table(name, heads, rows));
  box.append(h("p", null, h("button", { type: "button", class: "quiet", onclick: all }, "Show all")));
  return box;
}

// One cell: which latent, and what it is known by.
export const address = ({ sae, latent }, names) =>
  h(
    "div",
    { class: "named" },
    h("a", { href: link.latent(sae, latent) }, sae, h("span", { class: "slash" }, " / "), String(latent)),
    known(names[`${sae}/${latent}`]),
  );

export const measured = (value, interval, scale, tone, form = fixed) =>
  h(
    "div",
    { class: "measured" },
    whisker(value, interval, scale, tone),
    h("span", null, form(value)),
    between(interval, form),
  );
