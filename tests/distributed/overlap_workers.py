"""What ranks do in test_overlap_ranks.py: the same training with and without `overlap_optimizer`."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import fxzero
from fxzero.errors import GradientsInFlightError
from fxzero.ir import Role, head_gathers
from fxzero.passes import default_passes
from tests.distributed import tuner_workers

WIDTH, DEPTH = 24, 4
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1, foreach=False),
    "sgd_fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=False),
    "adamw_foreach": lambda params: torch.optim.AdamW(params, lr=1e-2, foreach=True),
    "adamw_fused": lambda params: torch.optim.AdamW(params, lr=1e-2, fused=True, amsgrad=True),
    "adadelta": torch.optim.Adadelta,
    "adagrad": torch.optim.Adagrad,
    "adam": lambda params: torch.optim.Adam(params, maximize=True),
    "adamax": torch.optim.Adamax,
    "asgd": lambda params: torch.optim.ASGD(params, t0=1, lr=0.1),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "rmsprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "rprop": torch.optim.Rprop,
}


class Net(nn.Module):
    """Layers of odd sizes, buckets of a layer each, and a part that calls may leave out."""

    def __init__(self) -> None:
        super().__init__()
        widths = [WIDTH + (7 * i) % 5 for i in range(DEPTH)] + [WIDTH]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip([WIDTH, *widths[1:-1]], widths[1:], strict=True))
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor, use_head: bool = True) -> torch.Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.head(x) if use_head else x


def batch(step: int, rank: int, rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(100 * step + rank))


class Run:
    """One training, with what it computes noted on the way."""

    def __init__(self, rank: int, overlaps: bool, optimizers: Any, mesh: Any = None, **options: Any) -> None:
        torch.manual_seed(0)
        self.rank, self.overlaps = rank, overlaps
        self.model = Net()
        self.optimizers: list[torch.optim.Optimizer] = optimizers(self.model)
        sizes = {"bucket_bytes": 2000, "prefetch_bytes": 8000, **options.pop("sizes", {})}
        if "memory_budget" not in options:
            options["passes"] = default_passes(**sizes)
        if mesh is not None:
            options["mesh"] = init_device_mesh("cpu", mesh)
        self.zero = fxzero.compile(self.model, optimizer=self.optimizers, overlap_optimizer=overlaps, **options)
        self.noted: list[torch.Tensor] = []

    @property
    def overlap(self) -> Any:
        return self.zero._fxzero_engine.overlap

    def note(self, values: Iterable[torch.Tensor | None]) -> None:
        self.noted += [torch.full((), torch.nan) if value is None else value.detach().clone() for value in values]

    def backward(self, step: int, rows: int = 4, scale: float = 1.0) -> None:
        loss = self.zero(batch(step, self.rank, rows)).pow(2).mean() * scale
        loss.backward()
        self.note([loss])

    def note_grads(self) -> None:
        self.zero.wait_for_gradients()
        self.note(param.grad for param in self.zero.parameters())

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()
        self.note(self.zero.parameters())
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def finish(self) -> None:
        self.note(self.zero.state_dict().values())
        for optimizer in self.optimizers:
            states = optimizer.state_dict()["state"]
            self.note(value for state in states.values() for value in state.values() if isinstance(value, torch.Tensor))


def one(name: str) -> Callable[[nn.Module], list[torch.optim.Optimizer]]:
    return lambda model: [OPTIMIZERS[name](model.parameters())]


def groups(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Groups that cut through buckets."""
    params = list(model.parameters())
    return [
        torch.optim.AdamW(
            [{"params": params[0::3]}, {"params": params[1::3], "lr": 0.1}, {"params": params[2::3]}], lr=1e-2
        )
    ]


