"""Trace a module's forward and, in the same graph, its backward.

    placeholders: parameters, buffers, inputs, tangents | forward | end_forward | backward | output
    output: [model outputs, new values of rebound tensors, parameter gradients, input gradients]

Every tensor is fake and of full size. A trace uses no memory, draws nothing, and leaves the module unchanged.
"""

import contextlib
import sys
import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol, cast

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from fxzero import torch_internals
from fxzero.capture.call import CallSpec, name_of_ignored, own_objects, replace_numbers, replace_tensors
from fxzero.capture.code.users_code import is_followed_file
from fxzero.capture.draws import Draws, generators_of, no_draws_of_python, numbered_draws
from fxzero.capture.dtensors import (
    check_no_dtensors,
    fake_params,
    is_dtensor,
    local_gradient,
    placed_gradients,
    refuse_draw,
)
from fxzero.capture.fake_tensors import FakeState, swapped_tensors
from fxzero.capture.hooks.autograd_node import HookedNode
from fxzero.capture.hooks.observer import Observer
from fxzero.capture.hooks.observers import Observers, reads_values
from fxzero.capture.islands.marks import Marks
from fxzero.capture.kernels.batch_norm import run_declared, with_real_strides, writes_undeclared
from fxzero.capture.kernels.collectives import run_functional, writes_across_ranks
from fxzero.capture.kernels.strides import with_equal_strides
from fxzero.capture.numbers import PinnedNumberError, StandIns
from fxzero.capture.outputs import OutputSpec, flatten_output, loss_index
from fxzero.capture.provenance import Recorder, reached_by_gradients, runs_python
from fxzero.capture.reads import Reads
from fxzero.capture.repeats.arguments import Arguments
from fxzero.capture.repeats.known_results import KnownResults
from fxzero.capture.repeats.record import Record
from fxzero.capture.slots import Read, Slot, items_of
from fxzero.capture.state import tensors_read
from fxzero.capture.values.branches import Branch, KnownValues
from fxzero.capture.values.checks import noted_checks
from fxzero.capture.writes import Before, Moment, Output, Write, output_in
from fxzero.capture.written_params import SetData, check_frozen
from fxzero.errors import CaptureError, InputMismatchError
from fxzero.graph import ops
from fxzero.graph.layout import ParamSpec
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, add_placeholder
from fxzero.torch_internals import tree_flatten


@dataclass(frozen=True)
class Joint:
    """The outputs of a traced graph: first those of the model, then a group for each of three fields."""

    output: OutputSpec
    num_outputs: int
    differentiable: tuple[int, ...]
    differentiated: tuple[int, ...]
    rebound: tuple[str, ...]
    """Names of buffers that were bound anew, and of parameters and buffers whose data was set: their new values are
    outputs."""
    grads: tuple[str, ...]
    """Names of parameters whose gradients are outputs."""
    input_grads: tuple[int, ...]
    """Indices of inputs whose gradients are outputs."""
    writes: tuple[Write, ...]
    observers: tuple[Observer, ...]
    """To call after forward."""
    num_numbers: int
    """Numbers that are left behind, as the first outputs of the traced graph."""
    branches: tuple[Branch, ...]
    """Branches of forward on values that follow from inputs."""


class Watch(Protocol):
    """Sees the operators that a traced forward runs."""

    def begin(self, given: Sequence[Tensor], reads: Reads) -> None:
        """A forward begins, on these parameters, buffers and inputs."""

    def ran(self, operator: Any, arguments: Arguments, result: Any) -> None:
        """An operator has run."""

    def end(self, output: Sequence[Tensor], spec: OutputSpec) -> None:
        """The forward is over, and has returned these tensors."""


