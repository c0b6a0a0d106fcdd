"""A call of a method of the model on the compiled module, which runs in the way that its kind needs."""

from __future__ import annotations

import enum
import functools
import inspect
import types
import weakref
from collections.abc import Callable, Generator, Hashable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fxzero.errors import CaptureError, FxzeroError, InputMismatchError
from fxzero.module.call_kind import Method
from fxzero.module.engine import Engine
from fxzero.module.methods.gathered import gathered
from fxzero.module.methods.undo import Undo, UndoError
from fxzero.module.methods.watch import ShardWatch, TouchedError
from fxzero.module.ownership import forward_set_to, refuse_call
from fxzero.module.sharded_model import ShardedModel
from fxzero.torch_internals import forward_hooks_of, global_hooks, tree_leaves

_PLAIN = (type(None), bool, str, enum.Enum)
"""Types of arguments whose values tell kinds of calls apart."""


class Way(enum.Enum):
    """How the calls of one kind run."""

    PLAIN = "as they are"
    TRACED = "as steps"
    GATHERED = "as they are, on gathered parameters"


class Methods:
    """The methods of one compiled model, and what is known of their calls.

    Args:
        zero: the compiled module.
    """

    def __init__(self, zero: nn.Module, model: nn.Module, engine: Engine) -> None:
        self._zero = weakref.ref(zero)
        self._model, self._engine, self._sharded = model, engine, engine.sharded
        self._ways: dict[Hashable, Way] = {}

    def attribute(self, name: str) -> Any:
        """An attribute of the model, as the compiled module has it.

        A property is computed as the result of a method is. Functions that were set on the model are methods too.
        """
        found = inspect.getattr_static(type(self._model), name, None)
        if isinstance(found, property) and found.fget is not None:
            return self.call(name, found.fget.__get__(self._model), (), {})
        value = getattr(self._model, name)
        is_own = isinstance(value, types.FunctionType) and vars(self._model).get(name) is value
        is_method = inspect.ismethod(value) and value.__self__ is self._model
        return self.bound(name, value) if is_own or is_method else value

    def bound(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """What stands for a method of the model as an attribute of the compiled module."""
        if inspect.isgeneratorfunction(method):
            return self._generator(name, method)

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.call(name, method, args, kwargs)

        return run

    def call(self, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method in the way of its kind."""
        if not self._is_outside():  # in a step of the model itself
            return method(*args, **kwargs)
        kind = self._kind_of(name, args, kwargs)
        way = self._ways.get(kind)
        if way is None:
            return self._call_first(kind, name, method, args, kwargs)
        if way is Way.TRACED:
            return self._engine((args, kwargs), Method(name, method))
        run = _Run(self, name)
        try:
            return run.call(method, args, kwargs) if way is Way.PLAIN else run.call_gathered(method, args, kwargs)
        except TouchedError as touched:
            raise self._too_late(name, touched) from None

    def _call_first(
        self, kind: Hashable, name: str, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Find the way of a new kind of call: each way is tried until parameters are touched that it has not."""
        undo = Undo(self._sharded, (args, kwargs))
        run = _Run(self, name, undo)
        try:
            result = run.call(method, args, kwargs)
            self._ways[kind] = Way.PLAIN
            return result
        except TouchedError as error:
            touched = error
        self._undo(undo, run, name, touched)
        if not touched.needs_graph:
            try:
                result = run.call_gathered(method, args, kwargs)
                self._ways[kind] = Way.GATHERED
                return result
            except TouchedError as error:
                touched = error
            self._undo(undo, run, name, touched)
        try:
            result = self._engine((args, kwargs), Method(name, method))
        except (CaptureError, InputMismatchError) as error:
            raise type(error)(
                f"{name}() computes with {touched.what}, and so is traced as forward is. {error} Where its result "
                "needs no gradient, call it under torch.no_grad(): then it runs as it is."
            ) from error
        self._ways[kind] = Way.TRACED
        return result

    def _undo(self, undo: Undo, run: _Run, name: str, touched: TouchedError) -> None:
        try:
            undo.undo(run.written)
        except UndoError:
            raise FxzeroError(
                f"{name}() computes with {touched.what}, which is a shard outside of a step, after a backward "
                "or an optimizer's step; so it cannot be run again as a step. Split it in two methods."
            ) from None

    def call_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of the compiled module from inside of a method."""
        with forward_set_to(self._model, refuse_call):
            zero = self._zero()
            assert zero is not None
            return zero(*args, **kwargs)

    def call_forward(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`self.forward(x)` inside of a method, which runs no hooks."""
        if not any((*forward_hooks_of(self._model), *global_hooks())):
            return self._engine((args, kwargs))
        return self._engine((args, kwargs), Method("forward", self._sharded.forward))

    @property
    def sharded(self) -> ShardedModel:
        """The model's shards."""
        return self._sharded

    @property
    def ways(self) -> set[Way]:
        """The ways of all kinds of calls so far."""
        return set(self._ways.values())

    def _is_outside(self) -> bool:
        """False while stand-ins are in the place of parameters."""
        sharded = self._sharded
        return not sharded.ids or sharded.has_shards_in(self._model)

    def _kind_of(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Hashable:
        values = *args, *kwargs.values()
        leaves = tuple(value if isinstance(value, _PLAIN) else type(value) for value in values)
        trains = any(param.requires_grad for param in self._sharded.param_list)
        gets_grad = any(isinstance(leaf, Tensor) and leaf.requires_grad for leaf in values)
        return name, leaves, (*kwargs,), torch.is_grad_enabled(), self._model.training, trains, gets_grad

    def _too_late(self, name: str, touched: TouchedError) -> FxzeroError:
        return FxzeroError(
            f"{name}() computes with {touched.what} here, which is a shard outside of a step; calls like this one did "
            "not do so before, and this one has begun already. Let a method always compute with parameters, or never: "
            "split it in two, or give it an argument that says which."
        )

    def _generator(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """A method that yields: parameters are gathered for each item, without gradients."""

        @functools.wraps(method)
        def run(*args: Any, **kwargs: Any) -> Generator[Any]:
            items = method(*args, **kwargs)
            while True:
                try:
                    item = _Run(self, name).call_gathered(items.__next__, (), {})
                except StopIteration as stop:
                    return stop.value
                except TouchedError as touched:
                    raise FxzeroError(
                        f"{name}() yields, and computes with {touched.what}, which is a shard outside of a step. Call "
                        "it under torch.no_grad(), or let it return a list."
                    ) from None
                yield item

        return run


class _Run:
    """One run of a method outside of a step.

    Args:
        undo: None if the run cannot be taken back.
    """

    def __init__(self, methods: Methods, name: str, undo: Undo | None = None) -> None:
        self._methods, self._name, self._undo = methods, name, undo
        self._watch: ShardWatch | None = None
        self._sharded = methods.sharded

    def call(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the method as it is.

        Raises:
            TouchedError: it computes with a shard.
        """
        self._watch = watch = ShardWatch(self._sharded)
        with self._here(self._on_forward), watch:
            result = method(*args, **kwargs)
        touched = next((each for each in tree_leaves(result) if watch.is_computed(each)), None)
        if touched is not None:
            raise TouchedError("what it returns", needs_graph=False)
        return result

    def call_gathered(self, method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the method as it is, with all parameters gathered.

        Raises:
            TouchedError: gradients may come back to a parameter.
        """
        sharded, self._watch = self._sharded, None
        with gathered(sharded, list(sharded.params), f"{self._name}()"), self._here(sharded.forward):
            result = method(*args, **kwargs)
        given = set(map(id, tree_leaves((args, kwargs))))
        for each in tree_leaves(result):
            if isinstance(each, Tensor) and each.requires_grad and id(each) not in {*given, *sharded.ids}:
                raise TouchedError("what it returns", needs_graph=True)
        return result

    @contextmanager
    def _here(self, forward: Callable[..., Any]) -> Generator[None]:
        sharded, before = self._sharded, self._sharded.method_run
        sharded.method_run, sharded.is_stepping = self, False
        try:
            with ExitStack() as stack:
                stack.enter_context(forward_set_to(sharded.model, forward))
                if self._undo is not None:
                    stack.enter_context(self._undo.watching())
                yield
        finally:
            sharded.method_run = before

    def on_part(self, path: str, *, needs_graph: bool) -> None:
        """See `MethodRun`."""
        raise TouchedError(f"parameters of {path}", needs_graph=needs_graph)

    def on_model(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """See `MethodRun`."""
        if self._watch is None:
            raise TouchedError("the model", needs_graph=True)
        with self._left():
            return self._methods.call_model(args, kwargs)

    @property
    def written(self) -> Mapping[str, tuple[Tensor, Tensor]]:
        """The parameters whose shards it has changed: their data, and a copy of it as it was."""
        return {} if self._watch is None else self._watch.before

    def _on_forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            raise TouchedError("self.forward()", needs_graph=False)
        with self._left(), forward_set_to(self._sharded.model, refuse_call):
            return self._methods.call_forward(args, kwargs)

    @contextmanager
    def _left(self) -> Generator[None]:
        """Run as outside of the method inside of the block."""
        run, self._sharded.method_run = self._sharded.method_run, None
        watch = self._watch
        is_on_top = watch is not None and watch.is_on_top()
        try:
            with ExitStack() as stack:
                if self._undo is not None:
                    stack.enter_context(self._undo.paused())
                if watch is not None:
                    watch.is_off = True
                    if is_on_top:
                        watch.__exit__(None, None, None)
                yield
        finally:
            self._sharded.method_run = run
            if watch is not None:
                watch.is_off = False
                if is_on_top:
                    watch.__enter__()
