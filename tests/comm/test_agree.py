"""Agreement over a store: ranks are threads here; real processes are in test_agree_ranks.py."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from expecttest import assert_expected_inline
from torch.distributed import (  # pyright: ignore[reportPrivateImportUsage]
    FileStore,
    HashStore,
    Store,
)

from fxzero.comm.agree import Agreement, agree, describe, report_failure, reporting_failure
from fxzero.comm.phases import Stop
from fxzero.errors import CommunicationError, RankMismatchError


def on_ranks(num_ranks: int, body: Callable[[int], None]) -> list[str]:
    """Run a function on one thread per rank; the texts of the errors, empty for none."""

    def run(rank: int) -> str:
        try:
            body(rank)
        except RankMismatchError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(num_ranks) as pool:
        return list(pool.map(run, range(num_ranks)))


def compare(store: Store, rank: int, members: tuple[int, ...], lines: list[str], timeout_s: float = 20.0) -> None:
    Agreement.enter(store, "layout", members, rank).run(lines, timeout_s)


def make_store(kind: str, tmp_path: Path) -> Store:
    return HashStore() if kind == "hash" else FileStore(str(tmp_path / "store"))


@pytest.mark.parametrize("kind", ["hash", "file"])
def test_ranks_agree_and_leave_no_keys_when_lines_are_equal(kind: str, tmp_path: Path) -> None:
    store = make_store(kind, tmp_path)
    for num_lines in (0, 1, 3000):
        lines = [f"bucket {index}" for index in range(num_lines)]
        assert on_ranks(3, lambda rank, lines=lines: compare(store, rank, (0, 1, 2), lines)) == ["", "", ""]
    counts = 3
    assert store.num_keys() - (kind == "file") == counts + 3  # each rank's call count and where it waits


def test_every_rank_names_the_first_difference_when_lines_differ() -> None:
    store = HashStore()

    def body(rank: int) -> None:
        dtype = "bfloat16" if rank == 1 else "float32"
        compare(store, rank, (0, 1, 2, 3), ["model MLP", f"bucket 0 {dtype}", f"end {rank}"])

    errors = on_ranks(4, body)
    assert len(set(errors)) == 1
    assert_expected_inline(
        errors[0],
        """\
Ranks compiled different things: line 2 of the layout differs.
  ranks 0, 2-3: bucket 0 float32
  rank 1: bucket 0 bfloat16
Run the same script with the same settings on every rank.""",
    )


def test_difference_is_reported_within_seconds_when_another_rank_is_late() -> None:
    store = HashStore()
    started = time.monotonic()
    errors = on_ranks(2, lambda rank: compare(store, rank, (0, 1, 7), [f"lines of {rank}"]))
    assert time.monotonic() - started < 5.0
    assert errors[0] == errors[1]
    assert "rank 7: not there yet" in errors[0]
    late = on_ranks(1, lambda rank: compare(store, 7, (0, 1, 7), ["lines of 7"]))
    assert "rank 7: lines of 7" in late[0]


def test_line_count_differs_is_a_difference() -> None:
    assert_expected_inline(
        describe("layout", (0, 1), {0: ["a", "b"], 1: ["a"]}),
        """\
Ranks compiled different things: line 2 of the layout differs.
  rank 0: b
  rank 1: (nothing: the end)
Run the same script with the same settings on every rank.""",
    )


def test_others_stop_at_once_when_a_rank_reports_a_failure() -> None:
    store = HashStore()

    def body(rank: int) -> None:
        if rank == 1:
            Agreement.enter(store, "layout", (0, 1, 2), rank).post("CaptureError: aten.nonzero in model.py:7")
        else:
            compare(store, rank, (0, 1, 2), ["lines"])

    started = time.monotonic()
    errors = on_ranks(3, body)
    assert time.monotonic() - started < 5.0
    assert_expected_inline(
        errors[0],
        """\
rank 1 failed: CaptureError: aten.nonzero in model.py:7
The other ranks stop here, before they exchange anything (layout).""",
    )
    assert errors == [errors[0], "", errors[0]]
    # The next model is compiled as if nothing had happened.
    assert on_ranks(3, lambda rank: compare(store, rank, (0, 1, 2), ["lines"])) == ["", "", ""]


def test_absent_ranks_are_named_when_time_is_over() -> None:
    store = HashStore()
    errors = on_ranks(2, lambda rank: compare(store, rank, (0, 1, 2, 3, 5), ["lines"], timeout_s=0.3))
    assert any("Ranks 2-3, 5 did not come to compare the layout within 0.3 s" in error for error in errors)
    assert all("did not come" in error for error in errors)


def test_a_rank_that_died_between_posting_and_counting_is_looked_for() -> None:
    store, lines = HashStore(), ["a"]
    Agreement.enter(store, "layout", (0, 1), 1)._write(lines)
    asked: list[Sequence[int]] = []

    def look(ranks: Sequence[int]) -> Stop:
        asked.append(ranks)
        return Stop("end", "rank 1 has died")

    with pytest.raises(CommunicationError, match="rank 1 has died"):
        Agreement.enter(store, "layout", (0, 1), 0).run(lines, 20.0, look=look)
    assert asked == [[1]]


def test_ranks_are_told_when_they_have_other_ideas_of_the_group() -> None:
    store = HashStore()
    groups = [(0, 1), (0, 1, 2), (0, 1, 2)]
    started = time.monotonic()
    errors = on_ranks(3, lambda rank: compare(store, rank, groups[rank], ["lines"]))
    assert time.monotonic() - started < 8.0
    assert "rank 0 for a group of 2 (ranks 0-1), rank 1 for a group of 3 (ranks 0-2)" in errors[0]
    assert all("Ranks compile for different process groups (layout)" in error for error in errors)


def test_overlapping_groups_do_not_disturb_each_other() -> None:
    """Ranks 0 and 1 agree in two groups; rank 0 is long gone from the first one while rank 1 still reads it."""
    store = HashStore()
    slow = threading.Event()

    def body(rank: int) -> None:
        if rank < 2:
            compare(store, rank, (0, 1), ["small"])
        if rank == 2:
            slow.wait(1.5)
        compare(store, rank, (0, 1, 2), ["large"])

    assert on_ranks(3, body) == ["", "", ""]


def test_nothing_happens_without_a_process_group() -> None:
    agree(None, "layout", ["lines"], timeout=timedelta(seconds=1))
    report_failure(None, "layout", ValueError("no"))
    with pytest.raises(ValueError, match="no"), reporting_failure(None, "layout"):
        raise ValueError("no")
