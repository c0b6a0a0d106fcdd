"""Let what runs between matrix products, attention and random draws be compiled, region by region."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import torch
from torch import fx

from fxzero.errors import PassOrderError
from fxzero.graph.fusion.decompose import decompose, share_equal
from fxzero.graph.fusion.exact import exactly_fusable, repeated_alone
from fxzero.graph.fusion.form import form_regions
from fxzero.graph.fusion.masks import save_as_bools
from fxzero.graph.fusion.operators import fusable
from fxzero.graph.fusion.save import save_less
from fxzero.graph.nodes import Role
from fxzero.graph.step import Phase, StepGraph

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FuseCompute:
    """Make regions of pointwise operators, reductions and casts, each compiled once and called as one node.

    Before:  h = mm(x, w) | s = add(h, x) | n = layer_norm(s) | mm(n, w2)
    After:   h = mm(x, w) | s, n = region(h, x) | mm(n, w2)

    Norms, softmax, losses and activations are decomposed. What backward needs is a minimum cut by bytes or,
    on a CPU, by time: regions of backward compute pointwise operators again. Matrix products, convolutions, attention,
    draws, islands and operators that write keep their order; each region runs in one gap between two of them.
    With `exact` nothing is decomposed, and regions hold only operators that have one right result.

    Needs: RematerializeViews and RecomputeActivations, if at all, before; runs before InsertAllGathers. Numerics:
    changed, within `tolerance`; draws are the same. With `exact` unchanged, bit for bit.
    Source: Chen et al. (arXiv:1604.06174) for recomputing, and TorchInductor, which compiles the regions; deviation:
    one joint graph whose order is kept, so that collectives can be planned into it.
    """

    repeats_costly: bool = False
    """log, pow and the like may run again in backward, and what products read: the least is saved, as on a GPU."""
    exact: bool = False
    """Regions compute what their operators do one by one, bit for bit; the least is saved."""

    @property
    def tolerance(self) -> float:
        """The largest change of outputs and gradients, relative to the largest among them, in float32."""
        return 0.0 if self.exact else 1e-4

    def __call__(self, step: StepGraph, /) -> None:
        if step.nodes(Role.ALL_GATHER):
            raise PassOrderError("the graph has all_gathers already; run FuseCompute before InsertAllGathers")
        made = set[fx.Node]() if self.exact else decompose(step)
        save_as_bools(step)
        phase_of = step.phase_of()
        own = set(step.param_nodes().values())
        across = {node for node in made if phase_of[node] is Phase.BACKWARD and own.isdisjoint(node.all_input_nodes)}
        share_equal(step, self._inside(step), across)
        inside = self._inside(step)
        if self.exact:
            save_less(step, inside, repeated_alone(step, inside), fewest_bytes=True)
        else:
            save_less(step, inside, fewest_bytes=self.repeats_costly or _is_on_gpu(step))
        before = len(step.graph.nodes)
        calls = form_regions(step, self._inside(step), exact=self.exact)
        logger.info("%d regions: %d nodes became %d", len(calls), before, len(step.graph.nodes))

    def _inside(self, step: StepGraph) -> set[fx.Node]:
        """The nodes that may stand in regions."""
        return exactly_fusable(step) if self.exact else fusable(step)


def _is_on_gpu(step: StepGraph) -> bool:
    values = (node.meta.get("val") for node in step.nodes(Role.COMPUTE))
    return any(isinstance(value, torch.Tensor) and value.device.type == "cuda" for value in values)
