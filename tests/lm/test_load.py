"""Loading: the right layers, from the right bytes, or one line that says what is wrong."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from by_layer import residual_streams
from lm.conftest import Checkpoint
from lm.tiny_models import FAMILIES, LAYERS
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from qwenscope.errors import ModelError
from qwenscope.lm import load
from qwenscope.lm.forward import final_norm, unembedding
from qwenscope.lm.load import check_eight_bits, check_hook_points, layer_kinds, load_config, load_language_model
from qwenscope.recipe import HookPoint, LMRecipe

IDS = torch.randint(0, 96, (2, 20), generator=torch.Generator().manual_seed(0))
QWEN_KINDS = ("deltanet", "deltanet", "deltanet", "attention") * 2
KINDS = {"text": QWEN_KINDS, "multimodal": QWEN_KINDS}


def point(layer: int, kind: Any) -> HookPoint:
    return HookPoint(layer=layer, kind=kind, dict_size=64, k=4, lr=1e-3)


def copy_of(checkpoint: Checkpoint, target: Path) -> Path:
    return Path(shutil.copytree(checkpoint("text")[0], target / "model"))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lm_head", [False, True])
@pytest.mark.parametrize("last_layer", [0, 2, None])
def test_hidden_states_are_the_full_models(
    checkpoint: Checkpoint, family: str, lm_head: bool, last_layer: int | None
) -> None:
    folder, full = checkpoint(family)
    lm = load_language_model(LMRecipe(model=str(folder)), last_layer=last_layer, lm_head=lm_head)
    built = len(lm.layer_kinds) if last_layer is None else last_layer + 1
    assert len(lm.layers) == built
    assert lm.truncated == (last_layer is not None)
    assert lm.layer_kinds == KINDS.get(family, ("attention",) * 4)
    assert (lm.hidden_dim, lm.dtype, lm.device) == (32, torch.float32, torch.device("cpu"))
    assert not lm.model.training
    assert not any(parameter.requires_grad for parameter in lm.model.parameters())
    with torch.no_grad():
        hidden = full(input_ids=IDS, output_hidden_states=True, use_cache=False).hidden_states
    streams = residual_streams(lm, IDS, range(built))
    for layer in range(min(built, len(hidden) - 2)):  # the last of hidden_states has passed the final norm
        assert torch.equal(streams[layer], hidden[layer + 1])
    if last_layer is None:
        assert torch.equal(final_norm(lm)(streams[built - 1]), hidden[-1])
    if lm_head:
        assert torch.equal(unembedding(lm), full.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["text", "multimodal"])
def test_reads_the_needed_tensors_and_no_other(
    checkpoint: Checkpoint, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted at the file: which keys are materialised, how many bytes they hold, which shards are opened."""
    folder, _ = checkpoint(family)
    read: Counter[str] = Counter()
    opened: set[str] = set()

    class CountingSlice:
        def __init__(self, key: str, inner: Any) -> None:
            self.key, self.inner = key, inner

        def __getitem__(self, index: Any) -> torch.Tensor:
            tensor: torch.Tensor = self.inner[index]
            read[self.key] += tensor.nbytes
            return tensor

        def __getattr__(self, name: str) -> Any:
            return getattr(self.inner, name)

    class CountingFile:
        def __init__(self, path: Path, framework: str) -> None:
            opened.add(Path(path).name)
            self.inner: Any = safe_open(path, framework=framework)

        def keys(self) -> list[str]:
            return list(self.inner.keys())

        def get_slice(self, key: str) -> CountingSlice:
            return CountingSlice(key, self.inner.get_slice(key))

    monkeypatch.setattr(load, "safe_open", CountingFile)
    load_language_model(LMRecipe(model=str(folder)), last_layer=2)

    prefix = "model.language_model." if family == "multimodal" else "model."
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    wanted = tuple(prefix + part for part in ("embed_tokens.", "norm.", "layers.0.", "layers.1.", "layers.2."))
    assert dict(read) == {key: tensor.nbytes for key, tensor in tensors.items() if key.startswith(wanted)}
    assert sum(read.values()) < 0.5 * sum(tensor.nbytes for tensor in tensors.values())
    shard_of = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert opened == {file for key, file in shard_of.items() if key in read}
    assert len(opened) < len(set(shard_of.values()))


