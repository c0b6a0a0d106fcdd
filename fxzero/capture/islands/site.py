"""One call of an island: its forward on real tensors, and its backward through the graph that autograd made of it."""

import contextlib
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fxzero import torch_internals
from fxzero.capture.islands.geometry import Geometry
from fxzero.capture.islands.saved import Saved, Spans
from fxzero.capture.outputs import OutputSpec, flatten_output
from fxzero.errors import IslandError
from fxzero.graph.layout import ParamSpec
from fxzero.torch_internals import TreeSpec, tree_flatten, tree_unflatten

Slots = tuple[tuple[dict[str, Any], str, int], ...]
"""Where modules hold tensors: a table, the key in it, and the index of the tensor; a tied one is held twice."""


@dataclass(frozen=True)
class Facts:
    """What a probe learnt of a call."""

    output: OutputSpec
    outs: tuple[Geometry, ...]
    """Of the results of forward: tensors of the output that are no inputs, written inputs, written buffers."""
    is_input: Mapping[int, int]
    """Which tensors of the output are inputs, as indices of both."""
    shares_memory: Mapping[int, int]
    """Which others share memory with an input, a parameter or a buffer, as indices of the output and of all these."""
    written_inputs: tuple[int, ...]
    written_buffers: tuple[int, ...]
    written_in_backward: tuple[int, ...]
    """Buffers that backward writes, where a checkpoint runs forward again."""
    saved_inputs: tuple[int, ...]
    """Inputs that backward reads."""
    escapes: bool
    """Backward reads a weight or an input where no hook sees it, so that forward works on copies of its own."""
    held_bytes: int
    """Bytes between forward and backward, beside the inputs."""
    flops: tuple[int, int]
    """Floating-point operations of forward and of backward, on the data of the probe."""


