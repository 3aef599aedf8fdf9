"""A run that was stopped, in whatever way, and resumed writes what one that never was writes."""

import json
import signal
from contextlib import suppress
from io import StringIO

import pytest
import torch
from conftest import make_coco
from rich.console import Console

from sam2train import checkpoint, run_scores, runlog, trainer
from sam2train.experiment import Experiment
from sam2train.machine import Interrupted
from sam2train.metrics import TRAINED
from sam2train.runlog import RunLog
from sam2train.scores import HORIZON_COLUMNS, SCORE_COLUMNS, Scores
from sam2train.trainer import Trainer

NUM_STEPS = 8
TIMED = ("seconds", "clips_per_second", "memory_gb", "features/hit_rate")


class SmallModel:
    """What the loop asks of a model; nothing in it learns."""

    trains_encoder, feature_counts = True, (0, 0)

    def __init__(self, experiment, say):
        self.device = torch.device("cpu")
        self.sam2 = torch.nn.Linear(2, 2)
        self.num_maskmem, self.untrained_rows = 0, {}

    def trainable_parameters(self):
        return dict(self.sam2.named_parameters())

    def parameter_report(self):
        return {"linear": (6, 6)}

    def train(self):
        pass


def score_by_step(track, data, config, *, split, model, step, label, on_frame, **_):
    """One object, whose scores tell the model and the step."""
    for _ in range(2):
        on_frame(0, None)
    value = step / 16 + len(model) / 1024
    means = dict.fromkeys(("J", "F", "J_and_F", "mIoU"), value)
    means |= dict.fromkeys(("J_recall", "J_decay", "F_recall", "F_decay"), value)
    row = dict.fromkeys(SCORE_COLUMNS, 1.0) | {"step": step, "split": split, "model": model}
    row |= dict.fromkeys(means, value) | {"video_id": "1", "object_id": "1"}
    curve = dict.fromkeys(HORIZON_COLUMNS, 1) | {"step": step, "split": split, "model": model}
    curve |= {"metric": "horizon/J", "at": "1", "value": value}
    horizon = [curve] if model == TRAINED else []
    return Scores(label, model, step, means, [row], [], horizon)


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A trainer whose model, steps and scores cost nothing; what it writes is real."""
    data = str(make_coco(tmp_path / "data", num_frames=3, size=(16, 16)))
    monkeypatch.setattr(trainer, "build_model", SmallModel)
    monkeypatch.setattr(run_scores, "score", score_by_step)
    monkeypatch.setattr(runlog, "describe_environment", lambda device: {})
    monkeypatch.setattr(run_scores, "scores_table", lambda title, rows: title)  # a bootstrap each

    def build(run_dir, resume=None, console=None, **periods):
        settings = {
            "dataset": {"data_path": data, "val_path": data, "test_path": data},
            "trainer": {"num_steps": NUM_STEPS, "val_every": 3, "device": "cpu", **periods},
            "evaluation": {"num_overlays": 0},
            "tracking": {"mode": "disabled"},
        }
        experiment = Experiment.model_validate(settings)
        options = {"run_id": "run", "name": "test", "console": console or Console(quiet=True)}
        run = Trainer(experiment, run_dir, resume=resume, **options)

        def step(batches):
            number = run.step + 1
            if number == 2:
                run.audit = {"audit/linear/norm": 1.0}
            some = {"interaction/iou_before": torch.tensor(0.1 * number)} if number % 3 else {}
            return {"loss": torch.tensor(1.0 / number), "lr": 1e-3 / number, **some}

        run.train_step = step
        return run

    return build


def written(run_dir):
    """Without what a clock says."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    rows = [{name: value for name, value in row.items() if name not in TIMED} for row in rows]
    return rows, *((run_dir / name).read_text() for name in ("scores.csv", "horizon.csv"))


def kill(run, place, at):
    """Let a run end at a place when it has done `at` steps.

    `signal` asks it to stop in a step, `signal in evaluation` when the step is scored, and `signal
    N` between two frames of the N-th scoring of that step: it saves first. At the others the
    process ends: with an error (`step`, `evaluated`, `saved`), or at once (`SIGKILL`).
    """
    step, evaluate, save = run.train_step, run.evaluate, run.save
    scorings = []

    def in_scoring(*arguments, **how):
        scorings.append(run.step)
        if place == f"signal {scorings.count(at)}" and run.step == at:
            run.stop.received = signal.SIGTERM
        return score_by_step(*arguments, **how)

    def in_step(batches):
        if run.step == at and place == "signal":
            run.stop.received = signal.SIGTERM
        elif run.step == at and place in ("step", "SIGKILL"):
            if place == "SIGKILL":
                run.runlog.summary = lambda values: None
            raise Killed
        return step(batches)

    def in_evaluation():
        evaluate()
        if run.step == at and place == "signal in evaluation":
            run.stop.received = signal.SIGTERM
        elif run.step == at and place == "evaluated":
            raise Killed

    def in_save(path):
        save(path)
        if path.name == "last.pt" and run.step == at and place == "saved":
            raise Killed

    run.train_step, run.evaluate, run.save = in_step, in_evaluation, in_save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_scores, "score", in_scoring)
        if place == "SIGKILL":
            patch.setattr(RunLog, "__exit__", lambda *_: None)
        with suppress(Killed, Interrupted):
            run.run()


