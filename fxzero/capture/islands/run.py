"""One forward of an island, until its backward has run."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fxzero.capture.islands.facts import UNKNOWN, Facts
from fxzero.capture.islands.saved import Saved
from fxzero.capture.outputs import OutputSpec, flatten_output
from fxzero.errors import IslandError


class Run:
    """One forward of a site, until its backward has run."""

    def __init__(
        self,
        label: str,
        facts: Facts,
        output: Any,
        given: Sequence[Tensor],
        buffers: list[Tensor],
        saved: Saved | None = None,
        wanted: Sequence[Any] = (),
    ) -> None:
        """
        Args:
            output: what forward returned.
            given: its inputs, after it.
            buffers: the buffers after it.
            wanted: what gradients are computed for.
        """
        self.saved, self._wanted = saved, wanted
        """What autograd saved, of a call with a backward."""
        self.tensors, self.output = flatten_output(output)
        """The tensors of the output, and its structure."""
        self.given, self.buffers = given, buffers
        if facts is not UNKNOWN:
            self._check_output(label, facts)
        news = [given[index] for index in facts.written_inputs]
        outs = self.tensors
        self._differentiable: list[Tensor] = [*outs, *news]
        self.results: list[Tensor | None] = [*outs, *news, *(buffers[index] for index in facts.written_buffers)]
        if facts is not UNKNOWN:
            self.given, self.buffers, self.tensors = [], [], []
            for out, geometry in zip(self._differentiable, facts.outs, strict=False):
                if out.requires_grad and not geometry.requires_grad:
                    raise IslandError(f"{label}: a result requires grad, which it did not when the step was traced.")

    def _check_output(self, label: str, facts: Facts) -> None:
        if self.output != facts.output:
            raise IslandError(
                f"{label} returns {_plain(self.output)}; when the step was traced it returned "
                f"{_plain(facts.output)}. Plain values that change must stay inside of an island: return a tensor, or "
                "name a module around it in compile(islands=[...])."
            )

    def take(self) -> tuple[list[Tensor], Sequence[Any]]:
        """The results that may have a gradient, and what gradients are computed for; no longer held here."""
        taken = self._differentiable, self._wanted
        self._differentiable, self._wanted = [], ()
        return taken


def _plain(output: OutputSpec) -> str:
    leaves = ["a tensor" if leaf is Tensor else repr(leaf) for leaf in output.leaves]
    return f"{', '.join(leaves)} in {output.treespec}"
