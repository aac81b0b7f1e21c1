// Latents by example: texts that they should fire on, and texts that they should not.

import { h, field, needsModel, number, percent } from "./dom.js";
import { hitRow } from "./lists.js";
import * as api from "./api.js";

// Texts are apart by an empty line.
const textsOf = (value) =>
  value
    .split(/\n\s*\n/)
    .map((text) => text.trim())
    .filter(Boolean);

function figures(hit, texts) {
  return h(
    "span",
    { class: "faint figures", title: `fires on ${percent(hit.share)} of their tokens; expected: ${percent(hit.rate)}` },
    `in ${hit.texts} of ${texts} · ${number(hit.lift)} times`,
  );
}

export async function render(query) {
  const { live } = await api.suite();
  const title = h(
    "header",
    { class: "title" },
    h("h1", null, "Find by example"),
    h("p", { class: "lead" }, "Which latents fire on these texts, beyond their base rate?"),
  );
  if (!live) return { title: "Find", node: h("div", { class: "page" }, title, needsModel()) };
  const area = (name) => {
    const node = h("textarea", { rows: "6", maxlength: "20000" });
    node.value = query.get(name) ?? "";
    return node;
  };
  const on = area("on");
  const off = area("off");
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  const go = h("button", { type: "submit" }, "Find");

  async function run(event) {
    event?.preventDefault();
    const [texts, but_not] = [textsOf(on.value), textsOf(off.value)];
    if (!texts.length) return;
    go.disabled = true;
    said.textContent = "running the language model…";
    try {
      const hits = await api.find({ texts, but_not });
      const kept = new URLSearchParams({ on: on.value, ...(off.value.trim() ? { off: off.value } : {}) });
      history.replaceState(null, "", `#/find?${kept}`);
      said.textContent = hits.length
        ? `${hits.length === 50 ? "the first 50" : hits.length} latents; times: how much more often than expected, at least`
        : "No latent fires on these texts beyond its base rate.";
      out.replaceChildren(
        h(
          "ol",
          { class: "hits" },
          hits.map((hit) => hitRow(hit, figures(hit, texts.length))),
        ),
      );
    } catch (error) {
      said.textContent = api.reason(error);
    } finally {
      go.disabled = false;
    }
  }

  if (on.value.trim()) run();
  return {
    title: "Find",
    node: h(
      "div",
      { class: "page" },
      title,
      h(
        "form",
        { onsubmit: run },
        h("div", { class: "charts" }, field("Texts, an empty line between two", on), field("But not on these", off)),
        h("div", { class: "fields" }, go, said),
      ),
      out,
    ),
  };
}
