"""What is known of a call of an island before a step is traced."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fxzero.capture.islands.geometry import Geometry
from fxzero.capture.outputs import OutputSpec
from fxzero.torch_internals import tree_flatten


@dataclass(frozen=True)
class Facts:
    """What a probe learnt of a call."""

    output: OutputSpec
    outs: tuple[Geometry, ...]
    """Of the results of forward: tensors of the output, written inputs, written buffers."""
    shares_memory: Mapping[int, int]
    """Which tensors of the output share memory with an input, a parameter or a buffer, as indices of both."""
    siblings: tuple[int, ...]
    """Which tensors of the output share memory with another one."""
    keeps: tuple[tuple[str, str], ...]
    """Attributes in which it keeps tensors that require grad: paths of modules inside, and keys."""
    written_inputs: tuple[int, ...]
    written_buffers: tuple[int, ...]
    written_in_backward: tuple[int, ...]
    """Buffers that backward writes, where a checkpoint runs forward again."""
    saved_inputs: tuple[int, ...]
    """Inputs that backward reads."""
    escapes: bool
    """Backward reads a weight or an input where no hook sees it, so that forward works on copies of its own."""
    held_bytes: int
    """Bytes between forward and backward, beside the inputs."""
    grad_strides: tuple[tuple[int, ...] | None, ...]
    """Those of the gradients of inputs that require grad; None where there was none."""
    flops: tuple[int, int]
    """Floating-point operations of forward and of backward, on the data of the probe."""


UNKNOWN = Facts(OutputSpec(tree_flatten(None)[1], ()), (), {}, (), (), (), (), (), (), False, 0, (), (0, 0))
"""Facts of a call before its probe."""


@dataclass(frozen=True)
class Modes:
    """The modes of torch in which a call runs."""

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype
    caches_casts: bool
