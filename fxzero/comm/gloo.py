"""Collectives on gloo: point-to-point messages straight into place, sums in rank order.

Against gloo's own all_gather and all_to_all, direct messages take 1/4 to 2/3 of the time of a gather and a third of its
processor time (gloo gathers through a buffer of its own), and leave no copy but that of the rank's own slice. gloo's
reduce-scatter is an all-reduce inside: twice the bytes, in no fixed order.

- Every receive is posted before the sends of the same collective: "ready to receive" shares the stream with the data.
- A message's tag is made from the members of its bucket and from the phase (`phases.py`): model, step, forward or
  backward. So a rank that runs something else than its peers waits for a message that never comes, and is told why; it
  never takes other bytes for parameters, nor the gradients of another step.
- Sums are made in the dtype of the gradients: ((g0 + g1) + g2) / divisor, bit for bit, on every rank. The divisor is
  the number of ranks, if it is not chosen. Elements of float16 whose sum overflows are divided first, as DDP does:
  (g0 / divisor + g1 / divisor) + g2 / divisor.
"""

import contextlib
import math
import zlib
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import partial, reduce
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from fxzero import torch_internals
from fxzero.comm.backend import Backend
from fxzero.comm.base import Bound, Stage, in_turn
from fxzero.comm.group import GroupComm, is_half
from fxzero.graph.layout import Payload
from fxzero.graph.sharding import Sharding

_CLOSING_TAG = 1
"""The tag of messages that nobody sends."""


def message_tag(word: str, payload: Payload) -> int:
    """A number for the messages of one collective, equal on all ranks, above those that users choose by hand."""
    return zlib.crc32("\n".join((word, *payload.fqns)).encode()) & 0x3FFFFFFF | 0x40000000


_LARGEST_HALF = torch.finfo(torch.float16).max


def _largest(term: Tensor) -> float:
    return float(torch.linalg.vector_norm(term, math.inf)) if term.numel() else 0.0


def sum_of_quotients(terms: Sequence[Tensor], divisor: float) -> Tensor:
    """The sum, in order, of terms that are divided first."""
    total = terms[0] / divisor
    for term in terms[1:]:
        total.add_(term / divisor)
    return total


class GlooBackend(Backend):
    """Where what others send arrives, and the copies and sums of a wait."""

    def sums_locally(self, sharding: Sharding) -> bool:
        return sharding.num_nodes == 1

    def reduce_scratch_numel(self, payload: Payload, sharding: Sharding, *, accumulate: bool) -> int:
        if sharding.shards_across:
            # The other slices of a node like its own. What comes from other nodes lies in the bucket then.
            return payload.numel - sharding.num_nodes * payload.slice_numel
        if sharding.shard_ranks == 1:
            return accumulate * payload.slice_numel if sharding.num_nodes > 1 else 0
        return (sharding.shard_ranks - 2 + accumulate) * payload.slice_numel

    def gather_wait_bytes(self, payload: Payload) -> int:
        """It copies the rank's own slice."""
        return 2 * payload.slice_nbytes

    def reduce_wait_bytes(self, payload: Payload) -> int:
        """It sums over the ranks, and divides once."""
        return (3 * (payload.num_slices - 1) + 2) * payload.slice_nbytes


GLOO = GlooBackend()


