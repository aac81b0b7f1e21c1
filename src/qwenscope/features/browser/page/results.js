// Results that the browser was started with: contrasts, diffs, monitors and their tests. Each latent opens its page.

import { h, field, known, link, number, percent, section, stat, token } from "./dom.js";
import { shaded } from "./contexts.js";
import { scenarios } from "./scenarios.js";
import { address, between, brief, fixed, measured, small, table } from "./tables.js";
import * as api from "./api.js";

const KINDS = {
  contrast: ["Contrast", contrast],
  diff: ["Diff of two corpora", diff],
  checkpoints: ["Diff of two checkpoints", diff],
  monitor: ["Monitor", monitor],
  "monitor test": ["Test of a monitor", test],
  scenarios: ["Steering experiment", scenarios],
};
const EFFECT = [-1, 1, 0];
const AUROC = [0, 1, 0.5];

function contrast(result) {
  const { latents, controls, confounds, names } = result;
  const rows = latents.map((each) => [
    address(each, names),
    measured(each.effect, each.interval, EFFECT, each.q <= result.fdr ? "found" : ""),
    fixed(each.adjusted_effect),
    small(each.q),
    fixed(each.auroc),
    percent(each.active.positive),
    percent(each.active.negative),
  ]);
  const compared = Object.entries(controls).flatMap(([sae, by]) => [
    [sae || "without any SAE"],
    ...Object.entries(by).map(([name, cell]) => [
      h("span", null, name),
      measured(cell.auroc, cell.interval, AUROC, name === "best latent" ? "found" : ""),
      percent(cell.balanced_accuracy),
    ]),
  ]);
  return {
    stats: [
      stat("found", `${number(result.found)} of ${number(result.tested)} latents`),
      stat("false discovery rate", percent(result.fdr)),
      stat(result.paired ? "pairs" : "with, without", sides(result)),
      stat("pooled by", result.pool),
    ],
    node: [
      section(
        "Latents",
        "effect of the behavior, 95 % interval; adjusted for length and roles; the share of conversations they are active in",
        brief("Latents", ["latent", "effect", "adjusted", "q", "AUROC", "with", "without"], rows),
      ),
      section(
        "What it must be compared with",
        "AUROC on held-out conversations, the same folds for all",
        table("Controls", ["by", "AUROC", "accuracy"], compared),
      ),
      section("What else differs between the piles", null, differing(confounds)),
    ],
  };
}

const sides = ({ paired, conversations: { positive, negative } }) =>
  paired ? number(positive) : `${number(positive)}, ${number(negative)}`;

function differing({ length, roles, language, source }) {
  const listed = (counts) =>
    Object.entries(counts)
      .map(([name, count]) => `${name} ${number(count)}`)
      .join(", ") || "–";
  const shares = Object.entries(roles).map(([role, cell]) => [
    h("span", null, `share of ${role}`),
    percent(cell.positive),
    percent(cell.negative),
    small(cell.p),
  ]);
  const counted = [
    ["language", language],
    ["source", source],
  ].map(([name, cell]) => [
    h("span", null, name),
    h("span", null, listed(cell.positive)),
    h("span", null, listed(cell.negative)),
    small(cell.p),
  ]);
  const tokens = [
    h("span", null, "mean tokens"),
    fixed(length.positive, 1),
    fixed(length.negative, 1),
    small(length.p),
  ];
  return table("What else differs", ["", "with", "without", "p"], [tokens, ...shares, ...counted]);
}

