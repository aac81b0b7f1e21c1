// Steering: one or several latents at once, the steered continuation and its controls side by side as they are written.

import { h, field, needsModel, number } from "./dom.js";
import * as api from "./api.js";

const MODES = [
  ["add", "add"],
  ["clamp", "clamp"],
  ["ablate", "ablate"],
];
const UNITS = [
  ["max", "each latent's largest activation"],
  ["norm", "the residual norm"],
];
const WHERE = [
  ["all", "all positions"],
  ["prefill", "the prompt only"],
  ["decode", "the answer only"],
];
const PUSH = /^(.+):(\d+):(add|clamp|ablate):(-?\d+(?:\.\d+)?)$/;
const PROMPT = "Tell me about your day.";

const select = (options, chosen, properties) =>
  h(
    "select",
    properties,
    options.map(([value, text]) => h("option", { value, selected: value === chosen }, text)),
  );

// One latent to push: a row of the form, and what it says.
function pushRow(saes, { sae, latent, mode, strength }, onRemove) {
  const which = select(
    Object.keys(saes).map((id) => [id, id]),
    sae,
  );
  const number_ = h("input", { type: "number", min: "0", step: "1", required: true, value: latent });
  const how = select(MODES, mode, { onchange: update });
  const much = h("input", { type: "number", step: "any", min: "-1000", max: "1000", required: true, value: strength });
  const node = h(
    "div",
    { class: "fields" },
    field("SAE", which),
    field("Latent", number_),
    field("Mode", how),
    field("Strength", much),
    h("button", { type: "button", class: "quiet", onclick: () => onRemove(node) }, "Remove"),
  );
  function update() {
    much.disabled = how.value === "ablate"; // the latent's own activation is taken away, whatever the strength
  }
  update();
  return {
    node,
    value: () => ({ sae: which.value, latent: Number(number_.value), mode: how.value, strength: Number(much.value) }),
  };
}

// The whole form. pushes: [{sae, latent, mode, strength}]; the link to it is kept in the address if `own`.
export function steerBox(saes, pushes, { prompt = PROMPT, unit = "max", where = "all", own = false } = {}) {
  const text = h("textarea", { rows: "2", maxlength: "8000" });
  text.value = prompt;
  const units = select(UNITS, unit);
  const places = select(WHERE, where);
  const go = h("button", { type: "submit" }, "Steer");
  const said = h("p", { class: "faint", role: "status" });
  const runs = h("div", { class: "runs" });
  const list = h("div", { class: "pushes" });
  const rows = [];

  function add(push) {
    const row = pushRow(saes, push, (node) => {
      if (rows.length === 1) return;
      rows.splice(
        rows.findIndex((other) => other.node === node),
        1,
      );
      node.remove();
      mark();
    });
    rows.push(row);
    list.append(row.node);
    mark();
  }
  function mark() {
    list.classList.toggle("single", rows.length === 1);
  }
  pushes.forEach(add);

  function address(asked) {
    const query = new URLSearchParams(
      asked.pushes.map((push) => ["push", `${push.sae}:${push.latent}:${push.mode}:${push.strength}`]),
    );
    for (const [name, value] of [
      ["unit", units.value],
      ["where", places.value],
      ["prompt", text.value],
    ])
      query.append(name, value);
    return `#/steer?${query}`;
  }

  async function run(event) {
    event.preventDefault();
    const asked = {
      prompt: text.value,
      pushes: rows.map((row) => ({ ...row.value(), unit: units.value, where: places.value })),
    };
    go.disabled = true;
    said.replaceChildren("running the language model…");
    runs.replaceChildren();
    if (own) history.replaceState(null, "", address(asked));
    try {
      const boxes = new Map();
      await api.steer(asked, (piece) => {
        if (!boxes.has(piece.run)) boxes.set(piece.run, runBox(runs, piece));
        boxes.get(piece.run).append(piece.text);
      });
      said.replaceChildren(own ? "" : h("a", { href: address(asked) }, "Link to this steering"));
    } catch (error) {
      said.replaceChildren(api.reason(error));
    } finally {
      go.disabled = false;
    }
  }

  return h(
    "form",
    { class: "steer", onsubmit: run },
    field("Prompt", text),
    list,
    h(
      "div",
      { class: "fields" },
      field("in units of", units),
      field("at", places),
      h(
        "button",
        { type: "button", class: "quiet", onclick: () => add({ ...rows.at(-1).value(), strength: "1" }) },
        "Add a latent",
      ),
      go,
    ),
    said,
    runs,
  );
}

function runBox(runs, piece) {
  const written = h("p", { class: "written" });
  runs.append(
    h(
      "article",
      { class: piece.run === "steered" ? "run first" : "run" },
      h(
        "h3",
        null,
        piece.run,
        h(
          "small",
          { title: "KL divergence of the next token's distribution from the unsteered one, in nats" },
          ` KL ${number(piece.effect ?? 0)}`,
        ),
      ),
      written,
    ),
  );
  return written;
}

// The page: any latents, from the address.
export async function render(query) {
  const { saes, live } = await api.suite();
  const title = h(
    "header",
    { class: "title" },
    h("h1", null, "Steer"),
    h("p", { class: "lead" }, "The model writes on, pushed along latents, beside its controls."),
  );
  if (!live) return { title: "Steer", node: h("div", { class: "page" }, title, needsModel()) };
  const asked = query
    .getAll("push")
    .map((text) => PUSH.exec(text))
    .filter((found) => found && saes[found[1]])
    .map(([, sae, latent, mode, strength]) => ({ sae, latent, mode, strength }));
  const first = { sae: Object.keys(saes)[0], latent: "0", mode: "add", strength: "2" };
  const options = Object.fromEntries(
    ["prompt", "unit", "where"].filter((name) => query.has(name)).map((name) => [name, query.get(name)]),
  );
  return {
    title: "Steer",
    node: h("div", { class: "page" }, title, steerBox(saes, asked.length ? asked : [first], { ...options, own: true })),
  };
}
