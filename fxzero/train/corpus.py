"""Text to train on, and text held out: the sources of the Python standard library, or the user's own files.

Whole files are held out; only where there are too few files, the end of each file is held out instead. Files are read
in the order of their names, and chosen by a hash of the name, so that a text is split alike everywhere.
"""

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
        CommandError: there is no text, or none that can be read.
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
    for name, path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if text.strip() and "\0" not in text:
            yield Document(name, text)
