"""Output scores, against single passes with a hook made by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from planted_suite import PLANTED_LATENT
from typer.testing import CliRunner

from qwenscope.cli.main import app
from qwenscope.errors import FormatError
from qwenscope.features.output_score import FACTOR, FILE, PROMPT, ROWS, TOP, keep_scores, kept_scores, output_scores
from qwenscope.features.store import Index, MissingLatentError
from qwenscope.files import write_json
from qwenscope.lm.model import LanguageModel
from qwenscope.opening import Target

LATENTS = [PLANTED_LATENT, *range(100, 100 + ROWS)]  # one more than a pass holds


@pytest.mark.parametrize(("sae_id", "layer"), [("sae_delta", 1), ("sae_attn", 3)])
def test_a_score_is_that_of_one_pass_by_hand(target: Target, lm: LanguageModel, sae_id: str, layer: int) -> None:
    found = list(output_scores(target, lm, sae_id, LATENTS))
    assert len(found) == len(LATENTS)
    sae, ids = target.saes[sae_id], torch.tensor([lm.tokenizer(PROMPT).input_ids])
    decoder: Any = lm.decoder
    for place in (0, 1, len(LATENTS) - 1):
        column_D = sae.decoder.weight.detach()[:, LATENTS[place]]

        def push(_module: Any, _inputs: Any, output: Any, column_D: torch.Tensor = column_D) -> Any:
            rows = (output[0] if isinstance(output, tuple) else output).clone()
            rows[0, -1] += FACTOR * sae.encode(rows[0, -1:]).values.max() * column_D
            return (rows, *output[1:]) if isinstance(output, tuple) else rows

        with torch.no_grad():
            lens = lm.model.get_output_embeddings()(decoder.norm(column_D))  # type: ignore[no-untyped-call]
            promoted = lens.argsort(descending=True)[:TOP]
            clean = lm.model(ids).logits[0, -1].softmax(-1)
            handle = lm.layers[layer].register_forward_hook(push)
            pushed = lm.model(ids).logits[0, -1].softmax(-1)
            handle.remove()
        *scores, confidence = found[place]
        assert confidence == pytest.approx(float(clean.double().max().log() - pushed.double().max().log()), rel=1e-4)
        for score, probabilities in zip(scores, (pushed, clean), strict=True):
            best = int(promoted[probabilities[promoted].argmax()])
            rank = probabilities.argsort(descending=True).tolist().index(best)
            assert score == pytest.approx((1 - rank / len(clean)) * float(probabilities[best]), rel=1e-4)


def test_scores_are_kept_beside_the_index(index: Index, target: Target) -> None:
    assert kept_scores(index, "sae_delta") == []
    result = CliRunner().invoke(app, ["output-scores", str(index.folder), "--sae", "sae_delta"])
    assert result.exit_code == 0, result.output
    assert "wrote" in result.stderr
    kept = kept_scores(index, "sae_delta")
    assert len(kept) == target.saes["sae_delta"].dict_size
    assert all(0 <= x <= 1 for *scores, _ in kept for x in scores)
    assert len({confidence for *_, confidence in kept}) > 1
    assert kept_scores(index, "sae_attn") == []
    with pytest.raises(MissingLatentError):
        kept_scores(index, "sae_nope")
    older = {"sae_delta": [score[:2] for score in kept]}
    write_json(index.folder / FILE, older)
    assert kept_scores(index, "sae_delta") == [[*score[:2], None] for score in kept]
    keep_scores(index, {"sae_delta": kept, "sae_attn": [(0.5, 0.25, -0.5)]})  # of another dictionary
    assert kept_scores(index, "sae_delta") == kept
    with pytest.raises(FormatError, match="is damaged; remove it"):
        kept_scores(index, "sae_attn")
