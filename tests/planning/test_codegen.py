"""The generated step: straight lines, values freed as they are used, literals and names that survive."""

import ast
import copy
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

import fxzero
from fxzero.graph.nodes import META_KEY, NodeInfo, Role, is_gathered_param
from fxzero.graph.step import StepGraph
from fxzero.models import GPT, GPT_PRESETS, LLAMA_PRESETS, Llama
from fxzero.passes import default_passes
from fxzero.planning.codegen import NAMES_IN_SOURCE, generate
from fxzero.testing import engine_of
from tests.distributed.replicated import CASES, Batch, own_slice

ALLOWED = (
    *(ast.Module, ast.FunctionDef, ast.arguments, ast.arg, ast.Assign, ast.Expr, ast.Delete, ast.Return, ast.Call),
    *(ast.keyword, ast.Name, ast.Attribute, ast.Subscript, ast.Constant, ast.Tuple, ast.List, ast.UnaryOp, ast.USub),
    *(ast.Load, ast.Store, ast.Del),
)
"""Straight-line code: no loop, branch, comprehension, lambda, operator or exception among them."""


def compiled(name: str) -> tuple[fxzero.ZeroModule, Batch]:
    torch.manual_seed(0)
    model = CASES[name].build()
    return fxzero.compile(model, passes=default_passes(bucket_bytes=8192)), CASES[name].batch(1, 16)


