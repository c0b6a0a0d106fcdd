"""clip_grad_norm_ is that of torch. World size 1; tests/distributed/test_api_ranks.py has the rest."""

import pytest
import torch
from torch import nn

from fxzero.errors import PlanError
from fxzero.reference.ablation import Without
from tests.helpers.pairs import as_shard, assert_same, both, pair, points


def _backward(zero: nn.Module, plain: nn.Module, seed: int = 0, use_extra: bool = False) -> None:
    for output in both(zero, plain, points(seed), use_extra, seed=seed):
        output.loss.backward()


@pytest.fixture(params=[(), ("fused_norm",)], ids=["fused", "each"])
def without(request: pytest.FixtureRequest) -> Without:
    """Both ways to clip."""
    return request.param


@pytest.mark.parametrize("norm_type", [2, 2.0, 1, 3.5, float("inf")])
def test_clipping_is_that_of_torch(norm_type: float, without: Without) -> None:
    zero, plain = pair(without=without)
    _backward(zero, plain)
    norm = zero.clip_grad_norm_(0.01, norm_type)
    expected = nn.utils.clip_grad_norm_(plain.parameters(), 0.01, norm_type)
    torch.testing.assert_close(norm, expected, rtol=1e-6, atol=0)
    for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-6, atol=0)


def test_clipping_leaves_out_what_zero_grad_took_back(without: Without) -> None:
    zero, plain = pair(without=without)
    _backward(zero, plain, 0, use_extra=True)
    zero.zero_grad()
    plain.zero_grad()
    _backward(zero, plain, 1)  # does not reach extra, whose bytes are still in the buffer
    torch.testing.assert_close(
        zero.clip_grad_norm_(1.0), nn.utils.clip_grad_norm_(plain.parameters(), 1.0), rtol=1e-6, atol=0
    )
    assert zero.extra.weight.grad is None


def test_clipping_counts_a_gradient_of_the_users_own(without: Without) -> None:
    zero, plain = pair(without=without)
    _backward(zero, plain)
    zero.head.bias.grad, plain.head.bias.grad = torch.full((5,), 7.0), torch.full((5,), 7.0)
    torch.testing.assert_close(
        zero.clip_grad_norm_(1.0), nn.utils.clip_grad_norm_(plain.parameters(), 1.0), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(zero.head.bias.grad, plain.head.bias.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_norms_are_finite_again_behind_gradients_that_were_not(bad: float, without: Without) -> None:
    zero, plain = pair(without=without)
    for factor in (1.0, bad, 1.0):
        for output in both(zero, plain, points()):
            (output.loss * factor).backward()
        norms = zero.clip_grad_norm_(0.01), nn.utils.clip_grad_norm_(plain.parameters(), 0.01)
        torch.testing.assert_close(*norms, rtol=1e-6, atol=0, equal_nan=True)
        if factor == 1.0:
            for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
                if own.grad is not None:
                    torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-6, atol=0)
        zero.zero_grad()
        plain.zero_grad()


def test_clipping_refuses_what_it_cannot_do(without: Without) -> None:
    zero, _ = pair(without=without)
    with pytest.raises(PlanError, match="no gradients before the first backward"):
        zero.clip_grad_norm_(1.0)
    zero(points()).loss.backward()
    with pytest.raises(ValueError, match=r"norm_type is 0.0; it must be positive"):
        zero.clip_grad_norm_(1.0, 0)
    zero.head.bias.grad[0] = float("nan")
    for norm_type in (2.0, float("inf")):
        with pytest.raises(RuntimeError, match="not finite"):
            zero.clip_grad_norm_(1.0, norm_type, error_if_nonfinite=True)
    assert zero.clip_grad_norm_(1.0, float("inf")).isnan()
    assert zero.clip_grad_norm_(1.0).isnan()


def test_the_norm_of_a_frozen_model_is_zero(without: Without) -> None:
    zero, _ = pair(without=without)
    zero.requires_grad_(False)
    x = points().requires_grad_()
    zero(x).loss.backward()
    assert zero.clip_grad_norm_(1.0) == 0.0


def test_gradients_below_the_norm_stay_as_they_are(without: Without) -> None:
    zero, plain = pair(without=without)
    _backward(zero, plain)
    assert zero.clip_grad_norm_(1e6).dtype == torch.float32
    assert_same(zero, plain)


@pytest.mark.parametrize("norm_type", [2, 1, float("inf")])
def test_norms_by_name_are_those_of_the_plain_model(norm_type: float) -> None:
    zero, plain = pair()
    with pytest.raises(PlanError, match="no gradients before the first backward"):
        zero.grad_norms()
    _backward(zero, plain)
    expected = {n: param.grad.norm(norm_type) for n, param in plain.named_parameters() if param.grad is not None}
    found = zero.grad_norms(norm_type)
    assert found.keys() == expected.keys() and "extra.weight" not in found
    for name, norm in found.items():
        torch.testing.assert_close(norm, expected[name], rtol=1e-6, atol=0)


def test_the_number_of_parameters_is_that_of_the_plain_model() -> None:
    zero, plain = pair()
    zero.head.requires_grad_(False)
    assert zero.num_parameters() == sum(param.numel() for param in plain.parameters())
    assert zero.num_parameters(only_trainable=True) == zero.num_parameters() - sum(
        p.numel() for p in plain.head.parameters()
    )
