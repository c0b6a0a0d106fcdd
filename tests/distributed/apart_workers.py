"""Ranks of which one does something else than the others; each returns the error that it met."""

import os
import time
from contextlib import nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import fxzero
from tests.distributed.error_workers import PATIENCE, error_of


class Words(nn.Module):
    """Refuses tokens out of range where it looks them up, with an IndexError."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(10, 6), nn.Linear(6, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.head(self.words(ids))).square().mean()


def ids_of(rank: int, step: int) -> Tensor:
    """A batch of one rank."""
    return torch.randint(0, 10, (2, 4), generator=torch.Generator().manual_seed(10 * step + rank))


def words() -> Words:
    """A model, the same on all ranks."""
    torch.manual_seed(0)
    return Words()


class Trainer:
    """Trains two models, the second only where it is asked for."""

    def __init__(self, rank: int) -> None:
        self.rank = rank
        model = words()
        self.optimizer: torch.optim.Optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        self.zero = fxzero.compile(model, optimizer=self.optimizer, timeout=PATIENCE)
        self.other = fxzero.compile(words(), timeout=PATIENCE)

    def micro_batch(self, step: int, *, synchronize: bool = True) -> None:
        """Forward and backward."""
        with nullcontext() if synchronize else self.zero.no_sync():
            self.zero(ids_of(self.rank, step)).backward()

    def step(self, how: str) -> None:
        """One step, in which this rank may differ."""
        if how == "state_dict":
            self.zero.state_dict()
        if how == "evaluation":
            with torch.no_grad():
                self.zero(ids_of(self.rank, 0))
        if how == "other model":
            self.other(ids_of(self.rank, 0))
        if how == "clip":
            self.zero.clip_grad_norm_(1.0)
        if how == "learning rate":
            self.optimizer.param_groups[0]["lr"] = 0.3
        if how == "frozen":
            self.zero.words.weight.requires_grad_(False)
        if how == "no backward":
            self.zero(ids_of(self.rank, 1))
        else:
            self.micro_batch(1, synchronize=how != "no_sync")
        if how == "micro-batch":
            self.micro_batch(2)
        if how != "no step":
            self.optimizer.step()
        self.optimizer.zero_grad()


def do_something_else(rank: int, world_size: int, how: str) -> str:
    """The last rank does something else in the second of three steps, after which no number may be wrong."""
    trainer = Trainer(rank)
    trainer.step("")
    trainer.other(ids_of(rank, 0))
    error = error_of(lambda: [trainer.step(how if rank == world_size - 1 else ""), trainer.step(""), trainer.step("")])
    return error


def clip_and_step(rank: int, world_size: int, how: str) -> str:
    """Clip by torch's own function, and step; one rank does so in another way."""
    zero, is_odd = fxzero.compile(words(), timeout=PATIENCE), rank == 1
    optimizer = torch.optim.SGD(zero.parameters(), lr=0.1)

    def train() -> None:
        for step in range(2):
            zero(ids_of(rank, step)).backward()
            if how != "no optimizer":
                bound, order = 1.0 + (is_odd and how == "bound"), torch.inf if is_odd and how == "order" else 2.0
                torch.nn.utils.clip_grad_norm_(zero.parameters(), bound, norm_type=order)
            if how != "no optimizer" or not is_odd:
                optimizer.step()

    return error_of(train)


def run_out(rank: int, world_size: int, how: str) -> str:
    """Rank 1 has a batch less, and then waits elsewhere or is gone."""
    trainer = Trainer(rank)
    trainer.step("")
    if rank == 0:
        return error_of(lambda: trainer.step(""))
    if how == "is gone":
        os._exit(0)
    with suppress(RuntimeError):
        dist.barrier()
    return ""


def differ_in_state(rank: int, world_size: int, how: str) -> str:
    """Rank 1 has another optimizer or another buffer."""
    model, is_odd = words(), rank == 1
    is_saved = not (is_odd and how == "not persistent")
    model.register_buffer("mean", torch.zeros(3 if is_odd and how == "buffer" else 2), persistent=is_saved)
    if is_odd and how == "buffers":
        model.register_buffer("extra", torch.zeros(1))
    options: dict[str, Any] = {"lr": 0.2 if is_odd and how == "learning rate" else 0.1}
    kind = torch.optim.Adagrad if is_odd and how == "class" else torch.optim.SGD
    groups: list[Any] = list(model.parameters())
    if is_odd and how == "groups":
        groups = [{"params": groups[:1]}, {"params": groups[1:]}]
    optimizer = kind(groups, **options)
    if how == "built later":
        zero = fxzero.compile(model, timeout=PATIENCE)
        optimizer = torch.optim.SGD(zero.parameters(), lr=0.2 if is_odd else 0.1)
    else:
        zero = fxzero.compile(model, optimizer=optimizer, timeout=PATIENCE)

    def train() -> None:
        for step in range(2):
            zero(ids_of(rank, step)).backward()
            optimizer.step()

    return error_of(train)


class Dies(Words):
    """Dies on rank 1 when it is traced."""

    def forward(self, ids: Tensor) -> Tensor:
        if dist.get_rank() == 1:
            os._exit(3)
        return super().forward(ids)


def die_in_trace(rank: int, world_size: int) -> str:
    """Rank 1 dies on its way to the first plan."""
    zero = fxzero.compile(Dies())
    return error_of(lambda: zero(ids_of(rank, 0)))


