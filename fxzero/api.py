"""`compile()`, and ZeroModule, the module that it returns."""

from __future__ import annotations

import functools
import itertools
import os
import types
import weakref
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxzero import torch_internals
from fxzero.checkpoint.export import parse_size
from fxzero.comm import agree
from fxzero.cost.model import Cluster
from fxzero.errors import FxzeroError, OptimizerError
from fxzero.graph.layout import LayoutName
from fxzero.graph.recipe import Compute
from fxzero.graph.sharding import Placement
from fxzero.graph.step import Pass
from fxzero.memory.report import MemoryReport
from fxzero.module import ownership, parts, weights
from fxzero.module.budget_round import held
from fxzero.module.engine import Engine
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.gradients import norms
from fxzero.module.gradients.asked_gradients import watch_gradients
from fxzero.module.loading import has_hooks_after_load, run_hooks_after_load
from fxzero.module.methods.call import Methods
from fxzero.module.methods.summon import summon
from fxzero.module.precision import choose_precision
from fxzero.module.ranks import copied_models
from fxzero.module.ranks.step_together import step_together
from fxzero.module.ranks.tensor_parallel import LocalParameters
from fxzero.module.saved import export
from fxzero.module.saved.load import load_newest
from fxzero.module.wrappers import is_kept_by_accelerate, refuse_wrappers
from fxzero.optimizers.classes import check_optimizer
from fxzero.optimizers.guard import OptimizerGuard, hook_state_dicts
from fxzero.options import (
    Options,
    Without,
    check_divide_factor,
    check_ignored,
    check_mesh,
    choose_cuda_graph,
    choose_device,
    choose_group,
    choose_ignored,
    choose_islands,
    choose_recipe,
)
from fxzero.planner import as_arguments
from fxzero.planning.schedule import Schedule
from fxzero.runtime.executable import Executable

