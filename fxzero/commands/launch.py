"""Starting ranks on this machine, through torch's own elastic launcher."""

import logging
import os
import sys
import tempfile
import uuid

GRACE_SECONDS = 600
"""How long ranks that are asked to stop may take to evaluate and to write what they have."""


def under_torchrun() -> bool:
    """True in a rank that was started by torchrun or by `launch`."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def launch(nproc: int, arguments: list[str]) -> int:
    """Start `nproc` ranks of `python -m fxzero <arguments>` here, as torchrun does; returns the exit status."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from fxzero.commands import rendezvous  # registers itself

    for library in ("GLOO", "NCCL"):  # unless the user chose, ranks listen for each other on the loopback alone
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", rendezvous.loopback_interface())
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what happens to a rank is said below
    with tempfile.TemporaryDirectory(prefix="fxzero-") as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=nproc,
            run_id=uuid.uuid4().hex,
            rdzv_backend=rendezvous.NAME,
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
            shutdown_timeout=GRACE_SECONDS,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "fxzero", *arguments)
        except ChildFailedError as error:
            rank, first = error.get_first_failure()
            code = first.exitcode
            if code < 0 or code == 1:
                how = f"was killed by signal {-code}" if code < 0 else "failed"
                print(f"fxzero {arguments[0]}: rank {rank} {how}; the others were stopped.", file=sys.stderr)
            return code if code > 0 else 128 - code
        except SignalException as error:
            return 128 + error.sigval
    return 0
