// Text with shaded tokens.

import { h, link, visible, number, ROLE_NAMES } from "./dom.js";
import { turns } from "./turns.js";
import * as api from "./api.js";

const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");

// Tokens shaded by activation over `most`; the one at `peak` is underlined. roles: names of each token's role, or null.
// The further tokens of a character have no text: they are one span with the first, and shade it.
export function shaded(tokens, activations, peak, most, roles) {
  const node = (i) => {
    if (!tokens[i] && i) return null;
    let end = i + 1;
    while (end < tokens.length && !tokens[end]) end += 1;
    const value = Math.max(...activations.slice(i, end));
    const properties = { class: `tok${i <= peak && peak < end && value > 0 ? " peak" : ""}` };
    if (value > 0) properties.vars = { "--heat": Math.min(1, value / most).toFixed(3) };
    const role = ROLE_NAMES[roles?.[i]];
    properties.title = `${visible(tokens[i])}  ${number(value)}${role ? `  (${role})` : ""}`;
    return [h("span", properties, shown(tokens[i])), tokens[i].includes("\n") ? h("wbr") : null];
  };
  return turns(roles, tokens.length, node, {
    heat: (from, to) => Math.min(1, Math.max(0, ...activations.slice(from, to)) / most),
    open: (from, to) => from <= peak && peak < to && activations[peak] > 0,
  });
}

// Puts the whole conversation in the place of its part, or the part back.
function wholeButton(example, most, roles, part) {
  let whole = null;
  const button = h(
    "button",
    {
      type: "button",
      class: "plain",
      "aria-expanded": "false",
      title: "the whole conversation",
      onclick: async () => {
        const open = button.getAttribute("aria-expanded") === "true";
        if (!whole) {
          const found = await api.conversation(example.start);
          const first = example.position - example.peak;
          const activations = found.tokens.map((_, i) => example.activations[i - first] ?? 0);
          const names = found.roles.map((role) => roles[role]);
          const region = { class: "whole", role: "region", tabindex: "0", "aria-label": "The whole conversation" };
          whole = h("div", region, shaded(found.tokens, activations, example.position, most, names));
        }
        (open ? whole : part).replaceWith(open ? part : whole);
        button.setAttribute("aria-expanded", String(!open));
        button.textContent = open ? "whole" : "part";
        if (!open) whole.querySelector(".peak")?.scrollIntoView({ block: "nearest" });
      },
    },
    "whole",
  );
  return button;
}

function copyButton(text) {
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
  return navigator.clipboard ? copy : null;
}

// One example: its tokens in turns, the strength at the peak, and what to do with the text beside it.
function context({ example, times }, most, roles) {
  const { tokens, activations, peak } = example;
  const names = example.roles.map((role) => roles[role]);
  const part = shaded(tokens, activations, peak, most, names);
  return h(
    "li",
    { class: "context" },
    h(
      "span",
      { class: "strength num", title: "activation at the peak" },
      activations[peak] > 0 ? number(activations[peak]) : "0",
    ),
    part,
    h(
      "span",
      {
        class: "where",
        title: `conversation ${example.conversation}, token ${example.position}, source ${example.source}`,
      },
      times > 1 ? h("small", { class: "times", title: `${times} conversations have this text` }, `×${times}`) : null,
      h(
        "span",
        { class: "actions" },
        wholeButton(example, most, roles, part),
        copyButton(tokens.join("")),
        api.LIVE ? h("a", { href: link.readAt(example), title: "which latents are active here?" }, "read") : null,
      ),
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
