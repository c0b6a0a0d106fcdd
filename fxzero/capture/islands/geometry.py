"""What is known of a tensor without its values."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzero import torch_internals


@dataclass(frozen=True)
class Geometry:
    """Shape, strides, dtype and device of a tensor, and whether it requires grad."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @staticmethod
    def of(tensor: Tensor) -> "Geometry":
        """The geometry of a tensor, as it is."""
        shape, stride = tuple(tensor.shape), tuple(tensor.stride())
        return Geometry(shape, stride, tensor.dtype, tensor.device, tensor.requires_grad)

    @staticmethod
    def dense(tensor: Tensor) -> "Geometry":
        """That of a copy: its own strides if they leave no holes, else those of a contiguous tensor."""
        shape = tuple(tensor.shape)
        return Geometry(shape, dense_stride(tensor), tensor.dtype, tensor.device, tensor.requires_grad)

    def empty(self) -> Tensor:
        """A new tensor without values."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)

    def fits(self, tensor: Tensor) -> bool:
        """True for a tensor of the same shape, dtype and device."""
        return (tensor.shape, tensor.dtype, tensor.device) == (self.shape, self.dtype, self.device)

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)} on {self.device}"


def dense_stride(tensor: Tensor) -> tuple[int, ...]:
    """The strides of a copy of a tensor without holes: its own if it has none, else those of a contiguous tensor."""
    expected, own = 1, tuple(tensor.stride())
    for stride, size in sorted(zip(own, tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return torch_internals.strides_of(tensor.shape)
        expected *= size
    return own


def geometries(tensors: Sequence[Tensor]) -> tuple[Geometry, ...]:
    """The geometry of each tensor."""
    return tuple(map(Geometry.of, tensors))
