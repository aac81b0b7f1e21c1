// One latent alone, for a frame in another page: embed#/sae_attn_mid/40.

import { h } from "./dom.js";
import { latentCard } from "./card.js";

const main = document.getElementById("main");

async function show() {
  const [, id, latent] = location.hash.split("/").map(decodeURIComponent);
  try {
    if (!/^\d+$/.test(latent ?? "")) throw new Error("The address of a latent is embed#/SAE/NUMBER.");
    main.replaceChildren(await latentCard(id, Number(latent), { target: "_blank" }));
    document.title = `${id} / ${latent} · qwenscope`;
  } catch (error) {
    main.replaceChildren(h("p", null, error.message));
  }
  main.dataset.ready = "1";
}

addEventListener("hashchange", show);
show();
