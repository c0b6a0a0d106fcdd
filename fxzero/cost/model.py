"""What a step costs: seconds of each operator on a device, seconds of each collective on a link.

operator      roofline: max(FLOPs / rate, bytes / bandwidth) + overhead; replaced by what was measured, once it was
collective    alpha-beta: latency + bytes / bandwidth; one link sends one message after another, each way at once
core          where the cores that compute also carry the traffic (gloo), each byte costs them time as well
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any, cast

import torch
from torch import fx
from torch.utils.flop_counter import flop_registry

from fxzero import torch_internals
from fxzero.comm.backend import Backend
from fxzero.errors import PlanError
from fxzero.graph import ops
from fxzero.graph.aliasing import is_view
from fxzero.graph.nodes import Role, is_gather, is_island, tensor_bytes
from fxzero.graph.regions import is_region
from fxzero.graph.step import StepGraph

aten = torch.ops.aten
GBIT = 1e9 / 8
"""Bytes a second of one Gbit/s."""


@dataclass(frozen=True)
class Device:
    """What one rank computes with."""

    flops_per_s: float
    """Of large matrix products, in the dtype of the model."""
    bytes_per_s: float
    """Of memory, read and written."""
    op_s: float = 0.0
    """Overhead of one operator: dispatch or launch."""


@dataclass(frozen=True)
class Link:
    """What one rank is joined to the others by; every number is of one direction, with the other in use as well."""

    bytes_per_s: float
    latency_s: float = 0.0
    """From the start of a collective to its first byte: alpha."""
    cpu_s_per_byte: float = 0.0
    """Time that sending a byte and receiving one takes from the compute of this rank; 0 where others carry traffic."""

    def __post_init__(self) -> None:
        if self.bytes_per_s <= 0:
            raise ValueError(f"bytes_per_s is {self.bytes_per_s}; it must be positive")

    @property
    def load(self) -> float:
        """The part of the cores that a busy link takes from compute: at most half, then the link is slower instead."""
        return min(self.cpu_s_per_byte * self.bytes_per_s, 0.5)

    @property
    def loaded_bytes_per_s(self) -> float:
        """Of the link while this rank computes."""
        return min(self.bytes_per_s, 0.5 / self.cpu_s_per_byte) if self.cpu_s_per_byte else self.bytes_per_s


@dataclass(frozen=True)
class Cluster:
    """The machine that a plan is made for: each rank's device and its link to the others."""

    device: Device
    link: Link
    """To the other ranks; on a mesh of several nodes, to those of other nodes."""
    inside: Link | None = None
    """On such a mesh, to the ranks of the same node; None: they are behind the same link as all others."""

    @classmethod
    def of(cls, given: Cluster | str) -> Cluster:
        """A cluster by name (`CLUSTERS`), or the one that is given.

        Raises:
            PlanError: there is no cluster of this name.
        """
        if isinstance(given, Cluster):
            return given
        if given not in CLUSTERS:
            raise PlanError(f"no cluster is called {given!r}; there are {', '.join(CLUSTERS)}. Or pass fxzero.Cluster.")
        return CLUSTERS[given]

    def numbers(self) -> list[float]:
        """All numbers, in a fixed order."""
        parts = [self.device, self.link, *([] if self.inside is None else [self.inside])]
        return [number for part in parts for number in astuple(part)]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> Cluster:
        """The inverse of `numbers`."""
        device, rest = numbers[: len(fields(Device))], numbers[len(fields(Device)) :]
        size = len(fields(Link))
        return cls(Device(*device), *(Link(*rest[at : at + size]) for at in range(0, len(rest), size)))


