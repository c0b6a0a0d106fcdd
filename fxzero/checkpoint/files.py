"""The files of a checkpoint: each rank writes its ranges of flattened tensors, and reads those that it needs.

    000007/                 appears by one rename, when everything in it is on disk
      manifest.json         shapes and dtypes of all tensors, plain values, the crc32 of each index
      rank_00000.json       an index: which ranges of which tensors lie where, in blocks, with a crc32 each
      rank_00000.bin        the blocks' bytes, one after another
    .000008.5d41.partial/   what a save leaves behind that did not come to its end

A JSON file is two lines: the format with the crc32 of the second, and the content.
"""

import contextlib
import json
import math
import os
import re
import shutil
import uuid
import zlib
from bisect import bisect_right
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from fxzero.checkpoint.values import DTYPES, bytes_of
from fxzero.errors import CheckpointError

MANIFEST = "manifest.json"
_FORMAT, _VERSION = "fxzero checkpoint", 1
_BLOCK_BYTES = 4 << 20
"""Bytes that have a checksum of their own, so that a part of a tensor is checked without reading all of it."""
_ALIGNMENT = 64
_BUFFER_BYTES = 1 << 20
"""Small tensors go to the disk together; larger ones are written as they lie."""
_NAME = re.compile(r"\d{6,}")


@dataclass(frozen=True)
class Block:
    """Elements `[start, stop)` of a flattened tensor at a place of a file."""

    start: int
    stop: int
    file: str
    begin: int
    crc32: int


# -- writing -------------------------------------------------------------------------------------------------------


def new_folder(root: Path, num_ranks: int) -> Path:
    """Make a folder for the next checkpoint, named as one that is not complete, and in it a file for each rank."""
    root.mkdir(parents=True, exist_ok=True)
    number = max((int(path.name) for path in complete_ones(root)), default=0) + 1
    folder = root / f".{number:06}.{uuid.uuid4().hex[:8]}.partial"
    folder.mkdir()
    for rank in range(num_ranks):
        data_file(folder, rank).touch()
    return folder


def write_rank(folder: Path, rank: int, parts: Iterable[tuple[str, int, Tensor]], values: Any) -> int:
    """Write the ranges of one rank, `(name, start, flat elements)`, and values of its own; the crc32 of its index."""
    path, end = data_file(folder, rank), 0
    index: dict[str, list[list[int]]] = {}
    with path.open("wb", buffering=_BUFFER_BYTES) as out, ThreadPoolExecutor(1) as pool:
        for name, start, flat in parts:
            data, per_block = bytes_of(flat), _BLOCK_BYTES // flat.element_size()
            end += out.write(bytes(-end % _ALIGNMENT))
            blocks = index.setdefault(name, [])
            cuts = [*range(0, flat.numel(), per_block), flat.numel()]
            places = [data[first * flat.element_size() : last * flat.element_size()] for first, last in pairwise(cuts)]
            checksums = (pool.map if len(places) > 1 else map)(zlib.crc32, places)  # while bytes are written
            begin = end
            end += out.write(data)
            for first, last, crc32 in zip(cuts, cuts[1:], checksums, strict=False):
                blocks.append([start + first, start + last, begin + first * flat.element_size(), crc32])
        out.flush()
        os.fsync(out.fileno())
    return write_json(index_file(folder, rank), {"file": path.name, "blocks": index, "values": values})


def data_file(folder: Path, rank: int) -> Path:
    """The file of the bytes of one rank."""
    return folder / f"rank_{rank:05}.bin"


def index_file(folder: Path, rank: int) -> Path:
    """The file that says where the ranges of one rank lie in its data."""
    return folder / f"rank_{rank:05}.json"


def give_up(folder: Path, rank: int) -> None:
    """Remove the files of one rank of a checkpoint that will not be complete; the last rank removes the folder."""
    own = [data_file(folder, rank), index_file(folder, rank)] + [folder / MANIFEST] * (rank == 0)
    for path in own:
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_json(path: Path, content: Any) -> int:
    """Write a JSON file with its checksum, which is returned, to the disk."""
    body = json.dumps(content, separators=(",", ":")).encode()
    crc32 = zlib.crc32(body)
    head = json.dumps({"format": _FORMAT, "version": _VERSION, "crc32": crc32}).encode()
    with path.open("xb") as out:
        out.write(head + b"\n" + body)
        out.flush()
        os.fsync(out.fileno())
    return crc32


def complete(folder: Path, manifest: Any) -> Path:
    """Write the manifest and give a checkpoint its name, under which it is complete; that folder."""
    write_json(folder / MANIFEST, manifest)
    sync_folder(folder)
    named = folder.with_name(folder.name.split(".")[1])
    if named.exists():
        raise CheckpointError(f"{named} exists: another process saves into {folder.parent}. Give each a folder.")
    folder.rename(named)
    sync_folder(folder.parent)
    return named


