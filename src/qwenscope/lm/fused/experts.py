"""What stands around the experts' two grouped products: gate and activation in one kernel, and in another the sum of
each token's weighted results, read where they lie, with a shared expert's.

transformers hands the experts of all families to a function that is registered under the name of an implementation;
here `grouped_mm` is chosen by rows. A block with a shared expert adds it beside, and is chosen whole.

Legend: T tokens, D hidden, K experts of a token, P = T K pairs sorted by expert, E experts, I inner width.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor, nn
from transformers.integrations.moe import (
    ALL_EXPERTS_FUNCTIONS,
    _default_apply_gate,
    _grouped_linear,
    grouped_mm_experts_forward,
)

from qwenscope.lm.fused.admission import PROBE_ROWS, ROUNDING, agree, is_current, prefer, probe, takes, trains
from qwenscope.lm.fused.rounding import rounded

_GROUPED = "grouped_mm"
_BLOCK = 2048
"""Values of one program, eight to a thread."""
_SHARED = ("gate", "experts", "shared_expert", "shared_expert_gate")
"""Parts of a block with a shared expert."""
_admitted: dict[tuple[Any, ...], bool] = {}


@triton.jit  # type: ignore[untyped-decorator]
def _gate_kernel(x, gated, rows, d, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr):  # type: ignore[no-untyped-def]
    """silu of a row's first half times its second, BLOCK_R rows per program."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (column < d)[None, :]
    place = row[:, None] * (2 * d) + column[None, :]
    gate = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x + place + d, mask=inside, other=0.0).to(tl.float32)
    value = rounded(rounded(gate * tl.sigmoid(gate)) * up)
    tl.store(gated + row[:, None] * d + column[None, :], value.to(tl.bfloat16), mask=inside)


@triton.jit  # type: ignore[untyped-decorator]
def _combine_kernel(  # type: ignore[no-untyped-def]
    results, places, weights, ends, shared, opened, combined, d, experts,
    K: tl.constexpr, SHARED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One token per program and block of columns; pairs beyond the last expert's (another process') add nothing."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = column < d
    dealt = tl.load(ends + experts - 1)
    total = tl.zeros((BLOCK_D,), tl.float32)
    for k in tl.static_range(K):
        place = tl.load(places + token * K + k)
        weight = tl.load(weights + token * K + k).to(tl.float32)
        width = tl.where(place < dealt, d, 0)
        value = tl.load(results + place * d + column, mask=column < width, other=0.0).to(tl.float32)
        total += rounded(value * weight)
    total = rounded(total)
    if SHARED:
        gate = rounded(tl.sigmoid(tl.load(opened + token).to(tl.float32)))
        total = rounded(total + rounded(gate * tl.load(shared + token * d + column, mask=inside).to(tl.float32)))
    tl.store(combined + token * d + column, total.to(tl.bfloat16), mask=inside)


def fuse(model: nn.Module) -> None:
    """Make experts on the current GPU, and blocks that add a shared one to them, choose by rows."""
    for module in model.modules():
        experts = module.experts if all(hasattr(module, part) for part in _SHARED) else module
        if not (key := _key(module, experts)):
            continue
        if key not in _admitted:
            _admitted[key] = agrees(module)
        if experts is not module:
            kind = type(module)
            kind.forward = prefer(block, kind.forward, _block_fits)
        else:
            ALL_EXPERTS_FUNCTIONS[_GROUPED] = prefer(routed, ALL_EXPERTS_FUNCTIONS[_GROUPED], _experts_fit)


