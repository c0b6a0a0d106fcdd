"""Every private torch symbol that fxzero uses, with the versions of torch that have it.

A symbol is private if it begins with an underscore: a part of an import's path, an attribute of a torch object, a key
in its `__dict__`; but not the name of an operator (`torch.ops.aten._unsafe_view`). `tests/test_private_symbols.py`
finds private symbols in other modules.
"""

import contextlib
import copy
import functools
import inspect
import operator
import re
import sys
import threading
import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any, TypeGuard, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._prims_common import make_channels_last_strides_for, make_contiguous_strides_for
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.distributed._composable.contract import REGISTRY_KEY
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.utils import _apply_to_tensors  # pyright: ignore[reportPrivateUsage]
from torch.fx._lazy_graph_module import _use_lazy_graph_module  # pyright: ignore[reportPrivateUsage]
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot, make_fx, set_proxy_slot
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

from fxzero.errors import PlanError


def cast_floating(dtype: torch.dtype, values: Any) -> Any:
    """The values with floating tensors in another dtype, in whatever containers FSDP2 looks into.

    `torch.distributed.utils._apply_to_tensors`: 2.11 to 2.13.
    """

    def cast_one(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return _apply_to_tensors(cast_one, values)


def watch_unscaling(
    before: Callable[[torch.optim.Optimizer], object],
    after: Callable[[torch.optim.Optimizer, Sequence[torch.Tensor]], object],
) -> None:
    """Let every gradient scaler call functions when it looks for infinities in the gradients of an optimizer.

    ShardedGradScaler, which has a method of its own, does not.

    Args:
        before: a function of the optimizer.
        after: a function of the optimizer, and of the tensors that say what was found, which it may change.

    `GradScaler._unscale_grads_`: 2.11 to 2.13.
    """
    scaler: Any = torch.amp.GradScaler
    unscale = scaler._unscale_grads_

    @functools.wraps(unscale)
    def watched(self: Any, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        before(optimizer)
        found = unscale(self, optimizer, *args, **kwargs)
        after(optimizer, list(found.values()))
        return found

    scaler._unscale_grads_ = watched


def is_profiling() -> bool:
    """True while a profiler of torch records. `torch.autograd.profiler._is_profiler_enabled`: 2.11 to 2.13."""
    return torch.autograd.profiler._is_profiler_enabled  # pyright: ignore[reportPrivateUsage]


def backward_id() -> int:
    """A number for the call of the autograd engine that is under way. `_current_graph_task_id`: 2.11 to 2.13."""
    return torch._C._current_graph_task_id()  # pyright: ignore


def direct_call(op: Any) -> Any:
    """The builtin behind an operator overload, which saves a Python call. `OpOverload._op`: 2.11 to 2.13."""
    return getattr(op, "_op", op)


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that a group uses on a device, "none" if the group has no backend there.

    `ProcessGroup._get_backend`: 2.11 to 2.13.
    """
    try:
        return cast(Any, group._get_backend(device)).name()
    except RuntimeError:
        return "none"


def all_gather_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """A function of (full, shard) that gathers into one tensor. `ProcessGroup._allgather_base`: 2.11 to 2.13."""
    return group._allgather_base


def reduce_scatter_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """A function of (shard, full, options) that reduces a tensor. `ProcessGroup._reduce_scatter_base`: 2.11 to 2.13."""
    return group._reduce_scatter_base


def default_store() -> Store:
    """The store of the default process group. `_get_default_store`: 2.11 to 2.13."""
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


def gloo_connections(group: dist.ProcessGroup, name: str) -> dist.ProcessGroup:
    """New connections between the ranks of a gloo group, which torch knows nothing of; a collective.

    `ProcessGroup._get_backend`, `options._timeout`: 2.11 to 2.13.
    """
    timeout = cast(Any, group)._get_backend(torch.device("cpu")).options._timeout
    store = PrefixStore(f"{name}/{group.group_name}", default_store())
    return cast(Any, dist).ProcessGroupGloo(store, group.rank(), group.size(), timeout)


def is_connected(group: dist.ProcessGroup, rank: int, tag: int) -> bool:
    """False if gloo has seen the connection to a rank of a group break, which it says where a message is asked for.

    Args:
        tag: of a message that nobody sends.

    `ProcessGroup._get_backend`: 2.11 to 2.13.
    """
    try:
        cast(Any, group)._get_backend(torch.device("cpu")).recv([torch.empty(1)], rank, tag)
    except RuntimeError:
        return False
    return True


COLLECTIVE_NAMESPACES = ("_c10d_functional", "_c10d_functional_autograd", "_dtensor")
"""Where torch registers the collectives that models which are traced may call: 2.11 to 2.13."""


FUNCTIONAL_COLLECTIVES = cast(Any, torch.ops._c10d_functional)
"""Collectives that return what the calls of torch.distributed write: 2.11 to 2.13."""

ALL_GATHER_BASE = torch.ops.c10d._allgather_base_.default
REDUCE_SCATTER_BASE = torch.ops.c10d._reduce_scatter_base_.default
"""Behind `all_gather_into_tensor` and `reduce_scatter_tensor`: 2.11 to 2.13."""


def unboxed_group(boxed: Any) -> Any:
    """The process group among the arguments of an operator. `ProcessGroup.unbox`: 2.11 to 2.13."""
    return dist.ProcessGroup.unbox(boxed)


def running_reduction() -> Any:
    """The `op` of the function of torch.distributed that is running, which its operator has in a box that none opens.

    `distributed_c10d`'s functions have it as a variable `op`: 2.11 to 2.13.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    while frame is not None and frame.f_code.co_filename != dist.distributed_c10d.__file__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("op")


def result_of_collective(op: Any, args: tuple[Any, ...]) -> Any:
    """What an operator of c10d returns when it is over: what it wrote, if that, and a handle to wait for.

    `FakeWork`, `OpOverload._schema`: 2.11 to 2.13.
    """
    from torch._C._distributed_c10d import FakeWork  # not in builds without torch.distributed

    handle = FakeWork().boxed()
    return handle if len(op._schema.returns) == 1 else (args[0], handle)


def size_of_group(node: fx.Node) -> int:
    """The number of ranks of a functional collective's group. `_resolve_process_group`: 2.11 to 2.13."""
    group = dist.distributed_c10d._resolve_process_group(argument(node, "group_name"))  # pyright: ignore
    return group.size()


# -- tracing: capture/ ---------------------------------------------------------------------------------------------


DispatchMode = TorchDispatchMode
"""Base class of modes that see every operator below autograd. `torch.utils._python_dispatch`: 2.11 to 2.13."""

TRACER_FILES = re.compile(
    r"torch[/\\](_subclasses|_dispatch|_ops\.py|_meta_registrations|_decomp|_refs|_prims|fx[/\\]|_functorch|"
    r"utils[/\\]_python_dispatch|utils[/\\]checkpoint)"
)
"""Pattern of torch's files that raise on behalf of the tracer, not of the model: 2.11 to 2.13."""


def fake_tensor_mode() -> Any:
    """A mode whose new tensors have no memory, and which also takes real tensors. `FakeTensorMode`: 2.11 to 2.13."""
    return FakeTensorMode(allow_non_fake_inputs=True)


class QuickDispatchMode(TorchDispatchMode):
    """A dispatch mode whose calls torch.compile does not guard, which takes longer than most of them.

    `TorchDispatchMode._should_skip_dynamo`: 2.11 to 2.13.
    """

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def fake_of(mode: Any, shape: Sequence[int], stride: Sequence[int], offset: int, dtype: Any, device: Any) -> Any:
    """A new fake tensor, in memory of its own. `FakeTensor`: 2.11 to 2.13."""
    meta = torch.empty_strided(shape, stride, dtype=dtype, device="meta")
    if offset:
        meta = meta.as_strided(shape, stride, offset)
    return FakeTensor(mode, meta, device)


def fake_leaf(mode: Any, shape: Sequence[int], dtype: Any, device: Any, *, requires_grad: bool) -> torch.Tensor:
    """What `torch.empty` gives under a fake mode, without that operator. `no_dispatch`, `FakeTensor`: 2.11 to 2.13."""
    with no_dispatch():
        meta = torch.empty(shape, dtype=dtype, device="meta")
    return FakeTensor(mode, meta, device).requires_grad_(requires_grad)


def symbolic_fake_mode() -> tuple[Any, Any]:
    """An environment of symbolic numbers, and a fake mode for it whose shapes stay numbers. 2.11 to 2.13."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv  # takes seconds to import

    environment = ShapeEnv()
    return environment, FakeTensorMode(shape_env=environment, allow_non_fake_inputs=True, static_shapes=True)


def symbolic_number(environment: Any, value: int | float, name: str) -> Any:
    """A SymInt or SymFloat that stands for a number. `torch._dynamo.source.ConstantSource`: 2.11 to 2.13."""
    from torch._dynamo.source import ConstantSource  # takes seconds to import
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    source = ConstantSource(name)
    symbol = environment.create_unspecified_symbol(value, source=source, dynamic_dim=DimDynamic.DYNAMIC)
    create = environment.create_symfloatnode if isinstance(value, float) else environment.create_symintnode
    return create(symbol, hint=value, source=source)


def symbol_of(number: Any) -> Any:
    """The sympy symbol of a symbolic number. `SymNode._expr`: 2.11 to 2.13."""
    return number.node._expr


def name_of_symbol(number: Any) -> str | None:
    """The name of the symbol that a symbolic number is; None if it is an expression, or no such number."""
    symbol = symbol_of(number) if is_symbolic(number) else None
    return None if symbol is None or not symbol.is_Symbol else symbol.name


def is_symbolic(value: Any) -> bool:
    """True for a symbolic number."""
    return isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool))


def pinned(value: Any) -> Any:
    """The number that a symbolic one stands for, which is a constant of the trace then; any other value as it is."""
    if isinstance(value, torch.SymBool):
        return bool(value)
    return int(value) if isinstance(value, torch.SymInt) else float(value) if is_symbolic(value) else value


def has_symbolic_shape(value: Any) -> bool:
    """True for a tensor whose shape or strides have a symbolic number."""
    return isinstance(value, torch.Tensor) and any(map(is_symbolic, (*value.shape, *value.stride())))


MAX_FAKE_RESULTS = 4096
"""Results of fake operators that are kept from one model to the next."""


@contextlib.contextmanager
def few_fake_results(*, keep: bool) -> Generator[None]:
    """Drop what fake operators inside the block add to torch's cache, which lives as long as the process.

    `FakeTensorMode.cache`: 2.11 to 2.13.

    Args:
        keep: keep what they add as long as it is not much.
    """
    cache: dict[Any, Any] = FakeTensorMode.cache
    before = len(cache)
    try:
        yield
    finally:
        if not keep or len(cache) > MAX_FAKE_RESULTS:
            while len(cache) > before:
                cache.popitem()


def is_fake(value: object) -> TypeGuard[torch.Tensor]:
    """True for a tensor without memory. `FakeTensor`: 2.11 to 2.13."""
    return isinstance(value, FakeTensor)


def has_known_values(tensor: Any) -> bool:
    """True for a fake tensor that holds a small real one, which operators on such tensors alone compute with.

    `FakeTensor.constant`: 2.11 to 2.13.
    """
    return type(tensor) is FakeTensor and tensor.constant is not None


def fake_geometry(tensor: Any) -> tuple[Any, ...] | None:
    """Shape, strides, offset, dtype and device of a fake tensor; None for another one, or if they do not say it all.

    `FakeTensor.fake_device`: 2.11 to 2.13.
    """
    if type(tensor) is not FakeTensor or tensor.layout is not torch.strided:
        return None
    if tensor.dtype.is_complex or tensor.is_neg() or has_symbolic_shape(tensor):
        return None
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype, tensor.fake_device


def make_fake(mode: Any, geometry: tuple[Any, ...], viewed: torch.Tensor | None) -> torch.Tensor:
    """A fake tensor of a geometry, as of `fake_geometry`: a view of another one, or a new one.

    `no_dispatch`, `FakeTensor`: 2.11 to 2.13.
    """
    shape, strides, offset, dtype, device = geometry
    storage = None if viewed is None else viewed.untyped_storage()
    with no_dispatch():
        made = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
        if storage is not None:
            made.set_(storage, offset, shape, strides)
    return FakeTensor(mode, made, device)


def device_of(tensor: torch.Tensor) -> torch.device:
    """The device of a tensor, without the operator that a fake one runs for it.

    `FakeTensor.fake_device`: 2.11 to 2.13.
    """
    return tensor.fake_device if isinstance(tensor, FakeTensor) else tensor.device


def fake_result(node: fx.Node) -> Any:
    """The value of a new node of a traced graph, from its arguments' values. `FakeTensor.fake_mode`: 2.11 to 2.13."""
    arguments = [argument.meta["val"] for argument in node.all_input_nodes]
    modes = [cast(Any, value).fake_mode for value in arguments if isinstance(value, FakeTensor)]
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with torch.no_grad(), modes[0] if modes else contextlib.nullcontext():
        return cast(Any, node.target)(*args, **kwargs)


def without_dispatch() -> AbstractContextManager[None]:
    """Run operators on real tensors inside the block, also under a fake mode. `no_dispatch`: 2.11 to 2.13."""
    return no_dispatch()


def values_of(tensor: torch.Tensor) -> Any:
    """The numbers of a tensor that is not fake, also under a fake mode."""
    with without_dispatch():
        return tensor.tolist()


@contextlib.contextmanager
def known_to_libraries(is_known: Callable[[Any], bool]) -> Generator[None]:
    """Let code of transformers take it for no trace where it asks about tensors whose values are known.

    It asks whether a tensor is a FakeTensor (`is_tracing`), and reads no values of one, as of a mask of ones.
    `torch._subclasses.FakeTensor`: 2.11 to 2.13.
    """

    asked = [is_known]  # emptied at the end: a class outlives this call until cycles are collected

    class Kind(type(FakeTensor)):
        def __instancecheck__(cls, instance: Any) -> bool:
            if not isinstance(instance, FakeTensor):
                return False
            name: str = sys._getframe(1).f_globals.get("__name__", "")  # pyright: ignore[reportPrivateUsage]
            return not (name.startswith("transformers.") and any(each(instance) for each in asked))

    kind = Kind("FakeTensor", (FakeTensor,), {})
    try:
        with patch.object(torch._subclasses, "FakeTensor", kind):  # pyright: ignore[reportPrivateUsage]
            yield
    finally:
        asked.clear()


def current_function_mode() -> Any:
    """The torch function mode that was entered last; None if there is none.

    `torch.overrides._get_current_function_mode`: 2.11 to 2.13.
    """
    return torch.overrides._get_current_function_mode()  # pyright: ignore[reportPrivateUsage]


DEVICE: Any = torch.ops.prim.device.default
"""The operator that asks a tensor of a Python class for its device."""


def answer_device(op: Any, args: Any) -> torch.device | None:
    """The device of a fake tensor if `op` asks for it, else None. Two thirds of all calls of a dispatch mode ask so.

    `prim.device`, `FakeTensor.fake_device`: 2.11 to 2.13.
    """
    if op is DEVICE and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    return None


def trace_fx(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """A graph of the ATen operators that a function of fake tensors runs; no code is written for it.

    Code of fx stays in a cache for as long as the process lives. `make_fx`, `_lazy_graph_module`: 2.11 to 2.13.
    """

    def traced(*values: Any) -> Any:  # make_fx counts the arguments of plain functions right, not of bound methods
        return function(*values)

    with _use_lazy_graph_module(True):
        return make_fx(traced)(*inputs)


class PlainGraph(fx.Graph):
    """A graph without symbolic numbers, for which `create_node` would search all arguments: most of its time.

    `Graph._graph_namespace`, `_target_to_str`, `_insert`, `_find_nodes_lookup_table`, `_len`: 2.11 to 2.13.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._stems: dict[int, str] = {}
        """What names of nodes begin with, by the ids of their operators."""

    def create_node(
        self, op: str, target: Any, args: Any = None, kwargs: Any = None, name: str | None = None, type_expr: Any = None
    ) -> fx.Node:
        """A node at the place where the graph inserts."""
        inner = cast(Any, self)
        if name is None:
            name = self._stems.get(id(target)) or self._stems.setdefault(id(target), inner._target_to_str(target))
        unique = inner._graph_namespace.create_name(name, None)
        node = fx.Node(self, unique, op, target, args or (), kwargs or {}, type_expr)
        inner._graph_namespace.associate_name_with_obj(unique, node)
        inner._insert(node)
        inner._find_nodes_lookup_table.insert(node)
        inner._len += 1
        return node


def traced_graph() -> fx.Graph:
    """The graph that `trace_fx` is making right now. `get_proxy_mode`: 2.11 to 2.13."""
    return cast(Any, get_proxy_mode()).tracer.graph


def as_parameter(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, for which `isinstance(tensor, nn.Parameter)` holds from now on. `_is_param`: 2.11 to 2.13."""
    cast(Any, tensor)._is_param = True
    return tensor


def replace_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    """What `tensor.data = data` does, also in the graph that `trace_fx` is making: `tensor` is then the node of `data`.

    `get_proxy_slot`, `set_proxy_slot` of the proxy mode's tracer: 2.11 to 2.13.
    """
    tracer = cast(Any, get_proxy_mode()).tracer
    tensor.data = data
    set_proxy_slot(tensor, tracer, get_proxy_slot(data, tracer))


@contextlib.contextmanager
def eager_checkpoints() -> Generator[None]:
    """Let selective checkpoints recompute in a trace, where by default they only annotate nodes.

    `torch.utils.checkpoint._is_compiling`: 2.11 to 2.13.
    """
    checkpoint = cast(Any, torch.utils.checkpoint)
    before = checkpoint._is_compiling
    checkpoint._is_compiling = lambda *args, **kwargs: False
    try:
        yield
    finally:
        checkpoint._is_compiling = before


@contextlib.contextmanager
def conversions_if_needed() -> Generator[None]:
    """Let `module.to(device)`, of a module that forward makes, do nothing where nothing would change.

    Otherwise it would swap fake parameters, which a trace holds. `Module._apply`: 2.11 to 2.13.
    """
    own = nn.Module._apply  # pyright: ignore[reportPrivateUsage]

    def apply(self: nn.Module, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        with torch.no_grad():
            if all(fn(tensor) is tensor for tensor in (*self.parameters(), *self.buffers())):
                return self
        return own(self, fn, recurse)

    with patch.object(nn.Module, "_apply", apply):
        yield


class _NotReentrant:
    """Stands for the autograd.Function of reentrant checkpoints."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        """The checkpoint that needs no backward of its own; of arguments without grad it has none, as the other."""
        if any(isinstance(each, torch.Tensor) and each.requires_grad for each in args):
            run = torch.utils.checkpoint.checkpoint
            return run(function, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state)
        with torch.no_grad():
            return function(*args)


@contextlib.contextmanager
def checkpoints_without_backward() -> Generator[None]:
    """Let reentrant checkpoints in the block be others, whose backward is no run of the autograd engine of its own.

    `torch.utils.checkpoint.CheckpointFunction`: 2.11 to 2.13.
    """
    checkpoint = cast(Any, torch.utils.checkpoint)
    before = checkpoint.CheckpointFunction
    checkpoint.CheckpointFunction = _NotReentrant
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before


def next_sequence_number() -> int:
    """The sequence number of this thread's next autograd node. `_get_sequence_nr`: 2.11 to 2.13."""
    return cast(Any, torch.autograd)._get_sequence_nr()


def sequence_number(node: Any) -> int:
    """The sequence number of an autograd node. `Node._sequence_nr`: 2.11 to 2.13."""
    return node._sequence_nr()


def saves_through_hooks() -> bool:
    """True if hooks get the tensors that autograd saves, as in a checkpoint.

    `torch._C._autograd._top_saved_tensors_default_hooks`: 2.11 to 2.13.
    """
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None  # pyright: ignore


def apply_pending_updates(tensor: torch.Tensor) -> None:
    """Trace the pending updates of a tensor under functionalization. `torch._sync`: 2.11 to 2.13."""
    private = cast(Any, torch)
    if private._is_functional_tensor(tensor):
        private._sync(tensor)


# -- trees of arguments and results: `torch.utils._pytree`, 2.11 to 2.13 ------------------------------------------

TreeSpec = pytree.TreeSpec
"""Type that describes how values are nested in tuples, lists, dicts and registered classes. 2.11 to 2.13."""
tree_flatten = pytree.tree_flatten
"""Returns the leaves of nested values, and their TreeSpec. 2.11 to 2.13."""
tree_unflatten = pytree.tree_unflatten
"""Rebuilds nested values from leaves and a TreeSpec. 2.11 to 2.13."""
tree_leaves = pytree.tree_leaves
"""Returns the leaves of nested values. 2.11 to 2.13."""
tree_map = pytree.tree_map
"""Applies a function to all leaves. 2.11 to 2.13."""
tree_map_only = pytree.tree_map_only
"""Applies a function to all leaves of one type. 2.11 to 2.13."""
tree_flatten_with_path = pytree.tree_flatten_with_path
"""Returns pairs of the keys that lead to a leaf and the leaf, and the TreeSpec. 2.11 to 2.13."""
register_tree_node = pytree.register_pytree_node
"""Registers functions that take a class apart, and put it together. 2.11 to 2.13."""
attribute_key = pytree.GetAttrKey
"""Makes the key of an attribute. 2.11 to 2.13."""
keystr = pytree.keystr
"""Formats the keys that lead to a leaf: `[1]['x'].y`. 2.11 to 2.13."""


# -- nodes ---------------------------------------------------------------------------------------------------------

input_nodes: Callable[[fx.Node], Mapping[fx.Node, None]] = operator.attrgetter("_input_nodes")
"""`Node.all_input_nodes` as the keys of a mapping, which is not copied: for loops over all nodes of a graph.

`Node._input_nodes`: 2.11 to 2.13.
"""

# -- operators -----------------------------------------------------------------------------------------------------


def is_overload(target: Any) -> bool:
    """True for an ATen (or custom) operator overload, as graphs of `make_fx` have them. `torch._ops`: 2.11 to 2.13."""
    return isinstance(target, torch._ops.OpOverload)  # pyright: ignore[reportPrivateUsage]


@functools.cache
def is_mutable(overload: Any) -> bool:
    """True if an operator writes, or may write, to an argument. `OpOverload._schema`: 2.11 to 2.13."""
    return overload._schema.is_mutable


def argument(node: Any, name: str) -> Any:
    """The value that a node passes for an argument of its operator, or the default; None for an unknown argument."""
    return named_arguments(node.target, node.args, node.kwargs).get(name)


@functools.cache
def written_names(overload: Any) -> tuple[str, ...]:
    """The names of arguments that an operator writes to. `OpOverload._schema`: 2.11 to 2.13."""
    declared = overload._schema.arguments
    return tuple(each.name for each in declared if each.alias_info is not None and each.alias_info.is_write)


def named_arguments(overload: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Maps names of an operator's arguments to values in a call, defaults included. `_schema`: 2.11 to 2.13."""
    names, defaults = _declared(overload)
    return {**defaults, **dict(zip(names, args, strict=False)), **kwargs}


@functools.cache
def _declared(overload: Any) -> tuple[tuple[str, ...], dict[str, Any]]:
    """The names of an operator's arguments, and the defaults by name. `OpOverload._schema`: 2.11 to 2.13."""
    declared = overload._schema.arguments
    defaults = {each.name: each.default_value for each in declared if each.has_default_value()}
    return tuple(each.name for each in declared), defaults


@functools.cache
def is_view_operator(overload: Any) -> bool:
    """True for an operator whose result is a view. `OpOverload.is_view`: 2.11 to 2.13."""
    return bool(overload.is_view)


@functools.cache
def gives_tensors(overload: Any) -> bool:
    """True for an operator that returns new tensors alone, or one view. `OpOverload._schema`: 2.11 to 2.13."""
    returns = overload._schema.returns
    is_view = is_view_operator(overload) and len(returns) == 1
    return bool(returns) and all(str(each.type) == "Tensor" and (is_view or not each.alias_info) for each in returns)


@functools.cache
def num_results(overload: Any) -> int:
    """Number of values that an operator returns. `OpOverload._schema`: 2.11 to 2.13."""
    return len(overload._schema.returns)


def returns_an_argument(overload: Any) -> bool:
    """True if an operator's first result shares, or may share, memory of an argument. `_schema`: 2.11 to 2.13."""
    return overload._schema.returns[0].alias_info is not None


def functional_form(overload: Any) -> Any:
    """`aten.div.Scalar` for `aten.div_.Scalar`; None if there is none with the same arguments.

    `OpOverload._schema`, `OpOverload._overloadname`: 2.11 to 2.13.
    """
    namespace, _, name = overload._schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.removesuffix("_"), None)
    found = getattr(packet, overload._overloadname, None) if packet is not None and name.endswith("_") else None
    if found is None or found._schema.is_mutable:
        return None
    same = [each.name for each in found._schema.arguments] == [each.name for each in overload._schema.arguments]
    return found if same else None


def overload(namespace: Any, name: str) -> Any:
    """The overload of a name such as "sum.dim_IntList"; None if this version of torch does not have it."""
    packet, _, variant = name.partition(".")
    return getattr(getattr(namespace, packet, None), variant, None)


@functools.cache
def _inductor() -> Any:
    """What is used of Inductor, which takes seconds to import, and warns of what it imports.

    `torch._inductor.compile_fx`, `decomposition`, `exc`, `torch._guards`: 2.11 to 2.13.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torch._guards import TracingContext, tracing
        from torch._inductor import config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.decomposition import select_decomp_table
        from torch._inductor.exc import InvalidCxxCompiler
        from torch.fx.experimental.symbolic_shapes import ShapeEnv
    return SimpleNamespace(
        TracingContext=TracingContext,
        tracing=tracing,
        config=config,
        compile_fx_inner=compile_fx_inner,
        select_decomp_table=select_decomp_table,
        InvalidCxxCompiler=InvalidCxxCompiler,
        ShapeEnv=ShapeEnv,
    )


@functools.cache
def _decompositions() -> dict[Any, Callable[..., Any]]:
    """What Inductor decomposes."""
    return _inductor().select_decomp_table()


def decomposed(
    target: Any, args: Any, kwargs: Any, own: Mapping[Any, Callable[..., Any]] | None = None
) -> fx.GraphModule | None:
    """An operator as a graph of the operators that it is made of; None if it is not decomposed.

    The placeholders stand for the tensors among the arguments, in order; the output is a tuple of its results.

    Args:
        args, kwargs: a call, with tensors that need no values.
        own: functions that decompose operators in another way than Inductor does.

    `FakeTensor.fake_mode`, `make_fx`: 2.11 to 2.13.
    """
    table = {**_decompositions(), **(own or {})}
    if target not in table:
        return None
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]

    def run(*values: Any) -> Any:
        given = iter(values)
        filled = [next(given) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        args, kwargs = tree_unflatten(filled, spec)
        results = target(*args, **kwargs)
        return tuple(results) if isinstance(results, (tuple, list)) else (results,)

    modes = [cast(Any, each).fake_mode for each in tensors if isinstance(each, FakeTensor)]
    with torch.no_grad(), modes[0] if modes else contextlib.nullcontext(), _use_lazy_graph_module(True):
        distinct = [tensor.detach() for tensor in tensors]  # a tensor that is given twice has two placeholders
        return make_fx(run, decomposition_table=table)(*distinct)


_compiling = threading.Lock()
"""Inductor compiles one graph at a time."""


def compile_graph(
    graph: fx.Graph, examples: Sequence[torch.Tensor], placed: tuple[int, ...] = ()
) -> Callable[[list[Any]], Sequence[Any]]:
    """A graph of pointwise operators and reductions as machine code, which takes a list of tensors and empties it.

    Results have the strides that they have in the graph. Compiled code is kept on disk, where Inductor keeps its own.

    Args:
        graph: placeholders, operators, and an output that is a tuple of tensors.
        examples: tensors of the geometry of the placeholders, then of places; their values do not matter.
        placed: which results are written to places instead of being returned.

    Raises:
        PlanError: there is no C++ compiler.

    `compile_fx_inner`, `current_callable` of what it returns: 2.11 to 2.13.
    """
    inductor = _inductor()
    with _compiling, torch.inference_mode(False), torch.no_grad(), _use_lazy_graph_module(True):
        mode = FakeTensorMode(shape_env=inductor.ShapeEnv())  # without an environment Inductor's cache is not used
        fakes = [
            mode.from_tensor(
                torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device=each.device), static_shapes=True
            )
            for each in examples
        ]
        runner = fx.Interpreter(nn.Module(), graph=graph)
        num_inputs = len(examples) - len(placed)

        def run(*values: Any) -> tuple[Any, ...]:
            results = runner.run(*values[:num_inputs])
            for index, place in zip(placed, values[num_inputs:], strict=True):
                place.copy_(results[index])
            return tuple(result for index, result in enumerate(results) if index not in placed)

        with mode:
            traced = make_fx(run, decomposition_table=_decompositions())(*fakes)
        output = traced.graph.output_node()
        results = cast("tuple[fx.Node, ...]", output.args[0])
        output.meta["user_visible_output_idxs"] = [*range(len(results))]
        output.meta["original_output_strides"] = [result.meta["val"].stride() for result in results]
        context = inductor.tracing(inductor.TracingContext(mode))
        with inductor.config.patch(fallback_random=True), mode, context, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                return inductor.compile_fx_inner(traced, fakes, is_inference=True).current_callable
            except Exception as error:
                if isinstance(getattr(error, "inner_exception", error), inductor.InvalidCxxCompiler):
                    raise PlanError(
                        'compute="fused" compiles with a C++ compiler, and there is none. Install g++, name one by '
                        'CXX, or pass compute="eager".'
                    ) from error
                raise


# -- storage -------------------------------------------------------------------------------------------------------


def strides_of(shape: Sequence[int], *, channels_last: bool = False) -> tuple[int, ...]:
    """The strides of a contiguous tensor, or of one whose channels, dimension 1, lie side by side.

    `torch._prims_common`: 2.11 to 2.13.
    """
    make: Any = make_channels_last_strides_for if channels_last else make_contiguous_strides_for
    return tuple(make(shape))


def negated_view(tensor: torch.Tensor) -> torch.Tensor:
    """A view of a tensor that reads as its negative. `torch._neg_view`: 2.11 to 2.13."""
    return torch._neg_view(tensor)  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def same_storage(a: Any, b: Any) -> bool:
    """True for two tensors, real or fake, that share storage. `UntypedStorage._cdata`: 2.11 to 2.13."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return storage_id(a) == storage_id(b)


def geometry_of(tensor: torch.Tensor) -> list[int]:
    """Shape, strides and offset of a tensor whose sizes are no symbols."""
    return cast("list[int]", [*tensor.shape, *tensor.stride(), tensor.storage_offset()])


def storage_id(tensor: torch.Tensor) -> int:
    """A number that tensors of one storage share, real or fake. `UntypedStorage._cdata`: 2.11 to 2.13."""
    return tensor.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def out_variant(overload: Any) -> tuple[Any, str] | None:
    """The form of an operator that writes its output into a given tensor, and the name of the argument for the tensor.

    It is None if there is no such form, or a generated one alone, which computes elsewhere and copies.
    `OpOverload._schema`, `OpOverloadPacket.overloads`, `torch.Tag.generated`: 2.11 to 2.13.
    """
    wanted = [(argument.name, str(argument.type)) for argument in overload._schema.arguments]
    packet = overload.overloadpacket
    for name in packet.overloads():
        variant = getattr(packet, name)
        arguments = variant._schema.arguments
        outputs = [argument.name for argument in arguments if argument.is_out]
        given = [(argument.name, str(argument.type)) for argument in arguments if not argument.is_out]
        if len(outputs) == 1 and given == wanted and torch.Tag.generated not in variant.tags:
            return variant, outputs[0]
    return None


def zero_all(tensors: Sequence[torch.Tensor]) -> None:
    """Write zeros to all tensors in one call. `torch._foreach_zero_`: 2.11 to 2.13."""
    torch._foreach_zero_(list(tensors))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def writes_lists(name: str) -> bool:
    """True for the name of a function that writes into each tensor of a list, as `torch._foreach_mul_`: 2.11 to 2.13.

    Each element follows from those at its place alone.
    """
    return name.startswith("_foreach_") and name.endswith("_")


def copy_all(into: Sequence[torch.Tensor], source: Sequence[torch.Tensor]) -> None:
    """Copy each tensor into its counterpart in one call. `torch._foreach_copy_`: 2.11 to 2.13."""
    torch._foreach_copy_(list(into), list(source))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


# -- modules -------------------------------------------------------------------------------------------------------

COMPOSED = REGISTRY_KEY
"""Attribute in which a module keeps the names of the composable parallelisms that were applied to it.

`torch.distributed._composable.contract`: 2.11 to 2.13."""
CONVERSION = "_apply"
"""Name of the method behind `Module.to`, `half`, `cuda` and the like, which they also call on submodules: 2.11 to 2.13.

No public method does the work of all of them. ZeroModule overrides it, and modules that are taken over hide it."""
CALL, SAVE, LOAD = "_call_impl", "_save_to_state_dict", "_load_from_state_dict"
"""Methods behind a call of a module, and behind the part of a state dict that is the module's own: 2.11 to 2.13."""
TENSOR_TABLES = ("_parameters", "_buffers")
"""Attributes in which a module holds the parameters and buffers that it registers: 2.11 to 2.13."""
MODULE_TABLE = "_modules"
"""Attribute in which a module holds its submodules: 2.11 to 2.13."""
TABLES = (*TENSOR_TABLES, MODULE_TABLE)
"""All attributes in which a module holds what it registers."""
RNN_CACHES = ("_flat_weights", "_flat_weight_refs")
"""Attributes that an nn.RNNBase rebuilds from its parameters in every call: 2.11 to 2.13."""
_HOOKS_OF_STATE_DICTS = (
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
)  # fmt: skip
"""Attributes in which a module holds its hooks of state dicts: 2.11 to 2.13."""
_SHARED_TABLES = (*TENSOR_TABLES, MODULE_TABLE, "_non_persistent_buffers_set", *_HOOKS_OF_STATE_DICTS)
"""Attributes in which a module holds what `share_tables` shares: 2.11 to 2.13."""
EXTRA_STATE = "_extra_state"
"""Key, behind the module's name, of the result of `Module.get_extra_state` in a state dict: 2.11 to 2.13."""


def is_compiled(module: nn.Module) -> bool:
    """True for what torch.compile returns. `OptimizedModule._orig_mod`: 2.11 to 2.13."""
    return "_orig_mod" in vars(module)["_modules"]


def compiled_itself(module: nn.Module) -> bool:
    """True after `module.compile()`. `Module._compiled_call_impl`: 2.11 to 2.13."""
    return module._compiled_call_impl is not None  # pyright: ignore[reportPrivateUsage]


def own_method(module: nn.Module, name: str) -> Callable[..., Any]:
    """A method as the module's class has it, also where an attribute of the instance hides it."""
    return getattr(type(module), name).__get__(module)


def is_persistent(module: nn.Module, buffer: str) -> bool:
    """True if a buffer is saved in state dicts. `Module._non_persistent_buffers_set`: 2.11 to 2.13."""
    return buffer not in module._non_persistent_buffers_set  # pyright: ignore[reportPrivateUsage]


def tensor_tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The tables of a module that map attributes to its own parameters and to its own buffers; both may be written."""
    private = vars(module)
    return private[TENSOR_TABLES[0]], private[TENSOR_TABLES[1]]


def first_parameter(module: nn.Module) -> Any:
    """What `next(module.parameters(), None)` gives, found at once where it is the module's own: 2.11 to 2.13."""
    table = object.__getattribute__(module, "__dict__")[TENSOR_TABLES[0]]  # also in a trace, which sees other ways
    own = next((each for each in table.values() if each is not None), None)
    return next(module.parameters(), None) if own is None else own


def share_tables(module: nn.Module, source: nn.Module) -> None:
    """Let a module share the tables of parameters, buffers, submodules and hooks of state dicts of another module."""
    for table in _SHARED_TABLES:
        vars(module)[table] = vars(source)[table]


@contextlib.contextmanager
def without_hooks_of_state_dicts(module: nn.Module) -> Generator[None]:
    """Let a module have no hooks of state dicts in the block, which may hold what stands for the module."""
    own = {name: vars(module)[name] for name in _HOOKS_OF_STATE_DICTS}
    vars(module).update({name: type(table)() for name, table in own.items()})
    try:
        yield
    finally:
        vars(module).update(own)


def own_initialiser(module: nn.Module) -> Callable[[], object] | None:
    """The method of a module that initialises its parameters, if it has one.

    `_reset_parameters`, of nn.MultiheadAttention and nn.Transformer: 2.11 to 2.13.
    """
    methods = (getattr(module, name, None) for name in ("reset_parameters", "_reset_parameters"))
    return next((method for method in methods if callable(method)), None)


def add_metadata(state: dict[str, Any], source: dict[str, Any]) -> None:
    """Give a state dict the module versions of another one. The attribute `_metadata` of state dicts: 2.11 to 2.13."""
    found = getattr(source, "_metadata", {})  # a state dict of the model's own making may have none
    if hasattr(state, "_metadata"):
        cast(Any, state)._metadata.update(found)
    elif isinstance(state, OrderedDict):
        cast(Any, state)._metadata = found


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The table of a module's own buffers, which may be written. `Module._buffers`: 2.11 to 2.13."""
    return module._buffers  # pyright: ignore[reportPrivateUsage]


def load_hooks(module: nn.Module) -> list[Callable[..., object]]:
    """The hooks that run before a module loads a state dict. `Module._load_state_dict_pre_hooks`: 2.11 to 2.13."""
    return list(module._load_state_dict_pre_hooks.values())  # pyright: ignore[reportPrivateUsage]


def hooks_after_load(module: nn.Module) -> list[Callable[..., object]]:
    """The hooks that run when a module has loaded a state dict. `Module._load_state_dict_post_hooks`: 2.11 to 2.13."""
    return list(module._load_state_dict_post_hooks.values())  # pyright: ignore[reportPrivateUsage]


def loads_in_its_own_way(module: nn.Module) -> bool:
    """True if the class of a module has a `_load_from_state_dict` of its own."""
    return getattr(type(module), LOAD) is not getattr(nn.Module, LOAD)


def metadata_of(state: Any, path: str) -> dict[str, Any]:
    """What a state dict says of a module's version. The attribute `_metadata` of state dicts: 2.11 to 2.13."""
    metadata = getattr(state, "_metadata", None)
    return {} if metadata is None else dict(metadata.get(path, {}))


def forget_flat_weights(module: nn.Module) -> None:
    """Let the weak references of an RNN to its weights be dead ones, so that its next call makes them anew.

    `_flat_weight_refs`, as many as `_flat_weights_names`: 2.11 to 2.13.
    """
    if isinstance(module, nn.RNNBase):
        rnn = cast(Any, module)
        rnn._flat_weight_refs = [weakref.ref(nn.Identity()) for _ in rnn._flat_weights_names]


def incompatible_keys(missing: list[str], unexpected: list[str]) -> Any:
    """The return value of `Module.load_state_dict`. `_IncompatibleKeys`: 2.11 to 2.13."""
    return nn.modules.module._IncompatibleKeys(missing, unexpected)  # pyright: ignore[reportPrivateUsage]


# -- autograd ------------------------------------------------------------------------------------------------------


_version_of = operator.attrgetter("_version")


def num_changes(tensors: Iterable[torch.Tensor]) -> int:
    """Number of changes in place of all tensors together. `Tensor._version`: 2.11 to 2.13."""
    return sum(map(_version_of, tensors))


def has_hooks_on_saved_tensors() -> bool:
    """True if hooks of `torch.autograd.graph.saved_tensors_hooks` are on; True if torch does not tell.

    `torch._C._autograd._top_saved_tensors_default_hooks`: seen in 2.13.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)  # pyright: ignore
    return top is None or top(True) is not None


def check_functions() -> tuple[Any, Any, Any]:
    """Functions that look at the values of tensors: see `replaced_checks`. 2.11 to 2.13."""
    return torch._check_tensor_all_with, torch._assert, torch._is_all_true  # pyright: ignore


@contextlib.contextmanager
def replaced_checks(all_with: Any, all_true: Any, assertion: Any, is_all_true: Any) -> Generator[None]:
    """Let functions of torch that look at values be others in the block.

    `torch._check_tensor_all_with`, `torch._check_tensor_all`, `torch._assert`, and `torch._is_all_true`, which
    torch.distributions uses: 2.11 to 2.13.
    """
    with (
        patch.object(torch, "_check_tensor_all_with", all_with),
        patch.object(torch, "_check_tensor_all", all_true),
        patch.object(torch, "_assert", assertion),
        patch.object(torch, "_is_all_true", is_all_true),
    ):
        yield


def is_gradient_wanted(tensor: torch.Tensor) -> bool:
    """True for a tensor with a hook or retain_grad(). `Tensor._backward_hooks`: 2.11 to 2.13."""
    return tensor.retains_grad or bool(tensor._backward_hooks)  # pyright: ignore[reportPrivateUsage]


def changes_of_each(tensors: Sequence[Any], indices: Sequence[int]) -> list[int]:
    """Number of changes in place of each chosen tensor; 0 for inference tensors. `Tensor._version`: 2.11 to 2.13."""
    return [0 if tensors[index].is_inference() else tensors[index]._version for index in indices]


def gradient_hooks(params: Sequence[nn.Parameter]) -> list[tuple[int, Any, Any]]:
    """Index, hooks of `register_hook` and hooks of `register_post_accumulate_grad_hook` of each parameter with hooks.

    `Tensor._backward_hooks`, `Tensor._post_accumulate_grad_hooks`: 2.11 to 2.13.
    """
    return [
        (index, param._backward_hooks, param._post_accumulate_grad_hooks)  # pyright: ignore[reportPrivateUsage]
        for index, param in enumerate(params)
        if param._backward_hooks or param._post_accumulate_grad_hooks  # pyright: ignore[reportPrivateUsage]
    ]


@contextlib.contextmanager
def outside_of_autograd_modes() -> Generator[None]:
    """Switch off anomaly detection and hooks on saved tensors (of a checkpoint, of save_on_cpu) inside the block.

    `torch._C._autograd._top_saved_tensors_default_hooks`: 2.11 to 2.13.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    with contextlib.ExitStack() as stack:
        if hooks is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        yield


def function_mode_of_user() -> str | None:
    """The class of a TorchFunctionMode of the user that is active, neither torch's nor ours; None if there is none.

    `torch._C._len_torch_function_stack`, `torch.overrides._get_current_function_mode_stack`: 2.11 to 2.13.
    """
    if not torch._C._len_torch_function_stack():  # pyright: ignore
        return None
    modes = [type(mode) for mode in torch.overrides._get_current_function_mode_stack()]  # pyright: ignore
    return next((each.__qualname__ for each in modes if not each.__module__.startswith(("torch.", "fxzero."))), None)


def in_function_transform() -> bool:
    """True inside torch.func.grad, vmap and the like. `torch._C._functorch`: 2.11 to 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def is_of_parameter(tensor: Tensor) -> bool:
    """True for a parameter, and for a view of one. `Tensor._base`: 2.11 to 2.13."""
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)  # pyright: ignore


def in_jit_trace() -> bool:
    """True while torch.jit.trace runs. `torch.jit.is_tracing`: 2.11 to 2.13."""
    return cast(Any, torch.jit).is_tracing()


def in_forward_ad() -> bool:
    """True inside a level of forward-mode AD, also of torch.func.jvp.

    `torch.autograd.forward_ad._current_level`: 2.11 to 2.13.
    """
    return forward_ad._current_level >= 0  # pyright: ignore[reportPrivateUsage]


def wrap_engine_run(wrapper: Callable[..., Any]) -> None:
    """Let `torch.autograd.backward` and `grad` run the engine through a function that gets torch's own one first.

    `torch.autograd._engine_run_backward`: 2.11 to 2.13.
    """
    autograd = cast(Any, torch.autograd)
    autograd._engine_run_backward = functools.partial(wrapper, autograd._engine_run_backward)


def runs_in_this_backward(node: Any) -> bool:
    """True if the running backward will execute a node of its graph. `_will_engine_execute_node`: 2.11 to 2.13."""
    return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportPrivateUsage]


# -- Python state of modules ---------------------------------------------------------------------------------------

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Attributes in which a module holds its hooks: 2.11 to 2.13."""
MODULE_ATTRIBUTES = frozenset(
    {*_HOOKS, *TENSOR_TABLES, MODULE_TABLE, "_forward_hooks_with_kwargs", "_forward_hooks_always_called"}
    | {"_forward_pre_hooks_with_kwargs", "_is_full_backward_hook", "_non_persistent_buffers_set", "_state_dict_hooks"}
    | {"_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks", "_compiled_call_impl"}
)
"""Attributes that every module has for torch's own use: 2.11 to 2.13."""


def registered(module: nn.Module) -> tuple[dict[str, Any], ...]:
    """The tables in which `Module.__getattr__` looks: 2.11 to 2.13."""
    return tuple(vars(module).get(table, {}) for table in TABLES)


def tensors_of(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The tables of a module's own parameters and buffers, by the names of their attributes: 2.11 to 2.13."""
    return {name: vars(module)[name] for name in TENSOR_TABLES}


def children_of(module: nn.Module) -> dict[str, Any]:
    """The table of a module's own submodules. `Module._modules`: 2.11 to 2.13."""
    return vars(module)[MODULE_TABLE]


def hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of a module's forward and backward hooks: 2.11 to 2.13."""
    return tuple(vars(module)[table] for table in _HOOKS)


def copy_hooks(module: nn.Module, copied: nn.Module, memo: dict[int, Any]) -> None:
    """Give a copy of a module the hooks of the module: 2.11 to 2.13."""
    for name in _HOOKS_OF_STATE_DICTS:
        vars(copied)[name].update(copy.deepcopy(vars(module)[name], memo))
    shared = {*_SHARED_TABLES, "_compiled_call_impl"}
    for name in MODULE_ATTRIBUTES - shared:
        if name in vars(module):
            vars(copied)[name] = copy.deepcopy(vars(module)[name], memo)


def forward_hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of a module's hooks before and after its forward: 2.11 to 2.13."""
    return vars(module)[_HOOKS[1]], vars(module)[_HOOKS[0]]


def backward_hooks_of(module: nn.Module) -> tuple[dict[int, Any], ...]:
    """The tables of a module's hooks before and after its backward: 2.11 to 2.13."""
    return tuple(vars(module)[table] for table in _HOOKS[2:])


def global_hooks() -> tuple[dict[int, Any], ...]:
    """The tables of hooks that run for every module. `torch.nn.modules.module._global_*_hooks`: 2.11 to 2.13."""
    return tuple(getattr(nn.modules.module, f"_global{table}") for table in _HOOKS)


def buffer_tables(module: nn.Module) -> tuple[Any, Any]:
    """The table of a module's own buffers, and the names of those that a state dict leaves out: 2.11 to 2.13."""
    return vars(module)[TENSOR_TABLES[1]], vars(module)["_non_persistent_buffers_set"]


# -- optimizers/ ---------------------------------------------------------------------------------------------------


_COPIES = frozenset(
    {
        *("abs_", "alias", "clone", "copy_", "detach", "empty_like", "fill_", "full_like", "new_empty", "set_"),
        *("new_full", "new_ones", "new_zeros", "ones_like", "_to_copy", "view", "_unsafe_view", "zero_", "zeros_like"),
        *("expand", "lift_fresh", "masked_fill", "masked_fill_", "new_empty_strided"),
    }
)
"""Names of element-wise operators without the tag: 2.11 to 2.13."""
_FOREACH_REDUCTIONS = frozenset({"_foreach_norm", "_foreach_max"})
"""Of the operators on lists, those that are not element-wise: 2.11 to 2.13."""


def is_elementwise(func: Any) -> bool:
    """True if each element of the result of an ATen operator depends on one element of each tensor that it takes.

    Names of operators: 2.11 to 2.13.
    """
    name = func.overloadpacket.__name__
    if name.startswith(("_foreach_", "_fused_")):
        return name not in _FOREACH_REDUCTIONS
    return torch.Tag.pointwise in func.tags or name in _COPIES


def is_nested_step(optimizer: torch.optim.Optimizer) -> bool:
    """True in a hook before a step that an optimizer takes inside of a step of its own, as subclasses do.

    The local `self` of `torch.optim.Optimizer.profile_hook_step`'s wrapper: 2.11 to 2.13.
    """
    num_steps, frame = 0, inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == "wrapper" and frame.f_globals.get("__name__") == "torch.optim.optimizer":
            num_steps += frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return num_steps > 1


def _unwrapped_cell(function: Callable[..., Any]) -> Any:
    """The cell in which a function of `torch.nn.utils.clip_grad` keeps what it calls without gradients."""
    wanted = function.__wrapped__  # type: ignore[attr-defined]
    return next(cell for cell in function.__closure__ or () if cell.cell_contents is wanted)


_in_place_of_norms: dict[str, Any] = {}


def wrap_initialisers(refuse_shape: Callable[[Tensor], object], refuse_draw: Callable[[Tensor], object]) -> None:
    """Let functions of `torch.nn.init` that look at the shape of a tensor, and those that draw, call others before.

    `_calculate_fan_in_and_fan_out`, which Xavier's and Kaiming's and `reset_parameters` of torch's layers call, and
    `_no_grad_uniform_`, `_no_grad_normal_`, `_no_grad_trunc_normal_`: 2.11 to 2.13.
    """
    init = cast(Any, torch.nn.init)
    of_shape = "_calculate_fan_in_and_fan_out", "orthogonal_", "eye_", "dirac_", "sparse_"
    of_draw = "_no_grad_uniform_", "_no_grad_normal_", "_no_grad_trunc_normal_"
    for names, before in ((of_shape, refuse_shape), (of_draw, refuse_draw)):
        for name in names:
            setattr(init, name, _behind(before, getattr(init, name)))


def _behind(before: Callable[[Tensor], object], function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a tensor that calls another one with the tensor first."""

    @functools.wraps(function)
    def call(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        before(tensor)
        return function(tensor, *args, **kwargs)

    return call


def wrap_norms(total_norm: Callable[..., Tensor], before_clip: Callable[[Any, Any], object]) -> None:
    """Let `torch.nn.utils.get_total_norm` and `clip_grad_norm_` call functions of ours, however they were imported.

    `torch.nn.utils.clip_grad._get_total_norm`, and that both are closures of `_no_grad`: 2.11 to 2.13.

    Args:
        total_norm: called instead of the first, with the original as its first argument.
        before_clip: called with the list of parameters and `max_norm` before the second one's own work.
    """
    if _in_place_of_norms:
        return
    clip_grad = torch.nn.utils.clip_grad
    of_norm = _unwrapped_cell(clip_grad._get_total_norm)  # pyright: ignore[reportPrivateUsage]
    of_clip = _unwrapped_cell(clip_grad.clip_grad_norm_)
    norm, clip = of_norm.cell_contents, of_clip.cell_contents

    @functools.wraps(norm)
    def own_norm(*args: Any, **kwargs: Any) -> Tensor:
        return total_norm(norm, *args, **kwargs)

    @functools.wraps(clip)
    def own_clip(parameters: Any, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(parameters, Tensor):
            parameters = list(parameters)
        max_norm = args[0] if args else kwargs.get("max_norm")
        before_clip([parameters] if isinstance(parameters, Tensor) else parameters, max_norm)
        return clip(parameters, *args, **kwargs)

    _in_place_of_norms.update(norm=own_norm, clip=own_clip)
    of_norm.cell_contents, of_clip.cell_contents = own_norm, own_clip


# -- checkpoints: checkpoint/, optimizers/ -------------------------------------------------------------------------


def become_dtensor(kind: type[Any], flat: torch.Tensor, mesh: Any, shape: Sequence[int], strides: Sequence[int]) -> Any:
    """An object of a subclass of DTensor with the shape of a whole tensor, and any local tensor.

    It is made from an empty tensor: `StateDictStager` takes a wrapper with a storage offset, which it would have from
    its local tensor, for one with memory. `DTensor._local_tensor`: 2.11 to 2.13.
    """
    from torch.distributed.tensor import DTensor, Shard  # takes long to import

    made: Any = DTensor.from_local(
        flat.new_empty(0), mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=tuple(strides)
    )
    made._local_tensor = flat
    made.__class__ = kind
    return made


def dtensor_around(
    local: torch.Tensor, mesh: Any, placement: Any, shape: Sequence[int], *, requires_grad: bool
) -> torch.Tensor:
    """A contiguous DTensor of a mesh of one dimension whose local tensor is that object; a leaf of autograd.

    `DTensor(local, spec, requires_grad=)`, `DTensorSpec`, `TensorMeta`: 2.11 to 2.13.
    """
    from torch.distributed.tensor import DTensor  # takes long to import
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(torch.Size(shape), tuple(make_contiguous_strides_for(torch.Size(shape))), local.dtype)
    make = cast(Any, DTensor)
    return make(local, DTensorSpec(mesh, (placement,), tensor_meta=meta), requires_grad=requires_grad)


REPLACED = "_fxzero_replaced"
"""The attribute of a DTensor in whose place a model has its local tensor."""


def has_dtensors(types: Sequence[type]) -> bool:
    """True if DTensors are among the types of the arguments of an operator."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(issubclass(each, module.DTensor) for each in types)


def local_of(dtensor: Any) -> torch.Tensor:
    """The local tensor of a DTensor. `DTensor._local_tensor`: 2.11 to 2.13."""
    return dtensor._local_tensor


def copy_slots(kind: type[Any]) -> None:
    """Let a subclass of DTensor name the slots of its base, which `StateDictStager` copies. 2.11 to 2.13."""
    kind.__slots__ = kind.__mro__[1].__slots__


def without_tensor_subclasses() -> contextlib.AbstractContextManager[None]:
    """Inside of it `__torch_function__` is not called. `torch._C.DisableTorchFunctionSubclass`: 2.11 to 2.13."""
    return torch._C.DisableTorchFunctionSubclass()  # type: ignore[attr-defined]


def optimizers_asked_for() -> tuple[torch.optim.Optimizer, ...] | None:
    """The optimizers of the call of `get_state_dict`, or of its like, that is beginning; None outside of such a call.

    `torch.distributed.checkpoint.state_dict._verify_options(model, optims, ...)`: 2.11 to 2.13.
    """
    frame = _frame_of("torch.distributed.checkpoint.state_dict", "_verify_options")
    return None if frame is None else tuple(frame.f_locals["optims"])


def is_making_optimizer_state() -> bool:
    """True in the step that torch takes with zero gradients, so that an optimizer makes its state.

    `torch.distributed.checkpoint.state_dict._init_optim_state`: 2.11 to 2.13.
    """
    return _frame_of("torch.distributed.checkpoint.state_dict", "_init_optim_state") is not None


def _frame_of(module: str, function: str) -> Any:
    frame = inspect.currentframe()
    while frame is not None:
        if frame.f_code.co_name == function and frame.f_globals.get("__name__") == module:
            return frame
        frame = frame.f_back
    return None


def seen_as_dict(kind: type[dict[Any, Any]]) -> None:
    """Let `tree_map` look into a subclass of dict as into a dict. `torch.utils._pytree`: 2.11 to 2.13."""

    def flatten(value: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
        return list(dict.values(value)), list(dict.keys(value))

    pytree.register_pytree_node(kind, flatten, lambda values, keys: dict(zip(keys, values, strict=True)))


def make_optimizer_state(optimizer: torch.optim.Optimizer) -> None:
    """Let an optimizer without state and gradients make its state, in a step that changes no parameter.

    `torch.distributed.checkpoint.state_dict._init_optim_state`: 2.11 to 2.13.
    """
    from torch.distributed.checkpoint import state_dict

    state_dict._init_optim_state(optimizer)  # pyright: ignore[reportPrivateUsage]