function diff(result) {
  const { latents, names, fvu } = result;
  const groups = [...new Set(latents.map(({ group }) => group))].sort((a, b) => a - b);
  const rowsOf = (group, most) => {
    const mine = latents.filter((each) => each.group === group);
    const together = `: ${mine.length} latents that ${fvu ? "change" : "fire"} together`;
    const rows = mine
      .slice(0, most)
      .map((each) => [
        address(each, names),
        measured(each.effect, each.interval, EFFECT, "found"),
        small(each.q),
        percent(each.rate.a),
        percent(each.rate.b),
        ...(fvu ? [h("span", { class: "chips" }, (each.tokens ?? []).map(changed))] : []),
      ]);
    return [[`group ${group}${mine.length > 1 ? together : ""}`], ...rows];
  };
  const rows = groups.flatMap((group) => rowsOf(group, latents.length));
  const first = groups.slice(0, 5).flatMap((group) => rowsOf(group, 4));
  const heads = ["latent", "effect", "q", "rate in a", "rate in b", ...(fvu ? ["on which tokens"] : [])];
  const fit = Object.entries(fvu ?? {}).map(([sae, cell]) => [
    h("a", { href: link.sae(sae) }, sae),
    fixed(cell.a, 4),
    fixed(cell.b, 4),
    fixed(cell.change, 4),
    h("span", { class: "num" }, between(cell.interval, (x) => fixed(x, 4)) ?? "–"),
  ]);
  return {
    stats: [
      stat("a", fvu ? result.model.a : result.a),
      stat("b", fvu ? result.model.b : result.b),
      stat(
        "conversations",
        fvu ? number(result.conversations.a) : `${number(result.conversations.a)}, ${number(result.conversations.b)}`,
      ),
      stat("found", `${number(result.found)} of ${number(result.tested)} latents`),
      stat("false discovery rate", percent(result.fdr)),
    ],
    node: [
      section(
        "Latents",
        "above 0: fires more in a; rate: share of tokens",
        rows.length ? brief("Latents", heads, rows, first) : h("p", { class: "faint" }, "No latent differs."),
      ),
      fit.length
        ? section(
            "How well the SAEs fit",
            "fraction of variance unexplained",
            table("FVU", ["SAE", "a", "b", "change", "95 %"], fit),
          )
        : null,
      latents.length
        ? section(
            "Conversations by latent",
            fvu ? "those in which its rate changed most" : "those in which it is largest",
            latents.map((each, i) => conversations(each, names, i === 0)),
          )
        : null,
    ],
  };
}

const changed = ({ token: text, count, a, b }) =>
  token(text, { class: "chip plain", title: `${JSON.stringify(text)}: fires on ${a} of ${count} in a, on ${b} in b` });

const conversations = (each, names, open) =>
  h(
    "details",
    { open },
    h("summary", null, `${each.sae} / ${each.latent} `, known(names[`${each.sae}/${each.latent}`])),
    h(
      "ol",
      { class: "said" },
      each.conversations.map(({ id, side, text, max, change }) =>
        h(
          "li",
          { title: `conversation ${id}` },
          h("span", { class: "num" }, side),
          h("span", { class: "num" }, max === undefined ? `${change > 0 ? "+" : ""}${percent(change)}` : number(max)),
          h("span", { class: "excerpt" }, text),
        ),
      ),
    ),
  );

const weights = (latents, names) => {
  const most = Math.max(...latents.map(({ weight }) => Math.abs(weight)), 1e-9);
  const rows = latents.map((each) => [
    address(each, names),
    measured(each.weight, null, [-most, most, 0], "found", number),
  ]);
  return brief("Latents", ["latent", "weight"], rows);
};

async function monitor(result) {
  const { calibration, fitted_on: fitted, held_out: held } = result;
  const [low, high] = calibration.rate_interval;
  const compared = Object.entries(held).map(([sae, cell]) => [
    h("a", { href: link.sae(sae) }, sae),
    measured(cell.auroc, cell.interval, AUROC, sae === result.latents[0].sae ? "found" : ""),
    percent(cell.balanced_accuracy),
  ]);
  return {
    stats: [
      stat("SAE", result.latents[0].sae),
      stat("reads at", result.site),
      stat(
        "false positives stated",
        `${percent(result.fpr)} (${percent(low)} to ${percent(high)})`,
        "95 % interval of the chance that this calibration pile has led to",
      ),
      stat("threshold", number(result.threshold)),
      stat("calibrated on", `${number(calibration.conversations)} conversations`),
      stat("fitted on", `${number(fitted.positive)}, ${number(fitted.negative)}`, "with and without the behavior"),
      stat("tokens", `${result.roles.join(", ") || "all"}; ${result.pool}`),
    ],
    node: [
      (await api.suite()).live
        ? section("Score a text", "an alarm is a score above the threshold", scoreBox(result))
        : null,
      section("Latents", "score: weighted sum of pooled activations", weights(result.latents, result.names)),
      section(
        "Held-out conversations",
        "sparse probe on each SAE's latents; the monitor takes the best, unless one was named",
        table("Held-out conversations", ["SAE", "AUROC", "accuracy"], compared),
      ),
      section(
        "Calibration pile",
        null,
        h("p", null, `sources: ${calibration.sources.join(", ")}; languages: ${calibration.languages.join(", ")}`),
      ),
    ],
  };
}

