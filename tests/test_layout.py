"""The rules of the folders: packages are ours, imports point left, deepspeed has one door, importing does nothing."""

import ast
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("model", "data", "sample", "train", "configs")  # each may import those to its left
FILES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]


def imported(path: Path) -> set[str]:
    """The top-level names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_the_one_of_this_checkout(package):
    found = importlib.import_module(package).__file__
    assert found is not None
    assert Path(found).resolve().is_relative_to(ROOT)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_left(path):
    place = PACKAGES.index(path.relative_to(ROOT).parts[0])
    to_the_right = imported(path) & set(PACKAGES[place + 1 :])
    entry = path.name == "run.py" and place == PACKAGES.index("train")  # it looks runs up by name
    assert to_the_right <= ({"configs"} if entry else set())


def test_deepspeed_is_imported_in_one_file():
    assert [path.relative_to(ROOT).as_posix() for path in FILES if "deepspeed" in imported(path)] == ["train/engine.py"]


def test_nothing_imports_torchvision_or_pickle():
    for path in FILES:
        named = {"pickle"} if path.name == "convert.py" else set()  # it names the error of what torch.load refuses to run
        assert not imported(path) & {"torchvision", "pickle"} - named, path


@pytest.mark.parametrize("path", [path for path in FILES if path.name == "__init__.py"], ids=lambda path: path.parent.name)
def test_an_init_file_holds_a_docstring_only(path):
    (statement,) = ast.parse(path.read_text()).body
    assert isinstance(statement, ast.Expr)
