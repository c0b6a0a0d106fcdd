"""Train the same model by fxzero and by replicated training, on every rank, and compare bit for bit.

Replicated training: each rank's gradient on a full copy, `((g_0 + g_1) + ...) / W`, one optimizer step. Every rank
computes all ranks' gradients by itself, so nothing of what is tested is used to test it.
"""

import copy
import functools
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.graph.layout import LayoutName
from fxzero.graph.sharding import Placement
from fxzero.memory import activations
from fxzero.models import GPT, GPT_PRESETS, MLP, MLP_PRESETS, ROBERTA_PRESETS, RobertaForMaskedLM
from fxzero.passes import default_passes
from fxzero.testing import engine_of

Batch = dict[str, Tensor]


class Classifier(nn.Module):
    """An MLP with a loss, so that it has an output to differentiate."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        self.net = MLP(MLP_PRESETS[preset])

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(self.net(x), target)


def _tokens(seed: int, batch: int, seq: int, *, masked: bool) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 128, (batch, seq), generator=generator)
    labels = torch.where(torch.rand(batch, seq, generator=generator) < 0.3, ids, -100) if masked else ids
    return {"input_ids": ids, "labels": labels}


def _points(seed: int, width: int, classes: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(6, width, generator=generator),
        "target": torch.randint(0, classes, (6,), generator=generator),
    }


@dataclass(frozen=True)
class Case:
    """A model, and the batch of a seed and a sequence length."""

    build: Callable[[], nn.Module]
    batch: Callable[[int, int], Batch]


GPT_OF_ONE_LAYER = replace(GPT_PRESETS["tiny"], num_layers=1)
CASES: dict[str, Case] = {
    "mlp": Case(lambda: Classifier("odd"), lambda seed, _: _points(seed, 7, 5)),
    "net": Case(lambda: Classifier("tied"), lambda seed, _: _points(seed, 16, 16)),
    "gpt": Case(lambda: GPT(GPT_OF_ONE_LAYER), lambda seed, seq: _tokens(seed, 2, seq, masked=False)),
    "roberta": Case(
        lambda: RobertaForMaskedLM(ROBERTA_PRESETS["tiny"]), lambda seed, seq: _tokens(seed, 2, seq, masked=True)
    ),
}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, foreach=False),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adam_fused": lambda params: torch.optim.Adam(params, lr=1e-2, fused=True),
}


def _loss(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def seed_of(step: int, rank: int, micro: int = 0) -> int:
    """A seed for the data and the dropout of one micro-batch."""
    return 1000 + 100 * step + 10 * rank + micro


def _add(first: Sequence[Tensor | None], second: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if a is None or b is None else a + b for a, b in zip(first, second, strict=True)]


@dataclass
class Replicated:
    """Replicated training of `world_size` ranks in one process."""

    model: nn.Module
    world_size: int
    ranks_per_node: int | None = None
    """Gradients are summed over the ranks of a node, then over nodes. Default: all are one node."""
    replicas: list[nn.Module] = field(default_factory=list[nn.Module])

    def __post_init__(self) -> None:
        self.replicas = [copy.deepcopy(self.model) for _ in range(self.world_size)]
        for replica in self.replicas:
            for mine, shared in zip(replica.parameters(), self.model.parameters(), strict=True):
                mine.data = shared.data

    def losses_and_grads(
        self, batches: Sequence[Batch], seeds: Sequence[int]
    ) -> tuple[list[Tensor], list[Tensor | None]]:
        """Each rank's loss, and the average gradient of each parameter."""
        losses: list[Tensor] = []
        of_ranks: list[list[Tensor | None]] = []
        for rank, replica in enumerate(self.replicas):
            torch.manual_seed(seeds[rank])
            loss = _loss(replica(**batches[rank]))
            params = list(replica.parameters())
            trained = [param for param in params if param.requires_grad]
            by_id = dict(zip(map(id, trained), torch.autograd.grad(loss, trained, allow_unused=True), strict=True))
            grads = [by_id.get(id(param)) for param in params]
            losses.append(loss.detach())
            of_ranks.append(grads)
        size = self.ranks_per_node or self.world_size
        nodes = [functools.reduce(_add, of_ranks[first:][:size]) for first in range(0, self.world_size, size)]
        total = functools.reduce(_add, nodes)
        return losses, [None if grad is None else grad / self.world_size for grad in total]


