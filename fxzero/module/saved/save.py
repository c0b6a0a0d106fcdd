"""Write a checkpoint: every rank its slices, rank 0 the manifest, and a rename once all of it is on the disk."""

import contextlib
import logging
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from fxzero.checkpoint.files import (
    MANIFEST,
    complete,
    give_up,
    new_folder,
    post,
    posts,
    remove_old,
    remove_posts,
    sync_folder,
    write_rank,
)
from fxzero.checkpoint.values import encode, name_of_dtype
from fxzero.comm import agree
from fxzero.comm.groups import Hierarchy
from fxzero.errors import CheckpointError
from fxzero.module.engine import Engine
from fxzero.module.first_fill import fix_layout_without_trace
from fxzero.module.saved.parts import (
    TOPIC,
    Optimizers,
    OptimizerState,
    buffers,
    extra_states,
    further_names,
    num_positions,
    position,
    random_states,
    refuse_parts,
    tensors_of,
)
from fxzero.module.sharded_model import ShardedModel
from fxzero.optimizers import made_up
from fxzero.optimizers.state import name_of

logger = logging.getLogger(__name__)

_LOOK_S = 0.05
"""How often a thread looks for what other ranks have posted."""


@dataclass(frozen=True)
class Prepared:
    """A checkpoint that is about to be written, as one rank has it."""

    root: Path
    folder: Path
    """Where it is written until it is complete."""
    position: int
    """The number of this rank among those that write."""
    num_positions: int
    parts: Iterable[tuple[str, int, Tensor]]
    own: dict[str, Any]
    """The plain values of this rank."""
    manifest: dict[str, Any]

    @property
    def is_first(self) -> bool:
        """True on the rank that completes it."""
        return self.position == 0

    def write(self) -> int:
        """Write what this rank has; the checksum of its index."""
        crc32 = write_rank(self.folder, self.position, self.parts, self.own)
        sync_folder(self.folder)
        return crc32

    def give_up(self, error: BaseException) -> None:
        """Remove what this rank has written, and let other ranks see it."""
        own = f"rank {self.position}, {type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            give_up(self.folder, self.position, error.posted if isinstance(error, _OtherRankError) else own)

    def complete(self, indices: Sequence[int], keep: int | None) -> Path:
        """Give it its name, once all ranks have written, and remove old ones."""
        folder = complete(self.folder, self.manifest | {"indices": list(indices)})
        if keep is not None:
            remove_old(self.root, keep)
        return folder


def save(engine: Engine, root: Path, optimizers: Optimizers, extra: Any, keep: int | None) -> Path:
    """Write a checkpoint into a new folder of `root`; a collective. See `fxzero.save`."""
    wait_for_pending(engine)
    sharded = engine.sharded
    group, timeout = sharded.group, sharded.timeout
    with sharded.phases.phase("save"):
        prepared = _prepare(engine, root, optimizers, extra)
        folder = prepared.folder
        try:
            with agree.reporting_failure(group, TOPIC):
                crc32 = prepared.write()
            written = agree.exchange(group, TOPIC, [str(crc32)], timeout=timeout)
            with agree.reporting_failure(group, TOPIC):
                if prepared.is_first:
                    folder = prepared.complete([int(line) for (line,) in written], keep)
            return Path(agree.exchange(group, TOPIC, [str(folder)], timeout=timeout)[0][0])
        except BaseException as error:
            prepared.give_up(error)
            raise


def async_save(engine: Engine, root: Path, optimizers: Optimizers, extra: Any, keep: int | None) -> Future[Path]:
    """Copy what a checkpoint has, and let a thread write it. See `fxzero.async_save`."""
    wait_for_pending(engine)
    with engine.sharded.phases.phase("save"):
        prepared = _prepare(engine, root, optimizers, extra)
        try:
            parts = [(name, start, flat.detach().to("cpu", copy=True)) for name, start, flat in prepared.parts]
        except BaseException as error:
            prepared.give_up(error)
            raise
    engine.pending_save = in_background(replace(prepared, parts=parts), keep, engine.sharded.timeout)
    return engine.pending_save


def wait_for_pending(engine: Engine) -> None:
    """Wait for the checkpoint that a thread still writes; what failed there is only logged here."""
    pending, engine.pending_save = engine.pending_save, None
    if pending is not None and (error := pending.exception()) is not None:
        logger.warning("the checkpoint before was not written: %s", error)


