"""The phases of a rank: numbers, tags, and the end of all after a stop."""

import pytest
import torch.distributed as dist

from fxzero.comm.phases import PhaseLog, Stop
from fxzero.errors import CommunicationError


class Channel:
    """Connections that count how often they were made anew."""

    group_name = "0"
    generation = 0

    def close(self) -> None:
        """There is nothing to close."""

    def renew(self, made: dict[str, dist.ProcessGroup], generation: int) -> None:
        """Note the generation."""
        self.generation = generation


def test_tags_differ_between_phases_of_one_name_and_between_names() -> None:
    log, other = PhaseLog((0, 1), 0), PhaseLog((0, 1), 1)
    salts: list[int] = []
    for _ in range(100):
        log.begin("forward")
        salts.append(log.salt)
        log.end()
    other.begin("backward")
    assert len(set(salts)) == 100
    assert other.salt != salts[0]


def test_tags_agree_where_number_name_and_options_do() -> None:
    log, other = PhaseLog((0, 1), 0), PhaseLog((0, 1), 1)
    for each in (log, other):
        each.begin("forward", 7)
    assert log.salt == other.salt
    for each, options in ((log, 7), (other, 8)):
        each.begin("forward", options)
    assert log.salt != other.salt


def test_nothing_begins_after_a_stop() -> None:
    log = PhaseLog((0, 1), 0)
    log.begin("forward")
    log.stop = Stop("failure", "rank 1 failed in forward: ValueError: no")
    with pytest.raises(CommunicationError, match="cannot begin backward: it has stopped.\nrank 1 failed in forward"):
        log.begin("backward")


def test_ranks_that_agreed_to_leave_steps_out_begin_anew() -> None:
    log, channel = PhaseLog((0, 1), 0), Channel()
    log.channels.add(channel)
    log.begin("forward")
    log.stop = Stop("failure", "rank 1 failed in forward: ValueError: no")
    log.restart = lambda: log.begin_anew(11)
    log.begin("backward")
    assert (log.number, log.generation, channel.generation) == (12, 1, 1)
    assert [phase.what for phase in log.recent] == ["backward"]


def test_a_host_that_does_not_wait_itself_is_watched_by_its_phases() -> None:
    log = PhaseLog((0, 1), 0)
    assert not log.may_wait
    log.begin("forward")
    assert not log.may_wait
    log.waits += 1
    assert log.may_wait
    log.waits += 1
    log.is_asynchronous = True
    before = log.progress
    assert log.may_wait and log.progress == before
    log.begin("backward")
    assert log.progress != before
