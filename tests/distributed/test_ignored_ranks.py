"""Parameters that stay as they are: `compile(ignored_params=)` on real ranks."""

from pathlib import Path

import ignored_workers as workers
import pytest

from fxzero.testing import run_ranks


def test_training_equals_fsdp2() -> None:
    run_ranks(2, workers.train, False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("world_size", "bf16"), [(1, False), (1, True), (2, True), (3, False), (3, True)])
def test_training_equals_fsdp2_at_other_sizes_and_dtypes(world_size: int, bf16: bool) -> None:
    run_ranks(world_size, workers.train, bf16)


def test_ranks_clip_by_one_norm() -> None:
    run_ranks(2, workers.norms)


def test_an_optimizer_of_them_alone_skips_what_others_skip() -> None:
    run_ranks(2, workers.steps_of_their_own)


def test_checkpoints_parts_and_refusals(tmp_path: Path) -> None:
    run_ranks(2, workers.other_uses, str(tmp_path))


@pytest.mark.exhaustive
def test_checkpoints_parts_and_refusals_on_one_rank(tmp_path: Path) -> None:
    run_ranks(1, workers.other_uses, str(tmp_path))
