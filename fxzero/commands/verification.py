"""`fxzero.verify`: does a compiled model compute what plain PyTorch does? Loss, gradients, and one optimizer step.

copy of the model ----- eager -- loss -- gradients, averaged over ranks -- step      on each rank, unsharded
another copy ------- compiled -- loss -- gradients, this rank's slices  -- step      compared slice by slice
"""

import copy
import functools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxzero.api import ZeroModule, compile
from fxzero.comm import agree
from fxzero.errors import DifferentNumbersError, InputMismatchError
from fxzero.module.saved.parts import random_states, set_random_states
from fxzero.planner import as_arguments
from fxzero.planning.compare_results import difference, largest_magnitude
from fxzero.planning.island_share import islands_line
from fxzero.runtime.shards import Shards

OptimizerFactory: TypeAlias = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
Arguments: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]
_TOPIC = "verification"


@dataclass(frozen=True)
class Difference:
    """A value that is not what plain PyTorch gives."""

    kind: str
    """`loss`, `gradient`, `step` (the parameter after it) or `buffer`."""
    name: str
    """The parameter or buffer; empty for the loss."""
    text: str
    """In how many elements, and the first one: was that of plain PyTorch, and is that of the compiled model."""
    largest: float
    """The largest difference, or NaN where there is none in numbers."""
    relative: float
    """That over the largest magnitude in the tensor."""
    rank: int

    @property
    def what(self) -> str:
        """The value in words."""
        words = {"gradient": "gradient of {}", "step": "{} after the step", "buffer": "buffer {}"}
        return words.get(self.kind, self.kind).format(self.name)


@dataclass(frozen=True)
class Verification:
    """What `fxzero.verify` found, on all ranks alike."""

    model: str
    world_size: int
    tolerance: float
    counts: Mapping[str, int]
    """How many values of each kind were compared."""
    differences: Sequence[Difference]
    """All of them, in the order in which they arise: loss, gradients, parameters after the step, buffers."""
    reasons: Sequence[str] = field(default=())
    """Why values may differ, where they do."""

    @property
    def ok(self) -> bool:
        """True if nothing differs: bit for bit, or by more than the tolerance."""
        return not self.differences

    def raise_if_different(self) -> None:
        """Raise a DifferentNumbersError with the report if anything differs."""
        if not self.ok:
            raise DifferentNumbersError(str(self))

    def __str__(self) -> str:
        how = f"within {self.tolerance:g} of the largest value of each" if self.tolerance else "bit for bit"
        lines = [f"{self.model} on {self.world_size} rank{'s' if self.world_size > 1 else ''}, against plain PyTorch:"]
        for kind, count in self.counts.items():
            differing = len({each.name for each in self.differences if each.kind == kind})
            lines.append(f"  {_LABELS[kind]:<24} {count - differing} of {count} equal")
        if self.ok:
            return "\n".join([*lines, f"All are equal, {how}."])
        first = self.differences[0]
        where = f" on rank {first.rank}" if self.world_size > 1 else ""
        lines.append(f"The first that differs{where}: {first.what} {first.text}.")
        lines.append(f"Its largest difference is {first.largest:.3g}, {first.relative:.2g} of its largest value.")
        return "\n".join([*lines, *(f"Why it may: {reason}" for reason in self.reasons)])


_LABELS = {"loss": "loss", "gradient": "gradients", "step": "parameters after a step", "buffer": "buffers"}


def verify(
    model: nn.Module,
    batch: Any,
    *,
    optimizer: OptimizerFactory | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float = 0.0,
    **options: Any,
) -> Verification:
    """Compare a compiled copy of a model with an unsharded one in plain PyTorch: loss, gradients, an optimizer step.

    Alone or on ranks, where each passes its own batch and plain PyTorch means replicated training: gradients averaged
    over all ranks. Then it is a collective. Each rank holds three copies of the model. The model, its buffers and all
    random states are left as they are.

    Args:
        model: the model as `fxzero.compile` would take it, with values.
        batch: as `example=` of `fxzero.compile`: a mapping is passed as keyword arguments, a tuple or list as
            positional ones, anything else as the only argument.
        optimizer: makes an optimizer of parameters: `lambda params: torch.optim.SGD(params, lr=0.1)`. Default: AdamW.
        loss: makes a scalar of what the model returns. Default: the output itself, its `loss`, or its first item,
            whichever is a scalar.
        tolerance: how far elements may differ, relative to the largest magnitude in their tensor. Default: bit for bit,
            which narrow types and precision policies do not give.
        options: of `fxzero.compile`.

    Returns:
        The result, which has `ok` and prints as a report. Differences raise nothing.

    Raises:
        InputMismatchError: the model is compiled already, or on the meta device.
        ValueError: no scalar can be found in the output; or an option is not for this.
        FxzeroError: as from `fxzero.compile` and a step.
    """
    return verify_call(model, as_arguments(batch), optimizer=optimizer, loss=loss, tolerance=tolerance, options=options)


