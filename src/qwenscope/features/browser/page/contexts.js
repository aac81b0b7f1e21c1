// Text with shaded tokens.

import { h, visible, number, ROLE_NAMES } from "./dom.js";

const shown = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥");

// One example: its tokens shaded by activation over `most`, the peak underlined, the split and role beside it.
export function context(example, most, roles) {
  const { tokens, activations, peak } = example;
  const role = roles[example.roles[peak]];
  const line = h("p", { class: "text" }, tokens.map((text, i) => {
    const share = Math.min(1, activations[i] / most);
    const properties = { class: `tok${i === peak && activations[i] > 0 ? " peak" : ""}` };
    if (activations[i] > 0) properties.vars = { "--heat": share.toFixed(3) };
    properties.title = `${visible(text)}  ${number(activations[i])}  (${ROLE_NAMES[roles[example.roles[i]]]})`;
    return [h("span", properties, shown(text)), text.includes("\n") ? h("wbr") : null];
  }));
  return h("li", { class: "context" },
    h("span", { class: "strength num", title: "activation at the peak" }, activations[peak] > 0 ? number(activations[peak]) : "0"),
    line,
    h("span", { class: "where", title: `conversation ${example.conversation}, token ${example.position}, source ${example.source}` }, ROLE_NAMES[role]));
}

export const contexts = (examples, most, roles) => h("ol", { class: "contexts" }, examples.map((example) => context(example, most, roles)));
