"""The README's table of releases that the tests were run on: from pytest's results to `versions.json` and the table.

Sessions of the noxfile call `python -m tests.versions RELEASES RESULTS.xml [PYTEST ARGUMENT ...]`; without arguments,
the table is written again.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import platform
import re
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[1]
RECORDS = Path(__file__).with_suffix(".json")
README = _ROOT / "README.md"
_BEGIN, _END = "<!-- versions: written by nox -->\n", "<!-- versions end -->\n"
_PACKAGES = ("keras", "tensorflow", "numpy")

Record = dict[str, Any]


def installed() -> dict[str, str]:
    """What this interpreter runs with, by package. Keras may be a checkout of its source, which says what it is."""
    found = {"python": platform.python_version()}
    found |= {package: importlib.metadata.version(package) for package in _PACKAGES}
    keras = importlib.util.find_spec("keras")
    if keras is None or keras.origin is None:
        raise ModuleNotFoundError("Keras is not installed here, and not on PYTHONPATH")
    said = (Path(keras.origin).parent / "src" / "version.py").read_text(encoding="utf-8")
    return found | {"keras": re.findall(r'^__version__ = "(.*)"$', said, re.MULTILINE)[0]}


def counts(results: Path) -> dict[str, int]:
    """How many tests passed, failed and were skipped, from pytest's JUnit report."""
    suites = list(xml.etree.ElementTree.parse(results).getroot().iter("testsuite"))
    total, failures, errors, skipped = (
        sum(int(suite.attrib[key]) for suite in suites) for key in ("tests", "failures", "errors", "skipped")
    )
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def add(records: Sequence[Record], new: Record) -> list[Record]:
    """The records with a new one in place of what was recorded of the same releases on the same Python."""

    def key(record: Record) -> tuple[str, tuple[int, ...]]:
        return record["releases"], tuple(map(int, record["installed"]["python"].split(".")[:2]))

    kept = [record for record in records if key(record) != key(new)]
    order = ("oldest", "newest", "main")
    return sorted([*kept, new], key=lambda record: (order.index(record["releases"]), key(record)[1]))


def table(records: Sequence[Record]) -> str:
    """The records in Markdown, and below them which tests were run."""
    parts: list[str] = []
    lines = ["| Python | Keras | TensorFlow | NumPy | tests | passed | skipped | failed | on |"]
    lines.append("|---|---|---|---|---|---:|---:|---:|---|")
    for record in records:
        part = "all"
        if record["tests"]:
            names = ", ".join(f"`{name}`" for name in record["tests"])
            if names not in parts:
                parts.append(names)
            part = f"part {parts.index(names) + 1}"
        versions = record["installed"]
        keras = versions["keras"] + (" (main branch)" if record["releases"] == "main" else "")
        cells = [versions["python"], keras, versions["tensorflow"], versions["numpy"], part]
        cells += [str(record[key]) for key in ("passed", "skipped", "failed")]
        lines.append(f"| {' | '.join([*cells, record['date']])} |")
    lines += [f"\nPart {number}: {names}." for number, names in enumerate(parts, 1)]
    return "\n".join(lines) + "\n"


def with_table(page: str, records: Sequence[Record]) -> str:
    """The page with the table between its marks."""
    before, begin, rest = page.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not (begin and end):
        raise ValueError(f"the page must hold {_BEGIN!r} and {_END!r}")
    return f"{before}{begin}\n{table(records)}\n{end}{after}"


def main(arguments: Sequence[str]) -> int:
    """Records a run, if one is given, and writes the table."""
    records: list[Record] = json.loads(RECORDS.read_text(encoding="utf-8")) if RECORDS.is_file() else []
    failed = 0
    if arguments:
        releases, results, *tests = arguments
        outcome = counts(Path(results))
        failed = outcome["failed"]
        date = datetime.date.today().isoformat()
        new = {"releases": releases, "installed": installed(), "tests": tests, **outcome, "date": date}
        records = add(records, new)
        RECORDS.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    README.write_text(with_table(README.read_text(encoding="utf-8"), records), encoding="utf-8")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
