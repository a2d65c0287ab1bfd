"""The result of `diagnose`: data, a table, a figure and an HTML page."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from textwrap import fill
from typing import Any

from anybatch.core.files import finite, write_text
from anybatch.core.text_tables import text_table
from anybatch.evaluation.diagnosis.layer_noise import LayerNoise
from anybatch.evaluation.diagnosis.outputs import ExampleNorm
from anybatch.evaluation.diagnosis.reading import HEAD, Reading, Word, cells, example_cells, word

_WIDTH = 80  # of what is printed


@dataclass(frozen=True)
class Diagnosis:
    """The result of `diagnose`; print it for a table.

    Attributes:
        layers: One `LayerNoise` per norm, in the order of the network.
        batch_size: Examples in a batch.
        batches: Batches seen.
        train_loss: Mean loss with the batches' statistics; None without a loss.
        eval_loss: Mean loss of the same batches in evaluation mode; None without a loss or where
            running statistics are as they started.
        reading: What the numbers say.
        notes: What else a reader must know.
        others: Norms that take statistics from each example alone, as group and instance norm do.
    """

    layers: tuple[LayerNoise, ...]
    batch_size: int
    batches: int
    train_loss: float | None
    eval_loss: float | None
    reading: Reading
    notes: tuple[str, ...] = ()
    others: tuple[ExampleNorm, ...] = ()

    def word(self, layer: LayerNoise) -> Word:
        """The reading of one norm."""
        return word(layer)

    def rows(self) -> list[tuple[str, tuple[str, ...]]]:
        """The reading of each norm with the texts of its row in the table."""
        others = [("example", example_cells(norm)) for norm in self.others]
        return [*((word(layer), cells(layer)) for layer in self.layers), *others]

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain lists and dictionaries, ready for json.

        Returns:
            A dictionary; numbers that are not finite are None.
        """
        layers = [{**layer.to_dict(), "reading": word(layer)} for layer in self.layers]
        reading = {**asdict(self.reading), "options": dict(self.reading.options)}
        rest = {n: getattr(self, n) for n in ("batch_size", "batches", "train_loss", "eval_loss")}
        others = [asdict(norm) for norm in self.others]
        norms = {"layers": layers, "others": others}
        found = {**rest, "reading": reading, "notes": self.notes, **norms}
        return finite(found)  # type: ignore[no-any-return]

    def table(self) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
        """Head and rows of a narrow table: the noise alone, and no column of nothing."""
        titles = (title.replace("variance", "var") for title in HEAD[4:])
        lines = [(HEAD[0], "acts as", *titles)]
        for _, (name, _, values, acts_as, *rest) in self.rows():
            short = acts_as if acts_as == "-" else f"{acts_as} of {values}"
            lines.append((name, short, *(text.partition(" (")[0] for text in rest)))
        kept = [k for k in range(len(lines[0])) if any(line[k] != "-" for line in lines[1:])]
        head, *rows = (tuple(line[k] for k in kept) for line in lines)
        return head, rows

    def __str__(self) -> str:
        head, rows = self.table()
        said = [fill(text, _WIDTH) for text in (*self.reading.sentences, *self.notes)]
        return "\n".join([text_table(head, rows, _WIDTH, (0, len(head) - 1)), "", *said])

    def plot(self, path: str | Path) -> Path:
        """Write a figure of the noise of every norm, and the distributions of the noisiest.

        Args:
            path: of the file; its ending says which kind (.png, .svg, .pdf).

        Returns:
            The path.

        Raises:
            ImportError: Matplotlib is missing.
        """
        from anybatch.evaluation.diagnosis.report import figure
        from anybatch.evaluation.figures import save

        save(figure(self.layers), Path(path))
        return Path(path)

    def report(self, path: str | Path) -> Path:
        """Write all of it as one HTML file that needs no other.

        Args:
            path: of the file.

        Returns:
            The path.

        Raises:
            ImportError: Matplotlib or Jinja is missing.
        """
        from anybatch.evaluation.diagnosis.report import page

        write_text(Path(path), page(self, HEAD, self.rows()))
        return Path(path)
