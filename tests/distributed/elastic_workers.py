"""A training that goes on from its newest checkpoint, and of which a rank kills itself once inside of a step."""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxzero

NUM_STEPS = 5
NUM_ROWS = 12


def batch_of(step: int) -> Tensor:
    """The rows of this rank in a batch that is the same at any number of ranks."""
    rows = torch.randn(NUM_ROWS, 8, generator=torch.Generator().manual_seed(step))
    return rows[dist.get_rank() :: dist.get_world_size()]


def train(folder: str, killed: int, at_step: int, dropout: float) -> None:
    """Train; each step that is taken is a line in a file: ranks, step, loss of all ranks.

    Args:
        folder: gets checkpoints and the file `losses`.
        killed: the rank that kills itself, and the agent that started it if there are two, once.
        at_step: in which step it does so.
        dropout: probability, so that random states matter.
    """
    torch.manual_seed(dist.get_rank())
    model = nn.Sequential(nn.Linear(8, 16), nn.Dropout(dropout), nn.Linear(16, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    zero = fxzero.compile(model, optimizer=optimizer, example=batch_of(0), resume=f"{folder}/checkpoints")
    step = 0 if zero.resumed is None else zero.resumed["step"]
    while step < NUM_STEPS:
        loss = zero(batch_of(step)).square().mean()
        marker = Path(folder, "was_killed")
        if (dist.get_rank(), step) == (killed, at_step) and not marker.exists():
            marker.touch()
            if os.environ.get("GROUP_RANK", "0") != "0":
                os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach() / dist.get_world_size()
        dist.all_reduce(total)
        if dist.get_rank() == 0:
            with open(f"{folder}/losses", "a") as file:
                print(dist.get_world_size(), step, f"{total.item():.9g}", file=file)
        step += 1
        if step % 2 == 0:
            fxzero.save(f"{folder}/checkpoints", zero, optimizer, extra={"step": step}, keep=2)


def train_on_ranks(rank: int, world_size: int, folder: str, dropout: float) -> None:
    """Train without an interruption."""
    train(folder, killed=-1, at_step=-1, dropout=dropout)


def train_under_torchrun(folder: str, killed: int, at_step: int, dropout: float) -> None:
    """Join the ranks that torchrun started, and train."""
    fxzero.init_process_group("gloo")
    train(folder, killed, at_step, dropout)
    dist.destroy_process_group()


if __name__ == "__main__":
    train_under_torchrun(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
