"""Write a safetensors file tensor by tensor, so that no more than one tensor is in memory; read ranges of such files.

The library (safetensors 0.8) wants all tensors at once. The format: the length of the header (8 bytes, little endian),
the header (JSON: name -> dtype, shape, data_offsets; padded with spaces to 8 bytes), then the bytes of the tensors,
here in the order of the library.
Source: https://huggingface.co/docs/safetensors, "Format".
"""

from __future__ import annotations

import errno
import glob
import json
import math
import os
import shutil
import sys
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fxzero.errors import CheckpointError

_DTYPES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""Maps each dtype to its name in the format. The library stores tensors in the order of these dtypes, then by name."""
INDEX = "model.safetensors.index.json"
"""The file in a folder that says which tensor lies in which file, where there are several."""


@dataclass(frozen=True)
class _Layout:
    """The places of all tensors in a file."""

    header: bytes
    begins: dict[str, int]
    """Where each tensor begins, from the start of the file."""
    nbytes: int

    @classmethod
    def of(cls, announced: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> _Layout:
        order = list(_DTYPES)
        entries: dict[str, object] = {"__metadata__": dict(metadata)}
        begins: dict[str, int] = {}
        end = 0
        for name, spec in sorted(announced.items(), key=lambda item: (order.index(item[1].dtype), item[0])):
            begins[name], end = end, end + spec.nbytes
            entries[name] = {
                "dtype": _DTYPES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [begins[name], end],
            }
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        header = len(text).to_bytes(8, "little") + text
        return cls(header, {name: len(header) + begin for name, begin in begins.items()}, len(header) + end)


def reserve_room(path: Path, announced: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Take the room on the disk that `save_stream` will need; raises OSError if there is none.

    Room that a process had taken and that was killed since is given back.
    """
    for left in path.parent.glob(f"{glob.escape(path.name)}.*.partial"):
        if not _is_alive(left.name.split(".")[-2]):
            left.unlink(missing_ok=True)
    nbytes = _Layout.of(announced, metadata).nbytes
    with _partial(path).open("wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, nbytes)
        elif shutil.disk_usage(path.parent).free < nbytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def give_back_room(path: Path) -> None:
    """Undo `reserve_room` where `save_stream` has not made a file of it."""
    _partial(path).unlink(missing_ok=True)


def save_stream(
    path: Path,
    announced: Mapping[str, torch.Tensor],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write one file, as `save_streams` writes several."""
    save_streams({path: announced}, tensors, metadata)


def save_streams(
    files: Mapping[Path, Mapping[str, torch.Tensor]],
    tensors: Iterable[tuple[str, torch.Tensor]],
    metadata: Mapping[str, str],
) -> None:
    """Write tensors as they come, in any order, to files that exist only once all of them are complete.

    Args:
        files: maps each file to its tensors by name, which are on the meta device, or others with the shape and dtype
            of those that will come.
        tensors: the name and value of each tensor, once; a value is read before the next one is asked for.
        metadata: free text that is stored in the headers.

    Raises:
        ValueError: a tensor that came is not the one announced, or one did not come.
    """
    with ExitStack() as stack:
        written = [stack.enter_context(_Writing(path, announced, metadata)) for path, announced in files.items()]
        file_of = {name: file for file in written for name in file.begins}
        for name, tensor in tensors:
            if name not in file_of:
                raise ValueError(f"{name} {tuple(tensor.shape)} is not among the tensors announced")
            file_of[name].write(name, tensor)
        for file in written:
            file.finish()
    for path in files:
        os.replace(_partial(path), path)


class _Writing:
    """A file that is being written, under a name that says so."""

    def __init__(self, path: Path, announced: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
        self._announced, self._layout = announced, _Layout.of(announced, metadata)
        self.begins = dict(self._layout.begins)
        """Where the tensors begin that have not come yet."""
        partial = _partial(path)
        self._file = partial.open("r+b" if partial.exists() else "w+b")

    def __enter__(self) -> _Writing:
        self._file.write(self._layout.header)
        self._file.truncate(self._layout.nbytes)
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def write(self, name: str, tensor: torch.Tensor) -> None:
        announced = self._announced[name]
        found = tensor.dtype, tuple(tensor.shape)
        if name not in self.begins or found != (announced.dtype, tuple(announced.shape)):
            raise ValueError(f"{name} {found} is not among the tensors announced, or was written before")
        self._file.seek(self.begins.pop(name))
        self._file.write(_bytes_of(tensor))

    def finish(self) -> None:
        """Let all of it be on the disk."""
        if left := list(self.begins):
            raise ValueError(f"{len(left)} tensors were announced and did not come: {', '.join(left[:5])}")
        self._file.flush()
        os.fsync(self._file.fileno())


def _partial(path: Path) -> Path:
    """Where a file is until it is complete; processes that write the same one do not meet."""
    return path.with_name(f"{path.name}.{os.getpid()}.partial")


def _is_alive(process: str) -> bool:
    """False for the number of a process that has ended, where that can be asked without harm."""
    if os.name != "posix":
        return True
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (ValueError, OverflowError, OSError):  # no number, or a process of somebody else
        return True
    return True


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor, without a copy if it is contiguous and on the CPU."""
    if sys.byteorder != "little":
        raise NotImplementedError("safetensors files are little endian; this machine is not")
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def tied_names(model: nn.Module) -> dict[str, str]:
    """Maps each further name of a tied parameter to its first name, under which it is stored."""
    first = {parameter: name for name, parameter in model.named_parameters()}
    every = model.named_parameters(remove_duplicate=False)
    return {name: first[parameter] for name, parameter in every if first[parameter] != name}


# -- reading -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    """Where it begins, from the start of the file."""

    def read(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """The elements `[start, stop)` of the flattened tensor."""
        stop = math.prod(self.shape) if stop is None else stop
        data = torch.empty((stop - start) * self.dtype.itemsize, dtype=torch.uint8)
        view, got = data.numpy().data, 0
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin + start * self.dtype.itemsize)
            while got < len(view) and (count := file.readinto(view[got:])):
                got += count
        if got < len(view):
            raise CheckpointError(f"{self.path} is truncated.")
        return data.view(self.dtype)


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, or of all files of a folder, by name; nothing but headers is read.

    In a folder the index of Hugging Face says which files count, where there is one.

    Raises:
        CheckpointError: there is no such file, or one is truncated or not of this format.
    """
    index = path / INDEX
    if index.is_file():
        files = [path / name for name in _files_of(index)]
    else:
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    if not files:
        raise CheckpointError(f"There is no safetensors file in {path}.")
    return {name: tensor for file in files for name, tensor in _stored_in(file).items()}


def _files_of(index: Path) -> list[str]:
    """The names of the files that an index of Hugging Face counts."""
    try:
        return sorted({Path(name).name for name in json.loads(index.read_text())["weight_map"].values()})
    except OSError as error:
        raise CheckpointError(f"{index} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is truncated, or no index of safetensors files ({error!r}).") from error


def _stored_in(path: Path) -> dict[str, StoredTensor]:
    dtypes = {name: dtype for dtype, name in _DTYPES.items()}
    try:
        nbytes = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length)) if length <= nbytes else None
        found: dict[str, StoredTensor] = {}
        for name, entry in (header or {}).items():
            if name == "__metadata__":
                continue
            tensor = StoredTensor(
                path, dtypes[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0]
            )
            end = 8 + length + entry["data_offsets"][1]
            if end - tensor.begin != math.prod(tensor.shape) * tensor.dtype.itemsize or end > nbytes:
                raise ValueError(name)
            found[name] = tensor
        if header is None:
            raise ValueError(length)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is truncated, or no safetensors file of known dtypes ({error!r}).") from error
    return found
