"""Imports of every kind: codes and reconstructions as the other library's formula, sites, refusals, hostile files."""

from __future__ import annotations

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damage import refusal
from foreign_saes import CASES, DICT_SIZE, HIDDEN_DIM, gemma_scope, llama_scope, saelens, write_json
from safetensors.torch import load_file, save_file

from qwenscope import load_suite
from qwenscope.errors import FormatError
from qwenscope.sae.formats import export_suite, import_suite


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", CASES)
def test_codes_and_reconstructions_are_the_other_librarys(case: str, seed: int, tmp_path: Path) -> None:
    other = CASES[case](tmp_path / "there", seed)
    import_suite(other.source, other.origin, tmp_path / "out")
    (sae,) = load_suite(tmp_path / "out").values()
    x_BD = 2 * torch.randn(300, HIDDEN_DIM, generator=torch.Generator().manual_seed(100 + seed))
    codes_BN, rows_BD = other.codes(x_BD)
    ours_BN = sae.encode(x_BD).dense()
    assert torch.equal(ours_BN > 0, codes_BN > 0)
    assert 0 < (codes_BN > 0).sum() < codes_BN.numel() / 2
    torch.testing.assert_close(ours_BN.double(), codes_BN, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae(x_BD).double(), rows_BD, rtol=1e-6, atol=1e-5)
    assert other.config.items() <= sae.config.items()
    assert sae.config["imported"]["from"] == other.origin


@pytest.mark.parametrize(
    ("model", "hook", "told"),
    [
        ("gpt2", "blocks.4.hook_resid_pre", {"layer": 3}),
        ("gpt2", "blocks.4.hook_resid_post", {"layer": 4}),
        ("gpt2", "blocks.4.hook_mlp_out", {"layer": 4, "site": "layers.4.mlp"}),
        ("gpt2", "blocks.4.attn.hook_z", {"layer": 4, "site": "layers.4.heads"}),
        ("gemma-2-2b", "blocks.4.attn.hook_z", {"layer": 4, "site": "layers.4.heads"}),
        ("gpt2", "blocks.4.hook_resid_mid", {"layer": 4, "site": "layers.4.mid"}),
        ("qwen3", "blocks.4.mlp.hook_in", {"layer": 4, "site": "layers.4.mlp_in"}),
        ("gemma-3", "model.layers.4.pre_feedforward_layernorm.output", {"layer": 4, "site": "layers.4.mlp_in"}),
        ("gpt2", "blocks.4.hook_attn_out", {"layer": 4, "site": "layers.4.mixer"}),
        ("gemma-2-2b", "blocks.4.hook_mlp_out", {"layer": 4, "site": "layers.4.mlp_out"}),
        ("google/gemma-3-1b-pt", "blocks.4.hook_attn_out", {"layer": 4, "site": "layers.4.mixer_out"}),
        ("gpt2", "blocks.0.hook_resid_pre", {"hook_name": "blocks.0.hook_resid_pre"}),
        ("gpt2", "blocks.4.hook_mlp_in", {"hook_name": "blocks.4.hook_mlp_in"}),
    ],
)
def test_hooks_become_sites(tmp_path: Path, model: str, hook: str, told: dict[str, Any]) -> None:
    metadata = {"sae_lens_version": "6.54.12", "model_name": model, "hook_name": hook}
    saelens(tmp_path / "there", 0, "standard", metadata=metadata)
    import_suite(tmp_path / "there", "saelens", tmp_path / "out")
    (sae,) = load_suite(tmp_path / "out").values()
    assert {key: sae.config[key] for key in ("layer", "site", "hook_name") if key in sae.config} == told


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ({"architecture": "transcoder", "apply_b_dec_to_input": True}, "apply_b_dec_to_input=True cannot"),
        ({"architecture": "transcoder", "apply_b_dec_to_input": False}, "hook_name_out 'None' is no site"),
        ({"architecture": "temporal"}, "architecture 'temporal' is refused"),
        ({"normalize_activations": "covariance_whitening"}, "normalize_activations='covariance_whitening' cannot"),
        ({"normalize_activations": "layer_norm", "metadata": {}}, "one by one, and '' is no site"),
        ({"reshape_activations": "flat"}, "reshape_activations='flat' cannot"),
        ({"activation_fn": "tanh-relu"}, "activation_fn='tanh-relu' cannot"),
    ],
)
def test_what_saelens_has_beyond_a_site_is_refused_by_name(
    tmp_path: Path, config: dict[str, Any], complaint: str
) -> None:
    saelens(tmp_path / "there", 0, "standard", **config)
    refused(tmp_path, tmp_path / "there", "saelens", complaint)


