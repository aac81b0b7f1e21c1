"""Run by a peer library's own interpreter: random SAEs of each kind it has, saved by its code, and what it computes.

    python made_by_peers.py saelens|sparsify|dictionary_learning OUT SEED

OUT/<kind>/ holds the files, OUT/<kind>.pt {"origin", "rows", "codes", "reconstruction"}. Gemma Scope, Llama Scope and
Qwen-Scope have no library: SAELens' loaders, given local files for downloads, are taken as theirs.
"""

import json
import math
import sys
from pathlib import Path

import torch

D, N, K, ROWS, HEADS, PREDICTED = 128, 1024, 24, 500, 8, 96


def filled(module, draw):
    """Every parameter of a module at random: rows of about unit norm, scales and thresholds fit for codes."""
    for name, value in {**dict(module.named_parameters()), **dict(module.named_buffers())}.items():
        if not value.is_floating_point() or value.dim() == 0:
            continue
        random = torch.randn(value.shape, generator=draw)
        if value.dim() == 2:
            random /= math.sqrt(D)
        elif "threshold" in name:
            random = random.abs() + 0.5
        elif name == "r_mag":
            random *= 0.3
        elif name in ("b_enc", "encoder.bias"):
            random -= 1
        elif name in ("b_gate", "gate_bias"):
            random -= 2
        value.data.copy_(random)
    return module


def record(out, kind, origin, x_BD, codes_BN, reconstruction_BD):
    values = {"origin": origin, "rows": x_BD, "codes": codes_BN.detach(), "reconstruction": reconstruction_BD.detach()}
    torch.save(values, out / f"{kind}.pt")


def saelens(out, draw, x_BD):
    from sae_lens import SAE
    from sae_lens.registry import get_sae_class, get_sae_training_class
    from sae_lens.saes.sae import SAEMetadata

    def metadata_of(kind):
        if "transcoder" in kind:
            hooks = {"hook_name": "blocks.3.mlp.hook_in", "hook_name_out": "blocks.3.hook_mlp_out"}
        else:
            hooks = {"hook_name": f"blocks.3.{'attn.hook_z' if kind.endswith('hook_z') else 'hook_resid_pre'}"}
        return {"model_name": "gpt2", **hooks}

    kinds = {
        "standard": ("standard", {}),
        "topk": ("topk", {"k": K}),
        "topk-rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
        "jumprelu": ("jumprelu", {}),
        "jumprelu-not-centred": ("jumprelu", {"apply_b_dec_to_input": False}),
        "gated": ("gated", {}),
        "standard-hook_z": ("standard", {"reshape_activations": "hook_z"}),
        "jumprelu-hook_z": ("jumprelu", {"reshape_activations": "hook_z"}),
        "standard-layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
        "standard-constant_norm_rescale": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    }
    for base in ("transcoder", "skip_transcoder"):
        kinds[base] = base, {"d_out": PREDICTED, "apply_b_dec_to_input": False}
        kinds[f"jumprelu_{base}"] = f"jumprelu_{base}", kinds[base][1]
    for kind, (architecture, options) in kinds.items():
        made, config = get_sae_class(architecture)
        sae = made(config(d_in=D, d_sae=N, metadata=SAEMetadata(**metadata_of(kind)), **options))
        filled(sae, draw).save_model(out / kind / kind)
        sae = SAE.load_from_disk(out / kind / kind)
        x = x_BD.view(ROWS, HEADS, -1) if kind.endswith("hook_z") else x_BD
        record(out, kind, "saelens", x_BD, sae.encode(x), sae(x).reshape(ROWS, -1))
    for architecture in ("batchtopk", "matryoshka_batchtopk"):
        made, config = get_sae_training_class(architecture)
        options = {"matryoshka_widths": [128, 512, N]} if "matryoshka" in architecture else {}
        sae = filled(made(config(d_in=D, d_sae=N, k=K, **options)), draw)
        sae.topk_threshold.fill_(1.4)
        sae.save_inference_model(out / architecture / architecture)
        sae.save_model(out / f"{architecture}-checkpoint" / "checkpoint")
        trained = SAE.load_from_disk(out / architecture / architecture)
        codes_BN = trained.encode(x_BD)
        for kind in (architecture, f"{architecture}-checkpoint"):
            record(out, kind, "saelens", x_BD, codes_BN, trained.decode(codes_BN))
    published(out, draw, x_BD)


