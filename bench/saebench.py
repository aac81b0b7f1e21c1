"""Run SAEBench's core and sparse-probing evaluations on a release, in SAEBench's own environment.

    PEERS/saebench/bin/python bench/saebench.py RELEASE --model MODEL --out RESULTS --text texts.jsonl \
        --probe topics=topics.jsonl [--sae sae_attn_mid] [--eval core] [--eval sparse_probing]

Imports nothing of qwenscope: a release's weights are read as they lie there, into SAEBench's own TopK class. SAEBench
loads models that TransformerLens rewrites; ours are none, so SAELens' proxy around the Hugging Face model takes their
place (same calls, same hooks). Everything measured is SAEBench's own code. `--text` rows are {"text"}: core packs them
into contexts as SAEBench does, which is not one conversation per row. `--probe NAME=FILE` rows are {"text", "label"};
without it, sparse probing fetches SAEBench's own data sets from the Hub. Results are SAEBench's JSON files.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

# SAEBench's annotations insist on TransformerLens' own model class, which the proxy stands in for.
os.environ["JAXTYPING_DISABLE"] = "1"

import torch
from datasets import Dataset
from sae_bench.custom_saes.topk_sae import TopKSAE
from sae_bench.evals.core import main as core
from sae_bench.evals.core.eval_config import CoreEvalConfig
from sae_bench.evals.sparse_probing import main as probing
from sae_bench.evals.sparse_probing.eval_config import SparseProbingEvalConfig
from sae_bench.sae_bench_utils import dataset_info, dataset_utils, general_utils
from sae_lens.load_model import HookedProxyLM
from sae_lens.training.activations_store import ActivationsStore
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

EVALS = ("core", "sparse_probing")
TEST_SHARE = 0.2  # of a probing file's rows, the last of each label


def load_sae(release: Path, sae_id: str, model_name: str, hook_name: str, options: argparse.Namespace) -> TopKSAE:
    """One SAE of the release as SAEBench's TopK class."""
    config = json.loads((release / sae_id / "config.json").read_text(encoding="utf-8"))
    weights = load_file(release / sae_id / "weights.safetensors")
    dtype = getattr(torch, options.dtype)
    sae = TopKSAE(
        config["hidden_dim"], config["dict_size"], config["k"], model_name, config["layer"],
        torch.device(options.device), dtype, hook_name=hook_name,
    )  # fmt: skip
    with torch.no_grad():
        sae.W_enc.copy_(weights["encoder.weight"].T)
        sae.b_enc.copy_(weights["encoder.bias"])
        sae.W_dec.copy_(weights["decoder.weight"].T)
        sae.b_dec.copy_(weights["pre_bias"])
    sae.cfg.architecture, sae.cfg.prepend_bos, sae.cfg.context_size = "topk", False, options.context
    general_utils.load_and_format_sae(release.name, sae, options.device)  # checks norms and completes cfg
    return sae


def load_model(name: str, layers: list[int], options: argparse.Namespace) -> tuple[HookedProxyLM, list[str]]:
    """The language model behind SAELens' proxy, hooked after each of `layers`, and the names of these hooks."""
    dtype = getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype).to(options.device).eval().requires_grad_(False)
    depth = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    stack = next(path for path in found if len(model.get_submodule(path)) == depth)
    names = [f"{stack}.{layer}" for layer in layers]
    return HookedProxyLM(model, AutoTokenizer.from_pretrained(name), hook_names=sorted(set(names))), names


