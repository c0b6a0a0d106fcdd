"""Agreement between real ranks, over the store of their process group."""

import os
import time
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from fxzero import torch_internals
from fxzero.comm.agree import agree, reporting_failure
from fxzero.errors import CaptureError, CommunicationError, RankMismatchError
from fxzero.testing import run_ranks


def differ_then_agree(rank: int, world_size: int) -> str:
    started = time.monotonic()
    with pytest.raises(RankMismatchError) as caught:
        agree(None, "layout", ["same", f"bucket_bytes={1 + (rank == world_size - 1)}"], timeout=timedelta(seconds=30))
    assert time.monotonic() - started < 8.0
    for topic in ("layout", "plan", "layout"):
        agree(None, topic, ["same"], timeout=timedelta(seconds=30))
    return str(caught.value)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_every_rank_names_the_difference_and_can_go_on(world_size: int) -> None:
    errors = run_ranks(world_size, differ_then_agree)
    assert len(set(errors)) == 1
    assert f"\n  rank {world_size - 1}: bucket_bytes=2\n" in errors[0]


def one_fails(rank: int, world_size: int) -> str:
    error_type = CaptureError if rank == 1 else RankMismatchError
    with pytest.raises(error_type) as caught, reporting_failure(None, "layout"):
        if rank == 1:
            raise CaptureError("no")
        agree(None, "layout", ["same"], timeout=timedelta(seconds=30))
    with reporting_failure(None, "layout"):
        agree(None, "layout", ["same"], timeout=timedelta(seconds=30))
    return str(caught.value)


def test_others_stop_when_one_fails_on_its_way() -> None:
    errors = run_ranks(3, one_fails, timeout=20)
    assert errors[1] == "no"
    assert errors[0].startswith("rank 1 failed: CaptureError: no\n")
    assert errors[2] == errors[0]


def in_subgroups(rank: int, world_size: int) -> str:
    """Groups {0, 2} and {1, 3} agree at the same time, on different things; then a rank takes the wrong group."""
    groups: list[Any] = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    agree(groups[rank % 2], "layout", [f"model {rank % 2}"], timeout=timedelta(seconds=30))
    with pytest.raises(RankMismatchError) as caught:
        agree(groups[0] if rank == 2 else None, "layout", ["same"], timeout=timedelta(seconds=30))
    return str(caught.value)


def test_groups_are_apart_and_a_wrong_group_is_named() -> None:
    errors = run_ranks(4, in_subgroups)
    assert all("different process groups" in error for error in errors)


def host_of_the_store_dies(rank: int, world_size: int, path: str) -> str:
    """A store of rank 0, as without torchrun, and rank 0 is killed while the others wait for it."""
    dist.destroy_process_group()
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{path}", rank=rank, world_size=world_size)
    store = torch_internals.default_store()
    if rank == 0:
        store.wait(["the other rank has its group"])
        os._exit(1)
    store.set("the other rank has its group", "")
    with pytest.raises(CommunicationError, match="lost the store") as caught:
        agree(None, "layout", ["same"], timeout=timedelta(seconds=20))
    return str(caught.value)


def test_loss_of_the_store_is_explained() -> None:
    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

    port = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False).port
    results = run_ranks(2, host_of_the_store_dies, port, dies=[0])
    assert "rank 0, where torchrun does not" in results[1]