def verify_call(
    model: nn.Module,
    arguments: Arguments,
    *,
    optimizer: OptimizerFactory | None = None,
    loss: Callable[[Any], Tensor] | None = None,
    tolerance: float = 0.0,
    options: Mapping[str, Any],
) -> Verification:
    """`verify` with positional and keyword arguments."""
    _check(model, options)
    group = options.get("process_group")
    make_optimizer = optimizer or functools.partial(torch.optim.AdamW, lr=1e-3)
    run = _Run(arguments, loss or _loss_of, _device_of(model))
    before = random_states(run.device)
    try:
        plain = _from_rank0(copy.deepcopy(model), group)
        wanted_loss = run.backward(plain)
        again = copy.deepcopy(model)
        is_repeatable = difference(wanted_loss, run.backward(_from_rank0(again, group))) is None
        is_repeatable &= all(_text(a.grad, b.grad) is None for a, b in _pairs(plain, again))
        del again
        compared = _Compared(tolerance)
        own = copy.deepcopy(model)
        own_optimizer = make_optimizer(own.parameters())
        zero = compile(own, optimizer=own_optimizer, **options)
        compared.add("loss", "", wanted_loss, run.backward(zero))
        _average_gradients(plain, group, _ranks_per_node(options))
        shards = zero._fxzero_engine.sharded.shards
        assert shards is not None
        _compare_slices(compared, "gradient", plain, zero, shards, lambda param: param.grad)
        make_optimizer(plain.parameters()).step()
        own_optimizer.step()
        _compare_slices(compared, "step", plain, zero, shards, lambda param: param.detach())
        buffers = dict(zero.named_buffers())
        for name, buffer in plain.named_buffers():
            compared.add("buffer", name, buffer, buffers[name])
        return _result(zero, compared, is_repeatable=is_repeatable, options=options)
    finally:
        set_random_states(before, run.device)


def _check(model: Any, options: Mapping[str, Any]) -> None:
    if isinstance(model, ZeroModule):
        raise InputMismatchError("verify compiles a copy of the model by itself: pass the plain model.")
    if any(each.is_meta for each in (*model.parameters(), *model.buffers())):
        raise InputMismatchError("The model is on the meta device, without values to compute with: give it some first.")
    if refused := {"example", "resume", "init_fn", "sync_init"} & options.keys():
        raise ValueError(f"verify takes no {sorted(refused)[0]}=: it begins with the values of the model, of rank 0.")


def _device_of(model: nn.Module) -> torch.device:
    return next((param.device for param in model.parameters()), torch.device("cpu"))


# -- running -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Run:
    """A forward and a backward that begin with the same random states each time."""

    arguments: Arguments
    loss: Callable[[Any], Tensor]
    device: torch.device
    states: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "states", random_states(self.device))

    def backward(self, model: nn.Module) -> Tensor:
        """The loss of a model, whose parameters get gradients."""
        set_random_states(self.states, self.device)
        args, kwargs = copy.deepcopy(self.arguments)
        for param in model.parameters():
            param.grad = None
        loss = self.loss(model(*args, **kwargs))
        loss.backward()
        return loss.detach()


def _loss_of(output: Any) -> Tensor:
    """The scalar among what a model returns."""
    tried = [output, getattr(output, "loss", None)]
    if isinstance(output, Mapping):
        tried.append(output.get("loss"))
    if isinstance(output, (tuple, list)) and output:
        tried.append(output[0])
    scalars = [each for each in tried if isinstance(each, Tensor) and each.numel() == 1 and each.requires_grad]
    if not scalars:
        raise ValueError("The model returns no scalar that requires grad: pass loss=, which makes one of its output.")
    return scalars[0].reshape(())


def _from_rank0(model: nn.Module, group: Any) -> nn.Module:
    """Give a model the parameters and buffers of rank 0, as compile does."""
    if dist.is_initialized():
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                dist.broadcast(tensor.detach(), group=group, group_src=0)
    return model


def _ranks_per_node(options: Mapping[str, Any]) -> int | None:
    mesh = options.get("mesh")
    return mesh.shape[1] if mesh is not None and len(mesh.shape) == 2 else None


def _average_gradients(model: nn.Module, group: Any, ranks_per_node: int | None) -> None:
    """Average gradients over ranks: `((g_0 + g_1) + ...) / W`, those of a node first."""
    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    world_size = dist.get_world_size(group)
    params = [param for param in model.parameters() if param.requires_grad]
    reached = torch.tensor([param.grad is not None for param in params], device=_device_of(model), dtype=torch.int32)
    dist.all_reduce(reached, group=group)
    for param, count in zip(params, reached.tolist(), strict=True):
        if count == 0:
            continue
        mine = torch.zeros_like(param) if param.grad is None else param.grad.contiguous()
        of_ranks = [torch.empty_like(mine) for _ in range(world_size)]
        dist.all_gather(of_ranks, mine, group=group)
        size = ranks_per_node or world_size
        nodes = [functools.reduce(torch.add, of_ranks[first : first + size]) for first in range(0, world_size, size)]
        param.grad = functools.reduce(torch.add, nodes) / world_size


