// What each strength of a push does, as it was measured.

import { h, field, number, percent } from "./dom.js";
import { histogram } from "./charts.js";

// What each strength does: bars to pick from, a slider over the same stops, and the text at the one that is picked.
export function rangeBox(found, onPick) {
  const trials = found.trials;
  const charts = h("div", { class: "charts" });
  const said = h("p", { role: "status" });
  const text = h("p", { class: "written" });
  const slider = h("input", {
    type: "range",
    min: "0",
    max: String(trials.length - 1),
    step: "1",
    oninput: () => pick(Number(slider.value)),
  });
  const broken = trials.findIndex((trial) => !trial.is_text);
  const axis = [0, 0.25, 0.5, 0.75, 1].map((place) => [
    place,
    number(trials[Math.min(trials.length - 1, Math.round(place * (trials.length - 1)))].strength),
  ]);
  const sayOf = (trial) =>
    `strength ${number(trial.strength)}: KL ${number(trial.kl)} nats a token, ` +
    `${percent(1 - trial.distinct)} of token pairs repeated` +
    (trial.is_text ? (trial.strength && !trial.changed ? ", the text is unchanged" : "") : ", the text is broken");

  function pick(at) {
    const trial = trials[at];
    slider.value = String(at);
    slider.setAttribute("aria-valuetext", sayOf(trial));
    said.replaceChildren(sayOf(trial));
    text.replaceChildren(trial.text);
    const options = { axis, height: 64, onPick: pick, picked: (i) => i === at, label: (i) => sayOf(trials[i]) };
    const most = Math.max(3 * found.kl_bound, 1e-9); // broken text diverges without end
    charts.replaceChildren(
      h(
        "div",
        null,
        h("h3", null, "KL, nats a token"),
        histogram(
          trials.map((trial) => Math.min(most, trial.kl)),
          { ...options, title: "KL by strength" },
        ),
      ),
      h(
        "div",
        null,
        h("h3", null, "Repeated token pairs"),
        histogram(
          trials.map((trial) => 1 - trial.distinct),
          { ...options, title: "Repeated token pairs by strength" },
        ),
      ),
    );
    onPick(trial.strength);
  }

  const start = trials.findIndex((trial) => trial.strength === (found.start ?? found.strongest ?? 0));
  pick(Math.max(0, start));
  return h(
    "div",
    { class: "range" },
    field("Strength, in shares of the residual norm", slider),
    h(
      "p",
      { class: "faint" },
      found.start === null
        ? `No strength changes the text and keeps the KL within ${number(found.kl_bound)} nats a token.`
        : trials[start].is_text
          ? `Starts at the largest strength with text whose KL is within ${number(found.kl_bound)} nats a token.`
          : "Starts at the least strength that changes the text, which goes in circles there.",
      broken < 0 ? " The text holds at all of them." : ` The text breaks at ${number(trials[broken].strength)}.`,
    ),
    charts,
    said,
    text,
  );
}
