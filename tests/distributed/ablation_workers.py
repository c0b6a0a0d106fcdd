"""What ranks do in test_ablation_ranks.py: training without optimizations, beside training with all of them."""

import copy
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fxzero
from fxzero.comm.base import Comm
from fxzero.reference.ablation import Without
from fxzero.reference.tensor_lists import with_tensor_lists
from fxzero.reference.transient import TransientMemory
from fxzero.testing import engine_of
from tests.distributed import replicated
from tests.distributed.interleaved_workers import MIXED, full_gradients
from tests.helpers.payloads import one_payload
from tests.optimizers.test_optimizer_state import LARGE_BYTES, Large

Record = list[dict[str, Tensor | None]]


def _train(rank: int, name: str, *, no_sync: bool, **options: Any) -> Record:
    """Two steps of two micro-batches: losses, then gradients and parameters, put together from all ranks."""
    case = MIXED if name == "mixed" else replicated.CASES[name]
    torch.manual_seed(0)
    zero = fxzero.compile(case.build(), **options)
    optimizer = torch.optim.AdamW(zero.parameters(), lr=1e-2)
    seen: Record = []
    for step in range(2):
        for micro in range(2):
            torch.manual_seed(micro)
            with zero.no_sync() if no_sync and micro == 0 else nullcontext():
                loss = replicated._loss(zero(**case.batch(replicated.seed_of(step, rank, micro), 16)))
                seen.append({"loss": loss.detach()})
                loss.backward()
        seen.append(full_gradients(zero))
        optimizer.step()
        optimizer.zero_grad()
        seen.append({fqn: value.clone() for fqn, value in zero.state_dict().items()})
    return seen


def beside_full(
    rank: int, world_size: int, name: str, configurations: Sequence[Without], no_sync: bool = False, stage: int = 3
) -> None:
    """Train with each configuration, and with everything, and compare: bit for bit where no sum has another order."""
    expected = _train(rank, name, no_sync=no_sync, stage=stage)
    for without in configurations:
        other_order = world_size > 2 and (without == "all" or "flat_collectives" in without)
        seen = _train(rank, name, no_sync=no_sync, stage=stage, without=without)
        for index, (want, have) in enumerate(zip(expected, seen, strict=True)):
            assert want.keys() == have.keys()
            for key, value in want.items():
                what, other = f"without {without}: {key} of record {index} on rank {rank}", have[key]
                assert (value is None) == (other is None), what
                if value is None or other is None or value.numel() == 0:
                    continue
                if not other_order:
                    assert torch.equal(value, other), what
                elif index < 3:  # later, AdamW makes large differences of the last bits of small gradients
                    error = (other - value).abs().max().item()
                    assert error <= 4 * torch.finfo(value.dtype).eps * value.abs().max().item(), what


def two_forwards(rank: int, world_size: int, without: Without) -> None:
    """Two calls and an evaluation before both backwards, with every bucket kept: gradients as in eager."""
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build().eval()
    reference = copy.deepcopy(model)
    zero = fxzero.compile(model, stage=2, without=without)
    batches = [case.batch(seed, 16) for seed in (1, 2)]
    for module in (zero, reference):
        first, second = [replicated._loss(module(**batch)) for batch in batches]
        with torch.no_grad():
            module(**batches[0])
        (first * 2).backward()
        second.backward()
    for fqn, param in reference.named_parameters():
        mine, full = zero.get_parameter(fqn).grad, param.grad
        assert mine is not None and full is not None
        torch.testing.assert_close(mine, replicated.own_slice(zero, fqn, full), rtol=1e-6, atol=1e-8)


class Flat(nn.Module):
    """Weights of 256 KiB, activations of less than 64 KiB, several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.large = Large()
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return self.large(x) * self.scale.sum().float()


def observe(rank: int, world_size: int, configurations: Sequence[Without]) -> list[dict[str, Any]]:
    """What a steady step of each configuration does."""
    return [_observe(without) for without in configurations]


def _observe(without: Without) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(3, 256)
    zero = fxzero.compile(Flat(), without=without, example=x)
    for _ in range(2):
        zero(x).backward()
        zero.clip_grad_norm_(0.01)
        zero.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        zero(x).backward()
        norm = zero.clip_grad_norm_(0.01)
    events: Any = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    engine, last = engine_of(zero), engine_of(zero).last
    assert last is not None
    return {
        "text": str(zero.schedule),
        "calls": Counter(event.name() for event in events),
        "allocations": sum(event.nbytes() >= LARGE_BYTES for event in events),
        "arena": engine.sharded.arena.nbytes,
        "left": _left(last._memory),
        "norm": norm.item(),
        "gradients": full_gradients(zero),
        "report": zero.schedule.memory.rows(),
    }


def _left(memory: Any) -> int | None:
    """Bytes of transient buffers that nobody gave back."""
    if not isinstance(memory, TransientMemory):
        return None
    return sum(storage.nbytes() for storage in memory._storages.values())


def reduce_lists(rank: int, world_size: int, comm: Comm | None = None) -> list[float]:
    """Gather and reduce one payload as lists; the padding of the shard is left alone."""
    import torch.distributed as dist

    from fxzero.comm.make import make_comm

    assert dist.is_initialized()
    lists = with_tensor_lists(make_comm(None, torch.device("cpu")))
    payload = one_payload(world_size, 100)
    full = torch.arange(payload.numel, dtype=torch.float32) + rank
    shard = torch.full((payload.slice_numel,), 1.0)
    for accumulate in (False, True):
        scratch = torch.empty(lists.reduce_scratch_numel(payload, accumulate=accumulate))
        bound = lists.bind_reduce(payload, full, scratch, shard, accumulate=accumulate)
        assert bound.start is not None and bound.wait is not None
        bound.start()
        bound.wait()
    lists.drain()
    gathered = torch.empty(payload.numel)
    bound = lists.bind_gather(payload, shard, gathered)
    assert bound.start is not None and bound.wait is not None
    bound.start()
    bound.wait()
    return gathered.tolist()


__all__ = ["beside_full", "observe", "reduce_lists", "two_forwards"]
