"""Make the plan for a new kind of call: trace, choose, plan, fix the layout, agree with the other ranks, bind."""

import dataclasses
import logging
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from fxzero import torch_internals
from fxzero.capture import Captured, capture
from fxzero.capture.islands.marks import Islands
from fxzero.comm import agree
from fxzero.graph.layout import ParamSpec
from fxzero.graph.needs import needs_of
from fxzero.graph.recipe import Needs, Recipe
from fxzero.host.allocator import give_back_freed_memory
from fxzero.host.gc_pause import collect_young, gc_paused
from fxzero.module.budget_round import BudgetRound
from fxzero.module.call_kind import Arguments, Pattern, Signature, set_to
from fxzero.module.changing_numbers import ChangingNumbers
from fxzero.module.first_fill import agree_on_options, fix_layout
from fxzero.module.lengths import Lengths, Predicted
from fxzero.module.ownership import with_own_forward
from fxzero.module.ranks.collective_orders import Mode, Orders, order_of
from fxzero.module.ranks.parts import compare_parts
from fxzero.module.sharded_model import ShardedModel
from fxzero.module.tuning_rounds import TuningRounds
from fxzero.planning.check_passes import pass_checks
from fxzero.planning.compile_regions import compile_regions
from fxzero.planning.fix_layout import layout_of, warn_if_out_of_order
from fxzero.planning.lengths.family import beside_buckets
from fxzero.planning.lengths.record import Recording
from fxzero.planning.plan import make_plan, with_collectives
from fxzero.runtime.binding import Binder
from fxzero.runtime.executable import BoundPlan

logger = logging.getLogger(__name__)


