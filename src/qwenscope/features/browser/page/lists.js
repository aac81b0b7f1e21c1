// Search results; bookmarks, notes and named lists.

import { h, known, link, percent, token, section, written } from "./dom.js";
import * as api from "./api.js";

// walk: the query by which its page knows the list that the latent stands in.
export function hitRow(hit, more, walk = "") {
  return h(
    "li",
    { class: "hit" },
    h(
      "a",
      { href: link.latent(hit.sae, hit.latent) + walk },
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
              hits.map((hit) => hitRow(hit, null, `?${new URLSearchParams({ found: q })}`)),
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

// What a file keeps of latents, beside what is kept here: nothing here is lost, and nothing comes twice.
async function merge(file) {
  const given = JSON.parse(await file.text());
  const fits = (one) =>
    typeof one?.sae === "string" &&
    Number.isInteger(one.latent) &&
    typeof one.note === "string" &&
    (one.lists ?? []).every?.((name) => typeof name === "string");
  if (!Array.isArray(given) || !given.every(fits)) throw new Error(`${file.name} holds no notes`);
  const here = new Map((await api.notes()).map((one) => [`${one.sae}/${one.latent}`, one.note]));
  for (const { sae, latent, note, bookmarked, lists = [] } of given) {
    const was = here.get(`${sae}/${latent}`) ?? "";
    const now = await api.keep(sae, latent, {
      note: api.both(was, note, ""),
      was,
      ...(bookmarked ? { bookmarked: true } : {}),
      lists: Object.fromEntries(lists.map((name) => [name, true])),
    });
    here.set(`${sae}/${latent}`, now.note);
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
    const plain = all.map(({ sae, latent, note, bookmarked, lists }) => ({ sae, latent, note, bookmarked, lists }));
    const href = URL.createObjectURL(new Blob([JSON.stringify(plain, null, 1)], { type: "application/json" }));
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

const keptRows = (rows, walk = "") =>
  h(
    "ol",
    { class: "hits" },
    rows.map(({ sae, latent, note, bookmarked, label = "", peaks = [] }) =>
      h(
        "li",
        { class: "hit note" },
        h("a", { href: link.latent(sae, latent) + walk }, sae, h("span", { class: "slash" }, " / "), String(latent)),
        known({ label, peaks }),
        h("span", { class: "written-note" }, note),
        h("span", { class: "star-mark" }, bookmarked ? "★" : ""),
      ),
    ),
  );

function namedList(name, latents, all) {
  const kept = new Map(all.map((one) => [`${one.sae}/${one.latent}`, one]));
  const rows = latents.map(([sae, latent, label, peaks]) => ({
    ...(kept.get(`${sae}/${latent}`) ?? { note: "" }),
    sae,
    latent,
    label,
    peaks,
  }));
  const heading = h("a", { href: link.notes(name) }, name);
  return section(
    heading,
    latents.length === 1 ? "1 latent" : `${latents.length} latents`,
    keptRows(rows, `?${new URLSearchParams({ on: name })}`),
  );
}

// Everything that is kept, or one named list.
export async function kept(query) {
  const [all, lists] = await Promise.all([api.notes(), api.lists()]);
  const only = query.get("list");
  if (only !== null && !lists[only]) throw new Error(`There is no list ${only}.`);
  const named = Object.entries(lists).filter(([name]) => only === null || name === only);
  const noted = all.filter(({ note, bookmarked }) => note || bookmarked);
  return {
    title: only ?? "Notes",
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        only === null ? null : h("p", { class: "eyebrow" }, h("a", { href: "#/notes" }, "Notes and lists")),
        h("h1", null, only ?? "Notes and lists"),
        h(
          "p",
          { class: "faint" },
          api.LIVE
            ? "Kept beside the index on this computer; of these only the lists go along with an exported site."
            : "Notes are kept in this browser; the lists are the site's.",
        ),
        only === null ? exchange(all) : null,
      ),
      named.map(([name, latents]) => namedList(name, latents, all)),
      only === null
        ? section(
            "Bookmarks and notes",
            null,
            noted.length
              ? keptRows(noted)
              : h("p", { class: "faint" }, "None yet: press b on a latent, or write a note below its examples."),
          )
        : null,
    ),
  };
}
