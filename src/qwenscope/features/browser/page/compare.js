// Two to four latents side by side.

import { h, field, kindBadge, link, number, percent, section, stat, token, written } from "./dom.js";
import { activations } from "./charts.js";
import { contexts } from "./contexts.js";
import { latentList, roleBars, splitBars, tokenList } from "./parts.js";
import { table } from "./tables.js";
import * as api from "./api.js";

const MOST = 4;
const EXAMPLES = 5;
const name = ([sae, latent]) => `${sae} / ${latent}`;
const same = (a, b) => a[0] === b[0] && a[1] === b[1];

// "sae/40", or "40" of the SAE that is there already.
function address(text, otherwise) {
  const [, sae = otherwise, latent] = /^(?:(.+?)\s*\/\s*)?(\d{1,9})$/.exec(text.trim()) ?? [];
  return latent === undefined ? null : [sae, Number(latent)];
}

function side({ at, found, sae }, all, { roles, meta }) {
  const others = all.filter((other) => !same(other.at, at)).map((other) => other.at);
  const heading = h(
    "div",
    { class: "heading" },
    h("h2", null, h("a", { href: link.latent(...at) }, name(at))),
    others.length ? h("a", { href: link.compare(others), "aria-label": `Leave out ${name(at)}` }, "leave out") : null,
  );
  const strongest = found.examples.filter(({ kind }) => kind === "top").slice(0, EXAMPLES);
  const label = found.explanation?.label;
  return h(
    "section",
    { "aria-label": name(at) },
    heading,
    h("p", { class: "eyebrow" }, kindBadge(sae)),
    written(label) ? h("p", null, label) : null,
    h(
      "p",
      { class: "chips" },
      found.names[at.join("/")].peaks.map((text) => token(text)),
    ),
    h(
      "dl",
      { class: "stats" },
      stat("density", found.fired ? percent(found.density) : "dead"),
      stat("largest activation", number(found.max)),
      stat("mean when active", number(found.mean)),
    ),
    h("h3", null, "Activations"),
    found.fired ? activations(found.histogram) : h("p", { class: "faint" }, "none"),
    h("h3", null, "Strongest examples"),
    contexts(strongest, found.max || 1, roles),
    h("h3", null, "Promotes"),
    tokenList(found.promoted, "up"),
    h("h3", null, "Suppresses"),
    tokenList(found.suppressed, "down"),
    h("h3", null, "Roles"),
    roleBars(found, sae, roles),
    h("h3", null, "Splits"),
    splitBars(found, sae, meta.splits),
  );
}

// What the index knows of two latents together; it keeps the nearest of each alone.
function between(a, b) {
  const near = ({ found }, { at }) =>
    found.neighbours.find(([latent]) => a.at[0] === b.at[0] && latent === at[1])?.[1] ??
    found.elsewhere.find(([sae, latent]) => same([sae, latent], at))?.[2];
  const together = ({ found }, { at }) =>
    a.at[0] === b.at[0] ? found.coactive.find(([latent]) => latent === at[1])?.[1] : undefined;
  const shown = (value) => value?.toFixed(2) ?? "–";
  const promoted = new Set(a.found.promoted.map(([text]) => text));
  const both = b.found.promoted.map(([text]) => text).filter((text) => promoted.has(text));
  return [
    h("span", null, `${name(a.at)} and ${name(b.at)}`),
    shown(near(a, b) ?? near(b, a)),
    shown(together(a, b) ?? together(b, a)),
    h("span", { class: "chips" }, both.length ? both.map((text) => token(text, { class: "chip plain" })) : "none"),
  ];
}

function pairs(all) {
  const rows = all.flatMap((a, i) => all.slice(i + 1).map((b) => between(a, b)));
  const heads = ["", "decoder cosine", "correlation of firing", "both promote"];
  return section(
    "Between them",
    "–: not among the nearest that the index keeps of either",
    table("Between them", heads, rows),
  );
}

function another(all) {
  const near = all[0].found.neighbours.filter(([latent]) => !all.some(({ at }) => same(at, [all[0].at[0], latent])));
  const input = h("input", { type: "text", maxlength: "200", placeholder: `${all[0].at[0]}/40`, required: true });
  const said = h("p", { class: "faint", role: "status" });
  const go = (event) => {
    event.preventDefault();
    const added = address(input.value, all[0].at[0]);
    if (added) location.hash = link.compare([...all.map(({ at }) => at), added]);
    else said.textContent = "a latent is written like sae_attn_mid/40";
  };
  return section(
    "Beside",
    null,
    h(
      "form",
      { onsubmit: go },
      h("div", { class: "fields" }, field("Another latent", input), h("button", { type: "submit" }, "Add"), said),
    ),
    near.length
      ? latentList(
          near.slice(0, EXAMPLES).map(([latent, cosine]) => ({
            href: link.compare([...all.map(({ at }) => at), [all[0].at[0], latent]]),
            sae: all[0].at[0],
            latent,
            value: cosine.toFixed(2),
            title: "by decoder cosine",
            names: all[0].found.names,
          })),
        )
      : null,
  );
}

export async function render(asked) {
  const suite = await api.suite();
  const wanted = asked.getAll("at").map((text) => address(text) ?? [text, NaN]);
  const chosen = wanted.filter((at, i) => wanted.findIndex((other) => same(other, at)) === i);
  if (!chosen.length || chosen.length > MOST) throw new Error(`One to ${MOST} latents are compared, by at=SAE/LATENT.`);
  const unknown = chosen.find(([sae, latent]) => !suite.saes[sae] || !(latent < suite.saes[sae].dict_size));
  if (unknown) throw new Error(`There is no latent ${unknown.join("/")}.`);
  const all = await Promise.all(
    chosen.map(async (at) => ({ at, sae: suite.saes[at[0]], found: await api.latent(...at) })),
  );
  return {
    title: "Compare",
    node: h(
      "div",
      { class: "page" },
      h("header", { class: "title" }, h("h1", null, "Compare latents")),
      all.length > 1 ? pairs(all) : null,
      h(
        "div",
        { class: "sides" },
        all.map((one) => side(one, all, suite)),
      ),
      all.length < MOST ? another(all) : null,
    ),
  };
}
