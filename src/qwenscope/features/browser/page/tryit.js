// Try it: run the language model on a text and see which latents are active on each token.

import { h, field, link, needsModel, number, percent, token, visible, section, ROLE_NAMES, written } from "./dom.js";
import * as api from "./api.js";

const SHOWN = 12;

export async function render(query) {
  const { saes, live } = await api.suite();
  if (!live) {
    return {
      title: "Try it",
      node: h("div", { class: "page" }, h("header", { class: "title" }, h("h1", null, "Try it")), needsModel()),
    };
  }
  const ids = Object.keys(saes);
  const area = h("textarea", { id: "text", rows: "4", maxlength: "8000", placeholder: "Any text" });
  area.value = query.get("text") ?? "";
  const chat = h("input", { type: "checkbox", id: "chat", checked: query.get("chat") === "1" });
  const choose = h(
    "select",
    { id: "sae" },
    ids.map((id) => h("option", { value: id, selected: id === (query.get("sae") ?? ids[0]) }, id)),
  );
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  const go = h("button", { type: "submit" }, "Read");
  let reading = null;
  let at = null;

  async function show() {
    if (!reading) return;
    const id = choose.value;
    const columns = await api.table(id);
    const rows = reading.saes[id];
    const strongest = new Map();
    rows.forEach((row) =>
      row.forEach(([latent, value]) =>
        strongest.set(latent, Math.max(strongest.get(latent) ?? 0, value / (columns.max[latent] || value))),
      ),
    );
    const detail = h("div", { class: "active" });
    const line = h("p", { class: "text readable", role: "group", "aria-label": "Tokens" });

    const name = (latent) => [
      h("a", { href: link.latent(id, latent) }, String(latent)),
      h(
        "span",
        { class: "chips" },
        written(columns.label[latent])
          ? h("span", { class: "label" }, columns.label[latent])
          : (columns.peaks[latent] ?? []).slice(0, 2).map((text) => token(text)),
      ),
    ];
    const entry = (latent, value, bar) =>
      h(
        "li",
        {
          class: "entry",
          vars: { "--share": String(Math.min(1, bar)) },
          onmouseenter: () => shade(latent),
          onfocusin: () => shade(latent),
        },
        name(latent),
        h("span", { class: "num" }, value),
      );

    function shade(latent) {
      rows.forEach((row, i) => {
        const value = row.find(([l]) => l === latent)?.[1] ?? 0;
        line.children[i].style.setProperty("--heat", String(Math.min(1, value / (columns.max[latent] || value || 1))));
      });
    }

    function pick(i) {
      at = i;
      [...line.children].forEach((button, j) => button.setAttribute("aria-pressed", String(j === i)));
      if (i === null) {
        const all = [...strongest].sort((a, b) => b[1] - a[1]).slice(0, SHOWN);
        detail.replaceChildren(
          h("h3", null, "Strongest in this text"),
          h("p", { class: "faint" }, "activation over the largest one in the index"),
          h(
            "ol",
            { class: "peers" },
            all.map(([latent, share]) => entry(latent, percent(share), share)),
          ),
        );
        rows.forEach((row, j) =>
          line.children[j].style.setProperty(
            "--heat",
            String(
              Math.min(1, Math.max(0, ...row.map(([latent, value]) => value / (columns.max[latent] || value)))) * 0.8,
            ),
          ),
        );
      } else {
        const role = reading.roles ? ` · ${ROLE_NAMES[reading.roles[i]]}` : "";
        detail.replaceChildren(
          h("h3", null, "Active on ", token(reading.tokens[i]), h("small", null, role)),
          rows[i].length
            ? h(
                "ol",
                { class: "peers" },
                rows[i].map(([latent, value]) => entry(latent, number(value), value / (columns.max[latent] || value))),
              )
            : h("p", { class: "faint" }, "The first position is left out: it is a sink in many models."),
          h("button", { type: "button", class: "quiet", onclick: () => pick(null) }, "Whole text"),
        );
      }
    }

    line.append(
      ...reading.tokens.map((text, i) =>
        h(
          "button",
          {
            type: "button",
            class: "tok",
            "aria-pressed": "false",
            "aria-label": `token ${i}: ${visible(text)}`,
            onclick: () => pick(at === i ? null : i),
          },
          text === "" ? "⋯" : text.replaceAll("\n", "↵"),
        ),
      ),
    );
    out.replaceChildren(
      h(
        "div",
        { class: "columns" },
        h("div", { class: "column" }, section("Tokens", "pick one", line)),
        h("aside", { class: "column", "aria-label": "Active latents" }, h("section", null, detail)),
      ),
    );
    pick(at !== null && at < reading.tokens.length ? at : null);
  }

  async function run(event) {
    event?.preventDefault();
    if (!area.value.trim()) return;
    go.disabled = true;
    said.textContent = "running the language model…";
    try {
      reading = await api.read(area.value, chat.checked);
      at = null;
      said.textContent = `${reading.tokens.length} tokens`;
      const kept = new URLSearchParams({ text: area.value, sae: choose.value });
      if (chat.checked) kept.set("chat", "1");
      history.replaceState(null, "", `#/try?${kept}`);
      await show();
    } catch (error) {
      said.textContent = api.reason(error);
    } finally {
      go.disabled = false;
    }
  }

  choose.addEventListener("change", show);
  area.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.metaKey || event.ctrlKey)) run();
  });
  if (area.value) run();
  return {
    title: "Try it",
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        h("h1", null, "Try it"),
        h("p", { class: "lead" }, "Which latents are active on your text?"),
      ),
      h(
        "form",
        { onsubmit: run },
        h("label", { class: "hidden", for: "text" }, "Text"),
        area,
        h(
          "div",
          { class: "fields" },
          field("SAE", choose),
          h("label", { class: "check" }, chat, " as a user's message"),
          go,
          said,
        ),
      ),
      out,
    ),
  };
}
