"""What must be known of a backend before any rank is there: the memory that its collectives work in, and their work."""

from abc import ABC, abstractmethod

from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding


class Backend(ABC):
    """One way of moving bytes between ranks.

    The memory plan and the cost model ask it, also for ranks that are not there; its `Comm` asks it for the same
    numbers when it binds collectives to memory.
    """

    def sums_locally(self, sharding: Sharding) -> bool:
        """True if reduce-scatters are an exchange and sums of our own, which may be wider than what travels."""
        return False

    @abstractmethod
    def reduce_scratch_numel(self, payload: Payload, sharding: Sharding, *, accumulate: bool) -> int:
        """Elements of scratch that a reduce-scatter needs between its start and its wait; 0 if none.

        Overwriting needs no more than accumulating.
        """

    @abstractmethod
    def gather_wait_bytes(self, payload: Payload) -> int:
        """Bytes that the wait of a gather reads and writes, on the device that computes."""

    @abstractmethod
    def reduce_wait_bytes(self, payload: Payload) -> int:
        """Bytes that the wait of a reduce-scatter reads and writes, on the device that computes."""


class NativeBackend(Backend):
    """A backend that reduces by itself, such as NCCL: only a sum that is added to a shard needs memory of ours.

    It has also the numbers of a rank that is alone, which are all 0.
    """

    def reduce_scratch_numel(self, payload: Payload, sharding: Sharding, *, accumulate: bool) -> int:
        if sharding.shards_across:  # between the stages, the sums of a node need memory too
            return (sharding.num_nodes + accumulate) * payload.slice_numel
        return accumulate * payload.slice_numel if sharding.shard_ranks > 1 else 0

    def gather_wait_bytes(self, payload: Payload) -> int:
        return 0

    def reduce_wait_bytes(self, payload: Payload) -> int:
        return 0
