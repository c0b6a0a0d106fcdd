"""Every error fxzero raises on purpose, one class per broken rule: what, where, why, and what to do."""


class FxzeroError(Exception):
    """Base of all errors of fxzero."""


class CaptureError(FxzeroError):
    """The model could not be traced into one graph.

    Cause: code whose control flow or shapes depend on tensor values, or an unsupported construct.
    Cure: the message names the source line and what to change there.

    Args:
        path: of the module that it is about, if the one that raised it does not show that.
    """

    def __init__(self, message: str, path: str | None = None) -> None:
        super().__init__(message)
        self.path = path


class IslandError(FxzeroError):
    """A part of the model that runs as it is gave something else than when the step was traced.

    Cause: results whose shape or plain values follow the values of tensors. Cure: `compile(islands=[...])` with a
    module around it, inside of which they stay.
    """


class InputMismatchError(FxzeroError):
    """The inputs of a call do not fit the model or the plan.

    Cause: a missing or surplus argument, or a tensor on another device. Cure: named in the message.
    """


class PlanError(FxzeroError):
    """A plan cannot be made or used: its collectives or its memory do not fit what is fixed already.

    Cause: a call that would gather other buckets than the first one of its mode, or a budget too small.
    Cure: named in the message.
    """


class StaleBackwardError(FxzeroError):
    """A backward that cannot be run any more.

    Cause: a second backward through one forward, `create_graph=True`, or parameters that changed since the forward.
    Cure: call the model again before each backward.
    """


class RankMismatchError(FxzeroError):
    """Ranks compiled different things.

    Cause: another model, dtype, world size or option on some rank; the message names the first difference.
    Cure: run the same script with the same settings on every rank.
    """


class DifferentNumbersError(FxzeroError):
    """`fxzero.verify` found numbers that are not those of plain PyTorch.

    Cause: the message names the first value that differs, and what may change numbers.
    Cure: what it names; or compare within a tolerance.
    """


class CommunicationError(FxzeroError):
    """A collective was not completed: a peer died, or did not come within the process group's timeout.

    Cause: the first error among the other ranks. Cure: fix that one and restart from a checkpoint; the message names
    the bucket that was waited for.
    """


class StepLeftOutError(FxzeroError):
    """Another rank failed in a step that all ranks take or none (`step_together`); the message has its error.

    Cure: go on with the next batch, as that rank can.
    """


class OptimizerError(FxzeroError, ValueError):
    """The optimizer cannot step shards: it is not element-wise, or its state does not fit them.

    Cure: use an element-wise optimizer of torch.optim, or vouch for yours by `elementwise_optimizer=True`.
    """


class CheckpointError(FxzeroError):
    """A state dict does not fit the model, or the model was never initialised. Cure: named in the message."""


class MissingExtraError(FxzeroError, ImportError):
    """A library that this feature needs is not installed. Cure: the message names the command that installs it.

    It is an ImportError as well, because that is what code catches that can do without an optional library."""


class ScheduleError(FxzeroError, ValueError):
    """A schedule breaks a rule; the subclasses name which."""


class PassOrderError(ScheduleError):
    """A pass ran before one that it needs. Cure: keep the order of `fxzero.passes.default_passes()`."""


class MalformedGraphError(ScheduleError):
    """The graph is not a graph in topological order. Cause: a pass moved a node above its inputs."""


class ReadWithoutGatherError(ScheduleError):
    """Compute reads a sharded parameter. Cure: run InsertAllGathers, or read the result of the wait."""


class MissingWaitError(ScheduleError):
    """A collective is started and never waited for, or waited for twice. Cure: one wait for each start."""


class WireFormatError(ScheduleError):
    """A collective travels in a type that does not fit its bucket: not narrower, or not made for it.

    Cure: let the passes NarrowAllGathers and NarrowReduceScatters choose; they leave alone what does not fit."""


class InsideGatherError(ScheduleError):
    """A gather reads secondary shards that no gather before it in the step has left, or that there are none of.

    Cure: let the pass LocalizeAllGathers choose."""


class PhaseError(ScheduleError):
    """A collective or a gathered parameter crosses from forward to backward. Cure: gather again in backward."""


class UseAfterReleaseError(ScheduleError):
    """A parameter is read after its release. Cure: release it after its last reader, or gather it again."""


class ParameterWriteError(ScheduleError):
    """An operator writes into a parameter: into what was gathered, which is dropped, or into a shard that a gather may
    be reading. Cure: let it write into a clone; parameters change between steps only."""


class GradientMemoryError(ScheduleError):
    """An operator uses the memory of a gradient when it is not that gradient's to use, or no longer: its reduce may be
    reading it, or another bucket lie there. Cure: use it from its grad_slot on and before its write_grad."""


class DoubleReleaseError(ScheduleError):
    """A gathered bucket is released twice. Cure: one release for each gather."""


class MissingReleaseError(ScheduleError):
    """A gathered bucket is never released. Cure: run ReleaseParams last."""


class GradientReduceError(ScheduleError):
    """A gradient is reduced never, twice, or in a bucket whose members are not those of its gather."""


class BucketError(ScheduleError):
    """A bucket mixes dtypes or frozen with trained parameters, or two buckets share a parameter."""


class RegionInputError(ScheduleError):
    """A region of fused compute reads a tensor of another shape, stride, dtype or device than it is compiled for.

    Cause: a pass behind FuseCompute put another value in the place of an input.
    Cure: run FuseCompute behind that pass, or let the value have the same geometry.
    """


class PassChangedNumbersError(ScheduleError):
    """With FXZERO_CHECK=1: the graph after a pass gives other numbers than before it, or cannot be run any more.

    Cause: the pass is wrong, or changes numbers and declares no `tolerance`, or one that is too small.
    Cure: the message names the pass, the first value that differs and, where it can be found, the first operator; see
    "How to find a pass that is wrong" in CONTRIBUTING.md.
    """


class MemoryOverlapError(ScheduleError):
    """Two live buffers share bytes of an arena. Cause: a lifetime was planned shorter than its use."""
