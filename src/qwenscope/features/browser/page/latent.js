// One latent: what it fires on, what it does to the output, whom it keeps company with, notes, steering.

import { h, link, number, percent, kindBadge, stat, token, section } from "./dom.js";
import { activations, bars, logits } from "./charts.js";
import { latentList, roleBars, splitBars, tokenList } from "./parts.js";
import { contexts, shaded } from "./contexts.js";
import { templateSwitch } from "./turns.js";
import { effectSections } from "./effects.js";
import { steerBox } from "./steer.js";
import { noteBox } from "./keeping.js";
import { walkOf } from "./walk.js";
import * as api from "./api.js";

const FIRST = 5; // examples at once, so that test and steer stand beside them
const KINDS = [
  ["top", "Strongest"],
  ["75-100", "75–100 %"],
  ["50-75", "50–75 %"],
  ["25-50", "25–50 %"],
  ["0-25", "0–25 %"],
  ["negative", "Not firing"],
];

function examples(found, roles) {
  const most = found.max || 1;
  const panel = h("div", { id: "examples", role: "tabpanel", tabindex: "0" });
  const kinds = KINDS.filter(([kind]) => found.examples.some((example) => example.kind === kind));
  const tabs = kinds.map(([kind, name]) =>
    h(
      "button",
      { type: "button", role: "tab", id: `tab-${kind}`, "aria-controls": "examples", onclick: () => choose(kind) },
      name,
    ),
  );
  function choose(kind) {
    tabs.forEach((tab, i) => {
      const on = kinds[i][0] === kind;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
    });
    panel.setAttribute("aria-labelledby", `tab-${kind}`);
    panel.replaceChildren(
      contexts(
        found.examples.filter((example) => example.kind === kind),
        most,
        roles,
        FIRST,
      ),
    );
  }
  const list = h(
    "div",
    {
      class: "tabs",
      role: "tablist",
      "aria-label": "Examples",
      onkeydown: (event) => {
        const by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
        if (!by) return;
        event.stopPropagation();
        const next = (tabs.indexOf(document.activeElement) + by + tabs.length) % tabs.length;
        choose(kinds[next][0]);
        tabs[next].focus();
      },
    },
    tabs,
  );
  if (!kinds.length) return h("p", { class: "faint" }, "This latent never fired on the indexed corpus.");
  choose(kinds[0][0]);
  return [list, templateSwitch(panel), panel];
}

// The latent on a text of one's own.
function testBox(id, latent, found) {
  const text = h("textarea", { id: "test", rows: "1", maxlength: "8000", placeholder: "Any text" });
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  async function run(event) {
    event.preventDefault();
    if (!text.value.trim()) return;
    said.textContent = "running the language model…";
    try {
      const { tokens, saes } = await api.read({ text: text.value });
      const activations = saes[id].map((row) => row.find(([other]) => other === latent)?.[1] ?? 0);
      const most = Math.max(...activations);
      out.replaceChildren(shaded(tokens, activations, activations.indexOf(most), found.max || most || 1, null));
      said.replaceChildren(
        most
          ? `largest ${number(most)}, ${percent(most / (found.max || most))} of the largest in the index · `
          : "not active · ",
        h("a", { href: link.read(text.value) }, "all latents on this text"),
      );
    } catch (error) {
      said.textContent = api.reason(error);
    }
  }
  return h(
    "form",
    { onsubmit: run },
    h("label", { class: "hidden", for: "test" }, "Text to test"),
    h("div", { class: "line" }, text, h("button", { type: "submit" }, "Test")),
    said,
    out,
  );
}

// This latent among the nearest ones at the other hook points, from the first layer to the last.
function throughDepth(id, latent, found, saes) {
  return [[id, latent, 1], ...found.elsewhere]
    .sort(([a], [b]) => saes[a].layer - saes[b].layer)
    .map(([sae, other, cosine]) => ({
      sae,
      latent: other,
      text: `${sae} / ${other}`,
      value: sae === id ? "here" : cosine.toFixed(2),
      share: Math.max(0, cosine),
      names: found.names,
    }));
}

// Which of how many it is in the list that it was opened from, once that is known.
function whereabouts(walk) {
  const said = h("span", { class: "faint whereabouts" });
  walk.then(
    ({ place, count, title, up }) => {
      if (count !== undefined)
        said.append(`${place < 0 ? "–" : number(place + 1)} of ${number(count)}, `, h("a", { href: up }, title));
    },
    (error) => said.append(api.reason(error)),
  );
  return said;
}

