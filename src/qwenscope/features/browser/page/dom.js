// Building elements. Text only ever enters the page as text nodes: nothing here parses HTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(element, properties, children) {
  for (const [name, value] of Object.entries(properties ?? {})) {
    if (value === undefined || value === null || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "vars") for (const [key, v] of Object.entries(value)) element.style.setProperty(key, v);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(
    ...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false),
  );
  return element;
}

export const h = (tag, properties, ...children) => fill(document.createElement(tag), properties, children);
export const s = (tag, properties, ...children) => fill(document.createElementNS(SVG, tag), properties, children);

export const link = {
  sae: (sae) => `#/sae/${encodeURIComponent(sae)}`,
  latent: (sae, latent) => `#/sae/${encodeURIComponent(sae)}/${latent}`,
  compare: (latents) => `#/compare?${new URLSearchParams(latents.map((latent) => ["at", latent.join("/")]))}`,
  read: (text) => `#/try?text=${encodeURIComponent(text)}`,
  readAt: ({ start, position }) => `#/try?conversation=${start}&token=${position}`,
  result: (name) => `#/results/${encodeURIComponent(name)}`,
  notes: (name) => `#/notes?list=${encodeURIComponent(name)}`,
  search: (q) => `#/search?q=${encodeURIComponent(q)}`,
};

export function percent(share) {
  const value = share * 100;
  const digits = value >= 10 ? { maximumFractionDigits: 0 } : { maximumSignificantDigits: 2 };
  return `${value.toLocaleString("en", digits)} %`;
}

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (Math.abs(value) >= 1000) return Math.round(value).toLocaleString("en");
  return String(Number(value.toPrecision(3)));
}

// A change, with its sign.
export const nats = (value) => (value === null ? "–" : `${value < 0 ? "−" : "+"}${number(Math.abs(value))}`);

// A token as it is shown alone: white space made visible, pieces of characters named.
export function visible(text) {
  if (text === "") return "∅";
  return text
    .replaceAll("\n", "↵")
    .replaceAll("\t", "⇥")
    .replace(/^ +| +$/g, (run) => "·".repeat(run.length))
    .replace(/\p{Cc}/gu, (sign) => `\\x${sign.charCodeAt(0).toString(16).padStart(2, "0")}`);
}

export const token = (text, properties) =>
  h("code", { class: "chip", title: JSON.stringify(text), ...properties }, visible(text));

// A label that someone, or a model, has written; those that the index makes of counts begin so.
export const written = (label) => label && !label.startsWith("by rule: ");

// What a latent is known by where it is one of many: its label, or where it peaks.
export function known({ label, peaks } = { label: "", peaks: [] }) {
  return h(
    "span",
    { class: "chips" },
    written(label) ? h("span", { class: "label" }, label) : peaks.slice(0, 2).map((text) => token(text)),
  );
}

export const ROLE_NAMES = {
  system: "system",
  user: "user",
  assistant: "assistant",
  tool_call: "tool call",
  tool_result: "tool result",
  think: "think",
  template: "template",
  text: "text",
};

export const kindName = (kind) => ({ deltanet: "DeltaNet", attention: "Attention" })[kind] ?? kind ?? "layer";

// Where an SAE reads: 22 for the residual stream after layer 22, 22.mlp or 22.mixer inside it.
export function place(sae) {
  return sae.site?.replace("layers.", "") ?? String(sae.layer);
}

export function kindBadge(sae) {
  return h(
    "span",
    { class: `kind ${sae.kind ?? "plain"}` },
    h("i", { "aria-hidden": "true" }),
    kindName(sae.kind),
    ` · layer ${place(sae)}`,
  );
}

export function stat(name, value, title) {
  return h("div", { class: "stat", title }, h("dt", null, name), h("dd", null, value));
}

export function section(title, note, ...children) {
  return h("section", null, h("h2", null, title, note ? h("small", null, note) : null), ...children);
}

let fields = 0;
export function field(text, control) {
  control.id ||= `field-${++fields}`;
  return h("div", { class: "field" }, h("label", { for: control.id }, text), control);
}

// What an exported site says where a language model would have to run.
export const needsModel = () =>
  h(
    "p",
    null,
    "Running text needs the language model: start the browser on a computer that has it, with ",
    h("code", null, "qwenscope browse INDEX"),
    ".",
  );
