"""Mistakes of a user, through the public API: the error says what, where and what to do. World size 1."""

import inspect
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.testing._internal.distributed.fake_pg import FakeStore

import fxzero
from fxzero import errors
from fxzero.errors import CaptureError, FxzeroError, InputMismatchError
from tests.helpers.pairs import Net, points


class Item(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        scale = x.abs().max().item()
        return self.linear(x / scale).sum()


class Branch(Item):
    def forward(self, x: Tensor) -> Tensor:
        if x.mean() > 0:
            x = -x
        return self.linear(x).sum()


class Masked(Item):
    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x[x[:, 0] > 0]).sum()


class Kept(Item):
    def forward(self, x: Tensor) -> Tensor:
        self.last = SimpleNamespace(hidden=self.linear(x))
        return self.last.hidden.sum()


def line_of(cls: type, text: str) -> str:
    """`file.py:12` of the line of a class that has this text."""
    lines, first = inspect.getsourcelines(cls)
    return f"{__file__}:{first + next(n for n, line in enumerate(lines) if text in line)}"


@pytest.mark.parametrize("when", ["compile", "call"])
@pytest.mark.parametrize(
    ("cls", "text", "cure"),
    [
        (Item, ".item()", "Replace .item()"),
        (Branch, "if x.mean()", "torch.where"),
        (Masked, "x[x[:, 0] > 0]", "boolean mask"),
    ],
)
def test_code_that_depends_on_values_is_named_by_its_line(cls: type, text: str, cure: str, when: str) -> None:
    with pytest.raises(CaptureError) as caught:
        if when == "compile":
            fxzero.compile(cls(), example=points(), islands=())
        else:
            fxzero.compile(cls(), islands=())(points())
    assert f"{line_of(cls, text)}: " in str(caught.value)
    assert text in str(caught.value) and cure in str(caught.value)


def test_an_object_with_tensors_that_is_kept_on_the_model_is_named() -> None:
    with pytest.raises(CaptureError, match=r"leaves a SimpleNamespace with tensors in last.*Return it from forward"):
        fxzero.compile(Kept())(points())


def test_arguments_that_do_not_fit_are_named() -> None:
    zero = fxzero.compile(Net())
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((), {}, "missing a required argument: 'x'"),
        ((points(), False, 3), {}, "too many positional arguments"),
        ((points(),), {"labels": 1}, "unexpected keyword argument 'labels'"),
        ((points(),), {"x": points()}, "multiple values for argument 'x'"),
        ((object(),), {}, r"args\[0\] is a object. Pass a tensor or a plain value"),
        (([points(), object()],), {}, r"args\[0\]\[1\] is a object"),
        ((points().to_sparse(),), {}, r"Pass it dense \(to_dense\(\)\)"),
    ]
    for _ in range(2):  # before and after a call that fits
        for args, kwargs, text in cases:
            with pytest.raises(InputMismatchError, match=text):
                zero(*args, **kwargs)
        zero(points()).loss.backward()


def test_an_error_of_the_model_itself_is_raised_as_it_is() -> None:
    class Own(Net):
        def forward(self, x: Tensor, use_extra: bool = False) -> Any:
            if x.shape[0] > 4:
                raise KeyError("at most 4 rows")
            return super().forward(x, use_extra)

    zero = fxzero.compile(Own())
    errors: list[tuple[type[Exception], str]] = [
        (RuntimeError, r"cannot be multiplied \(2x3 and 6x8\)"),  # as the plain model, while its parameters are there
        (CaptureError, r"\[2, 3\] X \[6, 8\].*If the same call of the plain model fails too"),
    ]
    for kind, message in errors:
        with pytest.raises(KeyError, match="at most 4 rows"):
            zero(points(batch=5))
        with pytest.raises(kind, match=message):
            zero(torch.ones(2, 3))
        zero(points()).loss.backward()


def test_an_input_on_another_device_is_refused() -> None:
    zero = fxzero.compile(Net())
    for _ in range(2):
        with pytest.raises(InputMismatchError, match="on the meta device"):
            zero(points().to("meta"))
        zero(points()).loss.backward()


