"""What is trained: a reference model from nothing, or the model of a Hugging Face folder or adapters in it."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from pathlib import Path

from torch import Tensor, nn

import fxzero
from fxzero.checkpoint.safetensors import tied_names
from fxzero.commands.errors import CommandError
from fxzero.train.hf_folder import HfModel
from fxzero.train.lora import Adapters
from fxzero.train.models import ARCHITECTURES, build, config_of, default_lr, initializer, write_config
from fxzero.train.options import TrainOptions
from fxzero.train.text import Text

TOKENIZER_FILE = "tokenizer.json"
_FINE_TUNING_LR = 5e-5
_ADAPTERS_LR = 2e-4


class Subject(ABC):
    """A model on the meta device, where its weights come from, and what is written of it."""

    name: str
    """For titles and lines on the screen."""
    model: nn.Module
    masked: bool
    """True for masked language modelling, False for the next token."""
    default_lr: float
    announced: dict[str, Tensor]
    """The tensors of a file of the weights, on the meta device; tied ones once."""
    metadata: dict[str, str]
    """The free text in the header of that file."""

    @abstractmethod
    def initialize(self, module: nn.Module) -> None:
        """Give values to the parameters of one module that no file has."""

    @abstractmethod
    def load(self, zero: fxzero.ZeroModule) -> None:
        """Load the weights that there are before training; a collective."""

    @abstractmethod
    def write_beside(self, out: Path, text: Text, files: Iterable[str] = ()) -> None:
        """Write what comes with the weights; complete files are named in `files`."""

    @abstractmethod
    def prepare(self, zero: fxzero.ZeroModule) -> None:
        """Gather what `to_write` needs beside the tensor at hand; a collective."""

    def to_write(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        """The tensors of the file of the weights, of those of the model."""
        return ((name, tensor) for name, tensor in tensors if name in self.announced)

    @abstractmethod
    def write_more(self, out: Path) -> None:
        """Write further files of weights, on rank 0 after `prepare`."""


class ReferenceModel(Subject):
    """A model of `fxzero.models`, whose vocabulary is that of the text."""

    def __init__(self, options: TrainOptions, text: Text) -> None:
        architecture = ARCHITECTURES[options.model]
        self._model, self._preset = options.model, options.preset
        self._config = dataclasses.replace(
            config_of(options.model, options.preset, options.seq), vocab_size=text.vocab_size
        )
        self._initialize = initializer(text.vocab_size)
        self.name = f"{options.model} {options.preset}"
        self.model = build(options.model, self._config)
        self.masked, self.default_lr = architecture.masked, default_lr(self._config)
        tied = tied_names(self.model)
        self.announced = _on_meta(self.model, tied)
        self.metadata = {"format": "pt", **tied}

    def initialize(self, module: nn.Module) -> None:
        self._initialize(module)

    def load(self, zero: fxzero.ZeroModule) -> None:
        """All weights are drawn when the layout is fixed."""

    def prepare(self, zero: fxzero.ZeroModule) -> None:
        """Each tensor is written as it is."""

    def write_more(self, out: Path) -> None:
        """There is one file."""

    def write_beside(self, out: Path, text: Text, files: Iterable[str] = ()) -> None:
        if not files:
            (out / TOKENIZER_FILE).write_text(text.tokenizer.to_str(pretty=True), encoding="utf-8")
        write_config(out, self._model, self._preset, self._config, files)


class HuggingFaceModel(Subject):
    """The model of a folder, or adapters in it; the results are a folder that transformers loads."""

    masked = False

    def __init__(self, folder: Path, options: TrainOptions, text: Text) -> None:
        self._made = HfModel(folder, options.seq)
        self._made.check_vocabulary(max(text.tokenizer.get_vocab().values()) + 1)
        self.model = self._made.model
        tied = tied_names(self.model)
        self._adapters = None if options.lora is None else Adapters(self.model, options.lora, folder)
        self._of_adapters: dict[str, Tensor] = {}
        """The trained tensors, after `prepare`, on rank 0."""
        self.name = f"{self._made.kind} of {folder}"
        self.default_lr, self.metadata = _FINE_TUNING_LR, {"format": "pt"}
        self.announced = _on_meta(self.model, tied)
        if self._adapters is not None:
            self.name += f", adapters of rank {options.lora}"
            self.default_lr = _ADAPTERS_LR
            self.announced = self._adapters.announced(self.announced)

    def initialize(self, module: nn.Module) -> None:
        if self._adapters is not None:
            self._adapters.initialize(module)

    def load(self, zero: fxzero.ZeroModule) -> None:
        keys = fxzero.load_pretrained(zero, self._made.folder, strict=self._adapters is None)
        adapters = self._adapters
        missing = [name for name in keys.missing_keys if adapters is None or not adapters.is_of_adapter(name)]
        if missing or keys.unexpected_keys:
            raise CommandError(
                f"--hf {self._made.folder}: the weights do not fit the model: missing {missing[:5] or 'nothing'}, "
                f"unexpected {keys.unexpected_keys[:5] or 'nothing'}."
            )

    def write_beside(self, out: Path, text: Text, files: Iterable[str] = ()) -> None:
        if not files:
            self._made.write_beside(out)

    def prepare(self, zero: fxzero.ZeroModule) -> None:
        if self._adapters is None:
            return
        for name, tensor in zero.iter_full_params(rank0_only=True):
            if tensor is not None and self._adapters.is_of_adapter(name):
                self._of_adapters[name] = tensor.to("cpu", copy=True)

    def to_write(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterable[tuple[str, Tensor]]:
        if self._adapters is not None:
            tensors = self._adapters.merged(tensors, self._of_adapters)
        return super().to_write(tensors)

    def write_more(self, out: Path) -> None:
        if self._adapters is not None:
            self._adapters.write(out, self._of_adapters)


def make_subject(options: TrainOptions, text: Text) -> Subject:
    """What the options say.

    Raises:
        CommandError: a Hugging Face folder has no model that can be trained, or it does not fit the options.
    """
    return ReferenceModel(options, text) if options.hf is None else HuggingFaceModel(options.hf, options, text)


def _on_meta(model: nn.Module, tied: Mapping[str, str]) -> dict[str, Tensor]:
    return {name: tensor.to("meta") for name, tensor in model.state_dict().items() if name not in tied}
