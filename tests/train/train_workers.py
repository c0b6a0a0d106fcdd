"""What ranks do in tests of whole runs of `fxzero train`."""

import torch

from fxzero.commands.progress import Progress
from fxzero.commands.world import World
from fxzero.train import job
from fxzero.train.command import options_of


def train(rank: int, world_size: int, given: dict[str, object]) -> int:
    """One run with some options; its status."""
    options = options_of(given)
    options.validate()
    return job.run(options, World(rank, world_size, world_size, torch.device("cpu")), Progress("train"))
