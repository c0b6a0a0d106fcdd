"""Learn what a call of an island gives: it is run on real tensors, forward and backward, before the step is traced.

The weights are made up, since no rank has all of them; so are inputs that the model computes. They say nothing of the
values that a step will have, but all of the geometry of the results, and of what backward reads:

    run twice from one state        are the gradients equal?
    run with other tensors between  weights and inputs are NaN where forward had them: NaN in the gradients means that
                                    backward reads one where no hook sees it
    run on other values             a shape that follows values cannot leave an island
"""

import contextlib
import random
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from fxzero import torch_internals
from fxzero.capture.draws import same_draws_of_python
from fxzero.capture.islands.facts import UNKNOWN, Facts
from fxzero.capture.islands.geometry import Geometry
from fxzero.capture.islands.run import Run, same_memory
from fxzero.capture.islands.saved import NotingSaved
from fxzero.capture.islands.site import Site
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
    """The values of those that are arguments of the model itself."""
    buffers: tuple[Tensor, ...]


@dataclass(frozen=True)
class _Values:
    inputs: list[Tensor]
    params: list[Tensor]
    buffers: list[Tensor]

    def copies(self) -> "_Values":
        return _Values(*([_copy(each) for each in group] for group in (self.inputs, self.params, self.buffers)))


def learn(model: nn.Module, site: Site, example: Example) -> tuple[Facts, frozenset[tuple[int, str]]]:
    """What a call gives, and the slots of the Python state that it writes.

    Raises:
        NotAnIslandError: the call cannot be one node of a step.
    """
    error: Exception | None = None
    for values in _made_up(site, example):
        with _undone(model, site), torch.inference_mode(False):
            try:
                facts = _learn(site, values)
            except NotAnIslandError:
                raise
            except Exception as failed:  # not values that the module takes
                error = error or failed
                continue
            finally:
                site.facts = UNKNOWN
                site.forget()
            return facts, _written_slots(model, site, values)
    assert error is not None
    raise NotAnIslandError(f"on made-up values of its shapes it raises {type(error).__name__}: {error}") from error


def _learn(site: Site, values: _Values) -> Facts:
    before = values.copies()
    with FlopCounterMode(display=False) as forward, _no_parameters_beside(site):
        run = _run(site, values)
    _check_params(values, before)
    facts = _facts_of(site, run, values, before)
    held = run.saved.held_bytes if isinstance(run.saved, NotingSaved) else 0
    with FlopCounterMode(display=False) as backward:
        late = before.copies()
        clean = _gradients(site, run, late)
    written = tuple(i for i, each in enumerate(late.buffers) if not same_bytes(each, before.buffers[i]))
    facts = replace(
        facts,
        written_in_backward=written,
        held_bytes=held,
        flops=(forward.get_total_flops(), backward.get_total_flops()),
    )
    if site.has_backward:
        facts = replace(facts, escapes=_escapes(site, facts, before, clean))
    return replace(facts, outs=_with_grad(site, facts, _run_on_other_values(site, facts, before)))


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
    is_input: dict[int, int] = {}
    for index, out in enumerate(run.tensors):
        if out.layout is not torch.strided or out.is_nested:
            raise NotAnIslandError(f"it returns a {out.layout} tensor")
        found = next((i for i, each in enumerate(given) if same_memory(out, each)), None)
        if found is not None:
            is_input[index] = found
    storages = [each.untyped_storage().data_ptr() for each in (*given, *values.params, *own)]
    shares_memory = {
        index: storages.index(address)
        for index, out in enumerate(run.tensors)
        if index not in is_input and out.numel() and (address := out.untyped_storage().data_ptr()) in storages
    }
    outs = [each for index, each in enumerate(run.tensors) if index not in is_input]
    outs += [given[index] for index in written_inputs] + [own[index] for index in written_buffers]
    begin = len(values.params)
    saved = run.saved.found if isinstance(run.saved, NotingSaved) else ()
    found = {index - begin for index in saved if index >= begin}
    kept = tuple(sorted(found - {*written_inputs}))
    geometry = tuple(map(Geometry.dense, outs))
    facts = (run.output, geometry, is_input, shares_memory, written_inputs, written_buffers, (), kept)
    return Facts(*facts, escapes=False, held_bytes=0, flops=(0, 0))


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
        outs = [each for index, each in enumerate(other.tensors) if index not in facts.is_input]
        outs += [other.given[index] for index in facts.written_inputs]
        found = [a or b.requires_grad for a, b in zip(found, outs, strict=False)] + found[len(outs) :]
    if site.has_backward and not any(found):
        num_outs = len(facts.outs) - len(facts.written_buffers)
        found = [out.dtype.is_floating_point and index < num_outs for index, out in enumerate(facts.outs)]
    return tuple(replace(out, requires_grad=needs) for out, needs in zip(facts.outs, found, strict=True))


