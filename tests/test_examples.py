"""The examples, run as a reader runs them, and the geometry of the satellite example."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

_ROOT = Path(__file__).resolve().parents[1]
_EXAMPLES = _ROOT / "examples"
_TIMEOUT_S = 280.0  # a minute on a quiet machine

pytestmark = pytest.mark.timeout(300)


def _run(name: str, *arguments: str) -> str:
    """Output and error output of the example, which must end with exit code 0."""
    done = subprocess.run(
        [sys.executable, _EXAMPLES / name, *arguments],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH")))),
            "COLUMNS": "120",
            "TF_CPP_MIN_LOG_LEVEL": "2",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_quickstart_trains_both_ways() -> None:
    output = _run("quickstart.py")
    assert output.count("Epoch 1/2") == 2
    assert output.count("Epoch 2/2") == 2
    assert output.count("16/16") >= 4
    assert "Traceback" not in output


def test_streams_reads_tars_lines_and_tables() -> None:
    output = _run("streams.py", "--epochs", "1", "--workers", "2")
    assert "9 tar files, 212 samples" in output
    assert "read failed after 12 samples of tiles-008.tar" in output
    padded, packed = (int(share) for share in re.findall(r"^(?:padded|packed): (\d+)%", output, re.MULTILINE))
    assert padded < packed
    assert "5 row groups, 225 rows" in output or "pyarrow is not installed" in output


def test_existing_pydataset_trains_the_same_with_workers() -> None:
    output = _run("existing_pydataset.py")
    assert output.count("Epoch 3/3") == 2
    losses = re.findall(r"^losses with(?:out)? workers: +(.*)$", output, re.MULTILINE)
    assert len(losses) == 2
    assert losses[0] == losses[1]
    assert len(losses[0].split()) == 3
    assert "equal: True" in output


def test_a_truncated_jpeg_is_left_out_and_named() -> None:
    output = _run("image_folder.py", "--epochs", "4", "--workers", "2")
    assert "Found 225 files belonging to 2 classes." in output
    assert "Epoch 4/4" in output
    truncated = re.search(r"^truncated: (.*)$", output, re.MULTILINE)
    left_out = re.findall(r"^left out:  \('\./(.*?)'.*$", output, re.MULTILINE)
    assert truncated is not None
    assert left_out == [truncated[1]]
    accuracies = [float(number) for number in re.findall(r"val_accuracy: ([\d.]+)", output)]
    assert max(accuracies) > 0.8  # the larger class is about half
    decoded = re.search(r"^decoded (\d+) times for (\d+) samples$", output, re.MULTILINE)
    assert decoded is not None
    # Four epochs of 180, and maybe some of a fifth; nothing of a truncated file can be kept.
    assert 180 <= int(decoded[1]) < 200
    assert int(decoded[2]) >= 4 * 180


def test_text_in_buckets_is_padded_and_compiled_less() -> None:
    pytest.importorskip("jax")
    output = _run("text_buckets.py")
    rows = dict(re.findall(r"^(with(?:out)? buckets) +(.*)$", output, re.MULTILINE))
    mixed, alike = rows["without buckets"].split(), rows["with buckets"].split()
    for column in (1, 2, 3):  # shapes, compilations, padding
        assert float(alike[column].rstrip("%")) < 0.7 * float(mixed[column].rstrip("%"))
    assert int(alike[1]) <= 6  # three buckets, and the last batch of each
    assert int(alike[2]) <= int(alike[1]) + 2


def test_satellite_reports_truncated_tiles_and_compares_four_loaders() -> None:
    arguments = ["--tiles", "64", "--epochs", "4", "--size", "32", "--truncated", "3", "--workers", "2"]
    output = _run("satellite.py", *arguments)
    assert output.count("Epoch 4/4") == 4

    rows = [re.split(r"\s*│\s*", line.strip("│ ")) for line in output.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == [
        "in-process",
        "Keras's own pool",
        "keras_mp, fit",
        "keras_mp, tf.data",
    ]
    if rows[1][1:] == ["-"] * 4:  # that pool forks a process that runs TensorFlow, and may hang; the example goes on
        del rows[1]
    for _, first, later, speed_up, _ in rows:
        assert float(first) > 0
        assert float(later) > 0
        assert re.fullmatch(r"\d+\.\d\dx", speed_up)
    assert all(failed == ("not told" if loader == "Keras's own pool" else "3") for loader, *_, failed in rows)

    reported = re.search(r"^Left out and reported: (.*)$", output, re.MULTILINE)
    assert reported is not None
    assert len(set(reported[1].split(", "))) == 3

    learned = re.search(
        r"tile lies: ([\d.]+)%; learned: ([\d.]+)%; mean error of a tile: ([\d.]+)$", output, re.MULTILINE
    )
    assert learned is not None
    assert 20 < float(learned[1]) < 80
    assert abs(float(learned[1]) - float(learned[2])) < 20
    assert float(learned[3]) < 0.2


@pytest.fixture(scope="module")
def satellite() -> dict[str, Any]:
    return runpy.run_path(str(_EXAMPLES / "satellite.py"))


def test_satellite_correction_is_the_affine_map_it_claims(satellite: dict[str, Any]) -> None:
    """A cubic spline reproduces a linear ramp, so the resampled ramp shows where each output pixel was taken from."""
    size, margin = 32, satellite["MARGIN"]
    side = size + 2 * margin
    row, column = np.mgrid[0:side, 0:side]
    angle = np.deg2rad(satellite["ROTATION_DEGREES"])
    shear = satellite["SHEAR"]
    v, u = np.mgrid[0:size, 0:size] - (size - 1) / 2  # offsets from the centre: rows down, columns right
    expected_row = np.cos(angle) * (v + shear * u) - np.sin(angle) * u + (side - 1) / 2
    expected_column = np.sin(angle) * (v + shear * u) + np.cos(angle) * u + (side - 1) / 2

    corrected = satellite["correct"](np.stack([1000 + 20 * row, 1000 + 20 * column]))

    counts = corrected / satellite["REFLECTANCE_PER_COUNT"]
    assert corrected.dtype == np.float32
    np.testing.assert_allclose(counts[0], 1000 + 20 * expected_row, atol=0.05)
    np.testing.assert_allclose(counts[1], 1000 + 20 * expected_column, atol=0.05)
    for positions in (expected_row, expected_column):
        assert positions.min() > 0, "an output pixel was made up"
        assert positions.max() < side - 1, "an output pixel was made up"


def test_satellite_tiles_are_real_and_training_and_validation_do_not_overlap(
    satellite: dict[str, Any], tmp_path: Path
) -> None:
    scene = satellite["read_scene"]()
    assert scene.shape == (4, 300, 300)
    satellite["cut_tiles"](tmp_path, 40, 64, 4)

    edge = scene.shape[-1] - (64 + 2 * satellite["MARGIN"])
    east = scene[:, :, edge:]
    mean, std = np.float32(0.1), np.float32(0.1)
    targets, broken = [], 0
    for path in sorted((tmp_path / "train").iterdir()):
        try:
            image, target = satellite["load_tile"](path, mean, std)
        except ValueError:
            broken += 1
            continue
        assert image.shape == (64, 64, 4)
        targets.append(target)
        assert not (east == np.load(path)[:, :1, -1:]).all(axis=0).any(), (
            "a training pixel lies in the validation strip"
        )
    assert broken == 4
    vegetation, water = np.array(targets).T
    # The western part of the scene is mixed: fields, bare soil, and a little open water.
    assert 0.05 < vegetation.mean() < 0.5
    assert vegetation.std() > 0.05
    assert 0 < water.max() < 0.05
    assert len(list((tmp_path / "val").iterdir())) == 10


def test_satellite_land_cover_follows_its_thresholds(satellite: dict[str, Any]) -> None:
    land_cover = satellite["land_cover"]
    # One pixel each of dense vegetation, bare soil and open water.
    blue_green_red_nir = np.array([[0.04, 0.06, 0.03, 0.30], [0.1, 0.12, 0.18, 0.22], [0.05, 0.05, 0.03, 0.01]])
    pixels = blue_green_red_nir.astype(np.float32).T.reshape(4, 1, 3)
    np.testing.assert_allclose(land_cover(pixels), [1 / 3, 1 / 3])
