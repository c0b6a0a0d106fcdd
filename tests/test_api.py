"""The module that compile returns, and what becomes of the model. World size 1."""

import copy
import inspect
import io
import pickle
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor

import fxzero
from fxzero.errors import CaptureError, FxzeroError, InputMismatchError
from tests.helpers.pairs import Net, assert_same, both, pair, points, sgd


class Configured(Net):
    """A model with attributes and methods, as those of Hugging Face have."""

    def __init__(self) -> None:
        super().__init__()
        self.config = {"hidden": 8}
        self.calls = 0
        self.register_buffer("position", torch.arange(3), persistent=False)

    def generate(self, x: Tensor) -> Tensor:
        return self(x).logits

    def head_size(self) -> int:
        return self.head.out_features

    def loss_of(self, x: Tensor) -> Tensor:
        return self(x).loss


# -- names and attributes ----------------------------------------------------------------------------------------


def test_names_are_those_of_the_model_before_and_after_the_first_call() -> None:
    zero, plain = pair(Configured())
    assert isinstance(zero, nn.Module)
    objects = [id(param) for param in zero.parameters()]
    for _ in range(2):
        for what in ("named_parameters", "named_buffers", "named_modules", "named_children"):
            assert [name for name, _ in getattr(zero, what)()] == [name for name, _ in getattr(plain, what)()], what
        assert [id(param) for param in zero.parameters()] == objects
        assert zero.get_parameter("body.weight") is zero.body.weight
        assert len(list(zero.modules())) == len(list(plain.modules()))
        zero(points()).loss.backward()
    assert repr(zero).startswith("ZeroModule(Configured(")


def test_attributes_and_methods_reach_the_model() -> None:
    zero, plain = pair(Configured())
    assert isinstance(zero, type(plain)) and isinstance(zero, fxzero.ZeroModule) and not isinstance(zero, nn.Linear)
    assert zero.config == {"hidden": 8}
    assert zero.head_size() == 5
    assert {"config", "head_size", "no_sync"} <= {*dir(zero)}
    zero.calls = 3
    zero.new = "x"
    model = zero._fxzero_model
    assert (model.calls, model.new) == (3, "x")
    zero.position = torch.arange(3) + 1
    assert model.position.tolist() == [1, 2, 3]
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = zero.no_such_thing
    assert not hasattr(zero, "no_such_thing")


def test_methods_that_call_the_model_call_the_compiled_module() -> None:
    zero, plain = pair(Configured())
    assert not hasattr(pair()[0], "generate")
    for model in (zero, plain):
        torch.manual_seed(0)
        model.loss_of(points()).backward()
    assert_same(zero, plain)
    with torch.no_grad():
        assert torch.equal(zero.eval().generate(points()), plain.eval().generate(points()))


def test_the_model_itself_is_refused() -> None:
    torch.manual_seed(0)
    model = Net()
    fxzero.compile(model)
    with pytest.raises(FxzeroError, match="Call the module that compile returned"):
        model(points())
    with pytest.raises(FxzeroError, match="Call the module that compile returned"):
        model.forward(points())
    with pytest.raises(FxzeroError, match=r"Use that of the module.*zero.state_dict\(\)"):
        model.state_dict()
    with pytest.raises(FxzeroError, match=r"Use that of the module"):
        model.load_state_dict({})


@pytest.mark.parametrize("copy_it", [copy.deepcopy, copy.copy, pickle.dumps, lambda m: torch.save(m, io.BytesIO())])
def test_copies_are_refused(copy_it: Any) -> None:
    zero, _ = pair()
    for module in (zero, zero._fxzero_model)[copy_it is copy.deepcopy :]:  # what compile returns can be copied deeply
        with pytest.raises(FxzeroError, match=r"cannot be pickled|A copy of the model"):
            copy_it(module)


def test_forward_has_the_signature_of_the_model_and_parameters_their_shapes() -> None:
    zero, plain = pair()
    assert inspect.signature(zero.forward) == inspect.signature(plain.forward)
    zero(points())
    assert zero.parameter_shapes() == {name: param.shape for name, param in plain.named_parameters()}


def test_a_model_is_compiled_once_as_a_whole() -> None:
    inner = Net()
    zero = fxzero.compile(inner)
    for model in (inner, zero, nn.Sequential(inner)):
        with pytest.raises(InputMismatchError, match="given to fxzero.compile already"):
            fxzero.compile(model)
    with pytest.raises(InputMismatchError, match="0 of this model is a DataParallel. Compile the module inside it"):
        fxzero.compile(nn.Sequential(nn.DataParallel(Net())))
    with pytest.raises(InputMismatchError, match="takes an nn.Module, not a function"):
        fxzero.compile(lambda x: x)  # type: ignore[arg-type]


