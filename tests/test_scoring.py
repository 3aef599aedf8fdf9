"""Rows and tables of scores: what is written is what was scored, beside its baselines."""

import csv
import io
from functools import partial

import pytest
from conftest import make_coco
from rich.console import Console

from sam2train.datasets import COCODataset, DatasetConfig
from sam2train.evaluate import EvaluationConfig, TrackedFrame, copy_first_mask
from sam2train.metrics import COPY, TRAINED
from sam2train.scoring import (
    HORIZON_COLUMNS,
    SCORE_COLUMNS,
    RowsFile,
    difference,
    read_scores,
    score,
    scores_table,
    shared_split_warning,
)

SIZE = (48, 64)


@pytest.fixture
def data(tmp_path):
    """Six videos; object 2 of the first is absent on frames 2 and 3."""
    path = make_coco(tmp_path, num_videos=6, num_frames=6, absent=[(1, 2, 2), (1, 3, 2)])
    return COCODataset(path, SIZE, video_clip_length=4, prompt_types=["mask"])


def truth(dataset, video, prompts):
    """A tracker that is always right."""
    for t in range(len(video.frames)):
        masks = {o: dataset.read_mask(video, t, o) for o in video.object_ids}
        yield TrackedFrame(masks, {o: 5.0 if m.any() else -5.0 for o, m in masks.items()})


def scored(data, track, model=TRAINED, step=7):
    config = EvaluationConfig()
    return score(track, data, config, split="val", model=model, step=step, seed=0, label=model)


def test_a_tracker_that_is_right_scores_one(data):
    scores = scored(data, truth)
    assert scores.means["J_and_F"] == 1
    assert len(scores.objects) == 12
    for row in scores.objects:
        assert set(row) == set(SCORE_COLUMNS)
        assert (row["step"], row["split"], row["model"]) == (7, "val", TRAINED)
        assert (row["J"], row["F"], row["frame_policy"]) == (1, 1, "after_prompt")
        assert (row["prompt"], row["prompt_frame"], row["num_frames"]) == ("mask", 0, 5)
    horizon = {(row["metric"], row["at"]): row["value"] for row in scores.horizon}
    assert set(scores.horizon[0]) == set(HORIZON_COLUMNS)
    assert horizon["horizon/recall_after_absence", 2] == 1
    assert horizon["horizon/false_positives", None] == 0
    assert horizon["horizon/object_score_auc", None] == 1
    assert horizon["horizon/absence_recall", None] == 1
    assert horizon["horizon/false_absences", None] == 0


def test_copying_the_first_mask_falls_behind(data):
    right, copied = scored(data, truth), scored(data, copy_first_mask, COPY, 0)
    assert 0 < copied.means["J_and_F"] < 1
    assert copied.objects[0]["model"] == COPY
    apart = difference(copied, right)
    assert apart.value == pytest.approx(1 - copied.means["J_and_F"])
    assert apart.low > 0
    assert (apart.num, apart.unit) == (6, "video")
    # Nobody says that the object is gone: the copy stays on both frames.
    horizon = {row["metric"]: row["value"] for row in copied.horizon}
    assert horizon["horizon/false_positives"] == 1
    assert "horizon/object_score_auc" not in horizon


def test_the_table_has_an_interval_with_every_difference(data):
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(
        scores_table("title", [scored(data, truth), scored(data, copy_first_mask, COPY, 0)])
    )
    text = console.export_text()
    assert "J&F" in text
    assert "1.000" in text
    assert "(6 videos)" in text
    assert "[+" in text


def lines_of(table) -> dict[str, list[str]]:
    console = Console(width=120, file=io.StringIO())
    console.print(table)
    found = [
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in console.file.getvalue().splitlines()
        if line.startswith("│")
    ]
    return {heading: cells for heading, *cells in found if heading}


def test_the_table_says_what_the_object_score_says_at_0(data, tmp_path):
    rows = [scored(data, truth), scored(data, copy_first_mask, COPY, 0)]
    lines = lines_of(scores_table("title", rows))
    assert lines["recall of absence"] == ["1.000 (n=2)", ""]
    assert lines["false absences"] == ["0.000 (n=58)", ""]
    assert lines["object score AUC"] == ["1.000 (n=60)", ""]
    assert not any("score" in heading for heading in lines_of(scores_table("title", rows[1:])))

    # From the files the same comes back; those of older runs have no such rows.
    file = RowsFile(tmp_path / "horizon.csv", HORIZON_COLUMNS)
    file.add(rows[0].horizon)
    again = RowsFile(tmp_path / "horizon.csv", HORIZON_COLUMNS, 7).rows
    back = read_scores(rows[0].objects, "val", TRAINED, 7, "again", again)
    assert [{**row, "step": int(row["step"])} for row in back.horizon] == rows[0].horizon
    assert lines_of(scores_table("title", [back]))["object score AUC"] == ["1.000 (n=60)"]
    old = [row for row in again if "absen" not in row["metric"] or "recall_after" in row["metric"]]
    assert len(old) < len(again)
    lines = lines_of(
        scores_table("title", [read_scores(rows[0].objects, "val", TRAINED, 7, "again", old)])
    )
    assert lines["object score AUC"] == ["1.000 (n=60)"]
    assert not any("absen" in heading for heading in lines)


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
    assert "scores.csv: 1 of 12 rows are not as this run wrote them" in said[0]


def test_a_file_with_other_headings_has_no_whole_row(tmp_path):
    said = []
    (tmp_path / "scores.csv").write_text("a,b\n1,2\n")
    assert RowsFile(tmp_path / "scores.csv", SCORE_COLUMNS, 4, say=said.append).rows == []
    assert "1 of 1 rows" in said[0]


def test_one_split_for_both_is_warned_of():
    build = partial(DatasetConfig, data_path="train.json", val_path="a/val.json")
    assert shared_split_warning(build(test_path=None)) is None
    assert shared_split_warning(build(test_path="a/test.json")) is None
    assert "too high" in shared_split_warning(build(test_path="a/../a/val.json"))
