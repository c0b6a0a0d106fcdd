"""Run a captured step with real tensors and compare it, bit for bit, with eager PyTorch."""

import contextlib
import copy

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxzero.capture import Captured, capture
from fxzero.capture.call import flatten_call
from fxzero.graph.layout import ParamSpec
from fxzero.graph.nodes import Role, info
from fxzero.graph.sharding import Sharding


def param_specs(module: nn.Module) -> dict[str, ParamSpec]:
    return {
        name: ParamSpec(name, tuple(param.shape), param.dtype, param.requires_grad)
        for name, param in module.named_parameters()
    }


def trace(module, *args, with_backward=None, differentiated=None, device="cpu", **kwargs) -> Captured:
    return capture(
        module,
        module.forward,
        args,
        kwargs,
        param_specs(module),
        device=torch.device(device),
        sharding=Sharding.over(2),
        with_backward=torch.is_grad_enabled() if with_backward is None else with_backward,
        differentiated=differentiated,
    )


def run(captured: Captured, module: nn.Module, args, kwargs):
    """Outputs rebuilt, gradients by parameter name, input gradients; buffers of the module are updated."""
    step = captured.step
    graph = copy.deepcopy(step.graph)
    if boundary := next((n for n in graph.nodes if getattr(n.target, "__name__", "") == "end_forward"), None):
        graph.erase_node(boundary)
    values = iter(flatten_call(args, kwargs)[0])
    params, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    feed = []
    for node in step.graph.nodes:
        if node.op != "placeholder":
            continue
        role, fqn = info(node).role, info(node).fqn
        if role is Role.PARAM:
            feed.append(params[fqn].detach())
        elif role is Role.BUFFER:
            feed.append(buffers[fqn])
        elif role is Role.INPUT:
            feed.append(next(values).detach())
        else:
            feed.append(_ones(node.meta["val"]))
    root = torch.nn.Module()
    vars(root).update(step.constants)
    with torch.no_grad():
        outputs, grads, input_grads = fx.Interpreter(root, graph=graph).run(*feed)
    return captured.output.rebuild(outputs), dict(grads), list(input_grads)


def _ones(fake: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(fake.shape, fake.stride(), dtype=fake.dtype).fill_(1)


def assert_bitwise_equal(actual, expected, tolerance=0.0) -> None:
    a, a_spec = pytree.tree_flatten(actual)
    b, b_spec = pytree.tree_flatten(expected)
    assert a_spec == b_spec
    for x, y in zip(a, b, strict=True):
        if isinstance(x, torch.Tensor):
            torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance, equal_nan=True)
        else:
            assert x == y


def check_against_eager(module, *args, steps=2, differentiated=None, ambient=None, exact=True, **kwargs) -> Captured:
    """Trace, then compare `steps` steps with eager: outputs, gradients, input gradients, buffers, the generator."""
    ambient = ambient or contextlib.nullcontext
    reference = copy.deepcopy(module)
    before = torch.get_rng_state()
    with ambient():
        captured = trace(module, *args, differentiated=differentiated, **kwargs)
    assert torch.equal(torch.get_rng_state(), before)
    tolerance = 0.0 if exact else 1e-5
    for seed in range(steps):
        torch.manual_seed(seed)
        expected = _eager_in(ambient, reference, args, kwargs, captured.differentiated)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        actual = run(captured, module, args, kwargs)
        assert_bitwise_equal(actual[0], expected[0], tolerance)
        assert actual[1].keys() == expected[1].keys()
        assert_bitwise_equal(actual[1], expected[1], tolerance)
        assert_bitwise_equal(list(actual[2]), expected[2])
        assert_bitwise_equal(dict(module.named_buffers()), dict(reference.named_buffers()))
        assert torch.equal(torch.get_rng_state(), after), "the step drew other numbers than eager"
    return captured


def _eager_in(ambient, module, args, kwargs, differentiated):
    """Forward under the ambient context, backward outside, as users write it."""
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    with ambient():
        output = module(*args, **kwargs)
    flat = [t for t in pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    chosen = [flat[index] for index in differentiated]
    params = {name: p for name, p in module.named_parameters() if p.requires_grad}
    leaves = [*params.values(), *(t for t in tensors if t.requires_grad)]
    if not chosen or not leaves:
        return output, {}, [None] * len(tensors)
    grads = torch.autograd.grad(chosen, leaves, [torch.ones_like(t) for t in chosen], allow_unused=True)
    by_name = {name: grads[i] for i, name in enumerate(params) if grads[i] is not None}  # pyright: ignore
    rest = iter(grads[len(params) :])
    return output, by_name, [next(rest) if t.requires_grad else None for t in tensors]