def _run_on_other_values(site: Site, facts: Facts, before: _Values) -> Run | None:
    """A run on other values; None if the module does not take them.

    Raises:
        NotAnIslandError: it gives results of another shape, or other plain values.
    """
    with _seeded():
        other = _Values([_other(each) for each in before.inputs], before.params, before.copies().buffers)
    try:
        run = _run(site, other)
    except Exception:  # not values that the module takes
        return None
    now = [tuple(each.shape) for each in run.tensors]
    then = _shapes(facts, before.inputs)
    if now != then and site.fqn:
        changed = next(pair for pair in zip(then, now, strict=False) if pair[0] != pair[1])
        raise NotAnIslandError(f"the shape of a result follows values: {list(changed[0])}, then {list(changed[1])}")
    if run.output != facts.output:
        raise NotAnIslandError("it returns plain values that follow values of tensors")
    return run


def _shapes(facts: Facts, inputs: Sequence[Tensor]) -> list[tuple[int, ...]]:
    outs = iter(facts.outs)
    count = sum(leaf is Tensor for leaf in facts.output.leaves)
    return [
        tuple(inputs[facts.is_input[index]].shape) if index in facts.is_input else next(outs).shape
        for index in range(count)
    ]


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
            params = [fill(torch.empty(each.shape, dtype=each.dtype, device=site.device), 0.1) for each in site.params]
            buffers = [
                fill(torch.empty_like(each, device=site.device), 1.0) if each.is_meta else _copy(each)
                for each in example.buffers
            ]
        yield _Values(inputs, params, buffers)


def _fill(generator: torch.Generator, ints: int, is_positive: bool, tensor: Tensor, scale: float) -> Tensor:
    """Fill a tensor: floating ones with normal values, others with one number."""
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
def _undone(model: nn.Module, site: Site) -> Generator[None]:
    """Take back what the block does to the Python state of the model, and to generators that its modules hold."""
    generators = [
        (value, value.get_state())
        for module in site.module.modules()
        for value in vars(module).values()
        if isinstance(value, torch.Generator)
    ]
    try:
        with Before(model).restored():
            yield
    finally:
        for generator, state in generators:
            generator.set_state(state)


def _written_slots(model: nn.Module, site: Site, values: _Values) -> frozenset[tuple[int, str]]:
    """The attributes of modules that a call sets.

    Raises:
        NotAnIslandError: it keeps a tensor that requires grad in one.
    """
    before = {id(module): (module, dict(vars(module))) for module in model.modules()}
    written: set[tuple[int, str]] = set()
    with _undone(model, site):
        _run(site, values.copies())
        site.forget()
        for module, held in before.values():
            for key, now in vars(module).items():
                if now is held.get(key) or key in torch_internals.RNN_CACHES:
                    continue
                written.add((id(module), key))
                if any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in tree_leaves(now)):
                    raise NotAnIslandError(
                        f"it keeps a tensor that requires grad in attribute {key}, where no reader outside would get "
                        "its gradient"
                    )
    return frozenset(written)


@contextlib.contextmanager
def _no_parameters_beside(site: Site) -> Generator[None]:
    """Refuse to read parameters that are not the island's own: from a list, a closure, another module."""
    with _OnlyOwn(site):
        yield


class _OnlyOwn(TorchFunctionMode):
    def __init__(self, site: Site) -> None:
        super().__init__()
        self._own = {id(each) for each in site.stand_ins}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, nn.Parameter) and id(value) not in self._own:
                raise NotAnIslandError(
                    f"it reads a parameter {list(value.shape)} past its own modules, from a list, a closure or another "
                    "module"
                )
        return func(*args, **(kwargs or {}))
