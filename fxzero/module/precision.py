"""A precision policy: the dtypes that it gives to parameters, and where inputs and outputs of modules are cast.

    {"*": bf16, "*.norm": fp32}     layers.0.mlp, layers.0.norm      the last pattern that matches a module, or a module
                                    bf16          fp32               around it, gives its policy

Inputs and outputs are cast at the edges of the parts of a model that have one policy: of the model itself, and of each
module whose policy is not that of the module around it. Source: FSDP2's `MixedPrecisionPolicy`, by part of the model.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fxzero import torch_internals
from fxzero.comm.backend import Backend
from fxzero.errors import InputMismatchError
from fxzero.graph.layout import Dtypes
from fxzero.graph.recipe import Recipe
from fxzero.graph.sharding import Sharding

if TYPE_CHECKING:  # its import takes a second, and a user who has a policy has imported it
    from torch.distributed.fsdp import MixedPrecisionPolicy

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""In which a policy lets compute, gradients and sums be."""


@dataclass(frozen=True)
class Policy:
    """The fields of a MixedPrecisionPolicy."""

    param_dtype: torch.dtype | None = None
    reduce_dtype: torch.dtype | None = None
    output_dtype: torch.dtype | None = None
    cast_forward_inputs: bool = True


@dataclass(frozen=True)
class Precision:
    """The policies of the parts of a model."""

    policies: tuple[tuple[str, Policy], ...] = ()
    """Patterns of paths of modules, each with its policy; empty: everything has the dtypes of the model."""

    @classmethod
    def of(cls, mp_policy: MixedPrecisionPolicy | Mapping[str, MixedPrecisionPolicy] | None) -> Precision:
        """What a user has asked for.

        Raises:
            TypeError: it is neither a policy nor a mapping from patterns to policies.
            ValueError: a policy has a dtype that is none to compute or to sum in.
        """
        if mp_policy is None:
            return cls()
        policies = dict(mp_policy) if isinstance(mp_policy, Mapping) else {"*": mp_policy}
        return cls(tuple((pattern, _checked(pattern, policy)) for pattern, policy in policies.items()))

    def __str__(self) -> str:
        return ", ".join(f"{pattern}: {policy}" for pattern, policy in self.policies) or "of the model"

    def of_modules(self, model: nn.Module) -> dict[str, Policy]:
        """The policy of each module by its path, also where the module has several.

        Raises:
            ValueError: a pattern matches no module.
        """
        chosen: dict[str, int] = {}
        unused = {index: pattern for index, (pattern, _) in enumerate(self.policies)}
        for path, _ in model.named_modules(remove_duplicate=False):
            matching = [i for i, (pattern, _) in enumerate(self.policies) if fnmatch.fnmatchcase(path, pattern)]
            around = chosen[path.rpartition(".")[0]] if path else -1
            chosen[path] = max([around, *matching])
            for index in matching:
                unused.pop(index, None)
        if unused:
            pattern = next(iter(unused.values()))
            raise ValueError(f"mp_policy has a policy for {pattern!r}, which is the path of no module of this model.")
        return {path: self.policies[index][1] if index >= 0 else Policy() for path, index in chosen.items()}

    def roles(self, model: nn.Module, backend: Backend, sharding: Sharding) -> dict[str, Dtypes]:
        """The dtypes of each floating parameter by its canonical name; empty without a policy.

        Raises:
            InputMismatchError: modules of different policies share a parameter.
        """
        if not self.policies:
            return {}
        policies, names = self.of_modules(model), {id(param): fqn for fqn, param in model.named_parameters()}
        found: dict[str, tuple[Policy, str]] = {}
        roles: dict[str, Dtypes] = {}
        for path, module in model.named_modules(remove_duplicate=False):
            for name, param in module.named_parameters(recurse=False):
                fqn, policy = names[id(param)], policies[path]
                other, where = found.setdefault(fqn, (policy, path))
                if (other.param_dtype, other.reduce_dtype) != (policy.param_dtype, policy.reduce_dtype):
                    raise InputMismatchError(
                        f"{fqn} is a parameter of {where or 'the model'} and of {path or 'the model'} ({name}), which "
                        "have different policies in mp_policy. Give modules that share a parameter one policy."
                    )
                if param.dtype.is_floating_point:
                    roles[fqn] = _roles(policy, param.dtype, backend, sharding)
        return roles

    def install(self, model: nn.Module) -> list[RemovableHandle]:
        """Let the modules at the edges of the parts cast their inputs and outputs from now on."""
        if not self.policies:
            return []
        policies, handles = self.of_modules(model), list[RemovableHandle]()
        for path, module in model.named_modules():
            policy = policies[path]
            if path and policy == policies[path.rpartition(".")[0]]:
                continue
            if policy.cast_forward_inputs and policy.param_dtype is not None:
                hook = partial(_cast_inputs, policy.param_dtype)
                handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            if policy.output_dtype is not None:
                handles.append(module.register_forward_hook(partial(_cast_output, policy.output_dtype)))
        return handles


