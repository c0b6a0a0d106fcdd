"""What a user sees: `compile()`, and the module it returns."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxzero import torch_internals
from fxzero.comm import agree
from fxzero.cost.model import Cluster
from fxzero.errors import FxzeroError, OptimizerError
from fxzero.graph.layout import LayoutName
from fxzero.graph.sharding import Placement
from fxzero.graph.step import Pass
from fxzero.memory.report import MemoryReport
from fxzero.module import ownership, weights
from fxzero.module.budget_round import held
from fxzero.module.engine import Engine
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.optimizer_classes import check_optimizer
from fxzero.module.optimizer_guard import OptimizerGuard
from fxzero.options import Options, Without, check_mesh, choose_device, choose_group, choose_recipe
from fxzero.planner import as_arguments
from fxzero.planning.schedule import Schedule
from fxzero.runtime.executable import Executable

_REFUSED_METHODS = ("generate",)


def compile(
    model: nn.Module,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None = None,
    example: Any = None,
    device: torch.device | str | None = None,
    process_group: dist.ProcessGroup | None = None,
    init_fn: Callable[[nn.Module], object] | None = None,
    sync_init: bool = True,
    elementwise_optimizer: bool = False,
    memory_budget: int | Literal["auto"] | None = None,
    reshard_after_forward: bool | None = None,
    stage: Literal[2, 3] | None = None,
    recompute: Literal["none", "full"] | int = "none",
    passes: Sequence[Pass] | None = None,
    timeout: timedelta = timedelta(minutes=5),
    layout: LayoutName = "contiguous",
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    cluster: Cluster | str | None = None,
    without: Without = (),
    mesh: DeviceMesh | None = None,
    across: Placement = "replicate",
    short_gloo_slices: bool = True,
) -> ZeroModule:
    """Take a model over and train it by ZeRO stage 3 on a schedule that is written before it runs.

    The model's parameters become this rank's shards (1-D, a slice of each) and the full storages are freed; the
    Parameter objects stay the same, so an optimizer built before or afterwards from `zero.parameters()` steps the
    shards.

    Args:
        model: any nn.Module that torch.fx can trace with fake tensors, on the meta device or a real one.
        optimizer: the optimizer(s) that hold the model's parameters already; state they have is cut into shards.
        example: one batch: a mapping is passed as keyword arguments, a tuple or list as positional ones, anything else
            as the only argument. With it, tracing, planning and sharding happen now; else at the first call.
        device: where a meta model goes. Default: the device of a real model; the rank's accelerator, else the CPU.
        process_group: the ranks to shard over. Default: the default group if torch.distributed is initialised, else
            none (world size 1).
        init_fn: initialises the modules of a meta model, as `model.apply(init_fn)` would.
        sync_init: start from rank 0's parameters and buffers; False trusts that all ranks have equal ones.
        elementwise_optimizer: vouch that an optimizer class that fxzero does not know updates each element by itself.
        memory_budget: bytes that a rank may use for everything that fxzero plans (`zero.schedule.memory`); "auto" is
            what is free. What fits stays gathered from forward to backward, and under gradient accumulation until the
            shards change. Decided at the first call with a backward, for its shapes. Default: all is gathered again but
            what costs no memory at the peak to keep: a few buckets that forward reads last and backward first.
        reshard_after_forward: True gathers every parameter again in backward; False keeps all from forward to backward.
        stage: the same in the terms of ZeRO: 3 is True, and 2, at whose residency parameters stay, is False.
        recompute: "none", "full" (whole repeated blocks run again in backward), or an upper bound on the bytes of
            activations saved for backward, for which cheap operators are recomputed first. Numerics do not change.
        passes: the compiler passes, in order, instead of those that these options make. Default:
            `fxzero.passes.default_passes()`.
        timeout: how long ranks wait for each other when they compare what they compiled.
        layout: how a bucket of parameters is cut. "contiguous": as one flat buffer, so that collectives move parameters
            and gradients straight into place. "interleaved": each parameter by itself, as DeepSpeed does, so that each
            gather and each reduce copies its bucket; the same training bit for bit, as a reference to measure against.
        gather_dtype: in which parameters travel: torch.bfloat16, or torch.int8 with a scale for every 256 elements. The
            step then computes with parameters rounded so, in their own dtype; the optimizer updates exact shards, which
            state dicts hold. Default: their own, as for one rank alone and for parameters that are as narrow already.
        reduce_dtype: in which gradients travel: torch.bfloat16. Sums over micro-batches, and on gloo also those over
            ranks, are made in their own dtype. Default: their own.
        cluster: what the schedule is made for: numbers, or a name of `fxzero.cost.CLUSTERS`. Default: measured, in a
            fraction of a second before the first plan, by all ranks together; not for less than 1 MiB of parameters,
            nor for replicas of one rank each.
        without: optimizations to turn off, by the names of `fxzero.ablation`, or "all", to measure what they are worth.
            Training stays the same, but for roundings that it lists.
        mesh: instead of process_group, as FSDP2 takes it: 1-D, the ranks to shard over; 2-D of (across, inside), say
            `init_device_mesh("cuda", (num_nodes, ranks_per_node), mesh_dim_names=("replicate", "shard"))`: every node
            shards over its own ranks and is a replica of the others (HSDP, MiCS). All gathers stay inside a node; of
            each gradient, its shard crosses nodes, after a reduce-scatter inside. A step is that of all ranks.
        across: "replicate", or "shard": the nodes of the mesh share the shards, as if all ranks were one group, and
            each keeps what it gathered from others in secondary shards, so that gathers in backward, and in further
            micro-steps, stay inside it (ZeRO++'s hpZ). Gradients cross nodes once, at half the bytes or less.
        short_gloo_slices: let the threads of this process that carry gloo's messages ask the scheduler for slices of
            0.1 ms, so that a message does not wait for the end of a slice of compute. It needs Linux 6.12 and no
            privilege, and has no effect elsewhere. False leaves the threads as they are.

    Returns:
        The module to call and train.

    Raises:
        InputMismatchError: a parameter is not contiguous, not floating, or the model is compiled already; this rank is
            not in the mesh, or the mesh is one of other devices.
        OptimizerError: the optimizer cannot step shards.
        ValueError: options contradict each other, there is no such layout, optimization or relation of nodes, or the
            mesh has more than two dimensions.
        CaptureError, RankMismatchError, PlanError: with `example`; else the first call raises them.
    """
    wire_dtypes = gather_dtype, reduce_dtype
    recipe, own_list = choose_recipe(
        passes, layout, memory_budget, reshard_after_forward, stage, recompute, wire_dtypes, without
    )
    check_mesh(mesh, across, recipe)
    group = choose_group(process_group, mesh, across)
    with agree.reporting_failure(group, "layout"):  # the other ranks wait for this one with what they compiled
        ownership.check_model(model)
        optimizers = _as_tuple(optimizer)
        for each in optimizers:
            check_optimizer(each, elementwise_optimizer=elementwise_optimizer)
            _check_holds_parameters(each, model)
        options = Options(
            recipe=recipe,
            passes=own_list,
            device=choose_device(model, device, mesh),
            memory_budget=memory_budget,
            cluster=None if cluster is None else Cluster.of(cluster),
            has_default_passes=passes is None,
            keeps_free=(memory_budget, reshard_after_forward, stage) == (None, None, None),
            across=across,
            sync_init=sync_init,
            init_fn=init_fn,
            timeout=timeout,
            short_gloo_slices=short_gloo_slices,
        )
        engine = options.make_engine(model, group, optimizers)
        zero = ZeroModule(model, engine, elementwise_optimizer=elementwise_optimizer)
        if example is not None:
            _prepare(zero, example)
    return zero


def _prepare(zero: ZeroModule, example: Any) -> None:
    """Trace, plan and shard now; give the model back if that fails."""
    engine = zero._fxzero_engine
    try:
        engine.prepare(as_arguments(example))
    except BaseException:
        if engine.sharded.shards is None:  # the parameters are what they were
            ownership.give_back(engine.sharded.model)
        raise


def _as_tuple(optimizer: Any) -> tuple[torch.optim.Optimizer, ...]:
    if optimizer is None:
        return ()
    return tuple(optimizer) if isinstance(optimizer, Sequence) else (optimizer,)


def _check_holds_parameters(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    held = {id(param) for group in optimizer.param_groups for param in group["params"]}
    if held.isdisjoint(map(id, model.parameters())):
        raise OptimizerError(
            f"{type(optimizer).__name__} holds no parameter of this model. Build it from model.parameters() before "
            "compile, or from the parameters of what compile returns."
        )


class ZeroModule(nn.Module):
    """A model whose parameters are this rank's shards and whose forward and backward run from a schedule.

    It has the model's own names and Parameter objects; other attributes and methods are the model's.
    """

    def __init__(self, model: nn.Module, engine: Engine, *, elementwise_optimizer: bool = False) -> None:
        self.__dict__["_fxzero_model"] = model
        self.__dict__["_fxzero_engine"] = engine
        mode = model.training
        super().__init__()
        model.training = mode  # which nn.Module's constructor sets
        torch_internals.share_tables(self, model)
        self._fxzero_guard = OptimizerGuard(
            self,
            engine.sharded.held_shards,
            elementwise_optimizer=elementwise_optimizer,
            on_step=engine.after_optimizer,
        )
        ownership.take_over(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model. The first call of each kind (shapes, train or eval, ...) traces and plans it."""
        return self._fxzero_engine((args, kwargs))

    # -- what belongs to the model -------------------------------------------------------------------------------

    @property
    def training(self) -> bool:
        """The model's own flag."""
        return self._fxzero_model.training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._fxzero_model.training = mode

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            value = getattr(self.__dict__["_fxzero_model"], name)
        return _refuse_new_shapes(name) if name in _REFUSED_METHODS else value

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_fxzero") or name in self.__dict__ or hasattr(type(self), name):
            super().__setattr__(name, value)
            return
        holds_parameters = isinstance(value, nn.Module) and next(value.parameters(), None) is not None
        if isinstance(value, nn.Parameter) or holds_parameters or name in torch_internals.tensor_tables(self)[0]:
            raise FxzeroError(
                f"{name}: compile fixes the parameters of a model. Change the model before fxzero.compile."
            )
        setattr(self._fxzero_model, name, value)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ZeroModule:  # type: ignore[override]
        ownership.refuse_conversion(self, fn)
        return self

    def __repr__(self) -> str:
        return f"ZeroModule({self._fxzero_model!r})"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        ownership.refuse_copy()

    # -- training ------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Generator[None]:
        """Keep gradients unsharded inside, and reduce them at the first backward outside.

        Fewer bytes on the wire for gradient accumulation, for the memory of one full copy of the gradients. Without it,
        each backward reduces and adds to the shards, which is the default.
        """
        engine = self._fxzero_engine
        before, engine.synchronize = engine.synchronize, False
        try:
            yield
        finally:
            engine.synchronize = before

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, also those that no_sync() holds (which an optimizer's zero_grad does not know of)."""
        super().zero_grad(set_to_none)
        if (gradients := self._fxzero_engine.sharded.gradients) is not None:
            gradients.drop_held()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip the gradients of all ranks by their global norm, without a host synchronisation.

        `torch.nn.utils.clip_grad_norm_` would take this rank's shards for the whole, and `torch.amp.GradScaler` looks
        for infinities in them only: on several ranks use `torch.distributed.fsdp.sharded_grad_scaler`.

        Args:
            max_norm: upper bound on the norm.
            norm_type: 2.0 or infinity.
            error_if_nonfinite: raise if the norm is not finite; this one does synchronise with the host.

        Returns:
            The norm before clipping: a scalar tensor on the device, equal on all ranks.

        Raises:
            ValueError: another norm_type.
            RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        """
        engine = self._fxzero_engine
        sharded = engine.sharded
        return engine.clip_grad_norm(sharded.gradients, sharded.comm, max_norm, norm_type, error_if_nonfinite)

    # -- weights -------------------------------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        *,
        rank0_only: bool = False,
    ) -> dict[str, Any]:
        """The full state dict with the model's own names: a collective, to be called on every rank.

        Holds no more than the result and one bucket. Buffers are rank 0's.

        Args:
            destination, prefix: as of nn.Module: where to put it, and what is prepended to each name.
            keep_vars: has no effect: the tensors are copies.
            rank0_only: only rank 0 gets it; the others get an empty dict.
        """
        return weights.state_dict(
            self._fxzero_engine.sharded, rank0_only=rank0_only, prefix=prefix, destination=destination
        )

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load a full state dict with the model's own names; every rank passes it and keeps its slices.

        Raises:
            CheckpointError: names or shapes do not fit.
        """
        if assign:
            raise ValueError("assign=True would replace the shards. Load with assign=False.")
        return weights.load_state_dict(self._fxzero_engine.sharded, state_dict, strict=strict)

    def iter_full_params(self, *, rank0_only: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Gather the parameters bucket by bucket, each once under its canonical name: a collective.

        Yields:
            `(name, full tensor)`; the tensor is None on other ranks if `rank0_only`. It is a view of memory that the
            next bucket overwrites: copy what you keep. Every rank must iterate to the end.
        """
        fix_layout_without_trace(self._fxzero_engine.sharded)
        return weights.full_params(self._fxzero_engine.sharded, rank0_only=rank0_only)

    # -- the schedule --------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The schedule of the plan that ran last, or that `example` made."""
        engine = self._fxzero_engine
        last = engine.last
        if last is None:
            return Schedule()
        costs = engine.maker.tuning.costs_of(engine.sharded)
        timing = None if costs is None else partial(costs.timing, last.step)
        return Schedule(last.plan, partial(self._memory, last), timing, last.form)

    def _memory(self, executable: Executable) -> MemoryReport:
        engine, synchronize = self._fxzero_engine, executable.step.synchronize
        holds = held(engine.sharded, executable.step)
        if state := self._fxzero_guard.state_nbytes:
            holds = replace(holds, optimizer_state=state)
        measured = engine.memory_in_use.read() if executable.has_run else None
        return executable.plan.report(holds, engine.sharded.arena.nbytes, measured, synchronize=synchronize)


def _refuse_new_shapes(name: str) -> Callable[..., NoReturn]:
    def refused(*args: Any, **kwargs: Any) -> NoReturn:
        raise FxzeroError(
            f"{name}() calls the model with ever new shapes, each of which would be traced. Gather the weights into "
            f"the plain model instead: plain.load_state_dict(zero.state_dict()); plain.{name}(...)."
        )

    return refused


__all__ = ["Schedule", "ZeroModule", "compile"]
