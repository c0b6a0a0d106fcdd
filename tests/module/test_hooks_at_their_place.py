"""Hooks that observe run where the plain model would call them, with the tensors and the state that are there then."""

import collections
import contextlib
import logging
import queue
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fxzero
from fxzero.errors import CaptureError, FxzeroError
from fxzero.testing import run_ranks

log: list[Any] = []


class Clock:
    """Stands for time.time(): gives another number at each call, and no trace sees where from."""

    __slots__ = ()
    now = 0


def clock() -> int:
    type.__setattr__(Clock, "now", object.__getattribute__(Clock, "now") + 1)
    return Clock.now


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.act, self.last = nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)
        self.calls, self.last_norm, self.scale = 0, 0.0, 1.0
        self.hidden: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.act(self.norm(self.first(x)))).sum() * self.scale


class InPlace(Net):
    def __init__(self) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        return self.last(checkpoint(self.block, x, use_reentrant=False)).sum()  # type: ignore[arg-type]

    def block(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


class Sets(Net):
    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale + 1.0
        self.hidden = self.first(x)
        out = self.last(self.act(self.hidden)).sum()
        self.scale = self.scale + 1.0
        return out


def numbers(value: Any) -> Any:
    """A value without tensors, to compare."""
    if isinstance(value, Tensor):
        return value.tolist()
    if isinstance(value, dict):
        return {key: numbers(each) for key, each in value.items()}
    return [numbers(each) for each in value] if isinstance(value, (list, tuple, collections.deque)) else value


def times(model: Net) -> None:
    def before(module: Any, args: Any) -> None:
        module.began = clock()

    def after(module: Any, args: Any, output: Any) -> None:
        log.append((clock() - module.began, "of", type(module).__name__))

    for module in model.modules():
        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def prints(model: Net) -> None:
    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda m, args, name=name: log.append(f"> {name} {args[0].sum().item()}"))
        module.register_forward_hook(lambda m, a, out, name=name: log.append(f"< {name} {numbers(out)}"))


def keeps_detached(model: Net) -> None:
    acts: dict[str, Tensor] = {}
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, out, name=name: acts.update({name: out.detach()}))
    log.append(acts)


def counts(model: Net) -> None:
    def count(module: Any, args: Any, output: Any) -> None:
        model.calls += 1
        log.append(model.calls)

    for module in model.children():
        module.register_forward_hook(count)


def reads_what_another_set(model: Net) -> None:
    def norm(module: Any, args: Any, output: Tensor) -> None:
        model.last_norm = output.norm().item()

    model.first.register_forward_hook(norm)
    model.last.register_forward_hook(lambda m, a, out: log.append(model.last_norm))
    model.last.register_forward_hook(norm)
    model.register_forward_hook(lambda m, a, out: log.append(model.last_norm))


def reads_parameters(model: Net) -> None:
    model.first.register_forward_hook(lambda m, a, out: log.append(m.weight.norm().item()))
    model.last.register_forward_pre_hook(lambda m, a: log.append([p.sum().item() for p in m.parameters()]))
    model.first.register_full_backward_hook(lambda m, gi, go: log.append(m.weight.sum().item()))


def reads_buffers(model: Net) -> None:
    model.norm.register_forward_hook(lambda m, a, out: log.append(m.running_mean.tolist()))
    model.norm.register_forward_pre_hook(lambda m, a: log.append(m.running_mean.tolist()))


def keeps_and_reads(model: Net) -> None:
    """Sees what is written in place into the tensors that it keeps."""
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, out: Tensor) -> None:
        log.append(out.mean().item())
        kept.append(out)
        kept.append(out.detach()[:1])

    model.norm.register_forward_hook(keep)
    model.last.register_forward_hook(lambda m, a, out: log.append([each.tolist() for each in kept]))
    log.append(kept)


def once(model: Net) -> None:
    def see(module: Any, args: Any, out: Tensor) -> None:
        log.append(out.sum().item())
        handle.remove()

    handle = model.first.register_forward_hook(see)


def once_without_values(model: Net) -> None:
    def see(module: Any, args: Any, out: Tensor) -> None:
        log.append(tuple(out.shape))
        handle.remove()

    handle = model.first.register_forward_hook(see)


def in_the_order_of_both_phases(model: Net) -> None:
    for name, module in model.named_children():
        module.register_forward_hook(lambda m, a, out, name=name: log.append(f"forward {name}"))
        module.register_full_backward_hook(lambda m, gi, go, name=name: log.append(f"backward {name}"))
        module.register_full_backward_pre_hook(lambda m, go, name=name: log.append((name, go[0].sum().item())))


def under_the_modes_of_forward(model: Net) -> None:
    model.first.register_forward_hook(
        lambda m, a, out: log.append((torch.is_grad_enabled(), out.requires_grad, out.norm().item()))
    )


