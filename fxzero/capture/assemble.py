"""Turn a traced graph into a StepGraph: placeholders first, writes to buffers at the end of forward, no idle nodes."""

import operator
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from fxzero import torch_internals
from fxzero.capture.joint import Joint
from fxzero.capture.kernels.batch_norm import writes_undeclared
from fxzero.capture.written_params import add_to_outputs, check_written
from fxzero.errors import CaptureError
from fxzero.graph import ops
from fxzero.graph.aliasing import is_view
from fxzero.graph.layout import ParamSpec
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, info, is_observer, role
from fxzero.graph.sharding import Sharding
from fxzero.graph.step import StepGraph

aten = torch.ops.aten

_KEPT_META = ("val", "stack_trace", META_KEY)
_NO_OPS = frozenset({aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default, aten.lift_fresh.default})


def assemble(
    root: fx.GraphModule, joint: Joint, module: nn.Module, params: Mapping[str, ParamSpec], sharding: Sharding
) -> StepGraph:
    """The StepGraph of a traced, functional graph.

    Raises:
        CaptureError: the forward writes a parameter that it must not write, or the model holds a tensor that requires
            grad outside of modules.
    """
    graph, constants, results = _copy_graph(root)
    _check_constants(constants, module, root.graph)
    remaining = iter(results)
    outputs = [next(remaining) for _ in range(joint.num_outputs)]
    rebound = {name: cast(fx.Node, next(remaining)) for name in joint.rebound}
    grads = {name: grad for name in joint.grads if (grad := next(remaining)) is not None}
    _check_dense(grads)
    of_input = {index: next(remaining) for index in joint.input_grads}
    step = StepGraph(graph, dict(params), sharding, constants)
    grads_of_inputs = [of_input.get(index) for index in range(len(step.nodes(Role.INPUT)))]
    step.set_output(outputs, grads, [*grads_of_inputs, *remaining])
    _note_uncertain(grads)
    _write_back(step, rebound)
    _remove_no_ops(step)
    graph.eliminate_dead_code()
    check_written(step)
    _detach_outputs(step)
    _copy_observed(step)
    for target in constants.keys() - {cast(str, node.target) for node in graph.find_nodes(op="get_attr")}:
        del constants[target]
    graph.lint()
    return step


def _copy_graph(root: fx.GraphModule) -> tuple[fx.Graph, dict[str, Tensor], list[Any]]:
    """A new graph: placeholders, one get_attr per constant, the rest; the constants; what the old graph returned."""
    graph = torch_internals.PlainGraph()
    copies: dict[fx.Node, fx.Node] = {}
    constants: dict[str, Tensor] = {}
    known: dict[int, fx.Node] = {}
    place = {"placeholder": 0, "get_attr": 1}
    *nodes, output = sorted(root.graph.nodes, key=lambda node: place.get(node.op, 2))
    for node in nodes:
        constant = getattr(root, cast(str, node.target)) if node.op == "get_attr" else None
        if id(constant) in known:
            copies[node] = known[id(constant)]
            continue
        copy = copies[node] = graph.node_copy(node, copies.__getitem__)
        copy.meta = {key: node.meta[key] for key in _KEPT_META if key in node.meta}
        if constant is not None:
            constants[cast(str, node.target)], known[id(constant)] = constant, copy
            copy.meta[META_KEY] = NodeInfo(Role.CONSTANT)
    graph.output(())
    return graph, constants, [copies.get(result) for result in output.args[0]]


