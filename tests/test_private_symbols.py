"""Private symbols of torch stand in torch_internals.py alone, where each says in which versions it was seen."""

import ast
from pathlib import Path

import pytest
from helpers.private_symbols import private_uses

ROOT = Path(__file__).parents[1]
HOME = "fxzero/torch_internals.py"
ALLOWED = {
    (
        "fxzero/api.py",
        "ZeroModule._apply",
    ): "a base class is overridden by name; torch_internals.CONVERSION documents it",
    (
        "fxzero/module/initialize.py",
        "'_init_weights'",
    ): "a method of transformers' models, and of models that follow them",
    ("fxzero/module/initialize.py", "'_is_hf_initialized'"): "an attribute that transformers sets",
    ("fxzero/module/saved/export.py", "'_keys_to_ignore_on_save'"): "an attribute of transformers' models",
    ("fxzero/module/saved/export.py", "'_hf_peft_config_loaded'"): "an attribute of transformers' models",
    ("fxzero/stacks/lightning.py", "self._layer_sync"): "an attribute of Lightning's strategies",
    ("fxzero/train/corpus.py", "'_sysconfigdata'"): "the name of a file of Python",
}
"""By path and symbol: why it stands where it is."""


def _sources() -> dict[str, str]:
    """Every module, the links left out: `passes/` and `models/` have paths of their own."""
    links = tuple(f"fxzero/{link}/" for link in ("passes", "models"))
    paths = (path for folder in ("fxzero", "passes", "models") for path in (ROOT / folder).rglob("*.py"))
    names = {path.relative_to(ROOT).as_posix(): path for path in paths}
    return {name: path.read_text() for name, path in names.items() if not name.startswith(links)}


def test_private_symbols_stand_in_one_module() -> None:
    uses = [use for use in private_uses(_sources()) if use.path != HOME]
    assert [str(use) for use in uses if (use.path, use.name) not in ALLOWED] == []
    assert ALLOWED.keys() == {(use.path, use.name) for use in uses}


def test_each_of_them_names_versions() -> None:
    text = (ROOT / HOME).read_text()
    lines = text.splitlines()
    body = ast.parse(text).body
    for use in private_uses(_sources()):
        if use.path != HOME or lines[use.line - 1].startswith(("from ", "import ")):
            continue
        index = next(index for index, node in enumerate(body) if node.lineno <= use.line <= (node.end_lineno or 0))
        statement, following = body[index], body[index + 1] if index + 1 < len(body) else None
        documented = statement if isinstance(statement, ast.FunctionDef | ast.ClassDef) else following
        assert documented is not None
        assert "2.13" in ast.unparse(documented), f"{use} says no version"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from torch.utils import _pytree", "torch.utils._pytree"),
        ("from torch.utils._pytree import tree_map", "torch.utils._pytree.tree_map"),
        ("import torch._dynamo as dynamo", "torch._dynamo"),
        ("from torch.optim.optimizer import _use_grad", "torch.optim.optimizer._use_grad"),
        ("import torch\ntorch._C.f()", "torch._C"),
        ("import torch\ndef _sync(): ...\ntorch._sync(x)", "torch._sync"),
        (
            "from typing import Any, cast\nimport torch\ncast(Any, torch.autograd)._nr()",
            "cast(Any, torch.autograd)._nr",
        ),
        ("import torch.distributed as dist\ndist.distributed_c10d._get()", "dist.distributed_c10d._get"),
        ("count = param._version", "param._version"),
        ("class A:\n    def f(self, x):\n        return x._unknown", "x._unknown"),
        ("class A:\n    def __init__(self, x):\n        self._version = x._version", "x._version"),
        ("from torch import nn\nclass A(nn.Module):\n    def f(self):\n        return self._buffers", "self._buffers"),
        ("from torch import nn\nclass A(nn.Module):\n    def _apply(self, fn): ...", "A._apply"),
        ("from torch import nn\nclass A(nn.Module): ...\nclass B(A):\n    _version = 1", "B._version"),
        ("getattr(module, '_non_persistent_buffers_set')", "'_non_persistent_buffers_set'"),
        ("hasattr(state, '_metadata')", "'_metadata'"),
        ("setattr(module, '_parameters', {})", "'_parameters'"),
        ("vars(module)['_parameters']", "'_parameters'"),
        ("module.__dict__.pop('_apply', None)", "'_apply'"),
        ("for table in ('_buffers', 'other'): vars(module)[table]", "'_buffers'"),
    ],
)
def test_a_private_symbol_is_found(source: str, found: str) -> None:
    assert [use.name for use in private_uses({"module.py": source})] == [found]


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch.ops.aten._unsafe_view.default",
        "import torch\naten = torch.ops.aten\naten._to_copy.default",
        "from torch.fx.experimental.proxy_tensor import make_fx",
        "import sys\nsys._getframe()",
        "class A:\n    _name: int\ndef f(a):\n    return a._name, getattr(a, '_name')",
        "class A:\n    def __init__(self):\n        self._version = 1\n    def f(self):\n        return self._version",
        "class A:\n    def _apply(self): ...\n    def f(self):\n        self._apply()",
        "pair._replace(x=1)",
        "zero.__dict__['_fxzero_engine']",
        "name = f'{x}_failed'",
        "x.__dict__",
    ],
)
def test_what_is_not_torchs_is_not_found(source: str) -> None:
    assert private_uses({"module.py": source}) == []
