"""A step of whole parameters: they are gathered at their owners before it, and cut into shards again behind it.

event      on the owner of a parameter                        on other ranks
begin      param.data, param.grad: the whole tensors; views   param.grad: None, so that the optimizer leaves it alone
           of the shard where that has the whole parameter
step       the optimizer changes param.data and its state     nothing
end        sends each rank its slice of param.data            takes its slice into its shard
both       param.data, param.grad: what they were before

Each pair of ranks exchanges one message before the step and one behind it, of the parameters that travel alone.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from fxzero.comm.base import Comm
from fxzero.errors import OptimizerError
from fxzero.graph.layout import ParamSpec
from fxzero.optimizers.whole.messages import Message
from fxzero.optimizers.whole.owners import Ranges


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter, what each rank has of it, and the rank that owns it."""

    param: Tensor
    spec: ParamSpec
    ranges: Ranges
    owner: int

    def numel_of(self, rank: int) -> int:
        """Elements that a rank has in its shard."""
        start, stop = self.ranges[rank]
        return stop - start

    @property
    def travels(self) -> bool:
        """True if another rank than the owner has some of it."""
        return self.numel_of(self.owner) < self.spec.numel


class WholeStep:
    """The steps that one optimizer takes with the parameters of one model.

    Args:
        matrices: what it steps, in one order on all ranks.
        phase: begins a phase of all ranks, inside of an optimizer's step.
    """

    def __init__(
        self, matrices: Sequence[Matrix], comm: Comm, phase: Callable[[str], AbstractContextManager[object]]
    ) -> None:
        self._matrices, self._comm, self._phase = matrices, comm, phase
        self._before: list[tuple[Tensor, Tensor, Tensor | None]] = []
        """Each parameter of a step that has begun, with its data and gradient before; empty outside of steps."""
        self._stepped: list[Matrix] = []
        """Those that the step may change, on any rank."""

    @property
    def has_begun(self) -> bool:
        """True between `begin` and `end`."""
        return bool(self._before)

    def begin(self) -> None:
        """Let the parameters be whole at their owners, and have no gradient elsewhere; a collective.

        Raises:
            OptimizerError: a frozen parameter has a gradient, or a parameter has one on some ranks only.
        """
        trained = [each for each in self._matrices if each.param.requires_grad or _stays(each)]
        self._check_frozen()
        with torch.no_grad():
            wholes = self._gathered(trained)
            self._replace(wholes)
        self._stepped = trained

    def begin_made_up(self) -> None:
        """Let zeros be the parameters and gradients of a step in which an optimizer only makes its state."""
        owned = [each for each in self._matrices if each.owner == self._comm.rank and each.param.grad is not None]
        self._replace(
            {
                id(each.param): (each.param.new_zeros(each.spec.shape), each.param.new_zeros(each.spec.shape))
                for each in owned
            }
        )
        self._stepped = []

    def end(self) -> None:
        """Bring what the step has made of the parameters into the shards; a collective."""
        rank = self._comm.rank
        results = {id(each.param): each.param.data.reshape(-1) for each in self._stepped if each.owner == rank}
        stepped = self._stepped
        self.restore()
        with torch.no_grad():
            for each in stepped:
                if id(each.param) in results:
                    _take_in(each.param, results[id(each.param)][slice(*each.ranges[rank])])
            self._scatter(stepped, results)

    def restore(self) -> None:
        """Let parameters and gradients be what they were before the step."""
        for param, data, grad in self._before:
            param.grad = None
            param.data = data
            param.grad = grad
        self._before, self._stepped = [], []

    def give_up(self) -> None:
        """End a step that ended in an error: parameters are what they were, and have no gradients.

        Whether these were reset in the meantime cannot be seen where there was none in the step.
        """
        self.restore()
        for each in self._matrices:
            each.param.grad = None

    def _check_frozen(self) -> None:
        for each in self._matrices:
            if not each.param.requires_grad and each.param.grad is not None and not _stays(each):
                raise OptimizerError(
                    f"{each.spec.fqn} is frozen and has a gradient, which the optimizer would use. Reset it when you "
                    "freeze the parameter: optimizer.zero_grad()."
                )

    def _replace(self, wholes: Mapping[int, tuple[Tensor, Tensor | None]]) -> None:
        self._before = [(each.param, each.param.data, each.param.grad) for each in self._matrices]
        for each in self._matrices:
            each.param.grad = None
            if id(each.param) in wholes:
                each.param.data, each.param.grad = wholes[id(each.param)]

    # -- messages ------------------------------------------------------------------------------------------------

    def _gathered(self, trained: Sequence[Matrix]) -> dict[int, tuple[Tensor, Tensor | None]]:
        """The whole data and gradient of each parameter that this rank owns, by id."""
        rank, num_ranks = self._comm.rank, self._comm.shard_ranks
        owned = [each for each in trained if each.owner == rank]
        wholes = {
            id(each.param): (
                each.param.data.reshape(each.spec.shape),
                None if each.param.grad is None else each.param.grad.reshape(each.spec.shape),
            )
            for each in owned
            if not each.travels
        }
        if not any(each.travels for each in trained):
            return wholes
        with self._phase("gathering of whole matrices"):
            sent = [self._parts(trained, holder=rank, owner=peer) for peer in range(num_ranks)]
            received = [self._parts(trained, holder=peer, owner=rank) for peer in range(num_ranks)]
            out = [self._message(each, rank, with_gradients=True) for each in sent]
            into = [self._message(each, peer, with_gradients=True) for peer, each in enumerate(received)]
            for parts, message in zip(sent, out, strict=True):
                message.fill([*_data(parts), *_gradients(parts), _flags(parts, message.bytes.device)])
            self._comm.all_to_all(
                f"the gathering of {_names(trained)}", [each.bytes for each in out], [each.bytes for each in into]
            )
            into[rank] = out[rank]
            return wholes | _assembled([each for each in owned if each.travels], received, into)

    def _scatter(self, stepped: Sequence[Matrix], results: Mapping[int, Tensor]) -> None:
        """Send the slices of other ranks to them, and take in those of this rank that others own."""
        if not any(each.travels for each in stepped):
            return
        rank, num_ranks = self._comm.rank, self._comm.shard_ranks
        with self._phase("return of whole matrices"):
            sent = [self._parts(stepped, holder=peer, owner=rank) for peer in range(num_ranks)]
            received = [self._parts(stepped, holder=rank, owner=peer) for peer in range(num_ranks)]
            out = [self._message(each, peer) for peer, each in enumerate(sent)]
            into = [self._message(each, rank) for each in received]
            for peer, (parts, message) in enumerate(zip(sent, out, strict=True)):
                message.fill([results[id(each.param)][slice(*each.ranges[peer])] for each in parts])
            self._comm.all_to_all(
                f"the return of {_names(stepped)}", [each.bytes for each in out], [each.bytes for each in into]
            )
            for peer in (peer for peer in range(num_ranks) if peer != rank):
                for each, part in zip(received[peer], into[peer].tensors, strict=True):
                    _take_in(each.param, part)

    def _parts(self, matrices: Sequence[Matrix], *, holder: int, owner: int) -> list[Matrix]:
        """The parameters of which a holder has a part that travels, and an owner steps the whole."""
        return [each for each in matrices if each.travels and each.owner == owner and each.numel_of(holder)]

    def _message(self, parts: Sequence[Matrix], holder: int, *, with_gradients: bool = False) -> Message:
        sizes = [(each.numel_of(holder), each.spec.dtype) for each in parts]
        flags = [(len(parts), torch.bool)] if with_gradients else []
        device = self._matrices[0].param.device
        return Message([*sizes, *sizes, *flags] if with_gradients else sizes, device)