# -- comparing -----------------------------------------------------------------------------------------------------


@dataclass
class _Compared:
    """What was compared on this rank."""

    tolerance: float
    counts: dict[str, int] = field(default_factory=dict[str, int])
    differences: list[Difference] = field(default_factory=list[Difference])

    def add(self, kind: str, name: str, wanted: Tensor | None, found: Tensor | None) -> None:
        """Compare a value of plain PyTorch with that of the compiled model."""
        self.counts[kind] = self.counts.get(kind, 0) + 1
        magnitude = largest_magnitude([wanted])
        text = _text(wanted, found, self.tolerance * magnitude if self.tolerance else None)
        if text is None:
            return
        largest = float("nan")
        if wanted is not None and found is not None and wanted.shape == found.shape:
            largest = largest_magnitude([wanted.double() - found.double()])
        rank = dist.get_rank() if dist.is_initialized() else 0
        self.differences.append(Difference(kind, name, text, largest, largest / magnitude if magnitude else 0.0, rank))


def _text(wanted: Tensor | None, found: Tensor | None, bound: float | None = None) -> str | None:
    """How two values differ; -0.0, which a rank has for what it does not reach, is 0.0 here."""
    one, other = (each if each is None or each.dtype == torch.bool else each.detach() + 0 for each in (wanted, found))
    return difference(one, other, bound)


def _pairs(first: nn.Module, second: nn.Module) -> Iterator[tuple[nn.Parameter, nn.Parameter]]:
    return zip(first.parameters(), second.parameters(), strict=True)


def _compare_slices(
    compared: _Compared,
    kind: str,
    plain: nn.Module,
    zero: ZeroModule,
    shards: Shards,
    read: Callable[[nn.Parameter], Tensor | None],
) -> None:
    sharded = dict(zero.named_parameters())
    for fqn, param in plain.named_parameters():
        if param.requires_grad:
            full = read(param)
            wanted = None if full is None else shards.cut(fqn, full.contiguous())
            is_here = wanted is None or wanted.numel() > 0
            compared.add(kind, fqn, wanted, read(sharded[fqn]) if is_here else wanted)


def _result(zero: ZeroModule, compared: _Compared, *, is_repeatable: bool, options: Mapping[str, Any]) -> Verification:
    """What all ranks found."""
    sharded = zero._fxzero_engine.sharded
    lines = [json.dumps([is_repeatable, *map(asdict, compared.differences)])]
    with sharded.phases.phase("verify"):
        posts = agree.exchange(sharded.group, _TOPIC, lines, timeout=sharded.timeout)
    told = [json.loads(line) for (line,) in posts]
    found = [Difference(**each) for _, *of_rank in told for each in of_rank]
    order = {(kind, fqn): at for at, (kind, fqn) in enumerate((kind, fqn) for kind in _LABELS for fqn in _names(zero))}
    found.sort(key=lambda each: order[each.kind, each.name])
    reasons = _reasons(zero, found, options, is_repeatable=all(first for first, *_ in told)) if found else ()
    return Verification(
        model=type(zero._fxzero_model).__name__,
        world_size=len(posts),
        tolerance=compared.tolerance,
        counts=compared.counts,
        differences=tuple(found),
        reasons=tuple(reasons),
    )


def _names(zero: ZeroModule) -> list[str]:
    return ["", *(fqn for fqn, _ in zero.named_parameters()), *(name for name, _ in zero.named_buffers())]


def _reasons(
    zero: ZeroModule, found: Sequence[Difference], options: Mapping[str, Any], *, is_repeatable: bool
) -> Iterator[str]:
    """What is known to change numbers, as far as it is there."""
    engine = zero._fxzero_engine
    given = {name: options[name] for name in ("gather_dtype", "reduce_dtype", "mp_policy") if options.get(name)}
    if not is_repeatable:
        yield (
            "plain PyTorch differs from itself in two runs that began alike: a kernel that is not deterministic, or a "
            "state outside of the model and of the random generators."
        )
    for name, value in given.items():
        yield f"{name}={value} computes or sends in narrower types. Pass a tolerance, or leave it out to compare bits."
    if "passes" in options:
        yield "passes= may have passes that change numbers (their `tolerance`). FXZERO_CHECK=1 names the first."
    if engine.last is not None and (islands := islands_line(engine.last.form.step)):
        yield f"{islands[0]}; they run as they are, each twice where backward needs what is inside."
    if zero._fxzero_engine.sharded.devices.compute.type == "cuda":
        yield "NCCL sums over ranks in another order, and kernels may add in any order."
    if all(each.kind == "step" for each in found):
        yield "gradients are equal: the optimizer computes otherwise on a slice than on the whole (fused=, foreach=)."
    if is_repeatable and not given:
        yield "if none of these holds, fxzero is wrong: FXZERO_CHECK=1 names the first pass that changes numbers."
