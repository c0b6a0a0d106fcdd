"""Without optimizations, on real gloo ranks: the same training, and what is turned off can be seen to be."""

import itertools
from typing import Any

import pytest
import torch

from fxzero.reference.ablation import OPTIMIZATIONS, Without
from fxzero.testing import run_ranks
from tests.distributed import ablation_workers as workers
from tests.distributed import api_workers

EACH: list[Without] = [(name,) for name in OPTIMIZATIONS]
EVERYTHING: list[Without] = [*EACH, "all"]


@pytest.mark.parametrize(
    ("world_size", "configurations"),
    [
        (1, [("persistent_buffers",), "all"]),
        (2, [("flat_collectives",), "all"]),
        pytest.param(3, EVERYTHING, marks=pytest.mark.exhaustive),
    ],
)
def test_training_is_that_with_all_optimizations(world_size: int, configurations: list[Without]) -> None:
    """Three ranks train without each; two and one without what they do otherwise, where sums have no other order."""
    run_ranks(world_size, workers.beside_full, "mixed", configurations, timeout=120)


@pytest.mark.parametrize("options", [(True, 3), (False, 2)], ids=["no_sync", "stage_2"])
def test_training_is_the_same_with_other_options(options: tuple[bool, int]) -> None:
    run_ranks(2, workers.beside_full, "mixed", [("persistent_buffers", "layout"), "all"], *options, timeout=120)


@pytest.mark.exhaustive
def test_a_deep_model_trains_the_same_without_all_of_them() -> None:
    run_ranks(2, workers.beside_full, "gpt", ["all"], timeout=120)


@pytest.mark.parametrize("without", ["persistent_buffers", pytest.param("all", marks=pytest.mark.exhaustive)])
def test_kept_buckets_may_be_gathered_again_by_another_phase_in_between(without: Without) -> None:
    run_ranks(2, workers.two_forwards, without)


def test_an_error_in_the_middle_of_a_step_leaves_nothing_behind() -> None:
    run_ranks(2, api_workers.fail_and_go_on, "buckets", "flat_collectives", "persistent_buffers")


@pytest.mark.parametrize("world_size", [2, 3])
def test_lists_of_tensors_are_gathered_and_reduced(world_size: int) -> None:
    mean = (world_size - 1) / 2
    for gathered in run_ranks(world_size, workers.reduce_lists):
        assert gathered == pytest.approx([2 * (index + mean) for index in range(len(gathered))])


@pytest.fixture(scope="module")
def observed() -> dict[str, list[dict[str, Any]]]:
    """What each configuration does in a step, by its name, on both ranks."""
    ranks = run_ranks(2, workers.observe, [(), *EVERYTHING], timeout=120)
    names = ["full", *OPTIMIZATIONS, "all"]
    return {name: [rank[index] for rank in ranks] for index, name in enumerate(names)}


Observed = dict[str, list[dict[str, Any]]]


def _lines(seen: dict[str, Any]) -> list[tuple[str, str]]:
    """Action and bucket of each collective and wait of a schedule."""
    rows = [line.split() for line in seen["text"].splitlines()[1:]]
    actions = ("all_gather", "wait", "reduce_scatter", "wait_reduce")
    return [(row[0], row[1]) for row in rows if row[0] in actions]


def test_the_header_says_what_is_turned_off(observed: Observed) -> None:
    for name, (seen, _) in observed.items():
        header = seen["text"].splitlines()[0]
        expected = {"full": "", "all": ", ".join(OPTIMIZATIONS)}.get(name, name)
        assert header.partition("  without ")[2] == expected


def test_without_overlap_every_wait_follows_its_start(observed: Observed) -> None:
    for name in ("overlap", "all"):
        lines = _lines(observed[name][0])
        assert len(lines) >= 6
        for start, wait in zip(lines[::2], lines[1::2], strict=True):
            assert wait == (start[0].replace("all_gather", "wait").replace("reduce_scatter", "wait_reduce"), start[1])


def test_without_prefetch_gathers_alone_are_waited_for_at_once(observed: Observed) -> None:
    lines = _lines(observed["prefetch"][0])
    for line, after in itertools.pairwise(lines):
        if line[0] == "all_gather":
            assert after == ("wait", line[1])
    assert [line[0] for line in lines if line[0].endswith("reduce")][-2:] == ["wait_reduce"] * 2
    full = _lines(observed["full"][0])
    assert full[:2] == [("all_gather", full[0][1]), ("all_gather", full[1][1])]
    assert lines != full


def test_without_buckets_each_parameter_has_collectives_of_its_own(observed: Observed) -> None:
    for name in ("buckets", "all"):
        lines = _lines(observed[name][0])
        assert sum(action == "reduce_scatter" for action, _ in lines) == 5
        assert all(".." not in bucket for _, bucket in lines)
    assert sum(action == "reduce_scatter" for action, _ in _lines(observed["full"][0])) == 2


def test_without_layout_copies_interleave(observed: Observed) -> None:
    assert "  interleaved: " in observed["layout"][0]["text"]
    copies = "aten::_foreach_copy_"
    assert observed["full"][0]["calls"][copies] == 0
    assert observed["layout"][0]["calls"][copies] == 6, "one for each collective"
    assert "interleaved: " not in observed["all"][0]["text"], "one parameter has nothing to interleave"


def test_without_flat_collectives_lists_are_sent(observed: Observed) -> None:
    for name, (seen, _) in observed.items():
        calls = seen["calls"]
        num = len(_lines(seen)) // 2
        lists = calls["c10d::allgather_"] + calls["c10d::reduce_scatter_"]
        assert lists == (num if name in ("flat_collectives", "all") else 0)
        assert calls["c10d::send"] == num - lists + 1  # the norm of the gradients travels as a message, too


def test_without_persistent_buffers_the_allocator_is_asked_in_each_step(observed: Observed) -> None:
    for name, ranks in observed.items():
        for seen in ranks:
            if name in ("full", "overlap", "prefetch", "buckets", "layout"):
                assert seen["allocations"] == 0
            if name in ("persistent_buffers", "all"):
                assert seen["arena"] == 0 and seen["left"] == 0
                assert "allocated at each use" in dict(seen["report"])
            else:
                assert seen["arena"] > 0 and seen["left"] is None
                assert "arena" in dict(seen["report"])
    for seen in observed["persistent_buffers"]:
        assert seen["allocations"] == 3, "two gathers and a reduce of the bucket of large weights"
    for seen in observed["all"]:
        assert seen["allocations"] >= 6


def test_without_a_fused_norm_the_host_reads_the_norm_of_each_parameter(observed: Observed) -> None:
    read = "aten::_local_scalar_dense"
    for name, ranks in observed.items():
        num_read = [seen["calls"][read] for seen in ranks]
        if name == "all":
            assert num_read == [6, 5], "five parameters, all but the smallest cut over both ranks, and the sum"
        elif name == "fused_norm":
            assert all(number > 1 for number in num_read)
        else:
            assert num_read == [0, 0]


def test_gradients_are_clipped_to_the_same_norm(observed: Observed) -> None:
    full = observed["full"][0]
    assert full["norm"] > 0.01
    for ranks in observed.values():
        for seen in ranks:
            assert seen["norm"] == pytest.approx(full["norm"], rel=1e-6)
            for fqn, gradient in full["gradients"].items():
                torch.testing.assert_close(seen["gradients"][fqn], gradient, rtol=1e-5, atol=0)
