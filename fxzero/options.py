"""The options of `compile()`: checked, and made into an engine."""

import math
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, TypeAlias, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from fxzero.capture.dtensors import is_dtensor
from fxzero.capture.islands.marks import Islands
from fxzero.comm.groups import Group, group_of_mesh
from fxzero.comm.make import make_comm
from fxzero.comm.without_ranks import PlanningComm
from fxzero.cost.model import Cluster
from fxzero.errors import InputMismatchError
from fxzero.graph.devices import Devices
from fxzero.graph.layout import LayoutName, ParamSpec
from fxzero.graph.recipe import Compute, Recipe, check_accumulate
from fxzero.graph.sharding import Placement, check_placement
from fxzero.graph.step import Pass
from fxzero.graph.tensor_parallel import TensorParallel
from fxzero.module.budget_round import BudgetRound
from fxzero.module.engine import Engine
from fxzero.module.plan_maker import PlanMaker
from fxzero.module.precision import OF_THE_MODEL, Precision
from fxzero.module.ranks.captures import Captures
from fxzero.module.sharded_model import ShardedModel
from fxzero.module.tuning_rounds import TuningRounds
from fxzero.planning.agreed_text import describe_passes
from fxzero.planning.plan import recipe_of
from fxzero.reference import ablation

Without: TypeAlias = ablation.Without
"""The type of `compile(without=)`."""


@dataclass(frozen=True)
class Options:
    """The options of one compiled model, after `choose_recipe`, `choose_device` and the checks."""

    recipe: Recipe
    passes: tuple[Pass, ...] | None
    """The user's own list of passes, which replaces those of the recipe."""
    device: torch.device
    memory_budget: int | Literal["auto"] | None
    cluster: Cluster | None
    """Speeds of devices and links; None: they are measured."""
    has_default_passes: bool
    """The user gave no list of passes, so that sizes and order can be chosen from costs."""
    keeps_free: bool
    """Buckets may stay gathered from forward to backward where that costs no memory at the peak."""
    across: Placement
    sync_init: bool
    init_fn: Callable[[nn.Module], object] | None
    timeout: timedelta
    short_gloo_slices: bool
    """Gloo's threads ask the scheduler for short slices."""
    islands: tuple[str, ...] | None
    """Patterns of modules that run as they are; None: those that cannot be traced."""
    precision: Precision = OF_THE_MODEL
    gradient_divide_factor: float | None = None
    """By which sums of gradients over ranks are divided; None: their number."""
    ignored: tuple[str, ...] = ()
    """The canonical names of the parameters that stay as they are."""
    cuda_graph: bool = False
    """Forward and backward are replayed as CUDA graphs where they can be."""

    @property
    def is_tuned(self) -> bool:
        """True if sizes and order are chosen from costs."""
        return self.has_default_passes and not ablation.scheduled(self.recipe.without)

    def agreed(self) -> dict[str, object]:
        """The options that must be the same on all ranks."""
        return {
            "passes": describe_passes(self.recipe, self.passes),
            "layout": self.recipe.layout,
            "without": ", ".join(self.recipe.without) or "nothing",
            "device": self.device.type,
            "across": self.across,
            "accumulate": self.recipe.accumulate,
            "gradient_divide_factor": self.gradient_divide_factor,
            "cuda_graph": self.cuda_graph,
            "sync_init": self.sync_init,
            "memory_budget": self.memory_budget,
            "cluster": self.cluster,
            "tuned": self.is_tuned,
            "islands": "auto" if self.islands is None else ", ".join(self.islands) or "none",
            "mp_policy": self.precision,
            "ignored_params": ", ".join(self.ignored) or "none",
            "torch": torch.__version__.split("+")[0],
        }

    def make_engine(
        self,
        model: nn.Module,
        group: Group | None,
        optimizers: tuple[torch.optim.Optimizer, ...],
        specs: Mapping[str, ParamSpec] | None = None,
        parallel: Mapping[str, TensorParallel] | None = None,
    ) -> Engine:
        """The engine of a model, with slower forms of its parts where optimizations are turned off.

        Args:
            specs: the parameters at full size, of a model that holds shards already.
            parallel: the parameters that tensor parallelism cuts, by name.
        """
        without = self.recipe.without
        comm = make_comm(
            group, self.device, short_gloo_slices=self.short_gloo_slices, divisor=self.gradient_divide_factor
        )
        comm = ablation.comm_without(without, comm)
        recipe = replace(self.recipe, unsharded=False) if comm.is_alone else self.recipe
        sharded = ShardedModel(
            model,
            model.forward,
            group,
            comm,
            Devices.all(self.device),
            recipe,
            passes=self.passes,
            agreed=self.agreed(),
            optimizers=optimizers,
            sync_init=self.sync_init and not isinstance(comm, PlanningComm),  # nobody is there to send rank 0's values
            init_fn=self.init_fn,
            timeout=self.timeout,
            precision=self.precision,
            specs=dict(specs or {}),
            parallel=parallel or {},
            ignored_names=self.ignored,
        )
        tuning = TuningRounds(self.is_tuned, self.keeps_free, self.cluster)
        islands = Islands(model, self.islands)
        maker = PlanMaker(sharded, tuning, BudgetRound(self.memory_budget), islands, ablation.binder_without(without))
        engine = Engine(sharded, maker, ablation.clip_without(without))
        if self.cuda_graph:
            engine.captures = Captures(sharded)
        return engine


