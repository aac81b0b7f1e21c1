"""A GPU that computes nothing: torch's fake tensors on "cuda", and a count of what a real one would have to do.

Fake tensors have devices, dtypes and shapes, so that a mismatch raises as it would on a card, and so does whatever
needs a value on the host (a hidden synchronisation). Triton's kernels are counted in place of being launched.
With `host=True` what stands on the CPU stays real, so that code which plans on the host and works on the card runs
whole; whatever it asks the card for is made up: a number that counts its questions.
"""

from __future__ import annotations

import ctypes
import shutil
import subprocess
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from qwenscope.sae import triton_ops
from qwenscope.sae.sae import SAE
from qwenscope.training import triton_step

IN_PLACE = {"deltas", "parameter", "means", "squares"}
"""Arguments of kernels that are read and written."""
_MADE = ("new_zeros", "_like")
"""Operators that write what they make and read nothing."""
_NO_WORK = {"prim::device", "aten::empty.memory_format", "aten::new_empty", "aten::empty_like", "aten::_unsafe_view"}
_ROWS_ONLY = ("aten::embedding",)
"""Operators that read of their first tensor no more than they write."""
BYTES_PER_S, FLOP_PER_S = 4.3e12, 790e12
"""An H200 on paper."""

FOUND = 8
"""How many entries of a tensor on the card are true, or distinct, as far as the host is told."""


