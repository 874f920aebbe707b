"""`Report`: the numbers of a dataset and what they mean, on a terminal, in a notebook, in a file."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_mp.report import page, rows
from keras_mp.report.advice import advise
from keras_mp.report.footprint import Footprint
from keras_mp.stats import Stats, Training

if TYPE_CHECKING:
    import rich.console

_WIDTH = 110  # of the text, where no terminal says how wide it is


@dataclasses.dataclass(frozen=True)
class Report:
    """Whether the training waits for its data, why, and how many workers would do.

    `print(report)` shows tables, and a notebook shows them with plots. docs/bottleneck.md says how to read them.

    Attributes:
        name: the dataset, in words.
        stats: its numbers.
        training: what `PipelineMonitor` measured of the last epoch of `fit`; None where it was not used.
        cores: that this process and its workers may use.
        footprint: memory that the workers have of their own; None where that is not known.
    """

    name: str
    stats: Stats
    training: Training | None
    cores: int
    footprint: Footprint | None = None

    @property
    def advice(self) -> list[str]:
        """What the numbers say, in sentences, the most important first."""
        return advise(self.stats, self.training, self.cores, self.footprint)

    def _facts(self) -> list[tuple[str, str]]:
        return rows.facts(self.stats, self.training, self.cores, self.footprint)

    def html(self) -> str:
        """The report as a piece of HTML, as a notebook shows it: tables, and plots as inline SVG."""
        return page.fragment(
            self.name,
            self.advice,
            self._facts(),
            self.stats,
            self.training,
            self.cores,
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Writes the report as one HTML file that needs no other.

        Args:
            path: where to; must end in ".html" or ".htm".

        Returns:
            The path of the file.

        Raises:
            TypeError, ValueError: `path` is no path, or ends in something else.
            OSError: it cannot be written.
        """
        if not isinstance(path, str | os.PathLike):
            raise TypeError(f"path must be a path such as 'report.html', got {type(path).__name__}")
        target = Path(path)
        if target.suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"path must end in .html, as HTML is what a report is saved as, got {str(target)!r}")
        target.write_text(page.document(self.name, self.html()), encoding="utf-8")
        return target

    def _repr_html_(self) -> str:
        return self.html()

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=_WIDTH, color_system=None, force_jupyter=False).print(self)
        return text.getvalue().rstrip()

    def __rich__(self) -> rich.console.Group:
        """What a `rich` console prints."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        parts: list[Any] = [Text(self.name, style="bold"), Text("")]
        advice = Table.grid(padding=(0, 1))
        for sentence in self.advice:
            advice.add_row("→", Text(sentence))
        parts.append(advice)
        parts += [
            Text(""),
            _table(["", ""], self._facts(), headed=False),
        ]
        if stages := rows.stage_rows(self.stats):
            parts += [Text(""), _table(["stage", "total", "a batch", "share", "slowest samples"], stages)]
        if workers := rows.worker_shares(self.stats, self.training):
            lines = [
                (name, "█" * round(20 * share) + "░" * (20 - round(20 * share)), f"{share:.0%}")
                for name, share in workers
            ]
            parts += [Text(""), _table(["worker", "", "busy"], lines)]
        return Group(*parts)


def _table(columns: list[str], lines: Any, headed: bool = True) -> Any:
    """A table whose cells are text, whatever brackets they hold."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD if headed else None, show_header=headed, pad_edge=False)
    for column in columns:
        is_number = column in ("total", "a batch", "share", "busy")
        table.add_column(column, justify="right" if is_number else "left", no_wrap=is_number)
    for line in lines:
        table.add_row(*map(Text, line))
    return table
