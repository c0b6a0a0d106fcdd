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
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from fxzero.checkpoint.values import DTYPES, bytes_of
from fxzero.errors import CheckpointError

MANIFEST = "manifest.json"
CHECKPOINTS = "checkpoints"
"""The name of the folder of checkpoints in the folder of a run of `fxzero train`."""
_FORMAT, _VERSION = "fxzero checkpoint", 1
_BLOCK_BYTES = 4 << 20
"""Bytes that have a checksum of their own, so that a part of a tensor is checked without reading all of it."""
_ALIGNMENT = 64
_BUFFER_BYTES = 1 << 20
"""Small tensors go to the disk together; larger ones are written as they lie."""
_PIECE_BYTES = 256 << 10
"""Bytes that are read at a time, so few that they are in the processor's cache for their checksum."""
_APART_BYTES = 64 << 10
"""Blocks of this size and more are read in threads."""
_MOST_THREADS = 4
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
    number = max((int(path.name) for path in numbered(root)), default=0) + 1
    folder = root / f".{number:06}.{uuid.uuid4().hex[:8]}.partial"
    folder.mkdir()
    try:
        for rank in range(num_ranks):
            data_file(folder, rank).touch()
    except OSError:  # a disk may have room for a folder, and not for a file
        shutil.rmtree(folder, ignore_errors=True)
        raise
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


def post(folder: Path, rank: int, text: str) -> None:
    """Let other ranks read in the folder what one says."""
    aside = _post_file(folder, rank).with_suffix(".aside")
    aside.write_text(text)
    aside.replace(_post_file(folder, rank))


def posts(folder: Path, num_ranks: int) -> list[str | None]:
    """What ranks have posted, or that they have given up; None for those of which nothing is known yet."""
    return [_posted(folder, rank) for rank in range(num_ranks)]


def _posted(folder: Path, rank: int) -> str | None:
    has_data = data_file(folder, rank).exists()  # looked at first: who gives up posts, and then removes it
    try:
        return _post_file(folder, rank).read_text()
    except FileNotFoundError:
        return None if has_data else f"rank {rank}, which could not say why"


def remove_posts(folder: Path, num_ranks: int) -> None:
    """Remove what ranks have posted."""
    for rank in range(num_ranks):
        _post_file(folder, rank).unlink()


def _post_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05}.written"


def give_up(folder: Path, rank: int, reason: str) -> None:
    """Remove the files of one rank of a checkpoint that will not be complete; the last rank removes the folder.

    A full disk may have room for no further file. So it is the missing data that tells other ranks, and the reason is
    posted only if it can be.
    """
    for path in [index_file(folder, rank)] + [folder / MANIFEST] * (rank == 0):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        os.truncate(data_file(folder, rank), 0)  # room for the reason
        post(folder, rank, reason)
    data_file(folder, rank).unlink(missing_ok=True)
    if not any(folder.glob("rank_*.bin")):
        shutil.rmtree(folder, ignore_errors=True)


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
    for path in numbered(root)[:-keep]:
        doomed = path.rename(root / f".{path.name}.removed.partial")  # a rename is whole, a removal is not
        shutil.rmtree(doomed, ignore_errors=True)
    for path in root.glob(".*.partial"):
        shutil.rmtree(path, ignore_errors=True)


# -- reading -------------------------------------------------------------------------------------------------------


def numbered(root: Path) -> list[Path]:
    """The checkpoints in a folder, the newest last; empty folders are none."""
    found = [path for path in root.iterdir() if _NAME.fullmatch(path.name)] if root.is_dir() else []
    return sorted((path for path in found if _has_files(path)), key=lambda path: int(path.name))


def _has_files(path: Path) -> bool:
    """True for a folder with something in it; one that another process has just removed is none."""
    try:
        return any(path.iterdir())
    except OSError:
        return False