def published(out, draw, x_BD):
    """Suites that are no library's, through SAELens' loaders of them."""
    import numpy as np
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders
    from safetensors.torch import save_file

    def fresh():
        tensors = {"W_enc": (D, N), "b_enc": (N,), "W_dec": (N, D), "b_dec": (D,)}
        tensors = {name: torch.randn(shape, generator=draw) for name, shape in tensors.items()}
        tensors["W_enc"] /= math.sqrt(D)
        tensors["W_dec"] /= math.sqrt(D)
        tensors["b_enc"] -= 1
        return tensors, torch.randn(N, generator=draw).abs() + 0.5

    def loaded(kind, origin, load, repo, folder, scale=None, heads=False):
        loaders.hf_hub_download = lambda repo_id, filename, subfolder="", **_: str(
            out / kind / repo_id.split("/")[-1] / subfolder / filename
        )
        overrides = {"d_in": D, "d_sae": N, "dtype": "float32"}
        overrides |= {"d_out": D} if "transcoder" in kind else {}
        config, state, _ = load(repo, folder, "cpu", False, overrides)
        config = loaders.handle_config_defaulting(config)
        sae_class = SAE.get_sae_class_for_architecture(config["architecture"])
        sae = sae_class(SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config))
        sae.load_state_dict({name: value.contiguous() for name, value in state.items()})
        if scale is not None:
            sae.fold_activation_norm_scaling_factor(scale)
        x = x_BD.view(ROWS, HEADS, -1) if heads else x_BD
        record(out, kind, origin, x_BD, sae.encode(x), sae(x).reshape(ROWS, D))

    tensors, threshold = fresh()
    place = out / "gemma-scope/gemma-scope-2b-pt-res/layer_5/width_4k/average_l0_9"
    place.mkdir(parents=True)
    np.savez(
        place / "params.npz", **{name: value.numpy() for name, value in (tensors | {"threshold": threshold}).items()}
    )
    repo, folder = "google/gemma-scope-2b-pt-res", "layer_5/width_4k/average_l0_9"
    loaded("gemma-scope", "gemma-scope", loaders.gemma_2_sae_huggingface_loader, repo, folder)

    tensors, threshold = fresh()
    repo, folder = "google/gemma-scope-2b-pt-att", "layer_5/width_4k/average_l0_9"
    place = out / "gemma-scope-heads/gemma-scope-2b-pt-att" / folder
    place.mkdir(parents=True)
    np.savez(
        place / "params.npz", **{name: value.numpy() for name, value in (tensors | {"threshold": threshold}).items()}
    )
    loaded("gemma-scope-heads", "gemma-scope", loaders.gemma_2_sae_huggingface_loader, repo, folder, heads=True)

    tensors, threshold = fresh()
    repo, folder = "google/gemma-scope-2b-pt-transcoders", "layer_5/width_4k/average_l0_9"
    place = out / "gemma-scope-transcoder/gemma-scope-2b-pt-transcoders" / folder
    place.mkdir(parents=True)
    np.savez(
        place / "params.npz", **{name: value.numpy() for name, value in (tensors | {"threshold": threshold}).items()}
    )
    loaded("gemma-scope-transcoder", "gemma-scope", loaders.gemma_2_transcoder_huggingface_loader, repo, folder)

    tensors, threshold = fresh()
    folder = "resid_post/layer_7_width_16k_l0_big"
    place = out / "gemma-scope-2/gemma-scope-2-1b-pt" / folder
    place.mkdir(parents=True)
    small = {name.replace("W_", "w_"): value for name, value in (tensors | {"threshold": threshold}).items()}
    save_file(small, place / "params.safetensors")
    (place / "config.json").write_text(json.dumps({"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}))
    loaders.get_safetensors_tensor_shapes = lambda *_: {name: list(value.shape) for name, value in small.items()}
    repo = "google/gemma-scope-2-1b-pt"
    loaded("gemma-scope-2", "gemma-scope", loaders.gemma_3_sae_huggingface_loader, repo, folder)

    tensors, threshold = fresh()
    folder = "transcoder_all/layer_7_width_16k_l0_big_affine"
    place = out / "gemma-scope-2-transcoder/gemma-scope-2-1b-pt" / folder
    place.mkdir(parents=True)
    small = {name.replace("W_", "w_"): value for name, value in (tensors | {"threshold": threshold}).items()}
    small["affine_skip_connection"] = torch.randn(D, D, generator=draw) / math.sqrt(D)
    save_file(small, place / "params.safetensors")
    about = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt", "affine_connection": True}
    (place / "config.json").write_text(json.dumps(about))
    loaded("gemma-scope-2-transcoder", "gemma-scope", loaders.gemma_3_sae_huggingface_loader, repo, folder)

    tensors, _ = fresh()
    folder = "Llama3_1-8B-Base-L15R-8x"
    place = out / "llama-scope/Llama3_1-8B-Base-LXR-8x" / folder
    (place / "checkpoints").mkdir(parents=True)
    names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec", "decoder.bias": "b_dec"}
    weights = {ours: tensors[theirs].T.contiguous() for ours, theirs in names.items()}
    save_file(weights, place / "checkpoints/final.safetensors")
    norm, hook = 9.5, "blocks.15.hook_resid_post"
    config = {"d_model": D, "d_sae": N, "jump_relu_threshold": 0.9, "act_fn": "jumprelu"}
    config |= {"hook_point_in": hook, "hook_point_out": hook, "norm_activation": "dataset-wise"}
    config["dataset_average_activation_norm"] = {"in": norm, "out": norm}
    (place / "hyperparams.json").write_text(json.dumps(config))
    repo, scale = "fnlp/Llama3_1-8B-Base-LXR-8x", math.sqrt(D) / norm
    loaded("llama-scope", "llama-scope", loaders.llama_scope_sae_huggingface_loader, repo, folder, scale)

    tensors, _ = fresh()
    place = out / "qwen-scope/SAE-Res-Qwen3-8B-Base-W1K-L0_50"
    place.mkdir(parents=True)
    torch.save(
        {name: value.T.contiguous() if value.dim() == 2 else value for name, value in tensors.items()},
        place / "layer3.sae.pt",
    )
    repo = "Qwen/SAE-Res-Qwen3-8B-Base-W1K-L0_50"
    loaded("qwen-scope", "qwen-scope", loaders.qwen_scope_sae_huggingface_loader, repo, "layer3.sae.pt")


def sparsify(out, draw, x_BD):
    from sparsify import SparseCoder, SparseCoderConfig

    sae = filled(SparseCoder(D, SparseCoderConfig(num_latents=N, k=K)), draw)
    sae.save_to_disk(out / "sparsify" / "layers.3")
    sae = SparseCoder.load_from_disk(out / "sparsify" / "layers.3")
    encoded = sae.encode(x_BD)
    codes_BN = torch.zeros(len(x_BD), N).scatter(1, encoded.top_indices, encoded.top_acts)
    record(out, "sparsify", "sparsify", x_BD, codes_BN, sae.decode(encoded.top_acts, encoded.top_indices))


def dictionary_learning(out, draw, x_BD):
    from dictionary_learning.dictionary import AutoEncoder, GatedAutoEncoder, JumpReluAutoEncoder
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    kinds = {
        AutoEncoderTopK: {"k": K},
        BatchTopKSAE: {"k": K},
        MatryoshkaBatchTopKSAE: {"k": K, "group_sizes": [128, 384, N - 512]},
        JumpReluAutoEncoder: {},
        GatedAutoEncoder: {},
        AutoEncoder: {},
    }
    for made, options in kinds.items():
        kind = made.__name__
        sae = filled(made(activation_dim=D, dict_size=N, **options), draw)
        if "k" in options:
            sae.threshold.fill_(1.4)
        folder = out / kind / kind
        folder.mkdir(parents=True)
        torch.save(sae.state_dict(), folder / "ae.pt")
        trainer = {"dict_class": kind, "activation_dim": D, "dict_size": N, "layer": 3, "lm_name": "gpt2"}
        (folder / "config.json").write_text(json.dumps({"trainer": trainer | ({"k": K} if "k" in options else {})}))
        sae = made.from_pretrained(str(folder / "ae.pt"))
        codes_BN = sae.encode(x_BD)
        record(out, kind, "dictionary_learning", x_BD, codes_BN, sae.decode(codes_BN))


if __name__ == "__main__":
    torch.set_num_threads(1)
    name, folder, seed = sys.argv[1:]
    generator = torch.Generator().manual_seed(int(seed))
    Path(folder).mkdir(parents=True, exist_ok=True)
    with torch.no_grad():
        globals()[name](Path(folder), generator, torch.randn(ROWS, D, generator=generator))