@dataclass
class Tracing:
    """One trace of a module: the arguments of `fxzero.capture.capture`, and the tensors of the call."""

    module: nn.Module
    forward: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    inputs: Sequence[Tensor]
    spec: CallSpec
    params: Mapping[str, ParamSpec]
    device: torch.device
    with_backward: bool
    differentiated: tuple[int, ...] | None
    stand_ins: StandIns | None = None
    """Symbolic numbers in the place of numbers of the Python state."""
    marks: Marks | None = None
    """The islands, whose forwards are replaced."""
    record: Record | None = None
    """What the forward runs, if it is to be known."""
    rehearses: bool = False
    """True if the forward only runs, for its record and for what it reads and leaves behind; nothing is traced."""
    is_method: bool = False
    """`forward` is another method, which runs without the hooks of the module."""
    watch: Watch | None = None
    """Sees the forward."""
    ignored: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    """Parameters by canonical name that are inputs, behind those of the call."""
    left_out: frozenset[str] = frozenset()
    """Names of parameters that forward does not read, which are no part of the trace: of blocks that are left out."""
    joint: Joint = field(init=False)
    """Outputs of the graph; set by `run`."""

    def __post_init__(self) -> None:
        self._fake_mode = torch_internals.fake_tensor_mode() if self.stand_ins is None else self.stand_ins.fake_mode
        self.before = Before(self.module)
        self.reads = Reads(self.module, self.before.add, self.before.add_place, self.before.alive)
        self.before.met = self.reads.met
        self.observers = Observers(self.reads, self.before, self.device.type)
        self._recorder: Recorder | None = None
        self._without_gradient: set[int] = set()
        """Ids of tensors of the Python state that require grad, and to which no gradient goes from the outputs."""
        self._of_islands: set[Slot] = set()
        """Slots of numbers that islands read, as they are."""
        if self.marks is not None:
            self.reads.replaced = self.marks.replaced

    def run(self) -> fx.GraphModule:
        """Trace forward and backward into one graph, which is empty after a rehearsal.

        Raises:
            CaptureError: the model keeps tensors where a compiled step would not update them.
            Exception: any error of the trace; `failures.explain` makes a CaptureError of it.
        """
        fake = self._fake_mode
        numbers = [] if self.stand_ins is None else self.stand_ins.numbers
        with fake:
            state = self._fake_state()
            inputs = [*fake_inputs(self.spec, self.inputs, self.device), *state.ignored.values()]
        traced = partial(self._traced, state, torch.is_autocast_cache_enabled())
        with (
            torch.inference_mode(False),
            own_autocast_cache(),
            self.before.restored(),
            no_draws_of_python(generators_of(self.module)),
            numbered_draws(),
            torch.autograd.set_multithreading_enabled(False),
            torch_internals.eager_checkpoints(),
            torch_internals.checkpoints_without_backward(),
            torch_internals.conversions_if_needed(),
            fake,
            _silent_about_history(self.module),
        ):
            if self.rehearses:
                traced([], [], inputs, [])
                return fx.GraphModule({}, fx.Graph())
            params = zip(state.params, state.inputs, strict=True)
            read = [tensor for name, tensor in params if name not in self.left_out]
            root = torch_internals.trace_fx(traced, read, [*state.buffers.values()], inputs, numbers)
        if self.left_out:
            self._add_left_out(root.graph)
        _make_tangents_placeholders(root.graph)
        return root

    @property
    def module_in_backward(self) -> str | None:
        """The path of the module whose backward was being traced; None in forward."""
        recorder = self._recorder
        return recorder.current if recorder is not None and recorder.in_backward else None

    def read_as_inputs(self, root: fx.GraphModule, reads: Sequence[Read]) -> list[tuple[dict[Any, Any], Any]]:
        """Make placeholders of the real tensors that attributes and globals hold.

        Returns:
            The dict and the key that hold each tensor, in the order of the placeholders.
        """
        graph = root.graph
        constants = {node.target: getattr(root, node.target) for node in graph.find_nodes(op="get_attr")}
        known = {k: c for k, c in constants.items() if not c.requires_grad or id(c) in self._without_gradient}
        slots = tensors_read(reads, known, self.joint.writes)
        for index, (target, (_, key)) in enumerate(slots.items()):
            with self._fake_mode:
                value = _fake_like(str(key), constants[target], self.device)
            first, *others = graph.find_nodes(op="get_attr", target=target)
            meta = {"val": value, META_KEY: NodeInfo(Role.STATE, str(key))}
            placeholder = add_placeholder(graph, f"state_{index}", first, meta)
            for node in others:
                node.replace_all_uses_with(placeholder)
            for node in (first, *others):
                graph.erase_node(node)
        return list(slots.values())

    @property
    def _real_inputs(self) -> list[Tensor]:
        return [*self.inputs, *self.ignored.values()]

    def _fake_state(self) -> FakeState:
        """Fake parameters and buffers; to be called under the fake mode."""
        buffers = {name: _fake_like(name, buffer, self.device) for name, buffer in self.module.named_buffers()}
        return FakeState(fake_params(self.params, self.device, self._fake_mode), buffers, ignored=self._fake_ignored())

    def _fake_ignored(self) -> dict[str, Tensor]:
        return {
            name: torch_internals.as_parameter(_fake_like(name, each, self.device, each.requires_grad))
            for name, each in self.ignored.items()
        }

    def _traced(
        self,
        state: FakeState,
        caches_casts: bool,
        params: list[Tensor],
        buffers: list[Tensor],
        inputs: list[Tensor],
        numbers: list[Any],
    ) -> list[Any]:
        """The function that is traced: forward, boundary, backward."""
        graph = fx.Graph() if self.rehearses else torch_internals.traced_graph()
        # make_fx switches autocast's cache off; but whether a weight is cast once or twice rounds its gradient.
        torch.set_autocast_cache_enabled(caches_casts)
        if not self.rehearses:
            self._label_placeholders(graph, state)
        recorder, draws = Recorder(graph, self.module), Draws()
        self._recorder = recorder
        if self.marks is not None:
            real = list(zip(inputs, self._real_inputs, strict=True))
            self.marks.begin(state, self.params, real, draws, self.device, self.reads, self.before, self.forward)
        if self.record is not None:
            self.record.begin(state, inputs)
        recording = contextlib.nullcontext() if self.record is None else self.record.following(self.reads.unseen)
        results = KnownResults(self._fake_mode) if self.rehearses else None
        leaves: dict[str | int, Tensor] = {}
        grads_of_leaves: list[Any] = []
        values = KnownValues(inputs, self._real_inputs)
        if self.marks is not None:
            self.marks.values = values
        # A checkpoint runs modules in backward, so the stand-ins stay until its end.
        with (
            _Interceptor(draws, recorder, self.reads, self.marks, self.record, results) as interceptor,
            torch_internals.known_to_libraries(values.is_known),
            recorder.following(self.reads.unseen),
            swapped_tensors(self.module, state),
        ):
            args, kwargs = self._arguments(inputs, numbers)
            given = self._put_numbers(numbers)
            made = own_objects(args, kwargs)
            self.reads.add_made(made)
            was = [tree_flatten(vars(each)) for each in made]
            grad = torch.set_grad_enabled(self.with_backward)
            set_data = SetData(state, inputs)
            interceptor.values = values
            interceptor.watch = watch = self.watch
            if watch is not None:
                watch.begin([*state.inputs, *state.buffers.values(), *inputs], self.reads)
            watching, mode = self.observers.watching(self.module), ForwardMode(set_data, self.observers)
            with grad, watching, recording, self.reads.following(), mode, noted_checks(self.observers.add_check):
                forward = self.forward if self.marks is None else self.marks.forward_of_model(self.forward)
                output = forward(*args, **kwargs) if self.is_method else call_module(self.module, forward, args, kwargs)
                self.observers.end_forward()
            interceptor.values = None
            _check_no_gradients(state, inputs)
            _check_unchanged(made, was)
            set_data.forward_is_over()
            check_frozen(state, self.params)
            tensors, spec = flatten_output(output)
            check_no_dtensors(tensors)
            if watch is not None:
                watch.end(tensors, spec)
                interceptor.watch = None
            returned = len(tensors)
            writes, observers, left_behind = self._left_behind(state, tensors, given)
            self._without_gradient = _without_gradient(self.reads.found.values(), tensors)
            differentiable = tuple(i for i, tensor in enumerate(tensors) if self.with_backward and tensor.requires_grad)
            loss = loss_index(output, tensors[:returned])
            runs_once = self.marks is not None and bool(self.marks.sites)  # so it saves for whatever may be asked
            chosen = _choose(self.differentiated, differentiable, tensors, returned, loss, takes_all=runs_once)
            if self.record is not None:
                self.record.end(tensors, chosen)
            if chosen:
                leaves = {key: leaf for key, leaf in [*state.params.items(), *enumerate(inputs)] if leaf.requires_grad}
            if chosen and not self.rehearses:
                recorder.label()
                graph.call_function(ops.end_forward).meta[META_KEY] = NodeInfo(Role.END_FORWARD)
                draws.in_backward = True
                then = self.before.now()
                outputs = [tensors[index] for index in chosen]
                follows = self.reads.following() if runs_python(outputs) else contextlib.nullcontext()
                self.reads.in_backward = set()
                with follows, self.observers.watching(self.module):  # a checkpoint runs hooks of forward again
                    grads_of_leaves = self._backward(outputs, [*leaves.values()], recorder)
                self._check_state_of_backward(then)
                set_data.check_backward()
        recorder.label()
        self.observers.check()
        grads = tuple(key for key in leaves if isinstance(key, str))
        input_grads = tuple(key for key in leaves if isinstance(key, int))
        self.joint = Joint(
            spec, len(tensors), differentiable, chosen, tuple(state.rebound), grads, input_grads, writes, observers,
            len(left_behind), tuple(values.branches),
        )  # fmt: skip
        return [*left_behind, *tensors, *state.rebound.values(), *grads_of_leaves]

    def _check_state_of_backward(self, then: Moment) -> None:
        name = self.before.changed_since(then)
        if name is not None:
            raise CaptureError(
                f"The backward changes {name}: in a hook that returns a value, in an autograd.Function, or in a "
                "checkpoint that runs forward again. A compiled step leaves behind what forward changes, and what "
                "hooks that return None do; change it there."
            )

    def _arguments(self, inputs: list[Tensor], numbers: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of the call, with other tensors and symbolic numbers."""
        args, kwargs = replace_tensors(self.args, self.kwargs, inputs)
        slots = () if self.stand_ins is None else self.stand_ins.slots
        arguments = {each.argument: n for each, n in zip(slots, numbers, strict=True) if each.argument is not None}
        return replace_numbers(self.spec, args, kwargs, arguments) if arguments else (args, kwargs)

    def _put_numbers(self, numbers: list[Any]) -> dict[Slot, Any]:
        """Put symbolic numbers into their slots, unless islands read them; `Before.restored` takes them out."""
        slots = () if self.stand_ins is None else self.stand_ins.slots
        of_islands = set[Slot]() if self.marks is None or not slots else self.marks.islands.guarded_slots
        given: dict[Slot, Any] = {}
        for each, number in zip(slots, numbers, strict=True):
            if each.slot in of_islands:
                self._of_islands.add(each.slot)
                continue
            self.before.add_entry(each.owner, each.key)
            each.owner[each.key] = given[each.slot] = number
        return given

    def check_numbers(self, reads: Sequence[Read]) -> None:
        """Refuse numbers as inputs that traced code reads too, beside islands.

        Raises:
            PinnedNumberError: it reads some.
        """
        if self._of_islands and not self._of_islands.isdisjoint((id(each.place), each.name) for each in reads):
            raise PinnedNumberError("an island reads a number that is read outside of it, too")

    def _left_behind(
        self, state: FakeState, tensors: list[Tensor], given: Mapping[Slot, Any]
    ) -> tuple[tuple[Write, ...], tuple[Observer, ...], list[Any]]:
        """What the forward leaves behind, the hooks that observe, and the numbers that it leaves behind.

        Their tensors are added to the model's outputs.
        """
        numbers: list[Any] = []
        params = {id(stand_in): name for name, stand_in in (state.params | state.ignored).items()}
        held = _tensors_held(self.reads.found.values())

        def index_of(leaf: Any) -> Output | None:
            if id(leaf) in params:
                raise CaptureError(
                    f"The forward keeps parameter {params[id(leaf)]} in its state. Parameters are sharded: read it as "
                    "an attribute of its module (self.weight) where it is used."
                )
            is_number = torch_internals.is_symbolic(leaf)
            if id(leaf) in held:  # moved from one slot to another; another call finds another tensor in the first
                if leaf.requires_grad:
                    raise CaptureError(
                        "The forward moves a tensor with a gradient, of an earlier call, from one attribute, list or "
                        "dict to another. Cut its gradient off where it is moved: .detach()."
                    )
            elif not is_number and not torch_internals.is_fake(leaf):
                return None
            return output_in(numbers if is_number else tensors, leaf, is_number=is_number)

        self.reads.add_class_writes(self.before.class_writes())
        writes = tuple(self.before.writes(self.reads.set_slots, given, index_of))
        return writes, self.observers.found(index_of), numbers

    def _label_placeholders(self, graph: fx.Graph, state: FakeState) -> None:
        infos = [NodeInfo(Role.PARAM, name) for name in state.params if name not in self.left_out]
        infos += [NodeInfo(Role.BUFFER, name) for name in state.buffers]
        infos += [NodeInfo(Role.INPUT, path) for path in self.spec.tensor_paths]
        infos += [NodeInfo(Role.INPUT, name_of_ignored(name)) for name in state.ignored]
        infos += [NodeInfo(Role.STATE)] * (0 if self.stand_ins is None else len(self.stand_ins.slots))
        for node, info in zip(graph.nodes, infos, strict=True):
            node.meta[META_KEY] = info

    def _add_left_out(self, graph: fx.Graph) -> None:
        """Add the placeholders of parameters that are no part of the trace, each in its place."""
        traced = iter([*graph.find_nodes(op="placeholder"), next(n for n in graph.nodes if n.op != "placeholder")])
        behind = next(traced)
        for name, spec in self.params.items():
            if name not in self.left_out:
                behind = next(traced)
                continue
            with graph.inserting_before(behind):
                node = graph.placeholder(f"left_out_{behind.name}")
            dtype = spec.dtypes.compute
            value = torch_internals.fake_leaf(self._fake_mode, spec.shape, dtype, self.device, requires_grad=False)
            node.meta = {"val": value, META_KEY: NodeInfo(Role.PARAM, name)}

    def _backward(self, outputs: list[Tensor], leaves: list[Tensor], recorder: Recorder) -> list[Tensor | None]:
        recorder.label()
        tangents = [torch.empty_like(output, requires_grad=False) for output in outputs]
        recorder.label(Role.TANGENT, "")
        torch.clear_autocast_cache()
        with no_autocast(self.device), recorder.backward_from(outputs), placed_gradients(leaves):
            gradients = torch.autograd.grad(outputs, leaves, tangents, allow_unused=True)
        return list(map(local_gradient, gradients))


def fake_inputs(spec: CallSpec, inputs: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Fake tensors like those of a call; to be called under the fake mode."""
    named = zip(spec.tensor_paths, inputs, strict=True)
    return [_fake_like(path, tensor, device, tensor.requires_grad) for path, tensor in named]


def _fake_like(name: str, tensor: Tensor, device: torch.device, requires_grad: bool = False) -> Tensor:
    """A fake leaf of a tensor's geometry; for a tensor on the meta device, it is on `device`."""
    if is_dtensor(tensor):
        raise InputMismatchError(
            f"{name} is a DTensor. Pass its local tensor (to_local()), which PrepareModuleInput can make a DTensor of."
        )
    if tensor.layout is not torch.strided:
        raise InputMismatchError(f"{name} is a tensor of layout {tensor.layout}. Pass it dense (to_dense()).")
    where = device if tensor.device.type == "meta" else tensor.device
    return torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=where, requires_grad=requires_grad
    )


