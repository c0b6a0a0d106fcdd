"""Checkpoints of torch.distributed.checkpoint between numbers of ranks, layouts, FSDP2 and plain PyTorch."""

from pathlib import Path
from typing import Any

import pytest

from fxzero.testing import run_ranks
from tests.distributed import checkpoint_workers as workers


def saved(world_size: int, form: str, path: Path, how: str = "get") -> dict[str, Any]:
    return run_ranks(world_size, workers.save, form, str(path), how)[0]


def test_from_three_ranks_to_others_to_fsdp2_and_to_plain(tmp_path: Path) -> None:
    wanted = saved(3, "example", tmp_path / "a")
    for world_size, form in ((2, "small buckets"), (1, "example"), (2, "meta"), (2, "fsdp2"), (1, "plain")):
        run_ranks(world_size, workers.load, form, str(tmp_path / "a"), "get", wanted)
    for how in ("all", "broadcast"):
        run_ranks(2, workers.set_full, how, wanted)


@pytest.mark.parametrize(("world_size", "form"), [(2, "fsdp2"), (1, "plain")])
def test_from_fsdp2_and_plain(tmp_path: Path, world_size: int, form: str) -> None:
    wanted = saved(world_size, form, tmp_path / "a")
    run_ranks(3, workers.load, "lazy", str(tmp_path / "a"), "get", wanted)


@pytest.mark.parametrize("how", ["flat", "async", "stateful"])
def test_in_other_ways(tmp_path: Path, how: str) -> None:
    wanted = saved(3, "scalar", tmp_path / "a", how)
    then = "get" if how == "async" else how
    run_ranks(2, workers.load, "scalar", str(tmp_path / "a"), then, wanted)


def test_an_optimizers_own_state_dict_is_saved_whole(tmp_path: Path) -> None:
    wanted = saved(3, "example", tmp_path / "a", "raw")
    run_ranks(2, workers.load, "example", str(tmp_path / "a"), "raw", wanted)


@pytest.mark.parametrize("kind", ["AdamW", "SGD", "Rprop"])
def test_a_question_before_the_first_step_changes_nothing(kind: str) -> None:
    run_ranks(2, workers.asked_before_the_first_step, kind)


def test_state_that_is_not_there_is_saved_as_what_it_would_be_or_refused(tmp_path: Path) -> None:
    run_ranks(2, workers.saved_before_the_first_step, tmp_path)


def test_state_is_refused_while_gradients_wait_for_the_first_step() -> None:
    run_ranks(2, workers.asked_with_gradients)


def test_a_state_dict_that_one_rank_alone_loads_is_refused_on_all() -> None:
    for text in run_ranks(2, workers.loaded_on_rank_0_alone, False):
        assert "rank 1: nothing" in text
        assert "rank 0: scale (1,)" in text
    for text in run_ranks(2, workers.loaded_on_rank_0_alone, True):
        assert "load_state_dict of Net" in text


def test_a_piece_can_be_gathered_and_nothing_else() -> None:
    run_ranks(2, workers.pieces_are_refused)
