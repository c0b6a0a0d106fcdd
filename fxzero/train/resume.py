"""Where a run has its checkpoints, and how a later one goes on from them.

OUT/checkpoints/options.toml     the options of the run, which a resumed one takes over
OUT/checkpoints/000001/          a checkpoint of `fxzero.save`
"""

import contextlib
from pathlib import Path
from typing import Any

from fxzero.checkpoint.files import CHECKPOINTS, newest
from fxzero.commands.errors import CommandError
from fxzero.errors import CheckpointError
from fxzero.train.toml_files import read_toml, write_toml

AUTO = "auto"
_OPTIONS_FILE = "options.toml"


def run_folder(resume: str) -> Path:
    """The folder of the run that --resume names: itself, or by its folder of checkpoints, or by one of these."""
    folder = Path(resume)
    for each in (folder, *folder.absolute().parents[:2]):
        if each.name == CHECKPOINTS:
            return each.parent
    return folder


def checkpoint_of(out: Path | None, resume: str | None) -> Path | None:
    """The checkpoint to go on from; None to begin.

    Raises:
        CommandError: one was asked for, and there is none, or the newest is damaged.
    """
    if resume is None:
        return None
    try:
        if resume == AUTO:
            return newest(Path(out or "") / CHECKPOINTS)
        found = newest(Path(resume))
    except CheckpointError as error:
        raise CommandError(str(error)) from error
    if found is None:
        what = "has no checkpoint" if Path(resume).exists() else "does not exist"
        raise CommandError(
            f"--resume {resume} {what}. Name the folder of a run that was started with --save-every, or one of its "
            "checkpoints; --resume auto with --out begins a run that has none yet."
        )
    return found


def check_out(out: Path, resume: str | None) -> None:
    """Refuse a folder for the results that has other things than the run that goes on.

    Raises:
        CommandError: it is not empty, and not the folder of that run.
    """
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if resume is None and (out / CHECKPOINTS).is_dir():
        raise CommandError(f"--out {out} has a run already. Go on with it by --resume {out}, or choose another folder.")
    is_same = resume is not None and (resume == AUTO or run_folder(resume).absolute() == out.absolute())
    if not is_same or not (out / CHECKPOINTS).is_dir():
        raise CommandError(f"--out {out} exists already and is not empty. Choose another, or remove it.")


def write_options(out: Path, options: dict[str, Any]) -> None:
    """Make the folder of checkpoints, and keep the options of the run in it."""
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    write_toml(out / CHECKPOINTS / _OPTIONS_FILE, options)


def saved_options(out: Path | None, resume: str) -> dict[str, Any]:
    """The options of the run that --resume names; empty where it kept none."""
    if resume == AUTO and out is None:
        return {}
    folder = out if resume == AUTO else run_folder(resume)
    path = Path(folder or "") / CHECKPOINTS / _OPTIONS_FILE
    with contextlib.suppress(FileNotFoundError):
        return read_toml(path)
    return {}