def refused(tmp_path: Path, source: Path, origin: str, complaint: str) -> None:
    with pytest.raises(FormatError, match=complaint) as caught:
        import_suite(source, origin, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_scale_that_nothing_tells_is_refused(tmp_path: Path) -> None:
    saelens(tmp_path / "there", 0, "standard", normalize_activations="expected_average_only_in")
    (tmp_path / "there/activation_scaler.json").write_text('{"scaling_factor": 0}')
    refused(tmp_path, tmp_path / "there", "saelens", "scaling_factor must be a number above 0, not 0")
    (tmp_path / "there/activation_scaler.json").unlink()
    refused(tmp_path, tmp_path / "there", "saelens", "no activation_scaler.json says the factor")


def test_an_old_scaling_factor_other_than_one_is_refused(tmp_path: Path) -> None:
    saelens(tmp_path / "there", 0, "old")
    path = tmp_path / "there/sae_weights.safetensors"
    save_file(load_file(path) | {"scaling_factor": torch.full((DICT_SIZE,), 1.5)}, path)
    refused(tmp_path, tmp_path / "there", "saelens", "its scaling_factor is not 1")


@pytest.mark.parametrize(
    ("place", "complaint"),
    [
        ("gemma-scope-2-1b-it/clt/layer_5_width_16k_l0_big", "clt is refused"),
        ("gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6", "embedding is refused"),
        ("downloads/layer_5", "by the names of repository and folders only"),
    ],
)
def test_gemma_scope_tells_by_its_names(tmp_path: Path, place: str, complaint: str) -> None:
    gemma_scope(tmp_path / "there", 0, "npz")
    (path,) = (tmp_path / "there").rglob("params.npz")
    (tmp_path / "moved" / place).mkdir(parents=True)
    path = path.rename(tmp_path / "moved" / place / "params.npz")
    refused(tmp_path, tmp_path / "moved", "gemma-scope", complaint)


def test_llama_scopes_transcoders_and_other_activations_are_refused(tmp_path: Path) -> None:
    llama_scope(tmp_path / "there", 0, "R")
    (path,) = (tmp_path / "there").rglob("hyperparams.json")
    config = json.loads(path.read_text())
    write_json(path, config | {"hook_point_out": "blocks.9.hook_mlp_out"})
    refused(tmp_path, tmp_path / "there", "llama-scope", "a transcoder is refused; it predicts 'blocks.9.hook_mlp_out'")
    write_json(path, config | {"act_fn": "topk"})
    refused(tmp_path, tmp_path / "there", "llama-scope", "act_fn='topk' cannot")
    write_json(path, config | {"dataset_average_activation_norm": {}})
    refused(tmp_path, tmp_path / "there", "llama-scope", "in must be a number above 0, not None")


def npz_path(tmp_path: Path) -> Path:
    gemma_scope(tmp_path / "there", 0, "npz")
    (path,) = (tmp_path / "there").rglob("params.npz")
    return path


def test_an_npz_of_objects_is_refused_and_never_unpickled(tmp_path: Path) -> None:
    path = npz_path(tmp_path)

    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"threshold": np.array([Payload()], dtype=object)})
    refused(tmp_path, tmp_path / "there", "gemma-scope", "no whole archive of plain arrays")
    assert not (tmp_path / "executed").exists()


