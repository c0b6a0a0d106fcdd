"""A local Hugging Face folder: its configuration, its model on the meta device, its tokenizer, its other files."""

import contextlib
import copy
import json
import shutil
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fxzero.commands.errors import CommandError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

CONFIG_FILE = "config.json"
TOKENIZER_FILE = "tokenizer.json"
_CAUSAL = ("ForCausalLM", "LMHeadModel")
"""Ends of the names of classes that predict the next token."""
_COPIED = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model"),
    *("chat_template*", "generation_config.json"),
)
"""Files beside the configuration and the weights that a fine-tuned model keeps."""


def check_folder(folder: Path) -> None:
    """Raise CommandError for a folder that lacks one of the three things that a model consists of."""
    if not folder.is_dir():
        raise CommandError(
            f"--hf {folder} is no folder. Give one on this machine, such as save_pretrained writes it; nothing is "
            "downloaded."
        )
    if not (folder / CONFIG_FILE).is_file():
        raise CommandError(f"--hf {folder} has no {CONFIG_FILE}: it is no folder of a Hugging Face model.")
    if not any(folder.glob("*.safetensors")):
        pickled = " Its .bin files are pickles, which are not read." if any(folder.glob("*.bin")) else ""
        raise CommandError(
            f"--hf {folder} has no weights as safetensors.{pickled} model.save_pretrained(folder) of transformers "
            "writes them."
        )
    if not (folder / TOKENIZER_FILE).is_file():
        raise CommandError(
            f"--hf {folder} has no {TOKENIZER_FILE}. AutoTokenizer.from_pretrained(folder).save_pretrained(folder) of "
            "transformers writes it."
        )


@dataclass(frozen=True)
class HfTokenizer:
    """The tokenizer of a folder, and the ids that packed texts need."""

    tokenizer: "Tokenizer"
    bos_id: int | None
    """The token that it puts before every text, if it does."""
    eos_id: int | None
    """The token that ends a text."""


def read_tokenizer(folder: Path) -> HfTokenizer:
    """The tokenizer of a folder.

    Raises:
        CommandError: it cannot be read.
    """
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    except Exception as error:  # the library raises nothing more specific
        raise CommandError(f"--hf {folder}: {TOKENIZER_FILE} cannot be read: {error}.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    before = tokenizer.encode("").ids[:1]
    return HfTokenizer(tokenizer, before[0] if before else None, _eos_id(folder, tokenizer))


def _eos_id(folder: Path, tokenizer: "Tokenizer") -> int | None:
    found: Any = _json(folder / CONFIG_FILE).get("eos_token_id")
    if isinstance(found, list) and found:
        found = found[0]
    if isinstance(found, int):
        return found
    token = _json(folder / "tokenizer_config.json").get("eos_token")
    token = token.get("content") if isinstance(token, dict) else token
    return tokenizer.token_to_id(token) if isinstance(token, str) else None


def _json(path: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content  # pyright: ignore[reportUnknownVariableType]
    return {}


class HfModel:
    """The model of a folder on the meta device, in fp32.

    Raises:
        CommandError: transformers cannot make it, it does not predict the next token, or it has fewer positions.
    """

    def __init__(self, folder: Path, seq: int) -> None:
        from transformers import AutoConfig, AutoModelForCausalLM

        self.folder = folder
        with _told(folder):
            self.config: Any = AutoConfig.from_pretrained(folder, local_files_only=True)
        self.kind = next(iter(getattr(self.config, "architectures", None) or ()), self.config.model_type)
        """The name of the class of the model."""
        if "For" in self.kind and not self.kind.endswith(_CAUSAL):
            raise CommandError(
                f"--hf {folder} has a {self.kind}; models that predict the next token (...ForCausalLM) are trained."
            )
        positions = getattr(self.config, "max_position_embeddings", None)
        if isinstance(positions, int) and seq > positions:
            raise CommandError(f"--seq {seq} is more than {folder} has positions for; at most {positions}.")
        running = copy.deepcopy(self.config)
        running.use_cache = False
        with _told(folder), torch.device("meta"):
            self.model: nn.Module = AutoModelForCausalLM.from_config(running, dtype=torch.float32)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise CommandError if the tokenizer has ids that the model has not."""
        if vocab_size > self.config.vocab_size:
            raise CommandError(
                f"--hf {self.folder}: the tokenizer has {vocab_size} tokens, and the model {self.config.vocab_size}."
            )

    def write_beside(self, out: Path) -> None:
        """Write the configuration and copy the files beside the weights."""
        config = copy.deepcopy(self.config)
        config.dtype = torch.float32
        config.architectures = [type(self.model).__name__]
        config.save_pretrained(out)
        for path in sorted({path for pattern in _COPIED for path in self.folder.glob(pattern)}):
            if path.is_file():
                shutil.copyfile(path, out / path.name)


@contextmanager
def _told(folder: Path) -> Generator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        lines: Iterable[str] = str(error).splitlines()
        reason = next(iter(lines), type(error).__name__)
        raise CommandError(f"--hf {folder}: transformers cannot make its model: {reason}") from error
