"""The closing phase against dense autograd through the whole model, and runs with it: bits, resume, refusals."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_run import BATCH, STEPS, final_hashes, metrics, running, tiny_recipe
from torch import Tensor

from qwenscope.activations.harvest import harvest
from qwenscope.activations.source import Drawn
from qwenscope.corpus.conversation import ROLES
from qwenscope.errors import RecipeError
from qwenscope.lm.load import load_language_model
from qwenscope.lm.model import LanguageModel
from qwenscope.lm.sites import Site, module_at, width_at
from qwenscope.planning.plan import plan
from qwenscope.recipe import Recipe, load_recipe
from qwenscope.sae.activation import described
from qwenscope.sae.sae import SAE
from qwenscope.training import checkpoint
from qwenscope.training.closing import Block, ClosingPhase, check_closing, kl_of
from qwenscope.training.gradients import DOWNSTREAM_SIZE
from qwenscope.training.run import train
from qwenscope.training.telemetry import Progress
from qwenscope.training.trainer import SAETrainer

LENGTHS = (9, 30, 2, 17, 1, 25)
SHARE = 0.3
BOUNDARY = STEPS * BATCH - 10 - round(SHARE * (STEPS * BATCH - 10))


@pytest.fixture(scope="module")
def lm(model: Path) -> LanguageModel:
    """The tiny model in float64."""
    loaded = load_language_model(tiny_recipe(model).lm, lm_head=True)
    loaded.model.double()
    loaded.model.config._experts_implementation = "eager"  # the other has no float64
    return replace(loaded, dtype=torch.float64)


def conversations() -> list[Drawn]:
    random = np.random.default_rng(2)
    drawn = [
        Drawn(str(c), random.integers(5, 500, n).astype(np.int32), random.integers(0, len(ROLES), n).astype(np.uint8))
        for c, n in enumerate(LENGTHS)
    ]
    drawn[3].token_ids[:9] = drawn[1].token_ids[:9]  # a repeated beginning
    return drawn


class Counted:
    """In place of windows: what a block says was left out."""

    def __init__(self) -> None:
        self.left_out: dict[str, int] = {}

    def leave_out(self, left_out: dict[str, int]) -> None:
        self.left_out = left_out


def recipe_of(model: Path, *sites: str) -> Recipe:
    points = {f"at_{n}": {"site": site, "dict_size": 64, "k": 4, "lr": 1e-3} for n, site in enumerate(sites)}
    rules = {"skip_first_position": True, "skip_roles": ["template"], "skip_repeated": True, "outlier_factor": 1.3}
    return tiny_recipe(
        model, hook_points=points, activations={"window_tokens": 1000, **rules}, corpus__batch_tokens=128
    )


def block_of(lm: LanguageModel, recipe: Recipe, most: int = 1000) -> tuple[Block, dict[str, int]]:
    counted: Any = Counted()
    phase = ClosingPhase(lm, counted, suite=None, recipe=recipe)  # type: ignore[arg-type] - no step is made
    return phase.block(conversations(), most), counted.left_out


def dense_kl(lm: LanguageModel, site: Site, block: Block, x_hat_BD: Tensor) -> Tensor:
    """Every conversation alone through the model's own forward, with a hook written by hand; float64 throughout."""
    taken, total = 0, x_hat_BD.new_zeros(())
    module, entering = module_at(lm, site), site.part in ("heads", "mid", "mlp_in")
    for clean, place_B in zip(block.passes, block.kept, strict=True):
        kept_CT = torch.zeros_like(clean.real_CT).flatten().index_fill_(0, place_B, True).view_as(clean.real_CT)
        for row, length in enumerate(clean.batch.lengths_C):
            ids = clean.batch.input_ids_CT[row : row + 1, :length]
            kept_T = kept_CT[row, :length]
            own_RD = x_hat_BD[taken : taken + int(kept_T.sum())]
            taken += len(own_RD)

            def put(x_1TD: Tensor, kept_T: Tensor = kept_T, own_RD: Tensor = own_RD) -> Tensor:
                places = kept_T.nonzero().squeeze(1)
                return x_1TD.index_copy(1, places, own_RD[None])

            def hook(_module: Any, inputs: Any, output: Any = None, put: Callable[[Tensor], Tensor] = put) -> Any:
                value = inputs if entering else output
                return (put(value[0]), *value[1:]) if isinstance(value, tuple) else put(value)

            with torch.enable_grad():
                p = lm.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                register = module.register_forward_pre_hook if entering else module.register_forward_hook
                handle = register(hook)
                q = lm.model(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
                handle.remove()
                total = total + (p.exp() * (p - q))[:-1].sum()
    return total / len(x_hat_BD)


@pytest.mark.parametrize("where", ["layers.0", "layers.3", "layers.1.mlp", "layers.2.mixer_out", "layers.1.heads"])
def test_kl_and_its_gradient_are_those_of_dense_autograd_through_the_whole_model(
    lm: LanguageModel, model: Path, where: str
) -> None:
    site = Site(where)
    block, left_out = block_of(lm, recipe_of(model, where))
    assert len(block.passes) > 1
    assert left_out["role"] > 0
    assert left_out["repeated"] > 0
    assert left_out["outlier"] > 0
    x_BD = block.rows[site]
    assert x_BD.shape == (sum(LENGTHS) - sum(left_out.values()), width_at(lm, site))
    noise = torch.randn(x_BD.shape, generator=torch.Generator().manual_seed(0), dtype=x_BD.dtype)
    x_hat_BD = x_BD + 0.3 * x_BD.std() * noise
    kl, gradient_BD = block.divergence(lm, site, x_hat_BD)
    leaf_BD = x_hat_BD.clone().requires_grad_()
    expected = dense_kl(lm, site, block, leaf_BD)
    expected_BD = torch.autograd.grad(expected, leaf_BD)[0]
    assert float(expected) > 1e-3
    assert float(kl) == pytest.approx(float(expected), rel=1e-4)  # logits are float32 here
    assert float((gradient_BD - expected_BD).norm() / expected_BD.norm()) < 1e-5


def test_a_perfect_reconstruction_has_no_kl(lm: LanguageModel, model: Path) -> None:
    block, _ = block_of(lm, recipe_of(model, "layers.1"))
    kl, gradient_BD = block.divergence(lm, Site("layers.1"), block.rows[Site("layers.1")])
    assert abs(float(kl)) < 1e-9
    assert float(gradient_BD.norm()) < 1e-6


def test_chunks_of_logits_change_nothing(lm: LanguageModel) -> None:
    generator = torch.Generator().manual_seed(1)
    clean_PD, hidden_PD = (torch.randn(23, 32, generator=generator, dtype=torch.float64) for _ in range(2))
    whole, whole_PD = kl_of(lm, clean_PD, hidden_PD, chunk=100)
    parts, parts_PD = kl_of(lm, clean_PD, hidden_PD, chunk=5)
    assert float(parts) == pytest.approx(float(whole), rel=1e-6)
    assert torch.allclose(parts_PD, whole_PD, rtol=1e-5, atol=1e-8)


def test_the_rows_are_those_that_a_harvest_keeps_and_no_more_than_were_asked_for(model: Path) -> None:
    lm = load_language_model(tiny_recipe(model).lm, lm_head=True)
    recipe = recipe_of(model, "layers.1", "layers.3.mlp")
    sites = [Site("layers.1"), Site("layers.3.mlp")]
    block, left_out = block_of(lm, recipe)
    in_order = [conversations()[member] for clean in block.passes for member in clean.batch.members]
    expected = harvest(lm, in_order, sites, recipe.activations, 1000)
    assert left_out == expected.left_out
    for site in sites:
        assert torch.allclose(block.rows[site], expected.rows[site], rtol=1e-4, atol=1e-5)
    few, _ = block_of(lm, recipe, most=7)
    assert torch.equal(few.rows[sites[0]], block.rows[sites[0]][:7])


# -- the step ---------------------------------------------------------------------------------------------------------


def further(mix_DM: Tensor, x_hat_BD: Tensor) -> Tensor:
    """Something smooth that is no function of the error."""
    return (x_hat_BD @ mix_DM).cosh().log().mean() + 0.1 * x_hat_BD[1:].mul(x_hat_BD[:-1]).mean()


def told(mix_DM: Tensor, x_hat_BD: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        leaf_BD = x_hat_BD.detach().requires_grad_()
        loss = further(mix_DM, leaf_BD)
        return loss.detach(), torch.autograd.grad(loss, leaf_BD)[0]


@pytest.mark.parametrize("prefixes", [(), (10, 30)])
@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_a_step_is_one_of_dense_autograd_on_error_and_scaled_kl(
    activation: str, normalise: bool, prefixes: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(4)
    hidden, latents, k, lr = 12, 50, 4, 1e-2
    sae = SAE(hidden, latents, k, activation, seed=1).double()
    assert described(activation) is not None
    rows_RD = 3 + 2 * torch.randn(200, hidden, generator=generator, dtype=torch.float64)
    mix_DM = torch.randn(hidden, 5, generator=generator, dtype=torch.float64) / hidden
    trainer = SAETrainer(sae, lr, precision="fp32", normalise=normalise, clip_norm=None, prefixes=prefixes)
    trainer.calibrate(rows_RD)
    x_BD = rows_RD[:40]
    p = {name: value.clone().requires_grad_() for name, value in trainer.weights.parameters.items()}
    centre_D, rms = trainer.centre_D.clone(), trainer.rms.clone()
    seen = trainer.step(x_BD, partial(told, mix_DM))

    y_BD = (x_BD - centre_D) / rms
    pre_BN = (y_BD - p["pre_bias"]) @ p["encoder"].T + p["encoder_bias"]
    kept = pre_BN.relu()
    if activation == "topk":
        mask_BN = torch.zeros_like(kept).scatter(1, kept.topk(k, dim=1).indices, 1.0)
    else:
        mask_BN = (kept >= kept.flatten().topk(k * len(x_BD)).values[-1]).double()
    codes_BN = kept * mask_BN
    y_hats = [codes_BN[:, :end] @ p["decoder"][:end] + p["pre_bias"] for end in (*prefixes, latents)]
    error = sum(((y_hat - y_BD).square().sum() for y_hat in y_hats), start=torch.zeros(())) / (
        (y_BD - y_BD.mean(0)).square().sum()
    )
    kl = further(mix_DM, centre_D + rms * y_hats[-1])
    (error + DOWNSTREAM_SIZE * (error / kl).detach() * kl).backward()
    assert seen.kl is not None
    assert float(seen.kl) == pytest.approx(float(kl), rel=1e-12)
    assert float(seen.loss) == pytest.approx(float(error), rel=1e-12)
    along = (p["decoder"].grad * p["decoder"].detach()).sum(1, keepdim=True)
    p["decoder"].grad -= along * p["decoder"].detach()
    for name, value in p.items():
        found = trainer.weights.means[name] / 0.1
        assert float((found - value.grad).norm() / value.grad.norm()) < 1e-10, name
    norm = torch.stack([value.grad.norm() for value in p.values()]).norm()
    assert float(seen.grad_norm) == pytest.approx(float(norm), rel=1e-10)


def test_the_norm_is_bounded_with_the_kl_in_it() -> None:
    """A bound that forgot it would let a gradient through unclipped."""
    rows_RD = torch.randn(100, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    trainer = SAETrainer(SAE(8, 20, 2, "topk", seed=0).double(), 1e-3, precision="fp32", clip_norm=1e-3)
    trainer.calibrate(rows_RD)
    seen = trainer.step(rows_RD, lambda x: (x.new_tensor(1.0), torch.full_like(x, 50.0)))
    clipped = torch.stack([(mean / 0.1).norm() for mean in trainer.weights.means.values()]).norm()
    assert float(seen.grad_norm) > 1
    assert float(clipped) == pytest.approx(1e-3, rel=1e-9)


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Progress]]:
    folder, seen = tmp_path_factory.mktemp("out") / "run", []
    train(tiny_recipe(model, training__kl_share=SHARE), folder, on_progress=seen.append)
    return folder, seen


def test_a_run_is_another_ones_up_to_the_phase_and_ends_with_as_many_tokens(
    run: tuple[Path, list[Progress]], model: Path, tmp_path: Path
) -> None:
    train(tiny_recipe(model), tmp_path / "plain")
    plain, closing = metrics(tmp_path / "plain"), metrics(run[0])
    before = [record for record in closing if record["tokens"] < BOUNDARY]
    assert before == plain[: len(before)]
    assert plain[-1]["tokens"] == closing[-1]["tokens"] == STEPS * BATCH - 10
    assert not any("kl" in sae for record in plain for sae in record["saes"].values())
    for record in closing:
        for sae in record["saes"].values():
            assert (sae.get("kl", 0) > 0) == (record["tokens"] > BOUNDARY)
    assert final_hashes(run[0]) != final_hashes(tmp_path / "plain")
    phases = list(dict.fromkeys(progress.phase for progress in run[1]))
    assert phases == ["loading model", "calibrating", "training", "closing", "saving", "complete"]


def test_a_run_killed_in_the_phase_and_at_its_beginning_ends_in_the_same_bits(
    run: tuple[Path, list[Progress]], model: Path, tmp_path: Path
) -> None:
    recipe = tiny_recipe(model, training__kl_share=SHARE, checkpoint__every_tokens=1, checkpoint__keep=100)
    folder = tmp_path / "killed"
    with running(recipe, folder, resume=False) as child:
        closing = 0
        for phase, _ in child.progress():
            closing += phase == "closing"
            if closing == 3:  # four steps in, of which two are saved: a save waits for the one before it
                break
        child.process.kill()
        child.process.join()
    assert "complete" not in (folder / "status.json").read_text()
    saved = {
        path: checkpoint.load(path).state["tokens"] for path in checkpoint.list_checkpoints(folder / "checkpoints")
    }
    assert BOUNDARY in saved.values()
    assert max(saved.values()) > BOUNDARY
    at_beginning = tmp_path / "beginning"
    shutil.copytree(folder, at_beginning)
    for path, tokens in saved.items():
        if tokens > BOUNDARY:
            shutil.rmtree(at_beginning / "checkpoints" / path.name)
    for resumed in (folder, at_beginning):
        train(recipe, resumed, resume=True)
        assert final_hashes(resumed) == final_hashes(run[0])
        assert metrics(resumed) == metrics(run[0])


def test_a_run_may_be_all_closing_phase(model: Path, tmp_path: Path) -> None:
    train(tiny_recipe(model, training__kl_share=1, training__tokens=600, training__warmup_steps=0), tmp_path / "run")
    records = metrics(tmp_path / "run")
    assert records[-1]["tokens"] == 600
    assert all("kl" in sae for record in records for sae in record["saes"].values())


DIFFERENCE = {"only": {"site": "layers.1.diff", "dict_size": 64, "k": 2, "lr": 1e-3}}


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        (
            {"hook_points": DIFFERENCE, "lm__model_b": "other"},
            1,
            r"hook_points\.only reads a difference.*kl_share to 0",
        ),
        ({"lm__backend": "vllm"}, 1, r"kl_share 0\.3 needs gradients.*set backend to transformers"),
        ({}, 2, r"kl_share 0\.3 works in one process, not in 2; set it to 0"),
        (
            {"training__warmup_steps": 35, "training__decay_share": 0.0},
            1,
            r"warmup_steps 35 x .*2,240.*begins at 2,143",
        ),
    ],
)
def test_what_cannot_close_is_refused_in_one_line(
    model: Path, changes: dict[str, Any], ranks: int, message: str
) -> None:
    recipe = tiny_recipe(model, training__kl_share=SHARE, **changes)
    with pytest.raises(RecipeError, match=message) as refused:
        check_closing(recipe, ranks)
    assert "\n" not in str(refused.value)
    check_closing(tiny_recipe(model, **changes), ranks)


