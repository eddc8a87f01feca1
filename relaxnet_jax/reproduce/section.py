"""The results of an experiment (tables, figures, verdicts), written as CSV and Markdown."""

from __future__ import annotations

import csv
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

from relaxnet_jax.data.files import atomic_path
from relaxnet_jax.reproduce.formats import number, with_deviation
from relaxnet_jax.reproduce.scores import Score
from relaxnet_jax.reproduce.verdict import RULE, Claim

SEEDS = "seeds"  # what the rows of most scores are
OURS = " (ours, not the paper's)"
VERDICTS = f"How verdicts are reached: {RULE}"  # appears once in a report of several pages
Cell = str | float | int | Score | None


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; a `Score` in a cell is shown as mean ± standard deviation over its rows.

    Attributes:
      title: shown above the table.
      columns: headings with units.
      rows: cells; None is shown as a dash.
      spread: what the rows of the scores are, "seeds" or "folds".
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    spread: str = SEEDS

    def markdown(self) -> str:
        """The table as Markdown, headings first."""
        lines = [f"**{self.title}**", ""] if self.title else []
        lines += [_row(self.columns), _row(["---"] * len(self.columns))]
        lines += [_row([shown(cell) for cell in row]) for row in self.rows]
        return "\n".join(lines)

    def csv_rows(self) -> list[list[str]]:
        """Headings and rows; a `Score` becomes its mean, deviation and number of rows."""
        scores = [
            any(isinstance(row[k], Score) for row in self.rows) for k in range(len(self.columns))
        ]
        head = []
        for name, is_score in zip(self.columns, scores):
            more = [f"{name}: standard deviation", f"{name}: {self.spread}"] if is_score else []
            head += [name, *more]
        rows = [head]
        for row in self.rows:
            cells = []
            for cell, is_score in zip(row, scores):
                if isinstance(cell, Score):
                    cells += [_raw(cell.mean), _raw(cell.deviation), str(cell.seeds)]
                else:
                    cells += [_raw(cell), "", ""] if is_score else [_raw(cell)]
            rows.append(cells)
        return rows


@dataclasses.dataclass(frozen=True)
class Section:
    """The page of an experiment.

    Attributes:
      name: name of the experiment.
      title: title of the page.
      intro: what was done.
      tables: see `Table`.
      claims: see `Claim`.
      figures: files beside the page, with captions.
      remarks: what a reader must know.
    """

    name: str
    title: str
    intro: str
    tables: Sequence[Table]
    claims: Sequence[Claim] = ()
    figures: Sequence[tuple[Path, str]] = ()
    remarks: Sequence[str] = ()

    @property
    def spread(self) -> str:
        """What the rows of the scores are; see `Table`."""
        return self.tables[0].spread

    def write(self, out: Path, provenance: Sequence[str]) -> list[Path]:
        """Writes NAME.csv and NAME.md; returns all files of the section.

        Args:
          out: the folder to write to.
          provenance: lines on the data, machines and command behind the results.
        """
        pages = [out / f"{self.name}.csv", out / f"{self.name}.md"]
        with (
            atomic_path(pages[0]) as temporary,
            temporary.open("w", newline="", encoding="utf-8") as file,
        ):
            writer = csv.writer(file)
            for index, table in enumerate(self.tables):
                if index:
                    writer.writerow([])
                writer.writerow([table.title])
                writer.writerows(table.csv_rows())
        with atomic_path(pages[1]) as temporary:
            temporary.write_text(self.markdown(provenance), encoding="utf-8")
        return [*pages, *(path for path, _ in self.figures)]

    def markdown(self, provenance: Sequence[str]) -> str:
        """The page as Markdown."""
        parts = [f"## {self.title}", self.intro]
        parts += [table.markdown() for table in self.tables]
        if self.claims:
            parts.append(claims_table(self.claims).markdown())
            parts.append(VERDICTS)
            if own := [f"- {c.text}: {c.rule}" for c in self.claims if c.rule]:
                parts.append("\n".join(["Specific rules:", "", *own]))
        parts += [f"![{caption}]({path.name})" for path, caption in self.figures]
        if self.remarks:
            parts.append("\n".join(f"- {remark}" for remark in self.remarks))
        parts.append("\n".join(f"- {line}" for line in provenance))
        return "\n\n".join(parts) + "\n"


def claims_table(claims: Sequence[Claim]) -> Table:
    """A table of claims, verdicts and reasons."""
    rows = [[c.text + OURS * c.ours, c.outcome.verdict, c.outcome.reason] for c in claims]
    return Table("", ("claim", "verdict", "because"), rows)


def shown(cell: Cell) -> str:
    """A cell formatted for people."""
    if isinstance(cell, Score):
        return with_deviation(cell.mean, cell.deviation)
    if cell is None:
        return "–"
    return cell if isinstance(cell, str) else str(cell) if isinstance(cell, int) else number(cell)


def _raw(cell: Cell) -> str:
    """A cell formatted for programs: all digits, empty without a finite value."""
    if cell is None or (isinstance(cell, float) and not math.isfinite(cell)):
        return ""
    return str(cell)


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
