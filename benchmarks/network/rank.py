"""One rank of one system: it gets ready, then takes steps when it is told to.

Commands as `benchmarks.ranks` has them:
{"do": "steps", "count": 4}, {"do": "calls"}, {"do": "reset_peak"}, {"do": "report"}, {"do": "quit"}.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.network.place import add_place, take_place
from benchmarks.network.systems import SYSTEMS, Job, Shape, Training
from benchmarks.ranks import serve
from benchmarks.resident import reset_peak, resident_mib

if TYPE_CHECKING:
    from torch import Tensor


class Rank:
    """A system, and what is counted around each of its steps."""

    def __init__(self, training: Training, job: Job, interface: str, facts: dict[str, int]) -> None:
        self.facts = facts
        self._training, self._job = training, job
        self._sent = Path("/sys/class/net", interface, "statistics/tx_bytes")
        self._step = 0

    def steps(self, count: int) -> list[dict[str, Any]]:
        """Take consecutive steps, then wait until no rank has anything under way."""
        import torch.distributed as dist

        samples = [self._sample() for _ in range(count)]
        dist.barrier()
        return samples

    def calls(self) -> list[int]:
        """The Python calls of one step, builtins included: of forward and backward, and of the update."""
        training, (ids, labels) = self._training, self._next_batch()
        profiles = cProfile.Profile(), cProfile.Profile()
        with profiles[0]:
            training.backward(training.forward(ids, labels))
        with profiles[1]:
            training.update()
        return [pstats.Stats(profile).total_calls for profile in profiles]  # type: ignore[attr-defined]

    def _next_batch(self) -> tuple[Tensor, Tensor]:
        from benchmarks.network.model import make_batch

        self._step += 1
        return make_batch(self._job.shape, self._step - 1, self._job.rank)

    def _sample(self) -> dict[str, Any]:
        training, (ids, labels) = self._training, self._next_batch()
        training.prepare()
        sent, faults = int(self._sent.read_text()), _faults()
        main, process, begin = time.thread_time(), time.process_time(), time.perf_counter()
        loss = training.forward(ids, labels)
        forward = time.perf_counter()
        training.backward(loss)
        backward = time.perf_counter()
        training.update()
        end = time.perf_counter()
        main, process = time.thread_time() - main, time.process_time() - process
        return {
            "step": self._step - 1,
            "seconds": end - begin,
            "forward_s": forward - begin,
            "backward_s": backward - forward,
            "main_cpu_s": main,
            "other_cpu_s": process - main,
            "sent_bytes": int(self._sent.read_text()) - sent,
            "faults": _faults() - faults,
            "loss": float(loss.detach()),
        }

    def reset_peak(self) -> dict[str, Any]:
        """Let the peak of resident memory be that of what follows."""
        reset_peak()
        return {}

    def report(self) -> dict[str, Any]:
        """The peak of resident memory since its mark was reset, and what the system says of itself."""
        (peak,) = resident_mib("VmHWM")
        return {"peak_mib": peak, "facts": self._training.facts()}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", required=True, choices=list(SYSTEMS))
    add_place(parser)
    parser.add_argument("--shape", type=json.loads, default={})
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--simple-fsdp")
    return parser.parse_args(arguments)


def build(arguments: argparse.Namespace) -> Rank:
    """Make the process a rank, and its system ready."""
    system = SYSTEMS[arguments.system]
    take_place(arguments, makes_group=not system.makes_group)
    import fxzero
    from benchmarks.network.model import Encoder

    if not arguments.default_malloc and not fxzero.keep_freed_memory():
        raise SystemExit("This C library cannot keep freed memory: pass --default-malloc.")
    job = Job(arguments.rank, arguments.world_size, Shape(**arguments.shape), arguments.simple_fsdp)
    model = Encoder(job.shape)
    params = list(model.parameters())
    facts = {"num_params": len(params), "param_bytes": sum(param.nbytes for param in params)}
    return Rank(system.make(model, job), job, arguments.interface, facts)


def start() -> tuple[dict[str, Any], dict[str, Callable[..., Any]]]:
    begin = time.perf_counter()
    rank = build(parse(sys.argv[1:]))
    commands = {"steps": rank.steps, "calls": rank.calls, "reset_peak": rank.reset_peak, "report": rank.report}
    return {"seconds": time.perf_counter() - begin, **rank.facts}, commands


if __name__ == "__main__":
    serve(start)
