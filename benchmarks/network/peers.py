"""The peers as systems, each as its users get it, and tuned as far as its interface lets them."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, fx, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from benchmarks.network.systems import Job, Shape, Training, adamw, mixed_precision, plain, scaled


def ddp(model: nn.Module, job: Job) -> Training:
    """Replicates parameters, averages gradients in buckets behind backward."""
    replicated = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
    return plain(replicated, adamw(replicated.parameters()))


# -- FSDP2 ---------------------------------------------------------------------------------------------------------


def fsdp2(model: Any, job: Job, *, mixed: bool = False) -> Training:
    """fully_shard on each block and on the rest; gathers again in backward."""
    _shard(model, job, mixed)
    return plain(model, adamw(model.parameters()))


def fsdp2_async(model: Any, job: Job, *, mixed: bool = False) -> Training:
    """With one block prefetched, by gathers that do not block the host, which only a private method turns on."""
    _shard(model, job, mixed)
    _gather_asynchronously(model)
    return plain(model, adamw(model.parameters()))


def fsdp2_best(model: Any, job: Job, *, mixed: bool = False) -> Training:
    """And with a reduce-scatter of ours in the place of gloo's."""
    _shard(model, job, mixed)
    _gather_asynchronously(model)
    reduce_scatter = LateReduceScatter(job.world_size)
    for module in _sharded(model):
        module.set_custom_reduce_scatter(reduce_scatter)
        module.set_gradient_divide_factor(1.0)
    training = scaled(plain(model, adamw(model.parameters())), 1 / job.world_size)
    update = training.update

    def update_from_reduced() -> None:
        reduce_scatter.finish()
        update()

    training.update = update_from_reduced
    return training


