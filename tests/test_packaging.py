"""What is built and installed: the package alone, typed, of one version. `nox -s package` does it online, by pip."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import keras_mp

_ROOT = Path(__file__).resolve().parents[1]
_MEMBERS = re.compile(r"^::: keras_mp\.(\w+)\n    options:\n      members: \[([^\]]*)\]", re.MULTILINE)
_README = _ROOT / "README.md"

pytestmark = pytest.mark.timeout(600)  # it builds, and mypy reads NumPy

for _tool in ("build", "hatchling", "mypy", "pip", "twine"):
    pytest.importorskip(_tool, reason=f"{_tool} is of the extra 'dev'")


def _run(arguments: Sequence[str | Path], folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [*map(str, arguments)],
        cwd=folder,
        env={**environment, "KERAS_BACKEND": "jax"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made from the sdist, and the sdist; by build tools that are installed, so that it takes no network."""
    folder = tmp_path_factory.mktemp("dist")
    _run([sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, _ROOT], folder)
    (wheel,), (sdist,) = folder.glob("*.whl"), folder.glob("*.tar.gz")
    return wheel, sdist


@pytest.fixture(scope="module")
def python(built: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter with the wheel, what it depends on, and JAX for Keras to run on, and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    _run([sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", built[0]], folder)
    (packages,) = folder.glob("lib/python*/site-packages")
    for distribution in _dependencies("keras-mp", "jax"):
        for top in {path.parts[0] for path in distribution.files or ()} - {"..", "__pycache__"}:
            (packages / top).symlink_to(str(distribution.locate_file(top)))
    return python


def _dependencies(package: str, *more: str) -> list[importlib.metadata.Distribution]:
    """What a package needs, without its extras, and what that needs; and `more` packages."""
    found = {name: importlib.metadata.distribution(name) for name in more}
    names = [package, *more]
    for each in names:  # which grows
        for requirement in map(Requirement, importlib.metadata.requires(each) or ()):
            name = canonicalize_name(requirement.name)
            if name not in found and (requirement.marker is None or requirement.marker.evaluate()):
                found[name] = importlib.metadata.distribution(name)
                names.append(name)
    return list(found.values())


def test_the_wheel_holds_the_package_alone(built: tuple[Path, Path]) -> None:
    wheel, sdist = built
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.partition("/")[0] for name in names} == {"keras_mp", f"keras_mp-{keras_mp.__version__}.dist-info"}
    ours = {path.relative_to(_ROOT).as_posix() for path in (_ROOT / "keras_mp").rglob("*.py")} | {"keras_mp/py.typed"}
    assert {name for name in names if name.startswith("keras_mp/")} == ours
    tops = {name.split("/")[1] for name in tarfile.open(sdist).getnames() if "/" in name}
    assert {"keras_mp", "tests", "docs", "README.md", "LICENSE", "pyproject.toml", "noxfile.py"} <= tops
    assert not tops & {".git", ".nox", ".venv", "site"}


def test_the_metadata_is_in_order(built: tuple[Path, Path]) -> None:
    _run([sys.executable, "-m", "twine", "check", "--strict", *built], built[0].parent)
    project = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert "version" not in project  # `keras_mp.__version__` is it
    (metadata,) = (name for name in zipfile.ZipFile(built[0]).namelist() if name.endswith(".dist-info/METADATA"))
    assert f"\nVersion: {keras_mp.__version__}\n" in zipfile.ZipFile(built[0]).read(metadata).decode()


def test_the_wheel_runs_the_quick_start(python: Path, tmp_path: Path) -> None:
    """All but the export, which needs TensorFlow."""
    block = re.findall(r"^```python\n(.*?)^```", _README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[0]
    lines = [line for line in block.splitlines() if "to_tf_dataset" not in line]
    (tmp_path / "quick_start.py").write_text("\n".join([*lines, "print(keras_mp.__file__)"]), encoding="utf-8")
    output = _run([python, "quick_start.py"], tmp_path)
    assert output.count("Epoch 2/2") == 1
    assert Path(output.split()[-1]).is_relative_to(python.parents[1])
    assert f"keras_mp {keras_mp.__version__}" in _run([python.parent / "keras-mp", "--version"], tmp_path)


def test_the_wheel_is_typed(python: Path, tmp_path: Path) -> None:
    pages = "\n".join(path.read_text(encoding="utf-8") for path in (_ROOT / "docs" / "api").glob("*.md"))
    listed = _MEMBERS.findall(pages)  # that they are public, and exist, is for tests/test_docs.py
    members = [f"keras_mp.{name}.{member.strip()}" for name, text in listed for member in text.split(",") if text]
    assert "keras_mp.PoolDataset.to_tf_dataset" in members
    names = [*(f"keras_mp.{name}" for name in [*keras_mp.__all__, "zip"]), *members]
    client = [
        "import keras_mp",
        'dataset = keras_mp.PoolDataset(range(8), abs, batch_size=4, cache="ram", workers="auto")',
        "with dataset as entered:",
        "    report: keras_mp.Report = entered.report()",
        "    advice: list[str] = report.advice",
        *(f"reveal_type({name})" for name in names),
    ]
    (tmp_path / "client.py").write_text("\n".join(client) + "\n", encoding="utf-8")
    arguments = ["--strict", "--python-executable", str(python), "--cache-dir", "cache", "client.py"]
    output = _run([sys.executable, "-m", "mypy", *arguments], tmp_path)
    revealed = re.findall(r'client\.py:\d+: note: Revealed type is "(.*)"', output)
    types = dict(zip(names, revealed, strict=True))
    assert not [name for name, kind in types.items() if kind == "Any"]
    assert "PoolDataset" in types["keras_mp.PoolDataset"]