def _prepare(engine: Engine, root: Path, optimizers: Optimizers, extra: Any) -> Prepared:
    """All that is written, and a new folder, on which ranks agree."""
    sharded = engine.sharded
    refuse_parts(sharded)
    group, own_position = sharded.group, position(sharded.group)
    fix_layout_without_trace(sharded)
    with agree.reporting_failure(group, TOPIC):
        own = {"extra": encode(extra, "extra"), "random": encode(random_states(sharded.devices.compute), "random")}
        states = [OptimizerState(number, each, sharded.held_by(each)) for number, each in enumerate(optimizers)]
        _refuse_made_up(optimizers)
    for state in states:
        state.complete(partial(agree.exchange_made, group, TOPIC, timeout=sharded.timeout))
    with agree.reporting_failure(group, TOPIC):
        manifest = _manifest(engine, states) | {"optimizers": [state.described() for state in states]}
        folder = new_folder(root, num_positions(group)) if own_position == 0 else root
    try:
        folder = Path(agree.exchange(group, TOPIC, [str(folder)], timeout=sharded.timeout)[0][0])
    except BaseException:
        if own_position == 0:
            shutil.rmtree(folder, ignore_errors=True)
        raise
    parts = _parts(sharded, states)
    return Prepared(root, folder, own_position, num_positions(group), parts, own, manifest)


class _OtherRankError(CheckpointError):
    """Another rank could not write its part.

    Args:
        posted: what that rank has posted.
    """

    def __init__(self, folder: Path, posted: str) -> None:
        super().__init__(f"{folder} could not be written by {posted}")
        self.posted = posted


# -- in a thread ---------------------------------------------------------------------------------------------------


def in_background(prepared: Prepared, keep: int | None, timeout: timedelta) -> Future[Path]:
    """Write a checkpoint in a thread, which the end of the process waits for."""
    future: Future[Path] = Future()

    def run() -> None:
        try:
            future.set_result(_write_apart(prepared, keep, timeout.total_seconds()))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="fxzero save").start()
    return future


def _write_apart(prepared: Prepared, keep: int | None, timeout_s: float) -> Path:
    """Write a checkpoint while ranks do other things: they meet in the folder, and send no messages.

    Each rank posts the checksum of its index, or its error; rank 0 waits for all, and gives the folder its name. After
    an error of one all give up, and the last removes the folder.
    """
    try:
        post(prepared.folder, prepared.position, str(prepared.write()))
        return _await_others(prepared, keep, timeout_s)
    except BaseException as error:
        prepared.give_up(error)
        raise


def _await_others(prepared: Prepared, keep: int | None, timeout_s: float) -> Path:
    """The folder of the checkpoint, once all ranks have written it, and rank 0 has given it its name."""
    named = prepared.folder.with_name(prepared.folder.name.split(".")[1])
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        posted = posts(prepared.folder, prepared.num_positions)
        if (named / MANIFEST).exists() and not prepared.is_first:  # before posts, of which it has none any more
            return named
        failure = next((text for text in posted if text is not None and not text.isdecimal()), None)
        if failure is not None:
            raise _OtherRankError(prepared.folder, failure)
        if prepared.is_first and None not in posted:
            remove_posts(prepared.folder, prepared.num_positions)
            return prepared.complete([int(text) for text in posted if text is not None], keep)
        time.sleep(_LOOK_S)
    raise CheckpointError(f"{prepared.folder} did not become complete within {timeout_s:.0f} s.")


def _refuse_made_up(optimizers: Optimizers) -> None:
    for optimizer in optimizers:
        if made_up.is_unusable(optimizer):
            raise CheckpointError(
                f"{name_of(optimizer)} has not stepped yet, and torch.distributed.checkpoint made it have a state. "
                "Save after the first step."
            )


def _parts(sharded: ShardedModel, states: Sequence[OptimizerState]) -> Iterator[tuple[str, int, Tensor]]:
    """The slices of this rank, with their first element in the whole; on rank 0 also the buffers."""
    sharded.replaced()  # refuses data of other shapes
    group, shards = sharded.group, sharded.held_shards()
    if isinstance(group, Hierarchy) and not group.shards_across and group.across.rank():
        return  # node 0 has the same slices
    for fqn, param in sharded.params.items():
        yield f"model/{fqn}", shards[id(param)].part.start, param.detach().view(-1)
    if position(group) == 0:
        yield from ((f"buffer/{fqn}", 0, buffer.reshape(-1)) for fqn, buffer in buffers(sharded).items())
    for state in states:
        yield from ((name, shard.part.start, value.view(-1)) for name, (shard, value) in state.slices.items())


def _manifest(engine: Engine, states: Sequence[OptimizerState]) -> dict[str, Any]:
    sharded, cluster = engine.sharded, engine.maker.tuning.cluster
    assert sharded.shards is not None
    extra = extra_states(sharded.model)
    return {
        "tensors": {n: [name_of_dtype(dtype), list(shape)] for n, dtype, shape in tensors_of(sharded, states)},
        "further_names": further_names(sharded),
        "extra_states": {
            path: encode(module.get_extra_state(), f"extra state of {path}") for path, module in extra.items()
        },
        "buckets": [list(bucket.fqns) for bucket in sharded.shards.layout.buckets],
        "shard_ranks": sharded.comm.shard_ranks,
        "layout": sharded.recipe.layout,
        "cluster": None if cluster is None else cluster.numbers(),
    }
