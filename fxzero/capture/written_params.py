"""Parameters that forward writes: allowed where they need no gradient, as in momentum encoders and codebooks.

    with torch.no_grad():
        key.data = key.data * 0.99 + query.data * 0.01          key.mul_(0.99).add_(query, alpha=0.01)

The new value is one more output of the graph; after a forward that succeeded, each rank copies its slice of it into its
shard. So all ranks must compute the same value, and backward cannot read the old one, which is gone by then.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, fx

from fxzero import torch_internals
from fxzero.capture.fake_tensors import FakeState
from fxzero.errors import CaptureError
from fxzero.graph.layout import ParamSpec
from fxzero.graph.new_values import differing_between_ranks
from fxzero.graph.nodes import info, tensor_bytes
from fxzero.graph.step import StepGraph, is_read_in_backward


def refuse_trained(name: str) -> CaptureError:
    """The error for a write into a parameter that needs a gradient."""
    return CaptureError(
        f"The forward writes into parameter {name}, which is trained. Trained parameters are sharded, so that only the "
        "optimizer may change them. Change it between steps, on the shards (zero.parameters()); freeze it before the "
        "call (requires_grad=False) if forward is to update it; or make it a buffer."
    )


class SetData:
    """Lets `tensor.data = other` in forward be what it is in eager: code that reads `tensor` afterwards gets `other`.

    Args:
        state: the fake parameters and buffers of the trace; the names of those that were set become `rebound`.
        inputs: the fake tensors of the call.
    """

    def __init__(self, state: FakeState, inputs: Sequence[Tensor]) -> None:
        self._state, self._inputs = state, inputs
        self._names = {id(tensor): name for name, tensor in (state.params | state.buffers).items()}
        self._ignored = {id(tensor): name for name, tensor in state.ignored.items()}
        self._first: dict[str, Tensor] = {}
        """The data that each tensor had when it was set first."""
        self._after_forward: list[Any] = []
        """The storage of each parameter and each buffer at the end of forward."""

    def name_of(self, tensor: Any) -> str | None:
        """The name of a parameter or a buffer; None for any other tensor."""
        return self._names.get(id(tensor)) or self._ignored.get(id(tensor))

    def set(self, name: str, tensor: Tensor, data: Any) -> None:
        """Set the data of a parameter or a buffer.

        Raises:
            CaptureError: it is trained, the data does not fit, or is memory of what is there after the call.
        """
        if name in self._state.ignored:
            raise CaptureError(
                f"The forward sets {name}.data, and {name} is one of ignored_params, an input of the step. Write into "
                f"it under torch.no_grad(), {name}.copy_(...), or change it between steps."
            )
        if name in self._state.params and tensor.requires_grad:
            raise refuse_trained(name)
        self._check_geometry(name, tensor, data)
        if not torch_internals.same_storage(data, self._first.setdefault(name, tensor.detach())):
            self._check_memory(name, data)
        torch_internals.replace_data(tensor, data.detach())
        self._state.rebound[name] = tensor

    def forward_is_over(self) -> None:
        """Note what data there is; `check_backward` follows."""
        self._after_forward = self._storages()

    def check_backward(self) -> None:
        """Refuse a backward that has set the data of a parameter or a buffer.

        Raises:
            CaptureError: names it.
        """
        for name, then, now in zip(self._names.values(), self._after_forward, self._storages(), strict=True):
            if then is not now:
                raise CaptureError(
                    f"The backward sets {name}.data, in a checkpoint that runs forward again or in an "
                    "autograd.Function. Set it in forward, outside of checkpoints."
                )

    def _storages(self) -> list[Any]:
        return [tensor.untyped_storage() for tensor in (*self._state.params.values(), *self._state.buffers.values())]

    @staticmethod
    def _check_geometry(name: str, tensor: Tensor, data: Any) -> None:
        now, then = _geometry(tensor), _geometry(data) if isinstance(data, Tensor) else repr(data)
        if now != then:
            raise CaptureError(
                f"The forward sets {name}.data, which is {now}, to {then}. Give it a tensor of its own shape, dtype, "
                "device and strides."
            )

    def _check_memory(self, name: str, data: Tensor) -> None:
        state = self._state
        held = {**state.params, **state.buffers, **{f"the data that {n} had": t for n, t in self._first.items()}}
        others = [other for other, tensor in held.items() if _overlap(data, tensor)]
        if any(_overlap(data, tensor) for tensor in self._inputs):
            others.append("an input")
        if not torch_internals.is_fake(data):
            others.append("a tensor that was made before the call")
        if others:
            raise CaptureError(
                f"The forward sets {name}.data to the memory of {others[0]}: from then on one would change with the "
                f"other. Copy the values: {name}.data.copy_(...), or .clone() what you set."
            )


def _overlap(a: Tensor, b: Tensor) -> bool:
    """True for tensors that may share elements: slices of one vector do not."""
    (begin, end), (other_begin, other_end) = _span(a), _span(b)
    return torch_internals.same_storage(a, b) and begin < other_end and other_begin < end


def _span(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor in its storage, and the end of its last."""
    begin = int(tensor.storage_offset()) * tensor.dtype.itemsize
    return begin, begin + tensor_bytes(tensor)


