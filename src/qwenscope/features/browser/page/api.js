// Where data comes from: the local server, or the files of an exported site. Nothing else is ever contacted.

export const LIVE = document.querySelector('meta[name="qwenscope-mode"]').content === "live";
const kept = new Map();

async function fetchJson(path, options) {
  const response = await fetch(path, options);
  const value = await response.json().catch(() => ({ error: `${response.status} ${response.statusText}` }));
  if (!response.ok)
    throw Object.assign(new Error(value.error ?? response.statusText), { status: response.status, value });
  return value;
}

// The files of an exported site are compressed, whatever its server does.
async function fetchFile(path) {
  const response = await fetch(path);
  if (!response.ok) throw new Error(`${path}: ${response.status} ${response.statusText}`);
  return new Response(response.body.pipeThrough(new DecompressionStream("deflate"))).json();
}

function once(path) {
  if (!kept.has(path)) {
    const promise = LIVE ? fetchJson(path) : fetchFile(`data/${path}.json.z`);
    promise.catch(() => kept.delete(path));
    kept.set(path, promise);
    if (kept.size > 64) kept.delete(kept.keys().next().value);
  }
  return kept.get(path);
}

const sent = (body, method = "POST") => ({
  method,
  headers: { "Content-Type": "application/json" },
  body: JSON.stringify(body),
});

// What the language model does for this page ends with a signal: Esc, or another view.
let running = new AbortController();
export function stopRunning() {
  running.abort();
  running = new AbortController();
}
export const reason = (error) => (error.name === "AbortError" ? "stopped" : error.message);

export const suite = () => once(LIVE ? "api/suite" : "suite");

// Columns over all latents of an SAE; the labels may change while the page is open, the rest does not.
export async function table(sae) {
  const id = encodeURIComponent(sae);
  const [columns, label, scores] = await Promise.all(
    LIVE
      ? [once(`api/sae/${id}`), fetchJson(`api/labels/${id}`), once(`api/output/${id}`)]
      : [once(`${id}/table`), once(`${id}/labels`), once(`${id}/output`)],
  );
  const [output, confidence] = [0, 2].map((at) => (scores.length ? scores.map((score) => score[at]) : null));
  return { ...columns, label, output, confidence };
}

export async function latent(sae, number) {
  if (LIVE) return once(`api/latent/${encodeURIComponent(sae)}/${number}`);
  const { shard, saes } = await suite();
  if (!saes[sae] || number >= saes[sae].dict_size) throw new Error(`${sae} has no latent ${number}`);
  return (await once(`${encodeURIComponent(sae)}/${Math.floor(number / shard)}`))[number % shard];
}

export async function search(query, sae) {
  if (LIVE)
    return fetchJson(`api/search?q=${encodeURIComponent(query)}${sae ? `&sae=${encodeURIComponent(sae)}` : ""}`);
  const wanted = query.trim().toLowerCase();
  const address = /^(?:(\S+?)\s*[/: ]\s*)?(\d{1,9})$/.exec(wanted);
  const hits = [];
  for (const id of sae ? [sae] : Object.keys((await suite()).saes)) {
    const columns = await table(id);
    columns.peaks.forEach((peaks, number) => {
      const label = columns.label[number] ?? "";
      const rank = peaks.findIndex((text) => text.trim().toLowerCase() === wanted);
      const named = address && Number(address[2]) === number && [undefined, id.toLowerCase()].includes(address[1]);
      const inside = [label, ...peaks, ...columns.promoted[number]].some((text) => text.toLowerCase().includes(wanted));
      if (wanted && (named || rank >= 0 || inside)) {
        const hit = {
          sae: id,
          latent: number,
          label,
          peaks,
          promoted: columns.promoted[number],
          density: columns.density[number],
        };
        hits.push([named ? -1 : rank < 0 ? 9 : rank, hit]);
      }
    });
  }
  return hits
    .sort((a, b) => a[0] - b[0])
    .slice(0, 50)
    .map((hit) => hit[1]);
}

// A whole conversation of the index, by the address of its first token.
export async function conversation(start) {
  if (LIVE) return once(`api/conversation/${start}`);
  const { conversations } = await suite();
  return (await once(`conversations/${Math.floor(start / conversations)}`))[start];
}

