"""Where TensorFlow is not installed, everything but the export works, and that names what to install."""

from __future__ import annotations

import importlib.util
import sys
import venv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.support import run

_TESTS = Path(__file__).resolve().parent


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """The interpreter of a virtual environment with all that is installed here, but for TensorFlow."""
    folder = tmp_path / "environment"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    for path in map(Path, sys.path):
        if path.name in ("site-packages", "dist-packages"):
            for entry in path.iterdir():
                link = packages / entry.name
                if not entry.name.startswith("tensorflow") and entry.suffix != ".pth" and not link.exists():
                    link.symlink_to(entry)
    return folder / "bin" / "python"


@pytest.mark.parametrize("backend", ["jax", "torch"])
def test_all_but_the_export_works(backend: str, python: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    data = tmp_path / "data"
    for number in range(12):
        name = ("bright", "dark")[number % 2]
        (data / "images" / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8, 3), number, np.uint8)).save(data / "images" / name / f"{number}.png")
    for name in ("bad", "good"):
        (data / "texts" / name).mkdir(parents=True)
        (data / "texts" / name / "1.txt").write_text(f"a {name} one")
    script, quick_start = _TESTS / "scripts" / "without_tensorflow.py", _TESTS.parent / "examples" / "quickstart.py"
    done = run([python, script, quick_start, data], {"KERAS_BACKEND": backend}, timeout_s=150)
    lines = done.stdout.splitlines()
    said = {name: rest for name, colon, rest in (line.partition(": ") for line in lines) if colon}
    assert "Epoch 2/2" in lines  # of the quick start
    assert "to_tf_dataset() needs TensorFlow" in said["quick start"]
    assert "pip install 'keras-mp[tensorflow]'" in said["quick start"]
    assert said["images"] == "['bright', 'dark'] 6"
    assert said["texts"] == "[([b'a bad one', b'a good one'], [0, 1])]"
    assert said["lengths"] == "20"
    assert said["check"] == "0"
    assert said["installed"] == said["in workers"] == "False"
    assert said["loaded"] == f"False {backend}"
