"""Explain why a model could not be traced: the operator, the user's source line, and the change to make there."""

import inspect
import os
import re
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from fxzero import torch_internals
from fxzero.capture.provenance import is_user_file
from fxzero.errors import CaptureError, FxzeroError, InputMismatchError

_REPLACE_BRANCH = (
    "the step would depend on a tensor's values, which are not known when it is compiled. Replace .item(), "
    "bool(tensor), int(tensor) and tensor.tolist() by tensor operations (torch.where), or compute the value before the "
    "call and pass it in"
)
_REPLACE_SHAPE = (
    "the shape of its result depends on a tensor's values. Replace nonzero, unique and indexing with a boolean mask by "
    "operations of a fixed shape (torch.where, masked_fill, a weighted sum)"
)
_REENTRANT = "the reentrant torch.utils.checkpoint cannot be traced. Call checkpoint(..., use_reentrant=False)"
_DEVICES = "its tensors are on different devices. Create tensors in forward with device=x.device, and pass inputs there"
_RNN = "its fused kernel has no fake version. Use an nn.Module of plain operators in its place"
_OPAQUE = (
    "it is a function of torch.jit.script or torch.compile, which a trace cannot look into. Let it be a module of its "
    "own, which can run as it is"
)
_SPARSE = "sparse tensors cannot be traced. Use sparse=False"
LEAKED = (
    "a tensor made while the model was traced before is used again. Cache none in functools.cache or globals; make it "
    "a buffer"
)
_NO_FAKE = (
    "it has no fake implementation, which computes the shape of its result. Register one with "
    "torch.library.register_fake"
)
_LEAVES_TORCH = (
    "it takes a tensor's memory out of PyTorch (numpy, data_ptr, a C extension), where no tracer can follow. Stay with "
    "tensors, or wrap it in a torch.library.custom_op"
)
_WRITES = (
    "it writes in place into a tensor that is neither a buffer nor an attribute of a module, but in a list, dict or "
    "global. Make it a buffer, or put a new tensor there: stats['mean'] = stats['mean'] * 0.9"
)
_GENERAL = (
    "If the same call of the plain model fails too, fix it there; if not, the operator cannot be traced: replace it by "
    "others"
)

_MOMENTUM = (
    "BatchNorm(momentum=None) divides by the number of batches, which it reads from a tensor. Give it a momentum: "
    "momentum=0.1"
)

_CURES: tuple[tuple[str, str], ...] = (
    (r"mkldnn_rnn|_cudnn_rnn|_thnn_fused|rnn_layer", _RNN),
    (r"DynamicOutputShape", _REPLACE_SHAPE),
    (r"DataDependentOutput|_local_scalar_dense|value out of a tracing tensor|GuardOnDataDependent", _REPLACE_BRANCH),
    (r"use_reentrant=True|CheckpointFunction", _REENTRANT),
    (r"[Dd]evice ?[Mm]ismatch|different devices|same device|Device Propagation", _DEVICES),
    (r"Mixing fake modes|from different FakeTensorMode", LEAKED),
    (r"mutating a non-functional tensor with a functional tensor", _WRITES),
    (r"[Ss]parse", _SPARSE),
    (r"TorchScript interpreter|dynamo-optimized function", _OPAQUE),
    (r"no fake impl|UnsupportedOperator|Meta. backend|fake (class|kernel)", _NO_FAKE),
)
_FAKE_ONLY = re.compile(r"numpy\(\) is not supported for tensor subclasses|data_ptr|data pointer|\.numpy\(\)")
"""Pattern of messages that only a tensor without memory provokes."""

_CHECKS = os.path.join("torch", "__init__.py")
"""File of torch._check, which raises on behalf of its caller."""


def check_arguments(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse arguments that `forward` does not take.

    Raises:
        InputMismatchError: an argument is missing or surplus.
    """
    try:
        signature = inspect.signature(forward)
    except (TypeError, ValueError):  # no signature to check against
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        name = getattr(forward, "__qualname__", type(forward).__name__)
        raise InputMismatchError(f"{name}{signature}: {error}.") from None


def explain(error: Exception) -> CaptureError | None:
    """The CaptureError to raise for an exception of the trace; None for an exception that the model raised itself."""
    if isinstance(error, FxzeroError):
        return _with_place(error) if isinstance(error, CaptureError) else None
    text = f"{type(error).__name__}: {error}"
    cure = next((cure for pattern, cure in _CURES if re.search(pattern, text)), None)
    frames = traceback.extract_tb(error.__traceback__)
    last_user = max((i for i, frame in enumerate(frames) if is_user_file(frame.filename)), default=-1)
    if _FAKE_ONLY.search(text):
        cure = _LEAVES_TORCH
    if cure is _REPLACE_BRANCH and any("float(self.num_batches_tracked)" in (frame.line or "") for frame in frames):
        cure = _MOMENTUM
    below = [frame for frame in frames[last_user + 1 :] if not frame.filename.endswith(_CHECKS)]
    # With a known cure, it is enough that the tracer was at work; else the tracer itself must have raised the error.
    if cure not in (_LEAVES_TORCH, _OPAQUE) and not any(
        torch_internals.TRACER_FILES.search(frame.filename) for frame in (below if cure else below[-1:])
    ):
        return None
    place = f" at {_line_of(frames[last_user])}" if last_user >= 0 else ""
    what = f"{_operator(error, text) or 'The model'} cannot be traced{place}"
    summary = text.splitlines()[0][:300]
    if cure is None:
        return CaptureError(f"{what}: {summary}. {_GENERAL}.")
    return CaptureError(f"{what}: {cure}. ({summary})")


def _with_place(error: CaptureError) -> CaptureError:
    """The error with the user's source line, if it was raised in draws.py; else the error itself."""
    frames = traceback.extract_tb(error.__traceback__)
    users = [frame for frame in frames if is_user_file(frame.filename)]
    if not frames or not frames[-1].filename.endswith("draws.py") or not users:
        return error
    return CaptureError(f"{error} At {_line_of(users[-1])}.", error.path)


def _line_of(frame: traceback.FrameSummary) -> str:
    return f"{frame.filename}:{frame.lineno}" + (f": {frame.line}" if frame.line else "")


def _operator(error: Exception, text: str) -> str:
    """The name of the operator that failed, "" if it is unknown."""
    for candidate in (getattr(error, "func", None), *error.args[:1]):
        if torch_internals.is_overload(candidate):
            return str(candidate)
    found = re.search(r"aten(?:::|\.)\w+(?:\.\w+)?", text)
    return found.group().replace("::", ".") if found else ""
