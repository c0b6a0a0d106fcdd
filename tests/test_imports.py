"""Dependencies point one way, read from the sources: nested imports and those for type checkers count as well."""

from __future__ import annotations

import ast
from pathlib import Path

import networkx as nx
import pytest

ROOT = Path(__file__).parents[1]
ORDER: tuple[tuple[str, ...], ...] = (
    ("errors", "models"),
    ("torch_internals", "host"),
    ("graph",),
    ("comm",),
    ("capture", "passes"),
    ("memory",),
    ("cost",),
    ("planning",),
    ("runtime",),
    ("checkpoint",),
    ("reference", "optimizers"),
    ("module",),
    ("options", "planner"),
    ("api",),
    ("checkpoints",),
    ("stacks",),
    ("commands",),
    ("train",),
    ("__main__",),
    ("testing",),
)
"""Folders and files of `fxzero/`: what stands in one line imports from the lines above it, and from itself."""
MOST_CHILDREN = 25
"""Files and subfolders of a folder."""


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


def _imports(name: str) -> set[str]:
    """The modules that a module names in its import statements; `from a import b` counts as `a.b` where that is one."""
    path = MODULES[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            found |= {
                f"{source}.{alias.name}" if f"{source}.{alias.name}" in MODULES else source for alias in node.names
            }
    return found


def _graph() -> nx.DiGraph[str]:
    """An edge for each import; the package itself, which only names what users call, is left out."""
    graph: nx.DiGraph[str] = nx.DiGraph()
    graph.add_nodes_from(name for name in MODULES if name != "fxzero")
    for name in graph:
        graph.add_edges_from((name, other) for other in _imports(name) if other in graph and other != name)
    return graph


GRAPH = _graph()


def _child(name: str) -> str:
    """The file or folder of `fxzero/` that a module belongs to."""
    return name.split(".")[1]


def _rank(child: str) -> int:
    return next(index for index, line in enumerate(ORDER) if child in line)


def test_sources_are_found_when_the_tests_run() -> None:
    assert {"fxzero.api", "fxzero.capture.joint", "fxzero.passes.sink_waits", "fxzero.models.gpt"} <= MODULES.keys()
    assert "fxzero.graph.step" in _imports("fxzero.passes.sink_waits")


def test_every_file_and_folder_has_a_place_in_the_order() -> None:
    listed = {child for line in ORDER for child in line}
    assert {_child(name) for name in GRAPH} == listed


@pytest.mark.parametrize("child", [child for line in ORDER for child in line])
def test_folder_reaches_only_itself_and_those_before_it(child: str) -> None:
    allowed = {child, *(other for line in ORDER[: _rank(child)] for other in line)}
    for name in (name for name in GRAPH if _child(name) == child):
        for other in nx.descendants(GRAPH, name):
            path = " -> ".join(nx.shortest_path(GRAPH, name, other))
            assert _child(other) in allowed, path


def test_no_modules_and_no_folders_import_each_other_in_a_circle() -> None:
    assert [sorted(circle) for circle in nx.strongly_connected_components(GRAPH) if len(circle) > 1] == []
    folders = nx.DiGraph((_child(name), _child(other)) for name, other in GRAPH.edges if _child(name) != _child(other))
    assert list(nx.simple_cycles(folders)) == []


def test_pass_imports_the_graph_and_errors_alone() -> None:
    for name in (name for name in GRAPH if _child(name) == "passes"):
        assert {_child(other) for other in GRAPH[name]} <= {"passes", "graph", "errors"}, name


def test_models_import_nothing_of_fxzero() -> None:
    for name in (name for name in GRAPH if _child(name) == "models"):
        assert {_child(other) for other in GRAPH[name]} <= {"models"}, name


def test_list_of_passes_is_imported_by_planning_alone() -> None:
    knowing = {_child(name) for name in GRAPH for other in GRAPH[name] if _child(other) == "passes"}
    assert knowing - {"passes"} == {"planning"}


def test_references_to_measure_against_are_imported_by_the_options_alone() -> None:
    knowing = {_child(name) for name in GRAPH for other in GRAPH[name] if _child(other) == "reference"}
    assert knowing - {"reference"} == {"options"}


def test_no_folder_has_more_files_than_a_reader_takes_in() -> None:
    for folder in {path.parent for path in MODULES.values()}:
        children = [path for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
        assert len([path for path in children if path.name != "__init__.py"]) <= MOST_CHILDREN, folder


@pytest.mark.parametrize("folder", ["fxzero", "passes", "models", "tests", "benchmarks"])
def test_top_level_names_of_the_links_are_never_imported(folder: str) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not [name for name in names if name.split(".")[0] in ("passes", "models")], path
