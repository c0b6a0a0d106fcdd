"""Weights into the shards and out again. World size 1; tests/distributed/test_api_ranks.py has the rest."""

import copy
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxzero
from fxzero.errors import CheckpointError, FxzeroError
from fxzero.passes import default_passes
from tests.helpers.pairs import Net, assert_same, both, pair, points, sgd


class Tied(nn.Module):
    """Tied weights, persistent and other buffers, an extra state."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("scale", torch.full((6,), 2.0))
        self.register_buffer("cache", torch.arange(3.0), persistent=False)
        self.epoch = 0

    def get_extra_state(self) -> int:
        return self.epoch

    def set_extra_state(self, state: int) -> None:
        self.epoch = state

    def reset_parameters(self) -> None:
        self.scale.fill_(2.0)
        self.cache.copy_(torch.arange(3.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.table(ids) * self.scale)).square().mean() + self.cache.sum()


IDS = torch.tensor([1, 3, 8, 0])


def tied() -> tuple[fxzero.ZeroModule, nn.Module]:
    torch.manual_seed(0)
    return pair(Tied())


def assert_same_state(own: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(own) == list(other)
    for name, value in other.items():
        assert torch.equal(own[name], value) if isinstance(value, Tensor) else own[name] == value, name


@pytest.mark.parametrize("called", [False, True])
def test_the_state_dict_is_that_of_the_plain_model(called: bool) -> None:
    zero, plain = tied()
    zero.epoch = plain.epoch = 7
    if called:
        optimizers = sgd(zero), sgd(plain)
        for output in both(zero, plain, IDS):
            output.backward()
        for optimizer in optimizers:
            optimizer.step()
    own, other = zero.state_dict(), plain.state_dict()
    assert isinstance(own, OrderedDict)
    assert_same_state(own, other)
    assert own._metadata == other._metadata  # type: ignore[attr-defined]
    assert own["head.weight"] is own["table.weight"]
    assert not any(isinstance(value, Tensor) and value.requires_grad for value in own.values())
    assert_same_state(zero.state_dict(rank0_only=True), other)
    assert list(zero.state_dict(prefix="model.")) == [f"model.{name}" for name in other]
    Tied().load_state_dict(own)
    with torch.no_grad():
        zero.table.weight.zero_()
    assert own["table.weight"].any()  # a copy


def test_a_module_that_holds_it_collects_its_state() -> None:
    zero, plain = tied()
    own, other = nn.ModuleDict({"inner": zero}), nn.ModuleDict({"inner": plain})
    zero(IDS)
    plain(IDS)
    assert_same_state(own.state_dict(), other.state_dict())
    assert own.state_dict()._metadata == other.state_dict()._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("called", [False, True])
def test_loading_gives_the_weights_and_the_extra_state(called: bool) -> None:
    zero, plain = tied()
    if called:
        zero(IDS)
        plain(IDS)
    torch.manual_seed(1)
    other = Tied()
    other.epoch = 5
    with torch.no_grad():
        other.scale.add_(1)
    for module in (zero, plain):
        assert str(module.load_state_dict(other.state_dict())) == "<All keys matched successfully>"
        assert module.epoch == 5
    assert_same_state(zero.state_dict(), other.state_dict())
    for output in both(zero, plain, IDS):
        output.backward()
    assert_same(zero, plain)


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize("real", [False, True])
def test_what_does_not_fit_is_named(called: bool, real: bool) -> None:
    if real:
        zero, _ = tied()
    else:
        with torch.device("meta"):
            model = Tied()
        zero = fxzero.compile(model)
    if called:
        zero(IDS)
    state = Tied().state_dict()
    cases: list[tuple[dict[str, Any], str]] = [
        ({**state, "more": IDS}, r"missing nothing, unexpected \['more'\].*strict=False"),
        (
            {**state, "table.weight": torch.ones(54)},
            r"table.weight is \(54,\) in the state dict and \(9, 6\) in the model",
        ),
        ({**state, "scale": "x"}, r"scale is a str in the state dict and \(6,\) in the model"),
        ({**state, "scale": torch.ones(6, device="meta")}, "scale is on the meta device in the state dict"),
        ({k: v for k, v in state.items() if "norm.bias" not in k}, r"missing \['norm.bias'\], unexpected nothing"),
        ({k: v for k, v in state.items() if "extra_state" not in k}, r"missing \['_extra_state'\]"),
    ]
    for broken, text in cases:
        with pytest.raises(CheckpointError, match=text):
            zero.load_state_dict(broken)
    with pytest.raises(ValueError, match="assign=True would replace the shards"):
        zero.load_state_dict(state, assign=True)
    assert zero.table.weight.shape == ((54, 1) if called else (9, 6))  # nothing was sharded for it


def test_loading_what_fits_returns_the_rest_as_torch_does() -> None:
    zero, plain = tied()
    zero(IDS)
    plain(IDS)
    state = plain.state_dict()
    for name in ("norm.weight", "scale", "norm.num_batches_tracked"):
        del state[name]
    state["more"] = torch.ones(1)
    own, other = (module.load_state_dict(state, strict=False) for module in (zero, plain))
    assert (sorted(own.missing_keys), own.unexpected_keys) == (sorted(other.missing_keys), other.unexpected_keys)
    assert_same_state(zero.state_dict(), plain.state_dict())


def test_a_tied_name_may_be_missing() -> None:
    zero, _ = tied()
    state = Tied().state_dict()
    expected = state.pop("head.weight")
    zero.load_state_dict(state)
    assert torch.equal(zero.state_dict()["head.weight"], expected)


def test_hooks_of_the_model_rename_what_is_loaded() -> None:
    class Renaming(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_load_state_dict_pre_hook(self.rename)

        @staticmethod
        def rename(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
            if f"{prefix}old" in state:
                state[f"{prefix}weight"] = state.pop(f"{prefix}old")

    zero = fxzero.compile(nn.Sequential(Renaming()), example=torch.ones(1, 2))
    state = {"0.old": torch.eye(2), "0.bias": torch.ones(2)}
    zero.load_state_dict(state)
    assert list(state) == ["0.old", "0.bias"]
    assert torch.equal(zero.state_dict()["0.weight"], torch.eye(2))


def test_hooks_of_the_compiled_module_itself_run() -> None:
    zero, calls = fxzero.compile(nn.Sequential(nn.Linear(2, 2)), example=torch.ones(1, 2)), list[Any]()
    zero.register_state_dict_pre_hook(lambda module, prefix, keep_vars: calls.append("before"))
    zero.register_state_dict_post_hook(lambda module, state, prefix, metadata: state.update(extra=torch.ones(1)))
    zero.register_load_state_dict_pre_hook(lambda module, state, *_: state.pop("extra"))
    zero.register_load_state_dict_post_hook(lambda module, keys: calls.append(keys.missing_keys))
    state = zero.state_dict()
    assert list(state) == ["0.weight", "0.bias", "extra"]
    zero.load_state_dict(state)
    assert calls == ["before", []]
    copied = copy.deepcopy(zero)
    assert list(copied.state_dict()) == list(state)


def test_hooks_after_a_load_see_whole_parameters_and_change_what_is_missing() -> None:
    shapes: list[Any] = []

    def forgive(module: nn.Module, keys: Any) -> None:
        shapes.append([tuple(param.shape) for param in module.parameters()])
        keys.missing_keys.clear()

    model = nn.Sequential(nn.Linear(2, 3))
    model[0].register_load_state_dict_post_hook(forgive)
    zero = fxzero.compile(model, example=torch.ones(1, 2))
    zero.load_state_dict({"0.weight": torch.ones(3, 2)})
    assert shapes == [[(3, 2), (3,)]]
    assert torch.equal(zero.state_dict()["0.weight"], torch.ones(3, 2))
    with pytest.raises(CheckpointError, match="unexpected \\['other'\\]"):
        zero.load_state_dict({"0.weight": torch.ones(3, 2), "other": torch.ones(1)})


class Transposing(nn.Linear):
    """Loads weights of another layout, and does without a bias."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:  # type: ignore[override]
        state = state_dict
        state[f"{prefix}weight"] = state.pop(f"{prefix}kernel").t()
        state.setdefault(f"{prefix}bias", torch.full((3,), 0.5))
        super()._load_from_state_dict(state, prefix, *rest)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("is_called", [False, True])
