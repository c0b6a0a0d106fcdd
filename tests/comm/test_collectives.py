"""Collectives between real gloo ranks: bytes, order of sums, memory they leave alone, and what a dead peer causes."""

import cProfile
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fxzero.comm.base import LocalComm
from fxzero.comm.gloo import GlooComm
from fxzero.comm.group import GroupComm
from fxzero.comm.make import make_comm
from fxzero.comm.nccl import NcclComm
from fxzero.errors import CommunicationError
from fxzero.graph.layout import Payload
from fxzero.testing import run_ranks
from tests.helpers.payloads import call, make_payload, poisoned, reduced, values

CPU = torch.device("cpu")
WORLD_SIZES = [1, 2, 3, 4]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def average_in_rank_order(payload: Payload, rank: int, seed: int) -> torch.Tensor:
    shards = [values(payload, seed + peer).split(payload.slice_numel)[rank] for peer in range(payload.num_slices)]
    total = shards[0]
    for shard in shards[1:]:
        total = total + shard
    return total / payload.num_slices


def gather_and_reduce(rank: int, world_size: int) -> None:
    comm = make_comm(None, CPU)
    assert isinstance(comm, LocalComm if world_size == 1 else GlooComm)
    for dtype in DTYPES:
        payload = make_payload(world_size, dtype, f"gather.{dtype}")
        expected = values(payload, 5)
        shard = expected.split(payload.slice_numel)[rank].clone()
        full = shard if comm.gathers_in_place else poisoned(payload.numel, dtype)
        start, wait = comm.bind_gather(payload, shard, full)
        for _ in range(2):
            call(start)
            call(wait)
            assert torch.equal(full, expected)
        comm.drain()

        for accumulate in (False, True):
            full = values(payload, 10 + rank)
            shard = torch.ones(payload.slice_numel, dtype=dtype) if accumulate else poisoned(payload.slice_numel, dtype)
            average = average_in_rank_order(payload, rank, 10)
            assert torch.equal(
                reduced(comm, payload, full, shard, accumulate=accumulate), 1 + average if accumulate else average
            )


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gather_and_reduce_are_exact_when_ranks_are_real(world_size: int) -> None:
    run_ranks(world_size, gather_and_reduce)


def halves_that_overflow(rank: int, world_size: int) -> None:
    comm = make_comm(None, CPU)
    payload = make_payload(world_size, torch.float16, "halves")
    ranks = [values(payload, peer).clone() for peer in range(world_size)]
    for full in ranks:
        full[::3] = 40_000.0  # the sum overflows, the mean does not
    ranks[0][::6] = -40_000.0
    ranks[-1][1] = float("inf")
    own = [full.split(payload.slice_numel)[rank] for full in ranks]
    total = own[0]
    for term in own[1:]:
        total = total + term
    quotients = own[0] / world_size
    for term in own[1:]:
        quotients = quotients + term / world_size
    plain = total / world_size
    average = torch.where(plain.isfinite(), plain, quotients)
    assert not torch.equal(plain, average)
    for accumulate in (False, True):
        shard = torch.zeros(payload.slice_numel, dtype=torch.float16)
        full = ranks[rank].clone()
        assert torch.equal(reduced(comm, payload, full, shard, accumulate=accumulate), average)


@pytest.mark.parametrize("world_size", [2, 3])
def test_halves_whose_sum_overflows_have_the_mean_of_ddp(world_size: int) -> None:
    run_ranks(world_size, halves_that_overflow)


def many_in_flight(rank: int, world_size: int) -> None:
    """Twelve collectives at once, waited for in reverse order, step after step, with new values each step."""
    comm = make_comm(None, CPU)
    payloads = [make_payload(world_size, name=f"layers.{index}", numel=40_000 * index + 5) for index in range(6)]
    shards = [torch.empty(payload.slice_numel) for payload in payloads]
    fulls = [poisoned(payload.numel, payload.dtype) for payload in payloads]
    grads = [torch.empty(payload.numel) for payload in payloads]
    grad_shards = [torch.empty(payload.slice_numel) for payload in payloads]
    bound: list[Any] = []
    for index, payload in enumerate(payloads):
        scratch = torch.empty(comm.reduce_scratch_numel(payload, accumulate=False))
        bound.append(comm.bind_gather(payload, shards[index], fulls[index]))
        bound.append(comm.bind_reduce(payload, grads[index], scratch, grad_shards[index], accumulate=False))
    for step in range(4):
        for index, payload in enumerate(payloads):
            shards[index].copy_(values(payload, step + index).split(payload.slice_numel)[rank])
            grads[index].copy_(values(payload, 100 * step + index + rank))
        for start, _ in bound:
            start()
        for _, wait in reversed(bound):
            wait()
        comm.drain()
        for index, payload in enumerate(payloads):
            assert torch.equal(fulls[index], values(payload, step + index))
            assert torch.equal(grad_shards[index], average_in_rank_order(payload, rank, 100 * step + index))


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_values_are_right_when_many_collectives_are_in_flight(world_size: int) -> None:
    run_ranks(world_size, many_in_flight)


