// One latent: what it fires on, what it does to the output, whom it keeps company with, notes, steering.

import { h, link, number, percent, kindBadge, stat, token, section } from "./dom.js";
import { activations, bars } from "./charts.js";
import { latentList, roleBars, splitBars, tokenList } from "./parts.js";
import { contexts, shaded } from "./contexts.js";
import { steerBox } from "./steer.js";
import * as api from "./api.js";

const FIRST = 8; // examples at once, so that test and steer stand near them
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
  return [list, panel];
}

// The latent on a text of one's own.
function testBox(id, latent, found) {
  const text = h("textarea", { id: "test", rows: "2", maxlength: "8000", placeholder: "Any text" });
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  async function run(event) {
    event.preventDefault();
    if (!text.value.trim()) return;
    said.textContent = "running the language model…";
    try {
      const { tokens, saes } = await api.read(text.value, false);
      const activations = saes[id].map((row) => row.find(([other]) => other === latent)?.[1] ?? 0);
      const most = Math.max(...activations);
      out.replaceChildren(shaded(tokens, activations, activations.indexOf(most), found.max || most || 1, () => ""));
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
    text,
    h("div", { class: "fields" }, h("button", { type: "submit" }, "Test"), said),
    out,
  );
}

async function noteBox(id, latent) {
  const mine = await api.note(id, latent);
  const star = h(
    "button",
    { type: "button", class: "star", "aria-pressed": String(mine.bookmarked), onclick: toggle },
    "Bookmark",
  );
  const said = h("span", { class: "faint", role: "status" });
  const area = h("textarea", {
    id: "note",
    rows: "3",
    maxlength: "4000",
    placeholder: "What does it do?",
    onchange: keep,
  });
  area.value = mine.note;
  let last = Promise.resolve(); // one after the other: the newest is what stays
  function keep() {
    said.textContent = "";
    last = last.then(put);
    return last;
  }
  async function put() {
    try {
      await api.keepNote({
        sae: id,
        latent,
        note: area.value,
        bookmarked: star.getAttribute("aria-pressed") === "true",
      });
      said.textContent = "kept";
    } catch (error) {
      said.textContent = api.reason(error);
    }
  }
  function toggle() {
    star.setAttribute("aria-pressed", String(star.getAttribute("aria-pressed") !== "true"));
    return keep();
  }
  return {
    star,
    toggle,
    box: section("Notes", null, h("label", { class: "hidden", for: "note" }, "Notes on this latent"), area, said),
  };
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

export async function render(id, number_) {
  const latent = Number(number_);
  const [{ saes, roles, meta, live }, found] = await Promise.all([api.suite(), api.latent(id, latent)]);
  const sae = saes[id];
  const note = await noteBox(id, latent);
  const to = (by) => () => {
    location.hash = link.latent(id, (latent + by + sae.dict_size) % sae.dict_size);
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
    section(
      "Examples",
      found.fired ? "shaded by activation; one strongest token per conversation" : null,
      examples(found, roles),
    ),
    live ? section("Test", "where is it active on your own text?", testBox(id, latent, found)) : null,
    live
      ? section("Steer", "the model writes on, pushed along this latent, beside its controls", steerBox(saes, [push]))
      : null,
    note.box,
  );

  const side = h(
    "aside",
    { class: "column", "aria-label": "Properties" },
    section(
      "Promotes",
      "through final norm and unembedding; in standard deviations of the logits",
      tokenList(found.promoted, "up"),
    ),
    section("Suppresses", null, tokenList(found.suppressed, "down")),
    section("Roles", "share of its firings; tick: of all tokens", roleBars(found, sae, roles)),
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
            h("button", { type: "button", class: "quiet", "aria-label": "Previous latent", onclick: to(-1) }, "←"),
            h("button", { type: "button", class: "quiet", "aria-label": "Next latent", onclick: to(1) }, "→"),
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
      u: () => {
        location.hash = link.sae(id);
      },
    },
  };
}
