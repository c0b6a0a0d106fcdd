"""The threads that carry gloo's messages: found by name, with shorter slices than those of compute."""

import logging
import os
import threading

import pytest
import torch
from torch import nn

import fxzero
from fxzero.comm import gloo_threads
from fxzero.comm.make import make_comm
from fxzero.reference.tensor_lists import ListGlooComm
from fxzero.testing import engine_of, run_ranks

CPU = torch.device("cpu")
needs_slices = pytest.mark.skipif(
    gloo_threads.slice_ns(threading.get_native_id()) == 0, reason="the kernel knows no slices"
)


def _slices() -> dict[int, int]:
    """The slice of each thread of gloo. Threads of earlier process groups may be among them, and end at any time."""
    found = {thread: gloo_threads.slice_ns(thread) for thread in gloo_threads.message_threads()}
    return {thread: slice_ns for thread, slice_ns in found.items() if slice_ns}


def _of_new_threads(slices: dict[int, int]) -> dict[int, int]:
    return {thread: slice_ns for thread, slice_ns in slices.items() if slice_ns != gloo_threads.SLICE_NS}


def slices(rank: int, world_size: int, short: bool) -> tuple[list[int], list[int], int]:
    """The slices of the new threads of gloo before and after a Comm is made, and that of this thread."""
    before = _of_new_threads(_slices())
    nice = [os.getpriority(os.PRIO_PROCESS, thread) for thread in before]
    make_comm(None, CPU, short_gloo_slices=short)
    assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in before] == nice
    after = [gloo_threads.slice_ns(thread) for thread in before]
    return [*before.values()], after, gloo_threads.slice_ns(threading.get_native_id())


@needs_slices
def test_message_threads_come_first_when_they_wake() -> None:
    for before, after, own in run_ranks(2, slices, True):
        assert before, "gloo's threads have another name"
        assert before == [own] * len(before)
        assert after == [gloo_threads.SLICE_NS] * len(before)


@needs_slices
def test_message_threads_are_left_alone_when_asked() -> None:
    for before, after, own in run_ranks(2, slices, False):
        assert before
        assert before == after == [own] * len(before)


def compiled(rank: int, world_size: int, short: bool, without: str) -> tuple[int, int, bool]:
    """The numbers of new threads of gloo before and after a step, and whether collectives are of lists of tensors."""
    before = _of_new_threads(_slices())
    zero = fxzero.compile(nn.Linear(4, 4), short_gloo_slices=short, without=without or ())
    zero(torch.ones(2, 4)).sum().backward()
    after = _of_new_threads(_slices())
    return len(before), len(before.keys() & after.keys()), isinstance(engine_of(zero).sharded.comm, ListGlooComm)


@needs_slices
@pytest.mark.parametrize("without", ["", "flat_collectives"])
@pytest.mark.parametrize("short", [True, False])
def test_the_option_of_compile_reaches_the_threads(short: bool, without: str) -> None:
    for before, after, of_lists in run_ranks(2, compiled, short, without):
        assert before
        assert after == 0 if short else after  # a thread may have ended meanwhile
        assert of_lists is bool(without)


def logged(rank: int, world_size: int, short: bool) -> tuple[int, list[str]]:
    """How many threads of gloo are new, and what a process in which nothing was logged yet says of two Comms."""
    texts: list[str] = []
    handler = logging.Handler(logging.INFO)
    handler.emit = lambda record: texts.append(record.getMessage())
    gloo_threads._is_logged = False
    gloo_threads.logger.addHandler(handler)
    gloo_threads.logger.setLevel(logging.INFO)
    num_new = len(_of_new_threads(_slices()))
    try:
        for _ in range(2):
            make_comm(None, CPU, short_gloo_slices=short)
    finally:
        gloo_threads.logger.removeHandler(handler)
        gloo_threads.logger.setLevel(logging.NOTSET)
    return num_new, texts


@needs_slices
def test_the_number_of_changed_threads_is_logged_once() -> None:
    for num_new, texts in run_ranks(2, logged, True):
        assert num_new
        assert texts == [
            f"{num_new} threads of gloo have shorter scheduler slices now, of 100 us; "
            "short_gloo_slices=False leaves them alone"
        ]
    assert [texts for _, texts in run_ranks(2, logged, False)] == [[], []]


def test_a_process_without_gloo_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_threads, "LOOP", "no such thread")
    assert gloo_threads.hurry_message_threads() == 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_threads.platform, "system", lambda: "Darwin")
    assert gloo_threads.hurry_message_threads() == 0
    assert gloo_threads.slice_ns(1) == 0
