"""The scores of a run on disk: CSV files that grow with it, and scores again from their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sam2train import distributed
from sam2train.errors import UserError
from sam2train.files import write_rows
from sam2train.run_folder import Say, read_table
from sam2train.scores import Scores


def read_scores(
    rows: Iterable[Mapping[str, Any]],
    split: str,
    model: str,
    step: int,
    label: str,
    horizon: Iterable[Mapping[str, Any]] = (),
) -> Scores:
    """Scores again from the rows of `scores.csv`, of which means are made, and of `horizon.csv`;
    without frames."""

    def of_this(row: Mapping[str, Any]) -> bool:
        return (row["split"], row["model"], int(row["step"])) == (split, model, step)

    chosen = [row for row in rows if of_this(row)]
    curves = [
        {
            **row,
            "at": None if row["at"] in (None, "") else int(row["at"]),
            "value": float(row["value"]),
            "count": int(row["count"]),
        }
        for row in horizon
        if of_this(row)
    ]
    means = {
        name: float(np.mean([float(row[name]) for row in chosen]))
        for name in ("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall", "F_decay", "mIoU")
    }
    ids = [{name: str(row[name]) for name in ("video_id", "object_id")} for row in chosen]
    objects = [{**row, **names} for row, names in zip(chosen, ids, strict=True)]
    return Scores(label, model, step, means, objects, [], curves)


class RowsFile:
    """A CSV that grows with a run and is whole at any time.

    Args:
        last_step: of a resumed run, the last that was scored; rows of later steps are dropped, they
            come again. None starts anew.
        say: gets a line on rows that are not whole; they are left out.
    """

    def __init__(
        self,
        path: Path,
        columns: Sequence[str],
        last_step: int | None = None,
        *,
        say: Say = print,
    ):
        self.path, self.columns = path, tuple(columns)
        self.rows: list[Mapping[str, Any]] = []
        if last_step is None or not path.is_file():
            return
        try:
            _, rows = read_table(path, columns, say)
        except UserError as problem:
            say(f"{problem}; its rows are left out")
            return
        self.rows = [row for row in rows if int(row["step"]) <= last_step]

    def add(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Append rows and write the file."""
        self.rows += rows
        if distributed.is_main():
            write_rows(self.path, self.rows, self.columns)