def into_what_forward_reads(model: Net) -> None:
    def annealed(module: Any, args: Any, out: Tensor) -> None:
        model.scale = model.scale * 0.5

    model.first.register_forward_hook(annealed)


def reads_what_forward_sets(model: Net) -> None:
    model.last.register_forward_hook(lambda m, a, out: log.append(model.hidden.sum().item()))


def of_any_module(model: Net) -> None:
    kinds: collections.Counter[str] = collections.Counter()
    for module in model.modules():
        module.register_forward_hook(lambda m, a, k, out: kinds.update([type(m).__name__]), with_kwargs=True)
    log.append(kinds)


def on_nodes_of_autograd(model: Net) -> None:
    def register(module: Any, args: Any, out: Tensor) -> None:
        assert out.grad_fn is not None
        out.grad_fn.register_hook(lambda gi, go: log.append(("node", go[0].sum().item())))
        out.grad_fn.register_prehook(lambda go: log.append(("before the node", go[0].sum().item())))

    model.act.register_forward_hook(register)


CASES: dict[str, tuple[type[Net], Callable[[Net], None]]] = {
    "times": (Net, times),
    "prints": (Net, prints),
    "keeps detached tensors": (Net, keeps_detached),
    "counts": (Net, counts),
    "counts, in a checkpoint": (Checkpointed, counts),
    "prints, in a checkpoint": (Checkpointed, prints),
    "reads what another set": (Net, reads_what_another_set),
    "reads parameters": (Net, reads_parameters),
    "reads buffers": (Net, reads_buffers),
    "prints, before a write in place": (InPlace, prints),
    "keeps what is written in place": (InPlace, keeps_and_reads),
    "keeps detached what is written in place": (InPlace, keeps_detached),
    "removes itself": (Net, once),
    "removes itself, having read a shape": (Net, once_without_values),
    "both phases": (Net, in_the_order_of_both_phases),
    "modes": (Net, under_the_modes_of_forward),
    "sets what forward reads": (Net, into_what_forward_reads),
    "reads what forward sets": (Sets, reads_what_forward_sets),
    "counts by class": (Net, of_any_module),
    "on nodes of autograd": (Net, on_nodes_of_autograd),
}


def run(
    kind: type[Net], hook: Callable[[Net], None], *, compiled: bool, rank: int = 0, without_grad: bool = False
) -> Any:
    log.clear()
    Clock.now = 0
    torch.manual_seed(0)
    model = kind()
    hook(model)
    called = fxzero.compile(model) if compiled else model
    optimizer = torch.optim.SGD(called.parameters(), 0.1)
    results: list[Any] = []
    for step in range(4):
        x = torch.linspace(-1, 1, 12).view(3, 4).mul(1 + step).requires_grad_()
        with torch.no_grad() if without_grad else contextlib.nullcontext():
            loss = called(x)
        if not without_grad:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append(numbers([loss.detach(), log, model.calls, model.last_norm, model.scale]))
    return results


@pytest.mark.parametrize("what", CASES)
def test_hooks_see_what_eager_shows_them(what: str) -> None:
    assert run(*CASES[what], compiled=True) == run(*CASES[what], compiled=False)


@pytest.mark.parametrize(
    "what", ["times", "prints", "counts", "keeps what is written in place", "sets what forward reads"]
)
def test_hooks_see_what_eager_shows_them_without_gradients(what: str) -> None:
    results = [run(*CASES[what], compiled=compiled, without_grad=True) for compiled in (True, False)]
    assert results[0] == results[1]