def kills(save_every):
    """Every place and step at which a run can be killed."""
    for place in ("step", "SIGKILL", "signal"):
        yield from ((place, at) for at in range(NUM_STEPS))
    for place in ("evaluated", "signal in evaluation"):
        yield from ((place, at) for at in (0, 3, 6, 8))
    # A validation, and the copy at step 0; then the best checkpoint, the base and the copy on test.
    yield from [("signal 1", 0), ("signal 2", 0), ("signal 1", 3), ("signal 1", 6)]
    yield from ((f"signal {number}", NUM_STEPS) for number in (1, 2, 3, 4))
    yield from (("saved", at) for at in {*range(0, NUM_STEPS, save_every), NUM_STEPS})


@pytest.mark.parametrize("save_every", [3, 4])
@pytest.mark.parametrize("log_every", [2, 3, 5])
def test_rows_after_a_kill_are_those_of_a_run_that_was_never_killed(
    start, tmp_path, log_every, save_every
):
    periods = {"log_every": log_every, "save_every": save_every}
    start(tmp_path / "whole", **periods).run()
    whole = written(tmp_path / "whole")
    steps = [row["step"] for row in whole[0] if "loss" in row]
    assert steps == sorted({*range(log_every, NUM_STEPS + 1, log_every), NUM_STEPS})
    assert [row["step"] for row in whole[0] if "val/J_and_F" in row] == [0, 3, 6, 8]
    for place, at in kills(save_every):
        run_dir = tmp_path / f"{place} {at}"
        kill(start(run_dir, **periods), place, at)
        last = run_dir / "checkpoints" / "last.pt"
        assert checkpoint.load(last)["step"] <= at + 1, "also before the first period is over"
        start(run_dir, resume=last, **periods).run()
        assert written(run_dir) == whole, (place, at)
        ends = [
            checkpoint.load(d / "checkpoints" / "best.pt") for d in (tmp_path / "whole", run_dir)
        ]
        assert ends[0]["step"] == ends[1]["step"]


@pytest.mark.parametrize("damage", ["torn", "flipped", "gone"])
@pytest.mark.parametrize("at", [2, 4, 7])
def test_rows_after_a_fall_back_are_those_of_a_run_that_was_never_stopped(
    start, tmp_path, at, damage
):
    """The rows of the checkpoint before are taken up, and it is said."""
    periods = {"log_every": 2, "save_every": 1}
    start(tmp_path / "whole", **periods).run()
    run_dir = tmp_path / "run"
    kill(start(run_dir, **periods), "SIGKILL", at)
    last = run_dir / "checkpoints" / "last.pt"
    data = bytearray(last.read_bytes())
    data[len(data) // 2] ^= 16
    last.write_bytes(data if damage == "flipped" else data[:-10])
    if damage == "gone":
        last.unlink()
    said = StringIO()
    run = start(run_dir, resume=last, console=Console(file=said), **periods)
    assert run.step in (at, at - 1)  # at a scored step both are of that step
    assert "previous.pt, of step" in said.getvalue()
    run.run()
    assert written(run_dir) == written(tmp_path / "whole")
    assert not list(run_dir.rglob(".*.part"))


def test_a_run_that_starts_sweeps_up_what_killed_saves_left(start, tmp_path):
    left = tmp_path / "run" / "checkpoints" / ".last.pt.123.part"
    left.parent.mkdir(parents=True)
    left.touch()
    start(tmp_path / "run")
    assert not left.exists()


def test_a_finished_run_is_complete(start, tmp_path):
    """Going on with it scores nothing again but the test videos."""
    start(tmp_path / "run", save_every=4).run()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["scored"] == NUM_STEPS


@pytest.mark.parametrize("place", ["SIGKILL", "signal"])
def test_a_run_may_be_killed_time_and_again(start, tmp_path, place):
    periods = {"log_every": 5, "save_every": 1}
    start(tmp_path / "whole", **periods).run()
    run_dir, last = tmp_path / "parts", None
    for at in range(1, NUM_STEPS):
        kill(start(run_dir, resume=last, **periods), place, at)
        last = run_dir / "checkpoints" / "last.pt"
    start(run_dir, resume=last, **periods).run()
    assert written(run_dir) == written(tmp_path / "whole")


def test_a_run_that_was_stopped_is_scored_where_it_then_ends(start, tmp_path):
    """Where no validation was due when it stopped."""
    kill(start(tmp_path / "run", save_every=100), "signal", 3)
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["step"] == 4
    start(tmp_path / "run", resume=last, num_steps=4).run()
    scored = [row["step"] for row in written(tmp_path / "run")[0] if "val/J_and_F" in row]
    assert scored == [0, 3, 4]


def test_a_checkpoint_from_before_these_keys_goes_on(start, tmp_path):
    run_dir = tmp_path / "run"
    kill(start(run_dir, log_every=2, save_every=3), "SIGKILL", 5)
    last = run_dir / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    for name in ("scored", "window"):
        del content[name]
    checkpoint.save(last, content)
    start(run_dir, resume=last, log_every=2, save_every=3).run()
    rows = written(run_dir)[0]
    assert [row["step"] for row in rows if "loss" in row] == [2, 4, 6, 8]
    assert [row["step"] for row in rows if "val/J_and_F" in row] == [0, 3, 6, 8]
