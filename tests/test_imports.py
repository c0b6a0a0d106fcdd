"""Dependencies point one way, read from the sources: see the table in CONTRIBUTING.md."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
VOCABULARY = {
    "fxzero.aliasing",
    "fxzero.ir",
    "fxzero.layout",
    "fxzero.ops",
    "fxzero.recompute",
    "fxzero.text",
    "fxzero.wire",
    "fxzero.errors",
}
"""What a pass may know, beside other passes."""
CHANGED_BY_A_BUDGET = {"KeepGathered", "Pass", "PrefetchAllGathers", "RecomputeActivations", "SinkWaits"}
LEFT_OUT_BY_AN_ABLATION = {"BucketAllGathers", "Pass", "PrefetchAllGathers", "SinkWaits"}
RUN_TIME = (
    "runtime",
    "binding",
    "arena_plan",
    "autograd",
    "codegen",
    "comm",
    "gloo",
    "nccl",
    "mesh",
    "hierarchy",
    "hierarchy_shard",
    "streams",
    "shards",
    "gradients",
    "interleave",
    "narrow",
    "tensor_lists",
    "transient",
    "clip",
    "optim",
)
"""What runs a step: it makes no decision, so it knows nothing of what does."""
DECIDES = {"fxzero.passes", "fxzero.pipeline", "fxzero.planner", "fxzero.verify", "fxzero.api", "fxzero.engine"}


def _modules() -> dict[str, Path]:
    """Every module by its name, the links resolved to `fxzero.passes` and `fxzero.models`."""
    found: dict[str, Path] = {}
    for folder, package in (("fxzero", "fxzero"), ("passes", "fxzero.passes"), ("models", "fxzero.models")):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join([package, *(part for part in parts if part != "__init__")])
            if folder != "fxzero" or parts[0] not in ("passes", "models"):
                found[name] = path
    return found


MODULES = _modules()


def _imports(name: str, *, at_import_time: bool = False) -> set[str]:
    """The modules that a module names in its import statements; `from a import b` counts as `a.b` where that is one."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    found: set[str] = set()
    for node in tree.body if at_import_time else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            }
    return found


def _names_from(name: str, source: str) -> set[str]:
    tree = ast.parse(MODULES[name].read_text())
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == source]
    return {alias.name for node in nodes for alias in node.names}


def _within(package: str) -> list[str]:
    return [name for name in MODULES if name == package or name.startswith(package + ".")]


def test_sources_are_found_when_the_tests_run() -> None:
    assert {"fxzero.api", "fxzero.capture.joint", "fxzero.passes.sink_waits", "fxzero.models.gpt"} <= MODULES.keys()
    assert all(f"fxzero.{name}" in MODULES for name in RUN_TIME)
    assert "fxzero.ir" in _imports("fxzero.passes.sink_waits")


@pytest.mark.parametrize("name", _within("fxzero.models"))
def test_model_imports_nothing_of_fxzero(name: str) -> None:
    assert {
        other for other in _imports(name) if other.startswith("fxzero") and other not in _within("fxzero.models")
    } == set()


@pytest.mark.parametrize("name", _within("fxzero.passes"))
def test_pass_imports_the_graph_and_its_vocabulary_alone(name: str) -> None:
    ours = {other for other in _imports(name) if other.split(".")[0] == "fxzero"}
    assert ours - VOCABULARY - set(_within("fxzero.passes")) == set()


def test_list_of_passes_is_imported_by_the_entry_points_alone() -> None:
    knowing = {
        name
        for name in MODULES
        if name not in _within("fxzero.passes") and _imports(name) & {*_within("fxzero.passes")}
    }
    assert knowing == {
        "fxzero.ablation",
        "fxzero.api",
        "fxzero.budget",
        "fxzero.costing",
        "fxzero.options",
        "fxzero.planner",
        "fxzero.tuner",
        "fxzero.tuning",
    }
    assert _names_from("fxzero.ablation", "fxzero.passes") == LEFT_OUT_BY_AN_ABLATION
    assert _names_from("fxzero.tuner", "fxzero.passes") == {"Pass"}
    assert _names_from("fxzero.budget", "fxzero.passes") == CHANGED_BY_A_BUDGET
    assert _names_from("fxzero.planner", "fxzero.passes") == {"BucketAllGathers", "Pass", "default_passes"}
    assert _names_from("fxzero.options", "fxzero.passes") == {"Pass", "default_passes"}
    assert _names_from("fxzero.api", "fxzero.passes") == {"Pass"}


@pytest.mark.parametrize("name", RUN_TIME)
def test_what_runs_a_step_knows_nothing_of_what_decides_it(name: str) -> None:
    known = {other for other in _imports(f"fxzero.{name}", at_import_time=True) if other.startswith("fxzero")}
    assert {other for other in known if other in DECIDES or other.startswith("fxzero.passes")} == set()


@pytest.mark.parametrize("folder", ["fxzero", "passes", "models", "tests", "benchmarks"])
def test_top_level_names_of_the_links_are_never_imported(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] in ("passes", "models")], path


def test_no_module_imports_itself_in_a_circle() -> None:
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name in MODULES:
        if name.startswith("fxzero.train") or name == "fxzero":
            continue
        graph.add_edges_from((name, other) for other in _imports(name, at_import_time=True) if other in MODULES)
    assert list(nx.simple_cycles(graph)) == []
