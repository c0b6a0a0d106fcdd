"""Ranks that do different things, fail, end or die: all are told within seconds, with the rank and the difference."""

import os
import socket
import sys
from subprocess import PIPE, Popen

import pytest

from fxzero.testing import run_ranks
from tests.distributed import apart_workers

FORWARD, NEXT = (
    "forward of Words (model 1), micro-batch 1 of step 2",
    "forward of Words (model 1), micro-batch 1 of step 3",
)
DIFFERENCES = {
    "state_dict": (FORWARD, "state_dict of Words (model 1)"),
    "evaluation": (FORWARD, "evaluation of Words (model 1)"),
    "other model": (FORWARD, "forward of Words (model 2)"),
    "clip": (FORWARD, "clip_grad_norm_(max_norm=1.0, norm_type=2.0) of Words (model 1)"),
    "no backward": ("backward of Words (model 1), micro-batch 1 of step 2", NEXT),
    "no_sync": ("backward of Words (model 1)", "backward under no_sync() of Words (model 1)"),
    "micro-batch": (NEXT, "forward of Words (model 1), micro-batch 2 of step 2"),
    "no step": (NEXT, "forward of Words (model 1), micro-batch 2 of step 2"),
    "learning rate": ("SGD group 0: lr=0.1", "SGD group 0: lr=0.3"),
    "frozen": (FORWARD, "micro-batch 1 of step 2, with words.weight frozen since its first call"),
}
"""What the others and the odd rank are in, by what the odd rank does."""


@pytest.mark.parametrize("how", DIFFERENCES)
def test_a_rank_that_does_something_else_is_named_on_both(how: str) -> None:
    errors = run_ranks(2, apart_workers.do_something_else, how)
    here, there = DIFFERENCES[how]
    for error in errors:
        assert error.startswith("RankMismatchError: "), error
        assert here in error and there in error, error
        assert "rank 0" in error and "rank 1" in error, error


@pytest.mark.parametrize(
    ("how", "named"),
    [
        ("bound", "norm of order 2.0 of gradients for max_norm=2.0"),
        ("order", "norm of order inf of gradients for max_norm=1.0"),
        ("no optimizer", "first step of an optimizer of Words"),
    ],
)
def test_a_rank_that_clips_otherwise_or_has_no_optimizer_is_named(how: str, named: str) -> None:
    for error in run_ranks(2, apart_workers.clip_and_step, how):
        assert error.startswith("RankMismatchError: Ranks do different things") and named in error, error


def test_of_three_ranks_all_name_the_odd_one() -> None:
    for error in run_ranks(3, apart_workers.do_something_else, "micro-batch"):
        assert error.startswith("RankMismatchError: Ranks do different things"), error
        assert "rank 2 in forward of Words (model 1), micro-batch 2" in error or "rank 2 is in" in error, error


def test_a_rank_that_is_slow_is_waited_for() -> None:
    assert run_ranks(2, apart_workers.be_slow) == ["nothing", "nothing"]


@pytest.mark.parametrize("how", ["waits in a barrier", "is gone"])
def test_a_rank_that_has_run_out_of_batches_is_named(how: str) -> None:
    error = run_ranks(2, apart_workers.run_out, how, dies=(1,) if how == "is gone" else ())[0]
    assert "rank 1" in error and "If it has run out of batches" in error, error
    assert ("torch.distributed.barrier at apart_workers.py" in error) == (how != "is gone"), error


STATE = {
    "buffer": "buffer mean: torch.float32 3",
    "buffers": "buffer extra: torch.float32 1",
    "not persistent": "buffer mean: torch.float32 2, not persistent",
    "class": "Adagrad group 0",
    "learning rate": "SGD group 0: lr=0.2",
    "groups": "1 parameters, words.weight to words.weight",
    "built later": "rank 1 has SGD group 0: lr=0.2",
}


@pytest.mark.parametrize("how", STATE)
def test_optimizers_and_buffers_that_differ_are_named(how: str) -> None:
    for error in run_ranks(2, apart_workers.differ_in_state, how):
        assert error.startswith("RankMismatchError: ") and STATE[how] in error, error


def test_a_rank_that_died_in_its_trace_is_named() -> None:
    error = run_ranks(2, apart_workers.die_in_trace, dies=(1,))[0]
    assert error.startswith("CommunicationError: rank 1 has died or ended"), error


def test_a_rank_that_died_before_it_compiled_anything_is_named() -> None:
    error = run_ranks(2, apart_workers.die_before_compile, dies=(1,))[0]
    assert error.startswith("CommunicationError: rank 1 has died or ended before it compiled a model"), error


@pytest.mark.parametrize("when", ["before compile", "between steps"])
def test_rank_0_that_died_with_the_store_is_named(when: str) -> None:
    with socket.socket() as chosen:
        chosen.bind(("127.0.0.1", 0))
        port = chosen.getsockname()[1]
    env = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "WHEN": when}
    command = [sys.executable, "-c", "from tests.distributed.apart_workers import rank_0_dies; rank_0_dies()"]
    ranks = [Popen(command, env={**env, "RANK": str(rank)}, stderr=PIPE, text=True) for rank in range(2)]
    errors = [rank.communicate()[1] for rank in ranks]
    assert "CommunicationError" in errors[1] and "(rank 0, where torchrun does not) has died or ended" in errors[1]


def test_equal_models_that_are_called_in_another_order_are_named() -> None:
    for error in run_ranks(2, apart_workers.call_equal_models_in_another_order):
        assert error.startswith("RankMismatchError: "), error
        assert "Words (model 1)" in error and "Words (model 2)" in error, error


def test_a_rank_that_freezes_alone_what_all_had_frozen_before_is_named() -> None:
    for error in run_ranks(2, apart_workers.freeze_and_thaw):
        assert error.startswith("RankMismatchError: Ranks do different things"), error
        assert "with words.weight frozen since its first call" in error, error


def test_a_rank_that_catches_its_error_alone_stops_all() -> None:
    first, second = run_ranks(2, apart_workers.catch_alone)
    assert first[0].startswith("CommunicationError: Rank 0 of 2 did not complete the")
    assert "rank 1 failed in forward of Words (model 1), micro-batch 1 of step 2: IndexError: index out of" in first[0]
    assert second[0].startswith("IndexError") and "rank 0" in second[1]


@pytest.mark.parametrize(
    ("where", "world_size"), [("before", 2), ("forward", 3), ("backward", 2), ("after backward", 2)]
)
def test_all_leave_a_step_out_in_which_one_rank_fails_and_go_on(where: str, world_size: int) -> None:
    results = run_ranks(world_size, apart_workers.leave_out, where)
    for errors, is_trained in results:
        assert is_trained and len(errors) == 2
    for errors, _ in results[:-1]:
        for error in errors:
            assert error.startswith(f"StepLeftOutError: rank {world_size - 1} failed"), error
            assert "(apart_workers.py:" in error


def test_a_step_that_was_taken_by_some_is_not_left_out() -> None:
    first, second = run_ranks(2, apart_workers.fail_after_stepping)
    assert second[0] == "OSError: no space"
    assert "rank 1 failed in the middle of an optimizer's step: OSError: no space" in first[-1]
    assert first[-1].startswith("CommunicationError") and second[-1].startswith("CommunicationError")


def test_steps_inside_of_each_other_are_refused() -> None:
    assert all("step_together() inside of another one" in error for error in run_ranks(2, apart_workers.nest_steps))