@dataclass(frozen=True)
class Modes:
    """The modes of torch in which a call runs."""

    grad: bool
    autocast: bool
    autocast_dtype: torch.dtype
    caches_casts: bool


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
        self._stand_ins: list[nn.Parameter] = []
        self.facts = UNKNOWN
        self._edges: list[Any] = []
        self._lent: list[Tensor | None] = [None] * len(params)

    @property
    def stand_ins(self) -> list[nn.Parameter]:
        """What the modules hold in the place of parameters while the island runs; made at the first use."""
        if not self._stand_ins:
            needs_grad = self.requires_grad[self.num_inputs :]
            self._stand_ins = [
                nn.Parameter(torch.empty(0, dtype=spec.dtype, device=self.device), requires_grad=needs)
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
            handle.draws = _random_state(self.device)
        with contextlib.nullcontext() if again is None else _drawing_from(again, self.device):
            run = self.run(inputs, params, buffers)
        handle.run = run
        results, run.results = run.results, []
        return [handle, *self._checked(results, self.facts.outs, run.spans, "result")]

    def run(
        self, inputs: Sequence[Tensor], params: Sequence[Tensor], buffers: Sequence[Tensor], *, copies: bool = False
    ) -> "Run":
        """Run the call, and keep what its backward needs.

        Args:
            copies: let it have a copy of each input, which it may write.
        """
        facts = self.facts
        if facts.escapes:
            inputs, params = [each.clone() for each in inputs], [each.clone() for each in params]
        written = set(range(len(inputs))) if copies else set(facts.written_inputs)
        own = list(buffers)
        for index in range(len(own)) if copies else facts.written_buffers:
            own[index] = own[index].clone()
        self._lend(params)
        saved = Saved(range(len(inputs)) if facts.escapes else facts.saved_inputs, inputs, params)
        wants = self.has_backward
        saved.now = [*inputs, *params]  # for a backward inside of forward
        leaves = [
            each.detach().requires_grad_(needs) if wants else each
            for each, needs in zip(inputs, self.requires_grad, strict=False)
        ]
        hooks = (
            torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack) if wants else contextlib.nullcontext()
        )
        with torch.set_grad_enabled(wants), hooks, self._autocast(), torch_internals.checkpoints_without_backward():
            given = [each.clone() if index in written else each for index, each in enumerate(leaves)]
            output = self._call(given, own)
        edges = self._wanted(leaves) if wants else []
        if not facts.escapes:
            saved.now = ()
        return Run(output, given, own, leaves, edges, saved, Spans([*inputs, *params, *buffers]), self)

    def _call(self, inputs: Sequence[Tensor], buffers: list[Tensor]) -> Any:
        leaves = list(self.leaves)
        for at, tensor in zip(self._at, inputs, strict=True):
            leaves[at] = tensor
        args, kwargs = tree_unflatten(leaves, self.structure)
        with self._swapped(buffers):
            output = (self._forward or self.module.forward)(*args, **kwargs)
            self._note_rebound(buffers)
        return output

    def _note_rebound(self, buffers: list[Tensor]) -> None:
        """Take the buffers that the modules hold now."""
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
        for index, values in enumerate(params):
            if self._lent[index] is not values:
                stand_in = self.stand_ins[index]
                if stand_in.shape != values.shape:
                    self._edges = []
                stand_in.data = self._lent[index] = values

    def _wanted(self, leaves: Sequence[Tensor]) -> list[Any]:
        """What autograd computes gradients for: the leaves, and the stand-ins as they are now."""
        if not self._edges:
            of = torch.autograd.graph.get_gradient_edge
            self._edges = [of(each) for each in self.stand_ins if each.requires_grad]
        return [*(leaf for leaf in leaves if leaf.requires_grad), *self._edges]

    @contextlib.contextmanager
    def _swapped(self, buffers: Sequence[Tensor]) -> Generator[None]:
        before: list[tuple[dict[str, Any], str, Any]] = []
        try:
            for slots, values in ((self._param_slots, self.stand_ins), (self._buffer_slots, buffers)):
                for table, key, index in slots:
                    before.append((table, key, table[key]))
                    table[key] = values[index]
            yield
        finally:
            for table, key, value in before:
                table[key] = value

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if not self.modes.autocast:
            return contextlib.nullcontext()
        dtype, caches = self.modes.autocast_dtype, self.modes.caches_casts
        return torch.autocast(self.device.type, dtype=dtype, cache_enabled=caches)

    def forget(self) -> None:
        """Hold no values of parameters."""
        self._stand_ins, self._edges, self._lent = [], [], [None] * len(self.params)

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
        if not self.facts.escapes:
            self._lend(params)
            run.saved.now = [*inputs, *params]
        own = list(buffers)
        for index in self.facts.written_in_backward:
            own[index] = own[index].clone()
        found = run.gradients(grads, own, sums)
        spans = Spans([*grads, *inputs, *params, *sums])
        for index, gradient in enumerate(found):
            if gradient is None and index not in self.uncertain:
                found[index] = self.grads[index].empty().zero_()
        results = self._checked(found, self.grads, spans, "gradient")
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
        off = torch.autocast(self.device.type, enabled=False)
        with self._swapped(buffers), off:
            outputs, gradients = zip(*pairs, strict=True)
            found: list[Tensor | None] = [*torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)]
            self._note_rebound(buffers)
            return found

    def _checked(
        self, tensors: Sequence[Tensor | None], declared: Sequence[Geometry], spans: Spans, what: str
    ) -> list[Tensor | None]:
        """The tensors as they were declared, each in memory of its own."""
        checked: list[Tensor | None] = []
        seen: set[int] = set()
        may_vary = not self.fqn and what == "result"  # nothing but the user reads it
        for index, (tensor, geometry) in enumerate(zip(tensors, declared, strict=True)):
            if tensor is not None:
                if may_vary:
                    geometry = Geometry.dense(tensor)
                if not geometry.fits(tensor) or tensor.layout is not torch.strided:
                    raise IslandError(
                        f"{self}: {what} {index} is {tensor.dtype}{list(tensor.shape)}; when the step was traced it "
                        f"was {geometry}. Shapes that follow values must stay inside of an island: name a module "
                        "around it in compile(islands=[...])."
                    )
                tensor = tensor.detach()
                address = tensor.untyped_storage().data_ptr()
                is_shared = tensor.numel() > 0 and (address in seen or spans.find(tensor) is not None)
                if is_shared or tensor.stride() != geometry.stride or tensor.is_conj() or tensor.is_neg():
                    tensor = geometry.empty().copy_(tensor)
                    address = tensor.untyped_storage().data_ptr()
                seen.add(address)
            checked.append(tensor)
        return checked

    def casts(self, index: int) -> bool:
        """True if autocast may cast a parameter here, if trained, and keep what it casts to for other readers."""
        spec, is_trained = self.params[index], self.requires_grad[self.num_inputs + index]
        return self.modes.autocast and self.modes.caches_casts and is_trained and spec.dtype == torch.float32

    def declared_grads(self, tensors: Sequence[Tensor]) -> tuple[Geometry, ...]:
        """The geometry of gradients.

        Args:
            tensors: inputs and parameters.
        """
        return tuple(Geometry.dense(each) for each in tensors if each.requires_grad)

    def __repr__(self) -> str:
        return f"<island {self.fqn}>"

    def __str__(self) -> str:
        return f"island {self.fqn}" if self.fqn else "the model, which is one island"


