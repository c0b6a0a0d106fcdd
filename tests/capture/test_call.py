import enum
from typing import Any, NamedTuple

import pytest
import torch

from fxzero.capture.call import TensorLeaf, flatten_call, replace_tensors
from fxzero.errors import InputMismatchError

X = torch.ones(2, 3)


class Pair(NamedTuple):
    a: Any
    b: Any


def spec(*args, **kwargs):
    return flatten_call(args, kwargs)[1]


def test_tensors_come_in_order_of_arguments_then_keywords():
    y, z = torch.zeros(1), torch.zeros(2)
    tensors, call = flatten_call((X, 3), {"mask": y, "flag": True, "z": z})
    assert [id(t) for t in tensors] == [id(X), id(y), id(z)]
    assert call.paths == ("args[0]", "args[1]", "mask", "flag", "z")
    assert call.tensor_paths == ("args[0]", "mask", "z")
    assert [isinstance(leaf, TensorLeaf) for leaf in call.leaves] == [True, False, True, False, True]


def test_nested_arguments_are_named_by_their_path():
    tensors, call = flatten_call(([X, 1],), {"batch": {"x": (X, X)}, "pair": Pair(X, None)})
    assert len(tensors) == 4
    assert call.paths == ("args[0][0]", "args[0][1]", "batch['x'][0]", "batch['x'][1]", "pair.a", "pair.b")


@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: [value]])
def test_plain_values_are_told_apart_by_type_and_value(wrap):
    values = [1, 1.0, True, "1", 2, 0.0, -0.0, None, torch.float32, float("inf"), b"1", 1j]
    specs = {spec(wrap(value)) for value in values}
    assert len(specs) == len(values)
    assert spec(wrap(float("nan"))) == spec(wrap(float("nan")))
    assert all(spec(wrap(value)) == spec(wrap(value)) for value in values)


@pytest.mark.parametrize(
    "other",
    [
        torch.ones(3, 2),
        torch.ones(3, 2).t(),
        torch.ones(2, 3, dtype=torch.float64),
        torch.ones(2, 3, device="meta"),
        torch.ones(2, 3, requires_grad=True),
    ],
)
@pytest.mark.parametrize("wrap", [lambda value: value, lambda value: {"x": value}])
def test_tensors_are_told_apart_by_geometry_not_by_values(other, wrap):
    assert spec(wrap(X)) != spec(wrap(other))
    assert spec(wrap(X)) == spec(wrap(torch.zeros(2, 3)))
    assert hash(spec(wrap(X))) == hash(spec(wrap(torch.zeros(2, 3))))


def test_structures_are_told_apart():
    specs = {spec(X, X), spec(X, y=X), spec([X, X]), spec((X, X)), spec({"a": X, "b": X}), spec({"a": X, "c": X})}
    assert len(specs) == 6


def test_specs_hold_no_tensor():
    call = spec([X], x=X)
    assert not any(isinstance(part, torch.Tensor) for leaf in call.leaves for part in leaf)


def test_enums_are_plain_values():
    Color = enum.Enum("Color", "RED BLUE")
    assert spec(Color.RED) == spec(Color.RED) != spec(Color.BLUE)


@pytest.mark.parametrize("value", [object(), {1, 2}, lambda: 0, X.numpy()])
def test_other_objects_are_refused_by_path(value):
    with pytest.raises(InputMismatchError, match=r"^batch\['x'\]\[1\] is a .*Pass a tensor or a plain value"):
        spec(batch={"x": [X, value]})
    with pytest.raises(InputMismatchError, match=r"^thing is a "):
        spec(thing=value)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_tensors_without_strides_are_refused():
    with pytest.raises(InputMismatchError, match="to_dense"):
        spec(X.to_sparse_csr())


def test_a_spec_prints_as_a_call():
    assert str(spec(X, labels=[X, 2])) == "args[0]=float32[2, 3] on cpu, labels[0]=float32[2, 3] on cpu, labels[1]=2"


def test_replaced_tensors_take_the_places_of_the_old():
    args, kwargs = replace_tensors(([X, 1],), {"a": {"b": X}}, [torch.zeros(1), torch.zeros(2)])
    assert args[0][0].shape == (1,) and args[0][1] == 1 and kwargs["a"]["b"].shape == (2,)
