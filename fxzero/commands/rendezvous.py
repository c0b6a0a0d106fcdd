"""Where ranks of one machine meet: a store that listens on the loopback, so that no other machine can reach it."""

import socket

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] (public, documented)
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

NAME = "loopback"
"""Name of this rendezvous in `LaunchConfig.rdzv_backend`."""
ADDRESS = "127.0.0.1"


class LoopbackRendezvous(RendezvousHandler):
    """The rendezvous of a single agent, which has nobody to wait for and hosts the store of its ranks.

    torch's own ones listen on all interfaces, and the default one unpickles what it finds in its store.
    """

    def __init__(self, run_id: str) -> None:
        self._run_id = run_id
        listening = socket.create_server((ADDRESS, 0))
        self._port: int = listening.getsockname()[1]
        self._store = TCPStore(
            ADDRESS, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )

    def get_backend(self) -> str:
        return NAME

    @property
    def use_agent_store(self) -> bool:
        """True: rank 0 opens no store of its own, which would listen on all interfaces."""
        return True

    def next_rendezvous(self) -> RendezvousInfo:
        store = PrefixStore(self._run_id, self._store)
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo(ADDRESS, self._port))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        pass

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self._run_id

    def shutdown(self) -> bool:
        return True


def _make(parameters: RendezvousParameters) -> RendezvousHandler:
    return LoopbackRendezvous(parameters.run_id)


rendezvous_handler_registry.register(NAME, _make)


def loopback_interface() -> str:
    """The name of the network interface of the loopback."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")
