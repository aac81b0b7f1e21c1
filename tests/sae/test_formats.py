"""Formats: round trips to the bit, re-parametrisations against dense formulas, refusals by name."""

from __future__ import annotations

import gzip
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from exact_saes import DICT_SIZE, HIDDEN_DIM, K, exact_rows, exact_sae, same
from safetensors.torch import load_file, save_file

from qwenscope import TopKSAE, load_suite
from qwenscope.errors import FormatError
from qwenscope.sae.format_names import OfLatents, OfSuites, Read
from qwenscope.sae.formats import EXPORTS, IMPORTS, OF_LATENTS, export_suite, import_suite

ROUND_TRIPS = sorted(set(EXPORTS) & set(IMPORTS))


def test_the_command_line_knows_the_registry() -> None:
    assert (EXPORTS, IMPORTS, tuple(OF_LATENTS)) == (get_args(OfSuites), get_args(Read), get_args(OfLatents))


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    for seed, name in enumerate(("sae_a", "sae_b")):
        exact_sae(seed, sae_id=name, layer=seed + 6, model="org/model").save(tmp_path / "suite" / name)
    return tmp_path / "suite"


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_round_trip_changes_nothing(suite: Path, tmp_path: Path, name: str) -> None:
    export_suite(suite, name, tmp_path / "there")
    import_suite(tmp_path / "there", name, tmp_path / "back")
    before, after = load_suite(suite), load_suite(tmp_path / "back")
    assert list(after) == list(before)
    for sae_id, sae in before.items():
        assert same(after[sae_id], sae, exact_rows())
        assert after[sae_id].config == sae.config
        for key, value in sae.state_dict().items():
            assert torch.equal(after[sae_id].state_dict()[key], value)


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_random_weights_survive_to_the_bit(tmp_path: Path, name: str) -> None:
    sae = TopKSAE(24, 80, 5, seed=3)
    torch.nn.init.normal_(sae.pre_bias)
    torch.nn.init.normal_(sae.encoder.bias)
    sae.save(tmp_path / "sae")
    export_suite(tmp_path / "sae", name, tmp_path / "there")
    import_suite(tmp_path / "there", name, tmp_path / "back")
    (loaded,) = load_suite(tmp_path / "back").values()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in sae.state_dict().items())


def dense_topk(pre_BN: torch.Tensor, k: int) -> torch.Tensor:
    """TopK(ReLU(pre)) by sorting."""
    order = pre_BN.argsort(dim=1, descending=True)
    codes = torch.zeros_like(pre_BN)
    return codes.scatter(1, order[:, :k], pre_BN.relu().gather(1, order[:, :k]))


def saelens_folder(folder: Path, **config: Any) -> dict[str, torch.Tensor]:
    """A folder as SAELens 6 writes it, with decoder norms from 0.5 to 2."""
    generator = torch.Generator().manual_seed(5)
    tensors = {
        "W_enc": torch.randn(HIDDEN_DIM, DICT_SIZE, generator=generator),
        "b_enc": torch.randn(DICT_SIZE, generator=generator),
        "W_dec": torch.randn(DICT_SIZE, HIDDEN_DIM, generator=generator),
        "b_dec": torch.randn(HIDDEN_DIM, generator=generator),
    }
    tensors["W_dec"] *= torch.linspace(0.5, 2, DICT_SIZE)[:, None] / tensors["W_dec"].norm(dim=1, keepdim=True)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "sae_weights.safetensors")
    metadata = {"sae_lens_version": "6.54.12", "model_name": "gpt2", "hook_name": "blocks.3.hook_resid_post"}
    base = {"architecture": "topk", "d_in": HIDDEN_DIM, "d_sae": DICT_SIZE, "k": K, "metadata": metadata}
    (folder / "cfg.json").write_text(json.dumps(base | config))
    return tensors