def test_a_model_on_two_devices_asks_which() -> None:
    model = Net()
    model.register_buffer("far", torch.ones(2, device="meta"), persistent=False)
    with pytest.raises(FxzeroError, match="far"):
        fxzero.compile(model)


def test_a_device_that_is_not_there_is_refused() -> None:
    if torch.cuda.is_available():
        pytest.skip("it is there")
    with pytest.raises(InputMismatchError, match="device cuda cannot be used"):
        fxzero.compile(Net(), device="cuda")


def test_nothing_can_be_asked_of_a_schedule_before_there_is_one() -> None:
    zero = fxzero.compile(Net())
    for ask in (lambda: zero.schedule.graph, lambda: zero.schedule.code, lambda: zero.schedule.table()):
        with pytest.raises(FxzeroError, match=r"call the module once, or pass example= to fxzero.compile"):
            ask()


def test_a_model_without_parameters_runs() -> None:
    zero = fxzero.compile(nn.ReLU())
    x = points().requires_grad_()
    zero(x).sum().backward()
    assert torch.equal(x.grad, (x > 0).float())
    assert zero.state_dict() == {}
    zero.load_state_dict({})


def test_a_frozen_model_runs() -> None:
    torch.manual_seed(0)
    model = Net().requires_grad_(False).eval()
    expected = model(points()).logits
    zero = fxzero.compile(model)
    assert torch.equal(zero(points()).logits, expected)
    assert zero.clip_grad_norm_(1.0) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_models_of_other_dtypes_train(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).to(dtype)
    zero = fxzero.compile(model)
    zero(points().to(dtype)).square().sum().backward()
    norm = zero.clip_grad_norm_(1.0)
    assert norm.dtype is torch.promote_types(dtype, torch.float32)
    assert all(param.grad.dtype is dtype for param in zero.parameters())


def test_a_model_of_several_dtypes_trains() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.narrow, self.wide = nn.Linear(6, 6, dtype=torch.bfloat16), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.wide(self.narrow(x.bfloat16()).float()).square().sum()

    torch.manual_seed(0)
    model = Mixed()
    x = points()
    model(x).backward()
    expected = nn.utils.clip_grad_norm_(model.parameters(), 1e9)
    model.zero_grad()
    zero = fxzero.compile(model)
    zero(x).backward()
    torch.testing.assert_close(zero.clip_grad_norm_(1e9), expected, rtol=1e-2, atol=0)


def test_every_error_is_documented_and_exported() -> None:
    classes = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, FxzeroError)]
    assert all(cls.__doc__ for cls in classes)
    public = {cls.__name__ for cls in classes if not issubclass(cls, errors.ScheduleError)} | {"ScheduleError"}
    assert public <= set(fxzero.__all__)


def test_ranks_that_were_started_but_do_not_know_each_other_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    told = r"2 ranks were started \(WORLD_SIZE=2, RANK=1\).* Call torch.distributed.init_process_group\(\) before"
    with pytest.raises(InputMismatchError, match=told):
        fxzero.compile(Net())
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(InputMismatchError, match="WORLD_SIZE=two"):
        fxzero.compile(Net())


@pytest.mark.parametrize("size", ["1", "", " 1 "])
def test_one_rank_that_was_started_trains_alone(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", size)
    fxzero.compile(Net())(points()).loss.backward()


def test_a_process_group_that_comes_after_compile_is_refused() -> None:
    zero = fxzero.compile(Net())
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        with pytest.raises(FxzeroError, match="initialised after fxzero.compile"):
            zero(points())
    finally:
        dist.destroy_process_group()
    zero(points()).loss.backward()


@pytest.mark.parametrize("source", [random.random, np.random.rand])
def test_draws_outside_of_torch_are_refused_and_taken_back(source: Any) -> None:
    class Dropping(Net):
        def forward(self, x: Tensor, use_extra: bool = False) -> Any:
            return super().forward(x, use_extra=source() < 0.5)

    random.seed(0)
    np.random.seed(0)
    expected = source()
    random.seed(0)
    np.random.seed(0)
    with pytest.raises(CaptureError, match=r"draws from (numpy.)?random, outside of torch.*pass the value in"):
        fxzero.compile(Dropping(), islands=())(points())
    assert source() == expected