def check_mesh(mesh: DeviceMesh | None, across: Placement, recipe: Recipe) -> None:
    """Raise ValueError if options contradict the mesh, or there is no such relation of nodes."""
    check_placement(across)
    has_nodes = mesh is not None and mesh.ndim > 1
    if across == "shard" and (mesh is None or mesh.ndim != 2):
        raise ValueError('across="shard" is about the nodes of a 2-D mesh of (across, inside); pass one as mesh=.')
    if has_nodes and "flat_collectives" in recipe.without:
        raise ValueError("On a 2-D mesh there are no collectives of lists of tensors; drop without='flat_collectives'.")
    if has_nodes and recipe.reduce_dtype is not None:
        raise ValueError("On a 2-D mesh gradients travel as they are; drop reduce_dtype.")


def check_divide_factor(factor: object) -> None:
    """Raise ValueError if gradients cannot be divided by it."""
    if factor is None:
        return
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool) and 0 < factor < math.inf
    if not is_number:
        raise ValueError(f"gradient_divide_factor is {factor!r}; it must be a positive number, or None for the ranks'.")


def choose_cuda_graph(cuda_graph: object, device: torch.device, recipe: Recipe) -> bool:
    """True if plans are to become CUDA graphs. On another device that is left out, with a warning.

    Raises:
        TypeError: it is no bool.
        ValueError: buffers are allocated at each use, where no graph can find them.
    """
    if not isinstance(cuda_graph, bool):
        raise TypeError(f"cuda_graph is {cuda_graph!r}; it must be True or False.")
    if cuda_graph and recipe.without:
        raise ValueError("without= measures optimizations one by one; drop cuda_graph.")
    if cuda_graph and device.type != "cuda":
        warnings.warn(
            f"cuda_graph=True has no effect: the model is on {device}, and CUDA graphs are for CUDA devices.",
            stacklevel=3,
        )
    return cuda_graph and device.type == "cuda"