class GlooComm(GroupComm):
    """CPU tensors over gloo, two ranks or more.

    Args:
        divisor: by which sums of gradients are divided. Default: the number of ranks.
        divisor_before: by which float16 gradients are divided before the sum, in place of `divisor`. Default: none are.
    """

    backend = GLOO

    def __init__(
        self, group: dist.ProcessGroup, *, divisor: float | None = None, divisor_before: float | None = None
    ) -> None:
        super().__init__(group)
        if divisor is not None:
            self.divisor = divisor
        self._divisor_before = divisor_before
        self._peers = [(self.rank + step) % self.shard_ranks for step in range(1, self.shard_ranks)]
        """Who is sent to, in order; every rank starts with another one."""

        self._renewed: dist.ProcessGroup | None = None
        """Connections of its own, in place of those of the group, for messages."""

    def close(self) -> None:
        # Where a wait for a message exceeds its timeout, gloo closes all connections of a group.
        for peer in self._peers:
            with contextlib.suppress(RuntimeError):
                (self._renewed or self.group).recv([torch.empty(1)], peer, _CLOSING_TAG).wait(timedelta(milliseconds=1))

    def renew(self, made: dict[str, dist.ProcessGroup], generation: int) -> None:
        if self.group_name not in made:
            made[self.group_name] = torch_internals.gloo_connections(self.group, f"fxzero/{generation}")
        self._renewed = made[self.group_name]

    def meet(self) -> None:
        self._exchange_with_all("the other ranks", "meet", torch.zeros(1, dtype=torch.uint8))

    def all_reduce(self, tensor: Tensor, op: Literal["sum", "max"] = "sum") -> None:
        what = f"an all-reduce of {tensor.numel()} elements"
        terms = self._exchange_with_all(what, f"all_reduce {op}", tensor)
        combine: Callable[[Tensor, Tensor], Tensor] = torch.add if op == "sum" else torch.maximum
        tensor.copy_(reduce(combine, terms))

    def all_to_all(self, what: str, sent: Sequence[Tensor], received: Sequence[Tensor]) -> None:
        self._send_and_receive(what, "all_to_all", received, sent)

    def _exchange_with_all(self, what: str, word: str, tensor: Tensor) -> list[Tensor]:
        """Send a small tensor to all ranks; returns those of all, in rank order."""
        own = tensor.contiguous()
        terms = [own if rank == self.rank else torch.empty_like(own) for rank in range(self.shard_ranks)]
        self._send_and_receive(what, word, terms, [own] * self.shard_ranks)
        return terms

    def _send_and_receive(self, what: str, word: str, received: Sequence[Tensor], sent: Sequence[Tensor]) -> None:
        """Send a tensor to each other rank, and receive one from it.

        Args:
            what: the name of the exchange in error texts.
            word: the part of the tag that stands for the exchange.
        """
        tag = zlib.crc32(word.encode()) & 0x3FFFFFFF | 0x40000000
        receives, sends = [(received[peer], peer) for peer in self._peers], [(sent[peer], peer) for peer in self._peers]
        start, wait = self.bind_messages(what, tag, receives, sends)
        start()
        wait()
        self._in_flight.pop()

    def bind_gather(self, payload: Payload, shard: Tensor, full: Tensor) -> Bound:
        slices = payload.slices(full)
        own = slices[self.rank]
        stage = self.bind_messages(
            self.what("all-gather", payload),
            message_tag("all_gather", payload),
            [(slices[peer], peer) for peer in self._peers],
            [(shard, peer) for peer in self._peers],
            copied=(own, shard) if own.data_ptr() != shard.data_ptr() else None,
        )
        return Bound(*stage)

    def bind_exchange(self, payload: Payload, sent: Tensor, received: Sequence[Tensor]) -> Bound:
        slices = payload.slices(sent)
        stage = self.bind_messages(
            self.what("reduce-scatter", payload),
            message_tag("reduce_scatter", payload),
            [(received[peer], peer) for peer in self._peers],
            [(slices[peer], peer) for peer in self._peers],
        )
        return Bound(*stage)

    def bind_messages(
        self,
        what: str,
        tag: int,
        receives: Iterable[tuple[Tensor, int]],
        sends: Iterable[tuple[Tensor, int]],
        *,
        copied: tuple[Tensor, Tensor] | None = None,
    ) -> Stage:
        """Messages from and to ranks of this group; the wait is over when all have come and gone.

        Args:
            what: the name of the exchange in error texts.
            tag: the tag of all its messages.
            receives: where to put what each rank sends; a message without elements is none.
            sends: what to send to each rank.
            copied: destination and source of a copy at the wait. The source then stays as it is until `drain`, which
                waits until all messages have gone; the wait is over when all have come.
        """
        log, lost = self.phases, self.lost
        incoming = [([into], peer) for into, peer in receives if into.numel()]
        outgoing = [([message], peer) for message, peer in sends if message.numel()]
        awaited: list[dist.Work] = []
        sending: list[dist.Work] = awaited if copied is None else []
        peers = [peer for _, peer in (*incoming, *outgoing)]
        in_flight, entries = self._in_flight, [(works, what) for works in (awaited, sending)[: 1 + bool(copied)]]

        def start() -> None:
            nonlocal awaited, sending, in_flight
            in_flight += entries
            group, tagged, peer = self._renewed or self.group, tag ^ log.salt, None
            try:
                for into, peer in incoming:
                    awaited += (group.recv(into, peer, tagged),)
                for message, peer in outgoing:
                    sending += (group.send(message, peer, tagged),)
            except RuntimeError as error:
                raise lost(what, error, peer) from error

        def wait() -> None:
            if copied is not None:
                copied[0].copy_(copied[1])
            log.waits += 1
            work = None
            try:
                for work in awaited:
                    work.wait()
            except RuntimeError as error:
                peer = None if work is None else peers[awaited.index(work)]
                raise lost(what, error, peer) from error
            finally:
                log.waits += 1
                del awaited[:]

        return start, wait

    def bind_reduce(
        self, payload: Payload, full: Tensor, scratch: Tensor | None, shard: Tensor, *, accumulate: bool
    ) -> Bound:
        own = payload.slices(full)[self.rank]
        terms = self._terms(payload, own, scratch, shard, accumulate)
        start, all_came = self.bind_exchange(payload, full, terms).stage
        divisor, may_overflow = self.divisor, is_half(payload)
        if self._divisor_before is not None and may_overflow:
            start, divisor, may_overflow = in_turn(partial(full.div_, self._divisor_before), start), 1, False
        total = terms[1 if self.rank == 0 else 0]  # of two terms the order does not matter: g1 + g0 is g0 + g1
        addends = [term for term in terms if term is not total]

        def wait() -> None:
            all_came()
            overflowing = may_overflow and sum(_largest(term) for term in terms) > _LARGEST_HALF
            divided = sum_of_quotients(terms, divisor) if overflowing else None
            for term in addends:
                total.add_(term)
            if divisor != 1:
                total.div_(divisor)
            if divided is not None:
                total.copy_(torch.where(total.isfinite(), total, divided))
            if accumulate:
                shard.add_(total)

        return Bound(start, wait)

    def _terms(
        self, payload: Payload, own: Tensor, scratch: Tensor | None, shard: Tensor, accumulate: bool
    ) -> list[Tensor]:
        """Where each rank's gradients for this rank's shard lie at the wait, in rank order.

        The rank's own lie in the bucket. The first of the others lie in the shard itself if it is overwritten.
        """
        room = self.scratch_for(payload, scratch, accumulate=accumulate)
        blocks = [] if room is None else list(room.split(payload.slice_numel))
        blocks = blocks if payload.numel else [own] * self.shard_ranks
        landing = iter(blocks if accumulate else [shard, *blocks])
        return [own if rank == self.rank else next(landing) for rank in range(self.shard_ranks)]
