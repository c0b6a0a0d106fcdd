"""A compiled model on this rank: parameters, buffers and optimizers, and the shards once the layout is fixed."""

import operator
import weakref
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fxzero import torch_internals
from fxzero.checkpoint.pieces import Pieces
from fxzero.comm import agree
from fxzero.comm.base import Comm
from fxzero.comm.groups import Group
from fxzero.comm.tensor_parallel import Parts
from fxzero.errors import FxzeroError, InputMismatchError
from fxzero.graph.devices import Devices
from fxzero.graph.layout import Layout, ParamSpec
from fxzero.graph.recipe import Recipe
from fxzero.graph.step import Pass
from fxzero.graph.tensor_parallel import TensorParallel
from fxzero.graph.variant import Variant
from fxzero.module.initialize import InitFn, check_meta_model
from fxzero.module.precision import OF_THE_MODEL, Precision
from fxzero.module.ranks.model_phases import ModelPhases
from fxzero.module.registered_tensors import ParamTables, join
from fxzero.module.replaced_data import Replaced, ReplacedData
from fxzero.optimizers.classes import state_per_element, steps_wholes
from fxzero.optimizers.state import ParamShard, param_shards
from fxzero.optimizers.whole.owners import owned_shards
from fxzero.planning.plan import reduced_as
from fxzero.runtime.executable import Executable, Storage
from fxzero.runtime.gradients import Gradients
from fxzero.runtime.held_gradients import reduce_held
from fxzero.runtime.in_flight import InFlight
from fxzero.runtime.shards import Shards, check_storage, spec_of
from fxzero.runtime.storage import Arena

_training_in = operator.itemgetter("training")