if TYPE_CHECKING:
    from torch.distributed.fsdp import MixedPrecisionPolicy


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
    compute: Compute = "eager",
    loss_chunks: int = 1,
    passes: Sequence[Pass] | None = None,
    timeout: timedelta = timedelta(minutes=5),
    layout: LayoutName = "contiguous",
    gather_dtype: torch.dtype | None = None,
    reduce_dtype: torch.dtype | None = None,
    cluster: Cluster | str | None = None,
    accumulate: int = 1,
    gradient_divide_factor: float | None = None,
    without: Without = (),
    mesh: DeviceMesh | None = None,
    across: Placement = "replicate",
    short_gloo_slices: bool = True,
    islands: Sequence[str] | Literal["auto"] = "auto",
    mp_policy: MixedPrecisionPolicy | Mapping[str, MixedPrecisionPolicy] | None = None,
    cuda_graph: bool = False,
    ignored_params: Collection[nn.Parameter] | None = None,
    resume: str | os.PathLike[str] | None = None,
) -> ZeroModule:
    """Take a model over and train it by ZeRO stage 3 on a schedule that is written before it runs.

    Each parameter becomes this rank's shard, a slice `[n, 1, ...]`, and the full storages are freed. Parameter objects
    stay the same, so that an optimizer built before, or afterwards from `zero.parameters()`, steps the shards.

    Args:
        model: any nn.Module that torch.fx can trace with fake tensors, on the meta device or a real one.
        optimizer: the optimizer or optimizers that hold the model's parameters already; their state is cut into shards.
        example: one batch. A mapping is passed as keyword arguments, a tuple or list as positional ones, anything else
            as the only argument. With an example tracing, planning and sharding happen now, else at the first call.
        device: the device of a meta model. Default: that of a real model; else the rank's accelerator, else the CPU.
        process_group: the ranks to shard over. Default: the default group if torch.distributed is initialised, else
            this rank alone.
        init_fn: initialises the modules of a meta model, as `model.apply(init_fn)` would.
        sync_init: send rank 0's parameters and buffers to all ranks; False trusts that all ranks have equal ones.
        elementwise_optimizer: vouch that an optimizer updates each element by itself, where steps of small parameters
            do not show it. Optimizers of classes unknown to fxzero are tried so before their first step.
        memory_budget: bytes that a rank may use for everything in `zero.schedule.memory`; "auto" takes the free memory.
            Buckets that fit into the budget stay gathered from forward to backward, and under gradient accumulation
            until the shards change. They are chosen at the first call with a backward, for its shapes. Default: only
            buckets that cost no memory at the peak stay gathered, the few that forward reads last and backward first.
        reshard_after_forward: True gathers every parameter again in backward; False keeps all from forward to backward.
        stage: `reshard_after_forward` in the terms of ZeRO: 3 stands for True, 2 for False.
        recompute: "none"; "full", which runs whole repeated blocks again in backward; or an upper bound on the bytes of
            activations saved for backward, for which cheap operators are recomputed first. Numerics do not change.
        compute: "eager" runs each operator by itself, bit for bit as the model does. "fused" lets what runs between
            matrix products, attention and random draws be compiled by TorchInductor, region by region, and saves less
            for backward: faster, and equal within rounding; draws are the same. "exact" does so only with operators and
            regions that keep every bit: for memory. Both need a C++ compiler on a CPU. See `docs/compute.md`.
        loss_chunks: the number of chunks of rows in which the last linear layer and the cross entropy of its logits are
            computed, so that neither all log-probabilities nor all gradients of logits are held, nor all logits unless
            forward returns them; the product runs once more in backward. See `docs/compute.md`. Default: 1, as it is.
        passes: the compiler passes, in order, in place of those that these options make. Default:
            `fxzero.passes.default_passes()`.
        timeout: the longest time that ranks wait for each other when they compare what they compiled.
        layout: the way a bucket of parameters is cut into shards. "contiguous" cuts the bucket as one flat buffer, so
            that collectives move parameters and gradients straight into place. "interleaved" cuts each parameter by
            itself, as DeepSpeed does, so that each gather and each reduction copies its bucket. Both train alike bit
            for bit; the second is a reference to measure against.
        gather_dtype: the dtype in which parameters travel: torch.bfloat16, or torch.int8 with a scale for every 256
            elements. A step computes with parameters rounded so, in their own dtype. The optimizer and state dicts have
            the exact shards. Default: the dtype of the parameters, which a single rank and narrower parameters keep.
        reduce_dtype: the dtype in which gradients travel: torch.bfloat16. Gradients are summed in their own dtype over
            micro-batches, and on gloo also over ranks. Default: the dtype of the gradients.
        cluster: speeds of the devices and links that the schedule is made for: numbers, or a name of
            `fxzero.cost.model.CLUSTERS`. Default: all ranks measure them together before the first plan, in less than a
            second, unless the model has less than 1 MiB of parameters, or each rank is a replica.
        accumulate: the number of micro-batches, each with a backward, of one step of the optimizer. Only every
            `accumulate`-th backward must reduce gradients: the others add theirs to unsharded ones, which takes the
            memory of one full copy of the gradients, or reduce them into the shards where costs say that this takes no
            longer, or where a `memory_budget` leaves no room. An optimizer's step, clipping or norms after fewer
            backwards reduce what is there. See `docs/accumulation.md`. Default: every backward reduces.
        gradient_divide_factor: a positive number by which sums of gradients over all ranks are divided, as of FSDP2's
            `set_gradient_divide_factor`: 1 leaves sums, for losses that are divided by the tokens of all ranks.
            Default: the number of all ranks, so that gradients are means.
        without: names of optimizations to turn off, or "all", to measure their worth; `fxzero.reference.ablation` lists
            them. Training stays the same, except for the roundings that it lists.
        mesh: in place of process_group, as in FSDP2. A 1-D mesh has the ranks to shard over. A 2-D mesh of (across,
            inside), say `init_device_mesh("cuda", (num_nodes, ranks_per_node), mesh_dim_names=("replicate", "shard"))`,
            lets every node shard over its own ranks, as a replica of the other nodes (HSDP, MiCS). All gathers stay
            inside a node; gradient shards cross nodes after a reduce-scatter inside. The batch is that of all ranks.
            Of a model that `parallelize_module` has cut, the other dimensions; see `docs/tensor_parallel.md`.
        across: the relation of the nodes of a 2-D mesh. "replicate" makes them replicas. "shard" shares the shards
            among all ranks, as in one group; each node keeps parameters that it gathered from other nodes in secondary
            shards, so that gathers in backward and in further micro-steps stay inside it (hpZ of ZeRO++). Gradients
            cross nodes once, at half the bytes or less.
        short_gloo_slices: let gloo's threads in this process ask the scheduler for slices of 0.1 ms, so that a message
            does not wait for the end of a slice of compute. It needs Linux 6.12 and no privilege, and has no effect
            elsewhere. False leaves the threads as they are.
        islands: parts that run as they are, each call as one node of the schedule: by default those that cannot be
            traced, such as a branch on a tensor's value. Patterns of paths choose others ("layers.*.mlp", where `*`
            stands for one part); an empty list refuses what cannot be traced.
        mp_policy: a torch.distributed.fsdp.MixedPrecisionPolicy with the meaning that it has for FSDP2, of the whole
            model or by patterns of paths of modules: `{"*": policy, "*.norm": other}`, where the last pattern that
            matches a module, or a module around it, counts. Shards, `.grad` and optimizer state keep the dtype of the
            model; parameters are gathered and read in `param_dtype`; gradients are made in it, summed over ranks in
            `reduce_dtype`, and cast to the dtype of the shard. See `docs/precision.md`. Default: the model's dtypes.
        cuda_graph: replay forward and backward of a plan, collectives included, as CUDA graphs after the first steps,
            with equal results. A plan that cannot be captured runs as without it, and a warning says why. On a CPU it
            has no effect, which a warning says too. See `docs/gpu.md`.
        ignored_params: parameters of the model that stay as they are, as in FSDP2: each rank has them whole, and they
            are not sent, cast or initialised. Their gradients are those of this rank alone, which nobody averages. See
            `docs/parameters.md`.
        resume: a folder of `fxzero.save`. Its newest checkpoint is loaded into the model and the optimizers, as
            `fxzero.load` does before the layout is fixed, and `resumed` of the module has its extra. Where there is
            none yet, training begins as without it.

    Returns:
        The module to call and train.

    Raises:
        InputMismatchError: a parameter is not contiguous or is complex, the model is compiled already, this rank is
            not in the mesh, or the mesh has devices of another type.
        OptimizerError: the optimizer cannot step shards.
        TypeError: cuda_graph is no bool.
        ValueError: options contradict each other, an option has no such value, or the mesh has more than two
            dimensions.
        CheckpointError: the checkpoint is damaged, or of another model or optimizer.
        CaptureError, RankMismatchError, PlanError: as from a first call; only with `example`.
    """
    wire_dtypes = gather_dtype, reduce_dtype
    recipe, own_list = choose_recipe(
        passes,
        layout,
        memory_budget,
        reshard_after_forward,
        stage,
        recompute,
        compute,
        wire_dtypes,
        without,
        accumulate,
        loss_chunks,
    )
    check_mesh(mesh, across, recipe)
    check_divide_factor(gradient_divide_factor)
    group = choose_group(process_group, mesh, across)
    with agree.reporting_failure(group, "layout"):  # the other ranks will wait for this one to compare options
        ownership.check_model(model)
        optimizers = _as_tuple(optimizer)
        for each in optimizers:
            check_optimizer(each, elementwise_optimizer=elementwise_optimizer)
            _check_holds_parameters(each, model)
        options = Options(
            recipe=recipe,
            passes=own_list,
            device=(chosen := choose_device(model, device, mesh)),
            memory_budget=memory_budget,
            cluster=None if cluster is None else Cluster.of(cluster),
            has_default_passes=passes is None,
            keeps_free=(memory_budget, reshard_after_forward, stage) == (None, None, None),
            across=across,
            sync_init=sync_init,
            init_fn=init_fn,
            timeout=timeout,
            short_gloo_slices=short_gloo_slices,
            islands=choose_islands(islands),
            precision=choose_precision(mp_policy, recipe),
            gradient_divide_factor=gradient_divide_factor,
            cuda_graph=choose_cuda_graph(cuda_graph, chosen, recipe),
            ignored=(ignored := choose_ignored(model, ignored_params, chosen)),
        )
        parallel = LocalParameters()
        with parallel.given_back_on_failure():
            parallel.take(model, group, optimizers)
            if parallel.of and recipe.without:
                raise ValueError("without= measures optimizations of data parallelism alone; drop it.")
            check_ignored(ignored, recipe, mesh, cuda_graph=options.cuda_graph, parallel=parallel.of)
            engine = options.make_engine(model, group, optimizers, parallel=parallel.of)
            zero = _class_for(type(model))(model, engine, options, elementwise_optimizer=elementwise_optimizer)
    if resume is not None:
        with _giving_back(engine, parallel):
            zero._fxzero_resumed = load_newest(engine, Path(resume), optimizers)
    if example is not None:
        with (
            agree.reporting_failure(group, "layout"),
            _giving_back(engine, parallel),
            engine.sharded.phases.phase("compile"),
        ):
            engine.prepare(as_arguments(example))
    parallel.keep()
    return zero


