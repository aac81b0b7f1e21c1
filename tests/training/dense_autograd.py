"""The training step written the slow and obvious way: dense tensors, autograd, torch.optim.Adam."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qwenscope.sae.sae import SAE, TopKSAE
from qwenscope.sae.selection import Selector
from qwenscope.training.trainer import SAETrainer


@dataclass
class DenseLoss:
    loss: Tensor
    fvu: Tensor
    aux: Tensor
    codes: Tensor


class DenseTrainer:
    """Same loss as SAETrainer; `dead` and the support of the top-k are given, or computed with torch.topk."""

    def __init__(
        self,
        sae: TopKSAE,
        lr: float = 1e-3,
        *,
        aux_k: int = 0,
        coefficient: float = 1 / 32,
        clip: float | None = 1.0,
        cautious: bool = False,
    ):
        self.k, self.aux_k, self.coefficient, self.clip = sae.k, aux_k, coefficient, clip
        self.cautious = cautious
        state = sae.state_dict()
        self.parameters = {
            "encoder": state["encoder.weight"].clone(),
            "encoder_bias": state["encoder.bias"].clone(),
            "decoder": state["decoder.weight"].T.contiguous().clone(),
            "pre_bias": state["pre_bias"].clone(),
        }
        for value in self.parameters.values():
            value.requires_grad_(True)
        self.adam = torch.optim.Adam(self.parameters.values(), lr=lr, betas=(0.9, 0.999), eps=6.25e-10)

    def loss(self, x: Tensor, dead: Tensor | None = None, support: Tensor | None = None) -> DenseLoss:
        p = self.parameters
        pre = (x - p["pre_bias"]) @ p["encoder"].T + p["encoder_bias"]
        if support is None:
            support = pre.topk(self.k, dim=1).indices
        mask = torch.zeros_like(pre).scatter(1, support, 1.0)
        codes = pre.relu() * mask
        e = x - (codes @ p["decoder"] + p["pre_bias"])
        fvu = e.square().sum() / (x - x.mean(0)).square().sum()
        aux = torch.zeros((), dtype=x.dtype)
        if dead is not None and dead.any():
            hidden = pre.masked_fill(~dead, -torch.inf)
            chosen = hidden.topk(min(self.aux_k, int(dead.sum())), dim=1).indices
            aux_codes = pre * torch.zeros_like(pre).scatter(1, chosen, 1.0)
            left = e.detach()
            e_hat = aux_codes @ p["decoder"]
            aux = (left - e_hat).square().sum() / (left - left.mean(0)).square().sum()
        return DenseLoss(fvu + self.coefficient * aux, fvu, aux, codes.detach())

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Projected, then clipped, gradients by name."""
        self.adam.zero_grad()
        loss.backward()
        p = self.parameters
        along = (p["decoder"].grad * p["decoder"].detach()).sum(1, keepdim=True)
        p["decoder"].grad -= along * p["decoder"].detach()
        self.norm = torch.stack([value.grad.norm() for value in p.values()]).norm()
        if self.clip is not None:
            torch.nn.utils.clip_grad_norm_(list(p.values()), self.clip)
        return {name: value.grad for name, value in p.items()}

    def step(self, x: Tensor, dead: Tensor | None = None) -> DenseLoss:
        result = self.loss(x, dead)
        self.gradients(result.loss)
        before = {name: value.detach().clone() for name, value in self.parameters.items()}
        self.adam.step()
        with torch.no_grad():
            for name in ("encoder", "decoder") if self.cautious else ():
                value = self.parameters[name]
                against = self.adam.state[value]["exp_avg"] * value.grad <= 0
                value[against] = before[name][against]
            decoder = self.parameters["decoder"]
            decoder /= decoder.norm(dim=1, keepdim=True)
        return result


def support_of(sae: TopKSAE, x: Tensor, trainer: SAETrainer) -> Tensor:
    """The latents that the trainer selects, so that ties are broken alike."""
    rows = x - sae.pre_bias.detach()
    weight, bias = sae.encoder.weight.detach(), sae.encoder.bias.detach()
    return Selector(sae.k, trainer.precision)(rows, weight, trainer.weights.encoder, bias).indices


def leaves(sae: SAE) -> dict[str, Tensor]:
    """Copies of an SAE's tensors that take gradients, by the trainer's names, with a row for each latent."""
    tensors = {
        "encoder": sae.encoder.weight,
        "encoder_bias": sae.encoder.bias,
        "decoder": sae.decoder.weight.T,
        "pre_bias": sae.pre_bias,
    }
    return {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