def test_a_module_loads_in_its_own_way(device: str, is_called: bool) -> None:
    with torch.device(device):
        zero = fxzero.compile(nn.Sequential(Transposing(2, 3), nn.BatchNorm1d(3)), device="cpu")
    if is_called and device == "cpu":
        zero(torch.ones(4, 2))
    state = {"0.kernel": torch.arange(6.0).view(2, 3), "1.weight": torch.ones(3), "1.bias": torch.zeros(3)}
    state |= {"1.running_mean": torch.full((3,), 2.0), "1.running_var": torch.ones(3)}  # of before num_batches_tracked
    plain = nn.Sequential(Transposing(2, 3), nn.BatchNorm1d(3))
    assert not any(plain.load_state_dict(dict(state)))
    assert not any(zero.load_state_dict(state))
    del plain[1].num_batches_tracked
    found = zero.state_dict()
    assert_same_state({name: found[name] for name in plain.state_dict()}, plain.state_dict())
    with pytest.raises(CheckpointError, match="unexpected \\['0.other'\\]"):
        zero.load_state_dict(state | {"0.other": torch.ones(1)})


def test_weights_of_another_dtype_are_converted() -> None:
    zero, _ = tied()
    zero(IDS)
    state = copy.deepcopy(Tied()).double().state_dict()
    zero.load_state_dict(state)
    assert torch.equal(zero.state_dict()["table.weight"], state["table.weight"].float())


