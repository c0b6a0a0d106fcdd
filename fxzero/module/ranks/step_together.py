"""Steps that all ranks take, or none: where one rank fails in a step, all leave it out and go on.

event on a rank             what it does
first step, or a step       waits for all ranks to come; all begin anew, with equal numbers of phases and with new
after one left out          connections
an error leaves the block   says so, closes its connections, drops all gradients; the waits of other ranks end in a
                            StepLeftOutError
an optimizer steps          waits until all ranks have come to this step
"""

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

from fxzero.comm import agree
from fxzero.comm.groups import Group
from fxzero.comm.heartbeat import heartbeat, report
from fxzero.comm.peers import describe_error
from fxzero.comm.phases import PhaseLog, Stop
from fxzero.errors import FxzeroError, RankMismatchError


@contextmanager
def step_together(log: PhaseLog, group: Group | None, timeout: timedelta) -> Generator[None]:
    """A step that all ranks of a group take, or none. See `ZeroModule.step_together`."""
    if log.is_together:
        raise FxzeroError("step_together() inside of another one: a step is taken or left out as a whole.")
    if log.members and (log.generation == 0 or log.failed is not None or log.stop is not None):
        _begin_anew(log, group, timeout)
        log.restart = partial(_begin_anew, log, group, timeout)
    log.is_together = True
    try:
        yield
    except BaseException as error:
        _leave_out(log, error)
        raise
    finally:
        log.is_together = False


def _begin_anew(log: PhaseLog, group: Group | None, timeout: timedelta) -> None:
    """All ranks come here, compare what they have stepped, and begin anew with equal numbers and new connections.

    Raises:
        RankMismatchError: some ranks have taken a step that others have not.
        CommunicationError: this rank stopped in a way that cannot be left out, or another one has ended.
    """
    if log.stop is not None and (log.stop.kind != "failure" or log.generation == 0):
        log.begin("step_together()")  # which raises
    lines = [str(log.num_steps), str(log.number)]
    posts = agree.exchange(group, "steps", lines, timeout=timeout, is_anew=True)
    for rank, (num_steps, _) in zip(log.members, posts, strict=True):
        if num_steps != posts[0][0]:
            text = (
                f"Rank {rank} has taken {num_steps} optimizer steps, rank {log.members[0]} {posts[0][0]}: the step "
                "that failed cannot be left out any more. Restart from a checkpoint; step inside of step_together()."
            )
            log.stop = Stop("difference", text)
            raise RankMismatchError(text)
    log.begin_anew(max(int(number) for _, number in posts))
    # The connections of a rank that has its own may end, with it, before others have theirs.
    agree.exchange(group, "connections", [], timeout=timeout, is_anew=True)
    heartbeat().publish()


def _leave_out(log: PhaseLog, error: BaseException) -> None:
    """This rank has failed in a step, or was told that another one has."""
    if log.members and log.stepping_depth:
        text = f"rank {log.rank} failed in the middle of an optimizer's step: {describe_error(error)}"
        heartbeat().stop(log, Stop("end", f"{text}\nRestart from a checkpoint."))
    report(log, error)
    if log.members:
        heartbeat().linger(log)
    for model in log.models:
        model.leave_out()
