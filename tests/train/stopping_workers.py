"""What ranks do in test_train_stopping.py."""

import torch

from fxzero.commands.signals import StopRequest
from fxzero.commands.world import World
from fxzero.train.stopping import AgreedStop


def calls_until_stop(rank: int, world_size: int, signum: int) -> tuple[int, int]:
    """The signal that stops all ranks, and after how many calls; rank 1 alone gets it, before the third call."""
    request = StopRequest()
    stops = AgreedStop(World(rank, world_size, world_size, torch.device("cpu")), request)
    calls = 1
    while not stops():
        calls += 1
        if calls == 3 and rank == 1:
            request.signum = signum
    assert request.is_met.is_set()
    return stops.signum, calls
