// A steering experiment: dose-response of each trait beside its controls, and what each trait does to all checks.

import { h, number, percent, section, stat } from "./dom.js";
import { doses } from "./charts.js";
import { address, measured, table } from "./tables.js";

const CHANGE = [-1, 1, 0];
const ARMS = [
  ["steered", "steered"],
  ["random direction", "random"],
  ["prompt", "prompt"],
];
const AT = { all: "at all positions", prefill: "at the prompt", decode: "as it writes" };
const signed = (value) => `${value > 0 ? "+" : ""}${percent(value)}`;

function charts({ effects, traits }) {
  const positions = [...new Set(effects.map(({ position }) => position).filter(Boolean))];
  return Object.entries(traits).flatMap(([trait, check]) =>
    positions.map((position) => {
      const mine = effects.filter((cell) => cell.trait === trait && [position, null].includes(cell.position));
      const series = ARMS.map(([arm, tone]) => {
        const cells = mine.filter((cell) => cell.arm === arm).map((cell) => [cell.strength, cell.checks[check]]);
        return arm === "prompt"
          ? { tone, text: arm, level: cells[0]?.[1].difference, points: [] }
          : {
              tone,
              text: arm,
              points: cells.map(([x, told]) => [x, told.difference, told.interval]).sort((a, b) => a[0] - b[0]),
            };
      });
      return h(
        "figure",
        { class: "dose" },
        h("figcaption", null, trait, h("small", null, ` changes “${check}”, ${AT[position] ?? position}`)),
        doses(series, `Change of ${check} by strength of ${trait}, ${position}`),
      );
    }),
  );
}

function matrix({ matrix: { traits }, unsteered, latents, names }) {
  const checks = Object.keys(unsteered.checks);
  const rows = latents.map((each) => [
    h("div", null, h("strong", null, each.trait), address(each, names)),
    ...checks.map((check) => {
      const change = traits[each.trait]?.[check] ?? 0;
      return h(
        "span",
        { class: `change num ${change < 0 ? "less" : "more"}`, vars: { "--share": Math.abs(change).toFixed(2) } },
        signed(change),
      );
    }),
  ]);
  return table("Each trait and each check", ["trait", ...checks], rows);
}

function runs({ effects, traits }) {
  const rows = Object.entries(traits).flatMap(([trait, check]) => [
    [`${trait}: “${check}”`],
    ...effects
      .filter((cell) => cell.trait === trait)
      .map((cell) => {
        const told = cell.checks[check];
        return [
          h("span", null, cell.arm),
          cell.position ?? "",
          cell.strength === null ? "" : number(cell.strength),
          percent(told.rate),
          number(cell.kl),
          number(cell.perplexity),
          measured(told.difference, told.interval, CHANGE, cell.arm === "steered" ? "found" : "", signed),
          told.beyond_random_difference === undefined
            ? ""
            : measured(told.beyond_random_difference, told.beyond_random_interval, CHANGE, "found", signed),
        ];
      }),
  ]);
  const heads = ["run", "at", "strength", "rate", "KL", "perplexity", "change", "beyond random"];
  return table("Runs", heads, rows);
}

export function scenarios(result) {
  const { strength, position } = result.matrix;
  const plain = Object.entries(result.unsteered.checks).map(([check, rate]) => `${check} ${percent(rate)}`);
  return {
    stats: [
      stat("scenarios", number(result.scenarios)),
      stat("repeats", number(result.repeats)),
      stat("runs", number(result.runs)),
      stat("unsteered", plain.join(", ")),
      stat("perplexity unsteered", number(result.unsteered.perplexity)),
    ],
    node: [
      section(
        "Dose and response",
        "change of how often each trait's own check holds, 95 % intervals over scenarios",
        h(
          "p",
          { class: "legend" },
          ARMS.map(([arm, tone]) => h("span", { class: `arm ${tone}` }, h("i", { "aria-hidden": "true" }), arm)),
        ),
        h("div", { class: "charts" }, charts(result)),
      ),
      section(
        "What each trait changes",
        `at strength ${number(strength)}, ${AT[position] ?? position}`,
        matrix(result),
      ),
      section("All runs", "KL: nats a token; perplexity: under the unsteered model", runs(result)),
    ],
  };
}