class Branching(Net):
    """Cannot be traced as long as it branches."""

    branches = True

    def forward(self, x: Tensor, use_extra: bool = False) -> Any:
        if self.branches and x.sum() > 0:
            x = x * 2
        return super().forward(x, use_extra)


def test_a_failed_compile_gives_the_model_back() -> None:
    model = Branching()
    model.forward = model.forward  # a forward of the instance, as some libraries set it
    with pytest.raises(CaptureError, match=r"test_api.py:\d+: if self.branches and x.sum"):
        fxzero.compile(model, example=points(), islands=())
    model(points()).loss.backward()
    model.half().float()
    copy.deepcopy(model).load_state_dict(model.state_dict())
    model.zero_grad()
    model.branches = False
    fxzero.compile(model, example=points())(points()).loss.backward()


def test_a_failed_first_call_can_be_followed_by_others() -> None:
    torch.manual_seed(0)
    zero, plain = pair(Branching(), islands=())
    with pytest.raises(CaptureError, match="if self.branches"):
        zero(points())
    zero.branches = plain.branches = False
    own, other = both(zero, plain, points())
    own.loss.backward()
    other.loss.backward()
    assert_same(zero, plain)


def test_train_and_eval_agree_with_the_model_from_either_side() -> None:
    torch.manual_seed(0)
    model = Net()
    model.eval()
    zero = fxzero.compile(model)
    assert not zero.training and not model.training

    def flags() -> set[bool]:
        return {zero.training, *(module.training for module in [*zero.modules(), *model.modules()])}

    for switch, expected in ((zero.train, True), (model.eval, False), (model.train, True), (zero.eval, False)):
        switch()
        assert flags() == {expected}
    zero.drop.train()
    assert zero.drop.training and not zero.training


# -- conversions and changes after compile -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.float64),
        lambda m: m.to("meta"),
        lambda m: m.head.bfloat16(),
        lambda m: m.to_empty(device="meta"),
    ],
)
@pytest.mark.parametrize("called", [False, True])
def test_conversions_are_refused_and_leave_everything_as_it_was(convert: Any, called: bool) -> None:
    zero, plain = pair()
    if called:
        both(zero, plain, points())
    for module in (zero, zero._fxzero_model):
        with pytest.raises(FxzeroError, match="Convert the model before fxzero.compile"):
            convert(module)
    own, other = both(zero, plain, points())
    own.loss.backward()
    other.loss.backward()
    assert_same(zero, plain)


def test_conversions_that_change_nothing_pass() -> None:
    zero, _ = pair()
    assert zero.to("cpu") is zero.float() is zero.to(torch.float32).cpu() is zero
    assert zero.head.float() is zero.head


def test_new_parameters_after_compile_are_refused() -> None:
    zero, _ = pair()
    for value in (nn.Linear(2, 2), nn.Parameter(torch.ones(2)), None):
        with pytest.raises(FxzeroError, match="fixes the parameters of a model"):
            if value is None:
                zero.body.weight = nn.Parameter(torch.ones(8, 6))
                zero(points())
            else:
                zero.more = value
    zero, _ = pair()
    zero.body.add_module("more", nn.Linear(2, 2))
    with pytest.raises(FxzeroError, match=r"body.more.bias was added, removed or replaced after fxzero.compile"):
        zero(points())


def test_a_buffer_may_be_replaced_by_one_of_the_same_shape_only() -> None:
    zero, plain = pair()
    both(zero, plain, points())
    zero.norm.running_mean = plain.norm.running_mean = torch.full((8,), 0.5)
    own, other = both(zero, plain, points())
    own.loss.backward()
    other.loss.backward()
    assert_same(zero, plain)
    zero.norm.running_mean = torch.zeros(9)
    with pytest.raises(InputMismatchError, match="norm.running_mean.* has another shape or dtype"):
        zero(points())


def test_apply_reaches_every_module() -> None:
    zero, plain = pair()
    seen: list[str] = []
    zero.apply(lambda module: seen.append(type(module).__name__))
    expected: list[str] = []
    plain.apply(lambda module: expected.append(type(module).__name__))
    assert seen == [*expected[:-1], "ZeroModule"]


def test_forward_hooks_on_the_module_run_in_every_call() -> None:
    zero, _ = pair()
    seen: list[float] = []
    zero.register_forward_hook(lambda module, args, output: seen.append(output.loss.item()))
    for seed in range(2):
        zero(points(seed)).loss.backward()
    assert len(seen) == 2


# -- parameters that cannot be sharded ---------------------------------------------------------------------------


