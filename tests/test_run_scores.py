"""What a run scores: which checkpoint is best, and what is written of it."""

import json

import pytest
from small_run import make_trainer, rows, small_experiments

from sam2train import checkpoint
from sam2train.metrics import BASE, COPY, TRAINED
from sam2train.run_scores import weak_base
from sam2train.scores import Scores


@pytest.fixture
def experiment(tmp_path):
    return small_experiments(tmp_path)


def test_best_is_the_checkpoint_of_the_best_score(experiment, tmp_path):
    run_dir = tmp_path / "run"
    make_trainer(experiment(), run_dir).run()
    scored = {row["step"]: row["val/J_and_F"] for row in rows(run_dir) if "val/J_and_F" in row}
    best = checkpoint.load(run_dir / "checkpoints" / "best.pt")
    assert best["step"] == max(scored, key=lambda step: (scored[step], -step))
    assert best["scores"]["J_and_F"] == max(scored.values())


def score_rows(values, step):
    return [
        {"step": step, "split": "val", "model": TRAINED, "video_id": video, "object_id": 1}
        | dict.fromkeys(("J", "F", "J_and_F", "J_recall", "J_decay", "F_recall"), value)
        | {"F_decay": value, "mIoU": value}
        for video, value in enumerate(values)
    ]


def test_the_last_lines_tell_the_gain_and_which_step_is_best(experiment, tmp_path):
    scores = make_trainer(experiment(), tmp_path / "run").scores
    base = [0.1 * place for place in range(6)]
    scores.score_rows.rows = [
        *score_rows(base, 0),
        *score_rows([value + 0.1 + 0.01 * value for value in base], 2),
        *score_rows([value - 0.1 for value in base], 4),
    ]
    scores.best_step = 2
    gain, best = scores.conclusion(4)
    assert gain.startswith("val J&F 0.250 -> 0.353 (+0.102, 95 % +0.10")
    assert gain.endswith(": shown on 6 videos)")
    assert best == "best.pt is step 2, the highest val J&F"

    scores.best_step = 0
    (nothing,) = scores.conclusion(4)
    assert nothing.startswith(
        "nothing gained: best.pt is the untouched base; val J&F 0.250 -> 0.150 (-0.100, 95 % -0.100"
    )
    assert nothing.endswith("a loss is shown on 6 videos) at step 4")


def test_no_validation_videos_is_no_scores(experiment, tmp_path):
    run_dir = tmp_path / "run"
    settings = experiment(dataset={"val_path": None}, trainer={"num_steps": 2})
    assert make_trainer(settings, run_dir).run() == {}
    assert (run_dir / "checkpoints" / "last.pt").exists()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert "val/J_and_F" not in summary
    assert summary["status"] == "finished"


def test_zero_steps_evaluates_and_saves(experiment, tmp_path):
    settings = experiment(trainer={"num_steps": 0})
    scores = make_trainer(settings, tmp_path / "run").run()
    assert scores["J_and_F"] >= 0
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_a_base_that_does_not_beat_the_copied_mask_is_told(experiment):
    def scores(model, value):
        return Scores(model, model, 0, {"J_and_F": value}, [], [], [])

    trained = experiment(model={"checkpoint_path": "weights.pt"})
    text = weak_base(trained, scores(BASE, 0.4), scores(COPY, 0.43))
    assert "(J&F 0.400) does not beat the copied first mask (0.430)" in text
    assert "evaluation.prompt_types" in text
    assert weak_base(trained, scores(BASE, 0.44), scores(COPY, 0.43)) is None
    assert weak_base(experiment(), scores(BASE, 0.1), scores(COPY, 0.43)) is None  # random weights