def _check_no_gradients(state: FakeState, inputs: Sequence[Tensor]) -> None:
    """Refuse a forward that has run a backward of its own, which would leave gradients in stand-ins.

    Raises:
        CaptureError: it has.
    """
    found = next((name for name, param in state.params.items() if param.is_leaf and param.grad is not None), None)
    if found is not None or any(each.is_leaf and each.grad is not None for each in inputs):
        raise CaptureError(
            f"The forward calls backward(), which would give a gradient to {found or 'an input'}: a step has one "
            "backward, behind its forward. Return the loss, and call backward on that; for the gradient of something "
            "inside use torch.autograd.grad."
        )


@contextlib.contextmanager
def _silent_about_history(module: nn.Module) -> Generator[None]:
    """Ignore that a fake tensor in the place of the hidden state of the call before looks at its `.grad`.

    Only where there is such state: Python forgets which warnings it has shown whenever filters change.
    """
    of_torch = torch_internals.MODULE_ATTRIBUTES.difference(torch_internals.TENSOR_TABLES)
    values = [value for each in module.modules() for name, value in vars(each).items() if name not in of_torch]
    if not any(isinstance(leaf, Tensor) and not leaf.is_leaf for leaf in torch_internals.tree_leaves(values)):
        yield
        return
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
        yield


