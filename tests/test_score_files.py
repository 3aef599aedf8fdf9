"""Scores on disk: rows that come back, and what is left out of a damaged file."""

# ruff: noqa: F811

import csv

import pytest
from test_scores import data, lines_of, scored, truth  # noqa: F401

from sam2train.evaluate import copy_first_mask
from sam2train.metrics import TRAINED
from sam2train.score_files import RowsFile, read_scores
from sam2train.scores import SCORE_COLUMNS, difference


def test_rows_come_back_as_scores(data, tmp_path):
    file = RowsFile(tmp_path / "scores.csv", SCORE_COLUMNS)
    first, second = scored(data, copy_first_mask, step=0), scored(data, truth, step=5)
    file.add(first.objects)
    file.add(second.objects)
    with open(tmp_path / "scores.csv", newline="") as handle:
        rows = list(csv.DictReader(handle))
    for scores in (first, second):
        again = read_scores(rows, "val", TRAINED, scores.step, "again")
        assert again.means["J_and_F"] == pytest.approx(scores.means["J_and_F"])
        assert difference(again, again).value == 0
    # Resumed from step 0, what came after it comes again.
    resumed = RowsFile(tmp_path / "scores.csv", SCORE_COLUMNS, 4)
    assert {row["step"] for row in resumed.rows} == {"0"}


BROKEN_CELLS = {
    "cut short": lambda line: line[: line.rindex(b",")],
    "too long": lambda line: line + b",1,2",
    "step": lambda line: b"x" + line,
    "number": lambda line: line.replace(b"0.", b"o.", 3),
    "bytes": lambda line: b"\xff\x00" + line,
    "quote": lambda line: b'"' + line.replace(b",", b""),
}


@pytest.mark.parametrize("how", BROKEN_CELLS)
def test_broken_rows_are_told_and_left_out(data, tmp_path, how):
    path, said = tmp_path / "scores.csv", []
    file = RowsFile(path, SCORE_COLUMNS)
    file.add(scored(data, copy_first_mask, step=0).objects)
    lines = path.read_bytes().splitlines()
    last = -1 if how == "quote" else 3  # a quotation mark takes all that follows
    lines[last] = BROKEN_CELLS[how](lines[last])
    path.write_bytes(b"\n".join(lines) + b"\n")
    rows = RowsFile(path, SCORE_COLUMNS, 4, say=said.append).rows
    assert [row["object_id"] for row in rows] == [
        str(row["object_id"])
        for place, row in enumerate(file.rows)
        if place != (last - 1 if last > 0 else len(file.rows) - 1)
    ]
    assert "scores.csv: 1 of 12 rows are not as a run writes them" in said[0]


def test_a_file_with_other_headings_has_no_whole_row(tmp_path):
    said = []
    (tmp_path / "scores.csv").write_text("a,b\n1,2\n")
    assert RowsFile(tmp_path / "scores.csv", SCORE_COLUMNS, 4, say=said.append).rows == []
    assert "1 of 1 rows" in said[0]
