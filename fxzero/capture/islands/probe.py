"""Learn what a call of an island gives: it is run on real tensors, forward and backward, before the step is traced.

The weights are made up, since no rank has all of them; so are inputs that the model computes. They say nothing of the
values that a step will have, but all of the geometry of the results, and of what backward reads:

    a run                           its results, what it writes, what autograd saves
    run with other tensors between  weights and inputs are NaN where forward had them: NaN in the gradients means that
                                    backward reads one where no hook sees it
    run on other values             a shape that follows values cannot leave an island
"""

import contextlib
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry

from fxzero import torch_internals
from fxzero.capture.draws import restoring, same_draws_of_python
from fxzero.capture.fake_tensors import FakeState, swapped_tensors
from fxzero.capture.islands.facts import UNKNOWN, Facts
from fxzero.capture.islands.geometry import Geometry, dense_stride
from fxzero.capture.islands.run import Run
from fxzero.capture.islands.saved import NotingSaved
from fxzero.capture.islands.site import Site
from fxzero.capture.reads import Reads
from fxzero.capture.slots import Read
from fxzero.capture.writes import Before
from fxzero.errors import CaptureError, IslandError
from fxzero.torch_internals import tree_leaves

_SEED = 0x66785A


class NotAnIslandError(CaptureError):
    """A module that cannot be an island; perhaps one around it can."""


@dataclass(frozen=True)
class Example:
    """The tensors of a call: what is known of them."""

    inputs: tuple[Geometry, ...]
    real: Mapping[int, Tensor]
    """The values of those that are arguments of the model itself, or follow from some."""
    buffers: tuple[Tensor, ...]
    fixed: frozenset[int] = frozenset()
    """Which of the inputs are constants."""


@dataclass(frozen=True)
class _Values:
    inputs: list[Tensor]
    params: list[Tensor]
    buffers: list[Tensor]

    def copies(self) -> "_Values":
        return _Values(*([_copy(each) for each in group] for group in (self.inputs, self.params, self.buffers)))


def learn(model: nn.Module, site: Site, example: Example) -> tuple[Facts, frozenset[Any], list[Read]]:
    """What a call gives, and what of the Python state it writes (slots, and ids of containers) and reads.

    Raises:
        NotAnIslandError: the call cannot be one node of a step.
    """
    error: Exception | None = None
    site.facts = UNKNOWN
    for values in _made_up(site, example):
        with _undone(model, site.module) as (before, reads), torch.inference_mode(False):
            try:
                facts, written = _learn(model, site, values, example.fixed, before, reads)
            except NotAnIslandError:
                raise
            except Exception as failed:  # not values that the module takes
                error = error or failed
                continue
            finally:
                site.facts = UNKNOWN
                site.forget()
            return facts, written, list(reads.found.values())
    assert error is not None
    raise NotAnIslandError(f"on made-up values of its shapes it raises {type(error).__name__}: {error}") from error


def error_of(model: nn.Module, call: Callable[[], object]) -> Exception | None:
    """What the plain model raises for a call; None if it raises nothing. What the call does otherwise is taken back.

    Args:
        call: calls the model, whose parameters are whole.
    """
    params = {name: nn.Parameter(each.detach(), each.requires_grad) for name, each in model.named_parameters()}
    state = FakeState(dict(params), {name: each.clone() for name, each in model.named_buffers()})
    with _undone(model, model), _seeded(), torch.no_grad():
        try:
            with swapped_tensors(model, state):
                call()
        except Exception as error:
            return error
    return None


def _learn(
    model: nn.Module, site: Site, values: _Values, fixed: frozenset[int], state: Before, reads: Reads
) -> tuple[Facts, frozenset[Any]]:
    before = values.copies()
    forward, backward = _Flops(), _Flops()
    with forward, _OnlyOwn(model, site), reads.following():
        run = _run(site, values)
    written_state = state.changed_now() | reads.set_slots
    _check_params(values, before)
    facts = _facts_of(site, run, values, before)
    held = run.saved.held_bytes if isinstance(run.saved, NotingSaved) else 0
    with backward:
        late = before.copies()
        clean = _gradients(site, run, late)
    written = tuple(i for i, each in enumerate(late.buffers) if not same_bytes(each, before.buffers[i]))
    facts = replace(
        facts,
        written_in_backward=written,
        held_bytes=held,
        grad_strides=tuple(None if each is None else dense_stride(each) for each in clean[: site.num_input_grads]),
        flops=(forward.total, backward.total),
    )
    facts = replace(facts, escapes=_escapes(site, facts, before, clean))
    facts = replace(facts, outs=_with_grad(site, facts, _run_on_other_values(site, facts, before, fixed)))
    return facts, frozenset(written_state)


