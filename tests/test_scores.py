"""Rows and tables of scores: what is written is what was scored, beside its baselines."""

import csv
import io

import numpy as np
import pytest
from conftest import make_coco
from rich.console import Console

from sam2train.data_source import Frame, Video
from sam2train.datasets import COCODataset
from sam2train.evaluate import EvaluationConfig, TrackedFrame, TrackedVideo, copy_first_mask
from sam2train.metrics import COPY, TRAINED, VideoScores, measure
from sam2train.scores import (
    HORIZON_COLUMNS,
    SCORE_COLUMNS,
    RowsFile,
    after_absence,
    area_under_roc,
    bin_end,
    difference,
    frame_rows,
    horizon_rows,
    numbers,
    read_scores,
    roc,
    score,
    scores_table,
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


def tracked(truth, prediction, scores=None, *, prompt_frame=0, labelled=None) -> TrackedVideo:
    """One object "a": `truth` and `prediction` are the number of 4 pixels it has on each frame."""
    stacks = [np.arange(4)[None] < np.array(counts)[:, None] for counts in (truth, prediction)]
    frames = [
        Frame(None, {}, labelled is None or t in labelled)  # nobody reads the picture
        for t in range(len(truth))
    ]
    video = Video("v", (1, 4), frames, ["a"])
    truth, prediction = (stack[video.labelled, None] for stack in stacks)
    return TrackedVideo(
        video=video,
        prompts=[{"object_id": "a", "frame_index": prompt_frame}],
        measures={"a": measure(prediction, truth)},
        scores=VideoScores((), ()),
        object_scores={} if scores is None else {"a": np.array(scores, np.float32)},
    )


def values(rows, metric):
    return {row["at"]: (row["value"], row["count"]) for row in rows if row["metric"] == metric}


def test_rows_begin_after_the_prompt_and_keep_to_labelled_frames():
    video = tracked([0, 4, 4, 2, 4, 4], [0, 4, 2, 2, 4, 4], prompt_frame=1, labelled={1, 2, 3, 5})
    rows = frame_rows(video)
    assert [row["frame"] for row in rows] == [2, 3, 5]
    assert [row["since_prompt"] for row in rows] == [1, 2, 4]
    assert [row["J"] for row in rows] == [0.5, 1, 1]
    assert [row["area"] for row in rows] == [0.5, 0.5, 1]
    assert {row["object_score"] for row in rows} == {None}


def test_j_by_frames_since_the_prompt():
    #                 prompt, 1, 2, 3, 4, 5
    rows = frame_rows(tracked([4, 4, 4, 4, 0, 4], [4, 4, 2, 1, 4, 0]))
    rows += [{**row, "object_id": "b", "J": 0.0} for row in rows if row["frame"] < 3]
    curve = values(horizon_rows(rows), "horizon/J")
    # 3 frames on: a quarter; 4 frames on nothing is visible; 5 frames on: lost.
    assert curve == {1: (0.5, 2), 2: (0.25, 2), 4: (0.25, 1), 8: (0.0, 1)}


def test_absences_end_with_the_frames_that_count_as_their_return():
    frames = np.array([1, 2, 3, 5, 6, 7, 8, 9, 10, 11, 12])
    visible = np.array([1, 0, 0, 1, 0, 1, 1, 1, 1, 1, 1], bool)
    none = (None, None)
    assert after_absence(frames, visible) == [
        *(none, none, none, (3, 5), none),  # gone at 2, back at 5; gone again at 6
        *[(1, 7)] * 5,
        none,
    ]


def test_recall_after_an_absence_is_a_mean_over_returns():
    #          gone at 1-3, back at 4-5, gone at 6, back at 7
    rows = frame_rows(tracked([4, 0, 0, 0, 4, 4, 0, 4], [4, 0, 0, 0, 4, 1, 0, 4]))
    found = values(horizon_rows(rows), "horizon/recall_after_absence")
    assert found == {1: (1.0, 1), 4: (0.5, 1)}


def test_false_positives_and_the_object_score():
    rows = horizon_rows(
        frame_rows(tracked([4, 4, 0, 0, 4], [4, 4, 2, 0, 4], [np.nan, 3, 1, -2, 0.5]))
    )
    assert numbers(rows) == {
        "horizon/false_positives": 0.5,
        "horizon/false_positive_area": 0.25,
        "horizon/object_score_auc": 0.75,  # 3 beats both, 0.5 beats one of two
        "horizon/absence_recall": 0.5,  # of 1 and -2
        "horizon/num_absent": 2,
        "horizon/false_absences": 0,
        "horizon/num_visible": 2,
    }
    assert values(rows, "horizon/object_score_auc")[None][1] == 4


def test_the_object_score_at_0_where_sam2_decides():
    """A score of 0 itself is one of absence; the prompted frame and copies without scores do not
    count."""
    truth = [4, 4, 4, 4, 4, 0, 0, 0]
    video = tracked(truth, truth, [-5, 2, 0, -1, 0.1, 0, -3, 0.1])
    rows = horizon_rows(frame_rows(video) + frame_rows(tracked(truth, truth)))
    assert values(rows, "horizon/false_absences") == {None: (0.5, 4)}
    assert values(rows, "horizon/absence_recall") == {None: (pytest.approx(2 / 3), 3)}


@pytest.mark.parametrize(
    ("truth", "there", "missing"),
    [
        ([4, 4, 4, 4], "horizon/false_absences", "horizon/absence_recall"),
        ([4, 0, 0, 0], "horizon/absence_recall", "horizon/false_absences"),
    ],
)
def test_frames_of_one_kind_have_their_share_and_the_other_no_number(truth, there, missing):
    rows = horizon_rows(frame_rows(tracked(truth, truth, [9, -1, 0, 1])))
    found = numbers(rows)
    assert found[there] == pytest.approx(2 / 3)
    assert not {missing, "horizon/object_score_auc"} & found.keys()
    assert all(np.isfinite(value) for value in found.values())
    assert values(rows, there)[None][1] == 3


def test_what_a_video_does_not_ask_is_left_out():
    rows = horizon_rows(frame_rows(tracked([4, 4, 4], [4, 4, 4])))
    assert {row["metric"] for row in rows} == {"horizon/J"}
    assert horizon_rows([]) == []


@pytest.mark.parametrize(("frames", "end"), [(1, 1), (2, 2), (3, 4), (4, 4), (5, 8), (1000, 1024)])
def test_bins_double(frames, end):
    assert bin_end(frames) == end


def test_the_area_is_that_under_the_roc_curve():
    rng = np.random.default_rng(0)
    positive, negative = rng.integers(0, 6, 40), rng.integers(-2, 4, 30)  # with ties
    false, true = roc(positive, negative)
    assert (false[0], true[0], false[-1], true[-1]) == (0, 0, 1, 1)
    area = np.sum(np.diff(false) * (true[1:] + true[:-1]) / 2)
    pairs = np.mean([(p > n) + (p == n) / 2 for p in positive for n in negative])
    assert area_under_roc(positive, negative) == pytest.approx(area) == pytest.approx(pairs)


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
