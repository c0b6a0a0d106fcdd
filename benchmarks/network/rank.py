"""One rank of one system: it gets ready, then takes steps when it is told to.

Commands come as JSON lines on stdin, one answer as a JSON line on stdout to each:
{"do": "steps", "count": 4}, {"do": "calls"}, {"do": "reset_peak"}, {"do": "report"}, {"do": "quit"}.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import os
import pstats
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.network.systems import SYSTEMS, Job, Shape, Training

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

    def report(self) -> dict[str, Any]:
        """The peak of resident memory since its mark was reset, and what the system says of itself."""
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return {"peak_mib": int(lines["VmHWM"].split()[0]) / 1024, "facts": self._training.facts()}


def _faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--system", required=True, choices=list(SYSTEMS))
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--world-size", type=int, required=True)
    parser.add_argument("--core", type=int, required=True)
    parser.add_argument("--address", required=True, help="of rank 0")
    parser.add_argument("--port", type=int, required=True, help="of rank 0")
    parser.add_argument("--interface", required=True)
    parser.add_argument("--shape", type=json.loads, default={})
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--simple-fsdp")
    return parser.parse_args(arguments)


def build(arguments: argparse.Namespace) -> Rank:
    """Make the process a rank, and its system ready."""
    os.sched_setaffinity(0, {arguments.core})  # before torch, whose threads inherit it
    os.environ |= {
        "OMP_NUM_THREADS": "1",
        "RANK": str(arguments.rank),
        "WORLD_SIZE": str(arguments.world_size),
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": arguments.address,
        "MASTER_PORT": str(arguments.port),
        "GLOO_SOCKET_IFNAME": arguments.interface,
        "DS_ACCELERATOR": "cpu",
    }
    import torch
    import torch.distributed as dist

    import fxzero
    from benchmarks.network.model import Encoder

    if not arguments.default_malloc and not fxzero.keep_freed_memory():
        raise SystemExit("This C library cannot keep freed memory: pass --default-malloc.")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    system = SYSTEMS[arguments.system]
    job = Job(arguments.rank, arguments.world_size, Shape(**arguments.shape), arguments.simple_fsdp)
    if not system.makes_group:
        dist.init_process_group("gloo")
    model = Encoder(job.shape)
    params = list(model.parameters())
    facts = {"num_params": len(params), "param_bytes": sum(param.nbytes for param in params)}
    return Rank(system.make(model, job), job, arguments.interface, facts)


def main() -> None:
    arguments = parse(sys.argv[1:])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes where errors go

    def answer(value: Any) -> None:
        print(json.dumps(value), file=answers, flush=True)

    begin = time.perf_counter()
    rank = build(arguments)
    answer({"seconds": time.perf_counter() - begin, **rank.facts})
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "steps":
            answer(rank.steps(command["count"]))
        elif command["do"] == "calls":
            answer(rank.calls())
        elif command["do"] == "reset_peak":
            Path("/proc/self/clear_refs").write_text("5")
            answer({})
        elif command["do"] == "report":
            answer(rank.report())
        else:
            break
    answers.flush()
    os._exit(0)  # gloo's teardown can wait for a peer that left first


if __name__ == "__main__":
    main()