@contextmanager
def _giving_back(engine: Engine, parallel: LocalParameters) -> Generator[None]:
    """Give the model back to the user if the block fails before there are shards: the parameters are what they were."""
    try:
        yield
    except BaseException:
        if engine.sharded.shards is None:
            ownership.give_back(engine.sharded.model)
            parallel.give_back()
            for cast in engine.sharded.casts:
                cast.remove()
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
    """A model whose parameters are this rank's shards, and whose forward and backward follow a schedule.

    Names and Parameter objects are those of the model; other attributes and methods are looked up in the model.
    """

    def __init__(
        self, model: nn.Module, engine: Engine, options: Options, *, elementwise_optimizer: bool = False
    ) -> None:
        self.__dict__["_fxzero_model"] = model
        self.__dict__["_fxzero_engine"] = engine
        self.__dict__["_fxzero_options"] = options
        self.__dict__["_fxzero_resumed"] = None
        mode = model.training
        super().__init__()
        model.training = mode  # nn.Module's constructor has set it
        torch_internals.share_tables(self, model)
        sharded = weakref.ref(engine.sharded)  # which holds the guard
        self._fxzero_guard = OptimizerGuard(
            self,
            engine.sharded.held_shards,
            elementwise_optimizer=elementwise_optimizer,
            ignored=lambda: () if (found := sharded()) is None else found.ignored_ids,
            pieces=lambda: None if (found := sharded()) is None else found.pieces,
            compare=engine.compare_optimizer_state,
            agree_on_found=engine.agree_on_found,
            on_begin=engine.before_optimizer,
            on_step=engine.after_optimizer,
            fix_layout=partial(weights.before_checkpoint, engine.sharded),
            is_together=engine.sharded.phases.is_together,
            before_own_step=engine.sharded.phases.before_step,
            after_own_step=engine.sharded.phases.after_step,
            phase=engine.sharded.phases.phase_of_step,
        )
        engine.sharded.end_step = self._fxzero_guard.wholes.restore
        for optimizer in engine.sharded.optimizers:
            hook_state_dicts(optimizer)
        self.__dict__["_fxzero_methods"] = Methods(self, model, engine)
        ownership.take_over(model)
        refuse_wrappers(self)
        parts.watch_parts(engine.sharded, self)
        parts.watch_initialisers(engine.sharded)
        norms.watch_norms(engine.sharded)
        watch_gradients(engine)
        engine.sharded.casts = engine.sharded.precision.install(model)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model; the first call of each kind (shapes, train or eval, ...) traces and plans it.

        Returns:
            The outputs of the model, in the same structure.

        Raises:
            CaptureError: the model cannot be traced.
            InputMismatchError: an argument or a buffer does not fit.
            PlanError: a plan needs more than memory_budget, or other collectives than the calls before.
            RankMismatchError: ranks have compiled different models, options or orders of collectives.
        """
        if self._fxzero_engine.sharded.phases.block:
            return self._fxzero_model(*args, **kwargs)
        ownership.check_forward(self._fxzero_model)
        return self._fxzero_engine((args, kwargs))

    # -- what belongs to the model -------------------------------------------------------------------------------

    @property
    def __class__(self) -> type[Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The class of the model, so that `isinstance(zero, type(model))` holds; `type(zero)` is a ZeroModule."""
        return type(self._fxzero_model)

    @property
    def training(self) -> bool:
        """`training` of the model itself."""
        return self._fxzero_model.training

    @training.setter
    def training(self, mode: bool) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        self._fxzero_model.training = mode

    def __getattr__(self, name: str) -> Any:
        sharded = self.__dict__["_fxzero_engine"].sharded
        parts.check_scalar(name, sharded)
        try:
            return super().__getattr__(name)
        except AttributeError:
            return self.__dict__["_fxzero_methods"].attribute(name)

    def __dir__(self) -> list[str]:
        return sorted({*dir(type(self)), *super().__dir__(), *dir(self._fxzero_model)})

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

    def __delattr__(self, name: str) -> None:
        if name in self.__dict__ or name.startswith("_fxzero"):
            super().__delattr__(name)
            return
        delattr(self._fxzero_model, name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> ZeroModule:  # type: ignore[override]
        ownership.refuse_conversion(self, fn)
        return self

    @property
    def _is_accelerate_prepared(self) -> bool:
        """Tells `accelerator.prepare` to keep the module; it sets the attribute on all that it returns."""
        return is_kept_by_accelerate()

    @_is_accelerate_prepared.setter
    def _is_accelerate_prepared(self, value: bool) -> None:
        pass

    def __repr__(self) -> str:
        return f"ZeroModule({self._fxzero_model!r})"

    __reduce_ex__ = ownership.refuse_copy

    def __deepcopy__(self, memo: dict[int, Any]) -> ZeroModule:
        """A compiled module of its own, with the same options and this rank's slices of each parameter; a collective.

        Averages of both can be taken shard by shard. Gradients are not copied, as in nn.Parameter.
        """
        engine, options = self._fxzero_engine, self._fxzero_options
        copied_models.begin_copy(engine.sharded)
        model, shards = copied_models.copy_model(engine.sharded, memo)
        specs = None if shards is None else engine.sharded.specs
        own = options.make_engine(model, engine.sharded.group, (), specs, engine.sharded.parallel)
        zero = type(self)(model, own, options, elementwise_optimizer=self._fxzero_guard.elementwise_optimizer)
        copied_models.lay_out_alike(engine.sharded, own.sharded, shards)
        memo[id(self)] = zero
        torch_internals.copy_hooks(self, zero, memo)
        return zero

    # -- training ------------------------------------------------------------------------------------------------

    @contextmanager
    def no_sync(self) -> Generator[None]:
        """Keep gradients unsharded inside of the context, and reduce them in the first backward after it.

        Gradient accumulation then sends fewer bytes, and needs the memory of one full copy of the gradients. Outside of
        the context each backward reduces gradients and adds them to the shards.
        """
        engine = self._fxzero_engine
        before, engine.synchronize = engine.synchronize, False
        try:
            yield
        finally:
            engine.synchronize = before

    @contextmanager
    def step_together(self) -> Generator[None]:
        """A step that all ranks take, or none: put forward, backward and the optimizer's step inside.

            for batch in loader:
                try:
                    with zero.step_together():
                        zero(**batch).loss.backward()
                        optimizer.step()
                except (BadBatch, fxzero.StepLeftOutError) as error:
                    log.warning("left out: %s", error)
                optimizer.zero_grad()

        Where a rank raises inside, its error leaves the block there, and a StepLeftOutError, which has the rank, the
        error and the line, leaves it on all other ranks within seconds. Parameters, optimizers and their state are as
        before the step; gradients, also those of earlier micro-batches, are dropped on all ranks; buffers may have
        changed. All ranks can go on with their next batch. The optimizer's step waits until all ranks have come to it,
        which costs a message to each; an error behind it makes the others leave out their next batch. The messages use
        connections of their own, so that the process group stays usable. Needs gloo, or a single rank.

        Raises:
            StepLeftOutError: another rank has failed in this step.
            CommunicationError: a rank has ended, or failed inside of its optimizer's step.
            RankMismatchError: ranks do different things, or have taken different numbers of steps.
        """
        sharded = self._fxzero_engine.sharded
        if sharded.parallel:
            raise FxzeroError("Ranks of tensor parallelism cannot leave out a step together; step without this block.")
        with step_together(sharded.comm.phases, sharded.group, sharded.timeout):
            yield

    def reduce_gradients(self) -> None:
        """Reduce the gradients that `no_sync()` or `compile(accumulate=)` holds unsharded; a collective.

        `.grad` is then the mean over the ranks of the sum over all micro-batches, as after a backward that reduces.
        Where nothing is held, this does nothing.
        """
        self._fxzero_engine.sharded.reduce_held()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset all gradients, also those that are held unsharded, as an optimizer's `zero_grad()` does for its own."""
        super().zero_grad(set_to_none)
        if (gradients := self._fxzero_engine.sharded.gradients) is not None:
            gradients.drop_held()

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> torch.Tensor:
        """Clip the gradients of all ranks by their global norm, without a host synchronisation.

        `torch.nn.utils.clip_grad_norm_(zero.parameters(), ...)` does the same, if every rank calls it. With a gradient
        scaler call `scaler.unscale_(optimizer)` first.

        Args:
            max_norm: upper bound on the norm.
            norm_type: the order of the norm: 2.0, infinity or another positive number.
            error_if_nonfinite: raise if the norm is not finite, which synchronises with the host.

        Returns:
            The norm before clipping: a tensor `[]` on the device, equal on all ranks.

        Raises:
            ValueError: norm_type is not positive.
            RuntimeError: the norm is not finite and `error_if_nonfinite` is set.
        """
        engine = self._fxzero_engine
        sharded = engine.sharded
        sharded.bring_in()
        beside = [sharded.ignored_gradients()] if sharded.ignored else []
        with sharded.phases.phase(norms.phase_of_clip(max_norm, norm_type)):
            return engine.clip_grad_norm(
                sharded.gradients, sharded.comm, max_norm, norm_type, error_if_nonfinite, *beside
            )

    def grad_norms(self, norm_type: float = 2.0) -> dict[str, torch.Tensor]:
        """The norm of each parameter's whole gradient by name, with one all-reduce; a collective.

        Args:
            norm_type: the order of the norms: 2.0, infinity or another positive number.

        Returns:
            Tensors `[]` in fp32 or wider, equal on all ranks, of the parameters that have a gradient, but for those of
            `ignored_params`, whose gradients are whole.

        Raises:
            ValueError: norm_type is not positive.
            PlanError: there are no gradients yet, or `no_sync()` holds some.
        """
        sharded = self._fxzero_engine.sharded
        sharded.bring_in()
        with sharded.phases.phase(f"grad_norms of order {norm_type}"):
            return norms.grad_norms(sharded, norm_type)

    def num_parameters(self, only_trainable: bool = False) -> int:
        """Elements of all parameters, over all ranks, as of the model before it was sharded; tied ones count once.

        Args:
            only_trainable: leave out those that need no gradient.
        """
        sharded = self._fxzero_engine.sharded
        params = sharded.params | sharded.ignored
        shapes = self.parameter_shapes()
        return sum(each.numel() for fqn, each in shapes.items() if params[fqn].requires_grad or not only_trainable)

    def parameter_shapes(self) -> dict[str, torch.Size]:
        """The whole shape of each parameter by name, as of the model before it was sharded; tied ones once."""
        sharded = self._fxzero_engine.sharded
        shapes = {fqn: torch.Size(spec.whole_shape) for fqn, spec in sharded.specs.items()}
        shapes |= {fqn: param.shape for fqn, param in sharded.ignored.items()}
        return {fqn: shapes[fqn] for fqn, _ in self._fxzero_model.named_parameters()} if sharded.ignored else shapes

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the model by name, as in nn.Module; `get_state_dict` and its like find shards."""
        if (optimizers := torch_internals.optimizers_asked_for()) is not None:
            weights.before_checkpoint(self._fxzero_engine.sharded)
            for optimizer in optimizers:
                hook_state_dicts(optimizer)
        return super().named_parameters(prefix, recurse, remove_duplicate)

    # -- weights -------------------------------------------------------------------------------------------------

    def state_dict(  # type: ignore[override]
        self,
        destination: dict[str, Any] | None = None,
        prefix: str = "",
        keep_vars: bool = False,
        *,
        rank0_only: bool = False,
        trainable_only: bool = False,
    ) -> dict[str, Any]:
        """The full state dict with the model's own names; a collective, to be called on every rank.

        At its peak a rank holds the result and one bucket. Buffers are those of rank 0. Functions of
        torch.distributed.checkpoint, which call this too, get pieces instead: DTensors of this rank's slices.

        Args:
            destination: the mapping to fill, as in nn.Module; default: a new one.
            prefix: prepended to each name, as in nn.Module.
            keep_vars: has no effect, since the tensors are copies.
            rank0_only: give the state to rank 0 alone; other ranks get an empty dict.
            trainable_only: leave out buffers, and parameters that need no gradient: what is left of a model with
                adapters are the adapters.

        Returns:
            Copies of parameters and buffers at their full shapes by name; tied parameters share one tensor.
        """
        if trainable_only:
            state = weights.trainable_state_dict(self._fxzero_engine.sharded, rank0_only=rank0_only, prefix=prefix)
            return state if destination is None else {**destination, **state}
        return weights.state_dict(
            self._fxzero_engine.sharded, rank0_only=rank0_only, prefix=prefix, destination=destination
        )

    def load_state_dict(
        self,
        state_dict: Mapping[str, Any],
        strict: bool = True,
        assign: bool = False,
        *,
        trainable_only: bool = False,
    ) -> Any:
        """Load a state dict with the model's own names; a collective. Every rank passes it, and keeps its slices.

        Args:
            state_dict: tensors at their full shapes by name, or DTensors of such shapes.
            strict: raise if a name is missing or unexpected; False loads the names that fit.
            assign: must be False.
            trainable_only: the state has the parameters that need a gradient, and nothing else, as that of
                `state_dict(trainable_only=True)`; all others stay as they are.

        Returns:
            The missing and the unexpected names, as `nn.Module.load_state_dict` returns them.

        Raises:
            CheckpointError: names or shapes do not fit.
            RankMismatchError: ranks pass other names or shapes, or one of them does something else.
            ValueError: assign is set.
        """
        if assign:
            raise ValueError("assign=True would replace the shards. Load with assign=False.")
        sharded = self._fxzero_engine.sharded
        then = partial(run_hooks_after_load, sharded) if has_hooks_after_load(self._fxzero_model) else None
        return weights.load_state_dict(sharded, state_dict, strict=strict, trainable_only=trainable_only, then=then)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *, max_shard_size: int | str = "50GB", **options: Any
    ) -> Any:
        """Write a folder for Hugging Face's `from_pretrained`; a collective, to be called on every rank.

        Rank 0 writes bucket by bucket as they are gathered, so that no rank holds the model. The configuration of a
        model of transformers, and what else belongs to it, is written by its own method. Of a model with adapters of
        peft the files are those of the adapters. Of any other nn.Module there are the weights alone. A method of that
        name that is the model's own is called instead; so is any where a `state_dict` is passed, on this rank alone.

        Args:
            save_directory: the folder, made if it is not there.
            max_shard_size: the size that a file may have, in bytes or as "5GB".
            options: what else the model's own `save_pretrained` takes.

        Raises:
            OSError: a file cannot be written, on rank 0; a RankMismatchError names it on the others.
            ValueError: max_shard_size is no size, or `push_to_hub` is set.
        """
        model, max_bytes = self._fxzero_model, parse_size(max_shard_size)
        is_known = export.is_of_transformers(model) or export.has_adapters(model)
        if "state_dict" in options or (not is_known and hasattr(model, "save_pretrained")):
            return self._fxzero_methods.attribute("save_pretrained")(save_directory, **options)
        if options.get("push_to_hub"):
            raise ValueError("push_to_hub would upload before the weights are written. Upload the folder afterwards.")
        return export.save_pretrained(self._fxzero_engine.sharded, Path(save_directory), max_bytes, options)

    def iter_full_params(self, *, rank0_only: bool = False) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Gather the parameters bucket by bucket, each once under its canonical name; a collective.

        Every rank must iterate to the end.

        Args:
            rank0_only: give the tensors to rank 0 alone.

        Yields:
            `(name, tensor)`; the tensor has the full shape, and is None on other ranks if `rank0_only`. It is a view of
            memory that the next bucket overwrites: copy a tensor that you keep.
        """
        sharded = self._fxzero_engine.sharded
        with sharded.phases.phase("iter_full_params"):
            fix_layout_without_trace(sharded)
        is_given = sharded.is_rank0 or not rank0_only
        beside = ((fqn, param.detach() if is_given else None) for fqn, param in sharded.ignored.items())
        return itertools.chain(weights.full_params(sharded, rank0_only=rank0_only), beside)

    @contextmanager
    def summon_full_params(
        self, names: Iterable[str] | None = None, writeback: bool = True, rank0_only: bool = False
    ) -> Generator[None]:
        """Whole parameters in the place of shards inside of the context, to read and change them; a collective.

            with zero.summon_full_params(["head"]):
                zero.head.weight[3] = 0  # under torch.no_grad()

        Inside, each rank holds copies of the whole parameters. Under torch.no_grad() the model that was compiled, and
        its parts, can be called and saved as plain ones, in the dtypes of the parameters. Steps, collectives of the
        module and gradients of whole parameters are refused. At the end each rank cuts what is there then into its
        shards, where all ranks must have equal values. Where the block raises, changes are dropped.

        Args:
            names: of parameters, or paths of modules. Default: all parameters.
            writeback: keep changes; False drops them.
            rank0_only: only rank 0 gets whole parameters, and other ranks keep their shards; with `writeback` all ranks
                get what rank 0 has at the end.

        Raises:
            ValueError: there is no parameter or module of a name.
            FxzeroError: at the end, if a parameter has another shape or dtype, or a gradient; inside, where parameters
                must be shards.
            RankMismatchError: ranks name other parameters, do something else, or have left other values.
        """
        with summon(self._fxzero_engine, names, writeback=writeback, rank0_only=rank0_only):
            yield

    @property
    def resumed(self) -> Any:
        """The extra of the checkpoint that `compile(resume=)` has loaded; None if there was none."""
        return self._fxzero_resumed

    # -- the schedule --------------------------------------------------------------------------------------------

    @property
    def schedule(self) -> Schedule:
        """The schedule of the plan that ran last, or of the plan that was made for `example`."""
        engine = self._fxzero_engine
        last = engine.last
        if last is None:
            return Schedule()
        costs = engine.maker.tuning.costs_of(engine.sharded)
        timing = None if costs is None else partial(costs.timing, last.form.step)
        return Schedule(last.plan, partial(self._memory, last), timing, last.form, last.measure_lines)

    def _memory(self, executable: Executable) -> MemoryReport:
        engine, synchronize = self._fxzero_engine, executable.step.synchronize
        holds = held(engine.sharded, executable.step)
        if state := self._fxzero_guard.state_nbytes:
            holds = replace(holds, optimizer_state=state)
        measured = engine.memory_in_use.read() if executable.has_run else None
        return executable.plan.report(holds, engine.sharded.arena.nbytes, measured, synchronize=synchronize)


@functools.cache
def _class_for(kind: type[nn.Module]) -> type[ZeroModule]:
    """ZeroModule for models of a class: with the signature of their forward, and the special methods of a container."""

    call = ZeroModule.forward
    forward = types.FunctionType(call.__code__, call.__globals__, closure=call.__closure__)
    functools.update_wrapper(forward, kind.forward)  # a function of the same code: a warning names the caller's line
    names = [name for name in ("__len__", "__getitem__", "__iter__", "__contains__") if hasattr(kind, name)]
    return type("ZeroModule", (ZeroModule,), {"forward": forward, **{name: _of_model(name) for name in names}})


def _of_model(name: str) -> Callable[..., Any]:
    def call(self: ZeroModule, *args: Any) -> Any:
        return getattr(self._fxzero_model, name)(*args)

    return call


__all__ = ["Schedule", "ZeroModule", "compile"]