def _found(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return x.new_empty(FOUND, x.ndim, dtype=torch.int64)


def _number(x: Any) -> float:
    if x.constant is not None:  # one that the host made
        return float(x.constant) if x.dtype.is_floating_point else int(x.constant)
    return 1.0 if x.dtype.is_floating_point else int(x.dtype == torch.bool) or FOUND


def _distinct(x: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x[:FOUND].clone(), x.new_empty(len(x), dtype=torch.int64), x.new_empty(0, dtype=torch.int64)


def _chosen(x: Tensor, indices: Any, *_: Any, **__: Any) -> Tensor:
    """`x[mask]`, or with other indices besides."""
    masked = [index is not None and index.dtype == torch.bool for index in indices]
    plain = [_found(i).unbind(1) if mask else (i,) for i, mask in zip(indices, masked, strict=True)]
    return torch.ops.aten.index.Tensor(x, [index for part in plain for index in part])


_WAITS: dict[str, Any] = {
    "aten::_local_scalar_dense": _number,
    "aten::equal": lambda *_: False,
    "aten::nonzero": _found,
    "aten::unique_dim": _distinct,
    "aten::index.Tensor": _chosen,
}
"""What the host is told of values, where a test lets it wait for them."""


class Card(TorchDispatchMode):
    """Counts operators by name, Triton's kernels apart, and the bytes that all of them read and write.

    Each tensor that an operator reads or writes counts once: gathers from a matrix count as one pass over it, since a
    GPU's L2 cache holds a batch's rows.
    """

    def __init__(self, host: bool = False) -> None:
        super().__init__()
        self.host = host
        self.operators: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.kernel_bytes: Counter[str] = Counter()
        self.bytes = self.flops = self.to_host = 0
        self.held: dict[int, int] = {}
        self.in_use = self.peak = 0
        self.may_wait = False
        self.waits: Counter[str] = Counter()
        self.not_finite = 0  # values of each tensor that comes back to a real host

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.host and not _on_card(args, kwargs):
            with unset_fake_temporarily():
                return function(*args, **(kwargs or {}))
        if (answer := self.answer(function.name(), args)) is not None:
            self.waits[function.name()] += any(tensor.device.type == "cuda" for tensor in tensors(args))
            return answer(*args, **(kwargs or {}))
        if self.host and (answer := self.copied(function.name(), args, kwargs or {})) is not None:
            return answer
        if function.name() == "aten::exponential_":  # torch's fake one takes no generator
            return args[0]
        fused_adam = function.name().startswith("aten::_fused_adam_")
        made = self.fused_adam(*args, **kwargs) if fused_adam else function(*args, **(kwargs or {}))
        returns = [value.alias_info for value in function._schema.returns]
        view = bool(returns) and all(alias is not None and not alias.is_write for alias in returns)
        inputs = () if function.name().split(".")[0].endswith(_MADE) else (args, {**(kwargs or {}), "out": None})
        read, written = tensors(inputs), tensors(made)
        self.hold(written)
        if (
            not view
            and function.name() not in _NO_WORK
            and any(tensor.device.type == "cuda" for tensor in (*read, *written))
        ):
            self.operators[function.name()] += 1
            self.flops += _flops(function, args, made)
            self.stream(*(written if function.name() in _ROWS_ONLY else read), *written)
            self.to_host += any(t.is_cuda for t in read) and any(not t.is_cuda for t in written)
        return made

    def fused_adam(self, *lists: Any, **kwargs: Any) -> None:
        """Torch knows no fake one: what its CUDA kernel asks of its arguments, and what it writes."""
        weights, gradients, means, squares, _, steps = lists
        assert {tensor.dtype for tensor in (*weights, *gradients, *means, *squares)} == {weights[0].dtype}
        for number in (*steps, kwargs["lr"], kwargs["grad_scale"], kwargs["found_inf"]):
            assert number.dtype == torch.float32
            assert number.is_cuda
        self.stream(*weights, *means, *squares)

    def answer(self, name: str, args: Any) -> Any:
        """What is made up where the host asks for values, which fake tensors lack; None where it may not ask."""
        masked = any(index.dtype in (torch.bool, torch.uint8) for index in tensors(args[1:]))
        asks = self.may_wait and (name != "aten::index.Tensor" or masked)
        return _WAITS.get(name) if asks else None

    def copied(self, name: str, args: Any, kwargs: Any) -> Tensor | None:
        """Of a real host: count copies that it waits for, and say what comes back from the card."""
        on_card = {tensor.is_cuda for tensor in tensors(args) if tensor.ndim}
        if name == "aten::_to_copy" and torch.device(kwargs.get("device") or args[0].device).type == "cpu":
            assert self.may_wait, "a copy to the host waits for the card"
            self.waits["to host"] += 1
            with unset_fake_temporarily():
                told = torch.full(args[0].shape, self.waits["to host"], dtype=kwargs.get("dtype") or args[0].dtype)
                if self.not_finite:
                    told.view(-1)[: self.not_finite] = torch.inf
                return told
        to_card = len(on_card) == 2 or (name == "aten::_to_copy" and on_card == {False})
        if to_card and not kwargs.get("non_blocking", False):
            assert self.may_wait, f"{name}: a copy to the card that waits"
            self.waits["to card"] += 1
        return None

    @property
    def seconds(self) -> float:
        """By the traffic model: what was streamed and what was multiplied, one after the other."""
        return self.bytes / BYTES_PER_S + self.flops / FLOP_PER_S

    @contextmanager
    def waiting(self) -> Iterator[Counter[str]]:
        """In here the host may wait for the card: how often, by operator."""
        self.may_wait = True
        self.waits.clear()
        try:
            yield self.waits
        finally:
            self.may_wait = False

    def forget(self) -> None:
        """Count from here."""
        for counter in (self.operators, self.kernels, self.kernel_bytes):
            counter.clear()
        self.bytes = self.flops = self.to_host = 0
        self.peak = self.in_use

    def hold(self, made: list[Tensor]) -> None:
        """Count the memory of what was made for as long as it lives."""
        for tensor in made:
            storage = tensor.untyped_storage()
            if tensor.is_cuda and storage._cdata not in self.held:
                self.held[storage._cdata] = storage.nbytes()
                self.in_use += storage.nbytes()
                weakref.finalize(storage, self.let_go, storage._cdata)
        self.peak = max(self.peak, self.in_use)

    def let_go(self, key: int) -> None:
        self.in_use -= self.held.pop(key)

    def stream(self, *passed: Tensor) -> None:
        """Count one pass over each."""
        self.bytes += sum(tensor.numel() * tensor.itemsize for tensor in passed)


class Launches:
    """In a kernel's place: counts its launches and one pass over each of its tensors, two over those in IN_PLACE."""

    def __init__(self, card: Card, kernel: Any) -> None:
        self.card, self.kernel = card, kernel
        self.name = kernel.fn.__name__.strip("_").removesuffix("_kernel")

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, UPDATE: bool = True, **sizes: Any) -> None:
            name = self.name if UPDATE else f"{self.name}, norm alone"
            before = self.card.bytes
            for argument, value in zip(self.kernel.arg_names, args, strict=False):
                if isinstance(value, Tensor) and argument != "pieces":  # most are neither written nor read
                    assert value.is_cuda, (name, argument)
                    strided = argument == "x" and "stride" in self.kernel.arg_names and value.stride(-1) == 1
                    assert value.is_contiguous() or strided, (name, argument)
                    self.card.stream(*[value] * (2 if argument in IN_PLACE and UPDATE else 1))
            self.card.kernels[name] += 1
            self.card.kernel_bytes[name] += self.card.bytes - before

        return launch


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _on_card(args: Any, kwargs: Any) -> bool:
    """Whether an operator has to do with the card: reads what is there, or makes something there."""
    device = (kwargs or {}).get("device")
    made_there = device is not None and torch.device(device).type == "cuda"
    return made_there or any(isinstance(tensor, FakeTensor) for tensor in tensors((args, kwargs)))


def _flops(function: Any, args: Any, made: Any) -> int:
    """Of matrix products and convolutions; torch knows all but the grouped product of rows that are dealt to groups."""
    if function.name() == "aten::_grouped_mm":
        return 2 * args[0].numel() * args[1].shape[-1]
    formula = flop_registry.get(function.overloadpacket)
    return formula(*args, out_val=made) if formula else 0


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
def fake_card(monkeypatch: pytest.MonkeyPatch, *, host: bool = False) -> Iterator[Card]:
    """Tensors made in here on "cuda" are fake, and the card counts what happens to them; `host`: others are real."""
    load_guard()
    card = Card(host)

    for module in (triton_ops, triton_step):
        for name, kernel in vars(module).copy().items():
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Launches(card, kernel))
    with FakeTensorMode(allow_non_fake_inputs=host), card:
        yield card


def on_card(sae: SAE, dtype: torch.dtype = torch.float32) -> SAE:
    """The same SAE, of fake tensors, on the card (`Module.to` cannot swap fake parameters)."""
    for part in sae.modules():
        for name, value in part._parameters.items():
            if value is not None:
                part._parameters[name] = torch.nn.Parameter(value.detach().to("cuda", dtype))
    return sae
