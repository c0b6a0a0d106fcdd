"""Run on every rank: what stays gathered across micro-steps, and when it is gathered again."""

import contextlib
import copy
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor

import fxzero
from fxzero.passes import default_passes
from fxzero.testing import engine_of
from tests.distributed import replicated
from tests.helpers.gradient_copies import copied_bytes
from tests.optimizers.test_optimizer_state import Allocations, Large

Batch = replicated.Batch
ENOUGH = 2**30


class Counted:
    """Counts the gathers that start in forward."""

    def __init__(self, zero: fxzero.ZeroModule) -> None:
        self.num = 0
        engine = engine_of(zero)
        bind = engine.sharded.comm.bind_gather

        def bind_gather(*args: torch.Tensor) -> object:
            bound = bind(*args)
            assert bound.start is not None
            start = bound.start

            def counting() -> None:
                self.num += 1
                start()

            return bound._replace(start=counting)

        engine.sharded.comm.bind_gather = bind_gather

    def during(self, call: Callable[[], object]) -> int:
        """The gathers that a call starts."""
        before = self.num
        call()
        return self.num - before


def accumulate(rank: int, world_size: int, no_sync: bool, dtypes: dict[str, Any] | None = None) -> None:
    """Train with a large budget; micro-steps after the first gather nothing, and the numbers are those without.

    Args:
        dtypes: of the wire, as of `default_passes`.
    """
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    plain = copy.deepcopy(model)
    passes = default_passes(bucket_bytes=8192, **(dtypes or {}))
    zero = fxzero.compile(model, passes=passes, memory_budget=ENOUGH)
    other = fxzero.compile(plain, passes=passes)
    counted = Counted(zero)
    optimizers = [torch.optim.AdamW(module.parameters(), lr=1e-3) for module in (zero, other)]
    counts: list[int] = []
    for step in range(3):
        for micro in range(3):
            batch = case.batch(10 * step + micro + 100 * rank, 16)

            def run(
                module: fxzero.ZeroModule, batch: Batch = batch, seed: int = micro, last: bool = micro == 2
            ) -> None:
                torch.manual_seed(seed)
                if no_sync and not last:
                    with module.no_sync():
                        module(**batch).loss.backward()
                else:
                    module(**batch).loss.backward()

            counts.append(counted.during(lambda: run(zero)))
            run(other)
        for module, optimizer in zip((zero, other), optimizers, strict=True):
            module.clip_grad_norm_(1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=step == 1)
        for mine, theirs in zip(zero.parameters(), other.parameters(), strict=True):
            assert torch.equal(mine, theirs)
    num_buckets = len(zero.schedule.step.resident)
    assert num_buckets > 3
    assert counts == [num_buckets, 0, 0] * 3
    assert "until the shards change" in str(zero.schedule)


def changes(rank: int, world_size: int) -> None:
    """Whatever changes the shards between micro-steps is seen by the next forward."""
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    zero = fxzero.compile(case.build(), passes=default_passes(bucket_bytes=8192), memory_budget=ENOUGH)
    counted = Counted(zero)
    batch = case.batch(1, 16)
    zero.eval()

    def loss() -> torch.Tensor:
        return zero(**batch).loss

    first = loss()
    first.backward()
    num_buckets = counted.num
    assert counted.during(lambda: loss().backward()) == 0
    with torch.no_grad():  # an evaluation in between finds them too, in a plan of its own
        assert counted.during(loss) == 0
    before = zero.state_dict()
    with torch.no_grad():
        for param in zero.parameters():
            param.mul_(1.5)
    assert counted.during(lambda: loss().backward()) == num_buckets
    assert loss() != first
    zero.load_state_dict(before)
    assert loss() == first
    optimizer = torch.optim.SGD(zero.parameters(), lr=0.1)
    loss().backward()
    optimizer.step()
    assert counted.during(loss) == num_buckets
    assert loss() != first
    # Two forwards before their backwards.
    zero.load_state_dict(before)
    one, two = loss(), loss()
    one.backward()
    two.backward()
    assert one == two == first


def evaluation_first(rank: int, world_size: int) -> None:
    """A plan that was made before anything was chosen takes no place of a bucket that stays."""
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    plain = copy.deepcopy(model)
    passes = default_passes(bucket_bytes=8192)
    modules = (fxzero.compile(model, passes=passes, memory_budget=ENOUGH), fxzero.compile(plain, passes=passes))
    batch = case.batch(1, 16)
    losses: list[list[torch.Tensor]] = []
    for zero in modules:
        zero.eval()
        found: list[torch.Tensor] = []

        def evaluate(zero: fxzero.ZeroModule = zero, found: list[torch.Tensor] = found) -> None:
            with torch.no_grad():
                found.append(zero(**batch).loss)

        evaluate()
        for _ in range(3):
            loss = zero(**batch).loss
            evaluate()
            loss.backward()
            evaluate()
            found.append(loss.detach())
        losses.append(found)
    assert losses[0] == losses[1]
    for mine, theirs in zip(modules[0].parameters(), modules[1].parameters(), strict=True):
        assert mine.grad is not None and theirs.grad is not None
        assert torch.equal(mine.grad, theirs.grad)


