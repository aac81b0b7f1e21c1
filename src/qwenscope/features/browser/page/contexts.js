// Text with shaded tokens.

import { h, link, visible, number, ROLE_NAMES } from "./dom.js";
import { LIVE } from "./api.js";

const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");

// Tokens shaded by activation over `most`; the one at `peak` is underlined. role(i): name of a token's role, or nothing.
// The further tokens of a character have no text: they are one span with the first, and shade it.
export function shaded(tokens, activations, peak, most, role) {
  const starts = [...tokens.keys()].filter((i) => tokens[i] || !i);
  return h(
    "p",
    { class: "text" },
    starts.map((i, n) => {
      const text = tokens[i];
      const end = starts[n + 1] ?? tokens.length;
      const value = Math.max(...activations.slice(i, end));
      const properties = { class: `tok${i <= peak && peak < end && value > 0 ? " peak" : ""}` };
      if (value > 0) properties.vars = { "--heat": Math.min(1, value / most).toFixed(3) };
      properties.title = `${visible(text)}  ${number(value)}${role(i) ? `  (${role(i)})` : ""}`;
      return [h("span", properties, shown(text)), text.includes("\n") ? h("wbr") : null];
    }),
  );
}

function actions(text) {
  const copy = h(
    "button",
    {
      type: "button",
      class: "plain",
      onclick: async () => {
        await navigator.clipboard.writeText(text);
        copy.textContent = "copied";
      },
    },
    "copy",
  );
  return h(
    "span",
    { class: "actions" },
    navigator.clipboard ? copy : null,
    LIVE ? h("a", { href: link.read(text), title: "which latents are active here?" }, "read") : null,
  );
}

// One example: its tokens, the strength at the peak, role and what to do with the text beside it.
function context({ example, times }, most, roles) {
  const { tokens, activations, peak } = example;
  const role = (i) => ROLE_NAMES[roles[example.roles[i]]];
  return h(
    "li",
    { class: "context" },
    h(
      "span",
      { class: "strength num", title: "activation at the peak" },
      activations[peak] > 0 ? number(activations[peak]) : "0",
    ),
    shaded(tokens, activations, peak, most, role),
    h(
      "span",
      {
        class: "where",
        title: `conversation ${example.conversation}, token ${example.position}, source ${example.source}`,
      },
      h(
        "span",
        { class: "role" },
        role(peak),
        times > 1 ? h("small", { title: `${times} conversations have this text` }, ` ×${times}`) : null,
      ),
      actions(tokens.join("")),
    ),
  );
}

// Equal texts (one system prompt opens many conversations) are shown once, with their number; beyond `first`, when asked.
export function contexts(examples, most, roles, first = Infinity) {
  const groups = new Map();
  for (const example of examples) {
    const key = JSON.stringify([example.tokens, example.peak]);
    if (groups.has(key)) groups.get(key).times += 1;
    else groups.set(key, { example, times: 1 });
  }
  const items = [...groups.values()].map((group) => context(group, most, roles));
  const list = h("ol", { class: "contexts" }, items.slice(0, first));
  if (items.length <= first) return list;
  const more = h(
    "button",
    {
      type: "button",
      class: "quiet more",
      onclick: () => {
        list.append(...items.slice(first));
        more.remove();
      },
    },
    `All ${items.length}`,
  );
  return h("div", null, list, more);
}
