"""A GPU that computes nothing: torch's fake tensors on "cuda", and a count of what a real one would have to do.

Fake tensors have devices, dtypes and shapes, so that a mismatch raises as it would on a card, and so does whatever
needs a value on the host (a hidden synchronisation). Triton's kernels are replaced by what they allocate.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qwenscope.sae import triton_ops
from qwenscope.sae.sae import SAE

_NO_WORK = {"prim::device", "aten::empty.memory_format", "aten::new_empty", "aten::empty_like"}


class Card(TorchDispatchMode):
    """Counts operators by name, Triton's kernels apart, and the bytes that all of them read and write.

    Each tensor that an operator reads or writes counts once: gathers from a matrix count as one pass over it, since a
    GPU's L2 cache holds a batch's rows.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.bytes = 0
        self.to_host = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        fused_adam = function.name().startswith("aten::_fused_adam_")
        made = self.fused_adam(*args, **kwargs) if fused_adam else function(*args, **(kwargs or {}))
        returns = [value.alias_info for value in function._schema.returns]
        view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        read, written = tensors((args, kwargs)), tensors(made)
        if (
            not view
            and function.name() not in _NO_WORK
            and any(tensor.device.type == "cuda" for tensor in (*read, *written))
        ):
            self.operators[function.name()] += 1
            self.stream(*read, *written)
            self.to_host += any(t.is_cuda for t in read) and any(not t.is_cuda for t in written)
        return made

    def fused_adam(self, *lists: Any, **kwargs: Any) -> None:
        """Torch knows no fake one: what its CUDA kernel asks of its arguments, and what it writes."""
        weights, gradients, means, squares, _, (steps,) = lists
        assert {tensor.dtype for tensor in (*weights, *gradients, *means, *squares)} == {weights[0].dtype}
        for number in (steps, kwargs["lr"], kwargs["grad_scale"], kwargs["found_inf"]):
            assert number.dtype == torch.float32
            assert number.is_cuda
        self.stream(*weights, *means, *squares)

    def totals(self) -> tuple[int, int, int]:
        """Operators, bytes, and operators that hand a result to the host."""
        return self.operators.total(), self.bytes, self.to_host

    def stream(self, *passed: Tensor) -> None:
        """Count one pass over each."""
        self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in passed)


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


@cache
def load_guard() -> None:
    """Compile and load `guard.cpp`, unless torch has a guard of its own."""
    if torch.version.cuda is not None:
        return
    if (compiler := shutil.which("g++")) is None:
        pytest.skip("no C++ compiler")
    torch_folder = Path(torch.__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "guard.so"
        command = [compiler, "-std=c++20", "-O0", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
        command += [str(Path(__file__).with_name("guard.cpp")), f"-L{torch_folder / 'lib'}", "-lc10"]
        subprocess.run([*command, "-o", str(library)], check=True)
        ctypes.CDLL(str(library))


@contextmanager
def fake_card(monkeypatch: pytest.MonkeyPatch) -> Iterator[Card]:
    """Tensors made in here on "cuda" are fake, and the card counts what happens to them."""
    load_guard()
    card = Card()

    def kernel(name: str, made: Any, *passed: Tensor) -> Any:
        card.kernels[name] += 1
        card.stream(*passed, *tensors(made))
        return made

    def top_k(scores_RN: Tensor, k: int) -> tuple[Tensor, Tensor]:
        assert scores_RN.is_contiguous()
        assert scores_RN.dtype == torch.bfloat16
        indices = torch.empty(len(scores_RN), k, dtype=torch.int64, device=scores_RN.device)
        made: tuple[Tensor, Tensor] = kernel("top_k", (scores_RN.new_empty(len(scores_RN), k), indices), scores_RN)
        return made

    def products(table_ND: Tensor, x_BD: Tensor, latents_P: Tensor, rows_P: Tensor) -> Tensor:
        made: Tensor = kernel(
            "products", table_ND.new_empty(len(rows_P), dtype=torch.float32), table_ND, x_BD, latents_P, rows_P
        )
        return made

    def weighted_sums(x_BD: Tensor, rows: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
        out = x_BD.new_empty(len(offsets) - 1, x_BD.shape[1], dtype=torch.float32)
        made: Tensor = kernel("weighted_sums", out, x_BD, rows, weights, offsets)
        return made

    def project(gradient_ND: Tensor, decoder_ND: Tensor | None) -> Tensor:
        passed = [gradient_ND] if decoder_ND is None else [gradient_ND, gradient_ND, decoder_ND]
        made: Tensor = kernel("project", gradient_ND.new_empty(len(gradient_ND)), *passed)
        return made

    def adam(
        parameter: Tensor,
        gradient: Tensor,
        means: Tensor,
        squares: Tensor,
        shadow: Tensor | None,
        numbers: Tensor,
        *_: Any,
        unit: bool,
    ) -> None:
        assert (parameter.dtype, gradient.dtype, numbers.dtype) == (torch.float32,) * 3
        kernel("adam", shadow, gradient, *2 * [parameter, means, squares])

    for function in (top_k, products, weighted_sums, project, adam):
        monkeypatch.setattr(triton_ops, function.__name__, function)
    with FakeTensorMode(), card:
        yield card


def on_card(sae: SAE, dtype: torch.dtype = torch.float32) -> SAE:
    """The same SAE, of fake tensors, on the card (`Module.to` cannot swap fake parameters)."""
    for part in sae.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(value.detach().to("cuda", dtype))
    return sae
