"""What of a model's memory is valid between the phases of its steps, and for how long.

kept       buckets that a forward leaves in the arena for its backward: until any other phase of any plan runs
resident   buckets (or secondary shards) that stay for the next micro-step: while gradients are added up, and nobody
           but a backward has changed a parameter or a gradient since they were gathered
copies     of shards in the dtype that compute reads, where that is another: until a shard changes

event            legal             what it does
begin_forward    outside a phase   drops what is resident, and refreshes copies, if gradients are not being added up or
                                   something has changed
end_forward      in a forward      waits until all is sent; kept buckets of other forwards are gone, its own are there
before_backward  outside a phase   drops what is resident if something has changed
restore_copies   outside a phase   refreshes copies if they may not be those of a forward whose backward is to begin
begin_backward   outside a phase
end_backward     in a backward     waits until all is sent; kept buckets are gone
after_backward   outside a phase   its gradients are published: their changes are known
after_step       outside a phase   an optimizer has changed the shards: drops what is resident
after_write      outside a phase   a forward has changed the shards of some parameters: drops their resident buckets
failed           in a phase        drops everything, and takes in what peers have sent; the phase is over

One change is not noticed, as it is not by autograd: a write through `param.data` between two micro-steps.
"""

from collections.abc import Callable, Collection, Iterable
from typing import Literal, TypeAlias

from torch import Tensor

from fxzero.comm.base import Comm
from fxzero.comm.heartbeat import report
from fxzero.errors import FxzeroError
from fxzero.graph.recipe import Fqns

Stamp: TypeAlias = tuple[int, ...]


class InFlight:
    """See the table in the module docstring.

    Args:
        comm: what the phases exchange.
        is_accumulating: true while there are gradients that the next backward adds to.
        stamp: changes whenever a shard or a gradient is changed in place.
        refresh: brings copies of the shards in line with these.
    """

    def __init__(
        self,
        comm: Comm,
        is_accumulating: Callable[[], bool],
        stamp: Callable[[], Stamp],
        refresh: Callable[[], object] = lambda: None,
    ) -> None:
        self._comm, self._is_accumulating, self._stamp, self._refresh = comm, is_accumulating, stamp, refresh
        self.has_copies = False
        """True if there are copies of shards."""
        self.num_refreshes = 0
        """Counts the times that copies were refreshed."""
        self._are_fresh = False
        """True if the copies have the values of the shards, as far as is known."""
        self._phase: Literal["forward", "backward"] | None = None
        self._resident: set[Fqns] = set()
        self._stamped: Stamp | None = None
        """The stamp when resident buckets were gathered."""
        self.before_writes: dict[str, Tensor] = {}
        """Slices of parameters as they were before forwards wrote them inside of `step_together()`, since ranks met."""
        self.num_writes = 0
        """Counts the forwards that changed parameters."""
        self.generation = 0
        """Counts the phases that ran: what one of them keeps in the arena is there only until the next."""

    def begin_forward(self, lasting: Iterable[Fqns]) -> bool:
        """A forward begins; true if all of its lasting buckets are there, with the values that the shards have now.

        Args:
            lasting: the buckets that it would leave for the next micro-step.
        """
        self._enter("forward")
        buckets = list(lasting)
        if not buckets and not self.has_copies:
            return False
        if not self._is_accumulating():
            self._drop()
        self._drop_if_changed()
        self._refresh_copies()
        return bool(buckets) and self._resident.issuperset(buckets)

    def end_forward(self, lasting: Iterable[Fqns]) -> None:
        """A forward is over, and has left its lasting buckets."""
        self._leave()
        self._resident.update(lasting)

    def before_backward(self) -> None:
        """A backward is about to look at gradients, and to change them."""
        self._drop_if_changed()

    def restore_copies(self, num_refreshes: int) -> None:
        """A backward is about to begin, which must gather what its forward has gathered.

        Args:
            num_refreshes: as it was after that forward.
        """
        if num_refreshes != self.num_refreshes:
            self._are_fresh = False
        self._refresh_copies()

    def begin_backward(self) -> None:
        """A backward begins."""
        self._enter("backward")

    def end_backward(self) -> None:
        """A backward is over; its gradients are not published yet."""
        self._leave()

    def after_backward(self) -> None:
        """The gradients of a backward are published: what has changed since `before_backward` was its doing."""
        self._stamped = self._stamp()

    def after_step(self) -> None:
        """An optimizer, any, has taken a step."""
        self._drop()

    def after_write(self, fqns: Collection[str]) -> None:
        """A forward that is over has changed some parameters."""
        self.num_writes += 1
        self._resident = {bucket for bucket in self._resident if not any(fqn in fqns for fqn in bucket)}

    def failed(self, error: Exception) -> None:
        """A phase has ended in an error: tell the other ranks, and leave nothing in flight behind it."""
        self._phase = None
        self.generation += 1
        self._drop()
        report(self._comm.phases, error)
        self._comm.abandon()

    def _enter(self, phase: Literal["forward", "backward"]) -> None:
        if self._phase is not None:
            raise FxzeroError(
                f"A {phase} of this model begins inside its own {self._phase}. Call the model outside of its hooks."
            )
        self._phase = phase

    def _leave(self) -> None:
        self._comm.drain()
        self._phase = None
        self.generation += 1

    def _drop_if_changed(self) -> None:
        now = self._stamp()
        if now != self._stamped:
            self._drop()
            self._stamped = now

    def _drop(self) -> None:
        self._resident.clear()
        self._are_fresh = False

    def _refresh_copies(self) -> None:
        if self.has_copies and not self._are_fresh:
            self._refresh()
            self._are_fresh = True
            self.num_refreshes += 1
