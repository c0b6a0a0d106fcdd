"""Find out what an optimizer looks at: step small parameters in slices as ranks hold them, or each without others."""

import contextlib
import copy
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fxzero.capture.draws import drawing_from, rng_state, same_draws_of_python
from fxzero.graph.layout import shard_shape
from fxzero.torch_internals import DispatchMode, is_elementwise, tree_leaves

_STEPS = 8
"""RAdam changes its formula after the fifth."""
_SCALES = (1.0, 1e-3, 1e3, 30.0)
"""Of the gradients, in turns: an update that a norm limits differs for one of them."""
_SHAPES: Mapping[int, Sequence[tuple[int, ...]]] = {
    0: ((),),
    1: ((7,), (5000,)),
    2: ((6, 5), (80, 64)),
    3: ((3, 4, 5), (16, 17, 19)),
    4: ((2, 3, 2, 5), (8, 8, 9, 9)),
    5: ((2, 3, 2, 2, 3), (4, 5, 6, 6, 7)),
}
"""Shapes of probed parameters by number of dimensions. Each has one above 4,096 elements, where 8-bit state begins."""
_WRITES_AT = (torch.ops.aten.index_put_.default, torch.ops.aten.index_put.default)
"""Element-wise where they write one value at the elements of a mask."""
_NUM_OWNERS = 2
"""Copies that share the parameters between them."""
_SLICES = ((0.0, 0.3), (0.3, 0.3), (0.3, 1.0))
"""From where to where the slice of each rank goes; one of them is empty."""
_READS_OF_SIZES: Mapping[Any, str] = {
    Tensor.shape.__get__: "shape",  # type: ignore[attr-defined]
    Tensor.nbytes.__get__: "nbytes",  # type: ignore[attr-defined]
    Tensor.size: "size()",
    Tensor.numel: "numel()",
    Tensor.nelement: "nelement()",
    Tensor.__len__: "len()",
}


def why_not_elementwise(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer is not, or may not be, element-wise; None if it is.

    Copies of it step small parameters, once whole and once in slices, the slices of each rank in a copy of their own.
    All elements must be the same, bit for bit, and no operator may look at several at once. The optimizer, its
    parameters and the generators stay as they are.
    """
    device = _device_of(optimizer)
    watch = _Watch()
    try:
        with same_draws_of_python(), drawing_from(rng_state(device), device):
            whole = _Probe(optimizer, device, None)
            slices = [_Probe(optimizer, device, each) for each in _SLICES]
            for step in range(_STEPS):
                for probe in (whole, *slices):
                    probe.step(step, watch)
                if not whole.is_made_of(slices):
                    return "its step of slices of parameters gives other numbers than its step of whole ones"
    except Exception as error:
        return _could_not_be_tried(error)
    if watch.sizes:
        return f"it reads sizes of tensors ({', '.join(sorted(watch.sizes))}), so what it does may depend on them"
    if watch.operators:
        return f"it computes with several elements of a tensor at once ({', '.join(sorted(watch.operators))})"
    return None


def why_not_one_by_one(optimizer: torch.optim.Optimizer) -> str | None:
    """Why an optimizer does not, or may not, step each parameter without a look at others; None if it does.

    As `why_not_elementwise`, with copies that have gradients of all small parameters, or of some.
    """
    device = _device_of(optimizer)
    try:
        with same_draws_of_python(), drawing_from(rng_state(device), device):
            together = _Probe(optimizer, device, None)
            some = [_Probe(optimizer, device, None, stepped=(each, _NUM_OWNERS)) for each in range(_NUM_OWNERS)]
            for step in range(_STEPS):
                for probe in (together, *some):
                    probe.step(step, contextlib.nullcontext())
                if not together.is_spread_over(some):
                    return "its step of some parameters gives them other numbers than its step of all"
    except Exception as error:
        return _could_not_be_tried(error)
    return None


def _device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    device = next((p.device for group in optimizer.param_groups for p in group["params"]), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _could_not_be_tried(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    return f"it could not be tried on small parameters ({type(error).__name__}: {lines[0]})"


class _Probe:
    """A copy of an optimizer that steps small parameters.

    Args:
        part: the slice of each parameter that it steps, as fractions; None for the whole.
        stepped: `(i, n)`: only every n-th parameter from the i-th on has gradients.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        part: tuple[float, float] | None,
        stepped: tuple[int, int] = (0, 1),
    ) -> None:
        self._part, self._stepped = part, stepped
        self._optimizer = _copy_without_parameters(optimizer)
        self._params: list[tuple[nn.Parameter, tuple[int, ...]]] = []
        """Each parameter and its whole shape."""
        for group, original in zip(self._optimizer.param_groups, optimizer.param_groups, strict=True):
            kinds = dict.fromkeys((min(p.ndim, max(_SHAPES)), p.dtype) for p in original["params"])
            own = [
                (nn.Parameter(torch.empty(0, dtype=dtype, device=device)), shape)
                for ndim, dtype in kinds
                for shape in _SHAPES[ndim]
            ]
            group["params"] = [param for param, _ in own]
            self._params += own
        for index, (param, shape) in enumerate(self._params):
            param.data = self._part_of(_values(shape, param, index))

    def step(self, step: int, watch: AbstractContextManager[Any]) -> None:
        """Take a step with gradients that are the same, element by element, in every probe.

        Args:
            watch: what is to be around the optimizer's own code.
        """
        for index, (param, shape) in self._with_gradients():
            scale = _SCALES[step % len(_SCALES)]
            param.grad = self._part_of(_values(shape, param, (step + 1) * len(self._params) + index).mul_(scale))
        take = type(self._optimizer).step
        with warnings.catch_warnings(), watch:
            warnings.simplefilter("ignore")
            getattr(take, "__wrapped__", take)(self._optimizer)  # without the hooks of all optimizers

    def is_made_of(self, slices: Sequence["_Probe"]) -> bool:
        """True if the parameters have the elements that the slices have together, bit for bit."""
        for index, (param, _) in enumerate(self._params):
            elements = torch.cat([each._params[index][0].detach().reshape(-1) for each in slices])
            if not torch.equal(elements, param.detach().reshape(-1)):
                return False
        return True

    def is_spread_over(self, others: Sequence["_Probe"]) -> bool:
        """True if each parameter is what it is in the one of some probes that steps it, bit for bit."""
        return all(
            torch.equal(param, self._params[index][0])
            for other in others
            for index, (param, _) in other._with_gradients()
        )

    def _with_gradients(self) -> Iterable[tuple[int, tuple[nn.Parameter, tuple[int, ...]]]]:
        first, every = self._stepped
        return list(enumerate(self._params))[first::every]

    def _part_of(self, whole: Tensor) -> Tensor:
        if self._part is None:
            return whole
        start, stop = (math.ceil(fraction * whole.numel()) for fraction in self._part)
        own = whole.reshape(-1)[start:stop].clone()
        return own.view(shard_shape(whole.shape, own.numel()))