def _without_gradient(reads: Iterable[Read], outputs: Sequence[Tensor]) -> set[int]:
    """The ids of real tensors among what was read that require grad, and to which no gradient goes from the outputs.

    Such is the hidden state of the call before, whose history forward cuts off by `detach()` or `no_grad()`.
    """
    values = chain.from_iterable((read.value, *items_of(read.content)) for read in reads)
    held = [each for each in values if isinstance(each, Tensor) and each.requires_grad]
    real = [each for each in held if not torch_internals.is_fake(each) and not torch_internals.is_of_parameter(each)]
    return {*map(id, real)}.difference(map(id, reached_by_gradients(outputs, real))) if real else set()


def _tensors_held(reads: Iterable[Read]) -> set[int]:
    """The ids of real tensors among what was read, but for those of parameters."""
    values = chain.from_iterable((read.value, *items_of(read.content)) for read in reads)
    tensors = [each for each in values if isinstance(each, Tensor)]
    return {id(t) for t in tensors if not torch_internals.is_fake(t) and not torch_internals.is_of_parameter(t)}


def _check_unchanged(objects: Sequence[Any], was: Sequence[tuple[list[Any], Any]]) -> None:
    """Refuse a forward that has set an attribute of an argument, which a step makes anew.

    Raises:
        CaptureError: it has.
    """
    for each, (leaves, structure) in zip(objects, was, strict=True):
        now, structure_now = tree_flatten(vars(each))
        if structure_now != structure or any(a is not b for a, b in zip(now, leaves, strict=True)):
            raise CaptureError(
                f"The forward changes attributes of a {type(each).__qualname__} that is an argument, which a compiled "
                "step would not leave behind. Return what it sets, or let it change a copy."
            )


