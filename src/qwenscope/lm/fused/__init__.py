"""Parts of a language model as one Triton kernel each on CUDA: norms, what stands around the experts' products, and
the short convolution of Gated DeltaNet. In plain torch each is several operators that read and write whole activations.

A part is admitted once its own code and the kernel agree on random rows, where it stands; others, other dtypes, CPUs,
and rows that need a gradient keep what they have.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import nn

from qwenscope.lm.fused.admission import is_current


def fuse(model: nn.Module) -> None:
    """Make the parts of `model` that stand on the current GPU run as kernels, where these give the same values."""
    if find_spec("triton") is None or not any(is_current(weight) for weight in model.parameters()):
        return
    from qwenscope.lm.fused import convolution, experts, norms  # triton takes a while, and may be absent

    for part in (norms, experts, convolution):
        part.fuse(model)
