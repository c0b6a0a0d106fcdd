"""The table of backends, and the Comm for the process groups and the device at hand: the only place that chooses."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fxzero import torch_internals
from fxzero.comm.backend import Backend
from fxzero.comm.base import Comm, LocalComm
from fxzero.comm.gloo import GLOO, GlooComm
from fxzero.comm.gloo_threads import hurry_message_threads
from fxzero.comm.group import GroupComm
from fxzero.comm.groups import Group, Hierarchy, resolve_group
from fxzero.comm.heartbeat import log_of
from fxzero.comm.nccl import NCCL, NcclComm
from fxzero.comm.nodes_replicate import GlooAcross, GlooHierarchy, HierarchicalComm, NcclHierarchy
from fxzero.comm.nodes_share import GlooShardedHierarchy, NcclShardedHierarchy
from fxzero.comm.without_ranks import PlanningComm
from fxzero.graph.sharding import Axis, Sharding


@dataclass(frozen=True)
class Family:
    """A backend and the forms that its collectives have: on one group, and on the two groups of a mesh of nodes.

    Each form takes the number by which sums of gradients are divided; None is the number of ranks.
    """

    backend: Backend
    group: Callable[[dist.ProcessGroup, float | None], Comm]
    replicate: Callable[[Hierarchy, float | None], HierarchicalComm]
    """Nodes that are replicas of each other."""
    share: Callable[[Hierarchy, float | None], HierarchicalComm]
    """Nodes of two ranks or more that share the shards."""


def _gloo(group: dist.ProcessGroup, divisor: float | None) -> Comm:
    return GlooComm(group, divisor=divisor)


def _nccl(group: dist.ProcessGroup, divisor: float | None) -> Comm:
    return NcclComm(group, divisor=divisor)


def _gloo_replicate(nodes: Hierarchy, divisor: float | None) -> HierarchicalComm:
    inside = LocalComm()
    if nodes.inside.size() > 1:
        inside = GlooComm(nodes.inside, divisor=1, divisor_before=_divisor_of(nodes, divisor))
    return GlooHierarchy(inside, GlooAcross(nodes.across), divisor=divisor)


def _gloo_share(nodes: Hierarchy, divisor: float | None) -> HierarchicalComm:
    number = _divisor_of(nodes, divisor)
    return GlooShardedHierarchy(
        GlooComm(nodes.inside, divisor=1, divisor_before=number),
        GlooComm(nodes.across, divisor=number, divisor_before=1),
        divisor=divisor,
    )


def _divisor_of(nodes: Hierarchy, divisor: float | None) -> float:
    return nodes.inside.size() * nodes.across.size() if divisor is None else divisor


def _nccl_replicate(nodes: Hierarchy, divisor: float | None) -> HierarchicalComm:
    inside = LocalComm() if nodes.inside.size() == 1 else _nccl_inside(nodes, divisor)
    return NcclHierarchy(inside, NcclComm(nodes.across), divisor=divisor)


def _nccl_share(nodes: Hierarchy, divisor: float | None) -> HierarchicalComm:
    return NcclShardedHierarchy(_nccl_inside(nodes, divisor), NcclComm(nodes.across), divisor=divisor)


def _nccl_inside(nodes: Hierarchy, divisor: float | None) -> NcclComm:
    """Averages over the ranks of a node; sums undivided where a divisor is chosen."""
    return NcclComm(nodes.inside, divisor=None if divisor is None else 1)


BACKENDS: Mapping[tuple[str, str], Family] = {
    ("gloo", "cpu"): Family(GLOO, _gloo, _gloo_replicate, _gloo_share),
    ("nccl", "cuda"): Family(NCCL, _nccl, _nccl_replicate, _nccl_share),
}
"""By the name that torch.distributed has for a backend, and the type of device whose memory it moves."""


def backend_for(device: torch.device) -> Backend:
    """The backend that ranks on such a device would use, for plans of ranks that are not there.

    Raises:
        ValueError: there is none.
    """
    for (_, device_type), family in BACKENDS.items():
        if device_type == device.type:
            return family.backend
    raise _unknown_backend("nothing", device)


def make_comm(
    group: Group | None, device: torch.device, *, short_gloo_slices: bool = True, divisor: float | None = None
) -> Comm:
    """The Comm for process groups and the device of its buffers.

    Args:
        group: None is the default group, if there is one.
        device: where the buffers lie.
        short_gloo_slices: where it is gloo, let its threads ask the scheduler for short slices.
        divisor: by which sums of gradients over the ranks are divided. Default: their number.

    Raises:
        ValueError: the group has no backend for this device that fxzero knows.
    """
    comm = _choose_comm(group, device, divisor)
    parts = [comm.inside, comm.across] if isinstance(comm, HierarchicalComm) else [comm]
    members = group.ranks if isinstance(group, Hierarchy) else ()
    for part in (part for part in parts if isinstance(part, GroupComm)):
        comm.phases = part.phases = log_of(members or tuple(dist.get_process_group_ranks(part.group)))
        part.phases.channels.add(part)
        part.phases.is_asynchronous |= isinstance(part, NcclComm)
        if part.group_name in part.phases.made:
            part.renew(part.phases.made, part.phases.generation)
    if short_gloo_slices and isinstance(comm, (GlooComm, GlooHierarchy, GlooShardedHierarchy)):
        hurry_message_threads()
    return comm


def _choose_comm(group: Group | None, device: torch.device, divisor: float | None) -> Comm:
    if isinstance(group, Hierarchy):
        return _make_for_nodes(group, device, divisor)
    group = resolve_group(group)
    if group is None:
        return LocalComm(divisor)
    name = torch_internals.backend_name(group, device)
    if name == "fake":
        return PlanningComm(group.rank(), Sharding.over(group.size()), backend_for(device))
    return LocalComm(divisor) if group.size() == 1 else _family(name, device).group(group, divisor)


def _make_for_nodes(nodes: Hierarchy, device: torch.device, divisor: float | None) -> Comm:
    """The Comm of the two process groups of a rank."""
    name = torch_internals.backend_name(nodes.across, device)
    if name == "fake":
        placement = "shard" if nodes.shards_across else "replicate"
        sharding = Sharding(Axis(nodes.inside.size()), Axis(nodes.across.size(), placement))
        inside, across = nodes.inside.rank(), nodes.across.rank()
        rank = inside * nodes.across.size() + across if nodes.shards_across else inside
        return PlanningComm(rank, sharding, backend_for(device))
    family = _family(name, device)
    comm = (family.share if nodes.shards_across else family.replicate)(nodes, divisor)
    inside_text = f"rank {nodes.inside.rank()} of {nodes.inside.size()}"
    for part in (comm.inside, comm.across):
        if isinstance(part, GroupComm):
            part.called = f"Rank {dist.get_rank()}, which is {inside_text} of node {comm.node}"
    return comm


def _family(name: str, device: torch.device) -> Family:
    if (name, device.type) not in BACKENDS:
        raise _unknown_backend(name, device)
    return BACKENDS[name, device.type]


def _unknown_backend(name: str, device: torch.device) -> ValueError:
    """The error for a process group that fxzero cannot use on a device."""
    known = " and ".join(f"by {backend} on {device_type}" for backend, device_type in BACKENDS)
    wanted = ",".join(f"{device_type}:{backend}" for backend, device_type in BACKENDS)
    return ValueError(
        f"fxzero communicates {known}; this process group has {name!r} for {device.type}. Call "
        f'torch.distributed.init_process_group("{wanted}").'
    )
