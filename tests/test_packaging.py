"""The wheel holds fxzero/... and nothing beside it; passes and models are in it, under fxzero."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fxzero.host.extras import LIBRARIES

ROOT = Path(__file__).parents[1]
PACKAGE_FOLDERS = ("fxzero", "passes", "models")


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built without network, from a copy: building writes beside the sources."""
    source = tmp_path_factory.mktemp("source")
    for folder in PACKAGE_FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "--no-index",
        "-w",
        "out",
        ".",
    ]
    built = subprocess.run(command, cwd=source, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert built.returncode == 0, built.stdout
    (wheel,) = (source / "out").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_errors_name_the_libraries_of_the_extras_when_they_are_missing():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    for extra, libraries in LIBRARIES.items():
        assert tuple(requirement.partition(">")[0] for requirement in extras[extra]) == libraries


def test_wheel_names_start_with_fxzero_when_built(wheel_names: set[str]):
    assert wheel_names
    assert [name for name in wheel_names if not name.startswith("fxzero")] == []


def test_wheel_has_every_module_when_built(wheel_names: set[str]):
    expected = {"fxzero/py.typed"}
    for folder in PACKAGE_FOLDERS:
        prefix = "" if folder == "fxzero" else "fxzero/"
        expected |= {f"{prefix}{path.relative_to(ROOT).as_posix()}" for path in (ROOT / folder).rglob("*.py")}
    assert expected - wheel_names == set()


@pytest.mark.parametrize("folder", ["passes", "models"])
def test_link_points_to_the_folder_when_checked_out(folder: str):
    link = ROOT / "fxzero" / folder
    assert link.is_symlink()
    assert link.readlink() == Path("..") / folder
