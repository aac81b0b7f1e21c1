// What one latent does: its output score, and what its ablation does to the loss, measured when asked for.

import { h, nats, number, section, stat } from "./dom.js";
import * as api from "./api.js";

const mean = (values) => values.reduce((sum, value) => sum + value, 0) / values.length;

const scoreView = ([score, without, confidence]) =>
  h(
    "dl",
    { class: "stats" },
    stat(
      "output score",
      number(score),
      "0 to 1: probability of what it promotes, after a push of ten times the largest activation",
    ),
    stat("without the push", number(without)),
    stat("Δ token confidence", nats(confidence), "nats; below 0 that push makes the model surer of its next token"),
  );

const lossView = (found) => [
  h(
    "dl",
    { class: "stats" },
    stat("its ablation", nats(found.change)),
    stat("95 %", found.interval.map(nats).join(" to ")),
    stat("another latent", nats(mean(found.random_latent)), found.random_latent.map(nats).join(", ")),
    stat("a random direction", nats(mean(found.random_direction)), found.random_direction.map(nats).join(", ")),
  ),
  h(
    "p",
    { class: "faint" },
    `n = ${found.positions} positions of ${found.conversations} conversations; loss there ${number(found.loss)} nats`,
  ),
];

// A button that runs the language model, and what it found.
function measured(text, work) {
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  const go = h(
    "button",
    {
      type: "button",
      class: "quiet",
      onclick: async () => {
        go.disabled = true;
        said.textContent = "running the language model…";
        try {
          out.replaceChildren(...[await work()].flat());
          said.textContent = "";
        } catch (error) {
          said.textContent = api.reason(error);
        } finally {
          go.disabled = false;
        }
      },
    },
    text,
  );
  return h("div", null, go, said, out);
}

// Share of the strongest examples that peak on one of the tokens that it promotes.
function inputScore({ examples, promoted }) {
  const top = examples.filter((example) => example.kind === "top");
  const tokens = new Set(promoted.map(([text]) => text));
  return top.length ? top.filter(({ tokens: texts, peak }) => tokens.has(texts[peak])).length / top.length : null;
}

// The sections of a latent's page; scores that are kept are filled in once they are there.
export function effectSections(found, live) {
  const { sae, latent } = found;
  const score = h("div");
  const measure = async () => scoreView((await api.outputScores({ sae, latents: [latent] })).scores[0]);
  api.keptScores(sae).then(
    (kept) => score.append(kept[latent] ? scoreView(kept[latent]) : live ? measured("Measure", measure) : ""),
    (error) => score.append(h("p", { class: "faint" }, error.message)),
  );
  const read = "share of its strongest examples that peak on a token that it promotes";
  return [
    section(
      "Reads and writes",
      "is what it promotes what it peaks on, and does a push make the model say it?",
      h("dl", { class: "stats" }, stat("input score", number(inputScore(found)), read)),
      score,
    ),
    live
      ? section(
          "Effect on the loss",
          "change of the next token's loss where it fires, in nats",
          measured("Ablate it", async () => lossView(await api.lossEffect({ sae, latent }))),
        )
      : null,
  ];
}
