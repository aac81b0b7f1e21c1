// One latent in brief: what a page shows beside a text, and what other pages may embed.

import { h, link, number, percent, token } from "./dom.js";
import { activations } from "./charts.js";
import { tokenList } from "./parts.js";
import { contexts } from "./contexts.js";
import * as api from "./api.js";

const STRONGEST = 4;
const PROMOTED = 6;

// target: where its links open.
export async function latentCard(id, latent, { target } = {}) {
  const [{ saes, roles }, found] = await Promise.all([api.suite(), api.latent(id, latent)]);
  if (!saes[id]) throw new Error(`There is no SAE ${id}.`);
  const strongest = found.examples.filter((example) => example.kind === "top").slice(0, STRONGEST);
  return h(
    "article",
    { class: "latent-card" },
    h(
      "h2",
      null,
      h("a", { href: `./${link.latent(id, latent)}`, target, rel: target ? "noopener" : null }, `${id} / ${latent}`),
    ),
    found.explanation ? h("p", { class: "label" }, found.explanation.label) : null,
    h(
      "p",
      { class: "faint" },
      found.fired
        ? `fires on ${percent(found.density)} of tokens, at most ${number(found.max)}`
        : "never fired on the indexed corpus",
    ),
    found.fired ? activations(found.histogram) : null,
    h("h3", null, "Promotes"),
    tokenList(found.promoted.slice(0, PROMOTED), "up"),
    strongest.length ? [h("h3", null, "Strongest examples"), contexts(strongest, found.max || 1, roles)] : null,
    h(
      "p",
      { class: "chips" },
      h("span", { class: "faint" }, "peaks at"),
      found.names[`${id}/${latent}`].peaks.map((text) => token(text)),
    ),
  );
}