function scoreBox({ name, threshold }) {
  const text = h("textarea", { rows: "3", maxlength: "8000", placeholder: "Any text" });
  const chat = h("input", { type: "checkbox", id: "chat", checked: true });
  const said = h("p", { class: "faint", role: "status" });
  const out = h("div");
  async function run(event) {
    event.preventDefault();
    if (!text.value.trim()) return;
    said.textContent = "running the language model…";
    const given = chat.checked ? { messages: [{ role: "user", content: text.value }] } : { text: text.value };
    try {
      const { scores } = await api.score({ monitor: name, conversations: [given], tokens: true });
      const [{ score, alarm, tokens, token: each }] = scores;
      const [low, most] = [Math.min(...each), Math.max(...each)];
      said.textContent = `${alarm ? "alarm" : "no alarm"}: ${number(score)}, threshold ${number(threshold)}`;
      out.replaceChildren(
        shaded(
          tokens,
          each.map((value) => value - low),
          each.indexOf(most),
          most - low || 1,
          null,
        ),
      );
    } catch (error) {
      said.textContent = api.reason(error);
    }
  }
  return h(
    "form",
    { onsubmit: run },
    field("Text", text),
    h(
      "div",
      { class: "fields" },
      h("button", { type: "submit" }, "Score"),
      h("label", { class: "check" }, chat, " as a user's message"),
      said,
    ),
    out,
  );
}

function test(result) {
  const most = Math.max(
    2 * result.fpr,
    ...Object.values(result.slices).map(({ stated }) => stated.false_positives.interval[1]),
  );
  const rate = (cell, scale) => (cell ? measured(cell.rate, cell.interval, scale, "", percent) : "–");
  const rows = Object.entries(result.slices).map(([name, { conversations: counts, stated }]) => [
    h("span", null, name),
    number(counts.positive),
    number(counts.negative),
    rate(stated.false_positives, [0, most, result.fpr]),
    rate(stated.recall, [0, 1, 0]),
    h("span", { class: stated.holds ? null : "fails" }, stated.holds ? "holds" : "does not hold"),
  ]);
  const at = (cell) =>
    "refused" in cell
      ? h("span", { class: "faint", title: cell.refused }, "too few")
      : measured(cell.recall, cell.interval, [0, 1, 0], "", percent);
  const compared = Object.entries(result.slices).flatMap(([name, { by }]) => [
    ...(Object.keys(by).length ? [[name]] : []),
    ...Object.entries(by).map(([control, cell]) => [
      h("span", null, control),
      measured(cell.auroc, cell.interval, AUROC, control === "monitor" ? "found" : ""),
      ...Object.values(cell.at).map(at),
    ]),
  ]);
  const rates = Object.keys(Object.values(Object.values(result.slices)[0]?.by ?? {})[0]?.at ?? {});
  return {
    stats: [stat("monitor", result.monitor), stat("false positives stated", percent(result.fpr))],
    node: [
      section(
        "Does the stated rate hold?",
        "95 % intervals; the mark is the stated rate",
        table("Rates", ["conversations", "with", "without", "false positives", "recall", "stated rate"], rows),
      ),
      section(
        "Beside its controls",
        "recall where so many of these conversations without the behavior score higher",
        table("Controls", ["by", "AUROC", ...rates.map((each) => `recall at ${percent(Number(each))}`)], compared),
      ),
      section("Latents", "score: weighted sum of pooled activations", weights(result.latents, result.names)),
    ],
  };
}

export async function render(name) {
  const result = await api.result(name);
  const [kind, page] = KINDS[result.kind];
  const { stats, node } = await page(result);
  return {
    title: name,
    node: h(
      "div",
      { class: "page" },
      h(
        "header",
        { class: "title" },
        h("p", { class: "eyebrow" }, h("a", { href: "#/results" }, "Results"), ` · ${kind}`),
        h("h1", null, name),
        h("dl", { class: "stats" }, stats),
      ),
      node,
    ),
  };
}

export async function list() {
  const all = await api.results();
  return {
    title: "Results",
    node: h(
      "div",
      { class: "page" },
      h("header", { class: "title" }, h("h1", null, "Results")),
      all.length
        ? h(
            "ol",
            { class: "hits" },
            all.map(({ name, kind, summary }) =>
              h(
                "li",
                { class: "hit result" },
                h("a", { href: link.result(name) }, name),
                h("span", null, KINDS[kind][0]),
                h("span", { class: "faint" }, summary),
              ),
            ),
          )
        : h(
            "p",
            null,
            "None: start the browser with ",
            h("code", null, "--results PATH"),
            ", once for each contrast, diff, monitor, test or experiment.",
          ),
    ),
  };
}