class MethodRun(Protocol):
    """A method of the model that runs outside of a step."""

    def on_part(self, path: str, *, needs_graph: bool) -> None:
        """The method is about to call a part of the model whose parameters are shards; returns if that is well."""
        ...

    def on_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What the method gets from a call of the model itself."""
        ...


@dataclass
class ShardedModel:
    """A compiled model with its options, and this rank's shards, which the user's Parameter objects become.

    state      from                           `shards`, `gradients`
    full       compile                        None; the parameters have their full shapes, or are on meta
    sharded    `hold`, of the fixed layout    there; `param.data` is the shard of each parameter
    """

    model: nn.Module
    forward: Callable[..., Any]
    """The model's own forward; `model.forward` refuses calls after compile."""
    group: Group | None
    comm: Comm
    devices: Devices
    recipe: Recipe
    """The sizes, order and dtypes chosen for the plans of the model so far."""
    passes: tuple[Pass, ...] | None = None
    """The user's own list of passes, which replaces those of the recipe."""
    agreed: Mapping[str, object] = field(default_factory=dict[str, object])
    """The options that must be the same on all ranks."""
    optimizers: tuple[torch.optim.Optimizer, ...] = ()
    sync_init: bool = True
    """All ranks take the parameters and buffers of rank 0 when the layout is fixed."""
    init_fn: InitFn | None = None
    precision: Precision = OF_THE_MODEL
    specs: dict[str, ParamSpec] = field(default_factory=dict[str, ParamSpec])
    """The parameters at full size; empty if the model holds them so, and not as shards."""
    timeout: timedelta = timedelta(minutes=5)
    parallel: Mapping[str, TensorParallel] = field(default_factory=dict[str, TensorParallel])
    """The parameters that were DTensors, by name; `specs` have the rest."""
    ignored_names: Collection[str] = ()
    """The canonical names of the parameters that stay as they are: see `ignored`."""

    def __post_init__(self) -> None:
        self.ignored = {fqn: each for fqn, each in self.model.named_parameters() if fqn in self.ignored_names}
        """Parameters that stay whole on each rank: inputs of a step, of whose gradients ranks know nothing."""
        self.ignored_ids = frozenset(map(id, self.ignored.values()))
        self.params = {fqn: each for fqn, each in self.model.named_parameters() if fqn not in self.ignored}
        self.param_list = list(self.params.values())
        self.ids = frozenset(map(id, self.param_list))
        """Ids of the Parameter objects."""
        if not self.specs:
            roles = self.precision.roles(self.model, self.comm.backend, self.comm.sharding)
            self.specs = {
                fqn: replace(spec_of(fqn, param, roles.get(fqn)), parallel=self.parallel.get(fqn))
                for fqn, param in self.params.items()
            }
        check_storage(self.params)
        self.casts: list[RemovableHandle] = []
        """The hooks that cast inputs and outputs of modules by the policy."""
        self.shards: Shards | None = None
        """None before the layout is fixed."""
        self.gradients: Gradients | None = None
        self.pieces: Pieces | None = None
        """Shows shards to torch.distributed.checkpoint; None before the layout is fixed."""
        self.arena = Arena(self.devices.compute)
        this = weakref.proxy(self)  # no cycle: shards are freed with the last name of the module
        self.phases = ModelPhases(
            self.comm.phases, type(self.model).__name__, self.params, lambda: this.meet(), lambda: this.undo_step()
        )
        for optimizer in self.optimizers:
            self.phases.watch(optimizer)
        self.in_flight = InFlight(
            self.comm,
            lambda: this.gradients is not None and this.gradients.are_added_to,
            lambda: (this.version(), 0 if this.gradients is None else this.gradients.version),
            lambda: this.refresh_copies(),
        )
        self.whole: frozenset[str] = frozenset()
        """The parameters whose data has their full shape for now, beside all those before the layout is fixed."""
        self.family = [self]
        """This model and its copies, which all get the layout that the first of them gets; emptied then."""
        self.is_copied = False
        """True while the model is copied as a whole."""
        self.is_stepping = False
        """True in the step of an optimizer, and behind one that ended in an error."""
        self.end_step: Callable[[], object] = lambda: None
        """Lets parameters be shards again that are whole in the step of an optimizer. It must not hold the model."""
        self.method_run: MethodRun | None = None
        """The method of the model that runs outside of a step."""
        self._replaced_data: ReplacedData | None = None
        """None before the layout is fixed."""
        self._had_replaced = False
        self.look_at_modules()
        check_meta_model(self.model, self.init_fn, set(self.model.state_dict()))

    @property
    def is_rank0(self) -> bool:
        """True on one rank alone, which has what only rank 0 is to have."""
        return self.comm.is_rank0 and not any(each.mesh.get_local_rank() for each in self.parallel.values())

    def send_to_parts(self, tensor: Tensor) -> None:
        """Let all ranks of tensor parallelism have what its first rank has, if there are such; not on meta."""
        parallel = next(iter(self.parallel.values()), None)
        if parallel is not None and not tensor.is_meta:
            Parts(parallel).broadcast_from_rank0(tensor)

    @property
    def cut_by(self) -> TensorParallel | None:
        """The ranks of tensor parallelism, if they have other parts of some parameters."""
        return next((each for each in self.parallel.values() if each.is_cut), None)

    # -- modules, parameters, buffers ----------------------------------------------------------------------------

    def look_at_modules(self) -> None:
        """Note the modules of the model, and the owner of each buffer.

        Raises:
            FxzeroError: a parameter was added, removed or replaced since compile.
        """
        now = dict(self.model.named_parameters())
        then = self.params | self.ignored
        changed = sorted(fqn for fqn in {*now, *then} if now.get(fqn) is not then.get(fqn))
        if changed:
            raise FxzeroError(
                f"{changed[0]} was added, removed or replaced after fxzero.compile, which fixes the parameters of a "
                "model. Change the model before compile."
            )
        self.modules = list(self.model.modules())
        self._param_tables = ParamTables(self.modules)
        is_plain = ["training" in vars(each) and not hasattr(type(each), "training") for each in self.modules]
        flagged = list(zip(self.modules, is_plain, strict=True))
        self._flags = [vars(module) for module, plain in flagged if plain]
        self._without_flag = [module for module, plain in flagged if not plain]
        self._buffer_owners = {
            join(path, name): (module, name)
            for path, module in self.model.named_modules()
            for name in torch_internals.buffers_of(module).keys()  # noqa: SIM118 (a scripted module's has no iterator)
        }

    def training(self) -> tuple[bool, ...]:
        """`training` of each module."""
        others = [module.training for module in self._without_flag]  # a scripted module's is not its own
        return *map(_training_in, self._flags), *others

    def check_params(self) -> None:
        """Refuse to go on with other parameters than those that were compiled.

        Raises:
            FxzeroError: a parameter was added, removed or replaced since compile.
        """
        if not self._param_tables.are_unchanged():
            self.look_at_modules()

    def buffers(self, executable: Executable) -> list[torch.Tensor]:
        """The buffers that the model registers now, in the order in which a forward takes them.

        Raises:
            InputMismatchError: a buffer was removed, or has another shape or dtype than when the forward was traced.
        """
        owners, names = self._buffer_owners, executable.buffers
        try:
            buffers = [torch_internals.buffers_of(module)[name] for fqn in names for module, name in [owners[fqn]]]
            geometry = [(buffer.shape, buffer.dtype) for buffer in buffers]  # type: ignore[union-attr]
        except (KeyError, AttributeError):
            geometry = None
        if geometry != executable.buffer_geometry:
            self._refuse_removed_buffers(names)
            raise InputMismatchError(
                f"A buffer among {', '.join(names)} has another shape or dtype than when this kind of call was traced. "
                "Keep them, and write into the buffer."
            )
        return buffers  # type: ignore[return-value]

    def _refuse_removed_buffers(self, names: Sequence[str]) -> None:
        for fqn in names:
            module, name = self._buffer_owners[fqn]
            table = torch_internals.buffers_of(module)
            if name not in table or table[name] is None:
                raise InputMismatchError(
                    f"The buffer {fqn} was removed, or set to None, after this kind of call was traced. Keep it, and "
                    "write into it; or let it be an attribute that is no buffer before fxzero.compile."
                )

    def plain_tensors(self) -> dict[str, Tensor]:
        """The buffers and the ignored parameters, which no rank has shards of, by canonical name."""
        return {**dict(self.model.named_buffers()), **self.ignored}

    def ignored_gradients(self) -> list[Tensor]:
        """This rank's gradients of the ignored parameters that have one."""
        return [param.grad for param in self.ignored.values() if param.grad is not None]

    def has_shards_in(self, module: nn.Module) -> bool:
        """True if the first parameter of a module that is not ignored is one of those that become shards."""
        first = torch_internals.first_parameter(module)
        if id(first) in self.ignored_ids:
            first = next((each for each in module.parameters() if id(each) not in self.ignored_ids), None)
        return id(first) in self.ids

    def fqn_of(self, param: Tensor) -> str:
        """The canonical name of a parameter."""
        return next(fqn for fqn, own in self.params.items() if own is param)

    def has_meta_params(self) -> bool:
        """True if some parameter has no values yet."""
        return any(param.is_meta for param in self.param_list)

    def version(self) -> int:
        """A number that changes when a parameter is changed in place."""
        return torch_internals.num_changes(self.param_list)

    def lie_alike(self, fqn: str, other: str) -> bool:
        """True if each rank has the same elements of two parameters of one shape, so that their slices fit."""
        specs = self.specs[fqn], self.specs[other]
        if self.shards is None or specs[0].shape != specs[1].shape:
            return specs[0].shape == specs[1].shape
        buckets = [self.shards.layout.bucket_of[each] for each in (fqn, other)]
        if buckets[0].shard_ranks != buckets[1].shard_ranks:
            return False
        of_ranks = [
            [bucket.slice_of(spec, rank) for bucket, spec in zip(buckets, specs, strict=True)]
            for rank in range(buckets[0].shard_ranks)
        ]
        return all((a.start, a.stop) == (b.start, b.stop) for a, b in of_ranks)

    @property
    def state_per_element(self) -> int:
        """Elements of optimizer state for each element of a trained parameter."""
        return state_per_element(self.optimizers)

    def exchange_recipes(self, own: Recipe, topic: str) -> list[Recipe]:
        """The recipe that each rank has chosen, in rank order; a collective."""
        posts = agree.exchange(self.group, topic, [own.to_json()], timeout=self.timeout)
        return [Recipe.from_json(line) for (line,) in posts]

    def meet(self) -> None:
        """Return once all ranks have come to this phase: what they have done until then is not undone any more."""
        self.comm.meet()
        self.in_flight.before_writes.clear()

    def undo_step(self) -> None:
        """Reset all gradients, also the unsharded ones of no_sync(); undo what forwards wrote since ranks met."""
        self.set_shards(self.in_flight.before_writes)
        self.in_flight.before_writes.clear()
        for param in (*self.param_list, *self.ignored.values()):
            param.grad = None
        if self.gradients is not None:
            self.gradients.drop_held()

    # -- the layout ----------------------------------------------------------------------------------------------

    @property
    def storage(self) -> Storage:
        """The memory that plans are bound to; needs a fixed layout."""
        assert self.shards is not None and self.gradients is not None
        return Storage(self.shards, self.params, self.gradients, self.comm, self.arena, self.in_flight)

    def held_shards(self) -> dict[int, ParamShard]:
        """Maps the id of each Parameter object to this rank's part of it; empty before the layout is fixed."""
        shards = self.shards
        return {} if shards is None else param_shards(self.params, shards.layout, shards.rank, shards.device)

    def held_by(self, optimizer: torch.optim.Optimizer, layout: Layout | None = None) -> dict[int, ParamShard]:
        """What this rank has of the state of each parameter, by the id of the Parameter object.

        Args:
            layout: default: the one that is fixed.
        """
        if layout is None:
            assert self.shards is not None
            layout = self.shards.layout
        held = param_shards(self.params, layout, self.comm.rank, self.devices.shards)
        return owned_shards(optimizer, held, layout, self.comm.rank) if steps_wholes(optimizer) else held

    def hold(self, shards: Shards) -> None:
        """Take in the shards that the parameters have become."""
        self.recipe = replace(self.recipe, buckets=tuple(bucket.fqns for bucket in shards.layout.buckets))
        self.shards = shards
        this = weakref.proxy(self)
        accumulates = self.recipe.accumulate > 1
        self.gradients = Gradients(shards, self.params, (lambda: this.reduce_held()) if accumulates else None)
        self._replaced_data = ReplacedData(self.params, shards)
        phases, comm = self.phases, self.comm

        @contextmanager
        def gathering() -> Generator[None]:
            with phases.phase("gathering of a piece"):
                comm.meet()
                yield

        exchange = partial(agree.exchange_made, self.group, "optimizer state", timeout=self.timeout)
        self.pieces = Pieces(shards.layout, comm, self.group, shards.device, gathering, exchange)
        self.in_flight.has_copies = bool(shards.copies.parts)

    def reduce_held(self) -> None:
        """Reduce the gradients that backwards have held unsharded, and publish them; a collective."""
        gradients, in_flight = self.gradients, self.in_flight
        if gradients is None or not gradients.num_held:
            return
        with self.phases.phase("reduction of gradients"):
            in_flight.before_backward()
            gradients.publish((), *self.reduce_held_unpublished())
            in_flight.after_backward()

    def reduce_held_unpublished(self) -> tuple[Variant, Sequence[str]]:
        """Reduce held gradients inside of a phase; what `Gradients.publish` must know."""
        assert self.gradients is not None and self.shards is not None
        self.in_flight.begin_backward()
        try:
            reduced = reduce_held(self.gradients, self.shards, self.comm, reduced_as(self.recipe, self.passes))
        except Exception as error:
            self.in_flight.failed(error)
            raise
        self.in_flight.end_backward()
        return reduced

    def bring_in(self) -> None:
        """Reduce what is held with `accumulate=`: somebody is about to use gradients."""
        if self.gradients is not None:
            self.gradients.bring_in()

    @property
    def how_held(self) -> str:
        """Says of a backward why it holds its gradients unsharded."""
        return "under no_sync()" if self.recipe.accumulate == 1 else "that holds gradients unsharded"

    def refresh_copies(self) -> None:
        """Bring the copies of the shards in the dtype that compute reads in line with these."""
        assert self.shards is not None
        self.shards.refresh_copies()

    def set_shards(self, values: Mapping[str, Tensor]) -> None:
        """Set this rank's slices of some parameters, also where other tensors are in the place of shards."""
        for fqn, value in values.items():
            assert self.shards is not None
            self.shards.param_view(fqn).copy_(value)
            self.params[fqn].data.copy_(value)

    def replaced(self) -> Replaced:
        """The shards in whose place the user put other tensors, which the coming phase must use.

        Where there are some, or were in the call before, nothing that was gathered before is used again.

        Raises:
            FxzeroError: a tensor has another shape, dtype or device than the shard.
        """
        if self._replaced_data is None:
            return []
        if self.is_stepping:
            self.end_step()
        found = self._replaced_data.find(self.whole)
        if found or self._had_replaced:
            self.in_flight.after_step()
            self._had_replaced = bool(found)
        return found
