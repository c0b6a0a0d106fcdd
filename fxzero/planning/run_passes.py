"""Run a list of passes over a StepGraph: verify before the first and after each, and tell observers.

Whether the result is a complete plan is for `make_plan` to prove, which always does.

Printing, dumping and timing are observers; a pass does none of it. `FXZERO_DUMP=dir` adds one that writes
`00_capture.txt`, `01_rematerialize_views.txt`, ... and a `.diff` for each pass. Only rank 0 writes; its second plan
(another shape, eval) goes to `dir/plan_1`, the third to `dir/plan_2`.
"""

import contextlib
import logging
import os
import re
import sys
import tempfile
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TypeAlias

import torch.distributed as dist

from fxzero.errors import PlanError
from fxzero.graph.schedule_text import format_diff, format_schedule
from fxzero.graph.step import Pass, StepGraph
from fxzero.graph.verify import verify_graph

logger = logging.getLogger(__name__)

Observer: TypeAlias = Callable[[int, str, StepGraph], None]
"""Called with the index, the name and the graph: index 0 is the capture, i the i-th pass."""


def pass_name(pass_: Pass) -> str:
    """The class name of a pass in snake case, as its file is called."""
    name = getattr(pass_, "__name__", type(pass_).__name__)
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def add_note(error: Exception, note: str) -> None:
    """Add a line to the traceback of an error, where Python (3.11 on) has notes."""
    if sys.version_info >= (3, 11):
        error.add_note(note)


class DumpSchedules:
    """Write the schedule after each pass, and what the pass changed, to text files in a folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        with _writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
        self._before = ""

    def __call__(self, index: int, name: str, step: StepGraph) -> None:
        text = format_schedule(step)
        stem = f"{index:02d}_{name}"
        with _writing(self.folder):
            (self.folder / f"{stem}.txt").write_text(text + "\n", encoding="utf-8")
            if index > 0:
                changed = format_diff(self._before, text)
                (self.folder / f"{stem}.diff").write_text(changed + "\n", encoding="utf-8")
        self._before = text


@contextlib.contextmanager
def _writing(folder: Path) -> Generator[None]:
    """Raise PlanError where the block cannot write to a folder."""
    try:
        yield
    except OSError as error:
        raise PlanError(
            f"Schedules cannot be written to {folder}: {error.strerror}. Let FXZERO_DUMP name a folder that can be "
            "written to, or unset it."
        ) from error


def check_dump_folder() -> None:
    """Raise PlanError if FXZERO_DUMP names a folder that cannot be written to; it is made if it is not there."""
    if name := os.environ.get("FXZERO_DUMP"):
        folder = Path(name)
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass


_num_dumped: dict[str, int] = {}
"""How many plans this process has written, by folder."""


def _dump() -> list[DumpSchedules]:
    """What FXZERO_DUMP asks for: an observer on rank 0, each with a folder of its own."""
    folder = os.environ.get("FXZERO_DUMP")
    if not folder or (dist.is_available() and dist.is_initialized() and dist.get_rank() != 0):
        return []
    number = _num_dumped[folder] = _num_dumped.get(folder, -1) + 1
    return [DumpSchedules(Path(folder, f"plan_{number}") if number else folder)]


def run_passes(
    step: StepGraph, passes: Sequence[Pass], *, observers: Sequence[Observer] = (), dump: bool = True
) -> None:
    """Run `passes` in order over `step`, in place.

    Args:
        dump: False for a trial, which FXZERO_DUMP is not to write.

    Raises:
        ScheduleError: a pass left the graph unsafe; a note names the pass and those before it.
    """
    dumps = _dump() if dump else []
    watching = [*dumps, *observers]  # what a pass changed is on disk when an observer refuses it
    verify_graph(step)
    for observer in watching:
        observer(0, "capture", step)
    for index, pass_ in enumerate(passes, start=1):
        try:
            pass_(step)
            verify_graph(step)
        except Exception as error:
            before = ", ".join(repr(p) for p in passes[: index - 1])
            add_note(error, f"In pass {index} of {len(passes)}: {pass_!r}; before it: [{before}]")
            for observer in dumps:
                with contextlib.suppress(Exception):  # a graph that is broken may have no text
                    observer(index, f"{pass_name(pass_)}_failed", step)
            raise
        logger.info("%s: %d nodes", pass_name(pass_), len(step.graph.nodes))
        for observer in watching:
            observer(index, pass_name(pass_), step)
