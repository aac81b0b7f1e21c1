// Steering: one or several latents at once, the steered continuation and its controls side by side as they are written;
// how strong a push may be, measured.

import { h, field, needsModel, number } from "./dom.js";
import { addressed, addressOf, givenBox } from "./conversation.js";
import { rangeBox } from "./range.js";
import * as api from "./api.js";

const MODES = [
  ["add", "add"],
  ["clamp", "clamp"],
  ["ablate", "ablate"],
];
const UNITS = [
  ["norm", "the residual norm"],
  ["max", "each latent's largest activation"],
];
const WHERE = [
  ["answer", "the assistant's turn"],
  ["all", "all positions"],
  ["prefill", "the prompt only"],
  ["decode", "the answer only"],
];
const PUSH = /^(.+):(\d+):(add|clamp|ablate):(-?\d+(?:\.\d+)?|)$/;
const DRAWING = [
  ["tokens", "Tokens", { min: "1", max: "200", step: "1", value: "48" }],
  ["temperature", "Temperature", { min: "0", max: "10", step: "any", value: "0" }],
  ["top_p", "Top p", { min: "0.01", max: "1", step: "any", value: "1" }],
  ["seed", "Seed", { min: "0", step: "1", value: "0" }],
];
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
  const much = h("input", {
    type: "number",
    step: "any",
    min: "-1000",
    max: "1000",
    value: strength,
    placeholder: "measured",
  });
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
    value: () => ({ sae: which.value, latent: Number(number_.value), mode: how.value, strength: much.value }),
    set: (strength) => {
      much.value = strength;
    },
  };
}

// As a request names it.
const askedOf = (value) => (value.messages ? value : { prompt: value.text });

// The whole form. pushes: [{sae, latent, mode, strength}]; an empty strength is measured first. The link to it is kept in
// the address if `own`.
export function steerBox(saes, pushes, { own = false, ...given } = {}) {
  const prompt = givenBox(addressed(given.given, given.prompt ?? PROMPT), {
    name: "Prompt",
    rows: "2",
    placeholder: PROMPT,
  });
  const units = select(UNITS, given.unit ?? "norm");
  const places = select(WHERE, given.where ?? "answer");
  const drawing = DRAWING.map(([name, title, properties]) => {
    const input = h("input", { type: "number", required: true, ...properties, value: given[name] ?? properties.value });
    return [name, input, field(title, input), properties.value];
  });
  const go = h("button", { type: "submit" }, "Steer");
  const stop = h("button", { type: "button", class: "quiet", hidden: true, onclick: api.stopRunning }, "Stop");
  const said = h("p", { class: "faint", role: "status" });
  const ranges = h("div");
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

  const pushOf = (row) => {
    const { strength, ...push } = row.value();
    return { ...push, strength: Number(strength), unit: units.value, where: places.value };
  };

  function address() {
    const query = new URLSearchParams(
      rows
        .map((row) => row.value())
        .map((push) => ["push", `${push.sae}:${push.latent}:${push.mode}:${push.strength}`]),
    );
    for (const [name, value] of [
      ["unit", units.value],
      ["where", places.value],
      ...drawing.filter(([, input, , usual]) => input.value !== usual).map(([name, input]) => [name, input.value]),
      addressOf(prompt.value(), "prompt"),
      ["run", "1"],
    ])
      query.append(name, value);
    return `#/steer?${query}`;
  }

  // Runs the language model for `work`, which may be stopped.
  async function busy(work) {
    go.disabled = find.disabled = true;
    stop.hidden = false;
    said.replaceChildren("running the language model…");
    try {
      said.replaceChildren((await work()) ?? "");
    } catch (error) {
      said.replaceChildren(api.reason(error));
    } finally {
      go.disabled = find.disabled = false;
      stop.hidden = true;
    }
  }

  async function measure() {
    const row = rows[0];
    units.value = "norm";
    const found = await api.range({ ...askedOf(prompt.value()), push: pushOf(row) });
    ranges.replaceChildren(rangeBox(found, (strength) => row.set(number(strength))));
  }

  async function run() {
    runs.replaceChildren();
    for (const row of rows)
      if (row.value().strength === "" && row.value().mode !== "ablate") {
        if (rows.length > 1) throw new Error("Give each of several latents its strength; that of one is measured.");
        await measure();
      }
    const asked = {
      ...askedOf(prompt.value()),
      pushes: rows.map(pushOf),
      ...Object.fromEntries(drawing.map(([name, input]) => [name, Number(input.value)])),
    };
    if (own) history.replaceState(null, "", address());
    const boxes = new Map();
    await api.steer(asked, (piece) => {
      if (!boxes.has(piece.run)) boxes.set(piece.run, runBox(runs, piece));
      boxes.get(piece.run).append(piece.text);
      if (piece.note) boxes.get(piece.run).after(h("p", { class: "faint" }, piece.note));
    });
    return own ? "" : h("a", { href: address() }, "Link to this steering");
  }

  const find = h(
    "button",
    { type: "button", class: "quiet", onclick: () => busy(measure), title: "try strengths from 0.03 to 4" },
    "Measure strengths",
  );
  const form = h(
    "form",
    {
      class: "steer",
      onsubmit: (event) => {
        event.preventDefault();
        busy(run);
      },
    },
    prompt.node,
    list,
    h(
      "div",
      { class: "fields" },
      field("in units of", units),
      field("at", places),
      drawing.map(([, , node]) => node),
    ),
    h(
      "div",
      { class: "fields" },
      h(
        "button",
        { type: "button", class: "quiet", onclick: () => add({ ...rows.at(-1).value(), strength: "0.25" }) },
        "Add a latent",
      ),
      find,
      go,
      stop,
    ),
    said,
    ranges,
    runs,
  );
  if (given.run) busy(run);
  return form;
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
  const first = { sae: Object.keys(saes)[0], latent: "0", mode: "add", strength: "" };
  const names = ["prompt", "given", "unit", "where", "run", ...DRAWING.map(([name]) => name)];
  const options = Object.fromEntries(names.filter((name) => query.has(name)).map((name) => [name, query.get(name)]));
  return {
    title: "Steer",
    node: h("div", { class: "page" }, title, steerBox(saes, asked.length ? asked : [first], { ...options, own: true })),
  };
}