def rewritten(path: Path, member: str, content: bytes, compression: int = zipfile.ZIP_STORED) -> None:
    """The archive with the bytes of one member replaced."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in (members | {member: content}).items():
            archive.writestr(name, data)


def header(shape: tuple[int, ...], descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_2_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        header((1 << 60,)),
        header((1 << 40, 1 << 40)),
        b"\x93NUMPY\x02\x00\xff\xff\xff\xff{'descr': ",
        b"\x93NUMPY\x01\x00\x10\x00{'descr': [[[[[[",
        header((3,), "<U2") + b"\x00" * 24,
        header((DICT_SIZE,)) + b"\x00" * 8,
        b"",
        b"not an array",
    ],
)
def test_hostile_headers_in_an_npz_are_refused(tmp_path: Path, content: bytes) -> None:
    path = npz_path(tmp_path)
    rewritten(path, "threshold.npy", content)
    refused(tmp_path, tmp_path / "there", "gemma-scope", "params.npz")


def test_an_npz_that_unpacks_without_end_and_one_that_is_cut_are_refused(tmp_path: Path) -> None:
    path = npz_path(tmp_path)
    whole = path.read_bytes()
    rewritten(path, "more.npy", header((1 << 24,)) + b"\x00" * (1 << 26), zipfile.ZIP_DEFLATED)
    refused(tmp_path, tmp_path / "there", "gemma-scope", "unpacks to .* bytes; weights do not compress so far")
    path.write_bytes(whole[: len(whole) // 2])
    refused(tmp_path, tmp_path / "there", "gemma-scope", "no whole archive of plain arrays")
    path.write_bytes(whole)
    arrays = dict(np.load(path))
    np.savez(path, **arrays | {"W_gate": np.zeros(3, dtype=np.float32)})
    refused(tmp_path, tmp_path / "there", "gemma-scope", "tensor W_gate cannot be represented")
    np.savez(path, **arrays | {"threshold": np.full(DICT_SIZE, np.nan, dtype=np.float32)})
    refused(tmp_path, tmp_path / "there", "gemma-scope", "threshold holds 96 NaN")


@pytest.mark.parametrize("prefixes", [[], [0, DICT_SIZE], [16, 16, DICT_SIZE], [16], [True, DICT_SIZE], "16"])
def test_prefixes_that_do_not_nest_are_refused(tmp_path: Path, prefixes: Any) -> None:
    saelens(tmp_path / "there", 0, "matryoshka_batchtopk", matryoshka_widths=prefixes or [[]])
    refused(tmp_path, tmp_path / "there", "saelens", "prefixes must be whole numbers that rise to dict_size")


@pytest.mark.parametrize("origin", ["saelens", "dictionary_learning"])
def test_matryoshkas_return_to_the_bit(tmp_path: Path, origin: str) -> None:
    case = {"saelens": "saelens matryoshka", "dictionary_learning": "dictionary_learning matryoshka"}[origin]
    import_suite(CASES[case](tmp_path / "there", 0).source, origin, tmp_path / "suite")
    export_suite(tmp_path / "suite", "dictionary_learning", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("ae.pt")
    assert torch.load(path, weights_only=True)["group_sizes"].tolist() == [16, 32, 48]
    import_suite(tmp_path / "out", "dictionary_learning", tmp_path / "back")
    (before,), (after,) = load_suite(tmp_path / "suite").values(), load_suite(tmp_path / "back").values()
    assert after.config == before.config
    for name, value in before.state_dict().items():
        assert torch.equal(after.state_dict()[name], value), name


def test_a_giant_header_of_safetensors_is_refused(tmp_path: Path) -> None:
    saelens(tmp_path / "there", 0, "standard")
    (tmp_path / "there/sae_weights.safetensors").write_bytes((1 << 62).to_bytes(8, "little") + b"{" * 64)
    refused(tmp_path, tmp_path / "there", "saelens", "is not a whole safetensors file")


@pytest.mark.parametrize(
    ("norm", "site"),
    [("layer_norm", "layers.2.zscore"), ("constant_norm_rescale", "layers.2.rms"), ("none", None)],
)
def test_rows_normalised_one_by_one_are_a_site_there_and_back(norm: str, site: str | None, tmp_path: Path) -> None:
    saelens(tmp_path / "there", 0, "standard", normalize_activations=norm)
    import_suite(tmp_path / "there", "saelens", tmp_path / "suite")
    (sae,) = load_suite(tmp_path / "suite").values()
    assert (sae.config["layer"], sae.config.get("site")) == (2, site)
    export_suite(tmp_path / "suite", "saelens", tmp_path / "out")
    (path,) = (tmp_path / "out").rglob("cfg.json")
    assert json.loads(path.read_text())["normalize_activations"] == norm
    if site is not None:
        with pytest.raises(FormatError, match="dictionary_learning has no rows normalised one by one"):
            export_suite(tmp_path / "suite", "dictionary_learning", tmp_path / "no")


@pytest.mark.parametrize("case", ["saelens transcoder", "gemma-scope 2 transcoder"])
def test_transcoders_come_back_from_saelens_to_the_bit(case: str, tmp_path: Path) -> None:
    """And go to nothing else but our own layout."""
    other = CASES[case](tmp_path / "there", 1)
    import_suite(other.source, other.origin, tmp_path / "suite")
    export_suite(tmp_path / "suite", "saelens", tmp_path / "out")
    import_suite(tmp_path / "out", "saelens", tmp_path / "again")
    import_suite(tmp_path / "suite", "qwenscope", tmp_path / "copy")
    (sae,) = load_suite(tmp_path / "suite").values()
    for folder in ("again", "copy"):
        (back,) = load_suite(tmp_path / folder).values()
        assert back.config["target"] == sae.config["target"] == other.config["target"]
        assert back.state_dict().keys() == sae.state_dict().keys()
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in sae.state_dict().items())
    with pytest.raises(FormatError, match="sparsify has no transcoders"):
        export_suite(tmp_path / "suite", "sparsify", tmp_path / "no")


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("saelens matryoshka", "W_dec"),
        ("saelens gated", "b_mag"),
        ("saelens gated", "r_mag"),
        ("gemma-scope 2", "w_enc"),
        ("gemma-scope 2", "b_dec"),
    ],
)
@pytest.mark.parametrize("wrong", ["cut", "huge"])
def test_tensors_that_do_not_fit_each_other_or_float32_are_named(
    case: str, name: str, wrong: str, tmp_path: Path
) -> None:
    other = CASES[case](tmp_path / "there", 1)
    path = next(other.source.rglob("*.safetensors"))
    tensors = load_file(path)
    tensors[name] = tensors[name][:-1].clone() if wrong == "cut" else tensors[name] * 3e37
    save_file(tensors, path)
    said = refusal(lambda: import_suite(other.source, other.origin, tmp_path / "out"))
    assert (said is None and wrong == "huge") or (said and str(path) in said)
    if said is None:
        load_suite(tmp_path / "out")
    assert (tmp_path / "out").exists() == (said is None)
