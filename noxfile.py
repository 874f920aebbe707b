"""Sessions for `nox`: the tests on the oldest and newest releases that pyproject.toml allows, and on Keras's source.

    nox -s versions                             every row of the README's table
    nox -s "versions(3.13-newest)"              one row
    nox -s versions -- tests/plan tests/memory  a part of the tests; the table says which
    KERAS=../keras nox -s "versions(main)"      with Keras from a checkout of its source, say its main branch
    nox -s package                              builds the wheel, installs it alone, and does what the README says

A Python that is not installed is skipped. What was run goes into `tests/versions.json`, and from there into the README.
"""

from __future__ import annotations

import os
import pathlib
import re
import tempfile

import nox

nox.needs_version = ">=2025.2.9"
nox.options.default_venv_backend = "uv|virtualenv"
nox.options.sessions = ["versions"]

_PROJECT = nox.project.load_toml("pyproject.toml")["project"]
_FAILURES = 1  # pytest's exit code where it ran, and a test failed


def _oldest() -> list[str]:
    """The oldest release that pyproject.toml allows of each package that keras_mp stands on."""
    needed = [*_PROJECT["dependencies"], *_PROJECT["optional-dependencies"]["tensorflow"]]
    return [requirement.replace(">=", "==") for requirement in needed]


@nox.session
@nox.parametrize(
    "python,releases",
    [
        nox.param("3.11", "oldest", id="3.11-oldest"),
        nox.param("3.12", "newest", id="3.12-newest"),
        nox.param("3.13", "newest", id="3.13-newest"),
        nox.param("3.11", "main", id="main"),
    ],
)
def versions(session: nox.Session, releases: str) -> None:
    """Runs the tests on one set of releases, and writes down what came of it."""
    environment = {}
    if releases == "main":
        keras = pathlib.Path(os.environ.get("KERAS", "")).resolve()
        if not (keras / "keras" / "src" / "version.py").is_file():
            session.skip(f"KERAS must be a checkout of Keras's source, got {os.environ.get('KERAS')!r}")
        environment["PYTHONPATH"] = str(keras)
    if releases == "oldest":
        session.install("--editable", ".[test]", *_oldest())
    else:  # first, so that nothing that only the tests need holds one of these back
        session.install("--upgrade", "keras", "numpy", "tensorflow")
        session.install("--editable", ".[test]")
    with tempfile.TemporaryDirectory() as folder:
        results = pathlib.Path(folder) / "results.xml"
        workers = ["--numprocesses", "auto", "--maxprocesses", "4", "--dist", "worksteal"]
        session.run(
            *("python", "-m", "pytest", "--junit-xml", str(results), *workers, *session.posargs),
            env=environment,
            success_codes=[0, _FAILURES],
        )
        # Exits with 1 where a test failed.
        session.run("python", "-m", "tests.versions", releases, str(results), *session.posargs, env=environment)


@nox.session
def package(session: nox.Session) -> None:
    """Builds what is published, and begins as a new user does: with the wheel and the README's first code."""
    readme = pathlib.Path("README.md").read_text(encoding="utf-8")
    (quick_start, *_) = re.findall(r"^```python\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    root = pathlib.Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        tools, empty = pathlib.Path(folder, "tools"), pathlib.Path(folder, "empty")
        for environment in (tools, empty):
            session.run("python", "-m", "venv", str(environment), external=True)
        pip = ["-m", "pip", "install", "--quiet"]
        python = str(tools / "bin" / "python")
        session.run(python, *pip, "build", "twine", external=True)
        session.run(python, "-m", "build", "--outdir", folder, str(root), external=True)
        wheel, sdist = (next(pathlib.Path(folder).glob(pattern)) for pattern in ("*.whl", "*.tar.gz"))
        session.run(python, "-m", "twine", "check", "--strict", str(wheel), str(sdist), external=True)
        python = str(empty / "bin" / "python")
        session.run(python, *pip, f"keras-mp[tensorflow] @ {wheel.as_uri()}", external=True)
        session.chdir(folder)
        pathlib.Path("quick_start.py").write_text(quick_start, encoding="utf-8")
        session.run(python, "quick_start.py", external=True)
