"""What a user sees in `.grad`: that of plain PyTorch, whatever is called in between. World size 1."""

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from fxzero.errors import FxzeroError, PlanError
from tests.helpers.pairs import as_shard, assert_same, both, pair, points, sgd


def backward_both(zero: nn.Module, plain: nn.Module, seed: int = 0, **kwargs: Any) -> None:
    """One backward of the loss in each."""
    own, other = both(zero, plain, points(seed), seed=seed, **kwargs)
    own.loss.backward()
    other.loss.backward()


def test_grad_is_overwritten_where_it_is_none_and_added_where_it_is_set() -> None:
    zero, plain = pair()
    for seed in range(4):
        backward_both(zero, plain, seed)
        assert_same(zero, plain)
        if seed == 1:
            zero.zero_grad()
            plain.zero_grad()


def test_grad_after_zero_grad_that_keeps_tensors() -> None:
    zero, plain = pair()
    for seed in range(3):
        backward_both(zero, plain, seed)
        assert_same(zero, plain)
        for module in (zero, plain):
            module.zero_grad(set_to_none=False)


def test_grad_of_the_users_own_is_added_to() -> None:
    zero, plain = pair()
    backward_both(zero, plain)
    own = torch.full_like(zero.head.weight, 2.0)
    zero.head.weight.grad = own
    plain.head.weight.grad = torch.full_like(plain.head.weight, 2.0)
    backward_both(zero, plain, 1)
    assert_same(zero, plain)
    assert torch.equal(own, torch.full_like(own, 2.0))  # the user's tensor is not written


def test_one_grad_set_to_none_starts_anew_while_the_others_add() -> None:
    zero, plain = pair()
    backward_both(zero, plain)
    zero.body.bias.grad = plain.body.bias.grad = None
    backward_both(zero, plain, 1)
    assert_same(zero, plain)


def test_grad_set_before_the_first_backward_is_added_to() -> None:
    zero, plain = pair(example=points())
    zero.head.bias.grad = torch.ones_like(zero.head.bias)
    plain.head.bias.grad = torch.ones_like(plain.head.bias)
    backward_both(zero, plain)
    assert_same(zero, plain)


def test_unreached_parameters_keep_no_grad_so_that_weight_decay_skips_them() -> None:
    zero, plain = pair()
    own, other = sgd(zero), sgd(plain)
    for step in range(2):
        backward_both(zero, plain, step)
        assert zero.extra.weight.grad is None
        own.step()
        other.step()
        assert_same(zero, plain)
        own.zero_grad()
        other.zero_grad()


def test_accumulation_over_calls_that_reach_different_parameters() -> None:
    zero, plain = pair()
    own, other = sgd(zero), sgd(plain)
    for step in range(2):
        for micro, use_extra in enumerate((False, True, False)):
            backward_both(zero, plain, 10 * step + micro, use_extra=use_extra)
            assert_same(zero, plain)
        own.step()
        other.step()
        own.zero_grad()
        other.zero_grad()
        assert_same(zero, plain)


def test_two_calls_before_one_backward_add_up() -> None:
    zero, plain = pair()
    for module in (zero, plain):
        torch.manual_seed(0)
        first, second = module(points(0)), module(points(1), use_extra=True)
        (first.loss + 3 * second.loss).backward()
    assert_same(zero, plain)


def test_two_calls_and_two_backwards_in_the_other_order() -> None:
    zero, plain = pair()
    for module in (zero, plain):
        torch.manual_seed(0)
        first, second = module(points(0)), module(points(1))
        first.loss.backward()
        second.loss.backward()
    assert_same(zero, plain)


@pytest.mark.parametrize("scale", [0.25, 3, torch.tensor(0.1)])
def test_a_scaled_loss(scale: Any) -> None:
    zero, plain = pair()
    for module in (zero, plain):
        torch.manual_seed(0)
        (module(points()).loss * scale).backward()
    assert_same(zero, plain)


def test_a_loss_divided_in_place() -> None:
    zero, plain = pair()
    for module in (zero, plain):
        torch.manual_seed(0)
        loss = module(points()).loss
        loss /= 4
        loss.backward()
    assert_same(zero, plain)


def test_other_outputs_are_differentiated_and_back_again() -> None:
    zero, plain = pair()

    def use(module: nn.Module, what: str) -> None:
        torch.manual_seed(1)
        output = module(points())
        losses = {
            "loss": output.loss,
            "logits": output.logits.abs().sum(),
            "both": output.loss + output.logits.exp().mean(),
        }
        losses[what].backward()

    for what in ("loss", "logits", "logits", "both", "loss"):
        use(zero, what)
        use(plain, what)
        assert_same(zero, plain)