def _run(site: Site, values: _Values) -> Run:
    """A forward whose inputs and buffers are copies, so that `values` shows what it wrote.

    Raises:
        NotAnIslandError: it sets, or registers, a parameter.
    """
    tables = [torch_internals.tensor_tables(module)[0] for module in site.module.modules()]
    names = [set(table.keys()) for table in tables]
    try:
        with _seeded():
            run = site.run(values.inputs, values.params, values.buffers)
    except IslandError as error:
        raise NotAnIslandError(str(error)) from error
    finally:
        added = [(table, key) for table, own in zip(tables, names, strict=True) for key in {*table.keys()} - own]
        for table, key in added:
            del table[key]
    if added:
        raise NotAnIslandError(f"it registers a parameter, {added[0][1]}")
    return run


def _facts_of(site: Site, run: Run, values: _Values, before: _Values) -> Facts:
    given, own = run.given, run.buffers
    written_inputs = tuple(i for i, each in enumerate(given) if not same_bytes(each, before.inputs[i]))
    written_buffers = tuple(i for i, each in enumerate(own) if not same_bytes(each, before.buffers[i]))
    for out in run.tensors:
        if out.layout is not torch.strided or out.is_nested:
            raise NotAnIslandError(f"it returns a {out.layout} tensor")
    storages = [each.untyped_storage().data_ptr() for each in (*given, *values.params, *own)]
    of_outs = [out.untyped_storage().data_ptr() if out.numel() else 0 for out in run.tensors]
    shares_memory = {index: storages.index(each) for index, each in enumerate(of_outs) if each and each in storages}
    siblings = tuple(index for index, each in enumerate(of_outs) if each and of_outs.count(each) > 1)
    outs = [Geometry.dense(o) if i in shares_memory else Geometry.of(o) for i, o in enumerate(run.tensors)]
    written = [given[index] for index in written_inputs] + [own[index] for index in written_buffers]
    outs += map(Geometry.dense, written)
    begin = len(values.params)
    saved = run.saved.found if isinstance(run.saved, NotingSaved) else ()
    found = {index - begin for index in saved if index >= begin}
    kept = tuple(sorted(found - {*written_inputs}))
    return replace(
        UNKNOWN,
        output=run.output,
        outs=tuple(outs),
        shares_memory=shares_memory,
        siblings=siblings,
        keeps=_kept(site),
        written_inputs=written_inputs,
        written_buffers=written_buffers,
        saved_inputs=kept,
    )


def _kept(site: Site) -> tuple[tuple[str, str], ...]:
    """Attributes in which the call has kept tensors that require grad.

    Raises:
        NotAnIslandError: it keeps them deeper than in a list or a dict.
    """
    found: list[tuple[str, str]] = []
    for path, module in site.module.named_modules():
        for key, value in vars(module).items():
            if key in torch_internals.MODULE_ATTRIBUTES or key in torch_internals.RNN_CACHES:
                continue
            entries = value if isinstance(value, list) else value.values() if isinstance(value, dict) else [value]
            if any(isinstance(each, Tensor) and not each.is_leaf for each in entries):
                found.append((path, key))
            elif any(isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in tree_leaves(value)):
                raise NotAnIslandError(
                    f"it keeps a tensor that requires grad in attribute {key}, where no reader outside would get its "
                    "gradient; return it"
                )
    return tuple(found)


def _gradients(site: Site, run: Run, values: _Values) -> list[Tensor | None]:
    """The gradients of a run, given some for its results.

    Args:
        values: as backward has them.
    """
    if run.saved is None:
        return []
    run.saved.now = [*values.params, *values.inputs]
    with _seeded():
        outs, wanted = run.take()
        pairs = [(out, torch.randn_like(out)) for out in outs if out.requires_grad]
        found = site.differentiate(pairs, wanted, values.buffers)
    for gradient in found:
        if gradient is not None and gradient.layout is not torch.strided:
            raise NotAnIslandError(f"it gives a {gradient.layout} gradient; only dense ones are reduced (sparse=False)")
    return found


def _escapes(site: Site, facts: Facts, before: _Values, clean: Sequence[Tensor | None]) -> bool:
    """True if backward reads a weight or an input where no hook sees it."""
    if not site.has_backward:
        return False
    if any(gradient is not None and gradient.isnan().any() for gradient in clean):
        return True  # values that prove nothing
    site.facts = facts
    values = before.copies()
    run = _run(site, values)
    for each in (*values.inputs, *values.params):
        _blank(each)
    try:
        found = _gradients(site, run, before.copies())
    except RuntimeError:
        return True
    finally:
        site.facts = UNKNOWN
    return any(gradient is not None and bool(gradient.isnan().any()) for gradient in found)


