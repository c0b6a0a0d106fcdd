"""Proves that a trace that left blocks out ran what the rehearsal of the whole forward did, but for these blocks."""

from collections.abc import Sequence

from fxzero.capture.repeats.find import Run
from fxzero.capture.repeats.record import NotRepeatedError, Place, Record


def check_autograd(whole: Record, runs: Sequence[Run]) -> None:
    """Prove that autograd noted the same of all blocks of a run.

    Raises:
        NotRepeatedError: it did not.
    """
    for run in runs:
        for index in range(run.first + run.period, run.end):
            path, before = whole.segments[index].path, whole.segments[index - run.period].path
            if whole.autograd.get(str(path)) != whole.autograd.get(str(before)):
                raise NotRepeatedError(f"the gradients of {path} and {before} are not made alike")
            if f"{path}*" in whole.autograd and index + 1 < run.end:
                raise NotRepeatedError(f"something runs behind {path}")


def check_traced(whole: Record, traced: Record, runs: Sequence[Run]) -> None:
    """Prove that the blocks of a trace, and all between them, are those of the rehearsal.

    Raises:
        NotRepeatedError: they are not.
    """
    skipped = {index for run in runs for index in run.skipped}
    kept = [index for index in range(len(whole.segments)) if index not in skipped]
    if len(kept) != len(traced.segments):
        raise NotRepeatedError("something runs between blocks, where they are left out")
    run_of = {index: run for run in runs for index in range(run.first, run.end)}
    new_index = {index: position for position, index in enumerate(kept)}

    def expected(place: Place, index: int) -> Place:
        """Where the trace makes what the rehearsal makes in a place that it reads in a segment."""
        made_in, run = place[0], run_of.get(index)
        if not isinstance(made_in, int):
            return place
        if run is not None and index - made_in <= run.period and whole.segments[made_in].path is not None:
            return new_index[index] - (index - made_in), *place[1:]
        if made_in not in new_index:
            raise NotRepeatedError(f"what {whole.segments[made_in].path} makes is read behind the next blocks")
        return new_index[made_in], *place[1:]

    for index, segment in zip(kept, traced.segments, strict=True):
        then = whole.segments[index]
        if (segment.path, segment.operators) != (then.path, then.operators):
            raise NotRepeatedError(f"{then.path or 'the rest'} runs other operators if blocks are left out")
        if segment.reads != [expected(place, index) for place in then.reads]:
            raise NotRepeatedError(f"{then.path or 'the rest'} reads other values if blocks are left out")
    if traced.outputs != [expected(place, len(whole.segments)) for place in whole.outputs]:
        raise NotRepeatedError("the model returns other values if blocks are left out")
    paths = {f"{whole.segments[index].path}{star}" for index in skipped for star in ("", "*")}
    if {path: names for path, names in whole.autograd.items() if path not in paths} != traced.autograd:
        raise NotRepeatedError("gradients are made otherwise if blocks are left out")
