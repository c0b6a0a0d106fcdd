"""One call of an island: its forward on real tensors, and its backward through the graph that autograd made of it."""

import contextlib
import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.call import flatten_any
from fxzero.capture.draws import drawing_from, rng_state
from fxzero.capture.islands.facts import UNKNOWN, Modes
from fxzero.capture.islands.geometry import Geometry
from fxzero.capture.islands.run import Run
from fxzero.capture.islands.saved import NotingSaved, Saved, Spans
from fxzero.errors import IslandError
from fxzero.graph.layout import ParamSpec
from fxzero.torch_internals import TreeSpec, tree_unflatten

Slots = tuple[tuple[dict[str, Any], str, int], ...]
"""Where modules hold tensors: a table, the key in it, and the index of the tensor; a tied one is held twice."""


class Site:
    """One call of an island in a traced forward.

    The modules of an island hold stand-ins for the parameters while it runs, which take the values that are gathered.

    Args:
        fqn: the path of the module.
        forward: what to call; None: the forward that the module has then.
        structure: of the arguments.
        leaves: the arguments, flat; None in the place of a tensor.
        at: which of them are tensors.
        params: the parameters by index.
        requires_grad: which of the inputs and parameters do.
        slots: of parameters, and of buffers.
    """

    def __init__(
        self,
        fqn: str,
        module: nn.Module,
        forward: Callable[..., Any] | None,
        structure: TreeSpec,
        leaves: Sequence[Any],
        at: Sequence[int],
        params: Sequence[ParamSpec],
        requires_grad: Sequence[bool],
        slots: tuple[Slots, Slots],
        modes: Modes,
        device: torch.device,
    ) -> None:
        self.fqn, self.module, self._forward = fqn, module, forward
        self.structure, self.leaves, self._at = structure, tuple(leaves), tuple(at)
        self.num_inputs, self.params = len(at), tuple(params)
        self.requires_grad = tuple(requires_grad)
        """Which of the inputs and parameters require grad."""
        self._param_slots, self._buffer_slots = slots
        self.modes, self.device = modes, device
        self.has_backward = modes.grad and any(self.requires_grad)
        self.grads: tuple[Geometry, ...] = ()
        """Of the gradients that backward gives: for each input and parameter that requires grad."""
        self.draws_again = False
        """A checkpoint runs it again in backward, with the draws of forward."""
        self.uncertain: frozenset[int] = frozenset()
        """Indices of gradients that may be None, because nothing but the gradient of a parameter is made of them."""
        self.keeps_memory = False
        """Parameters lie where they are until backward, and inputs are in no memory that is used again: what autograd
        saves can stay as it is."""
        self._stand_ins: list[nn.Parameter] = []
        self.facts = UNKNOWN
        self._edges: list[Any] = []
        self._changes = 0
        """How often the stand-ins have been written in place."""
        self._lent: Sequence[Tensor] = ()
        """The values of parameters that the stand-ins have."""
        self._lent_at: tuple[int, ...] = ()
        """Their addresses."""
        self._places: dict[tuple[int, ...], tuple[Spans, set[int]]] = {}
        """Where values of parameters lie, and the addresses of their storages, by the addresses of all."""

    @property
    def num_input_grads(self) -> int:
        """The number of inputs that require grad, whose gradients come first."""
        return sum(self.requires_grad[: self.num_inputs])

    @property
    def stand_ins(self) -> list[nn.Parameter]:
        """What the modules hold in the place of parameters while the island runs; made at the first use."""
        if not self._stand_ins:
            needs_grad = self.requires_grad[self.num_inputs :]
            with torch.inference_mode(False):
                self._stand_ins = [
                    nn.Parameter(torch.empty(0, dtype=spec.dtypes.compute, device=self.device), requires_grad=needs)
                    for spec, needs in zip(self.params, needs_grad, strict=True)
                ]
        return self._stand_ins

    # -- forward -------------------------------------------------------------------------------------------------

    def forward(self, again: Tensor | None, inputs: list[Tensor], params: list[Tensor], buffers: list[Tensor]) -> Any:
        """Run the call.

        Args:
            again: the handle of the call that this one repeats, for a checkpoint.

        Returns:
            The handle, which `backward` takes, and the results that `Facts.outs` describes.

        Raises:
            IslandError: the results are not what they were at the trace.
        """
        handle: Any = torch.empty(0, dtype=torch.uint8)
        if self.draws_again:
            handle.draws = rng_state(self.device)
        with contextlib.nullcontext() if again is None else drawing_from(cast(Any, again).draws, self.device):
            run = self.run(inputs, params, buffers)
        handle.run = run
        owned = _storages([*inputs, *buffers]) | self._place(params)[1]
        results, run.results = run.results, []
        return [handle, *self._checked(results, self.facts.outs, owned, "result")]

    def run(self, inputs: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor]) -> Run:
        """Run the call, and keep what its backward needs. Of what it writes it gets copies."""
        facts, wants = self.facts, self.has_backward
        is_probe = facts is UNKNOWN
        saves_itself = self.keeps_memory and not is_probe and not torch_internals.has_hooks_on_saved_tensors()
        if facts.escapes and not saves_itself:
            inputs, params = [each.clone() for each in inputs], [each.clone() for each in params]
        written = range(len(inputs)) if is_probe else facts.written_inputs
        own = list(buffers)
        for index in range(len(own)) if is_probe else facts.written_buffers:
            own[index] = own[index].clone()
        self._lend(params)
        if not wants:
            with torch.no_grad():
                given = [each.clone() if index in written else each for index, each in enumerate(inputs)]
                if any(self.requires_grad[: len(given)]):
                    given = [g.detach().requires_grad_(r) for g, r in zip(given, self.requires_grad, strict=False)]
            with torch.set_grad_enabled(self.modes.grad), self._autocast():
                output = self._call(given, own)
            self._check_params(params)
            return Run(str(self), facts, output, given, own)
        leaves = [
            each.detach().requires_grad_() if needs else each.detach()
            for each, needs in zip(inputs, self.requires_grad, strict=False)
        ]
        with torch.enable_grad():
            given = [each.clone() if index in written else each for index, each in enumerate(leaves)]
        saved = None if saves_itself else self._saved(params, given if is_probe else inputs)
        hooks = contextlib.nullcontext()
        if saved is not None:
            hooks = torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack)
        with torch.enable_grad(), hooks, self._autocast(), torch_internals.checkpoints_without_backward():
            output = self._call(given, own)
        self._check_params(params)
        if saved is not None and not facts.escapes:
            saved.now = ()
        return Run(str(self), facts, output, given, own, saved, self._wanted(leaves))

    def _saved(self, params: Sequence[Tensor], inputs: Sequence[Tensor]) -> Saved:
        """What takes the tensors that autograd saves."""
        is_probe, escapes = self.facts is UNKNOWN, self.facts.escapes
        now = [*params, *((each.detach() for each in inputs) if is_probe else inputs)]
        kept = range(len(now)) if escapes else self._kept
        return (NotingSaved if is_probe else Saved)(now, Spans(now[len(params) :], self._place(params)[0]), kept)

    def _call(self, inputs: Sequence[Tensor], buffers: list[Tensor]) -> Any:
        leaves = list(self.leaves)
        for at, tensor in zip(self._at, inputs, strict=True):
            leaves[at] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        given = leaves if self.structure.num_nodes > self.structure.num_leaves + 3 else []
        own = self._swap(buffers)
        try:
            output = (self._forward or self.module.forward)(*args, **kwargs)
            self._note_rebound(buffers)
        finally:
            _put(own)
        for path, key in self.facts.keeps:
            self._guard(vars(self.module.get_submodule(path)), key)
        if given:  # lists and dicts among the arguments
            self._check_arguments(given, args, kwargs)
        return output

    def _guard(self, attributes: dict[str, Any], key: str) -> None:
        """Let an attribute hold its values, and refuse a backward through them, which would end here."""
        value = attributes.get(key)
        owner: Any = value if isinstance(value, (list, dict)) else attributes
        entries: list[tuple[Any, Any]] = [(key, value)]
        if isinstance(value, list):
            entries = [*enumerate(value)]
        elif isinstance(value, dict):
            entries = [*value.items()]
        for at, tensor in entries:
            if isinstance(tensor, Tensor) and not tensor.is_leaf:
                owner[at] = guarded = tensor.detach().requires_grad_()
                guarded.register_hook(functools.partial(_refuse_backward, f"{self}: attribute {key}"))

    def _check_arguments(self, given: Sequence[Any], args: Any, kwargs: Any) -> None:
        """Raise IslandError if the call has changed a list or a dict that it was given, which is a copy."""
        now, structure = flatten_any(args, kwargs)
        if structure != self.structure or not all(a is b for a, b in zip(given, now, strict=True)):
            raise IslandError(
                f"{self} changes a list, a dict or an object that it is given. Let it return what is new."
            )

    def _note_rebound(self, buffers: list[Tensor]) -> None:
        """Take the buffers that the modules hold now; raise IslandError if they hold other parameters."""
        stand_ins = self.stand_ins
        for table, key, index in self._param_slots:
            if key not in table or table[key] is not stand_ins[index]:
                raise IslandError(
                    f"{self} binds parameter {key} to another tensor. Parameters are sharded, so only the optimizer "
                    "may change them. Compute the new value from it and use that, or make it a buffer."
                )
        for table, key, index in self._buffer_slots:
            now = table[key] if key in table else None  # noqa: SIM401 (a scripted module's table has no `get`)
            before = buffers[index]
            if now is before:
                continue
            if not isinstance(now, Tensor) or (now.shape, now.dtype) != (before.shape, before.dtype):
                raise IslandError(
                    f"{self} turns buffer {key} into another shape or dtype. A buffer keeps them; write into it."
                )
            buffers[index] = now.detach()

    def _lend(self, params: Sequence[Tensor]) -> None:
        """Let the stand-ins have these values."""
        addresses = _addresses(params)
        if addresses != self._lent_at or not self._stand_ins:
            for stand_in, values in zip(self.stand_ins, params, strict=True):
                if stand_in.shape != values.shape:
                    self._edges = []
                stand_in.data = values
        self._lent, self._lent_at = params, addresses

    def _check_params(self, params: Sequence[Tensor]) -> None:
        """Raise IslandError if the call has given a parameter other data."""
        if _addresses(self.stand_ins) != self._lent_at:
            pairs = zip(self.stand_ins, params, strict=True)
            changed = next(values for stand_in, values in pairs if stand_in.data_ptr() != values.data_ptr())
            self.forget()
            raise IslandError(f"{self} sets the data of a parameter, {list(changed.shape)}, which only optimizers may.")
        changes = torch_internals.num_changes(self.stand_ins)
        if changes != self._changes:
            self._changes = changes
            raise IslandError(f"{self} writes into a parameter. Parameters are sharded, so only optimizers may.")

    def _place(self, params: Sequence[Tensor]) -> tuple[Spans, set[int]]:
        """Where parameters lie, and the addresses of their storages; gathered ones lie at few places."""
        if self.facts is UNKNOWN or self.facts.escapes or not params:
            return Spans(params), _storages(params)
        at = _addresses(params)
        if at not in self._places:
            self._places[at] = Spans(params), _storages(params)
        return self._places[at]

    def _wanted(self, leaves: Sequence[Tensor]) -> list[Any]:
        """What autograd computes gradients for: the leaves, and the stand-ins as they are now."""
        if not self._edges:
            of = torch.autograd.graph.get_gradient_edge
            self._edges = [of(each) for each in self.stand_ins if each.requires_grad]
        return [*(leaf for leaf in leaves if leaf.requires_grad), *self._edges]

    def _swap(self, buffers: Sequence[Tensor]) -> list[tuple[dict[str, Any], str, Any]]:
        """Let the modules hold the stand-ins and these buffers; what they held before."""
        before: list[tuple[dict[str, Any], str, Any]] = []
        for slots, values in ((self._param_slots, self.stand_ins), (self._buffer_slots, buffers)):
            for table, key, index in slots:
                before.append((table, key, table[key]))
                table[key] = values[index]
        return before

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if not self.modes.autocast:
            return contextlib.nullcontext()
        dtype, caches = self.modes.autocast_dtype, self.modes.caches_casts
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=caches)

    def forget(self) -> None:
        """Hold no values of parameters."""
        self._stand_ins, self._edges, self._lent, self._lent_at, self._changes = [], [], (), (), 0

    # -- backward ------------------------------------------------------------------------------------------------

    def backward(
        self,
        handle: Any,
        grads: Sequence[Tensor | None],
        inputs: Sequence[Tensor | None],
        params: Sequence[Tensor],
        buffers: Sequence[Tensor],
        sums: Sequence[Tensor | None],
    ) -> list[Tensor | None]:
        """The gradients of the inputs and parameters that require grad, and new values of the buffers that it writes.

        A gradient is None for a parameter that nothing reached.

        Args:
            grads: of the results of forward.
            inputs: those that backward reads, None for others.
            params: as they are gathered for backward.
            sums: for each gradient that is computed, the sum that it is added to; None: to none.
        """
        run: Run = handle.run
        handle.run = None
        if run.saved is None or not self.facts.escapes:
            self._lend(params)
        if run.saved is not None and not self.facts.escapes:
            run.saved.now = [*params, *inputs]
        own = list(buffers)
        for index in self.facts.written_in_backward:
            own[index] = own[index].clone()
        outs, wanted = run.take()
        pairs = [(leaf, older) for leaf, older in zip(wanted, sums, strict=True) if older is not None]
        pairs += [(o, g) for o, g in zip(outs, grads, strict=False) if g is not None and o.requires_grad]
        found = self.differentiate(pairs, wanted, own)
        owned = _storages([*grads, *inputs, *sums]) | self._place(params)[1]
        for index, gradient in enumerate(found):
            if gradient is None and index not in self.uncertain:
                found[index] = self.grads[index].empty().zero_()
        results = self._checked(found, self.grads, owned, "gradient")
        results += [own[index] for index in self.facts.written_in_backward]
        return results

    def differentiate(
        self, pairs: Sequence[tuple[Any, Tensor]], wanted: Sequence[Any], buffers: list[Tensor]
    ) -> list[Tensor | None]:
        """The gradients of `wanted`, given outputs and their gradients.

        Args:
            buffers: as the modules have them; those that they bind anew are replaced.
        """
        if not pairs:
            return [None] * len(wanted)
        is_on = torch.is_autocast_enabled(self.device.type)
        outputs, gradients = zip(*pairs, strict=True)
        own = self._swap(buffers)
        try:
            with torch.autocast(self.device.type, enabled=False) if is_on else contextlib.nullcontext():
                found = torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
            self._note_rebound(buffers)
        finally:
            _put(own)
        return list(found)

    def _checked(
        self, tensors: Sequence[Tensor | None], declared: Sequence[Geometry], owned: set[int], what: str
    ) -> list[Tensor | None]:
        """The tensors as they were declared, each in memory of its own.

        Args:
            owned: addresses of storages that belong to others.
        """
        checked: list[Tensor | None] = []
        may_vary = not self.fqn and what == "result"  # nothing but the user reads it
        for index, (tensor, geometry) in enumerate(zip(tensors, declared, strict=True)):
            if tensor is not None:
                if may_vary:
                    geometry = Geometry.dense(tensor)
                if tensor.layout is not torch.strided or not geometry.fits(tensor):
                    raise IslandError(
                        f"{self}: {what} {index} is {tensor.dtype}{list(tensor.shape)}; when the step was traced it "
                        f"was {geometry}. Shapes that follow values must stay inside of an island: name a module "
                        "around it in compile(islands=[...])."
                    )
                tensor = tensor.detach() if tensor.requires_grad else tensor
                address = tensor.untyped_storage().data_ptr()
                if address in owned or tensor.stride() != geometry.stride or tensor.is_conj() or tensor.is_neg():
                    tensor = geometry.empty().copy_(tensor)
                    address = tensor.untyped_storage().data_ptr()
                if address and what == "gradient":  # results may share memory, as nothing writes into them
                    owned.add(address)
            checked.append(tensor)
        return checked

    @functools.cached_property
    def _kept(self) -> frozenset[int]:
        """Indices of what is there in backward, among parameters and inputs."""
        begin = len(self.params)
        return frozenset([*range(begin), *(begin + index for index in self.facts.saved_inputs)])

    def casts(self, index: int) -> bool:
        """True if autocast may cast a parameter here, if trained, and keep what it casts to for other readers."""
        spec, is_trained = self.params[index], self.requires_grad[self.num_inputs + index]
        return self.modes.autocast and self.modes.caches_casts and is_trained and spec.dtypes.compute == torch.float32

    def declared_grads(self, tensors: Sequence[Tensor]) -> tuple[Geometry, ...]:
        """The geometry of gradients. Those of inputs have the strides that autograd gives them: sums may follow.

        Args:
            tensors: inputs and parameters.
        """
        found = [Geometry.dense(each) for each in tensors if each.requires_grad]
        for index, stride in enumerate(self.facts.grad_strides):
            if stride is not None:
                found[index] = replace(found[index], stride=stride)
        return tuple(found)

    def declare_sum(self, index: int, result: Tensor) -> None:
        """Let a gradient that is added to an older one have the geometry of their sum."""
        grads = list(self.grads)
        grads[index] = replace(Geometry.dense(result), requires_grad=grads[index].requires_grad)
        self.grads = tuple(grads)

    def __repr__(self) -> str:
        return f"<island {self.fqn}>"

    def __str__(self) -> str:
        return f"island {self.fqn}" if self.fqn else "the model, which is one island"


def _refuse_backward(what: str, grad: Tensor) -> None:
    raise IslandError(f"{what} was read outside of it, and its gradient is asked for. Let forward return it.")


def _put(entries: Sequence[tuple[dict[str, Any], str, Any]]) -> None:
    for table, key, value in entries:
        table[key] = value


def _addresses(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    return tuple([tensor.data_ptr() for tensor in tensors])


def _storages(tensors: Sequence[Tensor | None]) -> set[int]:
    """Addresses of the storages of tensors that are not empty."""
    addresses = {each.untyped_storage().data_ptr() for each in tensors if each is not None}
    addresses.discard(0)
    return addresses
