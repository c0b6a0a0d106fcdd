"""Ranks agree on a name for their attempt, whatever attempts before them have left in the store."""

import threading
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage] (public, documented)

import fxzero
from fxzero.comm.rendezvous import name_of_attempt

LONG, SHORT = timedelta(seconds=20), timedelta(seconds=0.1)


def attempt(store: HashStore, world_size: int, *, last_to_come: int) -> list[str]:
    """The names that the ranks of an attempt get, of which one comes late."""
    names = [""] * world_size

    def come(rank: int) -> None:
        names[rank] = name_of_attempt(store, rank, world_size, LONG)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in range(world_size)]
    for rank in sorted(range(world_size), key=last_to_come.__eq__):
        if rank == last_to_come:
            threads[rank - 1].join(timeout=0.1)
        threads[rank].start()
    for thread in threads:
        thread.join()
    return names


def test_each_attempt_has_a_name_of_its_own_also_with_fewer_ranks() -> None:
    store = HashStore()
    names = [attempt(store, 3, last_to_come=0), attempt(store, 3, last_to_come=1), attempt(store, 2, last_to_come=0)]
    names.append(attempt(store, 3, last_to_come=2))
    assert [len(set(each)) for each in names] == [1, 1, 1, 1]
    assert len({each[0] for each in names}) == 4


def test_a_rank_that_does_not_come_is_named() -> None:
    store = HashStore()
    attempt(store, 3, last_to_come=0)
    with pytest.raises(fxzero.CommunicationError, match=r"ranks \[1, 2\] did not come to init_process_group in time"):
        name_of_attempt(store, 0, 3, SHORT)
    with pytest.raises(fxzero.CommunicationError, match=r"rank 0 did not come to init_process_group within 0.1 s"):
        name_of_attempt(store, 1, 3, SHORT)


def test_what_the_environment_says_is_not_given_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="world_size= is taken from the environment"):
        fxzero.init_process_group("gloo", world_size=2)
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ValueError, match="environment variable RANK expected"):
        fxzero.init_process_group("gloo")
    assert not dist.is_initialized()