def sync_folder(path: Path) -> None:
    """Let the names in a folder be on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_old(root: Path, keep: int) -> None:
    """Remove all checkpoints but the newest, and what saves left that did not come to their end."""
    for path in complete_ones(root)[:-keep]:
        doomed = path.rename(root / f".{path.name}.removed.partial")  # a rename is whole, a removal is not
        shutil.rmtree(doomed, ignore_errors=True)
    for path in root.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


# -- reading -------------------------------------------------------------------------------------------------------


def complete_ones(root: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last."""
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted((path for path in found if (path / MANIFEST).exists()), key=lambda path: int(path.name))


def newest(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest in the folder; None if there is none."""
    return path if (path / MANIFEST).exists() else next(reversed(complete_ones(path)), None)


def read_json(path: Path) -> Any:
    """The content of a JSON file.

    Raises:
        CheckpointError: it is not there, not of this format, or damaged.
    """
    try:
        head, _, body = path.read_bytes().partition(b"\n")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    try:
        facts = json.loads(head)
        if facts["format"] != _FORMAT:
            raise ValueError(facts["format"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is not a file of a checkpoint of fxzero, or damaged.") from error
    if facts.get("version") != _VERSION:
        raise CheckpointError(f"{path} has version {facts.get('version')} of the format; this fxzero reads {_VERSION}.")
    if facts.get("crc32") != zlib.crc32(body):
        raise CheckpointError(f"{path} is damaged: its checksum is not that of its content.")
    return json.loads(body)


class Saved:
    """A complete checkpoint.

    Raises:
        CheckpointError: a file of it is missing or damaged, in all that read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_json(folder / MANIFEST)
        self.values: list[Any] = []
        """What each rank wrote of its own."""
        self.blocks: dict[str, list[Block]] = {}
        for rank, crc32 in enumerate(self.manifest["indices"]):
            path = index_file(folder, rank)
            index = read_json(path)
            if zlib.crc32(path.read_bytes().partition(b"\n")[2]) != crc32:
                raise CheckpointError(f"{path} belongs to another checkpoint than {folder / MANIFEST}.")
            self.values.append(index["values"])
            for name, blocks in index["blocks"].items():
                found = self.blocks.setdefault(name, [])
                found += [Block(start, stop, index["file"], begin, crc) for start, stop, begin, crc in blocks]
        for blocks in self.blocks.values():
            blocks.sort(key=lambda block: block.start)
        self._files: dict[str, BinaryIO] = {}
        self._checksums = ThreadPoolExecutor(1)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(shape) for name, (_, shape) in self.manifest["tensors"].items()}

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return DTYPES[self.manifest["tensors"][name][0]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements `[start, stop)` of a flattened tensor, on the CPU."""
        stop = math.prod(self.shapes[name]) if stop is None else stop
        dtype, at = self.dtype_of(name), start
        flat = torch.empty(stop - start, dtype=dtype)
        checks: list[tuple[Block, Future[int]]] = []
        blocks = self.blocks.get(name, [])
        for block in blocks[max(0, bisect_right(blocks, start, key=lambda block: block.start) - 1) :]:
            if block.start > at or at >= stop:
                break
            end = min(block.stop, stop)
            if end > at:
                is_whole = at == block.start and end == block.stop
                elements = flat[at - start : end - start] if is_whole else flat.new_empty(block.stop - block.start)
                data = bytes_of(elements)
                self._read_into(data, name, block)
                checks.append((block, self._checksums.submit(zlib.crc32, data)))  # while the next one is read
                if not is_whole:
                    flat[at - start : end - start].copy_(elements[at - block.start : end - block.start])
                at = end
        if at < stop:
            raise CheckpointError(f"{self.folder} has no elements of {name} from {at} on.")
        for block, crc32 in checks:
            if crc32.result() != block.crc32:
                path = self.folder / block.file
                raise CheckpointError(f"{path} is damaged: bytes of {name} have changed since they were saved.")
        return flat

    def _read_into(self, data: memoryview, name: str, block: Block) -> None:
        path, got = self.folder / block.file, 0
        try:
            if block.file not in self._files:
                self._files[block.file] = path.open("rb", buffering=0)
            file = self._files[block.file]
            file.seek(block.begin)
            while got < len(data) and (count := file.readinto(data[got:])):  # type: ignore[attr-defined]
                got += count
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
        if got < len(data):
            raise CheckpointError(f"{path} is truncated: it ends inside of {name}.")

    def close(self) -> None:
        """Close the files."""
        self._checksums.shutdown()
        for file in self._files.values():
            file.close()
        self._files.clear()