CLUSTERS: Mapping[str, Cluster] = {
    # Per GPU: 312 TFLOP/s bf16 dense at 60 %, 1.555 TB/s; EFA 400 Gbit/s a node of 8 GPUs (AWS's published figures);
    # NVLink 600 GB/s, half of it each way.
    "p4d.24xlarge": Cluster(Device(0.6 * 312e12, 1.555e12, 5e-6), Link(400 * GBIT / 8, 30e-6), Link(300e9, 10e-6)),
    # Per GPU: 989 TFLOP/s bf16 dense at 60 %, 3.35 TB/s; EFA 3,200 Gbit/s a node of 8 GPUs; NVLink 900 GB/s.
    "p5.48xlarge": Cluster(Device(0.6 * 989e12, 3.35e12, 5e-6), Link(3200 * GBIT / 8, 30e-6), Link(450e9, 10e-6)),
}
"""Clusters by name. The rates of matrix products are shares of the published peaks, not measurements."""


@dataclass(frozen=True)
class Costs:
    """Seconds of every node of one step that takes any, and the links its collectives use."""

    seconds: Mapping[fx.Node, float]
    link: Link
    optimizer_s: float = 0.0
    """Of the optimizer's step, which follows backward."""
    inside: Link | None = None
    """What carries bytes inside a node, beside the link that carries those across nodes; None: that carries all."""

    def of(self, node: fx.Node) -> float:
        """Seconds that a node keeps this rank's device busy: compute, and the copies and sums at waits."""
        return self.seconds.get(node, 0.0)


def roofline(step: StepGraph, cluster: Cluster, backend: Backend, *, optimizer_bytes: int = 0) -> Costs:
    """Estimate the costs of a step.

    Args:
        backend: what waits move on the device that computes.
        optimizer_bytes: bytes that the optimizer reads and writes in its step.
    """
    device = cluster.device
    seconds = {node: operator_seconds(node, device) for node in step.nodes(Role.COMPUTE)}
    if step.sharding.shard_ranks > 1:
        for node in step.nodes(Role.WAIT):
            bucket, gathers = step.bucket_of(node), is_gather(node)
            moved = backend.gather_wait_bytes(bucket.gathered) if gathers else backend.reduce_wait_bytes(bucket.sums)
            seconds[node] = moved / device.bytes_per_s
    inside = cluster.inside if step.sharding.num_nodes > 1 else None
    return Costs(seconds, cluster.link, optimizer_bytes / device.bytes_per_s, inside)


def operator_seconds(node: fx.Node, device: Device) -> float:
    """The roofline of one operator; a view is free."""
    if is_view(node) or not (torch_internals.is_overload(node.target) or is_island(node) or is_region(node)):
        return 0.0
    values = [source.meta.get("val") for source in node.all_input_nodes]
    moved = sum(map(tensor_bytes, [*values, *torch_internals.tree_leaves(node.meta.get("val"))]))
    return max(flops(node) / device.flops_per_s, moved / device.bytes_per_s) + device.op_s


def flops(node: fx.Node) -> int:
    """Floating-point operations of a matrix product, convolution, attention or island; 0 of anything else."""
    if is_island(node):
        return cast(Any, node.args[0]).facts.flops[node.target is ops.island_backward]
    if not torch_internals.is_overload(node.target):
        return 0
    overload = cast(Any, node.target)
    packet = _LIKE.get(overload.overloadpacket, overload.overloadpacket)
    formula = flop_registry.get(packet)
    if formula is None:
        return 0
    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    kwargs = {name: value for name, value in kwargs.items() if name != "out"}
    return int(formula(*args, **kwargs, out_val=node.meta["val"]))


_LIKE = {
    aten._scaled_dot_product_flash_attention_for_cpu: aten._scaled_dot_product_flash_attention,
}
"""Operators that count like one that torch counts."""


def rounded(value: float, digits: int = 2) -> float:
    """A measured number to few significant digits, so that noise seldom changes what is decided from it."""
    if value <= 0 or not math.isfinite(value):
        return 0.0
    scale = 10 ** (digits - 1 - math.floor(math.log10(value)))
    return round(value * scale) / scale


__all__ = ["CLUSTERS", "GBIT", "Cluster", "Costs", "Device", "Link", "roofline"]
