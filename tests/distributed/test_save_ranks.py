"""fxzero.save and fxzero.load between numbers of ranks; damage, kills and what does not fit."""

import random
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from fxzero.testing import run_ranks
from tests.distributed import checkpoint_workers, save_workers


@pytest.mark.parametrize("how", ["load", "compile"])
def test_training_goes_on_bit_for_bit(tmp_path: Path, how: str) -> None:
    run_ranks(2, save_workers.goes_on_bit_for_bit, tmp_path, how)


def test_pieces_are_cut_anew_at_other_numbers_of_ranks(tmp_path: Path) -> None:
    wanted = run_ranks(2, save_workers.save, "scalar", tmp_path)[0]
    for world_size, form in ((3, "scalar"), (1, "scalar")):
        (line,) = run_ranks(world_size, save_workers.load, form, tmp_path, wanted)[0]
        assert f"was saved by 2 ranks in 2 buckets; its pieces were cut anew for {world_size} ranks" in line


def test_a_meta_model_is_filled_and_other_buckets_are(tmp_path: Path) -> None:
    wanted = run_ranks(3, save_workers.save, "example", tmp_path)[0]
    assert run_ranks(3, save_workers.load, "meta", tmp_path, wanted)[0] == []
    assert len(run_ranks(3, save_workers.load, "small buckets", tmp_path, wanted)[0]) == 1


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    run_ranks(2, save_workers.damage, tmp_path)


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    run_ranks(1, save_workers.mismatches, tmp_path)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    assert run_ranks(2, save_workers.kept, tmp_path / "a")[0] == ["000003", "000004"]


def test_a_full_disk_fails_the_save_alone(tmp_path: Path) -> None:
    run_ranks(2, save_workers.full_disk, tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for few files, which only root can make."""
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,nr_inodes=30", "tmpfs", tmp_path], check=False, capture_output=True
    )
    if mounted.returncode:
        pytest.skip("cannot mount a file system")
    yield tmp_path
    subprocess.run(["umount", "-l", tmp_path], check=True)


@pytest.mark.parametrize("num_files", [3, 2, 5, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (0, 1, 4, 6))])
def test_a_disk_without_room_for_another_file_is_left_as_it_was(small_disk: Path, num_files: int) -> None:
    run_ranks(2, save_workers.nearly_full_disk, small_disk, num_files)


def test_a_rank_that_cannot_copy_leaves_no_folder(tmp_path: Path) -> None:
    run_ranks(2, save_workers.fails_to_copy, tmp_path)


@pytest.mark.parametrize("rank", [0, pytest.param(1, marks=pytest.mark.exhaustive)])
def test_a_rank_that_is_killed_leaves_the_last_good_one(tmp_path: Path, rank: int) -> None:
    run_ranks(2, save_workers.killed, tmp_path, rank, dies=[rank])
    assert (
        checkpoint_workers.differences(
            run_ranks(1, _weights, tmp_path)[0], run_ranks(1, _weights, tmp_path / "000001")[0]
        )
        == []
    )


def _weights(rank: int, world_size: int, folder: Path) -> dict[str, object]:
    model, optimizer = checkpoint_workers.build("lazy", 3)
    import fxzero

    assert isinstance(model, fxzero.ZeroModule)
    fxzero.load(folder, model, optimizer)
    return checkpoint_workers.full_state(model, optimizer)


@pytest.mark.exhaustive
@pytest.mark.parametrize("is_apart", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_kill_at_any_moment_loses_nothing_that_was_saved(tmp_path: Path, world_size: int, is_apart: bool) -> None:
    draws = random.Random(world_size)
    for _ in range(4):
        dies = draws.randrange(world_size)
        arguments = tmp_path, dies, draws.uniform(0.0, 0.3), is_apart
        run_ranks(world_size, save_workers.saves_until_killed, *arguments, dies=[dies])
        saved = [int(line) for path in tmp_path.glob("saved_*") for line in path.read_text().splitlines()]
        if saved:
            assert run_ranks(1, save_workers.newest_number, tmp_path)[0] >= max(saved)
