"""Plans: parameters and bytes are counted, ranges are ordered, and a recipe that does not fit says what would."""

from __future__ import annotations

import re
import weakref
from typing import Any

import pytest
import torch
from lm.families import tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModel, Qwen3_5MoeTextConfig

from qwenscope.costs import GPUS, find_card, position_seconds
from qwenscope.errors import ModelError, RecipeError, ResourceError
from qwenscope.lm.batches import cut
from qwenscope.lm.forward import site_rows
from qwenscope.lm.load import load_language_model
from qwenscope.parallel.owners import owners
from qwenscope.planning import measure as measuring
from qwenscope.planning.measure import Batches, Measured, batches_of, measurable, measure
from qwenscope.planning.memory import GIB, memory_needs
from qwenscope.planning.plan import model_size, plan, read_config
from qwenscope.recipe import Recipe, load_recipe

PUBLISHED = ("qwen3.5-35b-a3b", "qwen3.5-35b-a3b-normalised", "qwen3.5-35b-a3b-nested")


def measured(recipe: Recipe, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "device": "cpu",
        "capability": (0, 0),
        "fused_mixer": False,
        "lanes": 1,
        "memory_bytes": 8 * GIB,
        "process_bytes": GIB // 2,
        "product_tflops": 0.1,
        "traffic_tb_s": 0.02,
        "batches": Batches(6, (8, 700), 1.04),
        "layer_seconds": {"deltanet": 1e-5, "attention": 5e-6},
        "rest_seconds": 1e-6,
        "step_seconds": dict.fromkeys(recipe.hook_points, (4e-3, 3e-3)),
        "calibration_seconds": dict.fromkeys(recipe.hook_points, 1e-5),
        "corpus_seconds": 2e-6,
    }
    return Measured(**(values | changes))


def test_parameters_and_active_share_match_a_built_model() -> None:
    config = Qwen3_5MoeTextConfig(
        hidden_size=32, num_hidden_layers=4, vocab_size=64, num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=16, shared_expert_intermediate_size=16, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1,
        linear_num_key_heads=1, linear_num_value_heads=2, linear_key_head_dim=16, linear_value_head_dim=16,
        layer_types=["linear_attention"] * 3 + ["full_attention"],
    )  # fmt: skip
    model = AutoModel.from_config(config)
    size = model_size(config, 4)
    assert size.parameters == sum(weight.numel() for weight in model.parameters())
    experts = sum(w.numel() for name, w in model.named_parameters() if ".experts." in name)
    matrices = sum(w.numel() for name, w in model.named_parameters() if w.ndim >= 2 and "embed" not in name)
    assert size.active_parameters == matrices - experts * 3 // 4
    assert model_size(config, 3).parameters < size.parameters


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "qwen3_moe"])
def test_of_any_mixture_of_experts_the_routed_share_is_active(family: str) -> None:
    """Two of four experts, however the family names their number."""
    model = tiny(family)
    weights = {
        name: weight.numel()
        for name, weight in model.named_parameters()
        if weight.ndim >= 2 and "embed" not in name and "lm_head" not in name
    }
    experts = sum(count for name, count in weights.items() if ".experts." in name)
    assert experts
    assert model_size(model.config, 3).active_parameters == sum(weights.values()) - experts // 2


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_recipes_fit_141_gb_as_they_are_and_80_gb_as_advised(name: str) -> None:
    recipe = load_recipe(name)
    large = plan(recipe, "h200")
    assert large["fits"]
    (advice,) = large["advice"]
    assert re.search(r"window_tokens=524288 fits as well, .* into \d\d language-model batches instead of \d\d,", advice)
    larger = plan(load_recipe(name, ["activations.window_tokens=524288"]), "h200")
    assert larger["fits"]
    assert larger["advice"] == []
    assert larger["tokens_per_second"][0] > large["tokens_per_second"][0]
    assert large["model"]["parameters"] == pytest.approx(30.8e9, rel=0.01)
    assert large["model"]["flops_per_token"] == pytest.approx(4.39e9, rel=0.03)
    for gpu in ("H100", "a100"):
        small = plan(recipe, gpu)
        assert not small["fits"]
        # the recipe's own comment says so too
        assert small["advice"][1] == "fits with --set corpus.batch_tokens=8192 --set activations.overlap=false"
        assert plan(load_recipe(name, ["corpus.batch_tokens=8192", "activations.overlap=false"]), gpu)["fits"]


