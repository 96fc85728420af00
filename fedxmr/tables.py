"""Tables of results, in Markdown and LaTeX."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from tabulate import LATEX_ESCAPE_RULES, tabulate


@dataclass(frozen=True)
class Table:
    """Cells as they are printed, under a caption."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """For GitHub and most others."""
        cells = [[cell.replace("|", "\\|") for cell in row] for row in (self.head, *self.rows)]
        return f"{self.caption}\n\n{tabulate(cells[1:], cells[0], 'github', disable_numparse=True)}\n"

    def latex(self) -> str:
        """A `table` float for the package booktabs."""
        body = tabulate(self.rows, self.head, "latex_booktabs", disable_numparse=True)
        caption = "".join(LATEX_ESCAPE_RULES.get(character, character) for character in self.caption)
        return f"\\begin{{table}}\n\\caption{{{caption}}}\n{body}\n\\end{{table}}\n"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation, for a table."""
    return f"{fmean(values):.3f}" + (f" ± {stdev(values):.3f}" if len(values) > 1 else "")
