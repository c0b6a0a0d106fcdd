"""Random models through prefixes of the passes, and what FXZERO_DUMP writes."""

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fxzero
from fxzero.errors import PassOrderError, PlanError, ScheduleError
from fxzero.graph.nodes import Role
from fxzero.graph.step import StepGraph
from fxzero.graph.verify import verify_plan
from fxzero.passes import InsertAllGathers, InsertReduceScatters, ReleaseParams, RematerializeViews, default_passes
from fxzero.planner import plan
from fxzero.planning.run_passes import pass_name, run_passes
from fxzero.testing import run_ranks
from tests.distributed import pass_list_workers, replicated
from tests.helpers.random_net import WIDTH, NetSpec, RandomNet, choose_net, random_net
from tests.helpers.toy_step import toy_step

pytestmark = pytest.mark.usefixtures("every_temporary_has_a_place")
BOTH_INSERTED = 4
"""The shortest prefix that has all collectives."""
NUM_PASSES = len(default_passes())
SIZES = st.sampled_from([1, 64, 256, 1024, 2**20])
PROPERTY = settings(deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def nets(draw: st.DrawFn) -> NetSpec:
    return choose_net(lambda count: draw(st.integers(0, count - 1)))


def point(seed: int) -> torch.Tensor:
    return torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(seed))


@settings(PROPERTY, max_examples=25)
@given(
    spec=nets(),
    num_passes=st.integers(BOTH_INSERTED, NUM_PASSES),
    bucket_bytes=SIZES,
    prefetch_bytes=SIZES,
    reduce_bytes=SIZES,
    kept_bytes=st.sampled_from([0, 512, None]),
    recompute=st.sampled_from(["none", "full", 0, 100]),
)
@pytest.mark.exhaustive
def test_random_model_is_bitwise_equal_to_eager_after_every_prefix_of_the_passes(
    spec: NetSpec,
    num_passes: int,
    bucket_bytes: int,
    prefetch_bytes: int,
    reduce_bytes: int,
    kept_bytes: int | None,
    recompute: Any,
) -> None:
    torch.manual_seed(0)
    model = RandomNet(spec)
    reference = copy.deepcopy(model)
    passes = default_passes(
        bucket_bytes=bucket_bytes,
        prefetch_bytes=prefetch_bytes,
        reduce_bytes=reduce_bytes,
        max_kept_bytes=kept_bytes,
        recompute=recompute,
    )
    zero = fxzero.compile(model, passes=passes[:num_passes])
    for step in range(2):
        torch.manual_seed(step)
        expected = reference(point(step))
        torch.manual_seed(step)
        actual = zero(point(step))
        assert torch.equal(actual, expected)
        assert actual.requires_grad == expected.requires_grad
        if expected.requires_grad:
            expected.backward()
            actual.backward()
        replicated.assert_same(zero, reference, "gradient", lambda param: param.grad)  # the second step adds to them


@settings(PROPERTY, max_examples=15)
@given(spec=nets(), world_size=st.integers(2, 9), bucket_bytes=SIZES, prefetch_bytes=SIZES, reduce_bytes=SIZES)
def test_random_model_has_a_safe_plan_at_every_world_size(
    spec: NetSpec, world_size: int, bucket_bytes: int, prefetch_bytes: int, reduce_bytes: int
) -> None:
    passes = default_passes(bucket_bytes=bucket_bytes, prefetch_bytes=prefetch_bytes, reduce_bytes=reduce_bytes)
    with torch.device("meta"):
        model, x = RandomNet(spec), torch.empty(3, WIDTH)
    schedule = plan(model, x, world_size=world_size, passes=passes)
    verify_plan(schedule.step)
    again = plan(model, x, world_size=world_size, passes=passes)
    assert str(again) == str(schedule) and again.code == schedule.code, "planning is not deterministic"
    largest = max(
        (bucket for bucket in map(schedule.step.bucket_of, _gathers(schedule.step))),
        key=lambda b: b.gathered.nbytes,
        default=None,
    )
    assert largest is None or schedule.totals.gathered_peak_bytes >= largest.gathered.nbytes


def _gathers(step: StepGraph) -> list[torch.fx.Node]:
    return [node for node in step.graph.nodes if node.name.startswith("all_gather")]


def train_random_nets(rank: int, world_size: int, seeds: range) -> None:
    """Worker: a random prefix of the passes for each random model."""
    for seed in seeds:
        spec = random_net(seed)
        case = replicated.Case(lambda spec=spec: RandomNet(spec), lambda seed, _: {"x": point(seed)})
        torch.manual_seed(0)
        if case.build()(point(0)).requires_grad:
            sizes = {"bucket_bytes": 100 * (1 + seed % 5), "prefetch_bytes": 500, "reduce_bytes": 500}
            num_passes = BOTH_INSERTED + seed % (NUM_PASSES - BOTH_INSERTED + 1)
            replicated.train(rank, world_size, case, num_passes=num_passes, steps=2, sizes=sizes)


@pytest.mark.parametrize(("world_size", "seeds"), [(2, range(6)), (3, range(10, 16))])
def test_random_models_train_as_replicated_on_ranks(world_size: int, seeds: range) -> None:
    run_ranks(world_size, train_random_nets, seeds, timeout=120)


