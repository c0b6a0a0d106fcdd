"""What of the network benchmark needs no network: bounds, reports, options, and saying where it cannot run."""

import contextlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.about import ROOT
from benchmarks.network.__main__ import make_parser, turns_of
from benchmarks.network.bound import Costs, Traffic, least_traffic, lower_bound_s
from benchmarks.network.model import Encoder, make_batch
from benchmarks.network.peers import deepspeed_options
from benchmarks.network.place import Loopback, free_port
from benchmarks.network.report import bound_of, write_report
from benchmarks.network.results import Cell, Sample, read, wrong_losses
from benchmarks.network.systems import GROUPS, SYSTEMS, Job, Policy, Shape
from benchmarks.network.testbed import CannotRunHere, Network, burst_bytes, check, missing
from benchmarks.network.turns import Turns, chosen
from benchmarks.network.world import World
from benchmarks.ranks import RankDied

TINY = Shape(layers=2, hidden=16, heads=2, vocab=32, seq=8, batch=2)
COSTS = Costs(compute_s=1.5, forward_s=0.5, bytes_per_s=125e6, cpu_s_per_byte=1e-9)


# -- the bound -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "gathers_and_reductions"), [("again", 3), ("keep", 2), ("replicated", 2), ("silent", 0), ("wire", 0)]
)
def test_least_traffic_counts_each_gather_and_reduction_once(policy: str, gathers_and_reductions: int) -> None:
    assert least_traffic(Policy(policy), 300, 3).total == gathers_and_reductions * 200


def test_a_rank_alone_sends_nothing() -> None:
    assert {least_traffic(policy, 100, 1).total for policy in Policy} == {0}


def test_the_bound_is_the_core_where_the_link_is_fast() -> None:
    costs = Costs(compute_s=1.5, forward_s=0.5, bytes_per_s=1e12, cpu_s_per_byte=1e-9)
    assert lower_bound_s(costs, Traffic(forward=1e8, backward=1e8, anywhere=1e8)) == pytest.approx(1.8)


def test_the_bound_is_the_link_where_it_is_slow() -> None:
    assert lower_bound_s(COSTS, Traffic(forward=1e9, backward=1e9, anywhere=1e9)) == pytest.approx(24)


def test_the_bound_knows_that_forward_waits_for_its_gathers() -> None:
    # forward: 0.8 s on the link against 0.6 s on the core; backward: 0.8 s on the link against 1.1 s on the core
    assert lower_bound_s(COSTS, Traffic(forward=1e8, backward=1e8)) == pytest.approx(0.8 + 1.1)


def test_a_gather_that_may_come_anywhere_counts_in_no_phase() -> None:
    assert lower_bound_s(COSTS, Traffic(anywhere=1e8)) == pytest.approx(1.6)


def test_a_system_that_sends_less_is_held_to_what_it_sends() -> None:
    assert Traffic(forward=3, backward=4, anywhere=5).at_most(9) == Traffic(forward=3, backward=4, anywhere=2)
    assert Traffic(forward=3, backward=4, anywhere=5).at_most(99) == Traffic(forward=3, backward=4, anywhere=5)
    assert Traffic(forward=3, backward=4).at_most(1) == Traffic(forward=3, backward=4)


# -- options -------------------------------------------------------------------------------------------------------


def _turns(*options: str) -> Turns:
    return turns_of(make_parser().parse_args(["run", *options]))


def test_the_default_run_measures_every_system() -> None:
    assert {name for group in _turns().groups for name in group} == SYSTEMS.keys()


@pytest.mark.parametrize("group", GROUPS)
def test_default_groups_have_a_base(group: tuple[str, ...]) -> None:
    assert "compute" in group


def test_a_group_that_is_given_gets_a_base() -> None:
    assert _turns("--groups", "ddp,fsdp2", "fxzero,compute").groups == [
        ["compute", "ddp", "fsdp2"],
        ["fxzero", "compute"],
    ]


def test_systems_are_taken_out_of_the_usual_groups() -> None:
    assert chosen(["fsdp2", "fxzero"]) == [["compute", "fxzero"], ["compute", "fsdp2"]]
    assert chosen(["compute"]) == [["compute"]]


