// What is given to the language model: plain text, or a conversation with roles and tools, built turn by turn or pasted
// as JSON.

import { h, field } from "./dom.js";

const ROLES = ["system", "user", "assistant", "tool"];
const WAYS = [
  ["text", "Text"],
  ["chat", "Chat"],
  ["json", "JSON"],
];

// JSON of a form.
function parsed(text, what) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new Error(`${what} cannot be read as JSON: ${error.message}`);
  }
}

function listIn(text, what) {
  const value = parsed(text, what);
  if (!Array.isArray(value)) throw new Error(`${what} are a JSON list.`);
  return value;
}

// {"messages": [...], "tools": [...]}, or the messages alone.
function conversationIn(text) {
  const value = parsed(text, "The conversation");
  const given = Array.isArray(value) ? { messages: value } : value;
  if (!Array.isArray(given?.messages)) throw new Error('A conversation is {"messages": [...], "tools": [...]}.');
  return given.tools?.length ? { messages: given.messages, tools: given.tools } : { messages: given.messages };
}

function jsonArea(value, placeholder, rows) {
  const area = h("textarea", { rows, spellcheck: "false", placeholder });
  area.value = value?.length ? JSON.stringify(value, null, 1) : "";
  return area;
}

// One turn: whose, its text, and the tools that an assistant calls. Whatever else a message says is kept.
function turnRow(message, onRemove) {
  const { role = "user", content = "", tool_calls: calls, ...rest } = message;
  const who = h(
    "select",
    { onchange: update },
    ROLES.map((name) => h("option", { value: name, selected: name === role }, name)),
  );
  const text = h("textarea", { rows: "2", maxlength: "20000" });
  text.value = typeof content === "string" ? content : JSON.stringify(content);
  const called = jsonArea(calls, '[{"name": "search", "arguments": {"query": "…"}}]', "4");
  const more = h(
    "details",
    { open: Boolean(calls?.length) },
    h("summary", null, "Tool calls"),
    field("JSON list", called),
  );
  const node = h(
    "li",
    { class: "given-turn" },
    field("Role", who),
    h("div", null, field("Content", text), more),
    h("button", { type: "button", class: "quiet", onclick: () => onRemove(node) }, "Remove"),
  );
  function update() {
    more.hidden = who.value !== "assistant";
  }
  update();
  const value = () => {
    const calls = who.value === "assistant" && called.value.trim() ? listIn(called.value, "The tool calls") : null;
    const written = typeof content === "string" || text.value !== JSON.stringify(content) ? text.value : content;
    return { ...rest, role: who.value, content: written, ...(calls ? { tool_calls: calls } : {}) };
  };
  return { node, value, blank: () => !text.value.trim() && !called.value.trim(), who };
}

function chatBox({ messages, tools }) {
  const list = h("ol", { class: "given-turns" });
  const rows = [];
  function add(message) {
    const row = turnRow(message, (node) => {
      rows.splice(
        rows.findIndex((other) => other.node === node),
        1,
      );
      node.remove();
    });
    rows.push(row);
    list.append(row.node);
  }
  messages.forEach(add);
  const area = jsonArea(tools, '[{"type": "function", "function": {"name": "search", "parameters": {…}}}]', "3");
  const next = () =>
    ({ system: "user", user: "assistant", assistant: "user", tool: "assistant" })[rows.at(-1)?.who.value];
  const node = h(
    "div",
    null,
    list,
    h("button", { type: "button", class: "quiet", onclick: () => add({ role: next() ?? "user" }) }, "Add a turn"),
    h(
      "details",
      { open: Boolean(tools?.length) },
      h("summary", null, "Tools"),
      field("JSON list of their schemas", area),
    ),
  );
  return {
    node,
    value() {
      const messages = rows.filter((row) => !row.blank()).map((row) => row.value());
      const tools = area.value.trim() ? listIn(area.value, "The tools") : [];
      return tools.length ? { messages, tools } : { messages };
    },
  };
}

function areaBox(name, text, properties, valueOf) {
  const area = h("textarea", properties);
  area.value = text;
  return { node: field(name, area), value: () => valueOf(area.value) };
}

// What an address says is given: a conversation as JSON under `given`, or a text.
export function addressed(given, text) {
  try {
    return given ? conversationIn(given) : { text };
  } catch {
    return { text: given };
  }
}

// [name, value] in the address.
export const addressOf = (value, text) => (value.messages ? ["given", JSON.stringify(value)] : [text, value.text]);

let boxes = 0;

// given: {text} or {messages, tools}; name: what the text is called. value() is the same, and raises one line of what is
// wrong; empty() says that there is nothing to run.
export function givenBox(given, { name = "Text", rows = "4", placeholder = "Any text", chat = true } = {}) {
  const makers = {
    text: ({ text = "" }) => areaBox(name, text, { rows, maxlength: "8000", placeholder }, (text) => ({ text })),
    chat: (value) => chatBox(value),
    json: (value) =>
      areaBox(
        "Conversation as JSON",
        value.messages.length ? JSON.stringify(value, null, 1) : "",
        {
          rows: "10",
          spellcheck: "false",
          placeholder: '{"messages": [{"role": "user", "content": "…"}], "tools": []}',
        },
        (text) => (text.trim() ? conversationIn(text) : { messages: [] }),
      ),
  };
  const said = h("span", { class: "faint", role: "alert" });
  const place = h("div");
  let way = given.messages ? "chat" : "text";
  let box;

  function show(value) {
    box = makers[way](value);
    place.replaceChildren(box.node);
  }
  // Goes over to another way of giving the same; of a conversation, its user's first turn is the text.
  function change(next) {
    said.textContent = "";
    try {
      const { text, messages, tools } = box.value();
      way = next;
      if (next === "text") show({ text: messages ? messages.find(({ role }) => role === "user")?.content : text });
      else if (messages) show({ messages, tools });
      else show({ messages: text || next === "chat" ? [{ role: "user", content: text }] : [] });
    } catch (error) {
      said.textContent = error.message;
      for (const button of buttons) button.checked = button.value === way;
    }
  }
  const group = `way-${++boxes}`;
  const buttons = WAYS.map(([value]) =>
    h("input", { type: "radio", name: group, value, checked: value === way, onchange: () => change(value) }),
  );
  show(given);
  return {
    node: h(
      "div",
      { class: "given" },
      chat
        ? h(
            "fieldset",
            { class: "ways" },
            h("legend", { class: "hidden" }, "How it is given"),
            WAYS.map(([, text], i) => h("label", null, buttons[i], ` ${text}`)),
            said,
          )
        : null,
      place,
    ),
    value: () => box.value(),
    empty() {
      const value = box.value();
      return value.messages ? !value.messages.length : !value.text.trim();
    },
  };
}
