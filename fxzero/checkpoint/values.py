"""Plain values and small tensors as JSON, from which they come back as they were; nothing that is read runs code."""

import base64
import math
from collections import Counter, OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fxzero.errors import CheckpointError

DTYPES: Mapping[str, torch.dtype] = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64),
    )
}
"""The dtypes of tensors in a checkpoint, by name."""
_DICTS: Mapping[str, type[Any]] = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}


def name_of_dtype(dtype: torch.dtype) -> str:
    """The name of a dtype in a checkpoint."""
    return str(dtype).removeprefix("torch.")


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor; without a copy if it is contiguous and on the CPU."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def encode(value: Any, name: str) -> Any:
    """A value as what json can write.

    Args:
        name: of the value, for the error.

    Raises:
        CheckpointError: it is, or contains, something else than numbers, texts, None, bytes, tensors, arrays, and
            lists, tuples and dicts of them.
    """
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"float": repr(float(value))}
    if kind is list:
        return [encode(each, f"{name}[{index}]") for index, each in enumerate(value)]
    if kind is tuple:
        return {"tuple": [encode(each, f"{name}[{index}]") for index, each in enumerate(value)]}
    if kind in _DICTS.values():
        pairs = [[encode(key, name), encode(each, f"{name}[{key!r}]")] for key, each in value.items()]
        return {kind.__name__: pairs}
    if kind is bytes:
        return {"bytes": _text(value)}
    if isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
        return {"array": [value.dtype.str, list(value.shape), _text(value.tobytes())]}
    if isinstance(value, Tensor) and name_of_dtype(value.dtype) in DTYPES and not hasattr(value, "full_tensor"):
        return {"tensor": [name_of_dtype(value.dtype), list(value.shape), _text(bytes(bytes_of(value)))]}
    raise CheckpointError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}: a checkpoint holds numbers, texts, None, bytes, tensors, "
        "and lists, tuples and dicts of them. Give its state_dict(), or plain values."
    )


def decode(value: Any) -> Any:
    """The inverse of `encode`."""
    if isinstance(value, list):
        return [decode(each) for each in value]  # type: ignore[reportUnknownVariableType]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()  # type: ignore[reportUnknownVariableType]
    return _decode(kind, content)  # type: ignore[reportUnknownArgumentType]


def _decode(kind: str, content: Any) -> Any:
    if kind == "tuple":
        return tuple(map(decode, content))
    if kind in _DICTS:
        return _DICTS[kind]({decode(key): decode(each) for key, each in content})
    if kind == "float":
        return float(content)
    if kind == "bytes":
        return _data(content)
    dtype, shape, data = content
    if kind == "array":
        return np.frombuffer(_data(data), np.dtype(dtype)).reshape(shape).copy()
    raw = bytearray(_data(data)) or bytearray(16)  # torch makes no tensor of an empty one
    return torch.frombuffer(raw, dtype=DTYPES[dtype])[: math.prod(shape)].view(shape)


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _data(text: str) -> bytes:
    return base64.b64decode(text)
