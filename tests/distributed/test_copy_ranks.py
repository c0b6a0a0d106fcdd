"""Copies of a compiled module, and averages of its parameters, on several ranks."""

from collections.abc import Callable

import pytest

from fxzero.testing import run_ranks
from tests.distributed import copy_workers


@pytest.mark.parametrize(
    "work",
    [
        copy_workers.averages,
        copy_workers.copies,
        copy_workers.teacher_and_student,
        copy_workers.refused,
        copy_workers.one_does_not_copy,
        copy_workers.inside_another,
    ],
)
def test_copies(work: Callable[..., None]) -> None:
    run_ranks(2, work)