def _check_params(values: _Values, before: _Values) -> None:
    for now, was in zip(values.params, before.params, strict=True):
        if not same_bytes(now, was):
            raise NotAnIslandError("it writes into a parameter; parameters are sharded, so only the optimizer may")


def _with_grad(site: Site, facts: Facts, other: Run | None) -> tuple[Geometry, ...]:
    """The geometry of the results: one that requires grad for some values may do so in a step.

    Where none does, no value may have come by the parameters: then any floating result may.
    """
    found = [out.requires_grad for out in facts.outs]
    if other is not None:
        outs = [*other.tensors]
        outs += [other.given[index] for index in facts.written_inputs]
        found = [a or b.requires_grad for a, b in zip(found, outs, strict=False)] + found[len(outs) :]
    if site.has_backward and not any(found):
        num_outs = len(facts.outs) - len(facts.written_buffers)
        found = [out.dtype.is_floating_point and index < num_outs for index, out in enumerate(facts.outs)]
    return tuple(replace(out, requires_grad=needs) for out, needs in zip(facts.outs, found, strict=True))


def _run_on_other_values(site: Site, facts: Facts, before: _Values, fixed: frozenset[int]) -> Run | None:
    """A run on other values, but for constants; None if the module does not take them.

    Raises:
        NotAnIslandError: it gives results of another shape, or other plain values.
    """
    with _seeded():
        inputs = [_copy(each) if index in fixed else _other(each) for index, each in enumerate(before.inputs)]
        other = _Values(inputs, before.params, before.copies().buffers)
    try:
        run = _run(site, other)
    except Exception:  # not values that the module takes
        return None
    now = [tuple(each.shape) for each in run.tensors]
    then = [out.shape for out in facts.outs[: len(run.tensors)]]
    if now != then and site.fqn:
        changed = next(pair for pair in zip(then, now, strict=False) if pair[0] != pair[1])
        raise NotAnIslandError(f"the shape of a result follows values: {list(changed[0])}, then {list(changed[1])}")
    if run.output != facts.output:
        raise NotAnIslandError("it returns plain values that follow values of tensors")
    return run


# -- values ----------------------------------------------------------------------------------------------------------


def _made_up(site: Site, example: Example) -> Iterator[_Values]:
    """Values for a call: those that most modules take first."""
    for ints, floats in ((0, "normal"), (1, "normal"), (1, "positive"), (0, "positive")):
        generator = torch.Generator().manual_seed(_SEED)

        fill = partial(_fill, generator, ints, floats == "positive")
        with torch.no_grad():
            inputs = [
                _copy(example.real[index]) if index in example.real else fill(geometry.empty(), 1.0)
                for index, geometry in enumerate(example.inputs)
            ]
            params = [
                fill(torch.empty(each.shape, dtype=each.dtypes.compute, device=site.device), 0.1)
                for each in site.params
            ]
            buffers = [
                fill(torch.empty_like(each, device=site.device), 1.0) if each.is_meta else _copy(each)
                for each in example.buffers
            ]
        yield _Values(inputs, params, buffers)


def _fill(generator: torch.Generator, ints: int, is_positive: bool, tensor: Tensor, scale: float) -> Tensor:
    """Fill a tensor: floating ones with normal values, others with one number."""
    num_there = tensor.untyped_storage().nbytes() // tensor.itemsize
    if tensor.numel() > num_there:  # an expanded one, some of whose elements are one
        _fill(generator, ints, is_positive, tensor.as_strided((num_there,), (1,), 0), scale)
        return tensor
    if tensor.is_floating_point() or tensor.is_complex():
        values = torch.randn(tensor.shape, generator=generator) * scale
        tensor.copy_(values.abs() + 0.1 if is_positive else values)
    else:
        tensor.fill_(ints)
    return tensor


def _other(tensor: Tensor) -> Tensor:
    """The values of a tensor in another order; floating ones also negated, others that are all equal made different."""
    flat = tensor.detach().flatten()
    if not flat.numel():
        return tensor.clone()
    flat = flat[torch.randperm(flat.numel(), device=flat.device)]
    if tensor.is_floating_point() or tensor.is_complex():
        flat = -flat
    elif bool((flat == flat[0]).all()):
        flat = torch.randint(0, 2, flat.shape, device=flat.device).to(flat.dtype)
    return torch.empty_like(tensor).copy_(flat.view(tensor.shape))


