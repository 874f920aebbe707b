"""The README's table of releases says what was run, and nothing else."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest

from tests import versions

_RECORD = {
    "releases": "newest",
    "installed": {"python": "3.13.0", "keras": "3.15.1", "tensorflow": "2.21.0", "numpy": "2.4.6"},
    "tests": ["tests/plan", "tests/memory"],
    "passed": 7,
    "failed": 0,
    "skipped": 1,
    "date": "2026-01-02",
}


def _record(**changed: Any) -> dict[str, Any]:
    record: dict[str, Any] = copy.deepcopy(_RECORD)
    for name in ("python", "keras"):
        if name in changed:
            record["installed"][name] = changed.pop(name)
    return record | changed


def test_the_readme_shows_what_was_run() -> None:
    records = json.loads(versions.RECORDS.read_text(encoding="utf-8"))
    page = versions.README.read_text(encoding="utf-8")
    assert records
    assert versions.with_table(page, records) == page


def test_a_run_takes_the_place_of_the_one_before_on_the_same_releases() -> None:
    records = versions.add([], _record(failed=2))
    records = versions.add(records, _record(python="3.12.9"))
    records = versions.add(records, _record(releases="oldest", python="3.11.7"))
    records = versions.add(records, _record(python="3.13.5", tests=[]))
    assert [(each["releases"], each["installed"]["python"], each["failed"]) for each in records] == [
        ("oldest", "3.11.7", 0),
        ("newest", "3.12.9", 0),
        ("newest", "3.13.5", 0),
    ]


def test_the_table_says_which_tests_and_how_they_ended() -> None:
    made = versions.table([_record(failed=3), _record(releases="main", keras="3.16.0", tests=[])])
    first, second = made.splitlines()[2:4]
    assert first == "| 3.13.0 | 3.15.1 | 2.21.0 | 2.4.6 | part 1 | 7 | 1 | 3 | 2026-01-02 |"
    assert second == "| 3.13.0 | 3.16.0 (main branch) | 2.21.0 | 2.4.6 | all | 7 | 1 | 0 | 2026-01-02 |"
    assert "Part 1: `tests/plan`, `tests/memory`." in made


def test_counts_are_those_of_pytest(tmp_path: Path) -> None:
    code = """
        import pytest

        @pytest.fixture
        def broken():
            raise OSError

        def test_a(): pass
        def test_b(): pass
        def test_c(): assert False
        def test_d(broken): pass
        def test_e(): pytest.skip()
        """
    (tmp_path / "test_some.py").write_text(textwrap.dedent(code))
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    arguments = [sys.executable, "-m", "pytest", "-q", "--junit-xml", "results.xml", "test_some.py"]
    assert subprocess.run(arguments, cwd=tmp_path, capture_output=True, check=False).returncode == 1
    assert versions.counts(tmp_path / "results.xml") == {"passed": 2, "failed": 2, "skipped": 1}


def test_a_page_without_a_place_for_the_table_is_refused() -> None:
    with pytest.raises(ValueError, match="must hold"):
        versions.with_table("# A page\n", [])
