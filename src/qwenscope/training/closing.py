"""The closing phase: SAEs see the run's last tokens inside the model, and what they do to its predictions is trained.

Karvonen 2025 (arXiv 2503.17272): a short training on KL + MSE at the end of a run brings most of what training on both
from the start would. Here a step takes whole conversations, which follow the last window in the corpus. They are run
once as they are; then, for each SAE, its reconstructions stand in its rows' place, the model goes on from there, and

    loss = error + s KL,    s = 0.3 error / KL of the step, held fixed,    KL = sum of KL(clean || spliced) / rows

is trained in the same analytic step as before, to which the language model's backward pass gives dKL/dx_hat. Rows that
training leaves out stay as they are. The rows of a step are those of a few conversations, not of a window.

Legend: C conversations of a batch, T positions, B rows of a step, D hidden, P rows whose token has a successor, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import repeat

import torch
from torch import Tensor

from qwenscope.activations.harvest import kept_rows
from qwenscope.activations.source import Drawn
from qwenscope.activations.windows import Windows
from qwenscope.errors import RecipeError
from qwenscope.lm.batches import Batch, make_batches
from qwenscope.lm.forward import logits
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site, hooked_sites, site_names, sites_of
from qwenscope.lm.splice import CleanPass, chunk_rows, clean_pass, variant_pass
from qwenscope.machine import memory_errors_named
from qwenscope.recipe import Recipe
from qwenscope.training.suite import Suite

_LESS_MEMORY = (
    "resume it where there is more, or begin another run with a lower training.batch_size, corpus.max_length or "
    "training.kl_share"
)


def check_closing(recipe: Recipe, ranks: int = 1) -> None:
    """Refuse a closing phase that cannot be.

    Raises:
        RecipeError: differences of two models, which no model has to splice; rows of vLLM; several ranks; or a warmup
            that reaches into the phase.
    """
    training, share = recipe.training, recipe.training.kl_share
    if not training.closes:
        return
    differences = [sae_id for sae_id, point in recipe.hook_points.items() if point.is_difference]
    if differences:
        raise RecipeError(
            f"training.kl_share {share:g}: hook_points.{differences[0]} reads a difference of two models, which "
            "stands in neither; set kl_share to 0"
        )
    if recipe.lm.backend != "transformers":
        raise RecipeError(
            f"training.kl_share {share:g} needs gradients of the model, which lm.backend {recipe.lm.backend} has not; "
            "set backend to transformers, or kl_share to 0"
        )
    if ranks > 1:
        raise RecipeError(f"training.kl_share {share:g} works in one process, not in {ranks}; set it to 0")
    warmup = training.warmup_steps * training.batch_size
    if warmup > training.shuffled_tokens:
        raise RecipeError(
            f"training.warmup_steps {training.warmup_steps} x batch_size {training.batch_size} = {warmup:,} tokens "
            f"reach into the closing phase, which begins at {training.shuffled_tokens:,} (kl_share {share:g}); "
            "lower training.warmup_steps or training.kl_share"
        )


@dataclass(frozen=True)
class Block:
    """The conversations of one step, run as they are; rows are in the order of `passes`, conversation and position."""

    passes: list[CleanPass]
    kept: list[Tensor]
    """Of each pass, int64: the places among its C x T positions whose rows are trained and replaced."""
    rows: dict[Site, Tensor]
    """{site: x_BD} of these."""

    def divergence(self, lm: LanguageModel, site: Site, x_hat_BD: Tensor) -> tuple[Tensor, Tensor]:
        """What `x_hat_BD` in the rows' place at `site` does to the model's predictions.

        Returns:
            KL(clean || spliced) of all predictions, in nats per row of `x_hat_BD` (float64, 0-dim), and its gradient
            with respect to `x_hat_BD`, in that one's dtype.
        """
        sizes = [len(place_B) for place_B in self.kept]
        total, gradients = x_hat_BD.new_zeros((), dtype=torch.float64), []
        for clean, place_B, part_BD in zip(self.passes, self.kept, torch.split(x_hat_BD, sizes), strict=True):
            leaf_BD, rows_CTD = part_BD.detach().requires_grad_(), clean.recording.rows[site]
            with torch.enable_grad():
                x_CTD = rows_CTD.flatten(0, 1).index_copy(0, place_B, leaf_BD.to(rows_CTD.dtype)).view_as(rows_CTD)
                hidden_PD = variant_pass(lm, clean, site, x_CTD, grad=True)
            kl, gradient_PD = kl_of(lm, clean.hidden_PD, hidden_PD.detach())
            total += kl
            gradients.append(torch.autograd.grad(hidden_PD, leaf_BD, gradient_PD)[0])
        return total / len(x_hat_BD), torch.cat(gradients) / len(x_hat_BD)


def kl_of(lm: LanguageModel, clean_PD: Tensor, hidden_PD: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
    """Sum over rows that enter the LM head of KL(clean || spliced), and its gradient with respect to the spliced rows.

    Logits are made, and gone back through, chunk by chunk: memory does not grow with the vocabulary.

    Args:
        clean_PD: rows of the clean pass.
        hidden_PD: those of the spliced one.
        chunk: rows of logits made at once; None chooses by device and vocabulary.

    Returns:
        Float64, 0-dim, in nats; and [P, D] in the model's dtype.
    """
    gradient_PD, chunk = torch.empty_like(hidden_PD), chunk or chunk_rows(lm)
    total = hidden_PD.new_zeros((), dtype=torch.float64)
    for start in range(0, len(hidden_PD), chunk):
        part = slice(start, start + chunk)
        leaf_PD = hidden_PD[part].detach().requires_grad_()
        score_PV = logits(lm, leaf_PD, grad=True)
        clean_PV = logits(lm, clean_PD[part]).log_softmax(1)
        slope_PV = score_PV.detach().log_softmax(1)
        weight_PV = clean_PV.exp()
        total += clean_PV.sub_(slope_PV).mul_(weight_PV).sum(1).sum(dtype=torch.float64)
        slope_PV = slope_PV.exp_().sub_(weight_PV)  # dKL/dscore
        gradient_PD[part] = torch.autograd.grad(score_PV, leaf_PD, slope_PV)[0]
    return total, gradient_PD


class ClosingPhase:
    """Steps on conversations inside the model, from where the windows end.

    Args:
        lm: whole, with its LM head.
        windows: whose corpus is gone on with.
        suite: all SAEs of the run.
        recipe: passed `check_closing`.
    """

    def __init__(self, lm: LanguageModel, windows: Windows, suite: Suite, recipe: Recipe) -> None:
        self._lm, self._windows, self._suite, self._recipe = lm, windows, suite, recipe
        self._sites, self._names = sites_of(recipe), site_names(recipe)
        self._of_saes = hooked_sites(recipe.hook_points)

    def step(self, most: int, number: int) -> int:
        """One step of every SAE, the run's `number`-th, on the rows of conversations that hold `training.batch_size`
        tokens or a few more; of these rows the first `most`, if they are more. A step is exact for any activation: its
        rows are reconstructed, and spliced, with the same weights and selected together.

        Returns:
            The rows; 0 when the corpus is used up.

        Raises:
            ResourceError: the model's passes do not fit the device.
            TrainingError: too many non-finite rows.
        """
        rows = 0
        while not rows:
            conversations = self._windows.conversations(self._recipe.training.batch_size)
            if not conversations:
                return 0
            with memory_errors_named("a step inside the model", _LESS_MEMORY):
                block = self.block(conversations, most)
            rows = sum(len(place_B) for place_B in block.kept)
        saes = {sae_id: partial(block.divergence, self._lm, site) for sae_id, site in self._of_saes.items()}
        self._suite.step(block.rows, number, saes)
        return rows

    def block(self, conversations: Sequence[Drawn], most: int) -> Block:
        """Run conversations as they are; which of their rows are trained is decided among them alone."""
        lm, token_ids = self._lm, [one.token_ids for one in conversations]
        lengths, pad_id = [len(ids) for ids in token_ids], lm.tokenizer.pad_token_id or 0
        batches = make_batches(lengths, token_ids, self._recipe.corpus.batch_tokens, pad_id, lm.device)
        passes = [clean_pass(lm, batch, self._sites) for batch in batches]
        real = [_real(batch) for batch in batches]  # on the host: shapes that depend on it wait for no device
        norms = {site: torch.cat(list(map(_norms, passes, real, repeat(site)))) for site in self._sites}
        in_order = [conversations[member] for batch in batches for member in batch.members]
        keep_R, left_out = kept_rows(in_order, norms, self._recipe.activations, self._names)
        self._windows.leave_out(left_out)
        keep_R &= keep_R.cumsum(0) <= most
        sizes, kept = [sum(batch.lengths_C) for batch in batches], []
        for real_CT, own_R in zip(real, torch.split(keep_R, sizes), strict=True):
            place_B = real_CT.flatten().nonzero().squeeze(1)[own_R]
            kept.append(place_B.to(lm.device, non_blocking=True))
        rows = {
            site: torch.cat(
                [clean.recording.rows[site].flatten(0, 1)[place_B] for clean, place_B in zip(passes, kept, strict=True)]
            )
            for site in self._sites
        }
        return Block(passes, kept, rows)


def _real(batch: Batch) -> Tensor:
    """Which positions hold tokens, bool [C, T], on the CPU."""
    return torch.arange(batch.input_ids_CT.shape[1]) < torch.tensor(batch.lengths_C)[:, None]


def _norms(clean: CleanPass, real_CT: Tensor, site: Site) -> Tensor:
    """Of all tokens' rows, on the CPU."""
    norm_CT: Tensor = torch.linalg.vector_norm(clean.recording.rows[site].float(), dim=-1)
    return norm_CT.cpu()[real_CT]
