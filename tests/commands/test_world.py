"""Ranks find each other, or say in a line why they do not."""

import pytest
import torch

from fxzero.commands.errors import ERROR_STATUS, CommandError, report
from fxzero.commands.world import World, joined
from fxzero.testing import run_ranks
from tests.commands.world_workers import fails_on_rank_0, shares

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        ({"RANK": "abc", "WORLD_SIZE": "2"}, "RANK is 'abc' in the environment; it must be a number"),
        ({"RANK": "", "WORLD_SIZE": "2"}, "RANK is '' in the environment"),
        ({"RANK": "0", "WORLD_SIZE": "1.5"}, "WORLD_SIZE is '1.5' in the environment"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2; ranks count from 0"),
        ({"RANK": "-1", "WORLD_SIZE": "2"}, "RANK=-1 and WORLD_SIZE=2"),
        ({"WORLD_SIZE": "0"}, "RANK=0 and WORLD_SIZE=0"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "Ranks meet at MASTER_ADDR and MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}, "MASTER_ADDR=127.0.0.1 and MASTER_PORT=. Start"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "65536"}, "MASTER_PORT is '65536'"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a.invalid", "MASTER_PORT": "1"},
            "cannot meet at .*a.invalid",
        ),
    ],
)
def test_an_environment_that_is_no_launchers_is_told(
    environment: dict[str, str], told: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    for name, value in (environment | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(CommandError, match=told) as caught, joined("cpu"):
        pass
    assert report("train", caught.value) == ERROR_STATUS
    assert capsys.readouterr().err.startswith("fxzero train: ")  # although it is not the first rank of its machine


def test_values_arrive_on_all_ranks_without_pickling(monkeypatch: pytest.MonkeyPatch) -> None:
    for shared, gathered in run_ranks(2, shares):
        assert shared == ["text with \u2028 and 任务", 3, 0.5, None]
        assert gathered == [{"host": 0}, {"host": 10}]
    alone = World(0, 1, 1, torch.device("cpu"))
    assert alone.share(lambda: ("a", 1)) == ("a", 1)
    assert alone.gather(3) == [3]


def test_an_error_of_the_rank_that_reads_is_that_of_all() -> None:
    assert run_ranks(2, fails_on_rank_0) == ["no such file", "no such file"]
