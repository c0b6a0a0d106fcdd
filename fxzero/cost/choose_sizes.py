"""Choose bucket sizes, bytes in flight and the order of collectives from costs: the choice that is predicted fastest.

A step is reduced to the times at which it needs each parameter and completes each gradient. A candidate is then a list
of events to play (`timeline.py`), in the order that the passes would write. Candidates are few and tried in a fixed
order, so that equal costs give equal plans.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

from torch import fx

from fxzero.comm.backend import Backend
from fxzero.cost.job_costs import CostModel
from fxzero.cost.lower_bound import parameter_readers
from fxzero.cost.model import Costs, Device
from fxzero.cost.timeline import Event, Key, Timeline, is_gather_key, play
from fxzero.graph.layout import Bucket, ParamSpec, group_into_buckets
from fxzero.graph.nodes import Role, members, role
from fxzero.graph.placing import gather_starts, kept_from_forward, reductions_finished
from fxzero.graph.recipe import Fqns, Recipe
from fxzero.graph.step import Phase, StepGraph
from fxzero.graph.traffic import sent_of
from fxzero.graph.wire import WireFormat, gather_format, narrowed
from fxzero.host.gc_pause import gc_paused

MIB = 2**20
BODY_BYTES = tuple(size * MIB for size in (4, 8, 12, 16, 24, 32, 64, 128))
"""Upper bounds on a bucket that are tried."""
MOST_BYTES = 48 * MIB
"""Upper bound on what is in flight in each direction; a sixteenth of the model where that is more."""
HEAD_SHARES = (1, 2, 4, 8)
"""Ratios of the upper bound for later buckets to that for the first one."""
AHEAD = (3, 2, 4, 6)
"""Numbers of buckets of the largest size that may be in flight, in the order in which they are tried."""
CLOSE = 1.003
"""Ratio of two predictions up to which the candidate that was tried first is taken."""
TRIED_IN_VAIN = 16
"""Number of reductions in a row that gain nothing in another place, after which no further one is tried."""


@dataclass(frozen=True)
class Needs:
    """The times at which a step needs each parameter and completes each gradient, in seconds of compute."""

    step: StepGraph
    first_s: Mapping[Phase, Mapping[str, float]]
    """Maps each parameter that a phase reads to the time of its first reader in the phase; in the order of times."""
    ready_s: Mapping[str, float]
    """Maps each trained parameter to the time in backward at which its gradient is ready."""
    phase_s: Mapping[Phase, float]
    """Maps each phase to its length."""
    device: Device
    backend: Backend
    costs: Costs
    gathered_as: WireFormat | None = None
    """Format in which buckets travel to ranks, where that makes them narrower."""
    reduced_as: WireFormat | None = None
    """Format in which gradients travel to ranks, where that makes them narrower."""

    @property
    def params(self) -> list[ParamSpec]:
        """The parameters that are read, in the order of their first use."""
        return [self.step.params[fqn] for fqn in dict.fromkeys(itertools.chain(*self.first_s.values()))]


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
        gathered_as: format in which buckets will travel to ranks; a format that the step has already is not looked at.
        reduced_as: format in which gradients will travel to ranks.
    """
    before: dict[fx.Node, float] = {}
    phase_s: dict[Phase, float] = {}
    for phase, nodes in step.phases():
        elapsed = 0.0
        for node in nodes:
            before[node] = elapsed
            elapsed += 0.0 if role(node) is Role.WAIT else costs.of(node)  # waits cost what the buckets make of them
        phase_s[phase] = elapsed
    first: dict[Phase, dict[str, float]] = {phase: {} for phase in Phase}
    phase_of = step.phase_of()
    for _, fqn, readers in parameter_readers(step):
        for reader in readers:
            if reader in before:
                times = first[phase_of[reader]]
                times[fqn] = min(times.get(fqn, before[reader]), before[reader])
    ready = {fqn: before[start] for start in step.nodes(Role.REDUCE_SCATTER) for fqn in members(start)}
    in_order = {phase: dict(sorted(times.items(), key=itemgetter(1))) for phase, times in first.items()}
    return Needs(step, in_order, ready, phase_s, device, backend, costs, gathered_as, reduced_as)


def choose_sizes(gathering: StepGraph, recipe: Recipe, model: CostModel, *, keeps_free: bool) -> Recipe:
    """The recipe with the sizes and the order that are predicted to be fastest.

    If the buckets of the recipe are fixed, only the bytes in flight and the order are chosen.

    Args:
        gathering: a step that has its collectives: one for each parameter, before they are bucketed, or a complete plan
            whose compute was measured.
        keeps_free: buckets may stay gathered from forward to backward where that needs no more memory at the peak.
    """
    gathered_as = None if recipe.gather_dtype is None else gather_format(recipe.gather_dtype)
    reduced_as = None if recipe.reduce_dtype is None else WireFormat(recipe.reduce_dtype)
    with gc_paused():
        needs = needs_of(gathering, model(gathering), model.cluster.device, model.backend, gathered_as, reduced_as)
        best: tuple[float, Recipe, list[Event]] | None = None
        for candidate, groups in _candidates(needs, recipe, keeps_free=keeps_free):
            happening = list(_events(needs, groups, candidate))
            step_s = play(happening, needs.costs.link, needs.costs.inside).step_s
            if best is None or step_s * CLOSE < best[0]:
                best = step_s, candidate, happening
        assert best is not None, "a step without parameters has nothing to tune"
        chosen = replace(best[1], later=best_order(best[2], needs.costs)[0])
        if recipe.accumulate > 1 and recipe.unsharded is None:
            chosen = replace(chosen, unsharded=_is_faster_unsharded(needs, chosen))
        return chosen