def test_advice_can_be_followed_or_says_that_nothing_helps() -> None:
    tight = plan(load_recipe("qwen3.5-35b-a3b", ["activations.window_tokens=300000"]), "h100")
    changes = tight["advice"][1].removeprefix("fits with ").split("--set ")[1:]
    assert len(changes) >= 2
    followed = ["activations.window_tokens=300000", *(change.strip() for change in changes)]
    assert plan(load_recipe("qwen3.5-35b-a3b", followed), "h100")["fits"]
    assert "more memory" in plan(load_recipe("qwen3.5-35b-a3b"), "4090")["advice"][-1]
    assert "lm.device=cuda:0,cuda:1" in plan(load_recipe("qwen3.5-35b-a3b"), "l40s")["advice"][-1]
    spread = load_recipe("qwen3.5-35b-a3b", ["lm.device=cuda:0,cuda:1", "corpus.batch_tokens=8192"])
    assert plan(spread, "l40s")["advice"][-1] == (
        "fits with --set activations.overlap=false --set activations.window_tokens=65536"
    )


def test_ranges_are_ordered_and_add_up() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    for gpu in GPUS:
        report = plan(recipe, gpu, 8)
        assert report["hours"][0] < report["hours"][1]
        assert report["cost_usd"][0] < report["cost_usd"][1]
        assert report["memory_total_bytes"] == sum(report["memory_bytes"].values())
        for cautious, optimistic in report["seconds_per_step"].values():
            assert cautious > optimistic or cautious == optimistic == 0
        assert report["tokens_per_second"][0] == round(4096 / report["seconds_per_step"]["step"][0])
    one, long = plan(recipe, "h200"), plan(recipe, "h200", tokens=10_000_000_000)
    for end, once in enumerate((1, 0)):
        steps, more = (
            report["hours"][end] * 3600 - sum(part[once] for part in report["seconds_once"].values())
            for report in (one, long)
        )
        assert more == pytest.approx(50 * steps, rel=0.01)


@pytest.mark.parametrize("gpus", [1, 2, 8, 64])
def test_several_cards_share_the_work_and_the_memory(gpus: int) -> None:
    recipe = load_recipe("qwen3.5-35b-a3b", ["activations.window_tokens=2097152"])
    one, many = plan(recipe, "h200", 1), plan(recipe, "h200", gpus)
    assert sorted(name for owned in many["owners"] for name in owned) == sorted(recipe.hook_points)
    whole, parts = one["seconds_per_step"], many["seconds_per_step"]
    for end in (0, 1):
        assert parts["step"][end] >= whole["step"][end] / gpus
        assert parts["step"][end] >= parts["saes_of_busiest_card"][end]
        assert parts["step"][end] <= whole["step"][end] * 1.0001
    assert many["memory_bytes"]["saes"] <= one["memory_bytes"]["saes"]
    assert one["memory_bytes"]["language_model"] == many["memory_bytes"]["language_model"] > 57 * GIB


def test_bytes_moved_are_those_of_every_row_followed_on_its_way() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    for gpus in (1, 4, 16):
        report = plan(recipe, "h200", gpus)
        sent = 0
        for row in range(recipe.training.batch_size):
            for card, owned in enumerate(report["owners"]):
                if card != row % gpus:  # harvested elsewhere
                    layers = {recipe.hook_points[name].layer for name in owned}
                    sent += len(layers) * 2048 * 2 + 9 * 4
        assert report["bytes_per_step"] == sent


def test_too_small_a_window_for_many_cards_is_said() -> None:
    report = plan(load_recipe("qwen3.5-35b-a3b"), "h200", 64)
    assert "activations.window_tokens=" in report["advice"][0]
    window = report["advice"][0].split("window_tokens=")[1].split()[0]
    fed = plan(load_recipe("qwen3.5-35b-a3b", [f"activations.window_tokens={window}"]), "h200", 64)
    assert fed["fits"]
    (advice,) = fed["advice"]  # three batches for each of 64 cards would take more
    assert advice.endswith("cards, and no larger one fits")
    assert fed["tokens_per_second"][0] > report["tokens_per_second"][0]


def test_a_plan_from_measured_times_is_their_sum() -> None:
    recipe = load_recipe("standin")
    report = plan(recipe, measured=measured(recipe))
    forward = 512 * 1.04 * (27 * 1e-5 + 9 * 5e-6 + 1e-6)  # 36 layers, one in four is attention
    corpus = 512 * 2e-6
    step = (1.1 * (forward + 9 * 4e-3) + corpus, 0.95 * (forward + 9 * 3e-3) + corpus)
    assert report["seconds_per_step"]["step"] == pytest.approx(step)
    once = report["seconds_once"]
    assert once["calibration"] == pytest.approx([1.1 * 9 * 16384 * 1e-5, 0.95 * 9 * 16384 * 1e-5])
    unused = -600_000 % 32768  # tokens of the last window that nobody trains on
    assert once["part_windows"][1] == pytest.approx((0.95 * forward + corpus) / 512 * unused)
    assert report["hours"][1] * 3600 == pytest.approx(
        600_000 / 512 * step[0] + sum(cautious for cautious, _ in once.values()), rel=0.01
    )
    assert (report["gpu"], report["cost_usd"], report["fits"]) == ("cpu", None, True)
    assert report["memory_bytes"]["process"] == GIB // 2
    flops = report["model"]["flops_per_token"]
    assert report["measured"]["lm_share"] == pytest.approx(flops / (forward / 512 / 1.04) / 0.1e12)
    named = plan(recipe, measured=measured(recipe, device="NVIDIA H200", memory_bytes=139 * GIB))
    assert named["cost_usd"] is not None
    assert named["memory_card_bytes"] == 139 * GIB
    assert "process" not in named["memory_bytes"]