def _stays(matrix: Matrix) -> bool:
    """True if nothing of a frozen parameter would travel for it to be stepped."""
    return not matrix.travels and matrix.param.grad is not None


def _take_in(param: Tensor, part: Tensor) -> None:
    """Let a parameter have the elements of its slice, if they are not in its memory already."""
    if part.data_ptr() != param.data_ptr():
        param.copy_(part.view(param.shape))


def _names(matrices: Sequence[Matrix]) -> str:
    """The parameters that travel, in error texts."""
    fqns = [each.spec.fqn for each in matrices if each.travels]
    return fqns[0] if len(fqns) == 1 else f"{fqns[0]} and {len(fqns) - 1} more matrices"


def _data(parts: Sequence[Matrix]) -> list[Tensor]:
    return [each.param.data.reshape(-1) for each in parts]


def _gradients(parts: Sequence[Matrix]) -> list[Tensor]:
    """The slices of gradients; zeros for those that are not there."""
    grads = [(each.param.grad, each.param.data) for each in parts]
    return [torch.zeros_like(data).reshape(-1) if grad is None else grad.reshape(-1) for grad, data in grads]


def _flags(parts: Sequence[Matrix], device: torch.device) -> Tensor:
    """True for each parameter that has a gradient."""
    return torch.tensor([each.param.grad is not None for each in parts], dtype=torch.bool, device=device)


def _assembled(
    owned: Sequence[Matrix], received: Sequence[Sequence[Matrix]], messages: Sequence[Message]
) -> dict[int, tuple[Tensor, Tensor | None]]:
    """The whole data and gradients of parameters, by id, from the messages of all ranks that have parts of them.

    Raises:
        OptimizerError: one has a gradient on some of these ranks only.
    """
    data = {id(each.param): each.param.new_empty(each.spec.numel) for each in owned}
    grads = {id(each.param): each.param.new_empty(each.spec.numel) for each in owned}
    there: dict[int, dict[int, bool]] = {id(each.param): {} for each in owned}
    for holder, (parts, message) in enumerate(zip(received, messages, strict=True)):
        values, gradients = message.tensors[: len(parts)], message.tensors[len(parts) : -1]
        for each, value, gradient, has_one in zip(parts, values, gradients, message.tensors[-1].tolist(), strict=True):
            part = slice(*each.ranges[holder])
            data[id(each.param)][part] = value
            grads[id(each.param)][part] = gradient
            there[id(each.param)][holder] = has_one
    for each in owned:
        _check_everywhere(each, there[id(each.param)])
    return {
        id(each.param): (
            data[id(each.param)].view(each.spec.shape),
            grads[id(each.param)].view(each.spec.shape) if any(there[id(each.param)].values()) else None,
        )
        for each in owned
    }


def _check_everywhere(matrix: Matrix, there: Mapping[int, bool]) -> None:
    if len({*there.values()}) > 1:
        having, lacking = ([rank for rank, has_one in there.items() if has_one is each] for each in (True, False))
        raise OptimizerError(
            f"{matrix.spec.fqn} has a gradient on ranks {having} and none on ranks {lacking}. Set gradients to None on "
            "all ranks, or on none."
        )