def _check_constants(constants: dict[str, Tensor], module: nn.Module, graph: fx.Graph) -> None:
    for target, constant in constants.items():
        if torch_internals.is_fake(constant):
            raise CaptureError(
                f"A tensor that was made while the model was traced before is read again{_line_of(graph, target)}. "
                "Keep no tensor in functools.cache, a global or a closure; make it a buffer."
            )
        if constant.grad_fn is not None:
            raise CaptureError(
                f"The forward computes with a tensor of an earlier call, {list(constant.shape)}, that has a gradient"
                f"{_line_of(graph, target)}. A backward would have to go on through that call. Cut the history off "
                "(self.h.detach()), in a tensor, or a tuple, list or dict of tensors, that an attribute holds."
            )
        if constant.requires_grad:
            names = [name for name, param in module.named_parameters() if param is constant]
            what = f"parameter {names[0]}" if names else f"a tensor that requires grad, {list(constant.shape)},"
            raise CaptureError(
                f"The forward reads {what} past the module that owns it: from a list, a closure or another module"
                f"{_line_of(graph, target)}. Read it as an attribute of its module (self.weight), where its gathered "
                "values are; nn.ParameterList holds parameters in a list."
            )


def check_lstm(graph: fx.Graph) -> None:
    """Refuse oneDNN's LSTM, which makes the workspace of its backward only under autograd."""
    for node in graph.find_nodes(op="call_function", target=aten.mkldnn_rnn_layer.default):
        raise CaptureError(
            f"{node.target} (nn.LSTM on the CPU, module '{info(node).fqn}') has no backward outside autograd. Call the "
            "LSTM under torch.backends.mkldnn.flags(enabled=False), or use nn.GRU.",
            info(node).fqn,
        )


def _check_dense(grads: dict[str, fx.Node]) -> None:
    for name, grad in grads.items():
        layout = grad.meta["val"].layout
        if layout is not torch.strided:
            raise CaptureError(
                f"The gradient of {name} is {layout}; only dense gradients are reduced. Use sparse=False."
            )


def _note_uncertain(grads: dict[str, fx.Node]) -> None:
    """Let islands give None for a parameter that they do not reach, where nothing adds to its gradient."""
    for grad in grads.values():
        made = grad.args[0] if grad.target is operator.getitem else None
        if isinstance(made, fx.Node) and made.target is ops.island_backward and len(grad.users) == 1:
            site, index = cast(Any, made.args[0]), cast(int, grad.args[1])
            site.uncertain |= {index}


def _line_of(graph: fx.Graph, target: str) -> str:
    for node in graph.find_nodes(op="get_attr", target=target):
        for user in node.users:
            if user.stack_trace:
                return ", at " + " ".join(user.stack_trace.split())
    return ""


# -- tensors that the model writes ----------------------------------------------------------------------------------


def _write_back(step: StepGraph, rebound: dict[str, fx.Node]) -> None:
    """Move every write to a buffer or an input to the end of forward; readers get the value that they read before.

    New values of parameters become outputs.
    """
    graph = step.graph
    placeholders = {info(node).fqn: node for node in step.nodes(Role.PARAM, Role.BUFFER)}
    writes = {placeholders[name]: value for name, value in rebound.items()}
    for target in [each for each, value in writes.items() if role(each) is Role.PARAM and _is_own_data(each, value)]:
        del writes[target]
    for node in graph.find_nodes(op="call_function", target=aten.copy_.default):
        target, value = cast(fx.Node, node.args[0]), cast(fx.Node, node.args[1])
        writes.setdefault(target, value)
        node.replace_all_uses_with(value)
        graph.erase_node(node)
    add_to_outputs(step, {target: writes.pop(target) for target in list(writes) if role(target) is Role.PARAM})
    boundary = step.end_forward or step.output
    for target, value in writes.items():
        with graph.inserting_before(boundary if value < boundary else step.output):
            write = graph.call_function(aten.copy_.default, (target, value))
        write.meta.update({key: value.meta[key] for key in _KEPT_META if key in value.meta})
        write.meta["val"], write.meta[META_KEY] = target.meta["val"], NodeInfo(Role.COMPUTE, info(value).fqn)
    for target in writes:
        _save_old_value(step, target)


def _save_old_value(step: StepGraph, target: fx.Node) -> None:
    """If a node reads `target` after its write, let all readers read a clone from the begin of forward."""
    write = next(user for user in target.users if user.target is aten.copy_.default and user.args[0] is target)
    late = any(
        user > write or (user.target is aten.copy_.default and user.args[1] is alias)
        for alias in _alias_chain(target)
        for user in alias.users
        if user is not write or user.args[1] is alias
    )
    if not late:
        return
    first = next(node for node in step.graph.nodes if node.op not in ("placeholder", "get_attr"))
    clone = _insert(step.graph, first, aten.clone.default, target)
    target.replace_all_uses_with(clone, delete_user_cb=lambda user: user not in (clone, write))
    if write.args[1] is target:
        write.update_arg(1, clone)


