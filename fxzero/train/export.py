"""A safetensors file written tensor by tensor: only the one that is being written is ever in memory.

The library (safetensors 0.8) wants all tensors at once. The format: the length of the header (8 bytes, little endian),
the header (JSON: name -> dtype, shape, data_offsets; padded with spaces to 8 bytes), then the bytes of the tensors. The
order of the tensors here is that of the library.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Names in the format, in the order in which the library stores tensors: by dtype, then by name."""


@dataclass(frozen=True)
class TensorSpec:
    """Shape and dtype of a tensor that comes later."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @classmethod
    def of(cls, tensor: torch.Tensor) -> TensorSpec:
        """That of a tensor, which may be on the meta device."""
        return cls(tuple(tensor.shape), tensor.dtype)


def save_stream(
    path: Path,
    specs: Mapping[str, TensorSpec],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as they come, in any order, to a file that exists only once it is complete.

    Args:
        specs: every tensor of the file by name.
        tensors: name and value of each, once; a value is read before the next one is asked for.
        metadata: free text that is stored in the header.

    Raises:
        ValueError: a tensor that came is not the one announced, or one did not come.
    """
    order = {dtype: index for index, dtype in enumerate(_DTYPES)}
    names = sorted(specs, key=lambda name: (order[specs[name].dtype], name))
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    for name in names:
        begins[name], end = end, end + specs[name].num_bytes
        header[name] = {
            "dtype": _DTYPES[specs[name].dtype],
            "shape": list(specs[name].shape),
            "data_offsets": [begins[name], end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        data = file.tell()
        file.truncate(data + end)
        for name, tensor in tensors:
            if name not in begins or TensorSpec.of(tensor) != specs[name]:
                raise ValueError(
                    f"{name} {TensorSpec.of(tensor)} is not among the tensors announced, or was written before"
                )
            file.seek(data + begins.pop(name))
            file.write(_bytes_of(tensor))
    if begins:
        raise ValueError(f"{len(begins)} tensors were announced and did not come: {', '.join(list(begins)[:5])}")
    os.replace(partial, path)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little endian; this machine is not")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tied_names(model: nn.Module) -> dict[str, str]:
    """Each further name of a parameter that the model has under several, with the name it is stored under."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if first.setdefault(id(parameter), name) != name:
            tied[name] = first[id(parameter)]
    return tied