def own_slice(zero: fxzero.ZeroModule, fqn: str, full: Tensor) -> Tensor:
    """This rank's part of a tensor of the parameter's full shape."""
    return engine_of(zero).sharded.shards.cut(fqn, full)


def assert_same(
    zero: fxzero.ZeroModule, reference: nn.Module, what: str, read: Callable[[Tensor], Tensor | None]
) -> None:
    """Compare what `read` gives of each sharded parameter with its slice of the reference's."""
    expected = dict(reference.named_parameters())
    for fqn, param in zero.named_parameters():
        mine, full = read(param), read(expected[fqn])
        assert (mine is None) == (full is None), f"{what} of {fqn}: {mine is None} {full is None}"
        if mine is not None and full is not None:
            assert torch.equal(mine, own_slice(zero, fqn, full)), f"{what} of {fqn} differs"


def train(
    rank: int,
    world_size: int,
    name: str | Case,
    optimizer: str = "adamw",
    num_passes: int | None = None,
    steps: int = 3,
    micro_batches: int = 1,
    no_sync: bool = False,
    lengths: Sequence[Sequence[int]] = ((16,),),
    seed_offset: int = 0,
    clip: float | None = None,
    sizes: dict[str, Any] | None = None,
    layout: LayoutName = "contiguous",
    mesh_shape: tuple[int, int] | None = None,
    across: Placement = "replicate",
    memory_budget: int | None = None,
) -> str:
    """Train both ways and compare losses, gradients, parameters and buffers after every step; the last schedule.

    Args:
        name: of one of CASES, or a case of your own.
        num_passes: run only so many passes of the default list.
        lengths: the sequence length by step and rank, both cyclic.
        seed_offset: seed this rank's model differently by so much times the rank: rank 0's weights must win.
        clip: clip by this norm; then compared within 1e-6.
        sizes: arguments of `default_passes`.
        mesh_shape: the number of nodes, and of ranks in each.
        across: what nodes are to each other.
    """
    case = CASES[name] if isinstance(name, str) else name
    torch.manual_seed(seed_offset * rank)
    model = case.build()
    torch.manual_seed(0)
    reference = Replicated(case.build(), world_size, mesh_shape and mesh_shape[1])
    reference_optimizer = OPTIMIZERS[optimizer](reference.model.parameters())
    own_optimizer = OPTIMIZERS[optimizer](model.parameters())
    sizes = sizes or {"bucket_bytes": 8192, "prefetch_bytes": 16384, "reduce_bytes": 16384}
    passes = default_passes(**sizes)[:num_passes]
    mesh = None if mesh_shape is None else init_device_mesh("cpu", mesh_shape)
    zero = fxzero.compile(
        model,
        optimizer=own_optimizer,
        passes=passes,
        layout=layout,
        mesh=mesh,
        across=across,
        memory_budget=memory_budget,
    )
    for step in range(steps):
        for micro in range(micro_batches):
            row = lengths[(step + micro) % len(lengths)]
            batches = [case.batch(seed_of(step, r, micro), row[r % len(row)]) for r in range(world_size)]
            seeds = [seed_of(step, r, micro) for r in range(world_size)]
            losses, grads = reference.losses_and_grads(batches, seeds)
            for param, grad in zip(reference.model.parameters(), grads, strict=True):
                if grad is not None:
                    param.grad = grad if param.grad is None else param.grad + grad
            torch.manual_seed(seeds[rank])
            if no_sync and micro < micro_batches - 1:
                with zero.no_sync():
                    loss = _loss(zero(**batches[rank]))
                    loss.backward()
            else:
                loss = _loss(zero(**batches[rank]))
                loss.backward()
            assert torch.equal(loss, losses[rank]), f"step {step}: loss {loss} instead of {losses[rank]}"
        if clip is not None:
            mine = zero.clip_grad_norm_(clip)
            full = nn.utils.clip_grad_norm_(reference.model.parameters(), clip)
            torch.testing.assert_close(mine, full, rtol=1e-6, atol=0)
            for param, own in zip(reference.model.parameters(), zero.parameters(), strict=True):
                fqn = next(n for n, p in zero.named_parameters() if p is own)
                torch.testing.assert_close(own.grad, own_slice(zero, fqn, param.grad), rtol=1e-5, atol=1e-9)
                param.grad.copy_(param.grad)  # the reference goes on from its own
            return str(zero.schedule)
        if not no_sync:
            assert_same(zero, reference.model, f"step {step}: gradient", lambda p: p.grad)
        else:
            expected = dict(reference.model.named_parameters())
            for fqn, param in zero.named_parameters():
                torch.testing.assert_close(param.grad, own_slice(zero, fqn, expected[fqn].grad), rtol=1e-5, atol=1e-7)
            return str(zero.schedule)
        own_optimizer.step()
        reference_optimizer.step()
        assert_same(zero, reference.model, f"step {step}: parameter", lambda p: p.data)
        own_optimizer.zero_grad()
        reference_optimizer.zero_grad()
    for (fqn, mine), theirs in zip(zero.named_buffers(), reference.replicas[rank].buffers(), strict=True):
        assert torch.equal(mine, theirs), f"buffer {fqn} differs"
    return str(zero.schedule)