def loss_of(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.loss


def functions(source: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("grad", [True, False])
def test_source_is_straight_line_code(name: str, grad: bool) -> None:
    zero, batch = compiled(name)
    with torch.set_grad_enabled(grad):
        zero(**batch)
    tree = ast.parse(zero.schedule.code)
    assert [node for node in ast.walk(tree) if not isinstance(node, ALLOWED)] == []
    assert [node.name for node in tree.body if isinstance(node, ast.FunctionDef)] == ["forward", "backward"][: 1 + grad]
    assert all(isinstance(node, ast.FunctionDef) for node in tree.body)


@pytest.mark.parametrize("name", CASES)
def test_every_local_is_deleted_or_returned_when_it_is_no_longer_needed(name: str) -> None:
    """The statement after the last one that reads a local deletes it."""
    zero, batch = compiled(name)
    zero(**batch)
    for function in functions(zero.schedule.code).values():
        last_read: dict[str, int] = {}
        deleted: dict[str, int] = {}
        assigned: set[str] = set()
        for index, statement in enumerate(function.body):
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    assigned.add(node.id)
                elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
                    last_read[node.id] = index
                elif isinstance(node, ast.Name):
                    deleted[node.id] = index
        given = {argument.arg for argument in function.args.args}
        returned = {node.id for node in ast.walk(function.body[-1]) if isinstance(node, ast.Name)}
        for local in assigned - given - returned:
            if local in last_read:
                assert deleted[local] == last_read[local] + 1 or _only_deletes(function, last_read[local] + 1), local


def _only_deletes(function: ast.FunctionDef, index: int) -> bool:
    return isinstance(function.body[index], ast.Delete)


@pytest.mark.parametrize("name", CASES)
def test_parameters_and_views_of_them_are_no_statements(name: str) -> None:
    zero, batch = compiled(name)
    zero(**batch)
    code = zero.schedule.variant.code
    assigned = {
        node.id
        for node in ast.walk(ast.parse(code.source))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    static = {node.name for node in code.static}
    gathered = [node for node in code.static if is_gathered_param(node)]
    assert len(gathered) >= sum(1 for fqn in zero.schedule.step.params if fqn in zero.schedule.step.grads)
    assert static & assigned == set()
    assert static & {node.name for node in code.saved} == set()


def test_static_values_are_the_same_objects_in_every_step() -> None:
    zero, batch = compiled("gpt")
    seen: list[dict[str, tuple[int, int]]] = []
    for _ in range(3):
        loss_of(zero(**batch)).backward()
        executable = engine_of(zero).last
        bound = next(iter(executable._functions.values()))["forward"].__globals__
        tensors = {node.name: bound[node.name] for node in executable.form.code.static}
        seen.append(
            {name: (id(value), value.data_ptr()) for name, value in tensors.items() if isinstance(value, Tensor)}
        )
        zero.zero_grad()
    assert seen[0] and seen[0] == seen[1] == seen[2]


# -- memory ----------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The bytes of storages that operators have made and nobody has freed, after each operator."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[StorageWeakRef, int]] = []
        self.after_each_op: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {storage._cdata for storage in _storages((args, kwargs))}
        self.alive += [(StorageWeakRef(s), s.nbytes()) for s in _storages(output) if s._cdata not in given]
        self.sample()
        return output

    def sample(self) -> int:
        self.alive = [(storage, nbytes) for storage, nbytes in self.alive if not storage.expired()]
        self.after_each_op.append(sum(nbytes for _, nbytes in self.alive))
        return self.after_each_op[-1]


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def live_bytes_of_a_step(model: nn.Module, batch: Batch) -> tuple[int, list[int], int]:
    """At the end of forward, after each operator of backward, at the end. Gradients have their memory before."""
    for _ in range(2):
        loss_of(model(**batch)).backward()
    with LiveBytes() as live:
        loss = loss_of(model(**batch))
        at_boundary, num_forward = live.sample(), len(live.after_each_op)
        loss.backward()
        return at_boundary, live.after_each_op[num_forward:], live.sample()


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_activations_are_freed_as_backward_uses_them(kind: str) -> None:
    config: Any = replace((GPT_PRESETS if kind == "gpt" else LLAMA_PRESETS)["tiny"], num_layers=4)
    torch.manual_seed(0)
    model: nn.Module = GPT(config) if kind == "gpt" else Llama(config)
    eager_model = copy.deepcopy(model)
    batch = CASES["gpt"].batch(1, 16)
    kept, backward, left = live_bytes_of_a_step(fxzero.compile(model), batch)
    eager_kept, eager_backward, _ = live_bytes_of_a_step(eager_model, batch)
    generator = torch.get_rng_state().nbytes  # kept by each forward, for a backward that must replay it
    assert kept <= eager_kept + generator
    assert max(backward) <= max(eager_backward) + generator
    assert backward[len(backward) * 3 // 4] < kept // 2
    assert left <= 4 + generator, "more than the loss is alive after backward"


# -- literals --------------------------------------------------------------------------------------------------------


def echo(*args: Any, **kwargs: Any) -> Any:
    """Stands for an operator."""
    return args, kwargs


def through_source(*args: Any, **kwargs: Any) -> Any:
    """What arrives at an operator whose arguments were written as source."""
    graph = fx.Graph()
    node = graph.call_function(echo, args, kwargs)
    node.meta[META_KEY] = NodeInfo(Role.COMPUTE)
    graph.output(())
    step = StepGraph(graph, {})
    step.set_output([node], {}, [])
    code = generate(step, {})
    names = {**NAMES_IN_SOURCE, **code.operators}
    exec(code.source, names)
    (result,), saved = names["forward"]([], [])
    assert saved == []
    return result


LITERALS = [
    None,
    True,
    False,
    0,
    -(2**70),
    0.1,
    1e-300,
    5e-324,
    -1.5,
    'it\'s "quoted"\n\\ \N{SNOWMAN}',
    "",
    b"bytes\x00",
    ...,
    2 + 3j,
    torch.float32,
    torch.bfloat16,
    torch.channels_last,
    torch.contiguous_format,
    torch.strided,
    torch.device("cpu"),
    torch.device("cuda", 3),
    torch.device("meta"),
    [],
    (),
    (1,),
    [[1, [2.0, None]], (3, "x"), []],
    [None, -1, None],
    slice(None, -1, 2),
    [slice(0, 3), None],
    torch.Size([2, 3]),
    range(3),
]


@pytest.mark.parametrize("value", LITERALS, ids=repr)
def test_literal_survives(value: Any) -> None:
    args, kwargs = through_source(value, [value], key=value)
    assert args == (value, [value]) and kwargs == {"key": value}
    assert isinstance(args[0], tuple) if isinstance(value, torch.Size) else type(args[0]) is type(value)


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan, 1 / 3], ids=repr)
def test_float_survives_bit_for_bit(value: float) -> None:
    ((arrived, in_list), _) = through_source(value, [value])
    assert struct.pack("d", arrived) == struct.pack("d", value) == struct.pack("d", in_list[0])


@pytest.mark.parametrize("real", [0.0, -0.0, math.inf, math.nan, 1.5], ids=repr)
@pytest.mark.parametrize("imag", [0.0, -0.0, -math.inf, 2.0], ids=repr)
def test_complex_survives_bit_for_bit(real: float, imag: float) -> None:
    ((arrived,), _) = through_source(complex(real, imag))
    assert struct.pack("dd", arrived.real, arrived.imag) == struct.pack("dd", real, imag)


# -- names -----------------------------------------------------------------------------------------------------------


class BadNames(nn.Module):
    """Submodules, parameters, buffers and inputs named like keywords, builtins and the generated code's own words."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("del", "lambda", "list", "None", "saved", "inputs", "aten_mm_default", "all_gather"):
            self.add_module(name, nn.Linear(4, 4))
        self.register_parameter("return", nn.Parameter(torch.ones(4)))
        self.register_parameter("tangents", nn.Parameter(torch.ones(4)))
        self.register_buffer("torch", torch.ones(4))
        self.register_buffer("wait_all_gather", torch.ones(4))

    def forward(self, list: Tensor, saved: Tensor, **rest: Tensor) -> Tensor:
        hidden = list * saved + rest["lambda"] - rest["tangents"]
        for module in self.children():
            hidden = torch.tanh(module(hidden))
        for name in ("return", "tangents", "torch", "wait_all_gather"):
            hidden = hidden * getattr(self, name)
        return hidden.sum()


@pytest.mark.parametrize("num_passes", [4, None])
def test_names_never_collide_when_a_model_uses_words_of_python_and_of_the_generated_code(
    num_passes: int | None,
) -> None:
    torch.manual_seed(0)
    model, reference = BadNames(), BadNames()
    reference.load_state_dict(model.state_dict())
    zero = fxzero.compile(model, passes=default_passes()[:num_passes])
    batch = {name: torch.randn(2, 4) for name in ("list", "saved", "lambda", "tangents")}
    expected, actual = reference(**batch), zero(**batch)
    expected.backward()
    actual.backward()
    assert torch.equal(actual, expected)
    for (name, param), full in zip(zero.named_parameters(), reference.parameters(), strict=True):
        assert param.grad is not None and full.grad is not None
        assert torch.equal(param.grad, own_slice(zero, name, full.grad))


WORDS = ["saved", "tangents", "inputs", "buffers", "forward", "backward", "constant_0", "all_gather", "wait", "device"]


@pytest.fixture(scope="module")
def custom_operators() -> Iterator[dict[str, Callable[[Tensor], Tensor]]]:
    """Operators that double their input, named like words of the generated code."""
    library = torch.library.Library("fxzero_words", "DEF")
    made: dict[str, Callable[[Tensor], Tensor]] = {}
    for word in WORDS:
        library.define(f"{word}(Tensor x) -> Tensor")
        library.impl(word, lambda x: x * 2, "CompositeExplicitAutograd")
        torch.library.register_autograd(
            f"fxzero_words::{word}",
            lambda _, grad: grad * 2,
            setup_context=lambda ctx, inputs, output: None,
            lib=library,
        )
        made[word] = getattr(torch.ops.fxzero_words, word)
    yield made


def test_names_never_collide_when_operators_are_called_like_words_of_the_generated_code(
    custom_operators: dict[str, Callable[[Tensor], Tensor]],
) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.linear(x)
            for word in WORDS:
                hidden = torch.tanh(custom_operators[word](hidden)) * custom_operators[word](x)
            return F.gelu(hidden, approximate="tanh").sum()

    torch.manual_seed(0)
    model, reference = Model(), Model()
    reference.load_state_dict(model.state_dict())
    zero = fxzero.compile(model)
    x = torch.randn(2, 4)
    expected, actual = reference(x), zero(x)
    expected.backward()
    actual.backward()
    assert torch.equal(actual, expected)
    for (name, param), full in zip(zero.named_parameters(), reference.parameters(), strict=True):
        assert param.grad is not None and full.grad is not None
        assert torch.equal(param.grad, own_slice(zero, name, full.grad))