// {text}, {messages, tools} or {conversation: of the index}
export const read = (given) => fetchJson("api/read", { ...sent(given), signal: running.signal });

export const find = (body) => fetchJson("api/find", { ...sent(body), signal: running.signal });
export const range = (body) => fetchJson("api/range", { ...sent(body), signal: running.signal });

// Calls onPiece with each piece of the steered text and its controls as it is written.
export async function steer(body, onPiece) {
  const response = await fetch("api/steer", { ...sent(body), signal: running.signal });
  if (!response.ok) throw new Error((await response.json()).error);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const piece = JSON.parse(line);
      if (piece.error) throw new Error(piece.error);
      onPiece(piece);
    }
  }
}

// [[score, without the push]] of all latents, if they were measured; of some, measured now.
export const keptScores = (sae) =>
  once(LIVE ? `api/output/${encodeURIComponent(sae)}` : `${encodeURIComponent(sae)}/output`);
export const outputScores = (body) => fetchJson("api/output", { ...sent(body), signal: running.signal });
export const lossEffect = (body) => fetchJson("api/loss", { ...sent(body), signal: running.signal });

// Contrasts, diffs, monitors and experiments that the browser was started with; an exported site has none.
export const results = async () => (LIVE ? once("api/results") : []);
export const result = (name) => once(`api/results/${encodeURIComponent(name)}`);
export const score = (body) => fetchJson("api/monitor/score", { ...sent(body), signal: running.signal });

// Notes, bookmarks and lists: beside the index on this machine; in this browser for an exported site, whose lists are its own.
const STORE = "qwenscope notes";
const local = () => JSON.parse(localStorage.getItem(STORE) ?? "[]");
const none = { note: "", bookmarked: false, lists: [] };
const at = (sae, number) => (one) => one.sae === sae && one.latent === number;

export const notes = async () => (LIVE ? fetchJson("api/notes") : local());
export const note = async (sae, number) => ({
  ...none,
  sae,
  latent: number,
  ...(await notes()).find(at(sae, number)),
});

// {name: [[sae, latent, label, peaks]]}, by name; the latents of a list by SAE and number.
export async function lists() {
  if (!LIVE) return once("lists");
  const found = {};
  for (const one of await notes())
    for (const name of one.lists) (found[name] ??= []).push([one.sae, one.latent, one.label, one.peaks]);
  const byAddress = ([a, i], [b, j]) => (a < b ? -1 : a > b ? 1 : i - j);
  return Object.fromEntries(
    Object.keys(found)
      .sort()
      .map((name) => [name, found[name].sort(byAddress)]),
  );
}

// What to keep where another note stands than its writer had seen: both, unless one holds the other.
export function both(stands, note, was) {
  const holds = (text, part) => `\n${text}\n`.includes(`\n${part}\n`);
  if (stands === was || !stands || holds(note, stands)) return note;
  return note === was || !note || holds(stands, note) ? stands : `${stands}\n${note}`;
}

// Change what is kept of a latent: some of { note, was: the note that was seen, bookmarked, lists: {name: on} }.
// Gives what is kept now.
export async function keep(sae, number, change) {
  if (!LIVE) return keepHere(sae, number, change);
  const path = `api/notes/${encodeURIComponent(sae)}/${number}`;
  for (;;) {
    try {
      return await fetchJson(path, { ...sent(change, "PUT"), keepalive: true }); // though the page is left
    } catch (error) {
      if (error.status !== 409) throw error;
      const { note } = error.value;
      change = { ...change, note: both(note, change.note, change.was), was: note };
    }
  }
}

function keepHere(sae, number, { note, was, bookmarked }) {
  const others = local();
  const place = others.findIndex(at(sae, number));
  const kept = { ...none, sae, latent: number, ...(place < 0 ? {} : others.splice(place, 1)[0]) };
  if (note !== undefined) kept.note = both(kept.note, note, was ?? kept.note);
  if (bookmarked !== undefined) kept.bookmarked = bookmarked;
  localStorage.setItem(STORE, JSON.stringify(kept.note || kept.bookmarked ? [kept, ...others] : others));
  return kept;
}
