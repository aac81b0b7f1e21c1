// Small charts as SVG: histograms and bars. Every number drawn is also in a title or a table beside it.

import { h, s, number, percent } from "./dom.js";

const LEAST_BINS = 20;
const MOST_TICKS = 7;

// counts: numbers; label(i): text of bar i; axis: [[position 0..1, text]]; marks: [[position 0..1, tone]].
export function histogram(counts, { label, axis = [], marks = [], height = 96, title, onPick, picked }) {
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
  const lines = marks.map(([place, tone]) =>
    s("line", { class: `mark ${tone}`, x1: place * width, x2: place * width, y1: height - 22, y2: height }),
  );
  const toEnds = axis[0]?.[0] === 0; // then the texts keep within the chart, else each stands about its place
  const ticks = axis.map(([place, text]) =>
    h("span", { vars: { "--at": String(place), "--shift": `${toEnds ? -100 * place : -50}%` } }, text),
  );
  return h(
    "figure",
    { class: "histogram" },
    s(
      "svg",
      { viewBox: `0 0 ${width} ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": title },
      ...bars,
      ...lines,
    ),
    h("div", { class: "axis", "aria-hidden": "true" }, ...ticks),
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
    axis: roundNumbers(edge(0), edge(all.length)).map((value) => [
      ((Math.log2(value) - first) * per_octave + before) / all.length,
      number(value),
    ]),
  });
}

// Round numbers between two positive ones, by decades or their parts, as many as fit on an axis.
function roundNumbers(low, high) {
  const decades = Array.from({ length: 80 }, (_, i) => i - 40);
  const within = (parts) =>
    decades
      .flatMap((decade) => parts.map((part) => Number(`${part}e${decade}`)))
      .filter((value) => value >= low && value <= high);
  const choices = [[1, 2, 5], [1, 3], [1]].map(within);
  return choices.find((values) => values.length <= MOST_TICKS) ?? choices.at(-1).filter((_, i) => i % 2 === 0);
}

// How many tokens of the vocabulary a direction moves how far; the tokens moved most are marked: [[text, score]].
export function logits({ first, per_sd, counts }, promoted, suppressed) {
  const span = counts.length / per_sd;
  const at = (score) => Math.min(1, Math.max(0, (score - first) / span));
  const step = [1, 2, 4, 8].find((each) => span / each <= MOST_TICKS);
  const ticks = Array.from({ length: 33 }, (_, i) => i - 16).filter(
    (value) => value % step === 0 && value >= first && value <= first + span,
  );
  const named = (i) =>
    [...promoted, ...suppressed]
      .filter(([, score]) => Math.min(counts.length - 1, Math.floor(at(score) * counts.length)) === i)
      .map(([text]) => ` ${JSON.stringify(text)}`);
  return histogram(counts, {
    title: "Histogram of logits over the vocabulary, in standard deviations",
    label: (i, count) =>
      `${number(first + i / per_sd)} – ${number(first + (i + 1) / per_sd)}: ${number(count)} tokens${named(i)}`,
    axis: ticks.map((value) => [at(value), value > 0 ? `+${value}` : String(value).replace("-", "−")]),
    marks: [...suppressed.map(([, score]) => [at(score), "down"]), ...promoted.map(([, score]) => [at(score), "up"])],
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

// A value and its interval on a line from `low` to `high`, with a mark at `zero`; the number stands beside it.
export function whisker(value, interval, [low, high, zero], tone = "") {
  const width = 120;
  const at = (x) => (4 + (width - 8) * Math.min(1, Math.max(0, (x - low) / (high - low)))).toFixed(1);
  return s(
    "svg",
    { class: `whisker ${tone}`, viewBox: `0 0 ${width} 16`, "aria-hidden": "true" },
    s("line", { class: "zero", x1: at(zero), x2: at(zero), y1: 0, y2: 16 }),
    interval ? s("line", { class: "interval", x1: at(interval[0]), x2: at(interval[1]), y1: 8, y2: 8 }) : null,
    s("circle", { cx: at(value), cy: 8, r: 3.5 }),
  );
}

// Values by strength, joined, one line per series: [{ tone, text, level: y of a dashed line, points: [[x, y, interval]] }].
export function doses(series, title) {
  const [width, height, left, bottom] = [360, 190, 44, 24];
  const xs = series.flatMap(({ points }) => points.map(([x]) => x));
  const ys = series.flatMap(({ points, level }) => [level ?? 0, ...points.flatMap(([, y, i]) => [y, ...(i ?? [])])]);
  const [x0, x1] = [Math.min(0, ...xs), Math.max(0, ...xs)];
  const [least, most] = [Math.min(0, ...ys), Math.max(0, ...ys)];
  const [y0, y1] = least === most ? [-0.1, 0.1] : [least, most];
  const at = (x) => (left + ((width - left - 10) * (x - x0)) / (x1 - x0 || 1)).toFixed(1);
  const up = (y) => (8 + ((height - bottom - 8) * (y1 - y)) / (y1 - y0)).toFixed(1);
  const text = (x, y, said, anchor) => s("text", { x, y, "text-anchor": anchor }, said);
  const marks = series.map(({ tone, level, points, text: name }) => [
    level === undefined
      ? null
      : s("line", { class: `level ${tone}`, x1: left, x2: width - 10, y1: up(level), y2: up(level) }),
    s("polyline", { class: tone, points: points.map(([x, y]) => `${at(x)},${up(y)}`).join(" ") }),
    points.map(([x, y, interval]) => [
      interval ? s("line", { class: tone, x1: at(x), x2: at(x), y1: up(interval[0]), y2: up(interval[1]) }) : null,
      s("circle", { class: tone, cx: at(x), cy: up(y), r: 4 }, s("title", null, `${name}, ${x}: ${percent(y)}`)),
    ]),
  ]);
  return s(
    "svg",
    { class: "doses", viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title },
    s("line", { class: "zero", x1: left, x2: width - 10, y1: up(0), y2: up(0) }),
    [...new Set([y0, 0, y1])].map((y) => text(left - 6, Number(up(y)) + 4, percent(y), "end")),
    [...new Set(xs)].map((x) => text(at(x), height - 6, number(x), "middle")),
    ...marks.flat(3).filter(Boolean),
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
