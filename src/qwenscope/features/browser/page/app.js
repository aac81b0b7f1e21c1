// Routes, keys and theme. A route is what follows #/ in the address, so that every view can be linked to.

import { h } from "./dom.js";
import * as suite from "./suite.js";
import * as sae from "./sae.js";
import * as latent from "./latent.js";
import * as compare from "./compare.js";
import * as tryit from "./tryit.js";
import * as steer from "./steer.js";
import * as find from "./find.js";
import * as lists from "./lists.js";
import * as results from "./results.js";
import * as api from "./api.js";

const main = document.getElementById("main");
const box = document.getElementById("q");
const help = document.getElementById("help");
const NAV = [
  ["#/", "Suite"],
  ["#/try", "Try it"],
  ["#/find", "Find"],
  ["#/steer", "Steer"],
  ["#/notes", "Notes"],
];
const KEYS = [
  ["/", "search"],
  ["← →  or  k j", "previous, next latent of the list that you came from"],
  ["↑ ↓  or  k j", "through a table of latents"],
  ["b", "bookmark this latent"],
  ["l", "put this latent on a list"],
  ["u", "up to the list or SAE"],
  ["g", "suite overview"],
  ["t", "try it"],
  ["s", "steer"],
  ["f", "find by example"],
  ["d", "light, dark"],
  ["Esc", "stop the language model"],
  ["?", "this help"],
];
let keys = {};
let turn = 0;

function route() {
  const [path, query = ""] = location.hash.replace(/^#\/?/, "").split("?");
  const parts = path.split("/").filter(Boolean).map(decodeURIComponent);
  const asked = new URLSearchParams(query);
  if (!parts.length) return suite.render();
  if (parts[0] === "sae" && parts.length === 2) return sae.render(parts[1], asked);
  if (parts[0] === "sae" && parts.length === 3 && /^\d+$/.test(parts[2]))
    return latent.render(parts[1], parts[2], asked);
  if (parts[0] === "compare") return compare.render(asked);
  if (parts[0] === "search") return lists.search(asked);
  if (parts[0] === "try") return tryit.render(asked);
  if (parts[0] === "find") return find.render(asked);
  if (parts[0] === "steer") return steer.render(asked);
  if (parts[0] === "notes") return lists.kept(asked);
  if (parts[0] === "results") return parts.length === 2 ? results.render(parts[1]) : results.list();
  throw new Error("There is no such page.");
}

async function show() {
  if (location.hash && !location.hash.startsWith("#/")) return;
  const mine = ++turn;
  api.stopRunning();
  let view;
  try {
    view = await route();
  } catch (error) {
    view = {
      title: "Not found",
      node: h(
        "div",
        { class: "page" },
        h("h1", null, "Not found"),
        h("p", null, error.message),
        h("p", null, h("a", { href: "#/" }, "Back to the suite")),
      ),
    };
  }
  if (mine !== turn) return;
  main.replaceChildren(view.node);
  keys = view.keys ?? {};
  document.title = `${view.title} · qwenscope`;
  const here = location.hash.split("?")[0] || "#/";
  const nav = (await api.results().catch(() => [])).length ? [...NAV, ["#/results", "Results"]] : NAV;
  if (mine !== turn) return;
  document
    .getElementById("nav")
    .replaceChildren(
      ...nav.map(([href, text]) => h("a", { href, "aria-current": href === here ? "page" : null }, text)),
    );
  if (here !== "#/search") box.value = "";
  scrollTo(0, 0);
  main.dataset.ready = String(mine);
}

function theme(next) {
  const dark =
    next ??
    (document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light"));
  document.documentElement.dataset.theme = dark;
  dispatchEvent(new Event("theme")); // for what is drawn, not styled
  return dark;
}

function switchTheme() {
  localStorage.setItem("qwenscope theme", theme(theme() === "dark" ? "light" : "dark"));
}

function openHelp() {
  const close = h("button", { type: "button", onclick: () => help.close() }, "Close");
  help.replaceChildren(
    h("h2", { id: "help-title" }, "Keyboard"),
    h(
      "dl",
      { class: "keys" },
      KEYS.map(([key, text]) => [h("dt", null, h("kbd", null, key)), h("dd", null, text)]),
    ),
    close,
  );
  help.showModal();
}

const EVERYWHERE = {
  "/": () => {
    box.focus();
    box.select();
  },
  "?": openHelp,
  d: switchTheme,
  g: () => {
    location.hash = "#/";
  },
  t: () => {
    location.hash = "#/try";
  },
  s: () => {
    location.hash = "#/steer";
  },
  f: () => {
    location.hash = "#/find";
  },
};

addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented || help.open) return;
  if (event.key === "Escape") api.stopRunning();
  if (event.target.closest("input, textarea, select")) {
    if (event.key === "Escape") event.target.blur();
    return;
  }
  const action = keys[event.key] ?? EVERYWHERE[event.key];
  if (action) {
    event.preventDefault();
    action();
  }
});

let waiting;
box.addEventListener("input", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => {
    if (box.value.trim()) location.hash = `#/search?q=${encodeURIComponent(box.value)}`;
  }, 200);
});
document.getElementById("theme").addEventListener("click", switchTheme);
document.getElementById("keys").addEventListener("click", openHelp);
document.querySelector(".skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", show);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => dispatchEvent(new Event("theme")));
const kept = localStorage.getItem("qwenscope theme");
if (kept) theme(kept);
show();
