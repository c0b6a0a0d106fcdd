"""The Comm for the process groups and the device at hand: the only place that chooses a backend."""

from __future__ import annotations

import torch
import torch.distributed as dist

from fxzero import torch_internals
from fxzero.comm.base import Comm, LocalComm
from fxzero.comm.gloo import GlooComm
from fxzero.comm.group import GroupComm
from fxzero.comm.groups import Group, Hierarchy, resolve_group
from fxzero.comm.nccl import NcclComm
from fxzero.comm.nodes_replicate import GlooAcross, GlooHierarchy, HierarchicalComm, NcclHierarchy
from fxzero.comm.nodes_share import GlooShardedHierarchy, NcclShardedHierarchy, ShardedHierarchy
from fxzero.comm.without_ranks import PlanningComm, ShardedPlanningComm


def make_comm(group: Group | None, device: torch.device) -> Comm:
    """The Comm for process groups (None: the default group, if there is one) and the device of its buffers.

    Raises:
        ValueError: the group has no backend for this device that fxzero knows.
    """
    if isinstance(group, Hierarchy):
        return (make_sharded_comm if group.shards_across else make_hierarchical_comm)(group, device)
    group = resolve_group(group)
    if group is None:
        return LocalComm()
    backend = torch_internals.backend_name(group, device)
    if backend == "fake":
        return PlanningComm(group.rank(), group.size(), device)
    if group.size() == 1:
        return LocalComm()
    if backend == "gloo" and device.type == "cpu":
        return GlooComm(group)
    if backend == "nccl" and device.type == "cuda":
        return NcclComm(group)
    raise unknown_backend(backend, device)


def unknown_backend(backend: str, device: torch.device) -> ValueError:
    """The error for a process group that fxzero cannot use on a device."""
    return ValueError(
        f"fxzero communicates by gloo on cpu and by nccl on cuda; this process group has {backend!r} for "
        f'{device.type}. Call torch.distributed.init_process_group("cpu:gloo,cuda:nccl").'
    )


def make_sharded_comm(hierarchy: Hierarchy, device: torch.device) -> Comm:
    """The Comm of nodes of two ranks or more that share the shards, and the device of the buffers.

    Raises:
        ValueError: the groups have no backend for this device that fxzero knows.
    """
    inside, across = hierarchy.inside, hierarchy.across
    backend = torch_internals.backend_name(across, device)
    if backend == "fake":
        number, num_ranks = inside.rank() * across.size() + across.rank(), inside.size() * across.size()
        return ShardedPlanningComm(number, num_ranks, device, num_nodes=across.size())
    comm: ShardedHierarchy
    if backend == "gloo" and device.type == "cpu":
        num_ranks = inside.size() * across.size()
        comm = GlooShardedHierarchy(GlooComm(inside, divisor=1), GlooComm(across, divisor=num_ranks))
    elif backend == "nccl" and device.type == "cuda":
        comm = NcclShardedHierarchy(NcclComm(inside), NcclComm(across))
    else:
        raise unknown_backend(backend, device)
    place = f"Rank {dist.get_rank()}, which is rank {inside.rank()} of {inside.size()} of node {comm.node}"
    for part in (comm.inside, comm.across):
        assert isinstance(part, GroupComm)
        part.called = place
    return comm


def make_hierarchical_comm(hierarchy: Hierarchy, device: torch.device) -> Comm:
    """The Comm of two process groups and the device of the buffers.

    Raises:
        ValueError: the groups have no backend for this device that fxzero knows.
    """
    inside, across = hierarchy.inside, hierarchy.across
    backend = torch_internals.backend_name(across, device)
    if backend == "fake":
        return PlanningComm(inside.rank(), inside.size(), device, num_nodes=across.size())
    comm: HierarchicalComm
    if backend == "gloo" and device.type == "cpu":
        comm = GlooHierarchy(LocalComm() if inside.size() == 1 else GlooComm(inside, divisor=1), GlooAcross(across))
    elif backend == "nccl" and device.type == "cuda":
        comm = NcclHierarchy(LocalComm() if inside.size() == 1 else NcclComm(inside), NcclComm(across))
    else:
        raise unknown_backend(backend, device)
    place = f"Rank {dist.get_rank()}, which is rank {comm.rank} of {comm.world_size} of node {comm.node}"
    for part in (comm.inside, comm.across):
        if isinstance(part, GroupComm):
            part.called = place
    return comm
