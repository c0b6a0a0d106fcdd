"""What belongs to a compiled model outside of a step: parts are refused by name, state dicts are whole."""

import contextlib
import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxzero
from fxzero.errors import FxzeroError
from fxzero.testing import run_ranks
from tests.distributed.weight_workers import assert_same_weights, net, points


class Encoder(nn.Module):
    """A model with methods of its own, a scalar and a parameter that a method uses by itself."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(10, 8)
        self.enc = nn.Sequential(nn.Linear(8, 6))
        self.scale = nn.Parameter(torch.ones(()))
        self.proj = nn.Parameter(torch.randn(6, 6))

    def encode(self, x: Tensor) -> Tensor:
        return self.enc(x)

    def project(self, x: Tensor) -> Tensor:
        return x @ self.proj

    def num_parameters(self) -> int:
        return sum(param.numel() for param in self.parameters())

    @torch.no_grad()
    def clamp(self) -> None:
        self.proj.clamp_(-0.5, 0.5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.project(self.encode(self.emb(ids))).pow(2).mean() * self.scale.exp()


REFUSED: dict[str, Callable[[Any], object]] = {
    "emb is a part": lambda zero: zero.emb(torch.arange(3)),
    "enc is a part": lambda zero: zero.enc(torch.ones(2, 8)),
    r"enc\.0 is a part": lambda zero: zero.enc[0](torch.ones(2, 8)),
    "The state dict of emb": lambda zero: zero.emb.state_dict(),
}


def parts_are_refused(rank: int, world_size: int) -> None:
    zero = fxzero.compile(Encoder())
    zero(torch.arange(4)).backward()
    for name, use in REFUSED.items():
        with pytest.raises(FxzeroError, match=name):
            use(zero)
    plain = Encoder()
    assert zero.num_parameters() == sum(param.numel() for param in plain.parameters())
    zero.clamp()
    plain.clamp()
    assert_same_weights(zero, plain)
    if world_size > 1:
        with pytest.raises(FxzeroError, match="scale is a scalar parameter, whose only element lies on one rank"):
            zero.scale.exp()
        with torch.no_grad():
            dict(zero.named_parameters())["scale"].clamp_(0, 0.5)
        assert zero.state_dict()["scale"] == 0.5
    else:
        assert zero.scale.exp() == plain.scale.exp()


@pytest.mark.parametrize("world_size", [1, 2])
def test_parts_outside_of_a_step_are_refused_by_name(world_size: int) -> None:
    run_ranks(world_size, parts_are_refused)


def test_a_container_is_one_after_compile() -> None:
    zero, plain = fxzero.compile(net(), example=points(0)), fxzero.compile(Encoder())
    assert len(cast(Any, zero)) == 4
    assert isinstance(cast(Any, zero)[0], nn.Linear)
    assert [type(part).__name__ for part in cast(Any, zero)] == ["Linear", "LayerNorm", "ReLU", "Linear"]
    assert not hasattr(plain, "__len__")
    assert bool(plain)


# -- state dicts with hooks --------------------------------------------------------------------------------------


def cast_to_bfloat16(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in [name for name in state if name.startswith(prefix)]:
        state[name] = state[name].to(torch.bfloat16)


def clone(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    for name in list(state):
        state[name] = state[name].clone()


def rename(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    state[f"{prefix}renamed"] = state.pop(f"{prefix}weight").t().contiguous()


def norm_of_all(module: nn.Module, state: dict[str, Any], prefix: str, metadata: object) -> None:
    state[f"{prefix}norm"] = module.get_parameter("weight").detach().norm()


HOOKS = {"cast": cast_to_bfloat16, "clone": clone, "rename": rename, "norm": norm_of_all}


def state_with_hook(rank: int, world_size: int, rank0_only: bool) -> None:
    for name, hook in HOOKS.items():
        plain, model = net(), net()
        for each in (plain, model):
            each.get_submodule("0").register_state_dict_post_hook(hook)
        zero = fxzero.compile(model, example=points(rank))
        got, expected = zero.state_dict(rank0_only=rank0_only), plain.state_dict()
        if rank0_only and rank > 0:
            assert not got
        else:
            assert list(got) == list(expected), name
            for key, value in expected.items():
                assert got[key].dtype is value.dtype
                assert torch.equal(got[key], value), (name, key)
        if name == "cast" and not rank0_only:
            zero.load_state_dict(expected)
            assert torch.equal(zero.state_dict()["0.weight"], expected["0.weight"])
        zero(points(rank)).sum().backward()


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("rank0_only", [False, True])
def test_hooks_of_state_dicts_see_whole_tensors(world_size: int, rank0_only: bool) -> None:
    run_ranks(world_size, state_with_hook, rank0_only)


class Overrides(nn.Sequential):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state = super().state_dict(*args, **kwargs)
        return OrderedDict((name, value.half()) for name, value in state.items())


def test_a_state_dict_of_the_models_own_is_used() -> None:
    plain = Overrides(nn.Linear(8, 4))
    zero = fxzero.compile(copy.deepcopy(plain), example=points(0))
    for name, value in plain.state_dict().items():
        assert torch.equal(zero.state_dict()[name], value)


# -- loading around and inside -----------------------------------------------------------------------------------


def load_parts(rank: int, world_size: int) -> None:
    torch.manual_seed(1)
    other = nn.Sequential(nn.Linear(8, 24), nn.LayerNorm(24), nn.ReLU(), nn.Linear(24, 3))
    zero = fxzero.compile(net(), example=points(rank))
    around = nn.ModuleDict({"net": zero, "head": nn.Linear(3, 3)})
    wanted = nn.ModuleDict({"net": other, "head": nn.Linear(3, 3)})
    keys = around.load_state_dict(wanted.state_dict())
    assert not keys.missing_keys
    assert not keys.unexpected_keys
    assert_same_weights(zero, other)
    assert around.state_dict().keys() == wanted.state_dict().keys()
    plain = net()
    zero.get_submodule("0").load_state_dict(plain.get_submodule("0").state_dict())
    other.get_submodule("0").load_state_dict(plain.get_submodule("0").state_dict())
    assert_same_weights(zero, other)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0.weight: .*torch.Size\(\[24, 8\]\)"):
        nn.ModuleList([zero.get_submodule("0")]).load_state_dict({"0.weight": torch.ones(3), "0.bias": torch.ones(24)})
    with pytest.raises(ValueError, match="assign=True would replace the shards"):
        around.load_state_dict(wanted.state_dict(), assign=True)
    zero(points(rank)).sum().backward()


@pytest.mark.parametrize("world_size", [1, 3])
def test_whole_tensors_are_loaded_from_around_and_into_parts(world_size: int) -> None:
    run_ranks(world_size, load_parts)


def initialisers(rank: int, world_size: int) -> None:
    plain, zero = net(), fxzero.compile(net())
    for module in (plain, zero):
        torch.manual_seed(3)
        nn.init.xavier_normal_(module.get_parameter("0.weight"))  # nothing is sharded yet
    zero(points(rank)).sum().backward()
    weight = zero.get_parameter("0.weight")
    by_shape: list[Callable[[], Any]] = [
        lambda: nn.init.xavier_uniform_(weight), lambda: nn.init.xavier_normal_(weight.data),
        lambda: nn.init.orthogonal_(weight), lambda: nn.init.eye_(weight),
        lambda: cast("Any", zero)[0].reset_parameters(),
        lambda: zero.apply(lambda each: nn.init.xavier_uniform_(each.weight) if hasattr(each, "weight") else None),
    ]  # fmt: skip
    for initialise in by_shape:
        with pytest.raises(FxzeroError, match="looks at the shape of .*summon_full_params"):
            initialise()
    nn.init.constant_(zero.get_parameter("0.bias"), 0.5)
    nn.init.constant_(plain.get_parameter("0.bias"), 0.5)
    if world_size > 1:
        with pytest.raises(FxzeroError, match="draws values of 0.weight on each rank"):
            nn.init.normal_(weight)
    for module, whole in ((plain, contextlib.nullcontext()), (zero, zero.summon_full_params())):
        torch.manual_seed(4)
        with whole:
            module.apply(lambda each: each.reset_parameters() if isinstance(each, nn.Linear) else None)
            nn.init.orthogonal_(module.get_parameter("3.weight"))
    assert_same_weights(zero, plain)


@pytest.mark.parametrize("world_size", [1, 2])
def test_initialisers_of_torch_are_refused_where_they_would_fill_shards(world_size: int) -> None:
    run_ranks(world_size, initialisers)
