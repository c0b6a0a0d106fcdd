"""Ranks whose model writes frozen parameters in forward, beside replicated training."""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.errors import WireFormatError
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.distributed.error_workers import PATIENCE, error_of


class Momentum(nn.Module):
    """A query encoder that is trained, and a key encoder that follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4))
        self.key = nn.Sequential(nn.Linear(8, 6), nn.GELU(), nn.Linear(6, 4)).requires_grad_(False)
        self.codes = nn.Parameter(torch.zeros(4), requires_grad=False)
        self.momentum, self.is_following = 0.9, True

    def follow(self) -> None:
        """Move the key encoder."""
        for query, key in zip(self.query.parameters(), self.key.parameters(), strict=True):
            key.data = key.data * self.momentum + query.data * (1 - self.momentum)

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        if self.is_following:
            self.follow()
        return (self.query(x) - self.key(x) - self.codes).square().mean()


class InPlace(Momentum):
    """The same by operators that write in place, on one tensor and on lists of them."""

    def follow(self) -> None:
        query, key = list(self.query.parameters()), list(self.key.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(key[:2], query[:2], 1 - self.momentum)
            for mine, other in zip(key[2:], query[2:], strict=True):
                mine.mul_(self.momentum).add_(other, alpha=1 - self.momentum)
            self.codes += 1


class Codebook(Momentum):
    """Codes that follow the batches of all ranks, or of each alone."""

    reduces = True

    def forward(self, x: Tensor) -> Tensor:
        """Returns a scalar."""
        code = x[:, :4].mean(0)
        if self.reduces:
            code = functional.all_reduce(code, "avg", dist.group.WORLD)
        self.codes.data.lerp_(code, 0.5)
        return (self.query(x) - self.codes).square().mean()


MODELS: dict[str, Callable[[], Momentum]] = {"data": Momentum, "in place": InPlace}


def made(kind: Callable[[], Momentum]) -> Any:
    """A model, the same on all ranks."""
    torch.manual_seed(0)
    return kind()


def points(rank: int, step: int) -> Tensor:
    """The batch of a rank, of a length of its own."""
    return torch.randn(5 + rank, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def _average_grads(models: list[Momentum], ranks_per_node: int) -> None:
    for params in zip(*[model.parameters() for model in models], strict=True):
        if params[0].grad is not None:
            grads = [param.grad for param in params]
            nodes = [grads[first:][:ranks_per_node] for first in range(0, len(grads), ranks_per_node)]
            total = functools.reduce(torch.add, [functools.reduce(torch.add, node) for node in nodes])
            for param in params:
                param.grad = total / len(models)


def assert_same_weights(zero: fxzero.ZeroModule, plain: nn.Module, what: str = "") -> None:
    """Compare all parameters and buffers, bit for bit."""
    state = zero.state_dict()
    for name, value in plain.state_dict().items():
        assert torch.equal(state[name], value), f"{name} {what}"


def train(
    rank: int,
    world_size: int,
    name: str,
    num_passes: int | None = None,
    mesh_shape: tuple[int, int] | None = None,
    **options: Any,
) -> None:
    """Train, evaluate, and add up two micro-batches; replicas that are trained together do the same."""
    if num_passes is not None:
        options["passes"] = default_passes(bucket_bytes=256)[:num_passes]
    ranks_per_node = world_size
    if mesh_shape is not None:
        options["mesh"], ranks_per_node = init_device_mesh("cpu", mesh_shape), mesh_shape[1]
    plain, model = [made(MODELS[name]) for _ in range(world_size)], made(MODELS[name])
    optimizers = [torch.optim.AdamW(each.parameters(), lr=0.1, weight_decay=0.1) for each in (*plain, model)]
    zero = fxzero.compile(model, optimizer=optimizers[-1], **options)
    for step, micro_batches in enumerate((1, 0, 1, 2)):
        for module, of in [*zip(plain, range(world_size), strict=True), (zero, rank)]:
            with torch.no_grad():
                module.evaluated = module(points(of, 10 + step))
            outputs = [module(points(of, step + micro)) for micro in range(micro_batches)]
            if outputs:
                sum(outputs[1:], outputs[0]).backward()
            module.outputs = outputs
        assert torch.equal(zero.evaluated, plain[rank].evaluated), step
        for own, other in zip(zero.outputs, plain[rank].outputs, strict=True):
            assert torch.equal(own, other), step
        if micro_batches < 2:
            assert_same_weights(zero, plain[rank], f"before step {step}")
        if micro_batches:
            _average_grads(plain, ranks_per_node)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        if micro_batches < 2:
            assert_same_weights(zero, plain[rank], f"after step {step}")


def add_up_with_resident_buckets(rank: int, world_size: int) -> bool:
    """Micro-steps between which the shards of the key encoder change, and buckets stay gathered; true if they do."""
    model, plain = made(Momentum), made(Momentum)
    buckets = [
        tuple(f"{part}.{name}" for name, _ in model.get_submodule(part).named_parameters()) for part in ("query", "key")
    ]
    zero = fxzero.compile(model, passes=default_passes(resident=tuple(buckets)))
    for step in range(4):
        with zero.no_sync():
            losses = [module(points(0, step)) for module in (zero, plain)]
            losses[0].backward()
        assert torch.equal(*losses), step
    assert_same_weights(zero, plain)
    return any("key" in fqn for bucket in engine_of(zero).last.step.resident for fqn in bucket)


def reduce_codes(rank: int, world_size: int) -> str:
    """Codes of all ranks' batches are right; of each rank's own they are refused, with this error."""
    zero, plain = fxzero.compile(made(Codebook)), made(Codebook)
    for step in range(3):
        zero(points(rank, step)).backward()
        codes = [points(each, step)[:, :4].mean(0) for each in range(world_size)]
        plain.codes.data.lerp_(sum(codes[1:], codes[0]) / world_size, 0.5)
    torch.testing.assert_close(zero.state_dict()["codes"], plain.codes)
    alone = made(Codebook)
    alone.reduces = False
    zero = fxzero.compile(alone)
    return error_of(lambda: zero(points(rank, 0)))


def differ(rank: int, world_size: int, how: str) -> str:
    """In the third step rank 1 does not write, or writes something else; the error that each rank meets."""
    zero = fxzero.compile(made(Momentum), timeout=PATIENCE)

    def steps() -> None:
        for step in range(5):
            is_odd = rank == 1 and step == 2
            if how == "writes nothing":
                zero.is_following = not is_odd
            if how == "another number":
                zero.momentum = 0.9 + 0.1 * is_odd
            if how == "another of many numbers":
                zero.momentum = 0.9 + 0.01 * step + 0.001 * is_odd
            zero(points(rank, step)).backward()

    return error_of(steps)


def leave_out(rank: int, world_size: int, where: str) -> None:
    """Rank 1 fails in the second step, before or behind the write: it is undone on all ranks, and they go on."""
    model, plain = made(Momentum), made(Momentum)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    zero = fxzero.compile(model, optimizer=optimizer, timeout=PATIENCE)
    for step in range(4):
        fails = rank == 1 and step == 1
        before = zero.state_dict()
        try:
            with zero.step_together():
                if fails and where == "before forward":
                    raise OSError("no file")
                loss = zero(points(rank, step))
                if fails and where == "behind forward":
                    raise OSError("no file")
                loss.backward()
                optimizer.step()
            assert step != 1
        except (OSError, fxzero.StepLeftOutError):
            assert step == 1
        optimizer.zero_grad()
        if step != 1:
            plain.load_state_dict(before)
            plain.follow()
            after = zero.state_dict()
            assert all(torch.equal(after[fqn], value) for fqn, value in plain.state_dict().items() if "key" in fqn), (
                step
            )
        else:
            after = zero.state_dict()
            assert all(torch.equal(after[fqn], value) for fqn, value in before.items())


def narrow(rank: int, world_size: int) -> str:
    """A parameter that is rounded on the way would be rounded again in each step."""
    zero = fxzero.compile(made(Momentum), gather_dtype=torch.bfloat16)
    try:
        zero(points(rank, 0))
    except WireFormatError as error:
        return str(error)
    return "no error"