def newest(path: Path) -> Path | None:
    """The checkpoint that a path means: itself, or the newest of a folder or of a run; None if there is none.

    Raises:
        CheckpointError: the newest has lost its manifest, with which it got its name.
    """
    if (path / MANIFEST).exists():
        return path
    found = next(reversed(numbered(path) or numbered(path / CHECKPOINTS)), None)
    if found is not None and not (found / MANIFEST).exists():
        raise CheckpointError(
            f"{found / MANIFEST} is missing: the newest checkpoint is damaged. Remove {found} to go on from the one "
            "before."
        )
    return found


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
    try:
        return json.loads(body)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: its content is no JSON.") from error


def _num_threads() -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(_MOST_THREADS, cores)


class Saved:
    """A complete checkpoint.

    Raises:
        CheckpointError: a file of it is missing or damaged, in all that read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest: dict[str, Any] = read_json(folder / MANIFEST)
        if not isinstance(self.manifest, dict) or not self.manifest.keys() >= {"indices", "tensors"}:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise CheckpointError(f"{folder / MANIFEST} is no manifest, but another file of a checkpoint.")
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
        self._files: dict[str, int] = {}
        self._opening = Lock()
        self._pool = ThreadPoolExecutor(_num_threads())
        self._reads: list[Future[None]] = []

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor."""
        return {name: tuple(shape) for name, (_, shape) in self.manifest["tensors"].items()}

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return tuple(self.manifest["tensors"][name][1])

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return DTYPES[self.manifest["tensors"][name][0]]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """The elements `[start, stop)` of a flattened tensor, on the CPU."""
        flat = self.begin_read(name, start, stop)
        self.finish_reads()
        return flat

    def begin_read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """As `read`, but the elements are there only after `finish_reads`."""
        stop = math.prod(self.shape_of(name)) if stop is None else stop
        flat, at = torch.empty(stop - start, dtype=self.dtype_of(name)), start
        size, data = flat.element_size(), bytes_of(flat)
        blocks = self.blocks.get(name, [])
        for block in blocks[max(0, bisect_right(blocks, start, key=lambda block: block.start) - 1) :]:
            if block.start > at or at >= stop:
                break
            end = min(block.stop, stop)
            if end > at:
                wanted = data[(at - start) * size : (end - start) * size]
                before, num_bytes = (at - block.start) * size, (block.stop - block.start) * size
                if num_bytes < _APART_BYTES:
                    self._read_block(name, block, wanted, before, num_bytes)
                else:
                    self._reads.append(self._pool.submit(self._read_block, name, block, wanted, before, num_bytes))
                at = end
        if at < stop:
            raise CheckpointError(f"{self.folder} has no elements of {name} from {at} on.")
        return flat

    def finish_reads(self) -> None:
        """Wait for all that `begin_read` began."""
        reads, self._reads = self._reads, []
        for each in reads:
            each.result()

    def _read_block(self, name: str, block: Block, wanted: memoryview, before: int, num_bytes: int) -> None:
        """Read a block and check it; `wanted` gets its bytes from `before` on."""
        data = wanted if len(wanted) == num_bytes else memoryview(bytearray(num_bytes))
        if self._read_into(data, name, block) != block.crc32:
            path = self.folder / block.file
            raise CheckpointError(f"{path} is damaged: bytes of {name} have changed since they were saved.")
        if data is not wanted:
            wanted[:] = data[before : before + len(wanted)]

    def _read_into(self, data: memoryview, name: str, block: Block) -> int:
        """Fill `data` with the bytes of a block; their crc32, taken while they are in the processor's cache."""
        got, crc32 = 0, 0
        try:
            file = self._file(block.file)
            while got < len(data) and (count := os.preadv(file, [data[got : got + _PIECE_BYTES]], block.begin + got)):
                crc32 = zlib.crc32(data[got : got + count], crc32)
                got += count
        except OSError as error:
            raise CheckpointError(f"{self.folder / block.file} cannot be read: {error.strerror}.") from error
        if got < len(data):
            raise CheckpointError(f"{self.folder / block.file} is truncated: it ends inside of {name}.")
        return crc32

    def _file(self, name: str) -> int:
        with self._opening:
            if name not in self._files:
                self._files[name] = os.open(self.folder / name, os.O_RDONLY)
            return self._files[name]

    def close(self) -> None:
        """Close the files."""
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()