def different_shapes(rank: int, world_size: int) -> None:
    """Ranks whose first shapes, and so their room, differ keep the same buckets."""
    case = replicated.CASES["gpt"]
    torch.manual_seed(0)
    model = case.build()
    lean = fxzero.planner.plan(
        model, case.batch(0, 16), world_size=world_size, passes=default_passes(bucket_bytes=8192)
    )
    budget = lean.memory.planned_peak_bytes + 60_000
    zero = fxzero.compile(model, passes=default_passes(bucket_bytes=8192), memory_budget=budget)
    zero(**case.batch(0, 4 + 12 * (rank == 1))).loss.backward()
    kept = sorted(zero.schedule.step.kept)
    everyone: list[object] = [None] * world_size
    torch.distributed.all_gather_object(everyone, kept)
    assert everyone == [kept] * world_size
    assert len(kept) > 0
    zero(**case.batch(0, 16)).loss.backward()


def auto(rank: int, world_size: int) -> None:
    """A small model on a machine with room is kept whole."""
    case = replicated.CASES["gpt"]
    zero = fxzero.compile(case.build(), memory_budget="auto", example=case.batch(0, 16))
    assert len(zero.schedule.step.resident) == len(zero.schedule.step.kept) > 0


def gradient_copies(rank: int, world_size: int, name: str) -> tuple[int, int]:
    """Bytes copied into gradient buckets by a backward: measured, and planned."""
    case = replicated.CASES[name]
    zero = fxzero.compile(case.build(), passes=default_passes(bucket_bytes=8192))
    batch = case.batch(rank, 16)
    zero(**batch).loss.backward()
    zero.zero_grad()
    loss = zero(**batch).loss
    engine = engine_of(zero)
    assert engine.sharded.shards is not None
    arena, params = engine.sharded.arena.view(0, 1, torch.uint8), engine.sharded.shards.params.segments
    measured, operators = copied_bytes(
        loss.backward, {arena.untyped_storage().data_ptr()}, {flat.untyped_storage().data_ptr() for flat in params}
    )
    assert "aten.mm.out" in operators
    return measured, zero.schedule.totals.copied_grad_bytes


def planned_and_measured(
    rank: int,
    world_size: int,
    budget: Literal["auto"] | None,
    no_sync: bool,
    dtypes: dict[str, Any] | None = None,
) -> None:
    """What is held is what was planned, and a steady step of two shapes, with an evaluation, allocates nothing large.

    All activations are below 64 KiB; all shards are larger.

    Args:
        dtypes: of the wire, as of `default_passes`.
    """
    small, large = torch.randn(3, 256), torch.randn(5, 256)
    passes = default_passes(bucket_bytes=2**18, **(dtypes or {}))
    zero = fxzero.compile(Large(), passes=passes, memory_budget=budget, example=large)
    assert bool(zero.schedule.step.resident) == (budget is not None)
    optimizer = torch.optim.AdamW(zero.parameters(), lr=1e-3, fused=True)
    kinds = ("parameters (shards)", "gradients (shards)", "optimizer state (shards)", "arena")
    before = zero.schedule.memory.rows()

    def backwards() -> None:
        with zero.no_sync() if no_sync else contextlib.nullcontext():
            zero(small).backward()
        zero.eval()
        with torch.no_grad():
            zero(small)
        zero.train()
        zero(large).backward()
        zero.clip_grad_norm_(1.0)
        optimizer.step()

    for _ in range(2):
        optimizer.zero_grad()
        backwards()
    state = [value for each in optimizer.state.values() for key, value in each.items() if key != "step"]
    gradients = [param.grad for param in zero.parameters() if param.grad is not None]
    measured = dict(
        zip(
            kinds,
            [
                _storage_bytes(param.data for param in zero.parameters()),
                _storage_bytes(gradients),
                _storage_bytes(state),
                engine_of(zero).sharded.arena.nbytes,
            ],
            strict=True,
        )
    )
    planned = dict(zero.schedule.memory.rows())
    for rows in (dict(before) | {"arena": planned["arena"]}, planned):  # which grew for a backward that accumulates
        for kind, nbytes in measured.items():
            expected = rows[kind]
            assert expected is not None and nbytes > 2**16
            assert 0.98 * expected <= nbytes <= expected, (kind, nbytes, expected)
    backwards()  # adds to the gradients that are there, small as well as large
    optimizer.zero_grad()
    with Allocations() as steady:
        backwards()
    assert steady.large == [], steady.large


def _storage_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of the storages that tensors lie in, each once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