@pytest.mark.parametrize(("cards", "lanes"), [(1, 2), (2, 4)])
def test_harvest_beside_the_steps_takes_the_longer_of_both_on_spare_cores_alone(cards: int, lanes: int) -> None:
    recipe = load_recipe("standin")
    in_turn = load_recipe("standin", ["activations.overlap=false"])
    few, many = (plan(recipe, gpus=cards, measured=measured(recipe, lanes=n)) for n in (lanes - 1, lanes))
    turns = plan(in_turn, gpus=cards, measured=measured(recipe, lanes=lanes))
    for parts in ("seconds_per_step", "seconds_once", "tokens_per_second"):
        assert few[parts] == turns[parts]
    seconds = many["seconds_per_step"]
    harvest = seconds["language_model"][1] / cards + seconds["exchange"][1] + seconds["corpus"][1]
    assert seconds["step"][1] == max(harvest, seconds["saes_of_busiest_card"][1]) < few["seconds_per_step"]["step"][1]
    window = recipe.activations.window_tokens / recipe.training.batch_size
    alone = many["seconds_once"]["part_windows"][1] - few["seconds_once"]["part_windows"][1]
    assert alone == pytest.approx(window * min(harvest, seconds["saes_of_busiest_card"][1]), rel=1e-3)
    assert many["memory_bytes"]["windows"] > turns["memory_bytes"]["windows"]


def test_every_kind_of_layer_and_every_sae_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "_SECONDS", 0.0)
    recipe = load_recipe("standin", ["corpus.max_length=64", "corpus.batch_tokens=256", "training.batch_size=32"])
    assert measurable(recipe)
    found = measure(recipe, read_config(recipe))
    assert found.device == "cpu"
    assert set(found.layer_seconds) == {"deltanet", "attention"}
    assert set(found.step_seconds) == set(recipe.hook_points)
    assert found.step_seconds["sae_delta_early"] == found.step_seconds["sae_attn_early"]
    for value in (
        *found.layer_seconds.values(),
        *(end for ends in found.step_seconds.values() for end in ends),
        *found.calibration_seconds.values(),
        found.product_tflops,
        found.traffic_tb_s,
    ):
        assert value > 0
    assert plan(recipe, measured=found)["tokens_per_second"][0] > 0


def test_batches_are_those_of_a_window_of_such_conversations() -> None:
    recipe = load_recipe("standin", ["activations.window_tokens=1000", "corpus.batch_tokens=1024"])
    drawn = [100, 50] * 6 + [100]  # the same ones again and again, until a window is full
    rows = [[drawn[member] for member in members] for members in cut(drawn, 1024, torch.device("cpu"))]
    found = batches_of(recipe, torch.device("cpu"), [100, 50])
    assert found.count == len(rows)
    assert found.padding == sum(len(lengths) * max(lengths) for lengths in rows) / 1000
    assert found.shape in [(len(lengths), max(lengths)) for lengths in rows]


def test_a_recipe_for_a_gpu_is_measured_only_where_one_is() -> None:
    assert measurable(load_recipe("qwen3.5-35b-a3b")) == torch.cuda.is_available()


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators made and that are still alive; `peak` is their maximum."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.alive = {weight.untyped_storage()._cdata: 0 for weight in model.parameters()}  # were there before
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return made


def test_activation_memory_is_what_a_forward_pass_holds_at_once() -> None:
    recipe = load_recipe("standin", ["corpus.batch_tokens=1024"])
    lm = load_language_model(recipe.lm, last_layer=recipe.last_layer)
    needs = memory_needs(recipe, lm.model.config, 0, owners(recipe, 1), process=0)
    with LiveBytes(lm.model) as live:
        site_rows(lm, torch.zeros(2, 512, dtype=torch.int64), recipe.sites)
    assert needs["language_model_activations"] == pytest.approx(live.peak, rel=0.1)


