"""Libraries that only some features need: `pip install 'fxzero[train]'` installs those of the extra "train"."""

from importlib.util import find_spec

from fxzero.errors import MissingExtraError

LIBRARIES = {
    "train": ("matplotlib", "safetensors", "tokenizers", "tqdm"),
    "hf": ("transformers", "peft"),
    "stacks": ("accelerate", "lightning"),
    "tensorboard": ("tensorboard",),
}
"""The libraries of each extra by the name of their import, which is also their name in pyproject.toml."""


def require(feature: str, extra: str, *libraries: str) -> None:
    """Refuse to go on without the libraries of a feature. Nothing is imported, so that the check costs nothing.

    Args:
        feature: who needs them, as the user calls it.
        extra: the extra that installs them.
        libraries: those of the extra that are needed. Default: all.

    Raises:
        MissingExtraError: names the libraries that are not installed, and the command that installs them.
    """
    missing = [name for name in libraries or LIBRARIES[extra] if find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{feature} needs libraries that are not installed ({', '.join(missing)}): pip install 'fxzero[{extra}]'",
            name=missing[0],
        )
