"""`--prompt-matrix`: clicks that correct, noise of a known size, equal random numbers; files."""

import json

import numpy as np
import pytest
import torch
from conftest import make_coco
from test_eval_checkpoint import call, table, write_small

from sam2train import eval_prompts
from sam2train.datasets import COCODataset
from sam2train.eval_prompts import (
    NOISE,
    Cell,
    CellPrompts,
    all_cells,
    next_click,
    segment_frame,
)
from sam2train.model import SAM2Model
from sam2train.prompts import mask_center, mask_to_box

SIZE = (64, 64)


def rectangle(left, top, right, bottom, size=SIZE):
    mask = np.zeros(size, bool)
    mask[top : bottom + 1, left : right + 1] = True
    return mask


@pytest.fixture
def data(tmp_path):
    return COCODataset(make_coco(tmp_path, num_frames=3, size=SIZE), SIZE)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = "sam2train/configs/sam2.1_hiera_demo.yaml"
    return SAM2Model(None, config, device="cpu", image_size=64).load().train()


def draw(model, data, *cell):
    return CellPrompts(model, Cell(*cell))(data, data.videos[0], np.random.default_rng(5))


def test_the_matrix_has_every_prompt_clean_and_moved():
    cells = all_cells()
    names = ["1 click", "3 clicks", "5 clicks", "bbox", "mask"]
    assert list(dict.fromkeys(cell.name for cell in cells)) == names
    assert len(cells) == len(set(cells)) == 5 * len(NOISE)
    assert NOISE[0] == 0


def test_the_first_click_is_the_middle_of_the_object(model, data):
    for prompt in draw(model, data, "point", 1, 0.0):
        mask = data.read_mask(data.videos[0], 0, prompt["object_id"], SIZE)
        np.testing.assert_array_equal(prompt["points"], mask_center(mask)[None])
        assert prompt["labels"].tolist() == [1]


def test_further_clicks_fall_on_what_the_model_gets_wrong(model, data, monkeypatch):
    """A model that first finds the left half only, then everything and a blob elsewhere."""
    video = data.videos[0]
    truth = data.read_mask(video, 0, 1, SIZE)
    left, _, right, _ = mask_to_box(truth).astype(int)
    half = truth.copy()
    half[:, (left + right) // 2 :] = False
    blob = truth | rectangle(50, 50, 60, 60)
    answers = {1: half, 2: blob, 3: truth}
    monkeypatch.setattr(
        eval_prompts,
        "segment_frame",
        lambda model, data, video, prompt, bf16: answers[len(prompt["labels"])],
    )
    monkeypatch.setattr(eval_prompts, "first_views", lambda data, video: iter([(1, 0, truth)]))
    (prompt,) = draw(model, data, "point", 5, 0.0)
    assert prompt["labels"].tolist() == [1, 1, 0]  # nothing is wrong after three
    missed = truth & ~half
    x, y = prompt["points"][1].astype(int)
    assert missed[y, x]
    assert prompt["points"][2].tolist() == [55, 55]
    assert prompt["points"].dtype == np.float32
    assert prompt["labels"].dtype == np.int32


def test_the_model_answers_and_is_left_as_it_was(model, data):
    (prompt, _) = draw(model, data, "bbox", 0, 0.0)
    mask = segment_frame(model, data, data.videos[0], prompt)
    assert (mask.shape, mask.dtype) == (SIZE, bool)
    assert model.training
    three = draw(model, data, "point", 3, 0.0)
    assert {len(prompt["points"]) for prompt in three} <= {2, 3}


@pytest.mark.parametrize("kind", [("point", 1), ("bbox", 0), ("mask", 0)])
def test_noise_grows_with_its_strength_along_one_direction(model, data, kind):
    """The same random numbers at every strength: scores differ by the strength only."""
    clean, weak, strong = (draw(model, data, *kind, noise) for noise in (0.0, 0.1, 0.2))
    assert draw(model, data, *kind, 0.1)[0]["points"].tolist() == weak[0]["points"].tolist()
    for a, b, c in zip(clean, weak, strong, strict=True):
        if kind[0] == "mask":
            assert a["mask"].sum() > 0
            assert not np.array_equal(a["mask"], c["mask"])
        else:
            inside = (c["points"] > 0) & (c["points"] < np.array(SIZE)[::-1] - 1)  # not held back
            assert inside.any()
            twice = 2 * (b["points"] - a["points"])
            np.testing.assert_allclose(
                twice[inside], (c["points"] - a["points"])[inside], atol=1e-4
            )
            assert not np.array_equal(a["points"], b["points"])


def test_nothing_wrong_is_no_click():
    mask = rectangle(5, 5, 9, 9)
    assert next_click(mask, mask.copy()) is None


@pytest.mark.parametrize("shift", [(0, 3), (4, 0), (-5, 2), (0, 40)])
@pytest.mark.parametrize("box", [(12, 10, 31, 25), (0, 0, 20, 40), (30, 30, 30, 30)])
def test_a_click_on_an_error_is_that_of_sam2(box, shift):
    """The predicted mask is the true one, moved: it misses a strip and adds another."""
    sam2_utils = pytest.importorskip("sam2.modeling.sam2_utils")
    mask = rectangle(*box)
    guess = np.roll(mask, shift, (0, 1))
    pair = [torch.from_numpy(part)[None, None] for part in (mask, guess)]
    points, labels = sam2_utils.get_next_point(*pair, "center")
    click = next_click(mask, guess)
    assert (click[0].tolist(), click[1]) == (points[0, 0].tolist(), labels[0, 0])


def test_changes_by_noise_have_their_intervals(tmp_path, capsys):
    write_small(tmp_path)
    five = make_coco(tmp_path / "five", num_videos=5, num_frames=2, size=(64, 64))
    words = ("--prompt-matrix", "base", "--run-dir", tmp_path / "out", f"dataset.val_path={five}")
    assert call(tmp_path, *words) == 0
    for row in table(tmp_path / "out" / "prompt_matrix.csv"):
        assert (row["change"] == "") == (row["noise"] == "0.0")
        if row["change"]:
            low, change, high = (float(row[f"change{end}"]) for end in ("_low", "", "_high"))
            assert low <= change <= high
    assert "[+" in capsys.readouterr().out


def test_the_prompt_matrix(tmp_path, capsys):
    write_small(tmp_path)
    out = tmp_path / "out"
    words = ("--prompt-matrix", "base", "--run-dir", out)
    assert call(tmp_path, *words, "evaluation.max_videos=1", "evaluation.max_frames=2") == 0
    rows = table(out / "prompt_matrix.csv")
    kinds = {(row["prompt"], row["clicks"], row["noise"]) for row in rows}
    assert len(kinds) == len(rows) == 20
    assert {clicks for prompt, clicks, _ in kinds if prompt == "point"} == {"1", "3", "5"}
    assert {noise for _, _, noise in kinds} == {"0.0", "0.1", "0.2", "0.4"}
    assert all(row["change"] == "" for row in rows)  # one video has no interval
    assert (out / "prompt_matrix.png").stat().st_size > 10_000
    assert len(table(out / "prompt_matrix_objects.csv")) == 20 * len(
        {row["object_id"] for row in table(out / "prompt_matrix_objects.csv")}
    )
    summary = json.loads((out / "summary.json").read_text())
    assert summary["matrix/base/bbox/noise_0.0/J_and_F"] == pytest.approx(
        float(next(r for r in rows if r["prompt"] == "bbox")["J_and_F"])
    )
    assert "3 clicks" in capsys.readouterr().out
