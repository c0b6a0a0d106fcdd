"""Compute a model's head and its cross entropy in chunks of rows, so that the logits of all rows are never held."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from fxzero.errors import PassOrderError
from fxzero.graph.chunked_loss import find_losses, write_chunks
from fxzero.graph.nodes import Role
from fxzero.graph.step import StepGraph

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChunkLoss:
    """Split the product that makes logits, and the cross entropy of them, into chunks of rows.

    Before:  l = mm(x, w) | p = log_softmax(l) | nll_loss(p, y) | end_forward | dl = ...(p) | mm(dl, w) | mm(dl', x)
    After:   each chunk: mm(x[a:b], w), log_softmax, the labels' entries of it | nll_loss of these | end_forward |
             each chunk: mm(x[a:b], w), log_softmax, dl[a:b], mm(dl[a:b], w), dw += mm(dl[a:b]', x[a:b])

    The head's product runs once more, in backward. Logits that forward returns, or that anything else reads, are made
    whole as before; log-probabilities and gradients of logits never are.

    Needs: nothing; runs before all others. Numerics: loss and the gradients of rows are equal as far as a product of
    some rows equals the same rows of the whole product; gradients of the head's parameters are sums over chunks.
    Source: Liger Kernel (arXiv:2410.10989), fused linear cross entropy; deviation: gradients are made in backward.
    """

    num_chunks: int

    @property
    def tolerance(self) -> float:
        """The largest change of outputs and gradients, relative to the largest among them, in float32."""
        return 1e-4

    def __call__(self, step: StepGraph, /) -> None:
        if step.nodes(Role.ALL_GATHER):
            raise PassOrderError("the graph has all_gathers already; run ChunkLoss before InsertAllGathers")
        if not step.has_backward:
            return
        found = find_losses(step)
        for loss in found:
            write_chunks(step, loss, self.num_chunks)
        if not found:
            logger.warning(
                "loss_chunks=%d has no effect: there is no cross entropy of a linear layer's logits, by class labels, "
                "without weights and label smoothing",
                self.num_chunks,
            )
        else:
            logger.info("%d losses in %d chunks", len(found), self.num_chunks)
