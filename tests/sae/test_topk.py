"""TopKSAE: contract of the module, and its sparse autograd against a dense one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from qwenscope.errors import FormatError
from qwenscope.sae.sae import Codes, TopKSAE


def make_sae(hidden: int = 6, latents: int = 20, k: int = 3) -> TopKSAE:
    sae = TopKSAE(hidden, latents, k, seed=4)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in sae.parameters():
            value += 0.2 * torch.randn(value.shape, generator=generator)
    return sae


def dense_forward(sae: TopKSAE, x: Tensor) -> Tensor:
    pre = (x - sae.pre_bias) @ sae.encoder.weight.T + sae.encoder.bias
    mask = torch.zeros_like(pre).scatter(-1, pre.topk(sae.k, dim=-1).indices, 1.0)
    return (pre.relu() * mask) @ sae.decoder.weight.T + sae.pre_bias


def test_shapes_dtypes_and_keys() -> None:
    sae = TopKSAE(6, 20, 3)
    shapes = {name: tuple(value.shape) for name, value in sae.state_dict().items()}
    assert shapes == {"encoder.weight": (20, 6), "encoder.bias": (20,), "decoder.weight": (6, 20), "pre_bias": (6,)}
    assert all(value.dtype == torch.float32 for value in sae.state_dict().values())
    torch.testing.assert_close(sae.decoder.weight.norm(dim=0), torch.ones(20))
    codes = sae.encode(torch.randn(2, 5, 6))
    assert codes.values.shape == codes.indices.shape == (2, 5, 3)
    assert codes.dense().shape == (2, 5, 20)
    assert sae(torch.randn(2, 5, 6)).shape == (2, 5, 6)
    assert sae(torch.randn(6)).shape == (6,)
    assert sae(torch.randn(0, 6)).shape == (0, 6)


def test_seed_decides_the_start() -> None:
    assert torch.equal(TopKSAE(6, 20, 3, seed=1).decoder.weight, TopKSAE(6, 20, 3, seed=1).decoder.weight)
    assert not torch.equal(TopKSAE(6, 20, 3, seed=1).decoder.weight, TopKSAE(6, 20, 3, seed=2).decoder.weight)


@pytest.mark.parametrize("sizes", [(0, 4, 1), (4, 0, 1), (4, 8, 0), (4, 8, 9), (4, -8, 1)])
def test_impossible_sizes(sizes: tuple[int, int, int]) -> None:
    with pytest.raises(FormatError, match="no SAE has"):
        TopKSAE(*sizes)


@pytest.mark.parametrize(("hidden", "latents", "k"), [(6, 20, 3), (5, 9, 9), (7, 33, 1)])
def test_gradients_equal_dense_autograd(hidden: int, latents: int, k: int) -> None:
    """Of every parameter and of the input, for a loss that mixes the reconstruction's entries."""
    sae = make_sae(hidden, latents, k).double()
    generator = torch.Generator().manual_seed(6)
    mixer = torch.randn(11, hidden, generator=generator, dtype=torch.float64)
    results = []
    for forward in (sae.forward, lambda x: dense_forward(sae, x)):
        x = torch.randn(11, hidden, generator=torch.Generator().manual_seed(7)).double().requires_grad_(True)
        sae.zero_grad()
        loss = (forward(x) * mixer).square().sum()
        loss.backward()
        results.append([loss.detach(), x.grad, *[value.grad.clone() for value in sae.parameters()]])
    for sparse, dense in zip(*results, strict=True):
        torch.testing.assert_close(sparse, dense, rtol=1e-9, atol=1e-10)


def test_gradcheck() -> None:
    sae = make_sae().double()
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(8)).double().requires_grad_(True)
    assert torch.autograd.gradcheck(sae, x)
    (gradient,) = torch.autograd.grad(sae(x).pow(3).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        gradient.sum().backward()


def test_codes_decode_and_dense() -> None:
    sae = make_sae()
    x = torch.randn(30, 6)
    codes = sae.encode(x)
    assert (codes.values >= 0).all()
    dense = codes.dense()
    assert torch.equal(dense.gather(1, codes.indices), codes.values)
    torch.testing.assert_close(sae.decode(codes), dense @ sae.decoder.weight.T + sae.pre_bias)
    torch.testing.assert_close(sae(x), dense_forward(sae, x))
    one = Codes(torch.tensor([[2.0]]), torch.tensor([[7]]), 20)
    torch.testing.assert_close(sae.decode(one)[0], 2 * sae.decoder.weight[:, 7] + sae.pre_bias)


def test_negative_pre_activations_give_zeros() -> None:
    sae = make_sae()
    with torch.no_grad():
        sae.encoder.bias -= 100
    assert not sae.encode(torch.randn(5, 6)).values.any()
    torch.testing.assert_close(sae(torch.randn(5, 6)), sae.pre_bias.expand(5, 6))


def test_saved_files_are_the_published_format(tmp_path: Path) -> None:
    sae = make_sae()
    sae.config["layer"] = 23
    sae.save(tmp_path / "sae_attn_mid")
    folder = tmp_path / "sae_attn_mid"
    config = json.loads((folder / "config.json").read_text())
    assert {key: config[key] for key in ("hidden_dim", "dict_size", "k")} == {"hidden_dim": 6, "dict_size": 20, "k": 3}
    assert config["layer"] == 23
    weights = load_file(folder / "weights.safetensors")
    assert all(torch.equal(weights[name], value) for name, value in sae.state_dict().items())
    with safe_open(folder / "weights.safetensors", "pt") as file:
        assert json.loads(file.metadata()["config"])["layer"] == 23
    again = TopKSAE.from_pretrained(tmp_path, sae_id="sae_attn_mid")
    assert again.config == config
    x = torch.randn(9, 6)
    assert torch.equal(again(x), sae(x))
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "weights.safetensors"]