@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("rescale", [True, False])
def test_saelens_flags_are_kept_or_folded(tmp_path: Path, subtract: bool, rescale: bool) -> None:
    tensors = saelens_folder(tmp_path / "lens/a", apply_b_dec_to_input=subtract, rescale_acts_by_decoder_norm=rescale)
    import_suite(tmp_path / "lens", "saelens", tmp_path / "out")
    sae = TopKSAE.from_pretrained(tmp_path / "out", sae_id="a")
    x_BD = torch.randn(300, HIDDEN_DIM, generator=torch.Generator().manual_seed(6))
    w_enc, b_enc, w_dec, b_dec = (value.double() for value in tensors.values())
    norm_N = w_dec.norm(dim=1) if rescale else torch.ones(DICT_SIZE, dtype=torch.float64)
    pre_BN = ((x_BD.double() - (b_dec if subtract else 0)) @ w_enc + b_enc) * norm_N
    codes_BN = dense_topk(pre_BN, K)
    assert torch.equal(sae.encode(x_BD).dense() > 0, codes_BN > 0)
    torch.testing.assert_close(sae(x_BD).double(), codes_BN / norm_N @ w_dec + b_dec, rtol=0, atol=1e-5)
    assert sae.config["layer"] == 3
    assert sae.config["model"] == "gpt2"
    assert sae.config.get("decoder_unit_norm", True) == rescale
    assert len(sae.config["imported"].get("changed", [])) == (not subtract) + rescale


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"architecture": "jumprelu"}, "tensor threshold is missing"),
        ({"architecture": "batchtopk"}, "tensor topk_threshold is missing"),
        ({"d_sae": 63}, "not d_in x d_sae"),
        ({"k": 0}, "k must be a whole number"),
        ({"k": 65}, "k 65 exceeds"),
    ],
)
def test_saelens_refusals(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    saelens_folder(tmp_path / "lens")
    edit_json(tmp_path / "lens/cfg.json", **changes)
    with pytest.raises(FormatError, match=complaint):
        import_suite(tmp_path / "lens", "saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"activation": "groupmax"}, "activation='groupmax'"),
        ({"skip_connection": True}, "skip_connection=True"),
        ({"transcode": True}, "transcode=True"),
        ({"signed": True}, "signed=True"),
        ({"num_latents": 63}, "encoder.weight has shape"),
        ({"num_latents": 0, "expansion_factor": 8}, "encoder.weight has shape"),
        ({"d_in": None}, "d_in must be a whole number"),
    ],
)
def test_sparsify_refusals(suite: Path, tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    export_suite(suite, "sparsify", tmp_path / "there")
    edit_json(tmp_path / "there/layers.7/cfg.json", **changes)
    with pytest.raises(FormatError, match=complaint):
        import_suite(tmp_path / "there", "sparsify", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_sparsify_width_from_the_expansion_factor(suite: Path, tmp_path: Path) -> None:
    export_suite(suite, "sparsify", tmp_path / "there")
    (tmp_path / "there/layers.7").rename(tmp_path / "layers.9")
    edit_json(tmp_path / "layers.9/cfg.json", num_latents=0, expansion_factor=4, qwenscope=None)
    import_suite(tmp_path / "layers.9", "sparsify", tmp_path / "out")
    (loaded,) = load_suite(tmp_path / "out").values()
    assert same(loaded, exact_sae(1), exact_rows())
    assert loaded.config["layer"] == 9
    assert loaded.config["sae_id"] == "layers.9"


def test_sparsify_skip_weights_are_refused(suite: Path, tmp_path: Path) -> None:
    export_suite(suite, "sparsify", tmp_path / "there")
    path = tmp_path / "there/layers.6/sae.safetensors"
    save_file(load_file(path) | {"W_skip": torch.zeros(HIDDEN_DIM, HIDDEN_DIM)}, path)
    with pytest.raises(FormatError, match="tensor W_skip cannot be represented"):
        import_suite(tmp_path / "there", "sparsify", tmp_path / "out")


def edit_state(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def test_dictionary_learning_refusals(suite: Path, tmp_path: Path) -> None:
    export_suite(suite, "dictionary_learning", tmp_path / "there")
    path = tmp_path / "there/sae_a/ae.pt"

    def refused() -> str:
        with pytest.raises(FormatError) as caught:
            import_suite(tmp_path / "there", "dictionary_learning", tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(caught.value)

    edit_state(path, lambda state: state.update(k=torch.tensor(7)))
    assert "k is missing, or differs from the 6" in refused()
    edit_state(path, lambda state: state.update(k=torch.tensor(6), W_gate=torch.zeros(2)))
    assert "W_gate cannot be represented" in refused()
    config = tmp_path / "there/sae_a/config.json"
    edit_json(config, trainer={"dict_class": "IdentityDict"})
    assert "'IdentityDict' is refused" in refused()
    edit_state(path, lambda state: state.pop("W_gate"))
    edit_json(config, trainer={"dict_class": "BatchTopKSAE"})
    assert "threshold is missing or unset" in refused()
    config.write_text("{}")
    assert "no trainer section" in refused()


class Payload:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_a_payload_is_refused_and_does_not_run(
    suite: Path, tmp_path: Path, protocol: int, zipped: bool
) -> None:
    export_suite(suite, "dictionary_learning", tmp_path / "there")
    path = tmp_path / "there/sae_a/ae.pt"
    if zipped:
        torch.save({"encoder.weight": Payload(tmp_path / "executed")}, path, pickle_protocol=protocol)
    else:
        path.write_bytes(pickle.dumps({"encoder.weight": Payload(tmp_path / "executed")}, protocol))
    with pytest.raises(FormatError, match=r"sae_a/ae.pt is refused: its pickle"):
        import_suite(tmp_path / "there", "dictionary_learning", tmp_path / "out")
    scope = tmp_path / "SAE-Res-X-W32K-L0_50"
    scope.mkdir()
    path.rename(scope / "layer0.sae.pt")
    with pytest.raises(FormatError, match=r"layer0.sae.pt is refused: its pickle"):
        import_suite(scope, "qwen-scope", tmp_path / "out")
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def qwen_scope_folder(folder: Path, rows: int = 1024) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    encoder = torch.randn(rows, 32, generator=generator)
    state = {
        "W_enc": encoder,
        "W_dec": torch.nn.functional.normalize(torch.randn(rows, 32, generator=generator), dim=1).T.contiguous(),
        "b_enc": torch.randn(rows, generator=generator),
        "b_dec": 3 * torch.randn(32, generator=generator),
    }
    folder.mkdir(parents=True)
    torch.save(state, folder / "layer7.sae.pt")
    return state


def test_qwen_scope_folds_without_a_flip(tmp_path: Path) -> None:
    folder = tmp_path / "SAE-Res-Qwen3.5-35B-A3B-Base-W1K-L0_50"
    state = qwen_scope_folder(folder)
    import_suite(folder, "qwen-scope", tmp_path / "out")
    sae = TopKSAE.from_pretrained(tmp_path / "out", sae_id="layer7")
    x_BD = 5 * torch.randn(1000, 32, generator=torch.Generator().manual_seed(8))
    codes_BN = dense_topk(x_BD.double() @ state["W_enc"].double().T + state["b_enc"].double(), 50)
    assert torch.equal(sae.encode(x_BD).dense() > 0, codes_BN > 0)
    wanted_BD = codes_BN @ state["W_dec"].double().T + state["b_dec"].double()
    assert ((sae(x_BD).double() - wanted_BD).norm(dim=1) / wanted_BD.norm(dim=1)).max() < 2e-6
    assert (sae.config["k"], sae.config["layer"], sae.config["model"]) == (50, 7, "Qwen/Qwen3.5-35B-A3B-Base")


def test_qwen_scope_needs_the_name_of_its_repository(tmp_path: Path) -> None:
    qwen_scope_folder(tmp_path / "saes")
    with pytest.raises(FormatError, match="k stands in Qwen-Scope's repository names only"):
        import_suite(tmp_path / "saes", "qwen-scope", tmp_path / "out")
    (tmp_path / "saes").rename(tmp_path / "SAE-Res-X-W32K-L0_50")
    with pytest.raises(FormatError, match="1,024 latents, but the name says 32,768"):
        import_suite(tmp_path / "SAE-Res-X-W32K-L0_50/layer7.sae.pt", "qwen-scope", tmp_path / "out")


def test_the_published_layout_in_half_precision_is_converted(tmp_path: Path) -> None:
    sae = exact_sae()
    sae.save(tmp_path / "there/sae_a")
    path = tmp_path / "there/sae_a/weights.safetensors"
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    with pytest.raises(FormatError, match="`qwenscope import --from qwenscope` converts it"):
        TopKSAE.from_pretrained(tmp_path / "there", sae_id="sae_a")
    import_suite(tmp_path / "there", "qwenscope", tmp_path / "out")
    loaded = TopKSAE.from_pretrained(tmp_path / "out", sae_id="sae_a")
    assert loaded.encoder.weight.dtype == torch.float32
    torch.testing.assert_close(loaded(exact_rows()), sae(exact_rows()), rtol=0.02, atol=0.1)


def test_neuronpedia_names_every_latent_and_its_nearest(suite: Path, tmp_path: Path) -> None:
    export_suite(suite, "neuronpedia", tmp_path / "np")
    folder = next((tmp_path / "np/v1/model").glob("6-suite-sae_a-*"))
    (source,) = [json.loads(line) for line in (folder / "source.jsonl").read_text().splitlines()]
    assert source["id"] == folder.name
    assert source["modelId"] == "model"
    lines = gzip.decompress((folder / "features/batch-0.jsonl.gz").read_bytes()).decode().splitlines()
    features = [json.loads(line) for line in lines]
    assert [feature["index"] for feature in features] == [str(index) for index in range(DICT_SIZE)]
    decoder_ND = exact_sae(0).decoder.weight.detach().T.double()
    cosine_NN = decoder_ND @ decoder_ND.T
    for index, feature in enumerate(features):
        assert feature["layer"] == folder.name
        best = cosine_NN[index].sort(descending=True).values[:10].tolist()
        assert feature["topkCosSimValues"] == pytest.approx(best, abs=1e-5)
        assert cosine_NN[index, feature["topkCosSimIndices"]].tolist() == pytest.approx(best, abs=1e-5)


def test_neuronpedia_records_have_what_its_tables_demand(suite: Path, tmp_path: Path) -> None:
    export_suite(suite, "neuronpedia", tmp_path / "np")
    folder = next((tmp_path / "np/v1/model").glob("6-suite-sae_a-*"))
    found = {name: json.loads((folder / f"{name}.jsonl").read_text()) for name in NEURONPEDIA_REQUIRED}
    for name, required in NEURONPEDIA_REQUIRED.items():
        assert required <= set(found[name])
        assert found[name]["visibility"] == "PUBLIC"  # private where it is absent
    assert (found["model"]["owner"], found["model"]["layers"]) == ("org", 7)
    assert found["release"]["name"] == found["sourceset"]["releaseName"] == "suite"
    assert found["source"]["setName"] == found["sourceset"]["name"]


NEURONPEDIA_REQUIRED = {
    "model": {"id", "creatorId", "layers", "neuronsPerLayer", "owner"},
    "release": {"name", "description", "creatorName", "creatorId", "urls"},
    "sourceset": {"modelId", "name", "description", "creatorName", "creatorId", "urls"},
    "source": {"id", "modelId", "setName", "creatorId"},
}


def test_two_suites_of_one_name_keep_their_own_sources(tmp_path: Path) -> None:
    for seed, place in enumerate(("one", "two")):
        exact_sae(seed, layer=6, model="org/model").save(tmp_path / place / "run/saes/sae_a")
        export_suite(tmp_path / place / "run", "neuronpedia", tmp_path / f"np-{place}")
    sources = [path.name for place in ("one", "two") for path in (tmp_path / f"np-{place}/v1/model").iterdir()]
    assert [source.rpartition("-")[0] for source in sources] == ["6-run-sae_a"] * 2
    assert len(set(sources)) == 2


SITES: list[tuple[dict[str, Any], str, str]] = [
    ({"layer": 22}, "layers.22", "blocks.22.hook_resid_post"),
    ({"layer": 22, "site": "layers.22.mlp"}, "layers.22.mlp", "blocks.22.hook_mlp_out"),
    ({"layer": 22, "site": "layers.22.mixer", "kind": "deltanet"}, "layers.22.linear_attn", "blocks.22.hook_attn_out"),
    ({"layer": 23, "site": "layers.23.mixer", "kind": "attention"}, "layers.23.self_attn", "blocks.23.hook_attn_out"),
]


@pytest.mark.parametrize(("config", "module", "hook"), SITES)
def test_sites_are_named_in_each_librarys_words(tmp_path: Path, config: dict[str, Any], module: str, hook: str) -> None:
    exact_sae(model="org/model", **config).save(tmp_path / "suite/sae_a")
    for name in ("saelens", "sparsify", "neuronpedia"):
        export_suite(tmp_path / "suite", name, tmp_path / name)
    metadata = json.loads((tmp_path / "saelens/sae_a/cfg.json").read_text())["metadata"]
    assert metadata["hook_name"] == metadata["hf_hook_name"] == f"model.{module}"
    assert (tmp_path / "sparsify" / module / "sae.safetensors").is_file()
    (features,) = (tmp_path / "neuronpedia").rglob("features/batch-0.jsonl.gz")
    assert json.loads(gzip.decompress(features.read_bytes()).splitlines()[0])["hookName"] == hook


def test_a_second_sae_at_a_site_is_a_sparsify_checkpoint_of_its_own(tmp_path: Path) -> None:
    for seed, sae_id in enumerate(("sae_a", "sae_b", "sae_c")):
        exact_sae(seed, sae_id=sae_id, layer=6 if seed < 2 else 7).save(tmp_path / "suite" / sae_id)
    export_suite(tmp_path / "suite", "sparsify", tmp_path / "there")
    folders = {path.parent.relative_to(tmp_path / "there").as_posix() for path in tmp_path.rglob("there/**/cfg.json")}
    assert folders == {"layers.6", "sae_b/layers.6", "layers.7"}
    import_suite(tmp_path / "there", "sparsify", tmp_path / "back")
    for seed, sae in enumerate(load_suite(tmp_path / "back").values()):
        assert same(sae, exact_sae(seed), exact_rows())


@pytest.mark.parametrize("trained", [True, False])
def test_saelens_is_told_of_unit_norms_where_they_are_units(tmp_path: Path, trained: bool) -> None:
    sae = TopKSAE(24, 80, 5, seed=3)
    with torch.no_grad():
        sae.decoder.weight[:, 7] *= 1 if trained else 1.0001
    sae.save(tmp_path / "sae")
    export_suite(tmp_path / "sae", "saelens", tmp_path / "there")
    (path,) = (tmp_path / "there").rglob("cfg.json")
    assert json.loads(path.read_text())["rescale_acts_by_decoder_norm"] is trained
    metadata = {"sae_lens_version": "6.54.12"}  # as of another's SAE: the rule reads the weights
    edit_json(path, metadata=metadata)
    import_suite(tmp_path / "there", "saelens", tmp_path / "back")
    (loaded,) = load_suite(tmp_path / "back").values()
    assert all(torch.equal(loaded.state_dict()[key], value) for key, value in sae.state_dict().items())


def test_neuronpedia_needs_model_and_layer(tmp_path: Path) -> None:
    exact_sae().save(tmp_path / "sae")
    with pytest.raises(FormatError, match="needs the keys model and layer"):
        export_suite(tmp_path / "sae", "neuronpedia", tmp_path / "out")


def test_unknown_formats_and_full_folders_are_refused(suite: Path, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="'onnx'; choose one of saelens, sparsify"):
        export_suite(suite, "onnx", tmp_path / "out")
    with pytest.raises(FormatError, match="imported from 'neuronpedia'"):
        import_suite(suite, "neuronpedia", tmp_path / "out")
    with pytest.raises(FormatError, match="is not empty"):
        export_suite(suite, "saelens", suite)
    with pytest.raises(FormatError, match=r"holds no ae.pt"):
        import_suite(suite, "dictionary_learning", tmp_path / "out")
    with pytest.raises(FormatError, match="neither an existing folder nor a Hub repository"):
        import_suite(tmp_path / "missing", "saelens", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ROUND_TRIPS)
def test_a_hostile_id_carried_in_a_file_stays_inside(suite: Path, tmp_path: Path, name: str) -> None:
    export_suite(suite, name, tmp_path / "there")
    for path in (tmp_path / "there").rglob("*.json"):
        path.write_text(path.read_text().replace('"sae_id": "sae_a"', '"sae_id": "../../escaped"'))
    with pytest.raises(FormatError, match=r"'../../escaped' is not an SAE id"):
        import_suite(tmp_path / "there", name, tmp_path / "deep/out")
    assert not list(tmp_path.rglob("escaped"))


def test_two_saes_of_one_id_are_refused(suite: Path, tmp_path: Path) -> None:
    export_suite(suite, "saelens", tmp_path / "there/one")
    export_suite(suite, "saelens", tmp_path / "there/two")
    with pytest.raises(FormatError, match="two SAEs called sae_a"):
        import_suite(tmp_path / "there", "saelens", tmp_path / "out")


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning"])
def test_non_finite_weights_and_links_are_refused(suite: Path, tmp_path: Path, name: str) -> None:
    export_suite(suite, name, tmp_path / "there")
    folder = tmp_path / "there/sae_a"
    if name == "saelens":
        path, key = folder / "sae_weights.safetensors", "W_dec"
        tensors = load_file(path)
        tensors[key][0, 0] = float("nan")
        save_file(tensors, path)
    else:
        path, key = folder / "ae.pt", "encoder.bias"
        edit_state(path, lambda state: state[key].__setitem__(0, float("inf")))
    with pytest.raises(FormatError, match=f"{key} holds 1 NaN or infinite"):
        import_suite(tmp_path / "there", name, tmp_path / "out")
    path.rename(tmp_path / "outside")
    path.symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match="symbolic link that leaves"):
        import_suite(tmp_path / "there", name, tmp_path / "out")
