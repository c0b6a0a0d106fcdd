"""Comparing two revisions: the statistics, the two trees, and whole runs of models that are next to nothing."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from benchmarks.about import ROOT
from benchmarks.against.__main__ import main, parse
from benchmarks.against.checkout import MODELS, NoRevision, commit_of, two_trees
from benchmarks.against.measure import Measured
from benchmarks.against.ratios import Pair, Ratio, medians_of, ratio_of
from benchmarks.against.report import Report, report_of
from benchmarks.against.scenarios import SCENARIOS, WITH_FIRST_STEPS, shape_of
from benchmarks.against.workers.__main__ import check_origin
from benchmarks.network.systems import SYSTEMS, Shape

SIZES = {"layers": 1, "hidden": 16, "heads": 2, "vocab": 32, "seq": 8, "batch": 2, "k": 2, "warmup": 1}
TINY = [f"--{name}={size}" for name, size in SIZES.items()]


@pytest.fixture
def head() -> str:
    """The commit of this tree, where it has one."""
    if not (ROOT / ".git").exists():
        pytest.skip("There is no repository here.")
    try:
        return commit_of("HEAD")
    except NoRevision as error:
        pytest.skip(str(error))


# -- ratios --------------------------------------------------------------------------------------------------------


def _pairs(*ratios: float) -> list[Pair]:
    """Of rounds that take longer and longer, in both trees."""
    return [(ratio * (1 + round_), 1 + round_) for round_, ratio in enumerate(ratios)]


def test_a_ratio_that_never_differs_has_no_interval() -> None:
    found = ratio_of([_pairs(1.5, 1.5, 1.5), _pairs(1.5, 1.5, 1.5)])
    assert (found.median, found.low, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_the_interval_lies_about_the_median() -> None:
    found = ratio_of([_pairs(0.8, 0.9, 0.95, 1.0, 1.0, 1.0, 1.05, 1.1, 1.2)])
    assert found.median == 1
    assert 0.9 <= found.low < 1 < found.high <= 1.1


def test_one_round_that_was_disturbed_changes_nothing() -> None:
    found = ratio_of([_pairs(*[1.0] * 8, 50.0)])
    assert (found.median, found.low, found.high) == (1, 1, 1)


def test_the_interval_spans_starts_that_differ() -> None:
    found = ratio_of([_pairs(*[1.0] * 20), _pairs(*[1.2] * 20)])
    assert (found.median, found.low, found.high) == pytest.approx((1.1, 1.0, 1.2))


def test_the_same_pairs_have_the_same_interval() -> None:
    pairs = [_pairs(0.9, 1.0, 1.1), _pairs(1.0, 1.1, 1.3)]
    assert ratio_of(pairs) == ratio_of(pairs)


def test_medians_are_of_each_tree_by_itself() -> None:
    assert medians_of([[(1, 10), (3, 20)], [(5, 30), (7, 90)]]) == (4, 25)


@pytest.mark.parametrize(
    ("ratio", "passes"),
    [
        (Ratio(0.98, 0.97, 0.99), True),
        (Ratio(1.01, 1.0, 1.05), True),
        (Ratio(1.01, 1.001, 1.05), False),  # slower by little, but for certain
        (Ratio(1.03, 0.9, 1.2), False),  # who knows; measure again
    ],
)
def test_not_slower_is_an_interval_that_reaches_one_and_a_median_near_it(ratio: Ratio, passes: bool) -> None:
    assert ratio.passes() is passes


def test_a_limit_decides_alone() -> None:
    assert Ratio(1.08, 1.07, 1.09).passes(limit=1.1)
    assert not Ratio(1.12, 0.9, 1.3).passes(limit=1.1)


# -- reports -------------------------------------------------------------------------------------------------------


def _report(found: dict[str, list[list[Pair]]], *options: str) -> Report:
    arguments = parse(["HEAD", *options])
    return report_of(SCENARIOS[arguments.scenario], arguments, "0123456789abcdef", Measured(found, {"calls": (9, 8)}))


def test_the_report_names_what_is_slower() -> None:
    report = _report({"step, s": [_pairs(*[1.1] * 8)], "other, s": [_pairs(*[0.9] * 8)]}, "single_rank")
    assert not report.passes
    assert report.verdict == "slower: step, s: 1.100 (1.100 to 1.100)"
    lines = str(report).splitlines()
    (row,) = [line for line in lines if line.startswith("| other, s")]
    assert [cell.strip() for cell in row.split("|")[4:-1]] == ["0.900", "0.900 to 0.900", "not slower"]
    assert "| calls     |      9 |       8 |" in lines
    assert lines[-1] == report.verdict


def test_a_peak_is_larger_not_slower() -> None:
    found = {"peak resident, MiB": [_pairs(1.0)]}
    assert _report(found, "peak_memory").verdict.startswith("not larger: ")


def test_first_steps_have_no_verdict() -> None:
    found = {"gpt: compile, processor s": [_pairs(*[1.05] * 8)], f"gpt: {WITH_FIRST_STEPS}": [_pairs(*[3.0] * 8)]}
    assert _report(found, "planning_time", "--limit", "1.1").verdict.startswith("not slower than 1.1 times")
    report = _report(found, "planning_time")
    assert report.verdict.startswith("slower: gpt: compile, processor s: 1.050")
    assert [row.passes for row in report.rows] == [False, None]


# -- options -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["HEAD", "nothing"], "invalid choice: 'nothing'"),
        (["HEAD", "single_rank", "--k", "1"], "--k must be at least 2"),
        (["HEAD", "single_rank", "--rounds", "0"], "at least one start and one round"),
        (["HEAD", "single_rank", "--limit", "2"], "unrecognized arguments: --limit"),
        (["HEAD", "network", "--systems", "ddp"], "invalid choice: 'ddp'"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        parse(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_scenario_has_a_worker_and_systems_that_exist(name: str) -> None:
    assert (ROOT / "benchmarks" / "against" / "workers" / f"{name}.py").exists()
    assert SYSTEMS.keys() >= {*SCENARIOS[name].systems}


def test_a_worker_is_told_sizes_of_the_model() -> None:
    assert shape_of(parse(["HEAD", "network", "--layers", "3"]).numbers) == Shape(layers=3)


# -- the two trees -------------------------------------------------------------------------------------------------


def _worktrees() -> str:
    command = ["git", "-C", str(ROOT), "worktree", "list", "--porcelain"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_other_tree_is_there_until_its_end(head: str) -> None:
    with two_trees(head) as (here, there):
        assert f"worktree {there.checkout.resolve()}\n" in _worktrees()
        assert (here.checkout, (here.imports / "fxzero").resolve()) == (ROOT, ROOT / "fxzero")
        assert (there.imports / "fxzero").resolve() == (there.checkout / "fxzero").resolve()
        for tree in here, there:
            assert (tree.imports / "benchmarks").resolve() == ROOT / "benchmarks"
            assert (tree.imports / MODELS / "__init__.py").exists()
            assert (tree.imports / "fxzero" / "passes" / "__init__.py").exists()  # its own links hold
    assert str(there.checkout.resolve()) not in _worktrees()
    assert not there.checkout.exists() and not there.imports.exists()


def test_the_other_tree_is_removed_after_an_interrupt(head: str) -> None:
    checkouts: list[Path] = []
    with pytest.raises(KeyboardInterrupt), two_trees(head) as (_, there):
        checkouts.append(there.checkout.resolve())
        raise KeyboardInterrupt
    assert not checkouts[0].exists()
    assert str(checkouts[0]) not in _worktrees()


def test_an_unknown_revision_is_refused(head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["no-such-revision", "single_rank"]) == 2
    assert "no-such-revision" in capsys.readouterr().err


def test_a_worker_refuses_the_fxzero_of_another_tree(tmp_path: Path) -> None:
    check_origin(str(ROOT / "fxzero" / "__init__.py"), ROOT)
    for file in str(ROOT / "fxzero" / "__init__.py"), None:
        with pytest.raises(SystemExit, match="to be measured is"):
            check_origin(file, tmp_path)


# -- whole runs ----------------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_a_process_of_each_tree_takes_turns(head: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "found.json"
    assert main(["HEAD", "single_rank", *TINY, "--starts", "1", "--rounds", "2", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["there"] == {"revision": "HEAD", "commit": head}
    (row,) = found["rows"]
    assert row["quantity"] == "step, s"
    (pairs,) = row["pairs"]
    assert len(pairs) == 2 and all(number > 0 for pair in pairs for number in pair)
    assert capsys.readouterr().out.splitlines()[-1] == found["verdict"]


@pytest.mark.exhaustive
def test_two_ranks_of_each_tree_take_turns(head: str, tmp_path: Path) -> None:
    file = tmp_path / "found.json"
    assert main(["HEAD", "host_overhead", *TINY, "--starts", "1", "--rounds", "1", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert [row["quantity"] for row in found["rows"]] == ["step, processor s"]
    assert len(found["exact"]) == 2
    assert all(number > 0 for counts in found["exact"].values() for number in counts)