export async function render(id, number_, query) {
  const latent = Number(number_);
  const [{ saes, roles, meta, live }, found, note] = await Promise.all([
    api.suite(),
    api.latent(id, latent),
    noteBox(id, latent),
  ]);
  const sae = saes[id];
  const walk = walkOf(id, latent, query, sae.dict_size); // may need the whole table; the page does not wait for it
  const to = (by) => async () => {
    location.hash = (await walk).href(by);
  };
  const label = found.explanation?.label;
  const { names } = found;
  const push = { sae: id, latent: String(latent), mode: "add", strength: "" };

  const main = h(
    "div",
    { class: "column" },
    section(
      "Activations",
      `${number(found.fired)} tokens; logarithmic scale`,
      found.fired ? activations(found.histogram) : h("p", { class: "faint" }, "none"),
    ),
    live ? section("Test", "where is it active on your own text?", testBox(id, latent, found)) : null,
    section(
      "Examples",
      found.fired ? "shaded by activation; one strongest token per conversation" : null,
      examples(found, roles),
    ),
    live
      ? section("Steer", "the model writes on, pushed along this latent, beside its controls", steerBox(saes, [push]))
      : null,
    note.box,
  );

  const side = h(
    "aside",
    { class: "column", "aria-label": "Properties" },
    found.logits
      ? section(
          "Logits",
          "of the whole vocabulary, through final norm and unembedding, in standard deviations; marks: the tokens below",
          logits(found.logits, found.promoted, found.suppressed),
        )
      : null,
    section(
      "Promotes",
      found.logits ? null : "through final norm and unembedding; in standard deviations of the logits",
      tokenList(found.promoted, "up"),
    ),
    section("Suppresses", null, tokenList(found.suppressed, "down")),
    effectSections(found, live),
    section(
      "Roles",
      "share of its firings, and how many times that of all tokens, the tick",
      roleBars(found, sae, roles),
    ),
    section("Splits", null, splitBars(found, sae, meta.splits)),
    found.experts.length
      ? section(
          "Experts",
          `that the router of layer ${sae.layer} prefers where it fires`,
          bars(
            found.experts.map(([expert, share, base]) => [`expert ${expert}`, share, percent(share), base]),
            "Share of firings by expert",
          ),
        )
      : null,
    section(
      "Nearest latents",
      "by decoder cosine",
      latentList(
        found.neighbours.map(([other, value]) => ({ sae: id, latent: other, value: value.toFixed(2), names })),
      ),
    ),
    found.coactive.length
      ? section(
          "Fires together with",
          "correlation of firing",
          latentList(
            found.coactive.map(([other, phi, shared]) => ({
              sae: id,
              latent: other,
              value: phi.toFixed(2),
              title: `${shared} tokens of the sample`,
              names,
            })),
          ),
        )
      : null,
    section(
      "Through depth",
      "at each hook point the latent with the nearest decoder direction, its cosine as a bar",
      h("div", { class: "wide" }, latentList(throughDepth(id, latent, found, saes))),
    ),
  );

  return {
    title: `${id} / ${latent}`,
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        h("p", { class: "eyebrow" }, kindBadge(sae)),
        h(
          "div",
          { class: "heading" },
          h("h1", null, h("a", { href: link.sae(id) }, id), h("span", { class: "slash" }, " / "), String(latent)),
          h(
            "nav",
            { class: "steps", "aria-label": "Latents" },
            whereabouts(walk),
            h("button", { type: "button", class: "quiet", "aria-label": "Previous latent", onclick: to(-1) }, "←"),
            h("button", { type: "button", class: "quiet", "aria-label": "Next latent", onclick: to(1) }, "→"),
            found.fired && sae.map_shares
              ? h("a", { href: `${link.sae(id)}?at=${latent}`, title: "among the SAE's decoder directions" }, "Map")
              : null,
            h("a", { href: link.compare([[id, latent]]) }, "Compare"),
            note.star,
          ),
        ),
        label
          ? h(
              "p",
              { class: "lead", title: `labelled by ${found.explanation.client}` },
              label,
              h(
                "small",
                null,
                ["detection", "fuzzing"]
                  .filter((name) => typeof found.explanation[name] === "number")
                  .map((name) => ` · ${name} ${percent(found.explanation[name])}`),
              ),
            )
          : null,
        h(
          "p",
          { class: "chips" },
          names[`${id}/${latent}`].peaks.map((text) => token(text)),
        ),
        h(
          "dl",
          { class: "stats" },
          stat("density", found.fired ? percent(found.density) : "dead"),
          stat("largest activation", number(found.max)),
          stat("mean when active", number(found.mean)),
          stat("tokens", number(found.fired)),
        ),
      ),
      h("div", { class: "columns" }, main, side),
    ),
    keys: {
      ArrowRight: to(1),
      ArrowLeft: to(-1),
      j: to(1),
      k: to(-1),
      b: note.toggle,
      l: note.toLists,
      u: async () => {
        location.hash = (await walk).up;
      },
    },
  };
}
