// Which latents j and k go through: an SAE's list as it is filtered and sorted, a named list, or what a search found.
// The query of a latent's address says which one, so that a link or a reload keeps it.

import { link } from "./dom.js";
import * as api from "./api.js";

const KEPT = 16;
const walks = new Map(); // what was listed last, by address; whoever comes by a link lists it again

const TEXTS = { q: "", sort: "density", role: "", split: "", list: "" };

const binOf = ({ first, per_decade, counts }, density) =>
  Math.min(counts.length - 1, Math.max(0, Math.floor((Math.log10(density) - first) * per_decade)));

export function readState(query) {
  return {
    ...Object.fromEntries(Object.entries(TEXTS).map(([name, otherwise]) => [name, query.get(name) ?? otherwise])),
    down: query.get("down") !== "0",
    dead: query.get("dead") === "1",
    bin: query.has("bin") ? Number(query.get("bin")) : null,
  };
}

// What of a state is not as it is where nothing was chosen.
export function writeState(state) {
  const kept = new URLSearchParams();
  for (const [name, otherwise] of Object.entries(TEXTS)) if (state[name] !== otherwise) kept.set(name, state[name]);
  if (!state.down) kept.set("down", "0");
  if (state.dead) kept.set("dead", "1");
  if (state.bin !== null) kept.set("bin", state.bin);
  return kept;
}

function order(latents, columns, { sort, down }) {
  const value =
    sort === "latent"
      ? (i) => i
      : sort === "peaks" || sort === "promoted"
        ? (i) => (columns[sort][i][0] ?? "\uffff").trim().toLowerCase()
        : (i) => columns[sort]?.[i] ?? -1;
  const sign = down ? -1 : 1;
  return latents.sort((a, b) => {
    const x = value(a),
      y = value(b);
    return x < y ? -sign : x > y ? sign : a - b;
  });
}

export const textsOf = (columns) =>
  columns.peaks.map((peaks, i) =>
    [String(i), columns.label[i] ?? "", ...peaks, ...columns.promoted[i]].join("\n").toLowerCase(),
  );

// The latents of one SAE that a state lets through, in its order. lists: {name: [[sae, latent]]}.
export function listed(id, columns, texts, state, { saes, roles, meta }, lists) {
  const wanted = state.q.trim().toLowerCase();
  const [role, split] = [roles.indexOf(state.role), meta.splits.indexOf(state.split)];
  const on = state.list && new Set((lists[state.list] ?? []).filter(([sae]) => sae === id).map(([, latent]) => latent));
  const latents = [...columns.density.keys()].filter(
    (i) =>
      (columns.density[i] > 0
        ? state.bin === null || binOf(saes[id].density, columns.density[i]) === state.bin
        : state.bin === null && (state.dead || on)) &&
      (!wanted || texts[i].includes(wanted)) &&
      (!state.role || columns.role[i] === role) &&
      (!state.split || columns.split?.[i] === split) &&
      (!on || on.has(i)),
  );
  order(latents, columns, state);
  latents.sort((a, b) => (String(b) === wanted) - (String(a) === wanted)); // the latent of that number before all
  return latents;
}

function remember(address, latents) {
  walks.delete(address);
  walks.set(address, latents);
  if (walks.size > KEPT) walks.delete(walks.keys().next().value);
  return latents;
}

// Keep an SAE's list as it stands; returns the query by which its latents know it.
export function walkable(id, state, latents) {
  const query = writeState(state);
  query.set("sort", state.sort); // always, so that a list in its first order is told from none
  const pairs = latents.map((latent) => [id, latent]);
  remember(`${id}?${query}`, pairs);
  return query;
}

async function list(id, query) {
  const [suite, columns, lists] = await Promise.all([api.suite(), api.table(id), api.lists()]);
  return listed(id, columns, textsOf(columns), readState(query), suite, lists).map((latent) => [id, latent]);
}

// What a query says is walked: its name, the page above, its latents; null if it says nothing.
function source(id, query) {
  const [on, found] = [query.get("on"), query.get("found")];
  if (on) return { title: `list “${on}”`, up: link.notes(on), latents: async () => (await api.lists())[on] ?? [] };
  if (found) {
    const hits = async () => (await api.search(found)).map(({ sae, latent }) => [sae, latent]);
    const latents = async () => walks.get(`?${query}`) ?? remember(`?${query}`, await hits());
    return { title: `search “${found}”`, up: link.search(found), latents };
  }
  if (!query.has("sort")) return null;
  const address = `${id}?${query}`;
  const latents = async () => walks.get(address) ?? remember(address, await list(id, query));
  return { title: `list of ${id}`, up: `${link.sae(id)}?${query}`, latents };
}

// Where a latent stands in what is walked, and the address of another one: { place, count, title, up, href(by) }.
export async function walkOf(id, latent, query, size) {
  const from = source(id, query);
  if (!from) return { up: link.sae(id), href: (by) => link.latent(id, (latent + by + size) % size) };
  const latents = await from.latents();
  const place = latents.findIndex(([sae, other]) => sae === id && other === latent);
  const href = (by) => {
    const start = place < 0 && by > 0 ? -1 : Math.max(0, place); // one that was taken off is before the first
    const next = latents[(start + by + latents.length) % latents.length];
    return `${link.latent(...(next ?? [id, latent]))}?${query}`;
  };
  return { place, count: latents.length, title: from.title, up: from.up, href };
}
