"""Text to train on: the sources of the Python standard library, or the user's own files; and text held out from it.

The split is by file: a held-out file is never trained on. Only where there are too few files for that is the end of
each held out instead. Files are read in the order of their names and chosen by a hash of them, so that the same text
is split the same way everywhere.
"""

from __future__ import annotations

import hashlib
import os
import sys
import sysconfig
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from fxzero.commands.errors import CommandError

HELD_OUT_FRACTION = 0.05

_STDLIB_SKIPPED = {
    "__pycache__",
    "site-packages",
    "dist-packages",
    "__phello__",
    "encodings",  # tables of code points
    "test",
    "tests",
    "idle_test",
}


@dataclass(frozen=True)
class Document:
    """One file: its name in the corpus, and its text."""

    name: str
    text: str


@dataclass(frozen=True)
class Corpus:
    """Documents to train on, and documents that are only ever evaluated on."""

    name: str
    train: list[Document]
    held_out: list[Document]

    def describe(self) -> str:
        """One line: what it is and how much."""
        train, held_out = num_chars(self.train), num_chars(self.held_out)
        return (
            f"{self.name}: {len(self.train)} files, {train / 1e6:.1f} M characters to train on; "
            f"{len(self.held_out)} files, {held_out / 1e6:.2f} M characters held out"
        )


def read_corpus(data: Path | None) -> Corpus:
    """Read and split the text: that of `data` (a file or a folder), or the standard library's sources if None.

    Raises:
        CommandError: there is no text, or none that can be read.
    """
    if data is None:
        name = f"standard library of Python {sys.version_info.major}.{sys.version_info.minor}"
        documents = list(_read(stdlib_files()))
        where = "the standard library of this Python has no .py sources; give your own text with --data"
    else:
        name = str(data)
        documents = list(_read(text_files(data)))
        where = f"--data {data} has no text: no file in it is non-empty UTF-8"
    if not documents:
        raise CommandError(where)
    train, held_out = split(documents)
    return Corpus(name, train, held_out)


def stdlib_files() -> Iterator[tuple[str, Path]]:
    """The standard library's own sources, by name, without tests, generated tables and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    for name, path in _walk(root, _STDLIB_SKIPPED):
        if path.suffix == ".py" and not name.startswith(("config-", "_sysconfigdata")):
            yield name, path


def text_files(data: Path) -> Iterator[tuple[str, Path]]:
    """A file, or every file of a folder that is not hidden, by name."""
    if data.is_dir():
        yield from _walk(data)
    else:
        yield data.name, data


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Choose about a twentieth of the text as held-out: whole files, or the end of each where files are too few."""
    wanted = HELD_OUT_FRACTION * num_chars(documents)
    chosen: set[str] = set()
    size = 0
    for document in sorted(documents, key=lambda each: hashlib.sha256(each.name.encode()).digest()):
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
    """The length of all texts together."""
    return sum(len(each.text) for each in documents)


def _walk(root: Path, skipped: Collection[str] = ("__pycache__",)) -> Iterator[tuple[str, Path]]:
    """Files below a folder by their names relative to it, sorted, without hidden ones and without skipped folders."""
    found: dict[str, Path] = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped]
        for path in (Path(folder, name) for name in files if not name.startswith(".")):
            found[path.relative_to(root).as_posix()] = path
    yield from sorted(found.items())


def _read(files: Iterator[tuple[str, Path]]) -> Iterator[Document]:
    """The files that are text."""
    for name, path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and "\0" not in text:
            yield Document(name, text)
