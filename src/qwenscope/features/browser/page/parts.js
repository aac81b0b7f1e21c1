// Pieces of a latent's page that others show, too.

import { h, link, known, number, percent, token, ROLE_NAMES } from "./dom.js";
import { bars } from "./charts.js";

// [token, standard deviations of the logits], with bars; sign: up or down.
export function tokenList(rows, sign) {
  const most = Math.max(...rows.map(([, score]) => Math.abs(score)), 1e-9);
  return h(
    "ul",
    { class: `tokens ${sign}` },
    rows.map(([text, score]) =>
      h(
        "li",
        { vars: { "--share": String(Math.abs(score) / most) } },
        token(text, { class: "chip plain" }),
        h("span", { class: "num" }, number(score)),
      ),
    ),
  );
}

// rows: where each links to, what stands there, its value, and perhaps how much of its line a bar takes.
export function latentList(rows) {
  return h(
    "ul",
    { class: "peers" },
    rows.map(({ sae, latent, value, title, names, text, share, href }) =>
      h(
        "li",
        { title, ...(share === undefined ? {} : { class: "entry", vars: { "--share": String(share) } }) },
        h("a", { href: href ?? link.latent(sae, latent) }, text ?? String(latent)),
        known(names[`${sae}/${latent}`]),
        h("span", { class: "num" }, value),
      ),
    ),
  );
}

// Two digits, and no more than two places.
const times = (lift) => number(Number(lift < 0.1 ? lift.toFixed(2) : lift.toPrecision(2)));

// A share, and how many times the share of all tokens it is.
const shareAndLift = (share, base) => [
  percent(share),
  base ? h("small", { class: "lift" }, `${times(share / base)} ×`) : null,
];

function shares(counts, bases, names) {
  const total = counts.reduce((sum, count) => sum + count, 0) || 1;
  return names
    .map((name, i) => [name, counts[i] / total, shareAndLift(counts[i] / total, bases[i]), bases[i]])
    .filter((row, i) => counts[i] || bases[i]);
}

// How a latent's firings are spread over roles, beside all tokens.
export const roleBars = (found, sae, roles) =>
  bars(
    shares(
      found.roles,
      sae.base_roles,
      roles.map((role) => ROLE_NAMES[role]),
    ),
    "Share of firings by role",
  );

export const splitBars = (found, sae, splits) =>
  bars(
    shares(
      found.splits,
      sae.base_splits,
      splits.map((split) => split.replace("_", " ")),
    ),
    "Share of firings by split",
  );