@dataclass
class PlanMaker:
    """Makes the plans of one model; all ranks make the first plan of a mode together."""

    sharded: ShardedModel
    tuning: TuningRounds
    budget: BudgetRound
    islands: Islands
    binder: type[Binder] = Binder
    """The class that binds the variants of a plan."""

    def __post_init__(self) -> None:
        self.numbers = ChangingNumbers()
        self._lengths = Lengths(self.sharded)
        self._recording = Recording()
        """What the forward ran that was traced last."""
        self._orders = Orders(self.sharded.group, self.sharded.comm.rank, self.sharded.timeout)

    def tune_again(self) -> bool:
        """Choose order and prefetching from measured costs; a collective. True if plans must be made again."""
        is_changed = self.tuning.choose_again(self.sharded)
        if is_changed:
            self._orders.forget_orders()
            self._lengths.forget()
        return is_changed

    def meet(self, signature: Signature, *, anew: bool) -> None:
        """Let ranks agree again on the collectives of a mode at its next plan, which all of them make together.

        Args:
            anew: forget what earlier calls needed.
        """
        self._orders.meet(Mode(signature.grad, signature.trained, signature.called), anew=anew)
        self._lengths.forget()

    def make(
        self, signature: Signature, pattern: Pattern | None, arguments: Arguments
    ) -> tuple[BoundPlan, Pattern, bool]:
        """Make the plan for a kind of call.

        Args:
            pattern: the outputs that receive a gradient; None lets the trace guess them.

        Returns:
            The plan, its pattern, and whether plans that were made before it must be dropped.
        """
        began = time.process_time()
        self.sharded.look_at_modules()
        is_first = self.sharded.shards is None  # equal models profit from its fake results; new shapes would not end
        with (
            torch.inference_mode(False),
            torch_internals.outside_of_autograd_modes(),
            torch_internals.few_fake_results(keep=is_first),
            agree.busy(self.sharded.group),
            gc_paused(leaves_old=True),
        ):
            collect_young()  # what the caller has left there is none of ours
            predicted = self._predict(signature, pattern, arguments)
            if predicted is None:
                self._lengths.note_changes(signature, pattern, self.numbers)
                made, how = self._make(signature, pattern, arguments), "traced and planned"
            else:
                differentiated = predicted.bound.plan.captured.differentiated
                made, how = (predicted.bound, differentiated, False), f"predicted from lengths {predicted.lengths}"
        give_back_freed_memory()
        shapes = [list(leaf.shape) for leaf in signature.tensor_leaves]
        logger.info("inputs of shapes %s: %s in %.2f s of processor time", shapes, how, time.process_time() - began)
        return made

    def _predict(self, signature: Signature, pattern: Pattern | None, arguments: Arguments) -> Predicted | None:
        """The plan of a call that differs from traced ones in one length alone; None if it must be traced."""
        sharded = self.sharded
        is_example = any(leaf.device.type == "meta" for leaf in signature.tensor_leaves)
        if sharded.shards is None or is_example or self.budget.budget_bytes is not None or self.binder is not Binder:
            return None
        if signature.method is not None or sharded.parallel or sharded.ignored:
            return None

        def accepts(bound: BoundPlan, needs: Needs, order: list[str]) -> bool:
            mode = Mode(bound.plan.captured.step.has_backward, signature.trained)
            is_current = beside_buckets(bound.plan.recipe) == beside_buckets(sharded.recipe)
            return is_current and self._orders.has(mode, needs, order)

        return self._lengths.predict(signature, pattern, arguments, self._specs(signature), accepts)

    def _make(
        self, signature: Signature, pattern: Pattern | None, arguments: Arguments
    ) -> tuple[BoundPlan, Pattern, bool]:
        sharded = self.sharded
        with_backward = signature.may_have_backward
        fixes_layout = sharded.shards is None
        others_wait = fixes_layout or not self._orders.knows(Mode(with_backward, signature.trained, signature.called))
        topic = "layout" if fixes_layout else "mode"
        reporting = partial(agree.reporting_failure, sharded.group, topic) if others_wait else nullcontext
        with reporting():
            captured = self._capture(signature, pattern, arguments, with_backward=with_backward)
        collect_young()  # a trace leaves much garbage
        if fixes_layout:
            agree_on_options(sharded)
        self.tuning.choose(sharded, captured.step, topic)
        # Plans of evaluations made before a choice do not leave kept and resident buckets their places.
        drops_others = self.budget.choose(sharded, captured.step, topic)
        mode = Mode(captured.step.has_backward, signature.trained, signature.called)
        with reporting():
            needs = self._needs(captured)
        together, has_grown = self._orders.settle(mode, needs, topic)
        with reporting():
            backend, devices = sharded.comm.backend, sharded.devices
            checks = partial(pass_checks, sharded.model, *arguments)
            recipe = self._recipe(needs, together)
            plan = make_plan(captured, recipe, backend, devices, sharded.passes, checks)
            order = order_of(plan)
        if fixes_layout:
            fix_layout(sharded, layout_of(plan.step, sharded.recipe, sharded.passes), order)
        assert sharded.shards is not None
        if self._orders.is_empty and not fixes_layout:
            warn_if_out_of_order(plan.step, sharded.shards.layout)
        self._orders.check(mode, together, order, agreed=fixes_layout)
        compare_parts(sharded, captured.step)
        compile_regions(each.step for each in plan.variants.values())
        bound = BoundPlan(plan, sharded.storage, self.binder)
        self.budget.warn_if_over(sharded, plan)
        example_only = any(leaf.device.type == "meta" for leaf in signature.tensor_leaves)
        bound.reducing.example_only = bound.holding.example_only = example_only
        if not example_only and together == needs and signature.method is None:
            self._lengths.note(signature, pattern, self._recording.record, bound, needs, order)
        return bound, captured.differentiated, drops_others or has_grown

    def _may_record(self) -> bool:
        """False while a record would keep weak references alive to parameters that are to become real.

        nn.LSTM and its like hold such references, and a record holds what the forward read.
        """
        sharded = self.sharded
        if sharded.parallel or sharded.ignored:  # a rehearsal has no DTensors, and a record knows shards alone
            return False
        return not (sharded.has_meta_params() and any(isinstance(each, nn.RNNBase) for each in sharded.modules))

    def _recipe(self, needs: Needs, together: Needs) -> Recipe:
        """The recipe of a plan that needs some collectives, where ranks together need more."""
        return self.sharded.recipe if together == needs else dataclasses.replace(self.sharded.recipe, needs=together)

    def _specs(self, signature: Signature) -> dict[str, ParamSpec]:
        """Every parameter, as it is trained in a call."""
        return {
            fqn: dataclasses.replace(spec, requires_grad=trained)
            for (fqn, spec), trained in zip(self.sharded.specs.items(), signature.trained, strict=True)
        }

    def _needs(self, captured: Captured) -> Needs:
        """What a step needs of other ranks; empty where there are none, or where a list of passes leaves no choice."""
        sharded = self.sharded
        if sharded.comm.is_alone or sharded.passes is not None:
            return ()
        return needs_of(with_collectives(captured.step, sharded.recipe))

    def _capture(
        self, signature: Signature, pattern: Pattern | None, arguments: Arguments, *, with_backward: bool
    ) -> Captured:
        sharded = self.sharded
        self._recording = Recording()
        self.islands.forget_facts()
        trace = partial(
            capture,
            sharded.model,
            sharded.forward if signature.method is None else with_own_forward(sharded, signature.method.function),
            *arguments,
            self._specs(signature),
            device=sharded.devices.compute,
            sharding=sharded.comm.sharding,
            with_backward=with_backward,
            islands=self.islands,
            is_method=signature.method is not None,
            ignored=sharded.ignored,
            watch=self._recording if self._may_record() else None,
        )
        captured = self.numbers.captured(partial(trace, differentiated=pattern), signature.call)
        if pattern and captured.differentiable and not captured.differentiated:  # other outputs than of calls before
            captured = self.numbers.captured(partial(trace, differentiated=None), signature.call)
        if sharded.shards is not None:  # buckets go by the `requires_grad` of when the layout was fixed
            captured.step.params = {param.fqn: param for param in sharded.shards.layout.params}
        return captured

    @contextmanager
    def as_in(self, signature: Signature) -> Generator[None]:
        """Set autocast and the training flags as they were at a call, for a trace that comes later."""
        modules = self.sharded.modules
        flags = [module.training for module in modules]
        enabled, dtype = signature.autocast
        try:
            for module, training in zip(modules, signature.training, strict=True):
                module.training = training
            with (
                torch.autocast(self.sharded.devices.compute.type, dtype=dtype, enabled=enabled),
                set_to(signature.settings),
            ):
                yield
        finally:
            for module, training in zip(modules, flags, strict=True):
                module.training = training