@pytest.mark.parametrize(
    ("left_out", "cure"),
    [
        ((InsertReduceScatters,), "InsertReduceScatters"),
        ((InsertAllGathers,), "InsertAllGathers"),
        ((InsertAllGathers, InsertReduceScatters), "InsertAllGathers"),
    ],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_default_passes_without_what_inserts_collectives_are_refused_with_the_pass_to_run(
    left_out: tuple[type, ...], cure: str, world_size: int
) -> None:
    passes = [each for each in default_passes() if not isinstance(each, left_out)]
    for outcomes in run_ranks(world_size, pass_list_workers.train_with, [passes]):
        assert [text.startswith("refused: ") and f"run {cure}" in text for text in outcomes] == [True], outcomes


@pytest.mark.parametrize("world_size", [1, 2])
def test_lists_that_insert_but_a_part_of_the_collectives_are_refused_with_the_pass_to_run(world_size: int) -> None:
    lists = [[], [InsertReduceScatters()], [InsertAllGathers()], [RematerializeViews(), InsertAllGathers()]]
    cures = ["InsertAllGathers", "InsertAllGathers", "InsertReduceScatters", "InsertReduceScatters"]
    for outcomes in run_ranks(world_size, pass_list_workers.train_with, lists):
        for text, cure in zip(outcomes, cures, strict=True):
            assert text.startswith("refused: ") and f"Run {cure}" in text


@pytest.mark.parametrize(
    ("world_size", "seeds"), [(2, range(12)), pytest.param(3, range(20, 32), marks=pytest.mark.exhaustive)]
)
def test_any_list_of_passes_trains_right_or_is_refused(world_size: int, seeds: range) -> None:
    lists = [pass_list_workers.random_list(seed) for seed in seeds]
    (outcomes, *others) = run_ranks(world_size, pass_list_workers.train_with, lists, timeout=120)
    assert all(each == outcomes for each in others)
    kinds = [text.partition(":")[0] for text in outcomes]
    assert set(kinds) == {"equal", "refused"}, outcomes
    assert kinds.count("equal") > 5


# -- the runner ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have no notes before Python 3.11")
def test_error_of_a_pass_names_it_and_those_before() -> None:
    with pytest.raises(PassOrderError) as caught:
        run_passes(toy_step(), [RematerializeViews(), ReleaseParams()])
    assert caught.value.__notes__ == ["In pass 2 of 2: ReleaseParams(); before it: [RematerializeViews()]"]


def test_observers_see_the_capture_and_each_pass() -> None:
    seen: list[tuple[int, str]] = []
    run_passes(
        toy_step(), [RematerializeViews(), InsertAllGathers()], observers=[lambda i, name, _: seen.append((i, name))]
    )
    assert seen == [(0, "capture"), (1, "rematerialize_views"), (2, "insert_all_gathers")]


def names_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_dump_has_a_text_and_a_diff_for_each_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_DUMP", str(tmp_path / "made"))
    passes = default_passes()
    schedule = plan(RandomNet(random_net(1)), point(0), world_size=8, passes=passes)
    stems = [f"{index:02d}_{pass_name(each)}" for index, each in enumerate(passes, start=1)]
    expected = ["00_capture.txt", *(f"{stem}.{ending}" for stem in stems for ending in ("diff", "txt"))]
    assert names_in(tmp_path / "made") == sorted(expected)
    assert (tmp_path / "made" / f"{stems[-1]}.txt").read_text() == f"{schedule}\n"
    diff = (tmp_path / "made" / "03_insert_all_gathers.diff").read_text().splitlines()
    assert diff[:2] == ["--- before", "+++ after"]
    assert any(line.startswith("+all_gather") for line in diff)


def test_dump_of_a_later_plan_has_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_DUMP", str(tmp_path))
    zero = fxzero.compile(RandomNet(random_net(1)))
    zero(point(0))
    first = (tmp_path / "00_capture.txt").read_text()
    with torch.no_grad():
        zero(point(0))
    zero(point(0)[:2])
    assert (tmp_path / "00_capture.txt").read_text() == first
    assert "end of forward" in first
    assert "end of forward" not in (tmp_path / "plan_1" / "00_capture.txt").read_text()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"plan_1", "plan_2"}


def test_dump_shows_what_a_pass_that_failed_had_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FXZERO_DUMP", str(tmp_path))

    with pytest.raises(ScheduleError):
        run_passes(toy_step(), [*default_passes(), _read_after_release])
    assert f"{NUM_PASSES + 1:02d}__read_after_release_failed.diff" in names_in(tmp_path)


def _read_after_release(step: StepGraph) -> None:
    """A pass that is wrong: it moves a release above the last reader."""
    release = step.nodes(Role.RELEASE)[0]
    wait = release.args[0]
    assert isinstance(wait, torch.fx.Node)
    wait.append(release)


def dump_on_rank(rank: int, world_size: int, folder: str) -> None:
    """Worker: plan on every rank, each with a folder named in its environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXZERO_DUMP", folder if rank == 0 else f"{folder}_of_rank_{rank}")
        plan(RandomNet(random_net(1)), point(0), world_size=world_size)


def test_dump_is_written_by_rank_0_alone(tmp_path: Path) -> None:
    run_ranks(2, dump_on_rank, str(tmp_path / "dump"))
    assert [path.name for path in tmp_path.iterdir()] == ["dump"]


@pytest.mark.parametrize("below", ["", "folder"])
def test_dump_that_cannot_be_written_is_told(below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FXZERO_DUMP", str(tmp_path / "file" / below))
    with pytest.raises(PlanError, match="Schedules cannot be written to .* Let FXZERO_DUMP name a folder"):
        plan(RandomNet(random_net(1)), point(0), world_size=2)