class Run:
    """One forward of a site, until its backward has run."""

    def __init__(
        self,
        output: Any,
        given: Sequence[Tensor],
        buffers: list[Tensor],
        leaves: Sequence[Tensor],
        wanted: list[Any],
        saved: Saved,
        spans: Spans,
        site: Site,
    ) -> None:
        self.saved, self.spans = saved, spans
        self._site, self.wanted = site, wanted
        facts, self.tensors, self.output = site.facts, *flatten_output(output)
        """The tensors of the output, and its structure."""
        self.given, self.buffers = given, buffers
        if facts is not UNKNOWN:
            self._check_output(given)
        news = [given[index] for index in facts.written_inputs]
        outs = [each for index, each in enumerate(self.tensors) if index not in facts.is_input]
        self.differentiable: list[Tensor] = [*outs, *news]
        self.results: list[Tensor | None] = [*outs, *news, *(buffers[index] for index in facts.written_buffers)]
        if facts is not UNKNOWN:
            self.given, self.buffers, self.tensors = [], [], []
            for out, geometry in zip(self.differentiable, facts.outs, strict=False):
                if out.requires_grad and not geometry.requires_grad:
                    raise IslandError(f"{site}: a result requires grad, which it did not when the step was traced.")

    def _check_output(self, given: Sequence[Tensor]) -> None:
        facts = self._site.facts
        if self.output != facts.output:
            raise IslandError(
                f"{self._site} returns {_plain(self.output)}; when the step was traced it returned "
                f"{_plain(facts.output)}. Plain values that change must stay inside of an island: return a tensor, or "
                "name a module around it in compile(islands=[...])."
            )
        for out, index in facts.is_input.items():
            if not same_memory(self.tensors[out], given[index]):
                raise IslandError(f"{self._site} returned its input as it is when the step was traced, and now not.")

    def gradients(
        self, grads: Sequence[Tensor | None], buffers: list[Tensor], sums: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """The gradients of what the site wants them for; the graph is freed."""
        outs, wanted = self.differentiable, self.wanted
        self.differentiable, self.wanted = [], []
        pairs = [(leaf, older) for leaf, older in zip(wanted, sums, strict=True) if older is not None]
        pairs += [(o, g) for o, g in zip(outs, grads, strict=False) if g is not None and o.requires_grad]
        return self._site.differentiate(pairs, wanted, buffers)


UNKNOWN = Facts(OutputSpec(tree_flatten(None)[1], ()), (), {}, {}, (), (), (), (), False, 0, (0, 0))
"""Facts of a call before its probe."""


def same_memory(a: Tensor, b: Tensor) -> bool:
    """True for two tensors that are equal whatever is written into either."""
    geometry = [(each.data_ptr(), each.shape, each.stride(), each.dtype) for each in (a, b)]
    return a is b or (geometry[0] == geometry[1] and a.numel() > 0)


def _plain(output: OutputSpec) -> str:
    leaves = ["a tensor" if leaf is Tensor else repr(leaf) for leaf in output.leaves]
    return f"{', '.join(leaves)} in {output.treespec}"


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    other = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)
    return torch.get_rng_state(), other


@contextlib.contextmanager
def _drawing_from(handle: Any, device: torch.device) -> Generator[None]:
    """Draw inside the block what the call of a handle drew."""
    indices = [] if device.type == "cpu" else [device.index or 0]
    with torch.random.fork_rng(indices, device_type=device.type if indices else "cuda"):
        state, other = handle.draws
        torch.set_rng_state(state)
        if other is not None:
            torch.get_device_module(device).set_rng_state(other, device)
        yield
