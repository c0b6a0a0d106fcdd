"""The two trees, and from where a worker of each imports."""

from __future__ import annotations

import compileall
import contextlib
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.about import ROOT

MODELS = "models_of_here"
"""The name by which workers of both trees import this tree's models."""


class NoRevision(ValueError):
    """Git does not know the revision, or cannot check it out."""


@dataclass(frozen=True)
class Tree:
    """One of the two trees that are compared."""

    name: str
    checkout: Path
    imports: Path
    """A folder of links: fxzero is that of the checkout, the rest is this tree's."""


@contextmanager
def two_trees(commit: str) -> Generator[tuple[Tree, Tree]]:
    """This tree and a commit of it, which is checked out until the end of `with`."""
    with TemporaryDirectory(prefix="fxzero-against-") as folder, _worktree(commit, Path(folder, "there")) as there:
        yield _tree("here", ROOT, Path(folder)), _tree("there", there, Path(folder))


def commit_of(revision: str) -> str:
    """The full hash of a revision.

    Raises:
        NoRevision: there is none of this name.
    """
    return _git("rev-parse", "--verify", f"{revision}^{{commit}}")


@contextmanager
def _worktree(commit: str, path: Path) -> Generator[Path]:
    try:
        _git("worktree", "add", "--detach", str(path), commit)
        yield path
    finally:
        with contextlib.suppress(NoRevision):  # it was never added
            _git("worktree", "remove", "--force", str(path))


def _tree(name: str, checkout: Path, folder: Path) -> Tree:
    imports = folder / f"imports-of-{name}"
    imports.mkdir()
    (imports / "fxzero").symlink_to(checkout / "fxzero")
    (imports / "benchmarks").symlink_to(ROOT / "benchmarks")
    (imports / MODELS).symlink_to(ROOT / "fxzero" / "models")
    for package in {path.resolve() for path in (checkout / "fxzero", *(checkout / "fxzero").iterdir())}:
        if package.is_dir():
            compileall.compile_dir(package, quiet=2)  # so that neither tree compiles while it is measured
    return Tree(name, checkout, imports)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise NoRevision("There is no program git.") from None
    if done.returncode:
        raise NoRevision(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()