def choose_ignored(model: nn.Module, ignored: Collection[nn.Parameter] | None, device: torch.device) -> tuple[str, ...]:
    """The canonical names of the parameters that are to stay as they are.

    Raises:
        TypeError: it has something else than parameters.
        ValueError: one is no parameter of the model, lies on another device than the model's, is a DTensor, or all are.
    """
    if ignored is None:
        return ()
    given = list[Any](ignored)
    if wrong := [each for each in given if not isinstance(each, nn.Parameter)]:
        raise TypeError(f"ignored_params has a {type(wrong[0]).__name__}; it must have parameters of the model.")
    names = {id(param): fqn for fqn, param in model.named_parameters()}
    for each in given:
        if id(each) not in names:
            raise ValueError(f"ignored_params has a parameter {tuple(each.shape)} that is not of this model.")
        if each.device != device or is_dtensor(each):
            where = "a DTensor" if is_dtensor(each) else f"on {each.device}, and the model is trained on {device}"
            raise ValueError(f"{names[id(each)]} of ignored_params is {where}. Give it values there before compile.")
    if given and any(param.is_meta for param in model.parameters()):
        raise ValueError("ignored_params of a model on the meta device: give all parameters values before compile.")
    chosen = set(map(id, given))
    if given and len(chosen) == len(names):
        raise ValueError("ignored_params has all parameters of the model, so that nothing is left to shard.")
    return tuple(fqn for key, fqn in names.items() if key in chosen)


def check_ignored(
    ignored: Sequence[str],
    recipe: Recipe,
    mesh: DeviceMesh | None,
    *,
    cuda_graph: bool,
    parallel: Mapping[str, TensorParallel],
) -> None:
    """Raise ValueError if another option does not know parameters that stay as they are."""
    others = {
        "without=": bool(recipe.without),
        "cuda_graph=True": cuda_graph,
        "loss_chunks=": recipe.loss_chunks != 1,
        "a mesh of two dimensions": mesh is not None and mesh.ndim > 1,
        "parameters that tensor parallelism has cut": bool(parallel),
    }
    if ignored and (found := [name for name, is_there in others.items() if is_there]):
        raise ValueError(f"ignored_params ({ignored[0]}) does not go with {found[0]}. Drop one of the two.")


def choose_islands(islands: Sequence[str] | str | None) -> tuple[str, ...] | None:
    """The patterns of the islands that were asked for; None for those that are found.

    Raises:
        ValueError: it is a single text, but not "auto".
    """
    if islands == "auto":
        return None
    if isinstance(islands, str):
        raise ValueError(f'islands is {islands!r}; it must be a list of paths of modules, or "auto".')
    return tuple(islands or ())


def choose_recipe(
    passes: Sequence[Pass] | None,
    layout: LayoutName,
    memory_budget: int | Literal["auto"] | None,
    reshard_after_forward: bool | None,
    stage: int | None,
    recompute: Literal["none", "full"] | int,
    compute: Compute,
    wire_dtypes: tuple[torch.dtype | None, torch.dtype | None],
    without: Without,
    accumulate: int = 1,
    loss_chunks: int = 1,
) -> tuple[Recipe, tuple[Pass, ...] | None]:
    """The recipe that the options ask for, and the user's list of passes unless `default_passes()` made it.

    Raises:
        ValueError: two options contradict each other, or an option has no such value.
    """
    check_accumulate(accumulate)
    left_out = ablation.names(without)
    if wire_dtypes[0] is torch.int8 and layout == "interleaved":
        raise ValueError("gather_dtype=torch.int8 quantises whole shards; pass layout='contiguous', or torch.bfloat16.")
    if wire_dtypes != (None, None) and left_out:
        raise ValueError("without= measures optimizations with types as they are; drop gather_dtype and reduce_dtype.")
    if stage not in (None, 2, 3):
        raise ValueError(f"stage is {stage!r}; fxzero shards everything: 3, or 2 to keep parameters until backward.")
    if stage is not None and reshard_after_forward not in (None, stage == 3):
        raise ValueError(f"stage={stage} means reshard_after_forward={stage == 3}; pass one of the two.")
    reshard = stage == 3 if stage is not None else reshard_after_forward
    if memory_budget is not None:
        is_bytes = isinstance(memory_budget, int) and not isinstance(memory_budget, bool) and memory_budget > 0
        if not is_bytes and memory_budget != "auto":
            raise ValueError(f'memory_budget is {memory_budget!r}; it must be a number of bytes, or "auto".')
        if "persistent_buffers" in left_out:
            raise ValueError("memory_budget plans persistent buffers; pass it without without='persistent_buffers'.")
        if reshard is not None:
            raise ValueError("memory_budget chooses what is kept; pass it without reshard_after_forward and stage.")
    if passes is not None:
        if reshard is not None or recompute != "none":
            raise ValueError("passes= is the whole list: drop stage, reshard_after_forward and recompute, or passes.")
        if compute != "eager":
            raise ValueError("passes= is the whole list: give default_passes() compute=, or drop passes.")
        if loss_chunks != 1:
            raise ValueError("passes= is the whole list: give default_passes() loss_chunks=, or drop passes.")
        if wire_dtypes != (None, None):
            raise ValueError(
                "passes= is the whole list: give default_passes() gather_dtype and reduce_dtype, or drop passes."
            )
        if scheduled := ablation.scheduled(left_out):
            raise ValueError(
                f"passes= is the whole list: take what schedules {', '.join(scheduled)} out of it instead."
            )
    start, own_list = recipe_of(passes, memory_budget)
    if passes is None:
        gather_dtype, reduce_dtype = wire_dtypes
        max_kept_bytes = None if reshard is False else 0
        start = Recipe(
            max_kept_bytes=max_kept_bytes,
            recompute=recompute,
            compute=compute,
            loss_chunks=loss_chunks,
            gather_dtype=gather_dtype,
            reduce_dtype=reduce_dtype,
        )
    if accumulate > 1:
        start = replace(start, accumulate=accumulate)
    return ablation.recipe_without(left_out, replace(start, layout=layout)), own_list