def test_inputs_that_require_grad_get_theirs_beside_others_that_do_not() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 6)
            self.linear = nn.Linear(6, 3)

        def forward(self, ids: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return (self.linear(self.table(ids) * x) + y.detach().sum()).square().sum()

    torch.manual_seed(0)
    zero, plain = pair(Mixed())
    ids = torch.arange(4)
    grads: list[Any] = []
    for module in (zero, plain):
        x, y = points().requires_grad_(), points(1).requires_grad_()
        hidden = x * 2  # not a leaf
        module(ids, x=hidden, y=y).backward()
        grads.append((x.grad, y.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][1] is None and grads[1][1] is None
    assert_same(zero, plain)


def test_the_gradient_is_computed_though_only_an_input_asks_for_it() -> None:
    zero, plain = pair()
    grads = []
    for module in (zero, plain):
        module.requires_grad_(False).eval()
        x = points().requires_grad_()
        module(x).loss.backward()
        grads.append(x.grad)
    assert torch.equal(grads[0], grads[1])
    assert all(param.grad is None for param in zero.parameters())


# -- hooks -------------------------------------------------------------------------------------------------------


def test_post_accumulate_grad_hooks_run_with_the_gradient_there() -> None:
    zero, plain = pair()
    seen: dict[str, torch.Tensor] = {}
    for name, param in zero.named_parameters():
        param.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    backward_both(zero, plain)
    expected = {name: as_shard(param.grad) for name, param in plain.named_parameters() if param.grad is not None}
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], grad) for name, grad in expected.items())


def test_a_hook_may_step_and_clear_its_parameter() -> None:
    zero, plain = pair()
    optimizers = [{p: torch.optim.SGD([p], lr=0.1) for p in module.parameters()} for module in (zero, plain)]
    for each in optimizers:
        for param, optimizer in each.items():

            def step(p: torch.Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
                optimizer.step()
                p.grad = None

            param.register_post_accumulate_grad_hook(step)
    for seed in range(3):
        backward_both(zero, plain, seed)
        assert_same(zero, plain)


def test_hooks_on_gradients_are_refused() -> None:
    zero, _ = pair()
    zero.head.weight.register_hook(lambda grad: grad * 2)
    loss = zero(points()).loss
    with pytest.raises(FxzeroError, match=r"head.weight has a hook.*register_post_accumulate_grad_hook"):
        loss.backward()


# -- no_sync() ---------------------------------------------------------------------------------------------------


def test_no_sync_has_the_local_gradients_until_the_backward_outside() -> None:
    zero, plain = pair()
    with zero.no_sync():
        backward_both(zero, plain, 0)
        assert_same(zero, plain)
        with zero.no_sync():
            backward_both(zero, plain, 1)
        backward_both(zero, plain, 2)
    assert_same(zero, plain)
    backward_both(zero, plain, 3)
    for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None:
            torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-6, atol=1e-7)
    zero.clip_grad_norm_(0.1)
    nn.utils.clip_grad_norm_(plain.parameters(), 0.1)
    for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
        if own.grad is not None:
            torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-5, atol=1e-7)


def test_no_sync_adds_to_gradients_that_were_there_before() -> None:
    zero, plain = pair()
    backward_both(zero, plain, 0)
    before = zero.head.weight.grad.clone()
    with zero.no_sync():
        backward_both(zero, plain, 1)
    assert torch.equal(zero.head.weight.grad, before)
    backward_both(zero, plain, 2)
    torch.testing.assert_close(zero.head.weight.grad, as_shard(plain.head.weight.grad), rtol=1e-6, atol=1e-7)


def test_no_sync_holds_parameters_that_the_last_call_does_not_reach() -> None:
    zero, plain = pair()
    for _ in range(2):
        with zero.no_sync():
            backward_both(zero, plain, 0, use_extra=True)
        backward_both(zero, plain, 1)  # one bucket has them all, so extra is reduced with it
        for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-6, atol=1e-7)
        zero.zero_grad()
        plain.zero_grad()


def test_a_last_call_that_would_leave_gradients_behind_is_refused() -> None:
    from fxzero.passes import default_passes

    zero, _ = pair(passes=default_passes(bucket_bytes=1))
    with zero.no_sync():
        zero(points(), use_extra=True).loss.backward()
    loss = zero(points()).loss
    with pytest.raises(PlanError, match=r"no_sync\(\) holds the gradient of extra.weight \(and 1 more\)"):
        loss.backward()
    zero.zero_grad()
    zero(points()).loss.backward()
    assert zero.extra.weight.grad is None


def test_zero_grad_drops_what_no_sync_holds() -> None:
    zero, plain = pair()
    with zero.no_sync():
        backward_both(zero, plain, 0)
    zero.zero_grad()
    plain.zero_grad()
    plain.load_state_dict(zero.state_dict())
    backward_both(zero, plain, 1)
    assert_same(zero, plain)


