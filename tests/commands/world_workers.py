"""What ranks do in test_world.py."""

import pickle
from typing import Any
from unittest import mock

import torch

from fxzero.commands.errors import CommandError
from fxzero.commands.world import World


def _world(rank: int, world_size: int) -> World:
    return World(rank, world_size, world_size, torch.device("cpu"))


def shares(rank: int, world_size: int) -> tuple[Any, list[dict[str, int]]]:
    world = _world(rank, world_size)
    with mock.patch.object(pickle, "Unpickler", side_effect=AssertionError("unpickled")):
        shared = world.share(lambda: ["text with \u2028 and 任务", 3, 0.5, None])
        return shared, world.gather({"host": 10 * rank})


def fails_on_rank_0(rank: int, world_size: int) -> str:
    def read() -> str:
        raise CommandError("no such file")

    try:
        return _world(rank, world_size).share(read)
    except CommandError as error:
        return str(error)