def routed(
    experts: Any, x_TD: Tensor, chosen_TK: Tensor, weights_TK: Tensor, shared: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """The sum over each token's experts, weighted.

    Args:
        experts: transformers' module, gated, without biases.
        x_TD: bfloat16 rows.
        chosen_TK: which experts; those beyond the module's number are another process' and add nothing.
        weights_TK: bfloat16.
        shared: bfloat16 [T, D] and [T, 1]: what a shared expert returns, and what its gate says before its sigmoid.

    Returns:
        bfloat16 [T, D].
    """
    k, n = chosen_TK.shape[1], experts.num_experts
    expert_P, order_P = torch.sort(chosen_TK.reshape(-1))
    ends_E = torch.histc(_countable(expert_P), bins=n, min=0, max=n - 1).cumsum(0, dtype=torch.int32)
    inner_PI2 = _grouped_linear(x_TD[order_P // k], experts.gate_up_proj, ends_E)
    results_PD = _grouped_linear(gated(inner_PI2), experts.down_proj, ends_E)
    place_P = torch.empty_like(order_P)
    place_P[order_P] = torch.arange(len(order_P), device=order_P.device)
    return combined(results_PD, place_P, weights_TK.contiguous(), ends_E, shared)


def gated(x_PI2: Tensor) -> Tensor:
    """silu(left half) times right half, bfloat16 [P, 2 I] -> [P, I]."""
    rows, width = len(x_PI2), x_PI2.shape[1] // 2
    made = torch.empty(rows, width, dtype=x_PI2.dtype, device=x_PI2.device)
    block_d = triton.next_power_of_2(width)
    block_r = max(1, _BLOCK // block_d)
    _gate_kernel[(triton.cdiv(rows, block_r),)](
        x_PI2, made, rows, width, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=min(32, max(1, block_r * block_d // 256))
    )
    return made


def combined(
    results_PD: Tensor, place_P: Tensor, weights_TK: Tensor, ends_E: Tensor, shared: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Each token's weighted results, its k-th at `place_P[token * K + k]`, and `shared` as in `routed`."""
    (tokens, k), d = weights_TK.shape, results_PD.shape[1]
    made = torch.empty(tokens, d, dtype=results_PD.dtype, device=results_PD.device)
    block_d = min(_BLOCK, triton.next_power_of_2(d))
    _combine_kernel[(tokens, triton.cdiv(d, block_d))](
        results_PD, place_P, weights_TK, ends_E, *(shared or (None, None)), made, d, len(ends_E),
        K=k, SHARED=shared is not None, BLOCK_D=block_d, num_warps=max(1, block_d // 256),
    )  # fmt: skip
    return made


def block(module: Any, x: Tensor) -> Tensor:
    """A block with a shared expert: bfloat16 [..., D] -> the same."""
    x_TD = x.reshape(-1, x.shape[-1])
    _, weights_TK, chosen_TK = module.gate(x_TD)
    shared = module.shared_expert(x_TD).contiguous(), module.shared_expert_gate(x_TD).contiguous()
    return routed(module.experts, x_TD, chosen_TK, weights_TK, shared).view(x.shape)


def agrees(module: Any) -> bool:
    """Whether experts, or a block with a shared one, return what they did. A rounding that turns the other way before
    the second product reaches every column: the slack.
    """
    whole = hasattr(module, "experts")
    experts = module.experts if whole else module

    def compare() -> tuple[Tensor, Tensor, Tensor]:
        e, d, k = experts.num_experts, experts.down_proj.shape[1], min(8, experts.num_experts)
        x_TD, scores_TE = probe(experts.down_proj, (PROBE_ROWS, d), (PROBE_ROWS, e))
        if whole:
            expected, got = type(module).forward(module, x_TD[None]), block(module, x_TD[None])
        else:
            weights_TK, chosen_TK = scores_TE.softmax(1).topk(k)
            expected = grouped_mm_experts_forward(experts, x_TD, chosen_TK, weights_TK)
            got = routed(experts, x_TD, chosen_TK, weights_TK)
        return expected, got, 2 * ROUNDING * expected.float().square().mean().sqrt()

    return agree(type(module).__name__, compare)


def _key(module: Any, experts: Any) -> tuple[Any, ...]:
    """Under which it is admitted; empty where it is none, not of the kind that the kernels know, or elsewhere."""
    weight = getattr(experts, "gate_up_proj", None)
    if not (isinstance(weight, Tensor) and is_current(weight) and getattr(experts, "has_gate", False)):
        return ()
    if experts.has_bias or experts.is_transposed or getattr(experts, "has_post_expert_norm", False):
        return ()
    if type(experts)._apply_gate is not _default_apply_gate or weight.dtype != torch.bfloat16:
        return ()
    key = type(module), type(experts), type(experts.act_fn), weight.shape
    return key if experts.config._experts_implementation == _GROUPED else ()


def _experts_fit(experts: Any, *inputs: Any, **named: Any) -> bool:
    if len(inputs) != 3 or named or not (takes(inputs[0]) and takes(inputs[2])):
        return False
    return _admitted.get(_key(experts, experts), False) and not trains(experts)


def _block_fits(module: Any, *inputs: Tensor, **named: Any) -> bool:
    alone = len(inputs) == 1 and not named
    if not (alone and takes(inputs[0]) and _admitted.get(_key(module, module.experts), False)):
        return False
    hooked = module.experts._forward_hooks or module.experts._forward_pre_hooks or "forward" in vars(module.experts)
    return not hooked and not trains(module)


def _countable(expert_P: Tensor) -> Tensor:
    """`torch.histc` counts integers on a GPU and floats on a CPU."""
    return expert_P.int() if expert_P.is_cuda else expert_P.float()