def _zeroed_by_optimizer(module: nn.Module, *, to_none: bool) -> None:
    torch.optim.SGD(module.parameters(), 0.1).zero_grad(set_to_none=to_none)


RESETS: dict[str, Callable[[nn.Module], object]] = {
    "optimizer": lambda module: _zeroed_by_optimizer(module, to_none=True),
    "optimizer, kept": lambda module: _zeroed_by_optimizer(module, to_none=False),
    "by hand": lambda module: [setattr(param, "grad", None) for param in module.parameters()],
    "one": lambda module: setattr(module.get_parameter("head.weight"), "grad", None),
    "one, kept": lambda module: cast(Tensor, module.get_parameter("body.weight").grad).zero_(),
}


@pytest.mark.parametrize("how", RESETS)
@pytest.mark.parametrize("reduced_before", [False, True])
def test_what_no_sync_holds_goes_with_the_gradient(how: str, reduced_before: bool) -> None:
    zero, plain = pair()
    if reduced_before:
        backward_both(zero, plain, 3)
    with zero.no_sync():
        backward_both(zero, plain, 0)
    for module in (zero, plain):
        RESETS[how](module)
    backward_both(zero, plain, 1)
    for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-6, atol=1e-7)


def test_a_batch_under_no_sync_is_thrown_away_under_no_sync() -> None:
    zero, plain = pair()
    with zero.no_sync():
        backward_both(zero, plain, 0)
        for module in (zero, plain):
            RESETS["optimizer"](module)
        backward_both(zero, plain, 1)
    backward_both(zero, plain, 2)
    for own, other in zip(zero.parameters(), plain.parameters(), strict=True):
        if own.grad is not None and other.grad is not None:
            torch.testing.assert_close(own.grad, as_shard(other.grad), rtol=1e-6, atol=1e-7)


def test_gradients_that_no_sync_holds_are_neither_stepped_nor_clipped_nor_scaled() -> None:
    zero, _ = pair()
    optimizer = sgd(zero)
    with zero.no_sync():
        zero(points(0)).loss.backward()
    with pytest.raises(PlanError, match=r"no_sync\(\) holds the gradient of \S+ \(and \d more\), which ranks"):
        optimizer.step()
    with pytest.raises(PlanError, match=r"no_sync\(\) holds the gradient"):
        zero.clip_grad_norm_(1.0)
    nn.utils.clip_grad_norm_(zero.parameters(), 1e-3)
    with pytest.raises(PlanError, match=r"The gradient of \S+ was changed while no_sync\(\) holds"):
        zero(points(0)).loss.backward()
    optimizer.zero_grad()
    zero(points(0)).loss.backward()
    optimizer.step()


def test_no_sync_then_eval_then_training_goes_on() -> None:
    zero, plain = pair()
    with zero.no_sync():
        backward_both(zero, plain, 0)
    for module in (zero, plain):
        module.eval()
    with torch.no_grad():
        own, other = both(zero, plain, points(5))
    assert torch.equal(own.logits, other.logits)
    for module in (zero, plain):
        module.train()
    backward_both(zero, plain, 1)
    torch.testing.assert_close(zero.body.weight.grad, as_shard(plain.body.weight.grad), rtol=1e-6, atol=1e-7)


# -- freezing ----------------------------------------------------------------------------------------------------


def test_freezing_and_unfreezing_between_steps() -> None:
    zero, plain = pair()
    own, other = sgd(zero), sgd(plain)
    for step, frozen in enumerate(([], ["body"], ["body", "head"], ["head"], [])):
        for module in (zero, plain):
            for name, param in module.named_parameters():
                param.requires_grad_(name.split(".")[0] not in frozen)
        backward_both(zero, plain, step)
        assert_same(zero, plain)
        own.step()
        other.step()
        assert_same(zero, plain)
        own.zero_grad()
        other.zero_grad()


def test_unfreezing_what_was_frozen_at_compile() -> None:
    from tests.helpers.pairs import Net

    torch.manual_seed(0)
    model = Net()
    model.body.requires_grad_(False)
    zero, plain = pair(model)
    for step, frozen in enumerate((True, False, True)):
        zero.body.requires_grad_(not frozen)
        plain.body.requires_grad_(not frozen)
        with zero.no_sync():
            backward_both(zero, plain, step)
        zero.zero_grad()
        plain.zero_grad()
        plain.load_state_dict(zero.state_dict())
        backward_both(zero, plain, step)
        assert_same(zero, plain)
        norm = zero.clip_grad_norm_(1e9)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(plain.parameters(), 1e9), rtol=1e-6, atol=0)
        zero.zero_grad()
        plain.zero_grad()