def two(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two optimizers that share buckets."""
    params = list(model.parameters())
    return [torch.optim.SGD(params[0::2], lr=0.1, momentum=0.9), torch.optim.AdamW(params[1::2], lr=1e-2)]


def halves(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Two optimizers of different layers, the first of those whose gradients come last."""
    params = list(model.parameters())
    return [torch.optim.AdamW(params[:4], lr=1e-2), torch.optim.SGD(params[4:], lr=0.1)]


BUILDERS: dict[str, Callable[[nn.Module], list[torch.optim.Optimizer]]] = {
    **{name: one(name) for name in OPTIMIZERS},
    "groups": groups,
    "two": two,
    "halves": halves,
}

# -- what may happen in a step -----------------------------------------------------------------------------------------


def plain(run: Run, step: int) -> None:
    run.backward(step)
    run.step()


def read_gradients(run: Run, step: int) -> None:
    run.backward(step)
    run.note_grads()
    run.step()


def clip(run: Run, step: int) -> None:
    run.backward(step)
    run.note([run.zero.clip_grad_norm_(0.01)])
    run.step()


def accumulate(run: Run, step: int) -> None:
    for micro in range(3):
        run.backward(10 * step + micro)
    run.step()


def no_sync(run: Run, step: int) -> None:
    with run.zero.no_sync():
        run.backward(10 * step)
        run.backward(10 * step + 1)
    run.backward(10 * step + 2)
    run.step()


def evaluate(run: Run, step: int) -> None:
    """An evaluation between backward and step, and one between step and forward, with and without the head."""
    run.backward(step)
    with torch.no_grad():
        run.note([run.zero(batch(50 + step, run.rank, 3))])
    run.step()
    with torch.no_grad():
        run.note([run.zero(batch(60 + step, run.rank, 5), use_head=step % 2 == 0)])


def zero_grad(run: Run, step: int) -> None:
    """Gradients that are dropped before any step, by all three ways to do so."""
    run.backward(step)
    if step % 3 == 0:
        run.zero.zero_grad()
    elif step % 3 == 1:
        run.zero.zero_grad(set_to_none=False)
    else:
        run.optimizers[0].zero_grad()
    run.backward(step + 20)
    run.step()


def shapes(run: Run, step: int) -> None:
    """Each rank has another shape in another step."""
    run.backward(step, rows=4 + (step if run.rank == 0 else step // 2))
    run.step()


def weights(run: Run, step: int) -> None:
    """State dicts between backward and step, and loads between step and forward."""
    run.backward(step)
    saved = run.zero.state_dict()
    run.note(saved.values())
    run.step()
    run.note(value for _, value in run.zero.iter_full_params() if value is not None)
    if step == 1:
        run.zero.load_state_dict({name: value * 0.5 for name, value in saved.items()})


def in_place(run: Run, step: int) -> None:
    """Parameters that are changed between step and forward: all, some, through other data, and by a second step."""
    run.backward(step)
    run.step()
    params = list(run.zero.parameters())
    with torch.no_grad():
        if step == 1:
            for param in params:
                param.clamp_(-0.1, 0.1)
        elif step == 2:
            params[0].mul_(0.5)
        elif step in (3, 4):
            params[1].data = params[1].detach() * 0.5
        elif step == 5:
            run.zero.wait_for_gradients()
            params[0].data.mul_(0.5)
    if step == 5:
        for param in params:
            param.grad = torch.ones_like(param)
        run.step()


def closure(run: Run, step: int) -> None:
    def again() -> torch.Tensor:
        run.zero.zero_grad()
        loss = run.zero(batch(step, run.rank)).pow(2).mean()
        loss.backward()
        return loss

    run.backward(step)
    run.note([run.optimizers[0].step(again)])  # type: ignore[arg-type]
    run.note(run.zero.parameters())
    run.zero.zero_grad()


def hooks(run: Run, step: int) -> None:
    """A hook that looks at gradients before a step, and after it; then one on a parameter."""
    seen = lambda optimizer, args, kwargs: run.note(p.grad for p in run.zero.parameters())  # noqa: E731
    optimizer = run.optimizers[0]
    handle = optimizer.register_step_pre_hook(seen) if step % 2 else optimizer.register_step_post_hook(seen)
    run.backward(step)
    run.step()
    handle.remove()
    last = next(iter(run.zero.parameters()))
    handle = last.register_post_accumulate_grad_hook(lambda param: run.note([param.grad]))
    run.backward(step + 30)
    run.step()
    handle.remove()


def gradients_stay(run: Run, step: int) -> None:
    """After a step, `.grad` is what it was."""
    run.backward(step)
    run.optimizers[0].step()
    run.note(param.grad for param in run.zero.parameters())
    run.zero.zero_grad()


def scheduler(run: Run, step: int) -> None:
    if step == 0:
        run.lr = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizers[0], 5)  # type: ignore[attr-defined]
    run.backward(step)
    run.step()
    run.lr.step()  # type: ignore[attr-defined]


def skipped_step(run: Run, step: int) -> None:
    run.backward(step)
    if step % 2:
        run.optimizers[0].zero_grad()
    else:
        run.step()


def frozen(run: Run, step: int) -> None:
    """From the third step on, some parameters get no gradient."""
    run.model.layers[1].requires_grad_(step < 2)
    run.backward(step)
    run.step()


def part_of_the_model(run: Run, step: int) -> None:
    """Only one of two optimizers steps."""
    run.backward(step)
    run.optimizers[step % 2].step()
    run.note(run.zero.parameters())
    run.zero.zero_grad()


SCENARIOS = {
    function.__name__: function
    for function in (
        *(plain, read_gradients, clip, accumulate, no_sync, evaluate, zero_grad, shapes, weights, in_place, closure),
        *(hooks, gradients_stay, scheduler, skipped_step, frozen, part_of_the_model),
    )
}


def compare(rank: int, world_size: int, cases: list[tuple[str, str, dict[str, Any]]], num_steps: int = 3) -> None:
    """Run scenarios both ways; every number that is noted must be the same."""
    for scenario, optimizers, options in cases:
        noted: list[list[torch.Tensor]] = []
        for overlaps in (False, True):
            run = Run(rank, overlaps, BUILDERS[optimizers], **options)
            for step in range(6 if scenario == "in_place" else num_steps):
                SCENARIOS[scenario](run, step)
            run.finish()
            noted.append(run.noted)
        assert len(noted[0]) == len(noted[1]) > 0, (scenario, optimizers)
        for index, (plainly, overlapped) in enumerate(zip(*noted, strict=True)):
            same = torch.equal(plainly.nan_to_num(0.5), overlapped.nan_to_num(0.5))
            assert same, f"{scenario} {optimizers} {options}: value {index} differs"


def tuned(rank: int, world_size: int) -> None:
    """A model that is large enough to be measured; later all is planned again."""
    results = [
        tuner_workers.train(
            rank, tuner_workers.NUM_STEPS, uneven=True, cluster=tuner_workers.SLOW, overlap_optimizer=overlaps
        )
        for overlaps in (False, True)
    ]
    assert results[0]["losses"] == results[1]["losses"]
    assert all(torch.equal(value, results[1]["params"][name]) for name, value in results[0]["params"].items())
    assert results[1]["measured"]


def order_of_work(rank: int, world_size: int) -> None:
    """What happens in the third step, in order: waits of reductions, steps of optimizers in parts, gathers."""
    run = Run(rank, True, BUILDERS["adamw"])
    for step in range(2):
        plain(run, step)
    happened: list[str] = []
    (tail,) = {id(tail): tail for tail in run.zero._fxzero_engine.last._tails.values() if tail}.values()
    tail[:] = [part._replace(finish=_noting(happened, f"wait {n}", part.finish)) for n, part in enumerate(tail)]
    assert len(tail) > 2
    kernel: Any = vars(sys.modules["torch.optim.adam"])["adam"]
    numels = {part.fqns: sum(run.zero.get_parameter(fqn).numel() for fqn in part.fqns) for part in tail}

    def noting_kernel(params: Any, *args: Any, **kwargs: Any) -> None:
        happened.append(f"step {sum(param.numel() for param in params)}")
        kernel(params, *args, **kwargs)

    run.backward(2)
    assert happened == []
    assert run.overlap.are_pending
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["torch.optim.adam"], "adam", noting_kernel)
        run.optimizers[0].step()
    total = sum(param.numel() for param in run.zero.parameters())
    first = total - sum(numels.values())
    expected = [f"step {first}"] if first else []
    for number, part in enumerate(tail):
        expected += [f"wait {number}", f"step {numels[part.fqns]}"]
    assert happened == expected
    assert not run.overlap.are_pending


def _noting(happened: list[str], name: str, call: Callable[[], object]) -> Callable[[], object]:
    def noting() -> None:
        happened.append(name)
        call()

    return noting


def early_gathers(rank: int, world_size: int) -> None:
    """How many gathers are in flight after a step, and how many the plans that follow start themselves."""
    run = Run(rank, True, BUILDERS["adamw"])
    plain(run, 0)
    num_head = len(head_gathers(run.zero.schedule.step))
    assert len(run.overlap.early._flying) == num_head > 1
    started: list[str] = []
    comm = run.zero._fxzero_engine.comm
    bind = comm.bind_gather

    def noting_bind(bucket: Any, shard: Any, full: Any) -> Any:
        bound = bind(bucket, shard, full)
        return bound._replace(start=_noting(started, bucket.fqns[0], bound.start))

    comm.bind_gather = noting_bind
    with torch.no_grad():
        run.zero(batch(0, rank, rows=7))  # another plan
    in_forward = [node for node in run.zero.schedule.step.nodes(Role.ALL_GATHER)]
    assert len(started) == len(in_forward) - num_head
    assert not run.overlap.early._flying
    plain(run, 1)  # the plan of the evaluation is taken for the next one, too
    with torch.no_grad():
        del started[:]
        run.zero(batch(0, rank, rows=7))
        assert len(started) == len(in_forward) - num_head
        run.zero(batch(0, rank, rows=7))
        assert len(started) == 2 * len(in_forward) - num_head
    run.backward(2)
    run.step()
    next(run.zero.parameters()).data.zero_()
    run.zero.wait_for_gradients()
    assert not run.overlap.early._flying


def write_in_flight(rank: int, world_size: int) -> None:
    """Writing to gradients whose reduction is in flight is an error in whatever comes next; waiting before is none."""
    run = Run(rank, True, BUILDERS["adamw"])
    plain(run, 0)
    for use in (
        run.step,
        run.zero.wait_for_gradients,
        lambda: run.zero.clip_grad_norm_(1.0),
        lambda: run.backward(3),
    ):
        run.backward(1)
        assert run.overlap.are_pending
        run.optimizers[0].zero_grad(set_to_none=False)
        with pytest.raises(GradientsInFlightError, match="wait_for_gradients"):
            use()
        assert not run.overlap.are_pending
    run.zero.zero_grad()
    run.backward(1)
    run.zero.wait_for_gradients()
    torch._foreach_mul_([param.grad for param in run.zero.parameters()], 0.5)
    run.step()


def end_in_flight(rank: int, world_size: int) -> None:
    """The last step leaves gathers in flight, and a last backward reductions."""
    run = Run(rank, True, BUILDERS["adamw"])
    for step in range(3):
        plain(run, step)
    assert run.overlap.early._flying
    if rank == 0:
        run.note(run.zero.parameters())


def freed(rank: int, world_size: int) -> None:
    """The model and its shards are freed without the garbage collector; what is in flight is waited for."""
    gc.disable()
    for ends_in_backward in (False, True):
        run = Run(rank, True, BUILDERS["adamw"])
        for step in range(3):
            plain(run, step)
        if ends_in_backward:
            run.backward(3)
        overlap = run.overlap
        assert overlap.are_pending == ends_in_backward != bool(overlap.early._flying)
        shards = weakref.ref(run.zero._fxzero_engine.shards)
        engine = weakref.ref(run.zero._fxzero_engine)
        del run
        assert not overlap.are_pending and not overlap.early._flying
        del overlap
        assert (engine(), shards()) == (None, None)
    gc.enable()
