"""Every private torch symbol that fxzero uses, in one place, with the versions it was seen in."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Generator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.utils.checkpoint
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.distributed.distributed_c10d import Store
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.fx.node import map_arg


def direct_call(op: Any) -> Any:
    """The builtin behind an operator overload: one Python call instead of two. `OpOverload._op`: 2.11 to 2.13."""
    return getattr(op, "_op", op)


def backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """The name of the backend that a group uses on a device, "none" if it has none there.

    `ProcessGroup._get_backend`: 2.11 to 2.13.
    """
    try:
        return cast(Any, group._get_backend(device)).name()
    except RuntimeError:
        return "none"


def all_gather_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """`(full, shard)`: gather into one tensor, one Python call. `ProcessGroup._allgather_base`: 2.11 to 2.13."""
    return group._allgather_base


def reduce_scatter_base(group: dist.ProcessGroup) -> Callable[..., dist.Work]:
    """`(shard, full, options)`, as above. `ProcessGroup._reduce_scatter_base`: 2.11 to 2.13."""
    return group._reduce_scatter_base


def default_store() -> Store:
    """The store through which the default process group was set up. `_get_default_store`: 2.11 to 2.13."""
    return dist.distributed_c10d._get_default_store()  # pyright: ignore[reportPrivateUsage]


# -- tracing: capture/ ---------------------------------------------------------------------------------------------


def is_operator(target: Any) -> bool:
    """True for an ATen operator, as traced graphs call them. `torch._ops.OpOverload`: 2.11 to 2.13."""
    return isinstance(target, cast(Any, torch)._ops.OpOverload)


def tensor_tables(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters and buffers that a module itself holds, by attribute. `_parameters`, `_buffers`: 2.11 to 2.13."""
    private = cast(Any, module)
    return private._parameters, private._buffers


def fake_tensor_mode() -> Any:
    """Tensors without memory; real ones that a model holds become constants. `FakeTensorMode`: 2.11 to 2.13."""
    return FakeTensorMode(allow_non_fake_inputs=True)


def is_fake(tensor: torch.Tensor) -> bool:
    """True for a tensor without memory. `FakeTensor`: 2.11 to 2.13."""
    return isinstance(tensor, FakeTensor)


def fake_result(node: fx.Node) -> Any:
    """What a new node of a traced graph gives, by the values of its arguments. `FakeTensor.fake_mode`: 2.11 to 2.13."""
    arguments = [argument.meta["val"] for argument in node.all_input_nodes]
    modes = [cast(Any, value).fake_mode for value in arguments if isinstance(value, FakeTensor)]
    args, kwargs = map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
    with torch.no_grad(), modes[0] if modes else contextlib.nullcontext():
        return cast(Any, node.target)(*args, **kwargs)


def answer_device(op: Any, args: Any) -> torch.device | None:
    """The answer where `op` asks a fake tensor for its device, which is two thirds of what a dispatch mode sees.

    `prim.device`, `FakeTensor.fake_device`: 2.11 to 2.13.
    """
    if op is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
        return args[0].fake_device
    return None


