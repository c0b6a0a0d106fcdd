"""Run a function on real gloo ranks, each a process: for the tests, and for yours.

    results = run_ranks(3, worker, "argument")    # calls worker(rank, world_size, "argument") on each

The rank processes are started once and serve every later call, each call with a new process group and the seed 0: so
a call costs some 20 ms instead of the seconds that importing torch takes. One that died is forked anew from a process
that has imported torch; only rank 0 is a process of its own, in which strings have other hashes than in the others, as
they have on all ranks of a real run. Functions must be importable (module level).

    engine_of(zero).sharded.comm                  # what is behind a compiled module, for tests that look inside
"""

import atexit
import contextlib
import faulthandler
import gc
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] (public, documented)
from torch.distributed.distributed_c10d import PrefixStore

from fxzero.api import ZeroModule
from fxzero.module.engine import Engine

_of_rank_0 = multiprocessing.get_context("spawn")
_of_others = multiprocessing.get_context("forkserver")
_of_others.set_forkserver_preload([__name__, "torch._dynamo"])  # which the first trace imports


class RankError(AssertionError):
    """A rank of `run_ranks` raised, died, or did not finish in time; the message has its traceback."""


@dataclass
class _Rank:
    process: Any
    connection: Connection
    stack_file: str
    """Where the rank writes the stacks of its threads when its time is over."""

    def stop(self) -> None:
        self.process.kill()
        self.process.join()
        self.connection.close()


class _Pool:
    """Rank processes, and the store through which they find each other."""

    def __init__(self) -> None:
        self.ranks: dict[int, _Rank] = {}
        self._store: TCPStore | None = None
        self.num_runs = 0
        self.directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def store(self) -> TCPStore:
        if self._store is None:
            self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return self._store

    def grow(self, world_size: int) -> None:
        if self.directory is None:
            self.directory = tempfile.TemporaryDirectory(prefix="fxzero-ranks-")
        missing = [rank for rank in range(world_size) if rank not in self.ranks]
        for rank in missing:
            context = _of_others if rank else _of_rank_0
            ours, theirs = context.Pipe()
            stack_file = f"{self.directory.name}/rank{rank}-{time.monotonic_ns()}"
            process = context.Process(target=_serve, args=(theirs, stack_file), daemon=True)
            process.start()
            theirs.close()
            self.ranks[rank] = _Rank(process, ours, stack_file)
        for rank in missing:
            self.ranks[rank].connection.recv()  # it has imported torch: no later time limit measures that

    def stop(self, ranks: Iterable[int]) -> None:
        """End rank processes; the next run starts new ones in their place."""
        for rank in list(ranks):
            self.ranks.pop(rank).stop()

    def close(self) -> None:
        self.stop(self.ranks)
        if self.directory is not None:
            self.directory.cleanup()


_pool = _Pool()
atexit.register(_pool.close)


def engine_of(zero: ZeroModule) -> Engine:
    """The engine behind a compiled module: its shards, arena, communication and plans.

    For tests and measurements; what it has may be another with every version.
    """
    return zero._fxzero_engine


def run_ranks(
    world_size: int,
    fn: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    group_timeout: float = 30.0,
    dies: Collection[int] = (),
) -> list[Any]:
    """Call `fn(rank, world_size, *args)` on every rank of a new gloo process group; their results, in rank order.

    Args:
        timeout: seconds until ranks that have not returned are killed.
        group_timeout: seconds after which a collective of the process group gives up.
        dies: ranks whose processes are expected to die; their result is None.

    Raises:
        RankError: a rank raised (the message is the traceback of the first that did), died, or ran out of time.
    """
    _pool.grow(world_size)
    _pool.num_runs += 1
    for rank in range(world_size):
        job = (fn, args, rank, world_size, _pool.store.port, f"run{_pool.num_runs}", timeout, group_timeout)
        _pool.ranks[rank].connection.send((list(sys.path), pickle.dumps(job)))
    answers: dict[int, _Answer] = {}
    try:
        _collect(answers, world_size, time.monotonic() + timeout + 0.5, dies)
        failures = [(answer.failed_at, rank) for rank, answer in answers.items() if answer.failed_at is not None]
        failures = [(at, rank) for at, rank in failures if not (at == _DEATH and rank in dies)]
        if failures:
            rank = min(failures)[1]
            raise RankError(f"rank {rank} of {world_size} failed:\n{answers[rank].value}")
        if late := sorted({*range(world_size)} - answers.keys()):
            raise RankError(f"ranks {late} of {world_size} did not finish in time:\n{_stacks(late)}")
    finally:
        usable = {rank for rank, answer in answers.items() if answer.failed_at is None}
        _pool.stop({*range(world_size)} - usable)
    return [None if rank in dies else answers[rank].value for rank in range(world_size)]


_DEATH = float("-inf")
"""When a dead rank failed: before all that failed, as they may have failed because of it."""


@dataclass
class _Answer:
    """What a rank returned, or why and when it did not."""

    failed_at: float | None
    value: Any


def _collect(answers: dict[int, _Answer], world_size: int, deadline: float, dies: Collection[int]) -> None:
    """Receive answers until all are there; a second after the first failure those that are there will do."""
    rank_of = {_pool.ranks[rank].connection: rank for rank in range(world_size)}
    while rank_of and (ready := wait(list(rank_of), max(0.0, deadline - time.monotonic()))):
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = rank_of.pop(connection)
            try:
                answers[rank] = pickle.loads(connection.recv_bytes())
            except EOFError:
                process = _pool.ranks[rank].process
                process.join()
                answers[rank] = _Answer(_DEATH, f"it died with exit code {process.exitcode}\n{_stacks([rank])}")
            if answers[rank].failed_at is not None and rank not in dies:
                deadline = min(deadline, time.monotonic() + 1.0)


def _stacks(ranks: list[int]) -> str:
    text = ""
    for rank in ranks:
        with contextlib.suppress(OSError), open(_pool.ranks[rank].stack_file) as file:
            text += f"rank {rank}:\n{file.read()}"
    return text


def _serve(connection: Connection, stack_file: str) -> None:
    """The main loop of one rank process."""
    torch.set_num_threads(1)
    gc.freeze()  # torch's own objects, or each collection would walk them
    connection.send("ready")
    with open(stack_file, "w") as stacks:
        while True:
            try:
                paths, job = connection.recv()
            except EOFError:
                return
            sys.path[:] = paths
            try:
                payload = pickle.dumps(_run(stacks, *pickle.loads(job)))
            except Exception:
                payload = pickle.dumps(_Answer(time.monotonic(), traceback.format_exc()))
            connection.send_bytes(payload)


def _run(
    stacks: Any,
    fn: Callable[..., Any],
    args: tuple[Any, ...],
    rank: int,
    world_size: int,
    port: int,
    run: str,
    timeout: float,
    group_timeout: float,
) -> _Answer:
    faulthandler.dump_traceback_later(timeout, file=stacks)
    store = PrefixStore(run, TCPStore("127.0.0.1", port, is_master=False))
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=group_timeout)
    )
    try:
        torch.manual_seed(0)
        return _Answer(None, fn(rank, world_size, *args))
    except Exception:
        return _Answer(time.monotonic(), traceback.format_exc())
    finally:
        faulthandler.cancel_dump_traceback_later()
        if dist.is_initialized():  # not where `fn` failed between two groups
            dist.destroy_process_group()
