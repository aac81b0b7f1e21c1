"""SAEs of other libraries: files as each saves them, of random weights, and their arithmetic written out in float64.

Legend: B rows, D hidden, N latents.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN_DIM, DICT_SIZE, K = 32, 96, 7
Codes = Callable[[Tensor], tuple[Tensor, Tensor]]
"""Rows [B, D] -> (codes [B, N], reconstruction [B, D]), both float64."""


@dataclass(frozen=True)
class Other:
    """One SAE of another library: where `import --from` finds it, and what it computes."""

    origin: str
    source: Path
    codes: Codes
    config: dict[str, Any]
    """Keys that our configuration must have."""


class Draw:
    """Random weights of one seed; decoder rows of norms from 0.5 to 2 unless they are to be 1."""

    def __init__(self, seed: int, unit: bool = False) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.encoder_ND = self(DICT_SIZE, HIDDEN_DIM) / HIDDEN_DIM**0.5
        self.decoder_ND = self(DICT_SIZE, HIDDEN_DIM)
        self.decoder_ND /= self.decoder_ND.double().norm(dim=1, keepdim=True).float()
        if not unit:
            self.decoder_ND *= torch.linspace(0.5, 2, DICT_SIZE)[:, None]
        self.bias_N, self.pre_bias_D = self(DICT_SIZE) - 1, self(HIDDEN_DIM)
        self.threshold_N = self(DICT_SIZE).abs() + 0.5

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def gate(self) -> tuple[Tensor, Tensor, Tensor]:
        """Logarithm of the scale, gate bias, magnitude bias."""
        return 0.5 * self(DICT_SIZE), self(DICT_SIZE) - 1, self(DICT_SIZE)


def above(pre_BN: Tensor, threshold: Tensor | float) -> Tensor:
    return torch.where((pre_BN > threshold) & (pre_BN > 0), pre_BN, 0.0)


def largest(pre_BN: Tensor, k: int) -> Tensor:
    kth_B1 = pre_BN.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where((pre_BN >= kth_B1) & (pre_BN > 0), pre_BN, 0.0)


def computed(draw: Draw, activate: Callable[[Tensor], Tensor], centred: bool = True, scale: float = 1.0) -> Codes:
    """activate(E (s x - p) + b), or without p; (codes D + p) / s."""

    def codes(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        rows_BD = scale * x_BD.double() - (draw.pre_bias_D.double() if centred else 0.0)
        codes_BN = activate(rows_BD @ draw.encoder_ND.double().T + draw.bias_N.double())
        return codes_BN, (codes_BN @ draw.decoder_ND.double() + draw.pre_bias_D.double()) / scale

    return codes


def skipping(codes: Codes, skip_DD: Tensor) -> Codes:
    """The same codes, whose reconstruction has the rows times a matrix added."""

    def skipped(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        codes_BN, rows_BD = codes(x_BD)
        return codes_BN, rows_BD + x_BD.double() @ skip_DD.double().T

    return skipped


def gated(draw: Draw, scale_N: Tensor, gate_N: Tensor, magnitude_N: Tensor) -> Codes:
    def codes(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        e_BN = (x_BD.double() - draw.pre_bias_D.double()) @ draw.encoder_ND.double().T
        open_BN = e_BN + gate_N.double() > 0
        codes_BN = open_BN * torch.relu(e_BN * scale_N.double().exp() + magnitude_N.double())
        return codes_BN, codes_BN @ draw.decoder_ND.double() + draw.pre_bias_D.double()

    return codes


def rescaled(draw: Draw, activate: Callable[[Tensor], Tensor]) -> Codes:
    """Codes are selected among, and in the units of, pre-activations times decoder norms."""

    def codes(x_BD: Tensor) -> tuple[Tensor, Tensor]:
        norm_N = draw.decoder_ND.double().norm(dim=1)
        pre_BN = (x_BD.double() - draw.pre_bias_D.double()) @ draw.encoder_ND.double().T + draw.bias_N.double()
        codes_BN = activate(pre_BN * norm_N)
        return codes_BN, codes_BN / norm_N @ draw.decoder_ND.double() + draw.pre_bias_D.double()

    return codes


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def saelens(folder: Path, seed: int, kind: str, **config: Any) -> Other:
    """`kind`: an architecture of SAELens 6, or "old" for a configuration of SAELens 5."""
    draw = Draw(seed)
    tensors = {"W_enc": draw.encoder_ND.T, "W_dec": draw.decoder_ND, "b_dec": draw.pre_bias_D, "b_enc": draw.bias_N}
    base: dict[str, Any] = {"architecture": kind, "d_in": HIDDEN_DIM, "d_sae": DICT_SIZE, "dtype": "float32"}
    metadata = {"model_name": "gpt2", "hook_name": "blocks.3.hook_resid_pre"}
    told: dict[str, Any] = {"model": "gpt2", "layer": 2}
    if kind == "gated":
        del tensors["b_enc"]
        tensors |= dict(zip(("r_mag", "b_gate", "b_mag"), gate := draw.gate(), strict=True))
        codes = gated(draw, *gate)
    elif kind == "jumprelu":
        tensors["threshold"] = draw.threshold_N
        codes = computed(draw, lambda pre_BN: above(pre_BN, draw.threshold_N.double()), config["apply_b_dec_to_input"])
    elif kind.endswith("transcoder"):
        base |= {"d_out": HIDDEN_DIM, "apply_b_dec_to_input": False}
        metadata = {"model_name": "gpt2", "hook_name": "blocks.2.mlp.hook_in", "hook_name_out": "blocks.2.hook_mlp_out"}
        told |= {"site": "layers.2.mlp_in", "target": "layers.2.mlp", "target_dim": HIDDEN_DIM}
        codes = computed(draw, torch.relu, centred=False)
        if "jumprelu" in kind:
            tensors["threshold"] = draw.threshold_N
            codes = computed(draw, lambda pre_BN: above(pre_BN, draw.threshold_N.double()), centred=False)
        if "skip" in kind:
            tensors["W_skip"] = draw.encoder_ND[:HIDDEN_DIM] / 4
            codes = skipping(codes, tensors["W_skip"])
    elif kind in ("batchtopk", "matryoshka_batchtopk"):
        tensors["topk_threshold"] = torch.tensor(1.875, dtype=torch.float64)
        base |= {"k": 7.5, "rescale_acts_by_decoder_norm": True}
        codes = rescaled(draw, lambda pre_BN: above(pre_BN, 1.875))
        if kind == "matryoshka_batchtopk":
            base["matryoshka_widths"] = told["prefixes"] = [16, 48, DICT_SIZE]
    elif kind == "topk":
        base["k"] = K
        codes = computed(draw, lambda pre_BN: largest(pre_BN, K))
    else:
        codes = computed(draw, torch.relu, scale=1.75 if "normalize_activations" in config else 1.0)
    if kind == "old":
        base = {"d_in": HIDDEN_DIM, "d_sae": DICT_SIZE, "activation_fn_str": "relu", "normalize_activations": False}
        base |= {"model_name": "gpt2", "hook_point": "blocks.3.hook_resid_pre", "sae_lens_version": "3.9.1"}
        tensors["scaling_factor"] = torch.ones(DICT_SIZE)
    else:
        base["metadata"] = metadata | {"sae_lens_version": "6.54.12"}
    if config.get("normalize_activations") == "expected_average_only_in":
        write_json(folder / "activation_scaler.json", {"scaling_factor": 1.75, "has_whitening": False})
    write_json(folder / "cfg.json", base | config)
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "sae_weights.safetensors")
    return Other("saelens", folder, codes, told)


def dictionary_learning(folder: Path, seed: int, kind: str) -> Other:
    """`kind`: a class of dictionary_learning."""
    draw = Draw(seed, unit=kind != "AutoEncoder")
    linear = {"encoder.weight": draw.encoder_ND, "encoder.bias": draw.bias_N, "decoder.weight": draw.decoder_ND.T}
    plain = {"W_enc": draw.encoder_ND.T, "b_enc": draw.bias_N, "W_dec": draw.decoder_ND, "b_dec": draw.pre_bias_D}
    trainer: dict[str, Any] = {"dict_class": kind, "layer": 4, "lm_name": "gpt2", "submodule_name": "mlp_layer_4"}
    told: dict[str, Any] = {"model": "gpt2", "layer": 4, "site": "layers.4.mlp"}
    small = {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(1.375)}
    codes = computed(draw, lambda pre_BN: above(pre_BN, 1.375))
    match kind:
        case "AutoEncoderTopK":
            state, trainer["k"] = linear | {"b_dec": draw.pre_bias_D} | small, K
            codes = computed(draw, lambda pre_BN: largest(pre_BN, K))
        case "BatchTopKSAE":
            state = linear | {"b_dec": draw.pre_bias_D} | small
        case "MatryoshkaBatchTopKSAE":
            state = plain | small | {"group_sizes": torch.tensor([16, 32, 48])}
            told["prefixes"] = [16, 48, 96]
        case "JumpReluAutoEncoder":
            state = plain | {"threshold": draw.threshold_N}
            codes = computed(draw, lambda pre_BN: above(pre_BN, draw.threshold_N.double()), centred=False)
        case "GatedAutoEncoder":
            gate = dict(zip(("r_mag", "gate_bias", "mag_bias"), draw.gate(), strict=True))
            del linear["encoder.bias"]
            state = linear | {"decoder_bias": draw.pre_bias_D} | gate
            codes = gated(draw, *gate.values())
        case _:
            state = linear | {"bias": draw.pre_bias_D}
            codes = rescaled(draw, torch.relu)
    write_json(folder / "config.json", {"trainer": trainer, "buffer": {"ctx_len": 128}})
    torch.save({name: value.contiguous() for name, value in state.items()}, folder / "ae.pt")
    return Other("dictionary_learning", folder, codes, told)


def gemma_scope(folder: Path, seed: int, kind: str) -> Other:
    """`kind`: npz of Gemma Scope, or safetensors, heads or a transcoder of Gemma Scope 2."""
    draw = Draw(seed)
    tensors = {"w_enc": draw.encoder_ND.T, "b_enc": draw.bias_N, "w_dec": draw.decoder_ND, "b_dec": draw.pre_bias_D}
    tensors |= {"threshold": draw.threshold_N}
    codes = computed(draw, lambda pre_BN: above(pre_BN, draw.threshold_N.double()), centred=False)
    if kind == "npz":
        place = folder / "gemma-scope-2b-pt-res/layer_5/width_16k/average_l0_34"
        place.mkdir(parents=True)
        np.savez(place / "params.npz", **{name.replace("w_", "W_"): value.numpy() for name, value in tensors.items()})
        return Other("gemma-scope", folder, codes, {"model": "google/gemma-2-2b", "layer": 5})
    part, site = {"heads": ("attn_out_all", "heads"), "transcoder": ("transcoder_all", "mlp_in")}.get(
        kind, ("mlp_out_all", "mlp_out")
    )
    told = {"model": "google/gemma-3-4b-it", "site": f"layers.5.{site}"}
    if kind == "transcoder":
        tensors["affine_skip_connection"] = draw.encoder_ND[:HIDDEN_DIM].T / 4
        codes = skipping(codes, tensors["affine_skip_connection"].T)
        told |= {"target": "layers.5.mlp_out", "skip": True}
    place = folder / f"gemma-scope-2-4b-it/{part}/layer_5_width_16k_l0_big"
    place.mkdir(parents=True)
    save_file({name: value.contiguous() for name, value in tensors.items()}, place / "params.safetensors")
    return Other("gemma-scope", folder, codes, told)


def llama_scope(folder: Path, seed: int, kind: str) -> Other:
    draw = Draw(seed)
    tensors = {"encoder.weight": draw.encoder_ND, "encoder.bias": draw.bias_N, "decoder.weight": draw.decoder_ND.T}
    tensors |= {"decoder.bias": draw.pre_bias_D}
    place = folder / f"Llama3_1-8B-Base-L9{kind}-8x"
    hook = {"R": "hook_resid_post", "M": "hook_mlp_out"}[kind]
    config = {"d_model": HIDDEN_DIM, "d_sae": DICT_SIZE, "act_fn": "jumprelu", "jump_relu_threshold": 0.75}
    config |= {"hook_point_in": f"blocks.9.{hook}", "hook_point_out": f"blocks.9.{hook}"}
    config |= {"dataset_average_activation_norm": {"in": 3.0, "out": 3.0}, "norm_activation": "dataset-wise"}
    write_json(place / "hyperparams.json", config)
    (place / "checkpoints").mkdir()
    save_file({name: value.contiguous() for name, value in tensors.items()}, place / "checkpoints/final.safetensors")
    scale = HIDDEN_DIM**0.5 / 3
    codes = computed(draw, lambda pre_BN: above(pre_BN, 0.75 * scale), centred=False, scale=scale)
    told = {"model": "meta-llama/Llama-3.1-8B", "layer": 9} | ({"site": "layers.9.mlp"} if kind == "M" else {})
    return Other("llama-scope", folder, codes, told)


CASES: dict[str, Callable[[Path, int], Other]] = {
    "saelens standard": lambda folder, seed: saelens(folder, seed, "standard"),
    "saelens standard, scaled": lambda folder, seed: saelens(
        folder, seed, "standard", normalize_activations="expected_average_only_in"
    ),
    "saelens topk": lambda folder, seed: saelens(folder, seed, "topk"),
    "saelens jumprelu": lambda folder, seed: saelens(folder, seed, "jumprelu", apply_b_dec_to_input=True),
    "saelens jumprelu, not centred": lambda folder, seed: saelens(folder, seed, "jumprelu", apply_b_dec_to_input=False),
    "saelens gated": lambda folder, seed: saelens(folder, seed, "gated"),
    "saelens batchtopk": lambda folder, seed: saelens(folder, seed, "batchtopk"),
    "saelens matryoshka": lambda folder, seed: saelens(folder, seed, "matryoshka_batchtopk"),
    "saelens transcoder": lambda folder, seed: saelens(folder, seed, "transcoder"),
    "saelens jumprelu transcoder": lambda folder, seed: saelens(folder, seed, "jumprelu_transcoder"),
    "saelens skip transcoder": lambda folder, seed: saelens(folder, seed, "skip_transcoder"),
    "saelens jumprelu skip transcoder": lambda folder, seed: saelens(folder, seed, "jumprelu_skip_transcoder"),
    "saelens 3": lambda folder, seed: saelens(folder, seed, "old"),
    "dictionary_learning topk": lambda folder, seed: dictionary_learning(folder, seed, "AutoEncoderTopK"),
    "dictionary_learning batch topk": lambda folder, seed: dictionary_learning(folder, seed, "BatchTopKSAE"),
    "dictionary_learning matryoshka": lambda folder, seed: dictionary_learning(folder, seed, "MatryoshkaBatchTopKSAE"),
    "dictionary_learning jumprelu": lambda folder, seed: dictionary_learning(folder, seed, "JumpReluAutoEncoder"),
    "dictionary_learning gated": lambda folder, seed: dictionary_learning(folder, seed, "GatedAutoEncoder"),
    "dictionary_learning standard": lambda folder, seed: dictionary_learning(folder, seed, "AutoEncoder"),
    "gemma-scope": lambda folder, seed: gemma_scope(folder, seed, "npz"),
    "gemma-scope 2": lambda folder, seed: gemma_scope(folder, seed, "safetensors"),
    "gemma-scope 2 heads": lambda folder, seed: gemma_scope(folder, seed, "heads"),
    "gemma-scope 2 transcoder": lambda folder, seed: gemma_scope(folder, seed, "transcoder"),
    "llama-scope residual": lambda folder, seed: llama_scope(folder, seed, "R"),
    "llama-scope mlp": lambda folder, seed: llama_scope(folder, seed, "M"),
}
"""Every kind that is imported, by a name for messages; sparsify and Qwen-Scope are in test_formats.py."""