def test_rounds_may_differ_by_rate() -> None:
    turns = _turns("--rates", "8", "2", "0.5", "--rounds", "3", "1")
    assert [turns.rounds_at(rate) for rate in turns.rates] == [3, 1, 1]


def test_sizes_of_the_model_are_options() -> None:
    assert _turns("--layers", "3", "--batch", "2").shape == Shape(layers=3, batch=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--k", "1"], "at least 2"),
        (["--groups", "fxzero,nothing"], "There is no system nothing"),
        (["--groups", "ddp,ddp"], "twice"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _turns(*options)


# -- where it cannot run -------------------------------------------------------------------------------------------


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(shutil, "which", lambda program: None if program == "tc" else f"/sbin/{program}")
    with pytest.raises(CannotRunHere) as caught:
        check(world_size=1000)
    text = str(caught.value)
    assert "not root" in text and "'tc'; install iproute2" in text and "each of 1000 ranks" in text
    assert "'ip'" not in text


def test_ranks_that_share_cores_need_none_each() -> None:
    assert any("each of 1000 ranks" in reason for reason in missing(1000))
    assert not any("each of 1000 ranks" in reason for reason in missing(1000, shares_cores=True))


@pytest.mark.exhaustive
def test_ring_and_direct_messages_agree() -> None:
    """Each rank of the benchmark compares what it gathered and reduced in both ways; on the machine's own network."""
    world_size = 3
    command = [sys.executable, "-m", "benchmarks.ring_or_direct", "--as-rank", "--rounds", "1", "--mib", "1"]
    environment = dict(os.environ, WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    environment["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = [
        subprocess.Popen(
            command, env=environment | {"RANK": str(rank)}, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        for rank in range(world_size)
    ]
    printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * world_size
    found = json.loads(printed[0].splitlines()[-1])
    assert 0 < found["other"] < 1  # sums around a ring have another order


def test_other_systems_than_linux_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    assert missing() == ["The system is Darwin; network namespaces need Linux."]
    with pytest.raises(CannotRunHere):
        Network()


def test_the_burst_is_a_millisecond_but_never_tiny() -> None:
    assert burst_bytes(8) == 1_000_000
    assert burst_bytes(0.5) == 128_000


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_network_is_there_until_its_end(world_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))
    with contextlib.ExitStack() as until_then:
        try:
            network = until_then.enter_context(Network(world_size))
        except CannotRunHere as error:
            pytest.skip(str(error))
        network.set_rate(2)
        last, name = world_size - 1, network.namespaces[0]
        listen = f"import socket; s = socket.create_server(('{network.addresses[last]}', 9)); print(flush=True); "
        server = subprocess.Popen(
            [*network.command(last), sys.executable, "-c", listen + "print(s.accept()[0].recv(9).decode(), end='')"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert server.stdout is not None and server.stdout.readline() == "\n"
        send = f"import socket; socket.create_connection(('{network.addresses[last]}', 9)).send(b'hello')"
        subprocess.run([*network.command(0), sys.executable, "-c", send], check=True)
        assert server.communicate(timeout=10)[0] == "hello"
        limits = subprocess.run(["tc", "-n", name, "qdisc"], capture_output=True, text=True, check=True).stdout
        assert "rate 2Gbit" in limits
    assert name not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout


# -- results -------------------------------------------------------------------------------------------------------


def _entry(kind: str, system: str, **values: object) -> dict[str, object]:
    return {"kind": kind, "group": "compute,wire,fxzero,ds", "system": system, **values}


def _step(step: int, seconds: float, *, loss: float = 2.0, sent: int = 0) -> dict[str, float]:
    return {
        "step": step, "seconds": seconds, "forward_s": seconds / 4, "backward_s": 0.0, "main_cpu_s": 0.1,
        "other_cpu_s": 0.1, "sent_bytes": sent, "faults": 0, "loss": loss,
    }  # fmt: skip


def _both(*steps: dict[str, float]) -> list[list[dict[str, float]]]:
    """The same of both ranks, where rank 1 takes half a second more."""
    return [list(steps), [{**step, "seconds": step["seconds"] + 0.5} for step in steps]]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    turns = {"world_size": 2, "k": 3, "shape": {"layers": 2, "hidden": 16, "batch": 2, "seq": 8}}
    about = {"command": "python -m x", "date": "2000-01-01", "machine": "a", "kernel": "b", "versions": {"torch": "2"}}
    ready = [{"param_bytes": 200_000_000}] * 2
    lines: list[dict[str, object]] = [{"kind": "run", **about, "turns": turns}]
    for system, seconds, loss in (("compute", 1.5, 3.0), ("wire", 0.5, 0.0), ("fxzero", 2.5, 2.0), ("ds", 3.5, 2.1)):
        sent = 10**8 if system == "wire" else 3 * 10**8
        steps = [_step(i, 9 if i == 1 else seconds + i / 100, loss=loss, sent=sent) for i in range(1, 4)]
        lines.append(_entry("warmup", system, ready=ready, samples=_both(_step(0, 99, loss=2.0))))
        lines.append(_entry("turn", system, rate=1.0, round=0, foreign=0.05, samples=_both(*steps)))
        reports = [{"peak_mib": peak, "facts": {"sent_bytes": 10**8} if system == "wire" else {}} for peak in (70, 90)]
        lines.append(_entry("end", system, reports=reports))
    lines.append(_entry("failed", "ddp", why="Rank 1 of ddp ended\nand more"))
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_step_counts_as_its_slowest_rank_and_the_first_of_a_turn_not_at_all(raw: Path) -> None:
    cell = read([raw]).of("fxzero", 1.0)
    assert [sample.seconds for sample in cell.samples] == pytest.approx([3.02, 3.03])


def test_costs_come_from_the_same_run(raw: Path) -> None:
    costs = read([raw]).costs(1.0)
    assert costs is not None
    assert costs.compute_s == pytest.approx(2.025)
    assert costs.bytes_per_s == pytest.approx(10**8 / 1.02)
    assert costs.cpu_s_per_byte == pytest.approx(2e-9)


def test_a_system_is_held_to_the_bound_of_its_policy(raw: Path) -> None:
    results = read([raw])
    costs = results.costs(1.0)
    assert costs is not None
    again, keep = (lower_bound_s(costs, least_traffic(policy, 2 * 10**8, 2)) for policy in (Policy.AGAIN, Policy.KEEP))
    assert bound_of(results, "fxzero", 1.0) == again
    assert bound_of(results, "ds", 1.0) == keep
    assert bound_of(results, "compute", 1.0) is None


def test_there_is_no_bound_without_its_costs(raw: Path) -> None:
    raw.write_text("".join(line + "\n" for line in raw.read_text().splitlines() if '"system": "wire"' not in line))
    results = read([raw])
    assert results.costs(1.0) is None
    assert bound_of(results, "fxzero", 1.0) is None


def test_the_report_shows_systems_failures_and_wrong_losses(raw: Path, tmp_path: Path) -> None:
    text, picture = write_report(read([raw]), tmp_path / "results")
    lines = text.read_text().splitlines()
    (row,) = [line for line in lines if line.startswith("| fxzero ") and "300" in line]
    # median 3.025 s; exposed beyond the 2.025 s of compute: 0.49; bound: 3 x 10^8 bytes at 10^8 / 1.02 a second
    (heads,) = {line for line in lines if line.startswith("| system ") and "/ bound" in line}
    numbers = dict(zip(*([cell.strip() for cell in line.split("|")[2:-1]] for line in (heads, row)), strict=True))
    assert (numbers["s"], numbers["n"], numbers["wire MB"], numbers["/ least"]) == ("3.02", "2/2", "300", "1.00")
    assert (numbers["bound s"], numbers["/ bound"], numbers["exposed"]) == ("3.06", "0.99", "0.49")
    assert numbers["peak MiB"] == "90"
    assert "**The loss of ds is off by" in text.read_text()
    assert "- ddp failed: Rank 1 of ddp ended" in lines
    assert "bare gloo loop" not in "".join(line for line in lines if line.startswith("|"))
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_losses_are_compared_step_by_step() -> None:
    right = {0: 2.0, 1: 1.0}
    assert wrong_losses({"a": right, "b": {0: 2.001, 1: 1.0}, "c": {1: 1.0}}) == {}
    assert wrong_losses({"a": right, "b": right, "c": {0: 2.0, 1: 1.1}}) == {"c": pytest.approx(0.1)}
    assert wrong_losses({"a": right, "b": right, "c": {0: math.nan, 1: 1.0}}) == {"c": math.inf}


def _sample(seconds: float, foreign: float) -> Sample:
    return Sample(seconds, 0.0, 0.0, 0.0, 0, 0, foreign)


def test_medians_leave_disturbed_samples_out_if_enough_remain() -> None:
    cell = Cell([_sample(1.0, 0.0), _sample(2.0, 0.0), _sample(3.0, 0.0), _sample(9.0, 0.5)])
    assert (cell.disturbed, cell.median("seconds"), cell.least_s) == (False, 2.0, 1.0)
    cell = Cell([_sample(1.0, 0.0), _sample(2.0, 0.5), _sample(9.0, 0.5)])
    assert (cell.disturbed, cell.median("seconds")) == (True, 2.0)


# -- systems -------------------------------------------------------------------------------------------------------


def test_every_sample_has_as_many_masked_positions() -> None:
    ids, labels = make_batch(Shape(), 3, 1)
    assert (labels != -100).sum(1).tolist() == [19] * 4
    assert torch.equal(ids == 3, labels != -100)


def test_the_default_model_has_46_6_million_parameters() -> None:
    with torch.device("meta"):
        assert round(sum(param.numel() for param in Encoder(Shape()).parameters()) / 1e6, 1) == 46.6


def test_deepspeed_is_tuned_to_the_size_of_a_block() -> None:
    block = sum(param.numel() for param in Encoder(TINY).blocks[0].parameters() if param.dim() > 1)
    assert deepspeed_options("tuned", TINY)["reduce_bucket_size"] == block
    assert deepspeed_options("default", TINY) == {}


def test_compute_steps_a_ranks_part_of_every_parameter() -> None:
    model = Encoder(TINY)
    before = [param.detach().clone() for param in model.parameters()]
    training = SYSTEMS["compute"].make(model, Job(0, 2, TINY))
    training.backward(training.forward(*make_batch(TINY, 0, 0)))
    training.update()
    for param, old in zip(model.parameters(), before, strict=True):
        changed = (param != old).flatten()
        half = -(-param.numel() // 2)
        assert changed[:half].any()
        assert not changed[half:].any()


@pytest.fixture
def worlds(tmp_path: Path):
    """Starts systems on two ranks of the loopback interface."""
    started: list[World] = []

    def start(system: str, world_size: int = 2) -> World:
        world = World(system, Loopback(world_size), free_port(), tmp_path, TINY, timeout_s=60)
        started.append(world)
        return world

    yield start
    for world in started:
        world.close()


@pytest.mark.exhaustive
def test_ranks_of_different_systems_take_the_same_steps(worlds) -> None:
    losses: list[list[float]] = []
    for system in ("fxzero", "ddp"):
        world = worlds(system)
        assert world.wait_until_ready()[0]["num_params"] == 34
        answers = world.ask("steps", count=3)
        assert all(sample["sent_bytes"] > 0 and sample["seconds"] > 0 for steps in answers for sample in steps)
        losses.append([sample["loss"] for steps in answers for sample in steps])
        assert world.ask("report")[0]["peak_mib"] > 0
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.exhaustive
def test_a_system_whose_collectives_are_stubbed_out_sends_nothing(worlds) -> None:
    world = worlds("fxzero_stubbed")
    world.wait_until_ready()
    quiet, again = world.ask("steps", count=2)[0]
    assert quiet["step"] == 0 and again["step"] == 1
    assert math.isfinite(again["loss"])
    assert min(world.ask("calls")[0]) > 0


def test_a_rank_that_cannot_start_says_why(worlds, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SIMPLE_FSDP", "/nowhere/simple_fsdp.py")
    with pytest.raises(RankDied, match=r"(?s)Rank \d of simple_fsdp ended.*there is no file /nowhere/simple_fsdp\.py"):
        worlds("simple_fsdp", 1).wait_until_ready()
