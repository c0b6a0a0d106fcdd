"""A teacher is averaged with its student shard by shard: right where their buckets are equal, and told where not."""

import copy

import pytest
import torch

import fxzero
from fxzero.testing import run_ranks
from tests.distributed.weight_workers import assert_same_weights, average_grads, net, points


def averaged(rank: int, world_size: int) -> None:
    plain = net()
    plain_teacher = copy.deepcopy(plain).requires_grad_(False)
    student, teacher = fxzero.compile(net()), fxzero.compile(net().requires_grad_(False))
    optimizers = torch.optim.SGD(plain.parameters(), 0.1), torch.optim.SGD(student.parameters(), 0.1)
    for step in range(2):
        for each, guide, optimizer in ((plain, plain_teacher, optimizers[0]), (student, teacher, optimizers[1])):
            (each(points(rank, step)) - guide(points(rank, step) * 2)).pow(2).mean().backward()
            if each is plain:
                average_grads(plain)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for own, other in zip(guide.parameters(), each.parameters(), strict=True):
                    own.mul_(0.9).add_(other, alpha=0.1)
    assert_same_weights(teacher, plain_teacher)
    assert_same_weights(student, plain)


def test_a_teacher_with_the_buckets_of_its_student_is_averaged_by_shard() -> None:
    run_ranks(3, averaged)


def warned(rank: int, world_size: int) -> None:
    model = net()
    next(model.parameters()).requires_grad_(False)
    student = fxzero.compile(model, example=points(rank))
    with pytest.warns(UserWarning, match="do not average them shard by shard"):
        teacher = fxzero.compile(net().requires_grad_(False), example=points(rank))
    assert teacher is not student


def test_buckets_that_differ_are_told() -> None:
    run_ranks(2, warned)
