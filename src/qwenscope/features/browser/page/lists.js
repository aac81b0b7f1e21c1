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

// Notes of a file beside those kept here: where both have one, the file's comes after, unless it is there already.
async function merge(file) {
  const given = JSON.parse(await file.text());
  const fits = (one) => typeof one?.sae === "string" && Number.isInteger(one.latent) && typeof one.note === "string";
  if (!Array.isArray(given) || !given.every(fits)) throw new Error(`${file.name} holds no notes`);
  const address = ({ sae, latent }) => `${sae}/${latent}`;
  const kept = new Map((await api.notes()).map((mine) => [address(mine), mine]));
  for (const { sae, latent, note, bookmarked } of given) {
    const mine = kept.get(address({ sae, latent })) ?? { note: "", bookmarked: false };
    const known = `\n${mine.note}\n`.includes(`\n${note}\n`);
    const merged = {
      sae,
      latent,
      note: known ? mine.note : [mine.note, note].filter(Boolean).join("\n"),
      bookmarked: mine.bookmarked || Boolean(bookmarked),
    };
    await api.keepNote(merged);
    kept.set(address(merged), merged);
  }
  return given.length;
}

function exchange(all) {
  const said = h("span", { class: "faint", role: "status" });
  const pick = h("input", { type: "file", id: "notes-file", accept: ".json,application/json", class: "hidden" });
  pick.addEventListener("change", async () => {
    try {
      const count = await merge(pick.files[0]);
      said.textContent = `${count} notes imported`;
      dispatchEvent(new HashChangeEvent("hashchange"));
    } catch (error) {
      said.textContent = error instanceof SyntaxError ? `${pick.files[0].name} is not JSON` : error.message;
    }
  });
  const save = () => {
    const href = URL.createObjectURL(new Blob([JSON.stringify(all, null, 1)], { type: "application/json" }));
    h("a", { href, download: "notes.json" }).click();
    URL.revokeObjectURL(href);
  };
  return h(
    "p",
    { class: "fields" },
    all.length ? h("button", { type: "button", class: "quiet", onclick: save }, "Export as JSON") : null,
    h("button", { type: "button", class: "quiet", onclick: () => pick.click() }, "Import"),
    h("label", { class: "hidden", for: "notes-file" }, "File of notes"),
    pick,
    said,
  );
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
        exchange(all),
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