def _shard(model: Any, job: Job, mixed: bool) -> None:
    mesh, policy = init_device_mesh("cpu", (job.world_size,)), mixed_precision(mixed=mixed)
    for module in (*model.blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


def _sharded(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _gather_asynchronously(model: Any) -> None:
    for module in _sharded(model):
        module._set_unshard_async_op(True)
    blocks = list(model.blocks)
    for module, following in zip([model, *blocks], blocks, strict=False):
        module.set_modules_to_forward_prefetch([following])
    for module, before in zip([model, *reversed(blocks)], reversed(blocks), strict=False):
        module.set_modules_to_backward_prefetch([before])


class LateReduceScatter:
    """An asynchronous reduce-scatter for FSDP2: all_to_all_single and a sum; gloo's own sends twice the bytes.

    FSDP2 does not read the result in backward if it has nothing to divide, so the sums are made when their parts have
    come, and the last ones by `finish()`, before the optimizer reads them.
    """

    def __init__(self, world_size: int) -> None:
        self._world_size = world_size
        self._pending: list[tuple[Any, Tensor, Tensor, Tensor]] = []

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for FSDP2's buffers."""
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: object, async_op: bool = False
    ) -> None:
        parts = torch.empty_like(input_tensor)
        work = dist.all_to_all_single(parts, input_tensor, group=group, async_op=True)
        self._pending.append((work, parts, output_tensor, input_tensor))
        while len(self._pending) > 1 and self._pending[0][0].is_completed():
            self._finish_first()

    def finish(self) -> None:
        """Wait for what is under way."""
        while self._pending:
            self._finish_first()

    def _finish_first(self) -> None:
        work, parts, output, _ = self._pending.pop(0)
        work.wait()
        torch.sum(parts.view(self._world_size, -1), 0, out=output)


# -- DeepSpeed -----------------------------------------------------------------------------------------------------


def deepspeed_options(tuning: Literal["default", "tuned", "deopt"], shape: Shape) -> dict[str, Any]:
    """Entries of zero_optimization; sizes are numbers of elements.

    default: all defaults, by which a model of this size is gathered once and kept until backward.
    tuned: buckets of one block, three of them gathered at most, small parameters kept: gathers again in backward.
    deopt: everything that hides or batches communication off.
    """
    square = shape.hidden**2
    if tuning == "tuned":
        return {
            "overlap_comm": True,
            "reduce_bucket_size": 12 * square,
            "stage3_prefetch_bucket_size": 12 * square,
            "stage3_max_live_parameters": 36 * square,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 10 * shape.hidden,
        }
    if tuning == "deopt":
        return {
            "overlap_comm": False,
            "reduce_bucket_size": square,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 0,
            "stage3_max_reuse_distance": 0,
            "stage3_param_persistence_threshold": 0,
        }
    return {}


def deepspeed_zero3(model: nn.Module, job: Job, *, tuning: Literal["default", "tuned", "deopt"]) -> Training:
    """DeepSpeed ZeRO-3, without the gradient clipping that it does by default and no other system does."""
    try:
        import deepspeed
    except ImportError as error:
        raise SystemExit("The ds systems need DeepSpeed: pip install deepspeed==0.19.8") from error

    deepspeed.init_distributed(dist_backend="gloo", verbose=False, auto_mpi_discovery=False)
    config = {
        "train_micro_batch_size_per_gpu": job.shape.batch,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {"stage": 3, **deepspeed_options(tuning, job.shape)},
    }
    engine, *_ = deepspeed.initialize(model=model, optimizer=adamw(model.parameters()), config=config)
    return Training(engine, engine.backward, engine.step)


# -- SimpleFSDP ----------------------------------------------------------------------------------------------------

LINK_GBIT_PER_S, CORE_GFLOP_PER_S, DRAM_GB_PER_S = 2, 90, 10
"""What inductor's scheduler is told of the machine: its own estimates need a GPU. A machine like that of `results/`."""


def simple_fsdp(model: nn.Module, job: Job) -> Training:
    """SimpleFSDP under torch.compile, whose scheduler buckets collectives and overlaps them; keeps until backward."""
    _let_inductor_overlap()
    mesh = init_device_mesh("cpu", (job.world_size,))
    model = _load_simple_fsdp(job).data_parallel(model, mesh, mode="fully_shard")
    optimizer = adamw(model.parameters())
    compiled: Any = torch.compile(model, fullgraph=True)
    return scaled(plain(compiled, optimizer), 1 / job.world_size)  # it sums gradients


def _load_simple_fsdp(job: Job) -> Any:
    """The one file of torchtitan that is needed, by its path."""
    name = job.simple_fsdp or os.environ.get("SIMPLE_FSDP")
    if name is None or not Path(name).is_file():
        raise SystemExit(
            "simple_fsdp needs a file of torchtitan's wheel: pip download --no-deps torchtitan==0.3.0, unzip it, and "
            "give --simple-fsdp .../torchtitan/experiments/graph_trainer/simple_fsdp.py (or set SIMPLE_FSDP)"
            + ("." if name is None else f"; there is no file {name}.")
        )
    for module in ("torchtitan", "torchtitan.protocols", "torchtitan.protocols.module"):
        sys.modules[module] = types.ModuleType(module)
    sys.modules["torchtitan.protocols.module"].Module = nn.Module  # all that it imports of torchtitan
    spec = importlib.util.spec_from_file_location("simple_fsdp", name)
    assert spec is not None and spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["simple_fsdp"] = loaded
    spec.loader.exec_module(loaded)
    return loaded


def _let_inductor_overlap() -> None:
    import torch._inductor.config as config
    import torch._inductor.utils as inductor_utils
    import torch.utils._runtime_estimation as estimation

    for module in (inductor_utils, estimation):
        module.get_gpu_dram_gbps = lambda: DRAM_GB_PER_S
        module.get_device_tflops = lambda *_: CORE_GFLOP_PER_S / 1e3
    config.compile_threads = 1
    options = config.aten_distributed_optimizations
    options.enable_overlap_scheduling = True
    options.collective_bucketing = True
    options.insert_overlap_deps = True
    options.compute_estimator = "analytical"
    options.custom_runtime_estimation = estimate_ms


def estimate_ms(node: fx.Node, nbytes: int | None = None) -> float:
    """Milliseconds of a node of inductor's graph: collectives by their bytes, matrix products by their FLOPs."""
    value, name = node.meta.get("val"), str(node.target)
    if any(word in name for word in ("all_gather", "reduce_scatter", "all_reduce")):
        sent = nbytes if nbytes is not None else max(_numel(node), _numel(node.args[0])) * value.element_size()
        share = 0.5 if "gather" in name else 1.0  # gloo's reduce-scatter is an all-reduce
        return sent * share * 8 / LINK_GBIT_PER_S / 1e6
    if isinstance(value, Tensor) and "mm" in name:
        factors = [argument.meta["val"] for argument in node.args if isinstance(argument, fx.Node)]
        return 2 * value.numel() * factors[-2].shape[-1] / CORE_GFLOP_PER_S / 1e6
    return 0.05


def _numel(node: Any) -> int:
    return node.meta["val"].numel()