@pytest.mark.parametrize("family", ["text", "multimodal"])
def test_skipped_shards_need_not_exist(checkpoint: Checkpoint, family: str, tmp_path: Path) -> None:
    folder, _ = checkpoint(family)
    want = load_language_model(LMRecipe(model=str(folder)), last_layer=2)
    partial = tmp_path / "partial"
    shutil.copytree(folder, partial)
    shard_of = json.loads((partial / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {
        file
        for key, file in shard_of.items()
        if not any(part in key for part in ("lm_head", "visual", *(f"layers.{i}." for i in range(3, LAYERS))))
    }
    for file in set(shard_of.values()) - needed:
        (partial / file).unlink()
    lm = load_language_model(LMRecipe(model=str(partial)), last_layer=2)
    assert lm.digest(2) == want.digest(2)
    assert torch.equal(residual_streams(lm, IDS, [2])[2], residual_streams(want, IDS, [2])[2])
    with pytest.raises(ModelError, match=r"lacks the weights file model-\d+-of-\d+\.safetensors"):
        load_language_model(LMRecipe(model=str(partial)))


def test_fused_single_file_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The Hub's layout of the published model: experts in one tensor per layer; here also without an index."""
    folder, full = checkpoint("text")
    for file in folder.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, tmp_path)
    state = {key: value.contiguous() for key, value in full.state_dict().items()}
    assert any(key.endswith("experts.gate_up_proj") for key in state)
    state["mtp.layers.0.weight"] = torch.zeros(3)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    lm = load_language_model(LMRecipe(model=str(tmp_path)), last_layer=5)
    want = load_language_model(LMRecipe(model=str(folder)), last_layer=5)
    assert torch.equal(residual_streams(lm, IDS, [5])[5], residual_streams(want, IDS, [5])[5])


def test_dtype_is_the_recipes(checkpoint: Checkpoint) -> None:
    folder, _ = checkpoint("text")
    lm = load_language_model(LMRecipe(model=str(folder), dtype="bfloat16"), last_layer=3)
    assert lm.dtype == torch.bfloat16
    assert residual_streams(lm, IDS, [3])[3].dtype == torch.bfloat16


def test_generation_settings_come_along(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    settings = {"eos_token_id": [5, 7], "temperature": 0.6, "do_sample": True}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    generation: Any = load_language_model(LMRecipe(model=str(folder)), lm_head=True).model.generation_config
    assert {key: getattr(generation, key) for key in settings} == settings


def test_fp8_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Block-scaled FP8 weights come out as their products with the scales; without accelerate, an error says so."""
    folder, _ = checkpoint("text")
    tensors = {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}
    for file in folder.iterdir():
        if ".safetensors" not in file.name:
            shutil.copy(file, tmp_path)
    stored, exact, block = dict(tensors), dict(tensors), 16
    for key, weight in tensors.items():
        if key.endswith("_proj.weight"):
            tiles = weight.view(weight.shape[0] // block, block, weight.shape[1] // block, block)
            scale = tiles.abs().amax((1, 3)) / 448
            small = (tiles / scale[:, None, :, None]).to(torch.float8_e4m3fn)
            stored |= {key: small.view(weight.shape), f"{key}_scale_inv": scale}
            exact[key] = (small.float() * scale[:, None, :, None]).view(weight.shape)
    save_file(exact, tmp_path / "model.safetensors", {"format": "pt"})
    want = load_language_model(LMRecipe(model=str(tmp_path)), last_layer=5)

    save_file(stored, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    plain = [key.removesuffix(".weight") for key in tensors if f"{key}_scale_inv" not in stored]
    config["quantization_config"] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "weight_block_size": [block, block],
        "modules_to_not_convert": plain,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    lm = LMRecipe(model=str(tmp_path), dtype="float32", device="cpu")
    if find_spec("accelerate") is None:
        with pytest.raises(ModelError, match="requires accelerate"):
            load_language_model(lm, last_layer=5)
    else:
        got = load_language_model(lm, last_layer=5)
        assert torch.equal(residual_streams(got, IDS, [5])[5], residual_streams(want, IDS, [5])[5])


def test_fp8_on_a_gpu_is_refused_before_anything_is_read() -> None:
    """Where its products would be fetched while it runs; an older GPU multiplies the weights out."""
    if find_spec("kernels") is not None:
        pytest.skip("the package that fetches them is here")
    config = LlamaConfig(quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match=r"some/model is in FP8.*pip install kernels"):
        check_eight_bits("some/model", config, (9, 0))
    check_eight_bits("some/model", config, (8, 0))
    check_eight_bits("some/model", LlamaConfig(), (9, 0))


@pytest.fixture
def hub(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A Hub that knows one repository: copies what a download's patterns match, and lists it."""
    folder, _ = checkpoint("multimodal")
    snapshot = tmp_path / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    fetched: list[str] = []

    def download(repo: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        assert (repo, revision) in [("org/tiny", "main"), ("org/tiny", "0123abc")]
        for file in {file for pattern in allow_patterns for file in folder.glob(pattern)}:
            shutil.copy(file, snapshot)
            fetched.append(file.name)
        return str(snapshot)

    monkeypatch.setattr(load, "snapshot_download", download)
    return folder, fetched


def test_hub_model_fetches_the_needed_shards(hub: tuple[Path, list[str]]) -> None:
    folder, fetched = hub
    lm = load_language_model(LMRecipe(model="org/tiny", revision="main"), last_layer=2)
    assert (lm.name, lm.revision) == ("org/tiny", "0123abc")
    shards = {file for file in fetched if file.endswith(".safetensors")}
    assert 0 < len(shards) < len(list(folder.glob("*.safetensors"))) / 2
    want = load_language_model(LMRecipe(model=str(folder)), last_layer=2)
    assert torch.equal(residual_streams(lm, IDS, [2])[2], residual_streams(want, IDS, [2])[2])


def test_config_needs_no_weights(hub: tuple[Path, list[str]]) -> None:
    config = load_config(LMRecipe(model="org/tiny", revision="main"))
    assert layer_kinds(config) == QWEN_KINDS
    assert not any(file.endswith(".safetensors") for file in hub[1])


@pytest.mark.parametrize("name", ["no/such-model", "not a repository id", "no-such-folder/at/all"])
def test_unknown_model_is_named(name: str) -> None:
    with pytest.raises(ModelError, match=f"lm.model {name} is neither a folder nor to be had from the Hub"):
        load_language_model(LMRecipe(model=name))


@pytest.mark.parametrize(
    ("layer", "kind", "message"),
    [
        (3, "deltanet", "hook_points.sae_x.kind is deltanet; layer 3 is of kind attention"),
        (2, "attention", "hook_points.sae_x.kind is attention; layer 2 is of kind deltanet"),
        (8, None, "hook_points.sae_x.layer is 8; the model has layers 0 to 7"),
    ],
)
def test_wrong_hook_point_is_named(checkpoint: Checkpoint, layer: int, kind: Any, message: str) -> None:
    lm = load_language_model(LMRecipe(model=str(checkpoint("text")[0])), last_layer=0)
    check_hook_points(lm, {"sae_a": point(3, "attention"), "sae_b": point(6, "deltanet"), "sae_c": point(3, None)})
    with pytest.raises(ModelError, match=message):
        check_hook_points(lm, {"sae_ok": point(0, "deltanet"), "sae_x": point(layer, kind)})


def test_kind_of_a_model_without_kinds_is_refused() -> None:
    check_hook_points((None, None), {"sae_x": point(1, None)})
    with pytest.raises(ModelError, match=r"hook_points\.sae_x\.kind is attention; this model's layers have no kinds"):
        check_hook_points((None, None), {"sae_x": point(1, "attention")})


def test_layer_beyond_the_model(checkpoint: Checkpoint) -> None:
    with pytest.raises(ModelError, match=r"has layers 0 to 7; there is no layer 8"):
        load_language_model(LMRecipe(model=str(checkpoint("text")[0])), last_layer=8)


def test_damaged_shard_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    shard = sorted(folder.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ModelError, match=f"{shard} is damaged"):
        load_language_model(LMRecipe(model=str(folder)))


def test_missing_tensor_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    for shard in folder.glob("*.safetensors"):
        tensors = {
            key: tensor for key, tensor in load_file(shard).items() if not key.endswith("layers.1.linear_attn.A_log")
        }
        save_file(tensors, shard, {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.linear_attn\.A_log is missing from the weights"):
        load_language_model(LMRecipe(model=str(folder)))


def test_tensor_of_another_shape(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    with pytest.raises(ModelError, match=r"\.weight is of shape \[.*32\] in the weights and of \[.*64\] by the config"):
        load_language_model(LMRecipe(model=str(folder)))


def test_an_adapter_beside_a_model_is_named(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(ModelError, match=r"holds an adapter .* merge it into the weights"):
        load_language_model(LMRecipe(model=str(folder)))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("config.json", "{"),
        ("config.json", '{"model_type": "no-such-family"}'),
        ("config.json", '{"model_type": "custom", "auto_map": {"AutoConfig": "code.Custom"}}'),
        ("tokenizer.json", "{"),
    ],
)
def test_broken_files_are_one_line(checkpoint: Checkpoint, tmp_path: Path, file: str, text: str) -> None:
    folder = copy_of(checkpoint, tmp_path)
    (folder / file).write_text(text)
    with pytest.raises(ModelError, match=f"{folder} cannot be loaded") as caught:
        load_language_model(LMRecipe(model=str(folder)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"model.norm.weight": 3}}'])
def test_broken_index_is_named(checkpoint: Checkpoint, tmp_path: Path, text: str) -> None:
    folder = copy_of(checkpoint, tmp_path)
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=r"model\.safetensors\.index\.json is no index"):
        load_language_model(LMRecipe(model=str(folder)))


def test_index_cannot_lead_outside(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = copy_of(checkpoint, tmp_path)
    save_file({"model.embed_tokens.weight": torch.zeros(96, 32)}, tmp_path / "outside.safetensors")
    index = {"weight_map": {"model.embed_tokens.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks the weights file outside\.safetensors"):
        load_language_model(LMRecipe(model=str(folder)))


@pytest.mark.parametrize("device", ["warp", "cuda:99"])
def test_unknown_device(checkpoint: Checkpoint, device: str) -> None:
    with pytest.raises(ModelError, match=rf"lm\.device.*{device}"):
        load_language_model(LMRecipe(model=str(checkpoint("text")[0]), device=device))


def test_digest_tells_weights_apart(checkpoint: Checkpoint) -> None:
    lm = load_language_model(LMRecipe(model=str(checkpoint("text")[0])), last_layer=3)
    whole = load_language_model(LMRecipe(model=str(checkpoint("text")[0])), lm_head=True)
    assert lm.digest(3) == whole.digest(3) != whole.digest(4)
    for parameter in (lm.model.get_input_embeddings().weight, *lm.layers[3].parameters()):
        before = lm.digest(3)
        parameter.data.view(-1)[len(parameter.view(-1)) // 3] += 0.5  # a single value, wherever it stands
        assert lm.digest(3) != before
    before = whole.digest()
    whole.model.config.rms_norm_eps *= 2
    assert whole.digest() != before
