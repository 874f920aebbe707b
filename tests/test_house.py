"""The house (CONTRIBUTING.md shows it): imports point downwards only, no file takes another's private names."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parents[1] / "keras_mp"
# From the top down; those on one line know nothing of each other.
_FLOORS = [
    {"__main__"},
    {"cli"},
    {"commands", "directories"},
    {"dataset", "stream", "callbacks", "monitor", "plot"},
    {"loaded"},
    {"bridge", "report"},
    {"lifecycle"},
    {"tensors"},
    {"tfdata", "looks", "callers", "auto_shard", "exits", "stats"},
    {"trace"},
    {"engines"},
    {"workers"},
    {"loading"},
    {"plan"},
    {"memory"},
    {"checks", "sizing"},
    {"errors"},
]
_FLOOR_OF = {room: number for number, floor in enumerate(_FLOORS) for room in floor}
_FILES = sorted(path for path in _PACKAGE.rglob("*.py") if path != _PACKAGE / "__init__.py")
_MOST_LINES = 350
_PUBLIC_ALL_THE_SAME = {"_exit", "_getframe", "_current_frames", "_make", "_fields", "_replace"}


def _module(path: Path) -> str:
    return ".".join(path.relative_to(_PACKAGE).with_suffix("").parts)


def _imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module within the package, and name, of all that a file imports from it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "keras_mp":
            for alias in node.names:
                yield (node.module or "").partition(".")[2] or alias.name, alias.name
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: a relative import hides which floor it goes to"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("keras_mp.")]
            yield from ((name.partition(".")[2], "") for name in names)


def test_every_file_has_a_floor() -> None:
    assert {_module(path).partition(".")[0] for path in _FILES} == set(_FLOOR_OF)


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_imports_point_downwards(path: Path) -> None:
    room = _module(path).partition(".")[0]
    for module, name in _imports(path):
        other = module.partition(".")[0]
        assert other == room or _FLOOR_OF[other] > _FLOOR_OF[room], f"{_module(path)} imports {name} from {module}"


def test_no_circle_within_a_folder() -> None:
    after = {_module(path): {module for module, _ in _imports(path)} for path in _FILES}
    known = set(after)
    left = {module: {m for m in imported if m in known and m != module} for module, imported in after.items()}
    while free := {module for module, imported in left.items() if not imported & left.keys()}:
        for module in free:
            del left[module]
    assert not left


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_no_file_takes_anothers_private_names(path: Path) -> None:
    tree = ast.parse(path.read_text())
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    own |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)}
    assert not [name for _, name in _imports(path) if _is_private(name)]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr) and node.attr not in own:
            base = node.value
            inherited = isinstance(base, ast.Name) and base.id == "self"
            assert inherited or node.attr in _PUBLIC_ALL_THE_SAME, f"line {node.lineno}: {ast.unparse(node)}"


@pytest.mark.parametrize("path", _FILES, ids=_module)
def test_files_are_of_a_size_to_be_read(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= _MOST_LINES


@pytest.mark.parametrize("path", [*_FILES, _PACKAGE / "__init__.py"], ids=_module)
def test_a_file_says_first_what_it_is_for(path: Path) -> None:
    if path.name != "__init__.py" or path.read_text():
        assert ast.get_docstring(ast.parse(path.read_text()))