@pytest.mark.parametrize("text", ["abacus", "A100-SXM4-40GB", "NVIDIA GH200 480GB", "L40", "h100 or h200", "40900"])
def test_an_unknown_card_is_named_with_the_known_ones(text: str) -> None:
    with pytest.raises(RecipeError, match=rf"{text}.*h200"):
        find_card(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        *((name, name) for name in GPUS),
        ("rtx4090", "4090"),
        ("NVIDIA GeForce RTX 4090", "4090"),
        ("A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("H200-141GB", "h200"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_cards_are_known_by_the_names_that_drivers_and_people_give_them(text: str, name: str) -> None:
    assert find_card(text) == (name, GPUS[name])


def test_cards_without_grouped_products_pay_for_each_expert() -> None:
    """Of 256 experts in each of 36 layers, two products each, at 2 to 6 microseconds."""
    size = model_size(Qwen3_5MoeTextConfig(), 36)
    assert size.expert_products == 2 * 256 * 36
    for name, pays in (("h200", False), ("b200", False), ("a100", True), ("l40s", True), ("4090", True)):
        small, large = (position_seconds(size, GPUS[name], positions) for positions in (10_000, 20_000))
        read = 2 * size.parameters / (0.55e12 * GPUS[name].bandwidth_tb_s)  # at the cautious end, once a batch
        for end, (seconds, once) in enumerate(((6e-6, read), (2e-6, 0.0))):
            products = size.expert_products * seconds if pays else 0.0
            assert (small[end] - large[end]) * 20_000 == pytest.approx(once + products)


def test_fp8_is_advised_only_where_it_would_fit() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    assert "FP8" not in plan(recipe, "4090")["advice"][-1]  # 28.7 GiB of weights alone
    assert "an FP8 checkpoint (which needs the kernels package" in plan(recipe, "l40s")["advice"][-1]


def test_deltanet_without_kernels_holds_more() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b")
    config = read_config(recipe)
    fused, plain = (
        memory_needs(recipe, config, 0, owners(recipe, 1), None, fused_mixer)["language_model_activations"]
        for fused_mixer in (True, False)
    )
    assert plain / recipe.corpus.batch_tokens == pytest.approx(260e3, rel=0.05)  # bytes, traced 258 to 275 thousand
    assert fused / recipe.corpus.batch_tokens < 190e3


def test_a_device_without_room_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "_layer_seconds", full)
    recipe = load_recipe("standin")
    with pytest.raises(ResourceError, match="cpu has no room for single layers of standin; plan for another card"):
        measure(recipe, read_config(recipe))


def test_a_wrong_hook_point_is_named_before_anything_is_measured() -> None:
    with pytest.raises(ModelError, match=r"hook_points\.sae_attn_late\.kind"):
        read_config(load_recipe("standin", ["hook_points.sae_attn_late.layer=34"]))


def test_an_sae_too_wide_for_one_card_is_spread_by_advice() -> None:
    recipe = load_recipe("qwen3.5-35b-a3b", ["hook_points.sae_attn_mid.dict_size=2097152"])
    alone, cards = plan(recipe, "h200"), plan(recipe, "h200", gpus=8)
    assert not alone["fits"]
    assert not cards["fits"]
    assert "latents_per_rank" not in " ".join(alone["advice"])
    assert cards["advice"][1] == "fits with --set training.latents_per_rank=262144"
    spread = load_recipe(
        "qwen3.5-35b-a3b", ["hook_points.sae_attn_mid.dict_size=2097152", "training.latents_per_rank=262144"]
    )
    found = plan(spread, "h200", gpus=8)
    assert found["fits"]
    assert sorted(stem for stems in found["owners"] for stem in stems if "@" in stem) == sorted(
        f"sae_attn_mid@{start}-{start + 262144}" for start in range(0, 2097152, 262144)
    )
    trained = (2 * 8192 + 6 * 16384 + 2097152) * 2 * 2048 * 12
    assert found["memory_bytes"]["saes"] < 1.2 * (trained / 8) * 16 / 12
    assert (
        found["seconds_per_step"]["saes_of_busiest_card"][0] < cards["seconds_per_step"]["saes_of_busiest_card"][0] / 4
    )


def test_gpus_that_share_an_sae_hold_one_window() -> None:
    """They harvest and train in turn, so a second window is neither reckoned nor advised away."""
    changes = ["training.latents_per_rank=4096", "corpus.batch_tokens=8192"]
    shared, whole = (plan(load_recipe("qwen3.5-35b-a3b", some), "h100", gpus=4) for some in (changes, changes[1:]))
    in_turn = plan(load_recipe("qwen3.5-35b-a3b", [*changes, "activations.overlap=false"]), "h100", gpus=4)
    assert shared["memory_bytes"]["windows"] == in_turn["memory_bytes"]["windows"]
    assert not any("overlap" in line for line in shared["advice"])
    assert shared["bytes_per_step"] > whole["bytes_per_step"]
