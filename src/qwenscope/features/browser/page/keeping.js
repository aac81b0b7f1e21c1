// What is kept of a latent on its page: a bookmark, a note, the lists that it is on.

import { h, link, section } from "./dom.js";
import * as api from "./api.js";

// One change after the other, so that the newest is what stays. Gives a function of (change, then what to do with it).
function inTurn(sae, latent, said) {
  let last = Promise.resolve();
  const put = async (change, then) => {
    try {
      then(await api.keep(sae, latent, change()));
    } catch (error) {
      said.textContent = api.reason(error);
    }
  };
  return (change, then) => {
    said.textContent = "";
    last = last.then(() => put(change, then));
    return last;
  };
}

function listBox(sae, latent, lists) {
  const said = h("span", { class: "faint", role: "status" });
  const change = inTurn(sae, latent, said);
  const names = h("p", { class: "fields lists" });
  const isOn = (name) => (lists[name] ?? []).some(([id, other]) => id === sae && other === latent);
  const put = (name, on) => {
    const box = h("input", { type: "checkbox", checked: on });
    box.addEventListener("change", () =>
      change(
        () => ({ lists: { [name]: box.checked } }),
        () => {
          said.textContent = box.checked ? `on ${name}` : `no longer on ${name}`;
        },
      ),
    );
    names.append(
      h(
        "span",
        { class: "check" },
        h("label", { class: "check" }, box, ` ${name}`),
        h("a", { href: link.notes(name), "aria-label": `List ${name}` }, "→"),
      ),
    );
    return box;
  };
  if (!api.LIVE) {
    const on = Object.keys(lists).filter(isOn);
    if (!on.length) return { node: null, focus: () => {} };
    const links = on.map((name) => h("a", { href: link.notes(name) }, name));
    return { node: section("Lists", null, h("p", { class: "fields" }, links)), focus: () => {} };
  }
  const boxes = new Map(Object.keys(lists).map((name) => [name, put(name, isOn(name))]));
  const name = h("input", {
    type: "text",
    id: "new-list",
    maxlength: "100",
    placeholder: "a new list",
    autocomplete: "off",
  });
  function add(event) {
    event.preventDefault();
    const wanted = name.value.trim();
    if (!wanted) return;
    const box = boxes.get(wanted) ?? put(wanted, false);
    boxes.set(wanted, box);
    name.value = "";
    if (!box.checked) box.click();
  }
  return {
    node: section(
      "Lists",
      "named, walked through with j and k; an exported site shows them",
      names,
      h(
        "form",
        { class: "fields", onsubmit: add },
        h("label", { class: "hidden", for: "new-list" }, "Put on a list"),
        name,
        h("button", { type: "submit", class: "quiet" }, "Put on list"),
        said,
      ),
    ),
    focus: () => ([...boxes.values()][0] ?? name).focus(),
  };
}

export async function noteBox(sae, latent) {
  const [mine, lists] = await Promise.all([api.note(sae, latent), api.lists()]);
  const said = h("span", { class: "faint", role: "status" });
  const change = inTurn(sae, latent, said);
  let seen = mine.note;
  const star = h(
    "button",
    { type: "button", class: "star", "aria-pressed": String(mine.bookmarked), onclick: toggle },
    "Bookmark",
  );
  const area = h("textarea", {
    id: "note",
    rows: "3",
    maxlength: "4000",
    placeholder: "What does it do?",
    onchange: write,
  });
  area.value = seen;

  function write() {
    const written = area.value;
    return change(
      () => ({ note: written, was: seen }),
      ({ note }) => {
        seen = note;
        said.textContent = note === written ? "kept" : "kept, beside what was written elsewhere meanwhile";
        if (area.value === written) area.value = note;
      },
    );
  }
  function toggle() {
    const on = star.getAttribute("aria-pressed") !== "true";
    star.setAttribute("aria-pressed", String(on));
    return change(
      () => ({ bookmarked: on }),
      () => {
        said.textContent = "kept";
      },
    );
  }
  const listed = listBox(sae, latent, lists);
  const notes = section(
    "Notes",
    null,
    h("label", { class: "hidden", for: "note" }, "Notes on this latent"),
    area,
    said,
  );
  return { star, toggle, toLists: listed.focus, box: h("div", null, notes, listed.node) };
}
