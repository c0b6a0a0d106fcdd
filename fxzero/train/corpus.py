"""Text to train on, and text held out: the sources of the Python standard library, or the user's own files.

Whole files are held out; only where there are too few files, the end of each file is held out instead. Files are read
in the order of their names, and chosen by a hash of the name, so that a text is split alike everywhere.
"""

import hashlib
import os
import stat
import sys
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fxzero.commands.errors import CommandError

HELD_OUT_FRACTION = 0.05
_LOOK_BYTES = 2**16
"""Of the start of a file, to see whether it is text before all of it is read."""

_STDLIB_SKIPPED = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "__phello__",
    "encodings",
    "test",
    "tests",
    "idle_test",
}
"""Folders without text worth learning; encodings has tables of code points."""


@dataclass(frozen=True)
class Document:
    """One file: its name in the corpus, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents that are only evaluated on."""

    name: str
    train: list[Document]
    held_out: list[Document]

    def describe(self) -> str:
        """One line with the source of the text and its size."""
        train, held_out = num_chars(self.train), num_chars(self.held_out)
        return (
            f"{self.name}: {len(self.train)} files, {train / 1e6:.1f} M characters to train on; "
            f"{len(self.held_out)} files, {held_out / 1e6:.2f} M characters held out"
        )


def read_corpus(data: Path | None) -> Corpus:
    """Read the text of `data`, a file or a folder, or the standard library's sources if it is None, and split it.

    Raises:
        CommandError: there is no text, none that can be read, or more than fits into memory.
    """
    if data is None:
        name, files = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}", stdlib_files()
        problem = "the standard library of this Python has no .py sources; give your own text with --data"
    else:
        name, files = str(data), text_files(data)
        problem = f"--data {data} has no text: no file in it is non-empty UTF-8"
    documents = list(_read(files))
    if not documents:
        raise CommandError(problem)
    return Corpus(name, *split(documents))


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """The standard library's own sources by name, without tests, generated tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for name, path in _walk(root, _STDLIB_SKIPPED):
        if path.suffix == ".py" and not name.startswith(("config-", "_sysconfigdata")):
            yield name, path


def text_files(data: Path) -> Iterator[tuple[str, Path]]:
    """A file, or every file of a folder that is not hidden, by name."""
    yield from _walk(data) if data.is_dir() else [(data.name, data)]


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Hold out about a twentieth of the text: whole files, or the end of each file where there are too few.

    Returns:
        The documents to train on, and the held-out ones.
    """
    wanted = HELD_OUT_FRACTION * num_chars(documents)
    chosen: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda each: hashlib.sha256(os.fsencode(each.name)).digest()):
        if size < wanted and size + len(document.text) <= 1.5 * wanted:
            chosen.add(document.name)
            size += len(document.text)
    if size < 0.5 * wanted:
        cuts = [int(len(each.text) * (1 - HELD_OUT_FRACTION)) for each in documents]
        train = [Document(each.name, each.text[:cut]) for each, cut in zip(documents, cuts, strict=True)]
        return train, [Document(each.name, each.text[cut:]) for each, cut in zip(documents, cuts, strict=True)]
    train = [each for each in documents if each.name not in chosen]
    return train, [each for each in documents if each.name in chosen]


def num_chars(documents: list[Document]) -> int:
    """The length of all texts together, in characters."""
    return sum(len(each.text) for each in documents)


def _walk(root: Path, skipped: Collection[str] = ("__pycache__",)) -> Iterator[tuple[str, Path]]:
    """Files below a folder, sorted by their names relative to it, without hidden files and skipped folders."""
    found: list[Path] = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    yield from sorted((path.relative_to(root).as_posix(), path) for path in found)


def _read(files: Iterator[tuple[str, Path]]) -> Iterator[Document]:
    """The files that are text."""
    room = _memory_bytes() // 4  # a text is in memory as bytes, as characters and as tokens
    for name, path in files:
        try:
            data = _bytes_of(path, room)
            text = data.decode("utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        room -= len(data)
        if text.strip() and "\0" not in text:
            yield Document(name, text)


def _bytes_of(path: Path, most: int) -> bytes:
    """The bytes of a file, as many as it has when it is opened; none of what never ends or is surely no text.

    Pipes, sockets and devices are never opened: a reader would wait for a writer, or read for ever.

    Raises:
        CommandError: there are more than `most`.
    """
    if not stat.S_ISREG(path.stat().st_mode):
        return b""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(min(size, _LOOK_BYTES))
        if b"\0" in start:
            return b""
        if size > most:
            raise CommandError(
                f"--data {path} has {size / 2**30:.1f} GiB, and with the files before it the text would take more than "
                "a quarter of the memory of this machine. Give less text."
            )
        return start + file.read(size - len(start))


def _memory_bytes() -> int:
    """Bytes of memory of this machine; where it does not say, as if it had 64 GiB."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 2**36
