"""Choose sizes of buckets, what is in flight, and the order on the link, from costs: what is predicted to be fastest.

A step is reduced to what matters for that: when each parameter is needed and each gradient is ready, in seconds of
compute. Every candidate is then a list of events to play (`timeline.py`), in the order that the passes would write.
Candidates are few and in a fixed order, so that equal costs give equal plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

from torch import fx

from fxzero.comm.backend import Backend
from fxzero.cost.model import Costs, Device
from fxzero.cost.timeline import Event, Key, Timeline, is_gather_key, play
from fxzero.graph.aliasing import in_memory_of
from fxzero.graph.layout import Bucket, ParamSpec, group_into_buckets
from fxzero.graph.nodes import Role, gathered_params, is_gather, members, role, started_by
from fxzero.graph.placing import gather_starts, kept_from_forward, reductions_finished
from fxzero.graph.recipe import Fqns, Recipe
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.traffic import sent_of
from fxzero.graph.wire import WireFormat, narrowed

MIB = 2**20
BODY_BYTES = tuple(size * MIB for size in (4, 8, 12, 16, 24, 32, 64, 128))
"""Upper bounds on a bucket that are tried."""
MOST_BYTES = 48 * MIB
"""Upper bound on what is in flight in each direction; a sixteenth of the model where that is more."""
HEAD_SHARES = (1, 2, 4, 8)
"""By how much the first bucket may be smaller than the others."""
AHEAD = (3, 2, 4, 6)
"""Buckets of the largest size that may be in flight, in the order in which they are tried."""
CLOSE = 1.003
"""Of two predictions this close, the candidate that was tried first is taken."""
TRIED_IN_VAIN = 16
"""Reductions in a row that gain nothing in another place, after which no further one is tried."""


@dataclass(frozen=True)
class Needs:
    """When a step needs each parameter and completes each gradient, in seconds of compute."""

    step: StepGraph
    first_s: dict[tuple[Phase, str], float]
    """Before the first reader of each parameter, from the begin of the phase; in the order of first readers."""
    ready_s: dict[str, float]
    """After each gradient, from the begin of backward."""
    phase_s: dict[Phase, float]
    device: Device
    backend: Backend
    costs: Costs
    gathered_as: WireFormat | None = None
    """In which buckets travel to ranks, where that makes them narrower."""
    reduced_as: WireFormat | None = None
    """The same of gradients."""

    @property
    def params(self) -> list[ParamSpec]:
        """In the order of their first use."""
        return [self.step.params[fqn] for fqn in dict.fromkeys(fqn for _, fqn in self.first_s)]


def needs_of(
    step: StepGraph,
    costs: Costs,
    device: Device,
    backend: Backend,
    gathered_as: WireFormat | None = None,
    reduced_as: WireFormat | None = None,
) -> Needs:
    """Read a step that has its gathers and reductions, bucketed or not.

    Args:
        gathered_as: in which buckets will travel to ranks; a format that the step has already is not looked at.
        reduced_as: the same of gradients.
    """
    before: dict[fx.Node, float] = {}
    phase_s: dict[Phase, float] = {}
    for phase, nodes in step.phases():
        elapsed = 0.0
        for node in nodes:
            before[node] = elapsed
            elapsed += 0.0 if role(node) is Role.WAIT else costs.of(node)  # waits cost what the buckets make of them
        phase_s[phase] = elapsed
    first: dict[tuple[Phase, str], float] = {}
    phase_of = step.phase_of()
    for wait in step.nodes(Role.WAIT):
        if not is_gather(started_by(wait)):
            continue
        for fqn, param in gathered_params(wait).items():
            for value in in_memory_of(param):
                for user in value.users:
                    if user in before:
                        key = phase_of[user], fqn
                        first[key] = min(first.get(key, before[user]), before[user])
    ready: dict[str, float] = {}
    for start in step.nodes(Role.REDUCE_SCATTER):
        ready |= dict.fromkeys(members(start), before[start])
    in_order = dict(sorted(first.items(), key=lambda item: (item[0][0] is Phase.BACKWARD, item[1])))
    return Needs(step, in_order, ready, phase_s, device, backend, costs, gathered_as, reduced_as)


def tune(needs: Needs, recipe: Recipe, *, keeps_free: bool) -> Recipe:
    """The recipe with the sizes and the order that are predicted to be fastest.

    If the buckets of the recipe are fixed, only what is in flight and the order are chosen.

    Args:
        keeps_free: buckets may stay gathered where that needs no more memory at the peak.
    """
    order, shard_ranks, costs = needs.params, needs.step.sharding.shard_ranks, needs.costs
    most = max(MOST_BYTES, sum(param.gathered_nbytes for param in order) // 16)
    best: tuple[float, Recipe, list[Event]] | None = None
    tried: set[tuple[tuple[Fqns, ...], int]] = set()
    for body, head, ahead in _sizes(recipe):
        if recipe.buckets is None:
            groups = group_into_buckets(order, shard_ranks, body, head_bytes=head)
        else:
            groups = [needs.step.bucket(fqns) for fqns in recipe.buckets]
        inflight = ahead * max(min(body, bucket.gathered.nbytes) for bucket in groups)
        key = tuple(bucket.fqns for bucket in groups), inflight
        if key in tried or (tried and inflight > most):
            continue
        tried.add(key)
        candidate = replace(recipe, prefetch_bytes=inflight, reduce_bytes=inflight)
        if recipe.buckets is None:
            candidate = replace(candidate, bucket_bytes=body, head_bytes=head)
        if keeps_free and recipe.max_kept_bytes is not None:
            candidate = replace(candidate, max_kept_bytes=min(inflight, MOST_BYTES))
        happening = list(_events(needs, groups, candidate))
        step_s = play(happening, costs.link, costs.inside).step_s
        if best is None or step_s * CLOSE < best[0]:
            best = step_s, candidate, happening
    assert best is not None, "a step without parameters has nothing to tune"
    return replace(best[1], later=best_order(best[2], costs)[0])


def _sizes(recipe: Recipe) -> Iterator[tuple[int, int | None, int]]:
    """What to try: the size of buckets, that of the first, and how many of the largest are in flight."""
    if recipe.buckets is not None:
        yield from ((Recipe.bucket_bytes, None, ahead) for ahead in AHEAD)
        return
    for body, share in itertools.product(BODY_BYTES, HEAD_SHARES):
        yield body, None if share == 1 else body // share, AHEAD[0]


def _events(needs: Needs, groups: Sequence[Bucket], recipe: Recipe) -> Iterator[Event]:
    """What a rank does in a step with these buckets, as the passes would write it."""
    forward = _gathers(needs, groups, Phase.FORWARD)
    backward = _gathers(needs, groups, Phase.BACKWARD)
    there = {bucket for _, bucket in forward}
    held = [(at, bucket) for at, bucket in backward if bucket in there]
    if recipe.kept is not None:
        stays = [bucket.fqns in recipe.kept for _, bucket in held]
    else:
        stays = kept_from_forward([bucket.gathered.nbytes for _, bucket in held], recipe.max_kept_bytes)
    kept = {bucket for (_, bucket), is_kept in zip(held, stays, strict=True) if is_kept}
    again = [(at, bucket) for at, bucket in backward if bucket not in kept]
    ready = [
        (max(needs.ready_s[fqn] for fqn in bucket.fqns if fqn in needs.ready_s), bucket)
        for bucket in groups
        if any(fqn in needs.ready_s for fqn in bucket.fqns)
    ]
    yield from _phase(needs, Phase.FORWARD, forward, [], recipe, set())
    reductions = sorted(ready, key=lambda item: item[0])
    yield from _phase(needs, Phase.BACKWARD, again, reductions, recipe, there)
    yield Event("compute", needs.costs.optimizer_s)


def _gathers(needs: Needs, groups: Sequence[Bucket], phase: Phase) -> list[tuple[float, Bucket]]:
    """The buckets that a phase reads, and when it does first."""
    first = needs.first_s
    found = [
        (min(first[phase, fqn] for fqn in bucket.fqns if (phase, fqn) in first), bucket)
        for bucket in groups
        if any((phase, fqn) in first for fqn in bucket.fqns)
    ]
    return sorted(found, key=lambda item: item[0])


def _phase(
    needs: Needs,
    phase: Phase,
    gathers: Sequence[tuple[float, Bucket]],
    reductions: Sequence[tuple[float, Bucket]],
    recipe: Recipe,
    gathered: AbstractSet[Bucket],
) -> Iterator[Event]:
    """The events of one phase: gathers start as PrefetchAllGathers writes it, reductions end as SinkWaits does.

    Args:
        gathered: what was gathered before; where nodes share shards, it stays inside them now.
    """
    starts_at: dict[int, list[int]] = {}
    for k, first in enumerate(gather_starts([bucket.gathered.nbytes for _, bucket in gathers], recipe.prefetch_bytes)):
        starts_at.setdefault(first if first > 0 else -1, []).append(k)
    finished = list(reductions_finished([bucket.gradients.nbytes for _, bucket in reductions], recipe.reduce_bytes))
    keys: list[Key] = [(Role.ALL_GATHER, phase, bucket.fqns) for _, bucket in gathers]

    def launch(anchor: int) -> Iterator[Event]:
        for k in starts_at.get(anchor, ()):
            bucket = gathers[k][1]
            travels, sharding = narrowed(bucket.gathered, needs.gathered_as), needs.step.sharding
            stays = sharding.shards_across and bucket in gathered
            yield Event.start(keys[k], sent_of(sharding, travels, is_gather=True, stays_inside=stays))

    happening = [(at, 1, k) for k, (at, _) in enumerate(gathers)] + [(at, 0, k) for k, (at, _) in enumerate(reductions)]
    reducing: list[Key] = [(Role.REDUCE_SCATTER, phase, bucket.fqns) for _, bucket in reductions]
    now, end = 0.0, 0
    yield from launch(-1)
    for at, is_gather_, k in sorted(happening):
        yield Event("compute", at - now)
        now = at
        if is_gather_:
            yield from launch(k)
            yield Event("wait", 0.0, keys[k])
            yield Event("compute", needs.backend.gather_wait_bytes(gathers[k][1].gathered) / needs.device.bytes_per_s)
            continue
        for older in finished[k]:
            yield from _finish(needs, reducing[older], reductions[older][1])
        end = finished[k].stop
        travels = narrowed(reductions[k][1].gradients, needs.reduced_as)
        yield Event.start(reducing[k], sent_of(needs.step.sharding, travels, is_gather=False))
    yield Event("compute", needs.phase_s.get(phase, 0.0) - now)
    for key, (_, bucket) in zip(reducing[end:], reductions[end:], strict=True):
        yield from _finish(needs, key, bucket)


def _finish(needs: Needs, key: Key, bucket: Bucket) -> Iterator[Event]:
    """Wait for a reduction, and add up what came."""
    yield Event("wait", 0.0, key)
    yield Event("compute", needs.backend.reduce_wait_bytes(bucket.gradients) / needs.device.bytes_per_s)


def best_order(happening: list[Event], costs: Costs) -> tuple[tuple[tuple[Fqns, Fqns], ...], Timeline]:
    """Move each reduction in turn behind later gathers, while that makes the step faster.

    Returns:
        The pairs for `GathersFirst`, and how the step would go with them.
    """
    best = play(happening, costs.link, costs.inside)
    later: dict[Fqns, Fqns] = {}
    started = [event.key for event in happening if event.kind == "start" and event.key is not None]
    reductions = [key for key in started if not is_gather_key(key)]
    in_vain = 0
    for key in reductions if best.stalls else []:
        in_vain += 1
        while (moved := _behind_next_gather(happening, key)) is not None:
            order, gather = moved
            played = play(order, costs.link, costs.inside)
            if played.step_s * 1.0005 >= best.step_s:
                break
            happening, best, in_vain = order, played, 0
            later[_members(key)] = _members(gather)
        if in_vain >= TRIED_IN_VAIN:
            break
    return tuple(later.items()), best


def _behind_next_gather(happening: list[Event], start: Key | None) -> tuple[list[Event], Key] | None:
    """The events with one reduction started behind the next gather, if one starts before that reduction is over."""
    index = next(i for i, event in enumerate(happening) if event.kind == "start" and event.key is start)
    for place in range(index + 1, len(happening)):
        kind, key = happening[place].kind, happening[place].key
        if kind == "wait" and key is start:
            return None
        if kind == "start" and key is not None and is_gather_key(key):
            rest = [*happening[:index], *happening[index + 1 : place + 1], happening[index], *happening[place + 1 :]]
            return rest, key
    return None


def _members(key: Key | None) -> Fqns:
    assert key is not None
    return members(key) if isinstance(key, fx.Node) else key[2]