def _copy(tensor: Tensor) -> Tensor:
    return Geometry.dense(tensor).empty().copy_(tensor.detach())


def _blank(tensor: Tensor) -> None:
    has_nan = tensor.is_floating_point() or tensor.is_complex()
    with torch.no_grad():
        tensor.fill_(float("nan") if has_nan else 0)


def same_bytes(a: Tensor, b: Tensor) -> bool:
    """True for tensors of equal geometry and bits."""
    if (a.shape, a.dtype) != (b.shape, b.dtype):
        return False
    flat = [each.detach().resolve_conj().resolve_neg().contiguous().view(-1) for each in (a, b)]
    return a.numel() == 0 or torch.equal(*(each.view(torch.uint8) for each in flat))


# -- what a probe leaves behind: nothing -----------------------------------------------------------------------------


@contextlib.contextmanager
def _seeded() -> Generator[None]:
    """Draw the same numbers in each such block, and restore the generators."""
    with torch.random.fork_rng(), same_draws_of_python():
        torch.manual_seed(_SEED)
        random.seed(_SEED)
        np.random.seed(_SEED & 0xFFFF)
        yield


@contextlib.contextmanager
def _undone(model: nn.Module, part: nn.Module) -> Generator[tuple[Before, Reads]]:
    """Take back what the block does to the Python state of the model, and to a part's tensors and generators."""
    snapshot, before = _Snapshot(), Before(model)
    for module in part.modules():
        snapshot.add(module)

    def on_object(value: Any) -> None:
        before.add(value)
        snapshot.add(value)

    reads = Reads(model, on_object, before.add_place, before.alive)
    try:
        with before.restored():
            yield before, reads
    finally:
        snapshot.restore()


class _Snapshot:
    """What generators, tensors and arrays held that objects have in attributes, and in containers."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []
        self._known: set[int] = set()

    def add(self, owner: Any) -> None:
        """Remember those of an object or a container."""
        held = vars(owner) if hasattr(owner, "__dict__") else owner
        if isinstance(owner, nn.Module):
            held = {key: value for key, value in vars(owner).items() if key not in torch_internals.MODULE_ATTRIBUTES}
        for value in tree_leaves(held):
            if id(value) not in self._known and (undo := _undo(value)) is not None:
                self._known.add(id(value))
                self._undo.append(undo)

    def restore(self) -> None:
        """Let them hold it again."""
        for undo in self._undo:
            undo()


def _undo(value: Any) -> Callable[[], object] | None:
    """What gives an object its present state again; None for one that has none."""
    if isinstance(value, np.ndarray):
        return partial(np.copyto, value, value.copy())
    if isinstance(value, Tensor) and not isinstance(value, nn.Parameter) and not value.is_meta:
        return partial(_put_back, value, value.detach().clone())
    return restoring(value)


def _put_back(tensor: Tensor, values: Tensor) -> None:
    if not same_bytes(tensor, values):
        with torch.no_grad():
            tensor.copy_(values)


class _Flops(torch_internals.DispatchMode):
    """Counts floating-point operations of operators that have a formula, and refuses collectives before they run."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", *torch_internals.COLLECTIVE_NAMESPACES):
            raise NotAnIslandError(
                f"it communicates ({func}), which would happen in trials too, and not in the order that ranks agree on"
            )
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func.overloadpacket)
        if formula is not None:
            self.total += int(formula(*args, **(kwargs or {}), out_val=out))
        return out


class _OnlyOwn(TorchFunctionMode):
    """Refuses to read parameters and buffers that are not the island's own: from a list, a closure, another module."""

    def __init__(self, model: nn.Module, site: Site) -> None:
        super().__init__()
        self._own = {id(each) for each in site.stand_ins}
        self._model = model
        self._others = {id(each) for each in model.buffers()}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            is_param = isinstance(value, nn.Parameter) and id(value) not in self._own and self._has_gradient(value)
            if is_param or id(value) in self._others:
                raise NotAnIslandError(
                    f"it reads a {'parameter' if is_param else 'buffer'} {list(value.shape)} past its own modules, "
                    "from a list, a closure or another module"
                )
        return func(*args, **(kwargs or {}))

    def _has_gradient(self, param: nn.Parameter) -> bool:
        """False for a frozen one that the model neither has nor gets, as of a loss that is made in forward."""
        return param.requires_grad or any(param is each for each in self._model.parameters())
