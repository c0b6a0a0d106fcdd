"""The threads that carry gloo's messages: found by name, with shorter slices than those of compute."""

from __future__ import annotations

import os
import threading

import pytest
import torch

from fxzero.comm import gloo_threads
from fxzero.comm.make import make_comm
from fxzero.testing import run_ranks


def slices(rank: int, world_size: int) -> tuple[list[int], list[int], int]:
    """The slices of gloo's threads before and after a Comm is made, and that of this thread."""
    found = gloo_threads.message_threads()
    before = [gloo_threads.slice_ns(thread) for thread in found]
    nice = [os.getpriority(os.PRIO_PROCESS, thread) for thread in found]
    make_comm(None, torch.device("cpu"))
    assert [os.getpriority(os.PRIO_PROCESS, thread) for thread in found] == nice
    return before, [gloo_threads.slice_ns(thread) for thread in found], gloo_threads.slice_ns(threading.get_native_id())


@pytest.mark.skipif(gloo_threads.slice_ns(threading.get_native_id()) == 0, reason="the kernel knows no slices")
def test_message_threads_come_first_when_they_wake() -> None:
    for before, after, own in run_ranks(2, slices):
        assert before, "gloo's threads have another name"
        assert all(slice_ns == own for slice_ns in before)
        assert after == [gloo_threads.SLICE_NS] * len(before)
        assert own > gloo_threads.SLICE_NS


def test_a_process_without_gloo_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_threads, "LOOP", "no such thread")
    assert gloo_threads.hurry_message_threads() == 0


def test_other_systems_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gloo_threads.platform, "system", lambda: "Darwin")
    assert gloo_threads.hurry_message_threads() == 0
    assert gloo_threads.slice_ns(1) == 0
