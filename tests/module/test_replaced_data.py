"""Other tensors in the place of shards: what was there keeps its values, as in plain PyTorch."""

import pytest
import torch

from fxzero.testing import run_ranks
from tests.distributed import weight_workers
from tests.helpers.pairs import assert_same, both, pair, points, sgd


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("swap", weight_workers.SWAPS)
def test_averaged_weights_are_evaluated_and_the_shards_put_back(world_size: int, swap: str) -> None:
    run_ranks(world_size, weight_workers.averaged_weights, swap)


def test_data_replaced_between_micro_steps_is_seen_on_all_ranks() -> None:
    run_ranks(3, weight_workers.attack_between_micro_steps)


def test_a_backup_can_be_read_while_other_data_is_in_its_place() -> None:
    zero, plain = pair(example=points())
    for module in (zero, plain):  # Reptile: the difference of two steps is taken while the other weights are there
        backup = {name: param.data for name, param in module.named_parameters()}
        for seed in range(2):
            torch.manual_seed(0)
            module(points(seed)).loss.backward()
            for param in module.parameters():
                if param.grad is not None:
                    param.data = param.data - 0.1 * param.grad
                    param.grad = None
        for name, param in module.named_parameters():
            param.data = backup[name] + 0.5 * (param.data - backup[name])
    for own in both(zero, plain, points(3)):
        own.loss.backward()
    assert_same(zero, plain)


def test_a_backward_uses_the_data_of_its_forward() -> None:
    zero, plain = pair(example=points())
    for module in (zero, plain):
        weight = module.get_parameter("body.weight")
        backup, weight.data = weight.data, weight.data * 2
        torch.manual_seed(0)
        first = module(points(0)).loss
        weight.data = backup
        torch.manual_seed(0)
        second = module(points(1)).loss
        (first * 2).backward()
        second.backward()
    assert_same(zero, plain)


def test_an_optimizer_steps_the_data_that_is_there() -> None:
    zero, plain = pair(example=points())
    optimizers = sgd(zero), sgd(plain)
    for seed in range(3):
        for output in both(zero, plain, points(seed)):
            output.loss.backward()
        for module, optimizer in zip((zero, plain), optimizers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            weight = module.get_parameter("head.weight")
            weight.data = weight.data * 0.5
    for output in both(zero, plain, points(5)):
        output.loss.backward()
    assert_same(zero, plain)
    state = zero.state_dict()
    assert torch.equal(state["head.weight"], plain.head.weight)


def test_two_parameters_exchange_their_data() -> None:
    zero, plain = pair(example=points())
    for module in (zero, plain):
        a, b = module.get_parameter("norm.weight"), module.get_parameter("norm.bias")
        a.data, b.data = b.data, a.data
    for output in both(zero, plain, points(1)):
        output.loss.backward()
    assert_same(zero, plain)