def _is_own_data(target: fx.Node, value: fx.Node) -> bool:
    """True for the memory of a placeholder itself, to which code that had set its data has set it back."""
    while value.target in _NO_OPS:
        value = cast(fx.Node, value.args[0])
    return value is target


def _alias_chain(node: fx.Node) -> Iterator[fx.Node]:
    """The node, its views, and views of its views, also through no-ops."""
    yield node
    for user in list(node.users):
        if user.args and user.args[0] is node and (is_view(user) or user.target in _NO_OPS):
            yield from _alias_chain(user)


# -- what is left over ----------------------------------------------------------------------------------------------


def _remove_no_ops(step: StepGraph) -> None:
    """Drop nodes that only autograd or functionalization needed, clones that nothing needs, and t(t(x))."""
    fixed = {node for node in step.graph.nodes if node.op in ("placeholder", "get_attr")}
    for node in list(step.graph.nodes):
        if node.target in _NO_OPS or (node.target is aten.clone.default and _is_idle_clone(node, fixed)):
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            step.graph.erase_node(node)
        elif _is_undone_transpose(node):
            node.replace_all_uses_with(cast(fx.Node, cast(fx.Node, node.args[0]).args[0]))


def _is_undone_transpose(node: fx.Node) -> bool:
    """True for the second of two equal transposes; autograd transposes a weight's gradient twice."""
    source = node.args[0] if node.args else None
    return (
        node.target in (aten.t.default, aten.transpose.int)
        and isinstance(source, fx.Node)
        and (source.target, source.args[1:]) == (node.target, node.args[1:])
    )


def _is_idle_clone(node: fx.Node, fixed: set[fx.Node]) -> bool:
    """True for a clone with equal strides of a value that nothing writes, such as a dropout with p=0."""
    source = cast(fx.Node, node.args[0])
    if any(writes_undeclared(user.target) for user in node.users):
        return False
    return not any(alias in fixed for alias in _origins(source)) and _strides(source) == _strides(node)


def _origins(node: fx.Node) -> Iterator[fx.Node]:
    """The node, and the nodes that it is a view of."""
    yield node
    while is_view(node) or node.target in _NO_OPS:
        node = cast(fx.Node, node.args[0])
        yield node


def _strides(node: fx.Node) -> Any:
    value = node.meta["val"]
    return value.stride() if isinstance(value, Tensor) else None


def _detach_outputs(step: StepGraph) -> None:
    """Return a clone of a view of a parameter, and an alias of a placeholder, to the caller."""
    outputs = list(step.model_outputs)
    for index, output in enumerate(outputs):
        is_param = role([*_origins(output)][-1]) is Role.PARAM
        if is_param or output.op in ("placeholder", "get_attr"):
            target = aten.clone.default if is_param else aten.alias.default
            outputs[index] = _insert(step.graph, step.end_forward or step.output, target, output)
    step.set_output(outputs, step.grads, step.input_grads)


def _copy_observed(step: StepGraph) -> None:
    """Let hooks get copies of parameters and of views of them, whose memory is another's later."""
    for call in [node for node in step.graph.nodes if is_observer(node)]:
        for source in call.all_input_nodes:
            if role([*_origins(source)][-1]) is Role.PARAM:
                call.replace_input_with(source, _insert(step.graph, call, aten.clone.default, source))


def _insert(graph: fx.Graph, before: fx.Node, target: Any, source: fx.Node) -> fx.Node:
    """A new node that applies an operator to one tensor."""
    with graph.inserting_before(before):
        node = graph.call_function(target, (source,))
    node.meta["val"] = torch_internals.fake_result(node)
    node.meta[META_KEY] = NodeInfo(Role.COMPUTE)
    return node
