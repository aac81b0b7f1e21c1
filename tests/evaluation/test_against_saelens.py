"""Where definitions coincide, our figures are SAELens' own. Runs where sae-lens is installed, in its own environment:

PYTHONPATH=src python -m pytest tests/evaluation/test_against_saelens.py --noconftest
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwenscope.evaluation.fidelity import Fidelity
from qwenscope.sae.sae import TopKSAE

evals = pytest.importorskip("sae_lens.evals")


def test_fidelity_equals_saelens() -> None:
    torch.manual_seed(0)
    sae = TopKSAE(24, 96, 6, seed=1)
    mixing, bias = torch.randn(24, 24), torch.randn(24)
    prompts = [torch.randn(5, 7, 24) @ mixing + bias for _ in range(4)]
    fidelity = Fidelity(24, 96, ("user",))
    with torch.no_grad():
        for x in prompts:
            rows = x.reshape(-1, 24)
            codes = sae.encode(rows)
            none = torch.zeros(len(rows))
            fidelity.update(rows, codes, sae.decode(codes), none, none.bool())
    figures = fidelity.figures()

    def sparse_encode(x: torch.Tensor) -> torch.Tensor:
        return sae.encode(x).dense()

    def dense_decode(dense: torch.Tensor) -> torch.Tensor:
        return dense @ sae.decoder.weight.T + sae.pre_bias

    queue = iter(prompts)
    wrapped = SimpleNamespace(
        cfg=SimpleNamespace(
            metadata=SimpleNamespace(hook_name="blocks.0.hook_resid_post", hook_head_index=None), d_sae=96
        ),
        device=torch.device("cpu"),
        encode=sparse_encode,
        decode=dense_decode,
    )
    model = SimpleNamespace(run_with_cache=lambda tokens, **_: (None, {"blocks.0.hook_resid_post": next(queue)}))
    store = SimpleNamespace(get_batch_tokens=lambda _: torch.ones(5, 7, dtype=torch.int64))
    scaler = SimpleNamespace(scale=lambda x: x, unscale=lambda x: x)
    with torch.no_grad():
        theirs, per_latent = evals.get_sparsity_and_variance_metrics(
            wrapped, model, store, scaler, 4, True, True, True, True, 5, {}
        )
    assert figures["explained_variance"] == pytest.approx(theirs["explained_variance"], rel=1e-5)
    assert figures["mse"] * 24 == pytest.approx(theirs["mse"], rel=1e-5), "theirs is summed over dimensions"
    assert figures["cosine"] == pytest.approx(theirs["cossim"], rel=1e-5)
    assert figures["norm_ratio"] == pytest.approx(theirs["l2_ratio"], rel=1e-5)
    assert figures["l0"] == pytest.approx(theirs["l0"], rel=1e-6)
    density = torch.tensor(per_latent["feature_density"])
    assert figures["dead_latents"] == int((density == 0).sum())
    torch.testing.assert_close(fidelity.fired_N / figures["tokens"], density.double().float())
