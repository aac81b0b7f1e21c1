"""Imports straight from the Hub: a whole repository, a folder or a file of it."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from exact_saes import exact_rows, exact_sae, same
from writable_hub import WritableHub

from qwenscope import TopKSAE, load_suite
from qwenscope.errors import FormatError, HubError
from qwenscope.sae.formats import export_suite, import_suite


def commit(hub: WritableHub, repo: str, folder: Path) -> None:
    hub.add("models", repo, {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")})


@pytest.mark.parametrize("name", ["saelens", "sparsify", "dictionary_learning"])
def test_a_whole_repository_and_a_part_of_it(hub: WritableHub, tmp_path: Path, name: str) -> None:
    for seed, sae_id in enumerate(("sae_a", "sae_b")):
        exact_sae(seed, sae_id=sae_id).save(tmp_path / "suite" / sae_id)
    export_suite(tmp_path / "suite", name, tmp_path / "there")
    commit(hub, "org/peer", tmp_path / "there")
    import_suite("org/peer", name, tmp_path / "all")
    assert list(load_suite(tmp_path / "all")) == ["sae_a", "sae_b"]
    import_suite("org/peer/sae_b", name, tmp_path / "part")
    (part,) = load_suite(tmp_path / "part").items()
    assert part[0] == "sae_b"
    assert same(part[1], exact_sae(1), exact_rows())


def test_one_layer_of_qwen_scope(hub: WritableHub, tmp_path: Path) -> None:
    state = {
        "W_enc": torch.randn(1024, 8),
        "W_dec": torch.randn(8, 1024),
        "b_enc": torch.zeros(1024),
        "b_dec": torch.ones(8),
    }
    buffer = io.BytesIO()
    torch.save(state, buffer)
    files = {f"layer{layer}.sae.pt": buffer.getvalue() for layer in (3, 7)}
    hub.add("models", "Qwen/SAE-Res-Qwen3.5-35B-A3B-Base-W1K-L0_50", files)
    import_suite("Qwen/SAE-Res-Qwen3.5-35B-A3B-Base-W1K-L0_50/layer7.sae.pt", "qwen-scope", tmp_path / "out")
    assert [path for path in hub.requests if "layer3" in path] == []
    sae = TopKSAE.from_pretrained(tmp_path / "out", "layer7")
    assert (sae.k, sae.config["layer"], sae.config["decoder_unit_norm"]) == (50, 7, False)


def test_errors_of_a_source_on_the_hub(hub: WritableHub, tmp_path: Path) -> None:
    hub.add("models", "org/other", {"README.md": b"nothing here", "x/cfg.json": json.dumps({}).encode()})
    for source, error, complaint in (
        ("org/other", FormatError, "holds no sae_weights.safetensors"),
        ("org/other/missing", FormatError, "holds no sae_weights.safetensors"),
        ("org/missing", HubError, "does not exist on the Hub or is private"),
        ("org/other/../secret", FormatError, r"a path inside a repository has no '\.\.'"),
    ):
        with pytest.raises(error, match=complaint):
            import_suite(source, "saelens", tmp_path / "out")
        assert not (tmp_path / "out").exists()