def trace_fx(function: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """The ATen operators that a function of fake tensors runs. `make_fx`: 2.11 to 2.13."""

    def traced(*values: Any) -> Any:  # make_fx counts the arguments of plain functions right, not of bound methods
        return function(*values)

    return make_fx(traced)(*inputs)


def traced_graph() -> fx.Graph:
    """The graph that `trace_fx` is making right now. `get_proxy_mode`: 2.11 to 2.13."""
    return cast(Any, get_proxy_mode()).tracer.graph


@contextlib.contextmanager
def eager_checkpoints() -> Generator[None]:
    """Let selective checkpoints recompute while they are traced; under a tracer they would only annotate nodes.

    `torch.utils.checkpoint._is_compiling`: 2.11 to 2.13.
    """
    checkpoint = cast(Any, torch.utils.checkpoint)
    before = checkpoint._is_compiling
    checkpoint._is_compiling = lambda *args, **kwargs: False
    try:
        yield
    finally:
        checkpoint._is_compiling = before


def next_sequence_number() -> int:
    """The number that the next autograd node of this thread gets. `_get_sequence_nr`: 2.11 to 2.13."""
    return cast(Any, torch.autograd)._get_sequence_nr()


def sequence_number(node: Any) -> int:
    """The number of an autograd node. `Node._sequence_nr`: 2.11 to 2.13."""
    return node._sequence_nr()


def apply_pending_updates(tensor: torch.Tensor) -> None:
    """Trace the updates that functionalization still holds back. `torch._sync`: 2.11 to 2.13."""
    private = cast(Any, torch)
    if private._is_functional_tensor(tensor):
        private._sync(tensor)


# -- graphs, storage, modules --------------------------------------------------------------------------------------


def is_overload(target: Any) -> bool:
    """True for an ATen (or custom) operator overload, as graphs of `make_fx` have them. `torch._ops`: 2.11 to 2.13."""
    return isinstance(target, torch._ops.OpOverload)  # pyright: ignore[reportPrivateUsage]


@functools.cache
def is_mutable(overload: Any) -> bool:
    """True if an operator writes to an argument, or may. `OpOverload._schema`: 2.11 to 2.13."""
    return overload._schema.is_mutable


def argument(node: Any, name: str) -> Any:
    """What a node passes for an argument of its operator, or the default; None if there is no such argument.

    `OpOverload._schema`: 2.11 to 2.13.
    """
    for index, declared in enumerate(node.target._schema.arguments):
        if declared.name == name:
            given = node.args[index] if index < len(node.args) else declared.default_value
            return node.kwargs.get(name, given)
    return None


def same_storage(a: Any, b: Any) -> bool:
    """True for two tensors that share storage, also without memory. `UntypedStorage._cdata`: 2.11 to 2.13."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return False
    return a.untyped_storage()._cdata == b.untyped_storage()._cdata  # pyright: ignore[reportPrivateUsage]


def out_variant(overload: Any) -> tuple[Any, str] | None:
    """The form of an operator that writes its one output into a given tensor, and the name of that argument.

    None if there is none, or only a generated one, which computes elsewhere and copies. `OpOverload._schema`,
    `OpOverloadPacket.overloads`, `torch.Tag.generated`: 2.11 to 2.13.
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


def written_arguments(node: Any) -> list[Any]:
    """What a node passes for the arguments that its operator writes to. `OpOverload._schema`: 2.11 to 2.13."""
    declared = node.target._schema.arguments
    return [argument(node, a.name) for a in declared if a.alias_info is not None and a.alias_info.is_write]


def zero_all(tensors: Sequence[torch.Tensor]) -> None:
    """Write zeros to all tensors in one call. `torch._foreach_zero_`: 2.11 to 2.13."""
    torch._foreach_zero_(list(tensors))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def copy_all(into: Sequence[torch.Tensor], source: Sequence[torch.Tensor]) -> None:
    """Copy each tensor into its counterpart in one call. `torch._foreach_copy_`: 2.11 to 2.13."""
    torch._foreach_copy_(list(into), list(source))  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]


def buffers_of(module: nn.Module) -> dict[str, torch.Tensor | None]:
    """The buffers that a module itself registers, for reading and writing. `Module._buffers`: 2.11 to 2.13."""
    return module._buffers  # pyright: ignore[reportPrivateUsage]


def load_hooks(module: nn.Module) -> list[Callable[..., object]]:
    """What a module runs on a state dict before it loads it. `Module._load_state_dict_pre_hooks`: 2.11 to 2.13."""
    return list(module._load_state_dict_pre_hooks.values())  # pyright: ignore[reportPrivateUsage]


def forget_flat_weights(module: nn.Module) -> None:
    """Drop the weak references of RNNs to their weights, which they make anew. `_flat_weight_refs`: 2.11 to 2.13."""
    if isinstance(module, nn.RNNBase):
        module._flat_weight_refs = []  # pyright: ignore[reportPrivateUsage]


def incompatible_keys(missing: list[str], unexpected: list[str]) -> Any:
    """What `Module.load_state_dict` returns. `_IncompatibleKeys`: 2.11 to 2.13."""
    return nn.modules.module._IncompatibleKeys(missing, unexpected)  # pyright: ignore[reportPrivateUsage]


# -- autograd ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def outside_of_autograd_modes() -> Generator[None]:
    """Let a trace see nothing of anomaly detection and of hooks on saved tensors (a checkpoint, save_on_cpu).

    `torch._C._autograd._top_saved_tensors_default_hooks`: 2.11 to 2.13.
    """
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore
    with contextlib.ExitStack() as stack:
        if hooks is not None:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved))
        if torch.is_anomaly_enabled():
            stack.enter_context(torch.autograd.set_detect_anomaly(False))
        yield


def in_function_transform() -> bool:
    """True inside torch.func.grad, vmap and the like. `torch._C._functorch`: 2.11 to 2.13."""
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore


def runs_in_this_backward(node: Any) -> bool:
    """Whether the running backward will come to a node of its graph. `_will_engine_execute_node`: 2.11 to 2.13."""
    return torch._C._will_engine_execute_node(node)  # pyright: ignore[reportPrivateUsage]