def test_hooks_print_and_log_once(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> None:
    model = Net()
    model.first.register_forward_hook(lambda m, a, out: print(tuple(out.shape)))
    model.act.register_forward_hook(lambda m, a, out: logging.getLogger("of a hook").warning("%s", tuple(out.shape)))
    zero = fxzero.compile(model)
    for _ in range(2):
        zero(torch.ones(3, 4))
    assert capsys.readouterr().out == "(3, 4)\n" * 2
    assert [record.getMessage() for record in caplog.records if record.name == "of a hook"] == ["(3, 4)"] * 2


class Found(Exception):
    """Leaves a forward early."""


def leave(module: Any, args: Any, out: Tensor) -> None:
    raise Found(out.detach().clone())


def leave_if_large(module: Any, args: Any, out: Tensor) -> None:
    if not out.abs().max() < 2:
        raise Found(out.detach().clone())


@pytest.mark.parametrize("hook", [leave, leave_if_large])
def test_a_hook_leaves_a_forward_with_the_exception_of_the_user(hook: Callable[..., None]) -> None:
    results: list[Any] = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model = Net()
        handle = model.norm.register_forward_hook(hook)
        calls: list[int] = []
        model.act.register_forward_hook(lambda m, a, out, calls=calls: calls.append(1))
        called = fxzero.compile(model) if compiled else model
        found: list[Any] = []
        for step in range(4):
            if step == 3:
                handle.remove()
            x = torch.linspace(-1, 1, 12).view(3, 4).mul(1 + step)
            x[1] = 100.0 * (step - 1)
            try:
                found.append(called(x).item())
            except Found as error:
                found.append(error.args[0].tolist())
        results.append([found, calls])
    assert results[0] == results[1]


def scale_if_large(module: Any, args: Any, out: Tensor) -> None:
    if out.max() > 0:
        out.mul_(0.5)


def keep_unseen(kept: "queue.SimpleQueue[Tensor]") -> Callable[..., None]:
    return lambda module, args, out: kept.put(out)


def test_what_a_hook_must_not_do_is_refused() -> None:
    torch.manual_seed(0)
    model = Net()
    model.first.register_forward_hook(scale_if_large)
    with pytest.raises(CaptureError, match="scale_if_large writes into a tensor"):
        fxzero.compile(model)(torch.ones(3, 4))


def test_a_hook_that_changes_values_and_removes_itself_is_refused_and_stays() -> None:
    torch.manual_seed(0)
    model, calls = Net(), list[int]()

    def once(module: Any, args: Any, out: Tensor) -> Tensor:
        calls.append(1)
        handle.remove()
        return out * 2

    handle = model.first.register_forward_hook(once)
    zero = fxzero.compile(model)
    for _ in range(2):
        with pytest.raises(CaptureError, match=r"once is removed while it runs.*handle.remove\(\)"):
            zero(torch.ones(3, 4))
    handle.remove()
    zero(torch.ones(3, 4)).backward()
    assert not calls


def test_retain_grad_in_a_hook_is_no_observation() -> None:
    found: list[list[Tensor]] = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model, kept = Net(), list[Tensor]()

        def keep(module: Any, args: Any, out: Tensor, kept: list[Tensor] = kept) -> None:
            out.retain_grad()
            kept.append(out)

        model.first.register_forward_hook(keep)
        called = fxzero.compile(model) if compiled else model
        with pytest.warns(UserWarning, match="calls retain_grad") if compiled else contextlib.nullcontext():
            called(torch.ones(3, 4)).backward()
        called(torch.ones(3, 4) * 2).backward()
        found.append([tensor.grad for tensor in kept if tensor.grad is not None])
    assert len(found[1]) == 2
    assert all(map(torch.equal, *found))


def test_no_gradient_is_lost_through_what_a_hook_keeps() -> None:
    model, kept = Net(), queue.SimpleQueue[Tensor]()
    model.first.register_forward_hook(keep_unseen(kept))
    zero = fxzero.compile(model)
    loss = zero(torch.ones(3, 4)) + [kept.get() for _ in range(kept.qsize())][-1].sum()
    with pytest.raises(FxzeroError, match="A gradient is asked for through a tensor that the hook"):
        loss.backward()


def test_a_loss_is_computed_from_what_hooks_keep() -> None:
    results: list[Any] = []
    for compiled in (True, False):
        torch.manual_seed(0)
        model, kept = Net(), dict[str, Tensor]()
        model.first.register_forward_hook(lambda m, a, out, kept=kept: kept.update(first=out))
        called = fxzero.compile(model) if compiled else model
        for _ in range(3):
            (called(torch.ones(3, 4)) + kept["first"].pow(2).sum()).backward()
        results.append([param.grad.flatten().tolist() for param in model.parameters() if param.grad is not None])
    assert results[0] == results[1]


class TwoLosses(Checkpointed):
    def forward(self, x: Tensor) -> Any:
        hidden = checkpoint(self.block, x, use_reentrant=False)
        return self.last(hidden).sum(), self.act(hidden).pow(2).sum()


def on_ranks(rank: int, world_size: int) -> None:
    """Hooks on one rank alone; under no_sync(), with recomputation, and where one of two losses is differentiated."""
    results: list[Any] = []
    for compiled in (True, False):
        log.clear()
        torch.manual_seed(0)
        model = TwoLosses()
        if rank == 0:
            prints(model)
            in_the_order_of_both_phases(model)
        called: Any = fxzero.compile(model, recompute="full") if compiled else model
        for step in range(4):
            x = torch.linspace(-1, 1, 12).view(3, 4).mul(1 + step + rank).requires_grad_()
            losses = called(x)[: 1 if step == 2 else 2]
            with called.no_sync() if compiled and step == 1 else contextlib.nullcontext():
                torch.stack(losses).sum().backward()
        results.append(numbers(log))
    assert results[0] == results[1]
    assert bool(log) == (rank == 0)


def test_hooks_on_one_rank() -> None:
    run_ranks(2, on_ranks)
