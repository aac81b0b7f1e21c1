// Search results, bookmarks and notes.

import { h, link, percent, token, section, written } from "./dom.js";
import * as api from "./api.js";

export function hitRow(hit, more) {
  return h(
    "li",
    { class: "hit" },
    h(
      "a",
      { href: link.latent(hit.sae, hit.latent) },
      hit.sae,
      h("span", { class: "slash" }, " / "),
      String(hit.latent),
    ),
    h(
      "span",
      { class: "chips" },
      written(hit.label) ? h("span", { class: "label" }, hit.label) : null,
      hit.peaks.slice(0, 5).map((text) => token(text)),
    ),
    h(
      "span",
      { class: "chips promoted" },
      hit.promoted.slice(0, 3).map((text) => token(text, { class: "chip plain" })),
    ),
    more ?? h("span", { class: "num" }, percent(hit.density)),
  );
}

export async function search(query) {
  const q = query.get("q") ?? "";
  const hits = q.trim() ? await api.search(q) : [];
  return {
    title: `Search: ${q}`,
    node: h(
      "div",
      { class: "page" },
      h("header", { class: "title" }, h("h1", null, "Search")),
      section(
        q ? `“${q}”` : "Nothing asked",
        q
          ? `${hits.length === 50 ? "the first 50" : hits.length} latents: by address, then those that peak on the token, then by words`
          : null,
        hits.length
          ? h(
              "ol",
              { class: "hits" },
              hits.map((hit) => hitRow(hit)),
            )
          : h(
              "p",
              { class: "faint" },
              "No latent found. Try a shorter piece of the word, or a token the model writes.",
            ),
      ),
    ),
  };
}

export async function bookmarks() {
  const all = await api.notes();
  return {
    title: "Notes",
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        h("h1", null, "Bookmarks and notes"),
        h(
          "p",
          { class: "faint" },
          api.LIVE ? "Kept beside the index on this computer; never exported." : "Kept in this browser.",
        ),
      ),
      all.length
        ? h(
            "ol",
            { class: "hits" },
            all.map((note) =>
              h(
                "li",
                { class: "hit note" },
                h(
                  "a",
                  { href: link.latent(note.sae, note.latent) },
                  note.sae,
                  h("span", { class: "slash" }, " / "),
                  String(note.latent),
                ),
                h("span", null, note.note),
                h("span", { class: "star-mark" }, note.bookmarked ? "★" : ""),
              ),
            ),
          )
        : h("p", { class: "faint" }, "None yet: press b on a latent, or write a note below its examples."),
    ),
  };
}