def test_full_parameters_come_bucket_by_bucket_each_once() -> None:
    zero, plain = tied()
    seen = {name: full.clone() for name, full in zero.iter_full_params() if full is not None}
    assert seen.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(full, plain.get_parameter(name)) for name, full in seen.items())


# -- the meta device ---------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage that any operator returned: bytes."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(value, Tensor) and not value.is_meta and type(value) is Tensor:
                self.nbytes = max(self.nbytes, value.untyped_storage().nbytes())
        return result


def _train(zero: nn.Module, plain: nn.Module, ids: bool) -> None:
    own, other = sgd(zero), sgd(plain)
    for seed in range(2):
        for output in both(zero, plain, IDS if ids else points(seed)):
            (output if ids else output.loss).backward()
        own.step()
        other.step()
        assert_same(zero, plain)
        own.zero_grad()
        other.zero_grad()


@pytest.mark.parametrize("first", ["call", "state_dict", "example", "optimizer"])
def test_a_meta_model_has_the_values_of_one_built_with_the_same_seed(first: str) -> None:
    torch.manual_seed(3)
    plain = Net()
    with torch.device("meta"):
        model = Net()
    optimizer = sgd(model)
    torch.manual_seed(3)
    zero = fxzero.compile(model, optimizer=optimizer, device="cpu", example=points() if first == "example" else None)
    if first == "state_dict":
        assert_same_state(zero.state_dict(), plain.state_dict())
    if first == "call":
        with torch.no_grad():
            torch.manual_seed(3)
            zero.eval()(points())
            zero.train()
    other = sgd(plain)
    for seed in range(2):
        torch.manual_seed(3)  # for the initialisers, where the first call runs them
        if first == "optimizer" and seed == 0:
            zero(points())
            plain(points())
            plain.load_state_dict(zero.state_dict())
        for output in both(zero, plain, points(seed)):
            output.loss.backward()
        optimizer.step()
        other.step()
        assert_same(zero, plain)
        optimizer.zero_grad()
        other.zero_grad()
    assert not any(param.is_meta for param in zero.parameters())


def test_a_checkpoint_fills_a_meta_model_without_any_initialiser() -> None:
    called: list[str] = []
    torch.manual_seed(4)
    plain = Net()
    with torch.device("meta"):
        model = Net()
    zero = fxzero.compile(model, init_fn=lambda module: called.append(type(module).__name__))
    zero.load_state_dict(plain.state_dict())
    assert called == []
    assert_same_state(zero.state_dict(), plain.state_dict())
    _train(zero, plain, ids=False)


def test_buffers_that_no_checkpoint_has_are_initialised() -> None:
    torch.manual_seed(4)
    plain = Tied()
    with torch.device("meta"):
        model = Tied()
    zero = fxzero.compile(model)
    zero.load_state_dict(plain.state_dict())
    assert zero.cache.tolist() == [0, 1, 2]
    _train(zero, plain, ids=True)


def test_what_a_checkpoint_lacks_is_initialised() -> None:
    with torch.device("meta"):
        model = Net()
    zero = fxzero.compile(model, init_fn=lambda m: [nn.init.constant_(p, 3.0) for p in m.parameters(recurse=False)])
    zero.load_state_dict({"head.weight": torch.ones(5, 8)}, strict=False)
    state = zero.state_dict()
    assert (state["head.weight"] == 1).all() and (state["body.weight"] == 3).all()
    assert (state["norm.running_var"] == 1).all()


def test_a_meta_model_never_has_more_than_its_shards_and_one_bucket() -> None:
    num_layers, width = 8, 64
    with torch.device("meta"):
        model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(num_layers)])
    layer_bytes = width * width * 4
    zero = fxzero.compile(model, passes=default_passes(bucket_bytes=layer_bytes))
    with Largest() as largest:
        zero(torch.ones(1, width))
    assert largest.nbytes <= num_layers * layer_bytes  # world size 1: the shards themselves


def test_hooks_on_parameters_survive_the_meta_device() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(6, 4, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.gru(x)[0].sum()

    with torch.device("meta"):
        model = Recurrent()
    seen: list[int] = []
    names = {id(param): name for name, param in model.named_parameters()}
    for param in model.parameters():
        param.register_post_accumulate_grad_hook(lambda p: seen.append(id(p)))
    zero = fxzero.compile(model)
    zero(points()[None]).backward()
    assert {names[each] for each in seen} == set(names.values())
    assert {id(param) for param in zero.parameters()} == set(names)


def test_a_meta_model_that_nothing_initialises_is_refused_at_compile() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.weight

    with torch.device("meta"):
        model = nn.Sequential(Own())
    with pytest.raises(FxzeroError, match=r"0.weight"):
        fxzero.compile(model, example=torch.ones(3))