def _with(param: nn.Parameter) -> nn.Module:
    model = nn.Linear(2, 2)
    model.extra = param
    return model


@pytest.mark.parametrize(
    ("param", "text"),
    [
        (nn.Parameter(torch.ones(3, 2).t()), r"extra of shape \(2, 3\) is not contiguous.*p.data.contiguous\(\)"),
        (
            nn.Parameter(torch.ones(2, dtype=torch.complex64), requires_grad=False),
            "extra is a parameter of dtype torch.complex64",
        ),
        (nn.Parameter(torch.ones(2, dtype=torch.complex64)), "extra is a parameter of dtype torch.complex64"),
        (
            nn.Parameter(TwoTensor(torch.ones(2), torch.ones(2))),
            "extra is a TwoTensor. Only plain tensors can be sharded",
        ),
        (nn.UninitializedParameter(), "extra is an uninitialised lazy parameter"),
    ],
)
def test_parameters_that_cannot_be_sharded_are_named(param: nn.Parameter, text: str) -> None:
    with pytest.raises(InputMismatchError, match=text):
        fxzero.compile(_with(param))


def test_parameters_that_share_memory_are_refused() -> None:
    model = nn.Linear(2, 2)
    model.part = nn.Parameter(model.weight.data[0])
    with pytest.raises(InputMismatchError, match="(weight and part|part and weight) share memory, but are two"):
        fxzero.compile(model)
    model.part = nn.Parameter(torch.ones(0))
    fxzero.compile(model)


def test_gradients_from_before_are_dropped_with_a_warning() -> None:
    zero, plain = pair()
    zero.body.weight.grad = torch.ones(8, 6)
    with pytest.warns(UserWarning, match="body.weight and 0 more parameters have gradients from before"):
        own, other = both(zero, plain, points())
    own.loss.backward()
    other.loss.backward()
    assert_same(zero, plain)


# -- the optimizer and the example -------------------------------------------------------------------------------


@pytest.mark.parametrize("example", ["mapping", "tuple", "tensor", None])
def test_an_example_of_each_kind_traces_at_compile(example: Any) -> None:
    torch.manual_seed(0)
    examples = {"mapping": {"x": points()}, "tuple": (points(), False), "tensor": points(), None: None}
    zero, plain = pair(example=examples[example])
    assert ("Nothing is traced yet" in str(zero.schedule)) == (example is None)
    assert zero.body.weight.shape == ((8, 6) if example is None else (48, 1))
    own, other = both(zero, plain, points())
    own.loss.backward()
    other.loss.backward()
    assert_same(zero, plain)


def test_the_modes_of_a_user_do_not_reach_what_persists() -> None:
    torch.manual_seed(0)
    model = Net()
    plain = copy.deepcopy(model)
    with torch.inference_mode():
        zero = fxzero.compile(model, example=points())
    x = points()
    torch.set_default_dtype(torch.float64)
    try:
        own, other = both(zero, plain, x)
    finally:
        torch.set_default_dtype(torch.float32)
    own.loss.backward()
    other.loss.backward()
    assert_same(zero, plain)
    sgd(zero).step()


def test_what_torch_compile_made_is_refused_and_so_is_torch_compile_of_a_compiled_module() -> None:
    torch.manual_seed(0)
    compiled = torch.compile(nn.Linear(4, 4), backend="eager")
    itself = nn.Sequential(nn.Linear(4, 4))
    itself[0].compile(backend="eager")
    for model, name in ((compiled, "This model"), (itself, "0 of this")):
        with pytest.raises(InputMismatchError, match=f"{name}.* was compiled by torch.compile"):
            fxzero.compile(cast(nn.Module, model))
    with pytest.raises(FxzeroError, match=r"torch\.compile of a module of fxzero\.compile"):
        torch.compile(fxzero.compile(nn.Linear(4, 4)), backend="eager")


def test_data_that_replaces_a_shard_is_taken_over() -> None:
    zero, plain = pair(example=points())
    optimizers = sgd(zero), sgd(plain)
    for module in (zero, plain):
        vector = nn.utils.parameters_to_vector(module.parameters()).detach()
        nn.utils.vector_to_parameters(vector * 0.5, module.parameters())
        if module is zero:
            assert torch.equal(zero.state_dict()["head.bias"], zero.head.bias)
    for seed in range(2):
        for output in both(zero, plain, points(seed)):
            output.loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        assert_same(zero, plain)
        zero.head.bias.data = zero.head.bias.data.clone()
    zero.head.bias.data = torch.zeros(1, 5)
    with pytest.raises(FxzeroError, match=r"data of head.bias was replaced by torch.float32 \(1, 5\).*load_state_dict"):
        zero(points())