def die_before_compile(rank: int, world_size: int) -> str:
    """Rank 1 dies once the process group is there."""
    if rank == 1:
        os._exit(3)
    zero = fxzero.compile(words())
    return error_of(lambda: zero(ids_of(rank, 0)))


def rank_0_dies() -> None:
    """A process that is a rank by its environment; rank 0 hosts the store, and dies."""
    dist.init_process_group("gloo")
    dist.barrier()
    is_early, is_first = os.environ["WHEN"] == "before compile", dist.get_rank() == 0
    if is_early and is_first:
        os._exit(3)
    time.sleep(1.0 if is_early else 0.0)  # until it is gone
    zero = fxzero.compile(words())
    for step in range(5):
        if is_first and step == 2:
            os._exit(3)
        zero(ids_of(dist.get_rank(), step)).backward()


def call_equal_models_in_another_order(rank: int, world_size: int) -> str:
    """Rank 1 begins with the second of two equal models."""
    models = [fxzero.compile(words(), timeout=PATIENCE) for _ in range(2)]
    return error_of(lambda: [model(ids_of(rank, 0)) for model in models[:: -1 if rank == 1 else 1]])


def freeze_and_thaw(rank: int, world_size: int) -> str:
    """Rank 1 freezes a parameter alone, after all had frozen it and trained it again."""
    trainer = Trainer(rank)
    weight = trainer.zero.words.weight
    for is_trained in (True, False, True):
        weight.requires_grad_(is_trained)
        trainer.step("")
    return error_of(lambda: [trainer.step("frozen" if rank == 1 else ""), trainer.step("")])


def catch_alone(rank: int, world_size: int) -> list[str]:
    """Rank 1 catches the error of a batch, and goes on; no step_together()."""
    trainer = Trainer(rank)
    trainer.step("")
    errors: list[str] = []
    for step in range(2):
        ids = ids_of(rank, step)
        if rank == 1 and step == 0:
            ids[0, 0] = 10
        try:
            trainer.zero(ids).backward()
        except (IndexError, fxzero.FxzeroError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


class FailsBackward(torch.autograd.Function):
    """Fails in backward."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor) -> Tensor:
        return loss * 1

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        raise KeyError("lost")


def leave_out(rank: int, world_size: int, where: str) -> tuple[list[str], bool]:
    """The last rank fails in the second and in the last step; all leave these out, and train on as if they were not."""
    odd = world_size - 1
    model, plain = words(), words()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    zero = fxzero.compile(model, optimizer=optimizer, timeout=PATIENCE)
    errors: list[str] = []
    for step in range(4):
        fails, ids = rank == odd and step in (1, 3), ids_of(rank, step)
        if fails and where == "forward":
            ids[0, 0] = 10
        try:
            with zero.step_together():
                if fails and where == "before":
                    raise OSError("no file")
                loss = zero(ids)
                (FailsBackward.apply(loss) if fails and where == "backward" else loss).backward()
                if fails and where == "after backward":
                    raise OSError("no file")
                optimizer.step()
        except (IndexError, KeyError, OSError, fxzero.StepLeftOutError) as error:
            errors.append(f"{type(error).__name__}: {error}")
            assert all(param.grad is None for param in zero.parameters())
        optimizer.zero_grad()
    trained = zero.state_dict()
    dist.barrier()  # the process group stays usable
    return errors, _is_trained(plain, trained, world_size)


def _is_trained(plain: nn.Module, trained: dict[str, Tensor], world_size: int) -> bool:
    """True if the values are those of replicated training with the first and the third batch."""
    optimizer = torch.optim.AdamW(plain.parameters(), lr=0.1)
    for step in (0, 2):
        sums = [torch.zeros_like(param) for param in plain.parameters()]
        for rank in range(world_size):
            plain.zero_grad()
            plain(ids_of(rank, step)).backward()
            for total, param in zip(sums, plain.parameters(), strict=True):
                assert param.grad is not None
                total += param.grad
        for total, param in zip(sums, plain.parameters(), strict=True):
            param.grad = total / world_size
        optimizer.step()
    return all(torch.equal(trained[name], value) for name, value in plain.state_dict().items())


def fail_after_stepping(rank: int, world_size: int) -> list[str]:
    """Rank 1 fails in the middle of its optimizer's step, which nobody can leave out."""

    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step()
            if rank == 1:
                raise OSError("no space")

    model = words()
    optimizer = Fails(model.parameters(), lr=0.1)
    zero = fxzero.compile(model, optimizer=optimizer, elementwise_optimizer=True, timeout=PATIENCE)
    errors: list[str] = []
    for step in range(2):
        try:
            with zero.step_together():
                zero(ids_of(rank, step)).backward()
                optimizer.step()
        except (OSError, fxzero.FxzeroError) as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


def nest_steps(rank: int, world_size: int) -> str:
    """A step inside of a step."""
    zero = fxzero.compile(words())

    def nest() -> None:
        with zero.step_together(), zero.step_together():
            pass

    return error_of(nest)


def be_slow(rank: int, world_size: int) -> str:
    """Rank 1 comes late to a step, by more than the time after which others look."""
    import time

    trainer = Trainer(rank)
    trainer.step("")
    if rank == 1:
        time.sleep(2.5)
    return error_of(lambda: [trainer.step(""), trainer.zero.state_dict()])