def gather_in_place(rank: int, world_size: int) -> None:
    comm = make_comm(None, CPU)
    payload = make_payload(world_size)
    full = poisoned(payload.numel, payload.dtype)
    shard = full.split(payload.slice_numel)[rank]
    shard.copy_(values(payload, 3).split(payload.slice_numel)[rank])
    start, wait = comm.bind_gather(payload, shard, full)
    call(start)
    call(wait)
    comm.drain()
    assert torch.equal(full, values(payload, 3))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_gather_works_when_the_shard_lies_in_its_bucket(world_size: int) -> None:
    run_ranks(world_size, gather_in_place)


def blocking_operations(rank: int, world_size: int, over_nccl_code: bool = False) -> None:
    group = dist.group.WORLD
    assert group is not None
    comm = NcclComm(group) if over_nccl_code else make_comm(group, CPU)
    total = torch.tensor([float(rank), 1.0])
    comm.all_reduce(total)
    assert total.tolist() == [sum(range(world_size)), world_size]
    largest = torch.tensor(float(rank))
    comm.all_reduce(largest, "max")
    assert largest.item() == world_size - 1

    for dtype in (*DTYPES, torch.float8_e4m3fn, torch.bool, torch.int64):
        payload = make_payload(world_size, dtype)
        expected = (values(make_payload(world_size), 1)[:1] * torch.arange(payload.numel)).to(dtype)
        shard = torch.zeros(payload.slice_numel, dtype=dtype)
        comm.scatter_from_rank0(shard, expected.clone() if rank == 0 else None)
        assert as_ints(shard) == as_ints(expected.split(payload.slice_numel)[rank])
        full = torch.zeros(payload.numel, dtype=dtype)
        comm.gather_to_all(shard, full)
        assert as_ints(full) == as_ints(expected)
        full.zero_()
        comm.gather_to_rank0(shard, full if rank == 0 else None)
        assert rank != 0 or as_ints(full) == as_ints(expected)

    matrix = torch.full((4, 6), rank + 1).t()[1:5:2]
    comm.broadcast_from_rank0(matrix)
    assert matrix.eq(1).all()
    flag = torch.tensor(rank == 0)
    comm.broadcast_from_rank0(flag)
    assert flag
    comm.broadcast_from_rank0(torch.empty(0, 3))


def as_ints(tensor: torch.Tensor) -> list[int]:
    return tensor.view(torch.uint8).tolist()


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_blocking_operations_move_every_dtype(world_size: int) -> None:
    run_ranks(world_size, blocking_operations)


def nccl_code_on_gloo(rank: int, world_size: int) -> None:
    """The calls that NcclComm makes exist in gloo too, so what it binds can be checked without a GPU."""
    group = dist.group.WORLD
    assert group is not None
    comm = NcclComm(group)
    payload = make_payload(world_size)
    expected = values(payload, 5)
    full = poisoned(payload.numel, payload.dtype)
    start, wait = comm.bind_gather(payload, expected.split(payload.slice_numel)[rank].clone(), full)
    call(start)
    call(wait)
    assert torch.equal(full, expected)
    average = average_in_rank_order(payload, rank, 10)
    for before, accumulate in ((0.0, False), (1.0, True)):
        shard = torch.full((payload.slice_numel,), 1.0)
        reduced(comm, payload, values(payload, 10 + rank), shard, accumulate=accumulate)
        torch.testing.assert_close(shard, before + average)
    blocking_operations(rank, world_size, over_nccl_code=True)