def choose_group(group: dist.ProcessGroup | None, mesh: DeviceMesh | None, across: Placement) -> Group | None:
    if mesh is not None:
        if group is not None:
            raise ValueError("Pass mesh or process_group, not both: the mesh says which ranks shard.")
        return group_of_mesh(mesh, across)
    if cast(Any, group) == dist.GroupMember.NON_GROUP_MEMBER:
        raise InputMismatchError("This rank is no member of the process group. Compile on its members only.")
    if group is None and dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if group is None:
        _refuse_alone_by_mistake()
    return group


def _refuse_alone_by_mistake() -> None:
    """Raise InputMismatchError if a launcher started several ranks that do not know each other."""
    started = os.environ.get("WORLD_SIZE", "").strip()
    if started in ("", "1"):
        return
    said = f"{started} ranks were started" if started.isdecimal() else "Ranks were started"
    raise InputMismatchError(
        f"{said} (WORLD_SIZE={started}, RANK={os.environ.get('RANK', 'not set')}), but torch.distributed is not "
        "initialised, so each of them would train alone. Call torch.distributed.init_process_group() before "
        "fxzero.compile; or, where each is to train alone, take WORLD_SIZE out of the environment."
    )


def choose_device(model: nn.Module, device: torch.device | str | None, mesh: DeviceMesh | None) -> torch.device:
    found = {tensor.device for tensor in [*model.parameters(), *model.buffers()] if not tensor.is_meta}
    if device is not None:
        chosen = torch.device(device)
        chosen = torch.device("cpu") if chosen.type == "cpu" else chosen  # "cpu:0" differs from where tensors are
    elif len({d.type for d in found}) > 1:
        raise InputMismatchError(f"The model lies on several devices: {sorted(map(str, found))}. Pass device=.")
    elif found:
        chosen = next(iter(found))
    else:
        chosen = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        if chosen.type != "cpu" and not str(chosen).endswith(tuple("0123456789")):
            chosen = torch.device(chosen.type, torch.accelerator.current_device_index())
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:  # tracing for a device that is not there ends the process
        raise InputMismatchError(f"The device {chosen} cannot be used: {str(error).splitlines()[0]}") from error
    if mesh is not None and mesh.device_type != chosen.type:
        raise InputMismatchError(
            f"The mesh is one of {mesh.device_type} devices; the model is trained on {chosen}. Make it with "
            f'init_device_mesh("{chosen.type}", ...), or pass device="{mesh.device_type}" for a model on meta.'
        )
    return chosen
