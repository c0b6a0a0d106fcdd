"""Where ranks meet: under names of their own in each attempt of a job that torchrun restarts.

torchrun keeps one store over all attempts, and torch's `init_process_group` uses the same keys in each: a rank may find
there the address of a rank that is dead, or the id of a communicator of the attempt before. No number in the
environment tells attempts apart, since agents count restarts each for itself. So ranks agree on a name:

    rank r    posts a word that it makes up
    rank 0    answers each word that it finds with the name of this attempt, words of ranks that are dead included
    rank r    finds the answer to its own word, which nobody else can have got, and says that it is in
    rank 0    goes on as soon as all are in
"""

import time
import uuid
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store, default_pg_timeout
from torch.distributed.rendezvous import rendezvous

from fxzero.errors import CommunicationError

_LOOK_S = 0.02
"""How often rank 0 looks for the words of ranks."""
_GIVEN = ("init_method", "store", "rank", "world_size")
"""Arguments of torch's function that the environment gives here."""


def init_process_group(backend: str | None = None, *, timeout: timedelta | None = None, **options: Any) -> None:
    """Join the ranks that torchrun started, as `torch.distributed.init_process_group` does, also after a restart.

    Under `torchrun --max-restarts`, torch's own function sometimes fails after a restart ("Gloo connectFullMesh
    failed"), since ranks find in the store what ranks of the attempt before have left there. Here each attempt has a
    part of the store to itself.

    Args:
        backend: "gloo", "nccl", or what else torch's function takes.
        timeout: as for torch's function; ranks also wait for each other here for no longer.
        options: further arguments of torch's function, such as `device_id`.

    Raises:
        CommunicationError: a rank did not come within the timeout.
        ValueError: the environment has no ranks (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), as torchrun sets them, or
            an option is one that the environment gives.
    """
    if surplus := [name for name in _GIVEN if name in options]:
        raise ValueError(
            f"{surplus[0]}= is taken from the environment, as torchrun sets it. Leave it out, or call "
            "torch.distributed.init_process_group."
        )
    store, rank, world_size = next(rendezvous("env://", timeout=timeout or default_pg_timeout))
    name = name_of_attempt(PrefixStore("fxzero/attempts", store), rank, world_size, timeout or default_pg_timeout)
    dist.init_process_group(
        backend, store=PrefixStore(name, store), rank=rank, world_size=world_size, timeout=timeout, **options
    )


def name_of_attempt(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """A name that the ranks of this attempt agree on, and that no attempt before had.

    Raises:
        CommunicationError: a rank did not come in time.
    """
    if rank == 0:
        return _answer(store, range(1, world_size), time.monotonic() + timeout.total_seconds())
    word = uuid.uuid4().hex
    store.set(_word_of(rank), word)
    try:
        store.wait([word], timeout)
    except dist.DistStoreError as error:
        raise CommunicationError(
            f"rank 0 did not come to init_process_group within {timeout.total_seconds():g} s, and rank {rank} waits "
            "for it. Look at what rank 0 says."
        ) from error
    name = store.get(word).decode()
    store.set(_in(name, rank), "")
    return name


def _answer(store: Store, ranks: Iterable[int], deadline: float) -> str:
    """Answer the words of ranks until all are in; the name of the attempt."""
    name, missing, answered = uuid.uuid4().hex, list(ranks), set[bytes]()
    while missing := [rank for rank in missing if not store.check([_in(name, rank)])]:
        if time.monotonic() > deadline:
            raise CommunicationError(
                f"ranks {missing} did not come to init_process_group in time, and rank 0 waits for them. Look at what "
                "they say, or whether they were started."
            )
        for rank in missing:
            word = store.get(_word_of(rank)) if store.check([_word_of(rank)]) else b""
            if word and word not in answered:
                store.set(word.decode(), name)
                answered.add(word)
        time.sleep(_LOOK_S)
    return name


def _word_of(rank: int) -> str:
    return f"word/{rank}"


def _in(name: str, rank: int) -> str:
    return f"{name}/{rank}"
