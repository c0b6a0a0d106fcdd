"""Processes that do what they are told, a few steps at a time: both ends of the pipe.

Commands are JSON lines on a process's stdin, `{"do": "steps", "count": 4}` say, with one answer to each as a JSON line
on its stdout. Who has nothing to do sleeps, so that processes can take turns without disturbing each other.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.about import ROOT


class RankDied(RuntimeError):
    """A rank ended or did not answer in time; the message has the end of what it wrote."""


class Ranks:
    """Processes that work together: started, told the same, ended.

    Args:
        system: what they are called in errors and logs.
        commands: one for each rank.
        logs: the folder for what the ranks write to stderr.
        root: the folder that they run in and import from first.
        timeout_s: how long an answer may take.
    """

    def __init__(
        self, system: str, commands: Sequence[Sequence[str]], logs: Path, *, root: Path = ROOT, timeout_s: float = 600
    ) -> None:
        self.system, self._timeout_s = system, timeout_s
        environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONWARNINGS="ignore")
        environment["PYTHONPATH"] = os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._logs = [logs / f"{system}.{rank}.log" for rank in range(len(commands))]
        self._ranks: list[subprocess.Popen[str]] = []
        try:
            for command, log in zip(commands, self._logs, strict=True):
                with log.open("w") as errors:
                    process = subprocess.Popen(
                        command,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=errors,
                        text=True,
                        cwd=root,
                        env=environment,
                        start_new_session=True,
                    )
                self._ranks.append(process)
        except BaseException:
            self.close()
            raise
        self.sessions = {process.pid for process in self._ranks}
        """Of the ranks and of what they start."""

    def wait_until_ready(self) -> list[dict[str, Any]]:
        """Each rank's first answer, in rank order."""
        return [self._answer(rank) for rank in range(len(self._ranks))]

    def ask(self, do: str, **arguments: Any) -> list[Any]:
        """Tell all ranks the same; their answers, in rank order.

        Raises:
            RankDied: a rank gave none.
        """
        for rank, process in enumerate(self._ranks):
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                process.stdin.flush()
            except OSError:
                self._answer(rank)
        return [self._answer(rank) for rank in range(len(self._ranks))]

    def close(self) -> None:
        """End the ranks: they are told to, and killed where they do not."""
        for process in self._ranks:
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.write('{"do": "quit"}\n')
            with contextlib.suppress(OSError):
                process.stdin.close()
        for process in self._ranks:
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdout is not None
            process.stdout.close()

    def _answer(self, rank: int) -> Any:
        stdout = self._ranks[rank].stdout
        assert stdout is not None
        readable, _, _ = select.select([stdout], [], [], self._timeout_s)
        line = stdout.readline() if readable else ""
        if not line:
            why = "ended" if readable else f"did not answer within {self._timeout_s:.0f} s"
            end = "\n".join(self._logs[rank].read_text(errors="replace").splitlines()[-8:])
            raise RankDied(f"Rank {rank} of {self.system} {why}; {self._logs[rank]} ends with:\n{end}")
        return json.loads(line)


def serve(start: Callable[[], tuple[Any, Mapping[str, Callable[..., Any]]]]) -> NoReturn:
    """Be such a process.

    Args:
        start: makes it ready; returns the first answer, and what answers each command, by name.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where errors go

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    ready, commands = start()
    answer(ready)
    for line in sys.stdin:
        arguments = json.loads(line)
        do = arguments.pop("do")
        if do == "quit":
            break
        answer(commands[do](**arguments))
    os._exit(0)  # gloo's teardown can wait for a peer that left first