def train_with_all_temporaries_placed(rank: int, world_size: int, name: str, sizes: dict[str, Any]) -> None:
    """`train` with a place in the arena also for small temporaries, as only models of a real size have them."""
    with _every_temporary_placed():
        train(rank, world_size, name, steps=2, micro_batches=2, lengths=((16,), (12, 16)), sizes=sizes)


def two_forwards_with_all_temporaries_placed(rank: int, world_size: int) -> None:
    """`two_forwards_then_backwards`, likewise."""
    with _every_temporary_placed():
        two_forwards_then_backwards(rank, world_size)


@contextmanager
def _every_temporary_placed() -> Generator[None]:
    limit = activations.PLACED_FROM_BYTES
    activations.PLACED_FROM_BYTES = 1
    try:
        yield
    finally:
        activations.PLACED_FROM_BYTES = limit


def train_prefixes(
    rank: int, world_size: int, name: str, prefixes: Sequence[int], layout: LayoutName = "contiguous"
) -> None:
    """`train` with several prefixes of the pass pipeline."""
    for num_passes in prefixes:
        train(rank, world_size, name, num_passes=num_passes, steps=2, layout=layout)


def two_forwards_then_backwards(
    rank: int, world_size: int, layout: LayoutName = "contiguous", prefetch_bytes: int = 2**20
) -> None:
    """Two calls and an evaluation before both backwards, with every bucket kept: gradients as in eager."""
    case = CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    reference = copy.deepcopy(model)
    passes = default_passes(bucket_bytes=8192, max_kept_bytes=None, prefetch_bytes=prefetch_bytes)
    zero = fxzero.compile(model, passes=passes, layout=layout)
    batches = [case.batch(seed, 16) for seed in (1, 2)]
    first, second = [_without_dropout(zero, batch) for batch in batches]
    with torch.no_grad():
        _loss(zero(**batches[0]))
    (first * 2).backward()
    second.backward()
    for batch, scale in zip(batches, (2, 1), strict=True):
        (_without_dropout(reference, batch) * scale).backward()
    for fqn, param in zero.named_parameters():
        full = dict(reference.named_parameters())[fqn].grad
        assert full is not None and param.grad is not None
        torch.testing.assert_close(param.grad, own_slice(zero, fqn, full), rtol=1e-6, atol=1e-8)


def _without_dropout(module: nn.Module, batch: Batch) -> Tensor:
    module.eval()
    return _loss(module(**batch))


__all__ = ["CASES", "OPTIMIZERS", "Replicated", "train", "train_prefixes"]
