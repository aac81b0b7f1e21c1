// A map of an SAE: its latents by the first two principal components of their decoder directions.

import { h, number, percent, token, written, ROLE_NAMES } from "./dom.js";

const REACH = 14; // pixels from a point within which it is meant
const MARGIN = 10;
const MANY = 5000; // points above which each is a small square
const BESIDE = { ArrowRight: [1, 0], ArrowLeft: [-1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

// Ways to color the latents: [groups: name of each, group of latent i].
function coloring(kind, columns, sae, { roles, meta }) {
  if (kind === "role") return [roles.map((role) => ROLE_NAMES[role]), (i) => columns.role[i]];
  if (kind === "split") return [meta.splits.map((split) => split.replace("_", " ")), (i) => columns.split[i]];
  if (kind === "label") return [["by rule", "written"], (i) => Number(Boolean(written(columns.label[i])))];
  const { first, per_decade, counts } = sae.density;
  const decades = counts.length / per_decade;
  const names = Array.from({ length: decades }, (_, i) => `from ${percent(10 ** (first + i))}`);
  return [names, (i) => Math.min(decades - 1, Math.max(0, Math.floor(Math.log10(columns.density[i]) - first)))];
}

export const COLORS = { density: "density", role: "role by lift", split: "split by lift", label: "label" };

// The map and what it needs from its page: { href(i), onColor(kind), onPick(i) }.
// Gives { node, show(latents): those of the list, pick(i) }.
export function latentMap(columns, sae, suite, kind, { href, onColor, onPick }) {
  const alive = [...columns.density.keys()].filter((i) => columns.x[i] !== null);
  let inside = new Set();
  let picked = null;
  let armed = false; // the point under the pointer was picked before it went down: a click opens it
  let places = new Map();
  const canvas = h("canvas", { "aria-hidden": "true" });
  const ring = h("i", { class: "ring", hidden: true, "aria-hidden": "true" });
  const said = h("p", { class: "named-point", role: "status" });
  const legend = h("p", { class: "legend colors" });
  const box = h(
    "div",
    {
      class: "map",
      tabindex: "0",
      role: "application",
      "aria-label": "Map of latents. Arrow keys go to the next one in their direction, Enter opens it.",
    },
    canvas,
    ring,
  );
  const choice = h(
    "select",
    {
      id: "color",
      onchange: () => {
        kind = choice.value;
        onColor(kind);
        drawLegend();
        draw();
      },
    },
    Object.entries(COLORS)
      .filter(([name]) => columns[name])
      .map(([name, text]) => h("option", { value: name, selected: name === kind }, text)),
  );

  function drawLegend() {
    const [names, groupOf] = coloring(kind, columns, sae, suite);
    const counts = names.map(() => 0);
    for (const i of alive) if (inside.has(i)) counts[groupOf(i)] += 1;
    const tone = kind === "density" ? "d" : "c";
    legend.replaceChildren(
      ...names.flatMap((name, group) =>
        counts[group] || kind === "density"
          ? [
              h(
                "span",
                { "data-group": group },
                h("i", { class: tone + group }),
                `${name} `,
                h("small", null, number(counts[group])),
              ),
            ]
          : [],
      ),
    );
  }

  function place() {
    const { clientWidth: width, clientHeight: height } = box;
    const [xs, ys] = [alive.map((i) => columns.x[i]), alive.map((i) => columns.y[i])];
    const ends = (values) =>
      values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
    const [[left, right], [low, high]] = [ends(xs), ends(ys)];
    const scale = Math.min((width - 2 * MARGIN) / (right - left || 1), (height - 2 * MARGIN) / (high - low || 1));
    const at = (i) => [
      width / 2 + scale * (columns.x[i] - (left + right) / 2),
      height / 2 - scale * (columns.y[i] - (low + high) / 2),
    ];
    places = new Map(alive.map((i) => [i, at(i)]));
    canvas.width = Math.round(width * devicePixelRatio);
    canvas.height = Math.round(height * devicePixelRatio);
  }

  function draw() {
    const context = canvas.getContext("2d");
    context.setTransform(devicePixelRatio, 0, 0, devicePixelRatio, 0, 0);
    context.clearRect(0, 0, canvas.width, canvas.height);
    const [, groupOf] = coloring(kind, columns, sae, suite);
    const [small, large] = alive.length > MANY ? [1, 1.5] : [1.5, 3];
    const dots = (latents, color, radius) => {
      context.fillStyle = color;
      context.beginPath();
      for (const i of latents) {
        const [x, y] = places.get(i);
        if (alive.length > MANY) context.rect(x - radius, y - radius, 2 * radius, 2 * radius);
        else {
          context.moveTo(x + radius, y);
          context.arc(x, y, radius, 0, 2 * Math.PI);
        }
      }
      context.fill();
    };
    const outside = alive.filter((i) => !inside.has(i));
    context.globalAlpha = 0.3;
    dots(outside, getComputedStyle(legend).color, small);
    context.globalAlpha = 0.8;
    const groups = Map.groupBy(
      alive.filter((i) => inside.has(i)),
      groupOf,
    );
    for (const swatch of legend.children) {
      // the sheet's color, as the theme has it
      const group = groups.get(Number(swatch.dataset.group));
      if (group) dots(group, getComputedStyle(swatch.firstChild).backgroundColor, large);
    }
    context.globalAlpha = 1;
    mark();
  }

  function mark() {
    const [x, y] = places.get(picked) ?? [];
    ring.hidden = x === undefined;
    if (ring.hidden) return said.replaceChildren("Point at a latent, or go there with the arrow keys.");
    ring.style.setProperty("--x", `${x}px`);
    ring.style.setProperty("--y", `${y}px`);
    const label = columns.label[picked];
    return said.replaceChildren(
      h("a", { href: href(picked), tabindex: "-1" }, String(picked)),
      " ",
      h(
        "span",
        { class: "chips" },
        written(label)
          ? h("span", { class: "label" }, label)
          : columns.peaks[picked].slice(0, 3).map((text) => token(text)),
      ),
      h("small", null, `${percent(columns.density[picked])} of tokens`),
    );
  }

  // The nearest of those shown; of all while none is.
  function nearest(x, y, fits = () => true) {
    let [best, least] = [null, Infinity];
    for (const i of inside.size ? inside : alive) {
      const at = places.get(i);
      if (!at || !fits(at[0] - x, at[1] - y)) continue;
      const far = (at[0] - x) ** 2 + (at[1] - y) ** 2;
      if (far < least) [best, least] = [i, far];
    }
    return [best, Math.sqrt(least)];
  }

  function under(event) {
    const { left, top } = canvas.getBoundingClientRect();
    const [best, far] = nearest(event.clientX - left, event.clientY - top);
    return far <= REACH ? best : null;
  }

  function pick(i, kept = true) {
    if (i === picked) return;
    picked = i;
    mark();
    if (kept) onPick(i);
  }

  function open() {
    if (picked === null) return;
    onPick(picked);
    location.hash = href(picked);
  }

  box.addEventListener("pointermove", (event) => {
    if (event.pointerType !== "touch") pick(under(event), false);
    box.classList.toggle("over", picked !== null);
  });
  box.addEventListener("pointerdown", (event) => {
    const meant = under(event);
    armed = meant !== null && meant === picked;
    pick(meant);
  });
  box.addEventListener("click", () => armed && open());
  box.addEventListener("keydown", (event) => {
    const to = BESIDE[event.key];
    if (event.key === "Enter") open();
    else if (to) {
      const from = places.get(picked);
      const ahead = (dx, dy) => {
        const [along, across] = [dx * to[0] + dy * to[1], dx * to[1] + dy * to[0]];
        return along > 0.5 && Math.abs(across) <= along;
      };
      const [best] = from ? nearest(...from, ahead) : nearest(box.clientWidth / 2, box.clientHeight / 2);
      if (best !== null) pick(best);
    } else return;
    event.preventDefault();
  });
  const redraw = () => {
    if (!box.isConnected) return removeEventListener("theme", redraw);
    return draw();
  };
  addEventListener("theme", redraw);
  new ResizeObserver(() => {
    place();
    draw();
  }).observe(box);

  const [first, second] = sae.map_shares.map(percent);
  return {
    node: h(
      "div",
      null,
      h("div", { class: "tools" }, h("label", { for: "color" }, "Color by"), choice),
      box,
      said,
      legend,
      h(
        "p",
        { class: "faint" },
        `${first} and ${second} of the directions' variance lie along its axes; dead latents are left out.`,
      ),
    ),
    show(latents) {
      inside = new Set(latents.filter((i) => columns.x[i] !== null));
      drawLegend();
      if (places.size) draw();
    },
    pick: (i) => pick(i, false),
  };
}
