"""A rank's range of a flattened tensor, as a DTensor of the whole tensor's shape.

torch.distributed.checkpoint asks a tensor for its boxes if it can answer, and gathers what is a DTensor. So a piece
says that it is one, and answers for itself. It shares memory with the shard: what is loaded into it is in the shard.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate

from fxzero import torch_internals
from fxzero.checkpoint.boxes import Box, boxes_of
from fxzero.errors import CheckpointError
from fxzero.graph.tensor_parallel import TensorParallel

_ATEN = torch.ops.aten
_SHARING = (_ATEN.detach.default, _ATEN.alias.default)
_COPYING = (_ATEN.clone.default, _ATEN._to_copy.default, _ATEN.empty_like.default, _ATEN.zeros_like.default)


@dataclass(frozen=True)
class Whole:
    """The tensor that pieces of all ranks make up."""

    name: str
    shape: tuple[int, ...]
    ranges: tuple[tuple[int, int], ...]
    """Start and stop of each rank's piece in the flattened tensor, or in the part of it that these ranks have."""
    rank: int
    mesh: DeviceMesh
    gather: Callable[[Tensor, "Whole"], Tensor]
    """Makes the whole tensor of this rank's piece; a collective."""
    is_made_up: bool = False
    """True for state that stands for none, because the optimizer has not stepped."""
    local_shape: tuple[int, ...] | None = None
    """Shape of what `ranges` cut, if ranks of tensor parallelism have other parts of the tensor; None for the whole."""
    parallel: TensorParallel | None = None
    """The place of that part in the whole."""

    @property
    def boxes(self) -> list[Box]:
        """The boxes of this rank's piece."""
        if self.parallel is None or self.local_shape is None:
            return boxes_of(self.shape, *self.ranges[self.rank])
        return [box.moved(self.parallel.offsets) for box in boxes_of(self.local_shape, *self.ranges[self.rank])]

    @property
    def place(self) -> tuple[Any, ...]:
        """Equal for pieces of the same elements of tensors of one shape."""
        return self.shape, self.ranges, None if self.parallel is None else (self.local_shape, self.parallel.offsets)

    def __deepcopy__(self, memo: object) -> "Whole":
        return self


class Piece(DTensor):
    """Elements of one rank, flat, with the shape of the whole tensor.

    It can be copied, moved, filled from one of the same range, and gathered; nothing else is defined on it.
    """

    __slots__: list[str] = []  # the layout of a DTensor's, so that one can become a piece
    whole: Whole

    @staticmethod
    def of(flat: Tensor, whole: Whole) -> "Piece":
        """A piece that shares memory with `flat`, `[numel of this rank's range]`."""
        strides = tuple(math.prod(whole.shape[dim + 1 :]) for dim in range(len(whole.shape)))
        made = torch_internals.become_dtensor(Piece, flat, whole.mesh, whole.shape, strides)
        made.whole = whole
        return made

    @property
    def flat(self) -> Tensor:
        """The elements of this rank; shares memory."""
        return torch_internals.local_of(self)

    def like(self, flat: Tensor) -> "Piece":
        """Other elements for the same range."""
        return Piece.of(flat, self.whole)

    def __repr__(self) -> str:  # type: ignore[override]
        start, stop = self.whole.ranges[self.whole.rank]
        return f"Piece({self.whole.name}, {self.whole.shape}, [{start}, {stop}))"

    def __deepcopy__(self, memo: object) -> "Piece":
        return self.like(self.flat.clone())

    # -- what torch gathers and distributes ----------------------------------------------------------------------

    def full_tensor(self, **_: object) -> Tensor:  # type: ignore[override]
        """The whole tensor; a collective."""
        self._check_is_state()
        return self.whole.gather(self.flat, self.whole)

    def redistribute(self, device_mesh: object = None, placements: Any = None, **_: object) -> DTensor:  # type: ignore[override]
        """The whole tensor as a replicated DTensor, which is all that a piece can become; a collective."""
        if any(not placement.is_replicate() for placement in placements or ()):
            raise NotImplementedError("A piece of a tensor can be gathered, not sharded in another way.")
        return DTensor.from_local(self.full_tensor(), self.device_mesh, [Replicate()], run_check=False)

    def to_local(self, **_: object) -> Tensor:  # type: ignore[override]
        """Refused: a piece is a range of the flattened tensor, not a slice of its rows."""
        raise NotImplementedError("A piece has no local tensor of rows: use full_tensor(), or the parameter itself.")

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        """True, so that torch makes a new DTensor of a full tensor for it instead of writing rows into it."""
        return True

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch_internals.without_tensor_subclasses():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        options = {name: value for name, value in (kwargs or {}).items() if name != "memory_format"}
        own = args[0]
        if func in _SHARING:
            return own.like(own.flat.detach())
        if func in _COPYING:
            return own.like(func(own.flat, **options))
        if func is _ATEN.new_empty.default and tuple(args[1]) == tuple(own.shape):
            return own.like(torch.empty_like(own.flat, device=options.get("device"), dtype=options.get("dtype")))
        if func is _ATEN.copy_.default and isinstance(args[1], Piece) and args[1].whole.place == own.whole.place:
            own.flat.copy_(args[1].flat, *args[2:])
            return own
        raise NotImplementedError(f"{func} is not defined for a piece of {own.whole.name}; gather it first.")

    # -- what torch.distributed.checkpoint asks ------------------------------------------------------------------

    def __create_write_items__(self, fqn: str, tensor: object) -> list[WriteItem]:
        self._check_is_state()
        properties, size = TensorProperties(dtype=self.dtype), torch.Size(self.whole.shape)
        chunks = self.__create_chunk_list__()
        parts = [TensorWriteData(chunk, properties, size) for chunk in chunks]
        indices = [MetadataIndex(fqn, chunk.offsets) for chunk in chunks]
        return [
            WriteItem(index, WriteItemType.SHARD, tensor_data=part) for index, part in zip(indices, parts, strict=True)
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(box.offsets), torch.Size(box.sizes)) for box in self.whole.boxes]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        for box in self.whole.boxes:
            if torch.Size(box.offsets) == index.offset:
                return self.flat[box.begin : box.begin + box.numel].view(box.sizes)
        raise CheckpointError(f"This rank has no part of {index.fqn} that begins at {index.offset}.")

    def _check_is_state(self) -> None:
        if self.whole.is_made_up:
            raise CheckpointError(
                f"{self.whole.name} is state of an optimizer that has not stepped yet, and has none. Load a checkpoint "
                "into it, or save after the first step."
            )


torch_internals.copy_slots(Piece)
