"""SAETrainer's promises: resume to the same bits, folded normalisation, dead latents, faults, learning."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from qwenscope.errors import CheckpointError, TrainingError
from qwenscope.sae.sae import TopKSAE
from qwenscope.training.trainer import SAETrainer

HIDDEN, LATENTS, K, BATCH = 24, 128, 5, 64


def rows(count: int, seed: int, hidden: int = HIDDEN) -> Tensor:
    """Sparse mixtures with a mean and a scale, as a residual stream has."""
    generator = torch.Generator().manual_seed(1)
    mix, mean = torch.randn(60, hidden, generator=generator), torch.randn(hidden, generator=generator)
    draw = torch.randn(count, 60, generator=torch.Generator().manual_seed(seed))
    return torch.relu(draw - 1) @ mix * 3 + 2 * mean


def make_trainer(*, eight_bits: bool = False, **options: Any) -> SAETrainer:
    options = {"tokens": 100 * BATCH, "warmup_tokens": 5 * BATCH, "dead_after_tokens": 4 * BATCH, "seed": 7} | options
    trainer = SAETrainer(TopKSAE(HIDDEN, LATENTS, K, seed=2), 3e-3, **options)
    if eight_bits:  # too small an SAE to choose them
        trainer.weights.shadow("exact", eight_bits=True)
    return trainer


def same_state(a: SAETrainer, b: SAETrainer) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


OPTIONS: list[dict[str, Any]] = [
    {"precision": "fp32"},
    {"precision": "exact", "eight_bits": True, "resample_every_steps": 6},
    {"precision": "exact", "normalise": True, "initial_decoder": "rows"},
    {"precision": "bf16", "resample_every_steps": 6},
    {"precision": "fp32", "normalise": True, "resample_every_steps": 6, "moments": torch.bfloat16},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_two_runs_are_bit_identical(options: dict[str, Any]) -> None:
    trainers = [make_trainer(**options), make_trainer(**options)]
    for trainer in trainers:
        trainer.calibrate(rows(200, 3))
        for step in range(15):
            trainer.step(rows(BATCH, 10 + step))
    assert same_state(*trainers)


@pytest.mark.parametrize("options", OPTIONS)
def test_resume_is_bit_identical(options: dict[str, Any], tmp_path: Path) -> None:
    whole = make_trainer(**options)
    whole.calibrate(rows(200, 3))
    for step in range(20):
        if step == 9:
            save_file(whole.state_dict(), tmp_path / "state.safetensors")
        whole.step(rows(BATCH - step, 10 + step))
    resumed = make_trainer(**options)
    resumed.load_state_dict(load_file(tmp_path / "state.safetensors"))
    for step in range(9, 20):
        metrics = resumed.step(rows(BATCH - step, 10 + step))
    assert same_state(whole, resumed)
    assert resumed.steps == 20
    assert resumed.tokens_trained == whole.tokens_trained == sum(BATCH - step for step in range(20))
    assert bool(metrics.finite)


def test_state_of_another_trainer_is_refused_whole() -> None:
    trainer = make_trainer()
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    other = SAETrainer(TopKSAE(HIDDEN, LATENTS + 1, K, seed=2), 1e-3).state_dict()
    with pytest.raises(CheckpointError, match="129"):
        trainer.load_state_dict(dict(sorted(other.items())))
    missing = dict(before)
    del missing["decoder.square"]
    with pytest.raises(CheckpointError, match=r"decoder\.square"):
        trainer.load_state_dict(missing)
    with pytest.raises(CheckpointError, match=r"decoder\.mean.*bfloat16"):
        trainer.load_state_dict(make_trainer(moments=torch.bfloat16).state_dict())
    assert all(torch.equal(before[name], value) for name, value in trainer.state_dict().items())


def test_precision_is_recorded_and_reused() -> None:
    saved = make_trainer(precision="bf16")
    resumed = make_trainer()
    assert resumed.precision == "fp32"  # far too small for anything else to pay
    with pytest.raises(CheckpointError, match="bf16"):
        make_trainer(precision="fp32").load_state_dict(saved.state_dict())
    resumed.load_state_dict(saved.state_dict())
    assert resumed.precision == "bf16"
    saved.step(rows(BATCH, 1))
    resumed.step(rows(BATCH, 1))
    assert same_state(saved, resumed)


def test_eight_bits_are_given_up_where_they_certify_too_few_rows() -> None:
    """Nearly equal latents: no candidate stands out. From then on candidates come from bfloat16, resumed or not."""
    trainer = make_trainer(precision="exact", eight_bits=True)
    trainer.step(rows(BATCH, 1))
    assert trainer.weights.eight_bits
    trainer.weights["encoder"].copy_(trainer.weights["encoder"][:1] + 1e-4 * trainer.weights["encoder"])
    trainer.weights.refresh("encoder")
    trainer.step(rows(BATCH, 2))
    assert not trainer.weights.eight_bits
    resumed = make_trainer(precision="exact", eight_bits=True)
    resumed.load_state_dict({name: value.clone() for name, value in trainer.state_dict().items()})
    assert not resumed.weights.eight_bits
    for each in (trainer, resumed):
        each.step(rows(BATCH, 3))
    assert same_state(trainer, resumed)


def test_normalisation_is_folded() -> None:
    """The saved SAE on raw rows does what the trained one does on normalised rows."""
    trainer = make_trainer(normalise=True, precision="fp32")
    sample = rows(500, 3)
    trainer.calibrate(sample)
    torch.testing.assert_close(trainer.centre_D, sample.mean(0))
    assert float(trainer.rms) == pytest.approx(float((sample - sample.mean(0)).square().mean().sqrt()), rel=1e-5)
    for step in range(30):
        trainer.step(rows(BATCH, 10 + step))
    x = rows(256, 99)
    inner = TopKSAE(HIDDEN, LATENTS, K)
    with torch.no_grad():
        inner.encoder.weight.copy_(trainer.weights["encoder"])
        inner.encoder.bias.copy_(trainer.weights["encoder_bias"])
        inner.decoder.weight.copy_(trainer.weights["decoder"].T)
        inner.pre_bias.copy_(trainer.weights["pre_bias"])
        expected = inner((x - trainer.centre_D) / trainer.rms) * trainer.rms + trainer.centre_D
        folded = trainer.sae()
        torch.testing.assert_close(folded(x), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(folded.decoder.weight.norm(dim=0), torch.ones(LATENTS), rtol=0, atol=1e-6)
    fvu = float(((folded(x) - x).square().sum() / (x - x.mean(0)).square().sum()).detach())
    assert fvu == pytest.approx(float(trainer.step(x).fvu), rel=1e-3)


def test_normalised_training_is_scale_free() -> None:
    """x -> a x + c trains to the same FVU."""
    curves = []
    for scale, shift in ((1.0, 0.0), (50.0, 3.0)):
        trainer = make_trainer(normalise=True, precision="fp32", dead_after_tokens=10**9)
        trainer.calibrate(rows(500, 3) * scale + shift)
        curves.append([float(trainer.step(rows(BATCH, 10 + step) * scale + shift).fvu) for step in range(40)])
    torch.testing.assert_close(torch.tensor(curves[0]), torch.tensor(curves[1]), rtol=2e-3, atol=2e-3)


def test_calibration_is_the_least_squares_scale() -> None:
    trainer = make_trainer(precision="fp32")
    sample = rows(500, 3)
    trainer.calibrate(sample)
    torch.testing.assert_close(trainer.weights["pre_bias"], sample.mean(0))
    sae = trainer.sae()
    losses = {}
    for factor in (0.9, 1.0, 1.1):
        with torch.no_grad():
            sae.encoder.weight.copy_(trainer.weights["encoder"] * factor)
            losses[factor] = float((sae(sample) - sample).square().sum())
    assert losses[1.0] < min(losses[0.9], losses[1.1])


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, -1e20])
def test_calibration_refuses_rows_that_it_cannot_square(value: float, normalise: bool) -> None:
    trainer = make_trainer(normalise=normalise)
    before = {name: tensor.clone() for name, tensor in trainer.state_dict().items()}
    sample = rows(200, 3)
    sample[17, 3] = value
    with pytest.raises(TrainingError, match="calibration rows are not finite, or too large"):
        trainer.calibrate(sample)
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.state_dict().items())


@pytest.mark.parametrize("sample", [rows(1, 3), torch.ones(64, HIDDEN), torch.zeros(64, HIDDEN)])
@pytest.mark.parametrize("normalise", [False, True])
def test_calibration_on_rows_without_spread_leaves_their_scale(sample: Tensor, normalise: bool) -> None:
    trainer = make_trainer(normalise=normalise, precision="fp32")
    trainer.calibrate(sample)
    assert float(trainer.rms) == 1
    torch.testing.assert_close(trainer.sae().pre_bias, sample.mean(0))
    assert all(bool(trainer.step(rows(BATCH, 10 + step)).finite) for step in range(3))


def test_one_row_alone_has_the_fvu_of_its_distance_from_the_pre_bias() -> None:
    trainer = make_trainer(precision="fp32", aux_coefficient=0.0)
    trainer.calibrate(rows(500, 3))
    for step in range(20):
        trainer.step(rows(BATCH, 10 + step))
    sae, x = trainer.sae().double(), rows(1, 99)
    with torch.no_grad():
        wanted = (sae(x.double()) - x).square().sum() / (x - sae.pre_bias).square().sum()
    assert float(trainer.step(x).fvu) == pytest.approx(float(wanted), rel=1e-4)
    assert float(wanted) < 2


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("eight_bits", [False, True])
def test_a_non_finite_batch_changes_no_weight(bad: float, eight_bits: bool) -> None:
    precision = "exact" if eight_bits else "auto"
    trainer = make_trainer(resample_every_steps=50, precision=precision, eight_bits=eight_bits)
    for step in range(5):
        trainer.step(rows(BATCH, 10 + step))
    before = {name: value.clone() for name, value in trainer.state_dict().items()}
    x = rows(BATCH, 20)
    x[3:, 4] = bad
    metrics = trainer.step(x)
    assert not bool(metrics.finite)
    assert trainer.weights.eight_bits == eight_bits
    after = trainer.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= {"counters", "generator", "candidates", "pool.rows", "pool.loss", "pool.cursor"}
    assert bool(trainer.step(rows(BATCH, 21)).finite)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 2, 300])
def test_any_batch_size_and_dtype(dtype: torch.dtype, batch: int) -> None:
    trainer = make_trainer(normalise=True)
    trainer.calibrate(rows(200, 3).to(dtype))
    metrics = trainer.step(rows(batch, 4).to(dtype))
    assert bool(metrics.finite)
    assert all(bool(torch.isfinite(value).all()) for value in trainer.sae().state_dict().values())
    assert trainer.tokens_trained == batch


def test_impossible_batches_are_refused() -> None:
    trainer = make_trainer()
    for shape in [(0, HIDDEN), (4, HIDDEN + 1), (HIDDEN,)]:
        with pytest.raises(TrainingError, match="must be"):
            trainer.step(torch.zeros(shape))


@pytest.mark.parametrize(
    "options",
    [
        {"lr": -1.0},
        {"tokens": 0},
        {"decay_share": 1.5},
        {"aux_k": 0},
        {"dead_after_tokens": 0},
        {"precision": "fp16"},
        {"clip_norm": 0.0},
        {"moments": torch.int8},
    ],
)
def test_impossible_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(TrainingError, match=next(iter(options))):
        SAETrainer(TopKSAE(4, 8, 2, seed=0), **({"lr": 1e-3} | options))


def test_an_active_index_with_value_zero_is_not_firing() -> None:
    sae = TopKSAE(HIDDEN, LATENTS, K, seed=2)
    with torch.no_grad():
        sae.encoder.bias -= 1e4
    trainer = SAETrainer(sae, 1e-3, dead_after_tokens=2 * BATCH, precision="fp32")
    dead = [int(trainer.step(rows(BATCH, step)).dead) for step in range(4)]
    assert dead == [0, 0, LATENTS, LATENTS]


def test_aux_revives_dead_latents() -> None:
    """Latents pushed below zero come back with the auxiliary loss, and stay dead without it."""
    dead = {}
    for coefficient in (0.0, 1 / 32):
        trainer = make_trainer(aux_coefficient=coefficient, dead_after_tokens=20 * BATCH, tokens=None, precision="fp32")
        trainer.calibrate(rows(500, 3))
        trainer.weights["encoder_bias"][:40] -= 20.0
        for step in range(300):
            trainer.step(rows(BATCH, 10 + step))
        dead[coefficient] = int(trainer.ages.dead()[:40].sum())
    assert dead[0.0] == 40
    assert dead[1 / 32] < 25


def test_resampling_restarts_dead_latents_with_distinct_directions() -> None:
    sae = TopKSAE(HIDDEN, LATENTS, K, seed=2)
    with torch.no_grad():
        sae.encoder.bias[:20] -= 1e4
    trainer = SAETrainer(
        sae, 1e-3, aux_coefficient=0.0, resample_every_steps=10, dead_after_tokens=5 * BATCH, precision="fp32"
    )
    for step in range(9):
        trainer.step(rows(BATCH, 10 + step))
    assert trainer.ages.dead()[:20].all()
    trainer.step(rows(BATCH, 30).repeat(2, 1)[: BATCH * 2])
    decoder = trainer.weights["decoder"][:20]
    torch.testing.assert_close(decoder.norm(dim=1), torch.ones(20))
    assert len(torch.unique(decoder, dim=0)) == 20
    similarity = decoder @ decoder.T - torch.eye(20)
    assert similarity.abs().max() < 0.999
    lengths = trainer.weights["encoder"].norm(dim=1)
    torch.testing.assert_close(lengths[:20], lengths[0].expand(20))
    assert 0.1 < float(lengths[0] / lengths[20:].mean()) < 0.3
    assert not trainer.weights["encoder_bias"][:20].any()
    assert not trainer.weights.squares["encoder"][:20].any()
    assert not trainer.ages.dead()[:20].any()
    assert int(trainer.step(rows(BATCH, 31)).dead) < 20


def test_learning_recovers_known_features() -> None:
    """Uncorrelated features, as many latents as features: at least 90 % found with cosine above 0.9."""
    hidden, features, active, size = 64, 64, 3, 256
    generator = torch.Generator().manual_seed(1234)
    truth = torch.nn.functional.normalize(torch.randn(features, hidden, generator=generator), dim=1)

    def batch(size: int) -> Tensor:
        on = torch.rand(size, features, generator=generator) < active / features
        return (on * (0.5 + torch.rand(size, features, generator=generator))) @ truth

    sae = TopKSAE(hidden, features, active, seed=77)
    trainer = SAETrainer(
        sae, 1e-2, tokens=600 * size, warmup_tokens=20 * size, dead_after_tokens=20 * size, normalise=True
    )
    trainer.calibrate(batch(4096))
    assert float((truth @ trainer.sae().decoder.weight.detach()).max(1).values.median()) < 0.6  # no head start
    for _ in range(600):
        metrics = trainer.step(batch(size))
    cosine = (truth @ trainer.sae().decoder.weight.detach()).max(1).values
    assert float((cosine > 0.9).double().mean()) >= 0.9
    assert metrics.lr == pytest.approx(1e-2 / 120)


@pytest.fixture
def default_dtype() -> Iterator[None]:
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.usefixtures("default_dtype")
def test_the_default_dtype_changes_nothing(options: dict[str, Any], dtype: torch.dtype) -> None:
    batches = [rows(BATCH, seed) for seed in range(14)]
    states = []
    for default in (torch.float32, dtype):
        torch.set_default_dtype(default)
        trainer = make_trainer(**options)
        if options.get("normalise"):
            trainer.calibrate(batches[0])
        for x_BD in batches:
            trainer.step(x_BD)
        states.append(trainer)
    assert same_state(*states)