@contextlib.contextmanager
def own_autocast_cache() -> Generator[None]:
    """Clear autocast's cache before and after: no cast of a real parameter gets in, no fake one gets out."""
    torch.clear_autocast_cache()
    try:
        yield
    finally:
        torch.clear_autocast_cache()


_SET_DATA, _GET_GRAD_FN = cast(Any, Tensor.data).__set__, cast(Any, Tensor.grad_fn).__get__


class ForwardMode(TorchFunctionMode):
    """Sees what no tracer does: `param.data = ...`; retain_grad(), which is refused; the hooks of tensors."""

    def __init__(self, set_data: SetData, observers: Observers) -> None:
        super().__init__()
        self._set_data = set_data
        self._observers = observers
        self._watched = {_SET_DATA, _GET_GRAD_FN, Tensor.register_hook, Tensor.retain_grad}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in self._watched:
            return func(*args, **(kwargs or {}))
        if func == _SET_DATA and (name := self._set_data.name_of(args[0])) is not None:
            self._observers.num_set_data += 1
            return self._set_data.set(name, *args)
        if func == Tensor.register_hook:
            self._observers.num_hooked += 1
            self._check_hooked(args[0])
            return func(args[0], self._observers.of_backward(args[1]))
        if func == _GET_GRAD_FN and _is_called_by_user():
            node = func(*args, **(kwargs or {}))
            return None if node is None else HookedNode.of(node, self._watched_on_node)
        if func == Tensor.retain_grad and not args[0].is_leaf:
            self._observers.num_hooked += 1  # so that a hook that does so is no observer
            raise CaptureError(
                "The forward calls retain_grad() on a tensor inside of the model, whose gradient the backward of a "
                "compiled step does not keep. Use tensor.register_hook(function) to see it."
            )
        return func(*args, **(kwargs or {}))

    def _watched_on_node(self, hook: Any) -> Any:
        self._observers.num_hooked += 1
        return self._observers.of_backward(hook)

    def _check_hooked(self, tensor: Tensor) -> None:
        if (name := self._set_data.name_of(tensor)) is not None:
            raise CaptureError(
                f"The forward registers a hook on parameter {name}, in each call one more. "
                "Register a hook once, before training: register_post_accumulate_grad_hook gets its shard's gradient."
            )


