"""The site is whole: every page can be reached, every link leads somewhere, every public name has its place in the API.

`mkdocs build --strict` says so too; this needs no mkdocs.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import keras_mp

_ROOT = Path(__file__).resolve().parents[1]
_DOCS = _ROOT / "docs"
_PAGES = sorted(_DOCS.rglob("*.md"))
_LINKING = [*_PAGES, *(_ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md"))]
_CODE = re.compile(r"^ *```.*?^ *```$|`[^`\n]+`", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\]\((?!https?:)([^)\s#]*)#?([^)\s]*)\)")
_API = "\n".join(path.read_text(encoding="utf-8") for path in sorted((_DOCS / "api").glob("*.md")))
_ENTRY = re.compile(r"^::: keras_mp\.(\w+)$(?:\n    options:\n      members: \[([^\]]*)\])?", re.MULTILINE)


def _nav() -> list[str]:
    config = (_ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    return re.findall(r"^ +- .*: (\S+)$", config.partition("\nnav:\n")[2], re.MULTILINE)


def _anchors(page: Path) -> set[str]:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def _broken_links(page: Path) -> list[str]:
    broken = []
    for target, anchor in _LINK.findall(_CODE.sub("", page.read_text(encoding="utf-8"))):
        path = (page.parent / target).resolve() if target else page
        if not path.is_file() or (anchor and anchor not in _anchors(path)):
            broken.append(f"{target}#{anchor}")
    return broken


def test_every_page_is_in_the_navigation_once() -> None:
    entries = _nav()
    pages = {path.relative_to(_DOCS).as_posix() for path in _PAGES}
    assert len(entries) == len(set(entries))
    assert pages <= set(entries)
    missing = [entry for entry in set(entries) - pages if not (_ROOT / entry).is_file()]
    assert not missing


@pytest.mark.parametrize("page", _LINKING, ids=lambda path: path.relative_to(_ROOT).as_posix())
def test_links_lead_somewhere(page: Path) -> None:
    assert not _broken_links(page)


def test_links_that_lead_nowhere_are_found(tmp_path: Path) -> None:
    (tmp_path / "there.md").write_text("# A page\n\n## It's here\n")
    page = tmp_path / "page.md"
    page.write_text("[a](there.md) [b](there.md#its-here) [c](gone.md)\n[d](there.md#gone) [e](#gone) `[f](code.md)`\n")
    assert _broken_links(page) == ["gone.md#", "there.md#gone", "#gone"]


def test_the_api_has_every_public_name_once() -> None:
    names = [name for name, _ in _ENTRY.findall(_API)]
    assert sorted(names) == sorted({*keras_mp.__all__, "zip"})


def test_what_the_api_says_of_a_class_exists() -> None:
    listed = [(name, member.strip()) for name, members in _ENTRY.findall(_API) for member in members.split(",")]
    assert ("PoolDataset", "to_tf_dataset") in listed
    missing = [(name, member) for name, member in listed if member and not hasattr(getattr(keras_mp, name), member)]
    assert not missing
