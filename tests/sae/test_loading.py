"""Loading verifies: layouts that must load, damage that must be named, ids and links that must be refused."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from exact_saes import DICT_SIZE, HIDDEN_DIM, K, exact_rows, exact_sae, same
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwenscope import TopKSAE, load_suite
from qwenscope.checksums import write_checksums
from qwenscope.errors import FormatError
from qwenscope.sae.files import check_sae_id

HOSTILE_IDS = [
    "", ".", "..", "../sae_a", "sae_a/..", "sae_a/../sae_a", "../../etc/passwd", "/etc/passwd", "//etc", "/", "./sae_a",
    "sae_a/", "sae_a/config.json", "sae_a\\..\\sae_a", "..\\sae_a", "C:\\sae", "C:sae", "\\\\host\\share", "~", "~root",
    "$HOME", "${HOME}", "`id`", "$(id)", "a;b", "a|b", "a&b", "a b", " ", "sae_a ", "\tsae_a", "sae_a\n", "sae_a\0",
    "\0", "*", "?", "[ab]", "{a,b}", "%2e%2e", "..%2f", "file:///etc/passwd", "-rf", "--help", ".hidden", "_a",
    "\u2025", "\uff0e\uff0e", "\u202esae", "s\u0430e_a", "sae_\u00e4", "<b>", "'a'", '"a"', "a:b", "a" * 65, "sae@main",
]  # fmt: skip


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for seed, name in enumerate(("sae_a", "sae_b")):
        exact_sae(seed, layer=seed).save(tmp_path / "suite" / name)
    return tmp_path / "suite"


def refused(path: Path, sae_id: str | None = "sae_a") -> str:
    with pytest.raises(FormatError) as caught:
        TopKSAE.from_pretrained(path, sae_id=sae_id)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_saved_sae_loads_to_the_bit(suite: Path) -> None:
    sae, rows = exact_sae(1), exact_rows()
    assert same(TopKSAE.from_pretrained(suite, sae_id="sae_b"), sae, rows)
    assert same(TopKSAE.from_pretrained(suite / "sae_b"), sae, rows)
    assert TopKSAE.from_pretrained(str(suite), "sae_b").config["layer"] == 1


def test_the_decoder_is_laid_out_for_the_sparse_decode(suite: Path) -> None:
    assert TopKSAE.from_pretrained(suite, "sae_a").decoder.weight.T.is_contiguous()


def test_the_published_layout_has_three_keys_and_no_checksums(tmp_path: Path) -> None:
    sae = exact_sae()
    (tmp_path / "sae_attn_mid").mkdir()
    (tmp_path / "sae_attn_mid/config.json").write_text(
        json.dumps({"hidden_dim": HIDDEN_DIM, "dict_size": DICT_SIZE, "k": K})
    )
    state = {name: value.detach().contiguous() for name, value in sae.state_dict().items()}
    save_file(state, tmp_path / "sae_attn_mid/weights.safetensors")
    loaded = TopKSAE.from_pretrained(tmp_path, sae_id="sae_attn_mid")
    assert same(loaded, sae, exact_rows())
    assert loaded.config == {"hidden_dim": HIDDEN_DIM, "dict_size": DICT_SIZE, "k": K}


def test_a_suite_loads_whole(suite: Path) -> None:
    loaded = load_suite(suite)
    assert list(loaded) == ["sae_a", "sae_b"]
    assert all(same(loaded[name], exact_sae(seed), exact_rows()) for seed, name in enumerate(loaded))


def test_a_complete_run_is_a_suite_and_an_unfinished_one_is_not(suite: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "status.json").write_text("{}")
    assert "not complete" in refused(run)
    suite.rename(run / "saes")
    assert list(load_suite(run)) == ["sae_a", "sae_b"]


def test_an_unknown_id_is_answered_with_the_known_ones(suite: Path) -> None:
    assert refused(suite, "sae_c").endswith("has no SAE 'sae_c' (it has sae_a, sae_b)")
    assert "say which SAE" in refused(suite, None)


@pytest.mark.parametrize("name", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_named(suite: Path, name: str) -> None:
    (suite / "sae_a" / name).unlink()
    assert f"sae_a/{name} is missing" in refused(suite)


def test_an_empty_folder_holds_no_sae(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no SAE"):
        load_suite(tmp_path)


@pytest.mark.parametrize(
    "path", ["no/such/folder", "/no/such", "no-such", "../x", "a/b/c", "a/..", "org/na me", "org/a--b"]
)
def test_neither_folder_nor_repository(path: str) -> None:
    with pytest.raises(FormatError, match="neither an existing folder nor a Hub repository"):
        TopKSAE.from_pretrained(path, sae_id="sae_a")


def test_a_folder_has_no_revision(suite: Path) -> None:
    with pytest.raises(FormatError, match="has no revision 'v1'"):
        TopKSAE.from_pretrained(suite, sae_id="sae_a", revision="v1")


@pytest.mark.parametrize("sae_id", HOSTILE_IDS, ids=ascii)
def test_hostile_ids_are_refused_by_name(suite: Path, sae_id: str) -> None:
    with pytest.raises(FormatError, match="is not an SAE id"):
        TopKSAE.from_pretrained(suite, sae_id=sae_id)
    with pytest.raises(FormatError, match="is not an SAE id"):
        TopKSAE.from_pretrained("org/name", sae_id=sae_id)


@given(st.text(max_size=80))
@settings(max_examples=300, deadline=None)
def test_an_accepted_id_is_one_plain_path_component(text: str) -> None:
    try:
        check_sae_id(text)
    except FormatError:
        return
    assert Path("root", text).parts == ("root", text)
    assert text.isascii()
    assert text.isprintable()
    assert not text.startswith((".", "-", "~"))


def test_a_link_out_of_the_folder_is_refused(suite: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    (suite / "sae_a/weights.safetensors").rename(outside)
    (suite / "sae_a/weights.safetensors").symlink_to(outside)
    assert "symbolic link that leaves" in refused(suite)
    (suite / "sae_c").symlink_to(tmp_path)
    exact_sae().save(tmp_path)
    assert "symbolic link that leaves" in refused(suite, "sae_c")


def test_links_inside_the_hub_cache_are_its_layout(suite: Path, tmp_path: Path) -> None:
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots/abc/sae_a").mkdir(parents=True)
    for name in ("config.json", "weights.safetensors"):
        os.replace(suite / "sae_a" / name, cache / "blobs" / name)
        (cache / "snapshots/abc/sae_a" / name).symlink_to(f"../../../blobs/{name}")
    assert same(TopKSAE.from_pretrained(cache / "snapshots/abc", "sae_a"), exact_sae(), exact_rows())
    (cache / "snapshots/abc/sae_a/config.json").unlink()
    (tmp_path / "config.json").write_text("{}")
    (cache / "snapshots/abc/sae_a/config.json").symlink_to(tmp_path / "config.json")
    assert "symbolic link that leaves" in refused(cache / "snapshots/abc")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "is not JSON"),
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "is not a JSON object"),
        ('{"hidden_dim": 16, "dict_size": 64}', "k must be a whole number"),
        ('{"hidden_dim": 16, "dict_size": 64, "k": true}', "k must be a whole number"),
        ('{"hidden_dim": 16, "dict_size": "64", "k": 6}', "dict_size must be a whole number"),
        ('{"hidden_dim": 0, "dict_size": 64, "k": 6}', "hidden_dim must be a whole number"),
        ('{"hidden_dim": 16, "dict_size": 64, "k": 65}', "k 65 exceeds dict_size 64"),
        ('{"hidden_dim": 16, "dict_size": 63, "k": 6}', "has shape"),
        ('{"hidden_dim": 16, "dict_size": 2000000000, "k": 6}', "has shape"),
        ('{"x": "' + "a" * (1 << 20) + '"}', "larger than"),
    ],
)
def test_a_bad_config_is_named(suite: Path, text: str, complaint: str) -> None:
    (suite / "sae_a/config.json").write_text(text)
    message = refused(suite)
    assert complaint in message
    assert "sae_a/" in message


def rewrite(suite: Path, **changes: torch.Tensor | None) -> None:
    path = suite / "sae_a/weights.safetensors"
    tensors = load_file(path)
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    save_file(tensors, path)


@pytest.mark.parametrize("name", ["encoder__weight", "encoder__bias", "decoder__weight", "pre_bias"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_weight_is_refused(suite: Path, name: str, value: float) -> None:
    tensor = load_file(suite / "sae_a/weights.safetensors")[name.replace("__", ".")]
    tensor.view(-1)[-1] = value
    rewrite(suite, **{name: tensor})
    message = refused(suite)
    assert f"{name.replace('__', '.')} holds 1 NaN or infinite" in message


def test_wrong_tensors_are_named(suite: Path) -> None:
    rewrite(suite, pre_bias=None)
    assert "tensor pre_bias is missing" in refused(suite)
    rewrite(suite, pre_bias=torch.zeros(HIDDEN_DIM, dtype=torch.bfloat16))
    assert "pre_bias is BF16, not F32" in refused(suite)
    rewrite(suite, pre_bias=torch.zeros(1, HIDDEN_DIM))
    assert "pre_bias has shape [1, 16], not [16]" in refused(suite)
    rewrite(suite, pre_bias=torch.zeros(HIDDEN_DIM), threshold=torch.zeros(1))
    assert "tensor threshold does not belong" in refused(suite)
    rewrite(suite, threshold=None, decoder__weight=torch.zeros(DICT_SIZE, HIDDEN_DIM))
    assert "decoder.weight has shape [64, 16], not [16, 64]" in refused(suite)


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("damage", ["pickle", "header_size", "header_text", "offsets", "truncated", "empty"])
def test_a_wrong_weights_file_is_refused_and_nothing_runs(suite: Path, tmp_path: Path, damage: str) -> None:
    path = suite / "sae_a/weights.safetensors"
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if damage == "offsets":
        header["encoder.weight"]["data_offsets"] = [0, 1 << 40]
    text = json.dumps(header).encode()
    damaged = {
        "pickle": pickle.dumps(Payload(tmp_path / "executed")),
        "header_size": (1 << 62).to_bytes(8, "little") + data[8:],
        "header_text": data[:8] + b"x" * size + data[8 + size :],
        "offsets": len(text).to_bytes(8, "little") + text + data[8 + size :],
        "truncated": data[:-1],
        "empty": b"",
    }
    path.write_bytes(damaged[damage])
    assert f"{path} is not a whole safetensors file" in refused(suite)
    assert not (tmp_path / "executed").exists()


def test_checksums_are_verified_where_present(suite: Path) -> None:
    write_checksums(suite)
    TopKSAE.from_pretrained(suite, sae_id="sae_a")
    path = suite / "sae_a/weights.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    assert "weights.safetensors is damaged" in refused(suite)
    TopKSAE.from_pretrained(suite, sae_id="sae_b")
    exact_sae().save(suite / "sae_c")
    assert "not listed" in refused(suite, "sae_c")
    (suite / "SHA256SUMS").write_text("garbage\n")
    assert "line 1" in refused(suite, "sae_b")