def _is_called_by_user() -> bool:
    """True if code of the user runs the function whose `__torch_function__` has called this."""
    caller = sys._getframe(2)  # pyright: ignore[reportPrivateUsage]
    return is_followed_file(caller.f_code.co_filename)


class _Interceptor(torch_internals.QuickDispatchMode):
    """Runs every operator below autograd: draws go through `Draws`, and each node gets its source line."""

    def __init__(
        self,
        draws: Draws,
        recorder: Recorder,
        reads: Reads,
        marks: Marks | None,
        record: Record | None,
        results: KnownResults | None,
    ) -> None:
        super().__init__()
        self._marks, self._record, self._results = marks, record, results
        self.watch: Watch | None = None
        self.values: KnownValues | None = None
        self._reads = reads
        self._draws = draws
        self._recorder = recorder

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch_internals.DEVICE and (device := torch_internals.answer_device(func, args)):
            return device
        if torch_internals.has_dtensors(types):
            refuse_draw(func, args, kwargs or {})
            return NotImplemented  # a DTensor runs operators on local tensors, which come here
        if writes_across_ranks(func):
            with self:
                return run_functional(func, args, kwargs or {})
        is_seen = self._reads.pause()
        try:
            if self.values is not None and (outcome := self.values.decide(func, args)) is not None:
                return outcome
            if self._marks is not None:
                self._marks.check_write(func, args, kwargs or {})
            if self._reads.is_in_trial and reads_values(func):
                raise CaptureError(f"A hook reads the values of a tensor ({func}).")
            args = with_equal_strides(func, args)
            run = run_declared if writes_undeclared(func) else self._draws.run
            arguments = Arguments(args, kwargs or {})
            known = self._results
            result = run(func, args, kwargs or {}) if known is None else known.run(func, arguments, run)
            is_sparse = isinstance(result, Tensor) and result.layout is not torch.strided
            if is_sparse and torch_internals.backward_id() < 0:  # sparse gradients are refused by the parameter's name
                raise CaptureError(
                    f"The forward makes a tensor of layout {result.layout} ({func}), which cannot be traced. Let what "
                    "makes it and what reads it be one module of its own, which can run as it is."
                )
            result = with_real_strides(func, args, result)
            if self._record is not None:
                self._record.add(func, arguments, result)
            if self.watch is not None:
                self.watch.ran(func, arguments, result)
            if self.values is not None:
                self.values.ran(func, args, kwargs or {}, result)
            self._recorder.label_line()
        finally:
            if is_seen:
                self._reads.go_on()
        return result