@pytest.mark.parametrize("world_size", [2, 3])
def test_nccl_code_is_right_when_run_on_gloo(world_size: int) -> None:
    run_ranks(world_size, nccl_code_on_gloo)


def calls_of_a_step(rank: int, world_size: int) -> list[int]:
    comm = make_comm(None, CPU)
    payload = make_payload(world_size)
    gather = comm.bind_gather(payload, torch.zeros(payload.slice_numel), torch.zeros(payload.numel))
    reduce = comm.bind_reduce(
        payload, torch.zeros(payload.numel), None, torch.zeros(payload.slice_numel), accumulate=False
    )
    counts: list[int] = []
    for start, wait in (gather, reduce):
        assert start is not None and wait is not None
        profile = cProfile.Profile()
        dist.barrier()
        profile.enable()
        start()
        wait()
        comm.drain()
        profile.disable()
        counts.append(sum(entry.callcount for entry in profile.getstats()) - 1)
    return counts


def test_host_work_stays_small_when_two_ranks_talk() -> None:
    """Python calls of one all-gather and of one reduce-scatter at two ranks, builtins included, with their drain."""
    assert run_ranks(2, calls_of_a_step) == [[8, 10], [8, 10]]


def peer_dies(rank: int, world_size: int, kind: str) -> str:
    comm = make_comm(None, CPU)
    assert isinstance(comm, GroupComm)
    payload = make_payload(world_size, name="layers.7", numel=1_000_000)
    full, shard = torch.zeros(payload.numel), torch.zeros(payload.slice_numel)
    scratch = torch.zeros(comm.reduce_scratch_numel(payload))
    start, wait = (
        comm.bind_gather(payload, shard, full)
        if kind == "all-gather"
        else comm.bind_reduce(payload, full, scratch, shard, accumulate=True)
    )
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        call(start)
        call(wait)
        comm.drain()
    except CommunicationError as error:
        assert isinstance(error.__cause__, RuntimeError)
        return str(error)
    return "no error"


@pytest.mark.parametrize(("kind", "world_size"), [("all-gather", 3), ("reduce-scatter", 2)])
def test_error_names_the_bucket_when_a_peer_was_killed(kind: str, world_size: int) -> None:
    results = run_ranks(world_size, peer_dies, kind, dies=[1], timeout=40)
    for rank in {*range(world_size)} - {1}:
        assert f"Rank {rank} of {world_size} did not complete the {kind} of bucket" in results[rank]
        assert "layers.7.first .. layers.7.last" in results[rank]


def orders_differ(rank: int, world_size: int) -> str:
    comm = make_comm(None, CPU)
    payload = make_payload(world_size, name="mine" if rank == 0 else "theirs")
    start, wait = comm.bind_gather(payload, torch.zeros(payload.slice_numel), torch.full((payload.numel,), 9.0))
    try:
        call(start)
        call(wait)
    except CommunicationError as error:
        return str(error)
    return "no error"


def test_ranks_time_out_with_a_name_when_they_gather_different_buckets() -> None:
    results = run_ranks(2, orders_differ, group_timeout=1.0)
    assert "mine.first" in results[0]
    assert "theirs.first" in results[1]


def other_device(rank: int, world_size: int) -> None:
    with pytest.raises(ValueError, match=r"gloo on cpu and by nccl on cuda; this process group has .* for meta"):
        make_comm(None, torch.device("meta"))


def test_a_device_without_a_backend_is_refused() -> None:
    run_ranks(2, other_device)


def memory_of_gather(rank: int, world_size: int) -> int:
    """Peak KiB above what was there, of gathering 8 payloads of 8 MiB at once."""
    comm = make_comm(None, CPU)
    payloads = [make_payload(world_size, name=str(index), numel=2**21) for index in range(8)]
    full = [torch.ones(payload.numel) for payload in payloads]
    bound = [comm.bind_gather(b, torch.ones(b.slice_numel), f) for b, f in zip(payloads, full, strict=True)]
    dist.barrier()
    before = peak_kib(reset=True)
    for start, _ in bound:
        call(start)
    for _, wait in bound:
        call(wait)
    comm.drain()
    return peak_kib() - before


def peak_kib(*, reset: bool = False) -> int:
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_gather_takes_no_memory_of_its_own() -> None:
    assert max(run_ranks(2, memory_of_gather)) < 4096