def _is_faster_unsharded(needs: Needs, recipe: Recipe) -> bool:
    """True if a micro-batch takes longer where it reduces its gradients than where it adds them to unsharded ones."""
    costs, device = replace(needs.costs, optimizer_s=0.0), needs.device
    nbytes = sum(needs.step.params[fqn].grad_nbytes for fqn in needs.ready_s)
    seconds: list[float] = []
    for ready_s in (needs.ready_s, {}):
        trial = replace(needs, ready_s=ready_s, costs=costs)
        seconds.append(play(_events(trial, _groups(trial, recipe), recipe), costs.link, costs.inside).step_s)
    adding_s = 2 * nbytes / device.bytes_per_s  # read what is there, and write the sum
    return (seconds[1] + adding_s) * CLOSE < seconds[0]


def _candidates(needs: Needs, recipe: Recipe, *, keeps_free: bool) -> Iterator[tuple[Recipe, Sequence[Bucket]]]:
    """Recipes with other sizes, and the buckets that each of them makes."""
    order = needs.params
    most = max(MOST_BYTES, sum(param.gathered_nbytes for param in order) // 16)
    tried: set[tuple[tuple[Fqns, ...], int]] = set()
    for body, head, ahead in _sizes(recipe):
        sized = recipe if recipe.buckets is not None else replace(recipe, bucket_bytes=body, head_bytes=head)
        groups = _groups(needs, sized)
        inflight = ahead * max(min(body, bucket.gathered.nbytes) for bucket in groups)
        key = tuple(bucket.fqns for bucket in groups), inflight
        if key in tried or (tried and inflight > most):
            continue
        tried.add(key)
        sizes: dict[str, Any] = {"prefetch_bytes": inflight, "reduce_bytes": inflight}
        if recipe.buckets is None:
            sizes |= {"bucket_bytes": body, "head_bytes": head}
        if keeps_free and recipe.max_kept_bytes is not None:
            sizes["max_kept_bytes"] = min(inflight, MOST_BYTES)
        yield replace(recipe, **sizes), groups


def _groups(needs: Needs, recipe: Recipe) -> Sequence[Bucket]:
    """The buckets that a recipe makes."""
    if recipe.buckets is not None:
        return [needs.step.bucket(fqns) for fqns in recipe.buckets]
    ranks, head = needs.step.sharding.shard_ranks, recipe.head_bytes
    return group_into_buckets(needs.params, ranks, recipe.bucket_bytes, head_bytes=head)


def _sizes(recipe: Recipe) -> Iterator[tuple[int, int | None, int]]:
    """The sizes to try: bytes of buckets, bytes of the first one, and how many of the largest are in flight."""
    if recipe.buckets is not None:
        yield from ((Recipe.bucket_bytes, None, ahead) for ahead in AHEAD)
        return
    for body, share in itertools.product(BODY_BYTES, HEAD_SHARES):
        yield body, None if share == 1 else body // share, AHEAD[0]


def _events(needs: Needs, groups: Sequence[Bucket], recipe: Recipe) -> Iterator[Event]:
    """The events of a step with these buckets on one rank, in the order that the passes would write."""
    forward = _in_order(groups, needs.first_s[Phase.FORWARD], min)
    backward = _in_order(groups, needs.first_s[Phase.BACKWARD], min)
    there = {bucket for _, bucket in forward}
    held = [bucket for _, bucket in backward if bucket in there]
    if recipe.kept is not None:
        stays = [bucket.fqns in recipe.kept for bucket in held]
    else:
        stays = kept_from_forward([bucket.gathered.nbytes for bucket in held], recipe.max_kept_bytes)
    kept = set(itertools.compress(held, stays))
    again = [(at, bucket) for at, bucket in backward if bucket not in kept]
    yield from _phase(needs, Phase.FORWARD, forward, [], recipe, set())
    yield from _phase(needs, Phase.BACKWARD, again, _in_order(groups, needs.ready_s, max), recipe, there)
    yield Event("compute", needs.costs.optimizer_s)


def _in_order(
    groups: Sequence[Bucket], times: Mapping[str, float], choose: Callable[[Iterable[float]], float]
) -> list[tuple[float, Bucket]]:
    """The buckets with members that have times, each with the time that `choose` takes of those; in order of time."""
    found = [([times[fqn] for fqn in bucket.fqns if fqn in times], bucket) for bucket in groups]
    return sorted(((choose(each), bucket) for each, bucket in found if each), key=itemgetter(0))


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


def _behind_next_gather(happening: list[Event], start: Key) -> tuple[list[Event], Key] | None:
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


def _members(key: Key) -> Fqns:
    return members(key) if isinstance(key, fx.Node) else key[2]