def call_module(module: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the module with its hooks, and run `forward` in the place of the module's own."""
    attributes = vars(module)
    had_forward, before = "forward" in attributes, attributes.get("forward")
    attributes["forward"] = forward
    try:
        return module(*args, **kwargs)
    finally:
        if had_forward:
            attributes["forward"] = before
        else:
            del attributes["forward"]


def _choose(
    wanted: tuple[int, ...] | None,
    differentiable: tuple[int, ...],
    tensors: Sequence[Tensor],
    num_returned: int,
    loss: int | None,
    *,
    takes_all: bool,
) -> tuple[int, ...]:
    """The outputs that get a tangent: the wanted ones, else the loss, else the only scalar, else all returned ones."""
    if wanted is not None:
        return tuple(index for index in wanted if index in differentiable)
    differentiable = tuple(index for index in differentiable if index < num_returned)
    if takes_all:
        return differentiable
    if loss in differentiable:
        return (loss,)
    scalars = [index for index in differentiable if tensors[index].dim() == 0]
    return tuple(scalars) if len(scalars) == 1 else differentiable


@contextlib.contextmanager
def no_autocast(device: torch.device) -> Generator[None]:
    """Switch autocast off inside the block, as it is off for a backward of eager."""
    with contextlib.ExitStack() as stack:
        for kind in {"cpu", device.type}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _make_tangents_placeholders(graph: fx.Graph) -> None:
    """Turn tangents into placeholders; the trace made them as values, where the shapes of outputs were known."""
    tangents = [node for node in graph.nodes if node.meta.get(META_KEY) == NodeInfo(Role.TANGENT)]
    for index, node in enumerate(tangents):
        add_placeholder(graph, f"tangent_{index}", node, node.meta)
        graph.erase_node(node)
