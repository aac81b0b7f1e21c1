// Steering: the steered continuation and its controls side by side, as they are written.

import { h, number } from "./dom.js";
import * as api from "./api.js";

const select = (id, options) => h("select", { id }, options.map(([value, text]) => h("option", { value }, text)));
const field = (id, text, control) => h("div", { class: "field" }, h("label", { for: id }, text), control);

export function steerBox(sae, latent, found) {
  const prompt = h("textarea", { id: "steer-prompt", rows: "2", maxlength: "8000" });
  prompt.value = "Tell me about your day.";
  const strength = h("input", { id: "steer-strength", type: "number", step: "0.5", min: "-1000", max: "1000", value: "2" });
  const mode = select("steer-mode", [["add", "add"], ["clamp", "clamp"], ["ablate", "ablate"]]);
  const unit = select("steer-unit", [["max", `× its largest activation (${number(found.max)})`], ["norm", "× the residual norm"]]);
  const where = select("steer-where", [["all", "all positions"], ["prefill", "the prompt only"], ["decode", "the answer only"]]);
  const go = h("button", { type: "submit" }, "Steer");
  const said = h("p", { class: "faint", role: "status" });
  const runs = h("div", { class: "runs" });

  async function run(event) {
    event.preventDefault();
    go.disabled = true;
    said.textContent = "running the language model…";
    runs.replaceChildren();
    const boxes = new Map();
    try {
      await api.steer({ sae, latent, prompt: prompt.value, strength: Number(strength.value), mode: mode.value, unit: unit.value, where: where.value }, (piece) => {
        if (!boxes.has(piece.run)) {
          const text = h("p", { class: "written" });
          boxes.set(piece.run, text);
          runs.append(h("article", { class: piece.run === "steered" ? "run first" : "run" }, h("h3", null, piece.run, h("small", { title: "KL divergence of the next token's distribution from the unsteered one" }, ` KL ${number(piece.effect ?? 0)}`)), text));
        }
        boxes.get(piece.run).append(piece.text);
      });
      said.textContent = "";
    } catch (error) {
      said.textContent = error.message;
    } finally {
      go.disabled = false;
    }
  }

  return h("form", { class: "steer", onsubmit: run },
    field("steer-prompt", "Prompt", prompt),
    h("div", { class: "fields" }, field("steer-mode", "Mode", mode), field("steer-strength", "Strength", strength), field("steer-unit", "in units of", unit), field("steer-where", "at", where), go),
    said, runs);
}