def run_core(model: HookedProxyLM, sae: TopKSAE, name: str, options: argparse.Namespace) -> None:
    """Fidelity, splice and density on `--text`."""
    rows = [json.loads(line) for line in options.text.read_text(encoding="utf-8").splitlines() if line]
    store = ActivationsStore.from_sae(
        model, sae, Dataset.from_list([{"text": row["text"]} for row in rows]), context_size=options.context,
        streaming=False, device=options.device, sequence_separator_token=None,
    )  # fmt: skip
    config = CoreEvalConfig(
        model_name=sae.cfg.model_name, llm_dtype=options.dtype, batch_size_prompts=options.batch_prompts,
        n_eval_reconstruction_batches=options.batches, n_eval_sparsity_variance_batches=options.batches,
        dataset=options.text.name, context_size=options.context, compute_kl=True, compute_ce_loss=True,
        compute_l2_norms=True, compute_sparsity_metrics=True, compute_variance_metrics=True,
        compute_featurewise_density_statistics=True, compute_featurewise_weight_based_metrics=True,
    )  # fmt: skip
    tokenizer = model.tokenizer
    ignored = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id} - {None}
    metrics, features = core.run_evals(sae, store, model, config, ignore_tokens=ignored)
    metrics["misc_metrics"] = core.calculate_misc_metrics(features)
    result = {"eval_cfg": config, "metrics": metrics, "feature_metrics": features}
    result |= {"sae_id": name, "sae_set": options.release.name}
    core.save_single_eval_result(
        core.replace_nans_with_negative_one(result), core.get_eval_uuid(), core.get_sae_lens_version(),
        core.get_sae_bench_version(), str(options.out / f"core-{name}.json"), sae,
    )  # fmt: skip


def register_probes(files: dict[str, Path]) -> None:
    """Let SAEBench's loader find local data sets under the names given."""
    theirs = dataset_utils.get_multi_label_train_test_data

    def load(name: str, train: int, test: int, seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
        return _split(files[name], train, test) if name in files else theirs(name, train, test, seed)

    dataset_utils.get_multi_label_train_test_data = load
    for name, file in files.items():
        dataset_info.chosen_classes_per_dataset[name] = sorted(_by_label(file))


def _by_label(file: Path) -> dict[str, list[str]]:
    texts: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        texts.setdefault(row["label"], []).append(row["text"])
    return texts


def _split(file: Path, train: int, test: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Texts per label, equally many of each; SAEBench draws a probe's negatives from the other labels."""
    texts = _by_label(file)
    each = min(len(rows) for rows in texts.values())
    held = max(1, int(each * TEST_SHARE))
    return (
        {label: rows[: min(each - held, train)] for label, rows in texts.items()},
        {label: rows[each - held : each][:test] for label, rows in texts.items()},
    )


def run_probing(model: HookedProxyLM, sae: TopKSAE, name: str, options: argparse.Namespace) -> None:
    """Probes on single latents and few, and on the residual stream beside."""
    config = SparseProbingEvalConfig(
        model_name=sae.cfg.model_name, llm_dtype=options.dtype, llm_batch_size=options.batch_prompts,
        context_length=options.context,
    )  # fmt: skip
    if options.probe:
        config.dataset_names = list(options.probe)
    artifacts = options.out / "activations" / sae.cfg.hook_name
    found, per_class = probing.run_eval_single_sae(config, sae, model, options.device, str(artifacts))
    scores: dict[str, Any] = {"model": config.model_name, "sae": name, "results": found, "per_class": per_class}
    (options.out / f"sparse_probing-{name}.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", type=Path)
    parser.add_argument("--model", required=True, help="the release's language model: a folder, or a name on the Hub")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--sae", action="append", help="only these")
    parser.add_argument("--eval", action="append", choices=EVALS, help="only these")
    parser.add_argument("--text", type=Path, help="texts for core")
    parser.add_argument("--probe", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--batches", type=int, default=10)
    parser.add_argument("--batch-prompts", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args(arguments)
    evals = options.eval or EVALS
    if "core" in evals and options.text is None:
        raise SystemExit('core needs --text: a .jsonl file with rows {"text"}')
    options.probe = {name: Path(file) for name, file in (probe.split("=", 1) for probe in options.probe)}
    register_probes(options.probe)
    options.out.mkdir(parents=True, exist_ok=True)
    ids = options.sae or sorted(file.parent.name for file in options.release.glob("*/weights.safetensors"))
    configs = [json.loads((options.release / sae_id / "config.json").read_text(encoding="utf-8")) for sae_id in ids]
    model, hooks = load_model(options.model, [config["layer"] for config in configs], options)
    for sae_id, hook_name in zip(ids, hooks, strict=True):
        sae = load_sae(options.release, sae_id, options.model, hook_name, options)
        if "core" in evals:
            run_core(model, sae, sae_id, options)
        if "sparse_probing" in evals:
            run_probing(model, sae, sae_id, options)


if __name__ == "__main__":
    main()
