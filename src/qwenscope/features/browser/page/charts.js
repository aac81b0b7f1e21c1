// Small charts as SVG: histograms and bars. Every number drawn is also in a title or a table beside it.

import { h, s, number, percent } from "./dom.js";

const LEAST_BINS = 20;

// counts: numbers; label(i): text of bar i; axis: [[position 0..1, text]].
export function histogram(counts, { label, axis = [], height = 96, title, onPick, picked }) {
  const width = 480;
  const most = Math.max(1, ...counts);
  const step = width / Math.max(1, counts.length);
  const bars = counts.map((count, i) => {
    const tall = count ? Math.max(1.5, (count / most) * (height - 4)) : 0;
    const bar = s("rect", {
      x: i * step + 0.75,
      y: height - tall,
      width: Math.max(0.5, step - 1.5),
      height: tall,
      rx: Math.min(1.5, step / 4),
      class: picked?.(i) ? "on" : "",
    });
    const hit = s(
      "rect",
      { x: i * step, y: 0, width: step, height, class: "hit", onclick: onPick ? () => onPick(i) : null },
      s("title", null, label(i, count)),
    );
    return s("g", { class: onPick ? "pick" : "" }, bar, hit);
  });
  const marks = axis.map(([place, text]) => h("span", { vars: { "--at": String(place) } }, text));
  return h(
    "figure",
    { class: "histogram" },
    s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      ...bars,
    ),
    h("div", { class: "axis", "aria-hidden": "true" }, ...marks),
  );
}

// A histogram of activations over factors of two; a narrow one keeps empty bins around it.
export function activations({ first, per_octave, counts }) {
  const missing = Math.max(0, LEAST_BINS - counts.length);
  const before = Math.floor(missing / 2);
  const all = [...Array(before).fill(0), ...counts, ...Array(missing - before).fill(0)];
  const edge = (i) => 2 ** (first + (i - before) / per_octave);
  return histogram(all, {
    title: "Histogram of activations, logarithmic scale",
    label: (i, count) => `${number(edge(i))} – ${number(edge(i + 1))}: ${number(count)} tokens`,
    axis: [0, 0.25, 0.5, 0.75, 1].map((place) => [place, number(edge(place * all.length))]),
  });
}

// How many latents have which density, over decades.
export function densities({ first, per_decade, counts }, options = {}) {
  const edge = (i) => 10 ** (first + i / per_decade);
  const decades = counts.length / per_decade;
  return histogram(counts, {
    title: "Histogram of latent densities, logarithmic scale",
    label: (i, count) => `${percent(edge(i))} – ${percent(edge(i + 1))} of tokens: ${count} latents`,
    axis: Array.from({ length: decades + 1 }, (_, i) => [i / decades, percent(10 ** (first + i))]),
    ...options,
  });
}

export function sparkline({ counts }) {
  const most = Math.max(1, ...counts);
  const bars = counts.map((count, i) =>
    s("rect", { x: i * 4, y: 24 - (count / most) * 24, width: 3, height: (count / most) * 24 }),
  );
  return s(
    "svg",
    { class: "spark", viewBox: `0 0 ${counts.length * 4} 24`, preserveAspectRatio: "none", "aria-hidden": "true" },
    ...bars,
  );
}

// rows: [label node, value 0..1 of the bar, text, reference 0..1 or null].
export function bars(rows, caption) {
  return h(
    "table",
    { class: "bars" },
    h("caption", { class: "hidden" }, caption),
    h(
      "tbody",
      null,
      rows.map(([label, share, text, base]) =>
        h(
          "tr",
          null,
          h("th", { scope: "row" }, label),
          h(
            "td",
            { class: "track" },
            h(
              "div",
              { vars: { "--share": String(Math.min(1, share)) } },
              base === null || base === undefined
                ? null
                : h("i", { title: `over all tokens: ${percent(base)}`, vars: { "--base": String(Math.min(1, base)) } }),
            ),
          ),
          h("td", { class: "num" }, text),
        ),
      ),
    ),
  );
}