OF_THE_MODEL = Precision()
"""Everything has the dtypes of the model."""


def choose_precision(
    mp_policy: MixedPrecisionPolicy | Mapping[str, MixedPrecisionPolicy] | None, recipe: Recipe
) -> Precision:
    """The dtypes that were asked for.

    Raises:
        TypeError: it is no policy, and no mapping from patterns to policies.
        ValueError: a policy has a dtype that is none to compute or to sum in, or contradicts another option.
    """
    precision = Precision.of(mp_policy)
    if precision.policies and recipe.without:
        raise ValueError("without= measures optimizations with dtypes as they are; drop mp_policy.")
    if precision.policies and recipe.layout == "interleaved":
        raise ValueError("The interleaved layout has one dtype for all roles; pass layout='contiguous' with mp_policy.")
    return precision


def _checked(pattern: object, policy: object) -> Policy:
    from torch.distributed.fsdp import MixedPrecisionPolicy

    if not isinstance(policy, MixedPrecisionPolicy) or not isinstance(pattern, str):
        raise TypeError(
            f"mp_policy has {policy!r} for {pattern!r}; it must be a torch.distributed.fsdp.MixedPrecisionPolicy, or a "
            'mapping from patterns of paths of modules to such: {"*": policy, "*.norm": other}.'
        )
    for name in ("param_dtype", "reduce_dtype"):
        if (dtype := getattr(policy, name)) not in (None, *_DTYPES):
            raise ValueError(
                f"{name} of mp_policy is {dtype}; it must be one of {', '.join(map(str, _DTYPES))}, or None."
            )
    if policy.output_dtype is not None and not policy.output_dtype.is_floating_point:
        raise ValueError(f"output_dtype of mp_policy is {policy.output_dtype}, which is not floating.")
    return Policy(policy.param_dtype, policy.reduce_dtype, policy.output_dtype, policy.cast_forward_inputs)


def _roles(policy: Policy, own: torch.dtype, backend: Backend, sharding: Sharding) -> Dtypes:
    """The dtypes of a parameter's roles.

    Where ranks' gradients are added here (gloo), they travel as they were made, and are widened before the sum. Else
    backward writes them in the dtype of the sum, which a backend sums in. A rank that is alone has no sum, and writes
    them to its shard.
    """
    compute = policy.param_dtype or own
    total = policy.reduce_dtype or compute
    grad = total
    if sharding.is_alone and total.itemsize >= compute.itemsize:
        grad, total = own, total if total.itemsize >= own.itemsize else own
    elif backend.sums_locally(sharding) and total.itemsize > compute.itemsize:
        grad = compute
    return Dtypes(own, compute, grad, total)


def _cast_inputs(
    dtype: torch.dtype, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return torch_internals.cast_floating(dtype, args), torch_internals.cast_floating(dtype, kwargs)


def _cast_output(dtype: torch.dtype, module: nn.Module, args: Any, output: Any) -> Any:
    return torch_internals.cast_floating(dtype, output)