def _geometry(tensor: Tensor) -> str:
    return f"{tensor.dtype}{list(tensor.shape)} on {tensor.device} with strides {list(tensor.stride())}"


def check_frozen(state: FakeState, params: Mapping[str, ParamSpec]) -> None:
    """Refuse a forward that wrote what requires grad into a parameter that does not.

    Raises:
        CaptureError: names the parameter.
    """
    for name, stand_in in state.params.items():
        if stand_in.requires_grad and not params[name].requires_grad:
            raise CaptureError(
                f"The forward writes into parameter {name} a value that requires grad, so that the next step would "
                "differentiate through this one. Write it under torch.no_grad()."
            )


def add_to_outputs(step: StepGraph, values: Mapping[fx.Node, fx.Node]) -> None:
    """Let the new values of parameters be the last of the model's outputs.

    Args:
        values: by the placeholder of the parameter.

    Raises:
        CaptureError: the parameter is trained, is read in another dtype than its own, or is written in backward.
    """
    for target, value in values.items():
        name = info(target).fqn
        if step.params[name].requires_grad:
            raise refuse_trained(name)
        if step.params[name].dtypes.has_copy:
            raise CaptureError(
                f"The forward writes into parameter {name}, of which it sees a copy in "
                f"{step.params[name].dtypes.compute}, by mp_policy: its shard would be rounded to that in each step. "
                'Leave its module out: mp_policy={"*": policy, "path.of.the.module": MixedPrecisionPolicy()}.'
            )
        if (boundary := step.end_forward) is not None and boundary < value:
            raise CaptureError(
                f"The backward writes into parameter {name}, in a checkpoint that runs forward again or in an "
                "autograd.Function. Write it in forward, outside of checkpoints."
            )
    step.written = tuple(info(target).fqn for target in values)
    step.set_output([*step.model_outputs, *values.values()], step.grads, step.input_grads)


def check_written(step: StepGraph) -> None:
    """Check the new values of parameters in a graph that has no idle nodes.

    Raises:
        CaptureError: a new value may differ between ranks, or backward reads the old one.
    """
    for name, value in step.new_values.items():
        if is_read_in_backward(step, step.param_nodes()[name]):
            raise CaptureError(
                f"The backward reads parameter {name} as it was before the forward wrote it, which is gone by then. "
                "Write it before its first use in forward, or use it under torch.no_grad()."
            )
        if not step.sharding.is_alone and (cause := differing_between_ranks(step, value)):
            raise CaptureError(
                f"The forward writes into parameter {name} a value that depends on {cause}, of which each rank "
                "has its own. Ranks hold slices of the parameter, so it would become a mixture. Let all have the same "
                "value first (torch.distributed._functional_collectives.all_reduce(value, 'avg', group)), or make "
                f"{name} a buffer."
            )


__all__ = ["SetData", "add_to_outputs", "check_frozen", "check_written", "refuse_trained"]