def test_a_refused_run_leaves_no_folder(model: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="reads a difference"):
        train(
            tiny_recipe(model, training__kl_share=SHARE, hook_points=DIFFERENCE, lm__model_b=str(model)), tmp_path / "a"
        )
    assert not (tmp_path / "a").exists()


def test_a_plan_counts_the_whole_model_and_the_phase() -> None:
    share = "training.kl_share={}".format
    without, once, twice = (plan(load_recipe("standin", [share(value)])) for value in (0, 0.1, 0.2))
    standin = load_language_model(load_recipe("standin").lm, lm_head=True)
    weights = {parameter.data_ptr(): parameter.numel() for parameter in standin.model.parameters()}
    assert once["memory_bytes"]["language_model"] == 4 * sum(weights.values())
    assert without["memory_bytes"]["language_model"] < once["memory_bytes"]["language_model"]
    assert once["memory_bytes"].keys() - without["memory_bytes"].keys() == {"closing_phase"}
    assert "closing_phase" not in without["seconds_once"]
    for end in (0, 1):
        seconds = [found["seconds_once"]["closing_phase"][end] for found in (once, twice)]
        assert seconds[1] == pytest.approx(2 * seconds[0])
        harvest = once["seconds_per_step"]["language_model"][end] * 60_000 / 512
        # the rest of the clean pass, and of nine SAEs 4.35 whole passes above them, forwards and back; heads
        assert 7 * harvest < seconds[0] < 40 * harvest
    with pytest.raises(RecipeError, match="works in one process, not in 2"):
        plan(load_recipe("standin", [share(0.1)]), gpus=2)
