"""A transcoder reads at one site and is measured, and spliced in, at another; rows normalised one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from evaluation_cases import DIM
from torch import Tensor

from qwenscope.evaluation.measure import SplitMeter
from qwenscope.lm.sites import Site
from qwenscope.sae.sae import SAE, TopKSAE

LATENTS = 48


def transcoder(skip: bool) -> SAE:
    """Random weights whose prediction is of the size of an MLP's output."""
    draw = torch.Generator().manual_seed(5)
    config = {"hidden_dim": DIM, "dict_size": LATENTS, "k": LATENTS, "activation": "relu"}
    config |= {"site": "layers.3.mlp_in", "target": "layers.3.mlp", "target_dim": DIM} | (
        {"skip": True} if skip else {}
    )
    shapes = {"encoder.weight": (LATENTS, DIM), "encoder.bias": (LATENTS,), "decoder.weight": (DIM, LATENTS)}
    shapes |= {"pre_bias": (DIM,), "decoder.bias": (DIM,)} | ({"skip.weight": (DIM, DIM)} if skip else {})
    return SAE.of(config, {name: torch.randn(shape, generator=draw) / 4 for name, shape in shapes.items()})


def passes(lm: Any, token_ids: Any, module: Any, replace: Any = None) -> tuple[Tensor, Tensor, Tensor]:
    """What a module took and returned in a plain pass, and log-probabilities [T, V], its output replaced if asked."""
    seen: list[Tensor] = []

    def hook(_module: Any, inputs: Any, output: Any) -> Any:
        seen.extend((inputs[0][0].clone(), output[0].clone()))
        return None if replace is None else replace(inputs[0], output)

    handle = module.register_forward_hook(hook)
    with torch.no_grad():
        logits = lm.model(input_ids=torch.from_numpy(token_ids).long()[None], use_cache=False).logits
    handle.remove()
    return seen[0], seen[1], logits[0].double().log_softmax(-1)


def loss(scores_TV: Tensor, token_ids: Any) -> Tensor:
    return -scores_TV[:-1].gather(1, torch.from_numpy(token_ids[1:]).long()[:, None])


@pytest.mark.parametrize("skip", [False, True])
def test_figures_of_a_transcoder_equal_hooks_by_hand(lm: Any, recipe: Any, conversations: Any, skip: bool) -> None:
    sae, module = transcoder(skip), lm.layers[3].mlp
    sites, targets = {"t": Site("layers.3.mlp_in")}, {"t": Site("layers.3.mlp")}
    result = SplitMeter(lm, {"t": sae}, sites, conversations, recipe, targets=targets).run()
    weights = {name: value.double() for name, value in sae.state_dict().items()}

    def predicted(x: Tensor) -> tuple[Tensor, Tensor]:
        latents = torch.relu((x.double() - weights["pre_bias"]) @ weights["encoder.weight"].T + weights["encoder.bias"])
        y = latents @ weights["decoder.weight"].T + weights["decoder.bias"]
        return latents, y + x.double() @ weights["skip.weight"].T if skip else y

    rows, hats, active, clean, spliced, zeroed = [], [], [], [], [], []
    for c in conversations:
        taken, returned, scores = passes(lm, c.token_ids, module)
        latents, y = predicted(taken)
        rows.append(returned.double())
        hats.append(y)
        active.append((latents > 0).sum(1).double())
        clean.append(loss(scores, c.token_ids))
        spliced.append(loss(passes(lm, c.token_ids, module, lambda x, _: predicted(x)[1].float())[2], c.token_ids))
        zeroed.append(loss(passes(lm, c.token_ids, module, lambda _, y: y * 0)[2], c.token_ids))
    y, y_hat = torch.cat(rows), torch.cat(hats)
    figures = result.figures["t"]
    deviation = (y - y.mean(0)).square().sum()
    assert figures["fvu"] == pytest.approx(float((y - y_hat).square().sum() / deviation), rel=1e-3)
    assert figures["l0"] == pytest.approx(float(torch.cat(active).mean()), rel=1e-3)
    for name, losses in (("ce_clean", clean), ("ce_spliced", spliced), ("ce_zero_ablation", zeroed)):
        assert figures[name] == pytest.approx(float(torch.cat(losses).mean()), rel=1e-3)
    assert figures["ce_spliced"] != pytest.approx(figures["ce_clean"], rel=1e-4)
    assert figures["nth_decoder_projection"] is None, "its decoder does not live where its rows do"


def test_a_row_that_is_normalised_gets_its_mean_and_size_back(lm: Any, recipe: Any, conversations: Any) -> None:
    """Figures are of the normalised rows; the splice is of the rows, as SAELens computes it."""
    sae, site = TopKSAE(DIM, 32, 5, seed=3), Site("layers.3.mlp.zscore")
    result = SplitMeter(lm, {"z": sae}, {"z": site}, conversations, recipe).run()
    rows, hats, spliced = [], [], []

    def normalised(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, deviation = y.mean(-1, keepdim=True), y.std(-1, keepdim=True)
        return (y - mean) / (deviation + 1e-5), mean, deviation

    def replace(_: Tensor, y: Tensor) -> Tensor:
        z, mean, deviation = normalised(y)
        return sae(z).detach() * deviation + mean

    for c in conversations:
        z = normalised(passes(lm, c.token_ids, lm.layers[3].mlp)[1])[0]
        rows.append(z.double())
        hats.append(sae(z).detach().double())
        spliced.append(loss(passes(lm, c.token_ids, lm.layers[3].mlp, replace)[2], c.token_ids))
    z, z_hat = torch.cat(rows), torch.cat(hats)
    expected = float((z - z_hat).square().sum() / (z - z.mean(0)).square().sum())
    assert result.figures["z"]["fvu"] == pytest.approx(expected, rel=1e-3)
    assert result.figures["z"]["ce_spliced"] == pytest.approx(float(torch.cat(spliced).mean()), rel=1e-3)
