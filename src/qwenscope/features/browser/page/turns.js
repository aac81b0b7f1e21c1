// Text as turns: who speaks, and what the chat template writes around it, folded away until it is asked for.

import { h, ROLE_NAMES } from "./dom.js";

const SPEAKERS = { think: "assistant", tool_call: "assistant", tool_result: "tool" };
const INSIDE = ["think", "tool_call"]; // named within the assistant's turn
const speaker = (role) => SPEAKERS[role] ?? role;

// Successive tokens of one role: [{ role, from, to }].
function runsOf(roles) {
  const runs = [];
  roles.forEach((role, i) => {
    if (runs.at(-1)?.role === role) runs.at(-1).to = i + 1;
    else runs.push({ role, from: i, to: i + 1 });
  });
  return runs;
}

// What the template writes in one place, behind a mark that shows it.
function folded(nodes, { from, to }, heat, open) {
  const box = h("span", { class: open ? "template open" : "template" });
  const said = `${to - from} tokens of the chat template`;
  const mark = h(
    "button",
    {
      type: "button",
      class: "fold",
      vars: heat > 0 ? { "--heat": heat.toFixed(3) } : {},
      "data-from": String(from),
      "data-to": String(to),
      title: said,
      "aria-label": `Show ${said}`,
      onclick: () => box.classList.add("open"),
    },
    "⋯",
  );
  box.append(mark, h("span", null, nodes));
  return box;
}

// Tokens as turns. nodeOf(i): what stands for token i; roles: of each token, or null for plain text; heat(from, to): of
// the marks; open(from, to): whether template tokens are shown from the beginning.
export function turns(roles, count, nodeOf, { heat = () => 0, open = () => false } = {}) {
  const nodes = (from, to) => Array.from({ length: to - from }, (_, i) => nodeOf(from + i));
  if (!roles?.some((role) => role !== "text" && role !== "template"))
    return h("div", { class: "text" }, nodes(0, count));
  const runs = runsOf(roles);
  const box = h("div", { class: "text turns" });
  let turn = null;
  runs.forEach(({ role, from, to }, n) => {
    const who = role === "template" ? runs[n + 1] && speaker(runs[n + 1].role) : speaker(role);
    if (!turn || (who && who !== turn.who)) {
      const words = h("div");
      turn = { who, words, last: who };
      box.append(
        h("div", { class: "turn" }, h("span", { class: "speaker" }, ROLE_NAMES[who] ?? who ?? "template"), words),
      );
    }
    if (role === "template") turn.words.append(folded(nodes(from, to), { from, to }, heat(from, to), open(from, to)));
    else {
      if (role !== turn.last && INSIDE.includes(role))
        turn.words.append(h("small", { class: "part" }, ROLE_NAMES[role] ?? role));
      turn.last = role;
      turn.words.append(...nodes(from, to).flat().filter(Boolean));
    }
  });
  return box;
}

// A switch that shows the template tokens of everything within `node`.
export function templateSwitch(node) {
  const box = h("input", { type: "checkbox", onchange: () => node.classList.toggle("unfolded", box.checked) });
  return h("label", { class: "check faint" }, box, " template tokens");
}