def _values(shape: Sequence[int], like: Tensor, seed: int) -> Tensor:
    """Values of either sign, that differ from parameter to parameter, on the CPU's generator."""
    generator = torch.Generator().manual_seed(seed)
    dtype = torch.float64 if like.is_complex() else torch.float32
    values = torch.randn(*shape, generator=generator, dtype=dtype)
    return values.to(device=like.device, dtype=like.dtype)


def _copy_without_parameters(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """A copy without state, in which parameters are replaced by empty ones, wherever it has them."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    memo: dict[int, Any] = {id(param): nn.Parameter(param.detach().new_empty(0)) for param in params}
    memo[id(optimizer.state)] = defaultdict(dict)
    copied = object.__new__(type(optimizer))  # copy.deepcopy would leave out attributes that a subclass adds
    vars(copied).update(copy.deepcopy(vars(optimizer), memo))
    _probes.add(copied)
    return copied


_probes: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def is_probe(optimizer: torch.optim.Optimizer) -> bool:
    """True if an optimizer is a copy that is being tried, whose steps count nowhere."""
    return optimizer in _probes


class _Watch(TorchFunctionMode):
    """Notes what tells, inside of the block, that large parameters may be stepped otherwise than small ones.

    That is a size that is read, and an operator that may look at several elements of a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: set[str] = set()
        self._operators = _Operators()

    @property
    def operators(self) -> set[str]:
        return self._operators.names

    def __enter__(self) -> "_Watch":
        self._operators.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exc: Any) -> None:
        super().__exit__(*exc)
        self._operators.__exit__(*exc)

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in _READS_OF_SIZES:
            self.sizes.add(_READS_OF_SIZES[func])
        return func(*args, **(kwargs or {}))


class _Operators(DispatchMode):
    """Notes operators on tensors of several elements that are not known to be element-wise."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        leaves = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor) and each.numel() != 1]
        is_masked = func in _WRITES_AT and all(each.dtype == torch.bool for each in leaves[1:])
        if leaves and not is_masked and not is_elementwise(func):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))
