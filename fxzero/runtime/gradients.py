"""The life of `.grad` between backwards: overwrite or add, unsharded under no_sync(), settled before a norm."""

from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager

import torch
from torch import nn

from fxzero import torch_internals
from fxzero.errors import FxzeroError, PlanError
from fxzero.graph.layout import ALIGNMENT_BYTES, Bucket, align
from fxzero.graph.variant import Stash, Variant
from fxzero.runtime.shards import FlatBuffer, Shards, member_of

UNREACHED = -0.0
"""Negative zeros stand in each slot of a gradient bucket that a rank does not reach. Added to anything they change
nothing, so the sum over ranks is all negative zeros where no rank reached the parameter, and only there."""
_LOOKED_AT = 16
"""Elements of a slice that are compared with it."""


_HOOKED = (
    "{} has a hook (register_hook), which would get its whole gradient; that is nowhere whole. Use "
    "register_post_accumulate_grad_hook, which gets the parameter with the gradient of its shard."
)


class Gradients:
    """Decides what happens to `.grad`, once per backward, in a few reads of attributes.

    Args:
        reduce_held: reduces what backwards have held, for whoever uses gradients before the next backward that reduces;
            a collective. None: such uses are refused.
    """

    def __init__(
        self, shards: Shards, params: Mapping[str, nn.Parameter], reduce_held: Callable[[], object] | None = None
    ) -> None:
        self._reduce_held = reduce_held
        self.num_held = 0
        """Calls of the autograd engine that held gradients since gradients were reduced last; equal on all ranks."""
        self._last_held = -1
        """The number of the last of them."""
        self._held_in: set[str] = set()
        """The parameters in buckets in which they may have held some; the same on all ranks."""
        self._shards = shards
        self._params = params
        self._views: dict[str, torch.Tensor] = {}
        self._own_params: list[nn.Parameter] = []
        """The parameters that have a view, in the order of `_views`."""
        self._own_views: list[torch.Tensor] = []
        self._published: tuple[tuple[str, ...], list[nn.Parameter], list[torch.Tensor]] = (), [], []
        """The names whose gradients were published last, with the parameters and views that they stand for."""
        self._unsharded: FlatBuffer[Bucket] | None = None
        self._held: dict[str, tuple[torch.Tensor, int]] = {}
        """Parameters whose unsharded gradients wait for the next synchronised backward.

        Each with its `.grad` meanwhile, and how often that had been changed: code that resets it drops what is held.
        """
        self._local: dict[str, torch.Tensor] = {}
        """This rank's slice of each unsharded gradient of its own batches: `.grad` while nothing is reduced.

        A copy of it where these gradients are of another dtype than the parameter.
        """
        self._gaps: tuple[tuple[int, int], list[torch.Tensor]] | None = None
        """How many buckets and parameters have gradients, and all else in the gradient buffer."""
        self.are_there = False
        """True once a backward has reduced gradients."""
        self.parallel = next((spec.parallel for spec in shards.layout.params if spec.is_cut), None)
        """The ranks of tensor parallelism, if they have other parts of some parameters."""

    def view(self, fqn: str) -> torch.Tensor:
        """The one tensor object that is ever `.grad` of a parameter."""
        if fqn not in self._views:
            self._views[fqn] = self._shards.grad_view(fqn).data  # with a count of changes of its own
            self._own_params.append(self._params[fqn])
            self._own_views.append(self._views[fqn])
        return self._views[fqn]

    @property
    def version(self) -> int:
        """A number that changes when a `.grad` is changed in place by anything but a backward."""
        return torch_internals.num_changes(self._views.values())

    @property
    def are_all_frozen(self) -> bool:
        """True if no parameter is trained, so that there never are gradients."""
        return not any(param.requires_grad for param in self._params.values())

    @property
    def are_held(self) -> bool:
        """True while no_sync() holds gradients."""
        return bool(self._held)

    @property
    def are_added_to(self) -> bool:
        """True if the next backward adds to gradients that are there."""
        return bool(self._held) or self._has_grad()

    @property
    def each(self) -> list[torch.Tensor]:
        """This rank's slice of each gradient that there can be."""
        return [*self._own_views]

    def parts(self, *, is_cut: bool) -> Generator[torch.Tensor]:
        """This rank's slices of the gradient buffer, flat with their padding, of one kind of parameters.

        Args:
            is_cut: True for those that tensor parallelism cuts; False for all others.
        """
        for bucket, shard in self._shards.grads.parts.items():
            multiple = ALIGNMENT_BYTES // shard.itemsize
            slices = [bucket.slice_of(spec, self._shards.rank) for spec in bucket.params if spec.is_cut == is_cut]
            yield from (shard[part.offset :][: align(part.numel, multiple)] for part in slices if part.numel)

    def clear_padding(self) -> None:
        """Let all that is no gradient in the gradient buffer be zeros again; a factor that is NaN has made it NaN."""
        size = len(self._shards.grads.parts), len(self._views)
        if self._gaps is None or self._gaps[0] != size:
            self._gaps = size, [gap for gap in self._padding() if gap.numel()]
        torch_internals.zero_all(self._gaps[1])

    def _padding(self) -> Generator[torch.Tensor]:
        for bucket, shard in self._shards.grads.parts.items():
            has_view = [spec for spec in bucket.params if spec.fqn in self._views]  # others are never looked at
            end, slices = 0, [bucket.slice_of(spec, self._shards.rank) for spec in has_view]
            for part in sorted((part for part in slices if part.numel), key=lambda part: part.offset):
                yield shard[end : part.offset]
                end = part.offset + part.numel
            yield shard[end:]

    def _has_grad(self) -> bool:
        for param in self._own_params:  # noqa: SIM110 (a generator would be a call for each parameter)
            if param.grad is not None:
                return True
        return False

    def variant(self, *, synchronize: bool) -> Variant:
        """How the coming backward must be bound; settles gradients that it will add to."""
        self._drop_what_was_reset()
        if not synchronize:
            return Variant(False, Stash.MORE if self._held else Stash.FIRST)
        for fqn, (grad, _) in self._held.items():
            if grad is self._local.get(fqn):
                self._params[fqn].grad = None
        accumulate = self._has_grad()
        if accumulate:
            self.settle()
        return Variant(accumulate, Stash.FLUSH if self._held else Stash.NONE)

    def publish(
        self,
        reached: tuple[str, ...],
        variant: Variant,
        unreached: Sequence[str] = (),
        reduced: AbstractSet[str] | None = None,
    ) -> None:
        """Point `.grad` of every parameter that a backward reached at its slice, and run hooks that wait for it.

        Args:
            reached: the parameters that this rank's backward has reached.
            unreached: others that it has reduced, which other ranks may have reached.
            reduced: the parameters in the buckets that it has reduced; None for all that are held.

        Raises:
            FxzeroError: a parameter has a hook on its gradient, which is nowhere whole.
        """
        fqns = self.arrived(reached, variant, unreached, reduced)
        self.are_there = True
        if self.num_held:
            self._held_in -= self._held_in if reduced is None else reduced
            self.num_held = self.num_held if self._held_in else 0
        if fqns is not self._published[0]:  # most backwards of a plan publish the same ones
            self._published = fqns, [self._params[fqn] for fqn in fqns], [self._views[fqn] for fqn in fqns]
        _, params, views = self._published
        for param, view in zip(params, views, strict=True):
            param.grad = view
        for index, on_gradient, afterwards in torch_internals.gradient_hooks(params):
            if on_gradient:
                raise FxzeroError(_HOOKED.format(fqns[index]))
            for hook in afterwards.values():
                hook(params[index])

    def arrived(
        self,
        reached: tuple[str, ...],
        variant: Variant,
        unreached: Sequence[str] = (),
        reduced: AbstractSet[str] | None = None,
    ) -> tuple[str, ...]:
        """The parameters whose gradients a backward has written: see `publish`."""
        fqns = reached
        if variant.stash is Stash.FLUSH:
            left = {} if reduced is None else {fqn: held for fqn, held in self._held.items() if fqn not in reduced}
            fqns = (*reached, *(fqn for fqn in self._held if fqn not in reached and fqn not in left))
            self._held = left
        if unreached:
            elsewhere = self._reached_elsewhere([fqn for fqn in unreached if fqn not in fqns])
            fqns = (*fqns, *elsewhere) if elsewhere else fqns
        return fqns

    def check_hooks(self, fqns: Sequence[str]) -> None:
        """Refuse parameters that have a hook on their gradient, which is nowhere whole.

        Raises:
            FxzeroError: one has.
        """
        for index, on_gradient, _ in torch_internals.gradient_hooks([self._params[fqn] for fqn in fqns]):
            if on_gradient:
                raise FxzeroError(_HOOKED.format(fqns[index]))

    @contextmanager
    def set_aside(self) -> Generator[None]:
        """Let there be no gradients inside of the block, and those of now again behind it."""
        grads = [(param, param.grad) for param in self._own_params]
        values = [segment.clone() for segment in self._shards.grads.segments] if self._has_grad() else []
        for param, _ in grads:
            param.grad = None
        try:
            yield
        finally:
            for segment, value in zip(self._shards.grads.segments, values, strict=False):
                segment.copy_(value)
            for param, grad in grads:
                param.grad = grad

    def _reached_elsewhere(self, fqns: Sequence[str]) -> list[str]:
        """Those trained parameters without a `.grad` for which another rank had a gradient."""
        params, views = self._params, self._views
        asked = [fqn for fqn in fqns if params[fqn].requires_grad and params[fqn].grad is None and views[fqn].numel()]
        if not asked:
            return []
        looked_at = [views[fqn].flatten()[:_LOOKED_AT] for fqn in asked]
        values = torch.cat(looked_at)
        is_blank = _are_blank(values).split([len(each) for each in looked_at])
        all_blank = torch.stack([each.all() for each in is_blank]).tolist()  # a GPU is waited for once
        return [fqn for fqn, blank in zip(asked, all_blank, strict=True) if not blank]

    def settle(self) -> list[torch.Tensor]:
        """Bring the gradient buffer in line with the `.grad` attributes, which the user may have changed.

        A gradient set to None becomes zeros (`UNREACHED`) in the buffer; a tensor of the user's is copied in.

        Returns:
            The gradient buffer: one flat tensor per dtype.
        """
        missing: list[torch.Tensor] = []
        for param, view in zip(self._own_params, self._own_views, strict=True):
            grad = param.grad
            if grad is None:
                missing.append(view)
            elif grad is not view:
                view.copy_(grad)
                param.grad = view
        for view in missing:
            view.fill_(UNREACHED)
        return self._shards.grads.segments

    # -- no_sync() -----------------------------------------------------------------------------------------------

    @property
    def held_buckets(self) -> list[Bucket]:
        """The buckets in which gradients may be held; the same on all ranks."""
        return [bucket for bucket in self._shards.layout.buckets if not self._held_in.isdisjoint(bucket.fqns)]

    def clear_unsharded(self, bucket: Bucket) -> None:
        """Let there be no unsharded gradients in a bucket."""
        self.unsharded_bucket(bucket).fill_(UNREACHED)

    def unsharded_bucket(self, bucket: Bucket) -> torch.Tensor:
        """The unsharded gradients of a bucket under no_sync(): flat, `[bucket.numel]`; made at the first use."""
        if self._unsharded is None:
            trained = [bucket for bucket in self._shards.layout.buckets if bucket.requires_grad]
            self._unsharded = FlatBuffer(_whole_sizes(trained), self._shards.device)
            for part in self._unsharded.parts.values():
                part.fill_(UNREACHED)
        if bucket not in self._unsharded.parts:  # frozen when the layout was fixed
            self._unsharded.extend(FlatBuffer(_whole_sizes([bucket]), self._shards.device))
            self._unsharded.parts[bucket].fill_(UNREACHED)
        return self._unsharded.parts[bucket]

    @property
    def unsharded_nbytes(self) -> int:
        """Bytes held for no_sync(); 0 before its first use."""
        return self._unsharded.nbytes if self._unsharded is not None else 0

    def hold(
        self,
        reached: Sequence[str],
        variant: Variant,
        uncertain: Sequence[str] = (),
        reduced: Iterable[str] = (),
    ) -> None:
        """Note that a backward under no_sync() wrote these gradients; the first one clears all others.

        Args:
            reached: the parameters that it reached for sure.
            uncertain: others that it may have reached.
            reduced: the parameters in the buckets that it would reduce outside.

        `.grad` of a parameter that had none becomes this rank's slice of what is held, as DDP has it whole.
        """
        if (last := torch_internals.backward_id()) != self._last_held or last < 0:
            self.num_held, self._last_held = self.num_held + 1, last
        self._held_in.update(reduced)
        fqns = [*reached, *(fqn for fqn in uncertain if fqn not in self._held and not _is_blank(self._slot(fqn)))]
        if variant.stash is Stash.FIRST and self._unsharded is not None:
            written = set(fqns)
            for bucket, part in self._unsharded.parts.items():
                for fqn in bucket.fqns:
                    if fqn not in written:
                        member_of(bucket, part, fqn).fill_(UNREACHED)
        for fqn in fqns:
            param = self._params[fqn]
            if param.grad is None or param.grad is self._local.get(fqn):
                param.grad = self._local_view(fqn)
            self._held[fqn] = param.grad, torch_internals.num_changes([param.grad])

    def _local_view(self, fqn: str) -> torch.Tensor:
        part, dtype = self._shards.cut(fqn, self._slot(fqn)), self._params[fqn].dtype
        if fqn not in self._local:
            same = part.dtype is dtype
            self._local[fqn] = part.data if same else part.to(dtype)  # with a count of changes of its own
        if part.dtype is not dtype:
            self._local[fqn].copy_(part)
        return self._local[fqn]

    def _drop_what_was_reset(self) -> None:
        """Forget held gradients whose `.grad` was set to None, replaced or zeroed since, by an optimizer say.

        Raises:
            PlanError: a `.grad` was changed otherwise, which cannot be done to the part of it that is held elsewhere.
        """
        if not self._held:
            return
        reset = [fqn for fqn, (grad, changes) in self._held.items() if self._is_reset(fqn, grad, changes)]
        for fqn in reset:
            param, grad = self._params[fqn], self._held.pop(fqn)[0]
            if param.grad is grad and grad is self._local.get(fqn):
                param.grad = self.view(fqn).zero_()
        for fqn in reset if self._held else ():
            self._slot(fqn).fill_(UNREACHED)

    def _is_reset(self, fqn: str, grad: torch.Tensor, changes: int) -> bool:
        if self._params[fqn].grad is not grad:
            return True
        if torch_internals.num_changes([grad]) == changes:
            return False
        if grad.any():
            raise PlanError(
                f"The gradient of {fqn} was changed while no_sync() holds a part of it, or accumulate=, which is not "
                "reduced yet. Change gradients after the backward that reduces, or after zero.reduce_gradients(); "
                "optimizer.zero_grad() drops what is held."
            )
        return True

    def _slot(self, fqn: str) -> torch.Tensor:
        bucket = self._shards.layout.bucket_of[fqn]
        return member_of(bucket, self.unsharded_bucket(bucket), fqn)

    def bring_in(self) -> None:
        """Reduce what is held, if that is not refused: somebody is about to use gradients. A collective then."""
        if self.num_held and self._reduce_held is not None:
            self._reduce_held()

    def check_reduced(self, params: Collection[int] | None = None) -> None:
        """Reduce gradients that are held, with `accumulate=`; refuse to use them while no_sync() holds some.

        Args:
            params: ids of the parameters whose gradients are used; default: all.

        Raises:
            PlanError: some are held.
        """
        if not self.num_held:
            return
        if params is None or any(id(param) in params for param in self._params.values()):
            self.bring_in()
        self._drop_what_was_reset()
        held = [fqn for fqn in self._held if params is None or id(self._params[fqn]) in params]
        if held:
            raise PlanError(
                f"no_sync() holds the gradient of {held[0]} (and {len(held) - 1} more), which ranks have not averaged "
                "yet. Run the last backward of an accumulation outside of no_sync() before you clip or step, or call "
                "zero.reduce_gradients(); optimizer.zero_grad() drops what is held."
            )

    def check_own(self, tensors: Iterable[torch.Tensor]) -> None:
        """Refuse tensors that are a rank's own part of gradients that are held.

        Raises:
            PlanError: one is.
        """
        own = {id(grad): fqn for fqn, grad in self._local.items() if fqn in self._held}
        for tensor in tensors if own else ():
            if id(tensor) in own:
                raise PlanError(
                    f"The gradient of {own[id(tensor)]} is held unsharded, by no_sync() or accumulate=: .grad is "
                    "a part of this rank's own gradient, which ranks have not averaged yet. Call "
                    "zero.reduce_gradients() before you read .grad."
                )

    def check_flush(self, reduced: AbstractSet[str]) -> None:
        """Keep gradients held that the coming backward does not reduce; refuse that where nothing else reduces them.

        Args:
            reduced: the parameters in the buckets that the coming backward reduces.

        Raises:
            PlanError: some that are held are not among them.
        """
        left = [fqn for fqn in self._held if fqn not in reduced]
        if not left:
            return
        is_refused = self._reduce_held is None
        for fqn in self._held if is_refused else left:
            self._params[fqn].grad = self._held[fqn][0]
        if is_refused:
            raise PlanError(
                f"no_sync() holds the gradient of {left[0]} (and {len(left) - 1} more), but this call, outside it, "
                "does not reduce the bucket. Let the last call of an accumulation, outside no_sync(), use every "
                "parameter that those inside used; zero.zero_grad() drops what is held."
            )

    def drop_held(self) -> None:
        """Forget what is held unsharded."""
        self._held, self.num_held = {}, 0
        self._held_in.clear()


def _are_blank(values: torch.Tensor) -> torch.Tensor:
    return (values == 0) & values.signbit()


def _is_blank(slot: torch.Tensor) -> bool:
    return bool(_are_blank(slot.flatten()[:_LOOKED_AT]).all())


def _whole_sizes(buckets: Iterable[Bucket]) -> dict[Bucket, tuple[int, torch.dtype]]:
    return {bucket: (bucket.numel, bucket.dtypes.sum) for bucket in buckets}
