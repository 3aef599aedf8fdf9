"""One trial of a sweep: its files, its process, the record of all trials, the claim on a folder."""

import json
import sys

import pytest

from sam2train.errors import UserError
from sam2train.sweep_trials import (
    LOG,
    RECORD,
    VALUES,
    Trial,
    is_finite,
    read_record,
    record_row,
    stop_all,
    trial_environment,
)

METRIC = "val/J_and_F"


@pytest.fixture
def trial(tmp_path):
    return Trial("001", "id", {"trainer.seed": 0}, tmp_path / "001")


def write(trial: Trial, rows=(), **summary) -> None:
    trial.folder.mkdir(exist_ok=True)
    (trial.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (trial.folder / "summary.json").write_text(json.dumps(summary))


def start(trial: Trial, code: str, tmp_path) -> None:
    trial.start([sys.executable, "-c", code], trial_environment_of_tests())


def trial_environment_of_tests() -> dict[str, str]:
    return trial_environment(1, group="g", sweep_id=None, project="p", entity=None)


class TestLooking:
    def test_what_a_run_wrote(self, trial):
        rows = [{"step": 0, METRIC: 0.1}, {"step": 1, "loss": 2.0, "seconds": 7.5}]
        write(trial, [*rows, {"step": 2, METRIC: 0.3}], **{"baseline/J_and_F": 0.1, "seconds": 9})
        trial.look(METRIC)
        assert (trial.step, trial.seconds, trial.baseline) == (2, 9, 0.1)
        assert (trial.history, trial.score, trial.problem) == ([0.1, 0.3], 0.3, None)

    def test_a_metric_of_the_summary_alone(self, trial):
        write(trial, [{"step": 1, "loss": 2.0}], **{"best/J_and_F": 0.5})
        trial.look("best/J_and_F")
        assert trial.history == [0.5]
        trial.look(METRIC)
        assert (trial.history, trial.score, trial.diverged) == ([], None, False)

    def test_nothing_yet(self, trial):
        trial.look(METRIC)
        assert (trial.history, trial.step, trial.problem) == ([], 0, None)

    @pytest.mark.parametrize(
        "value", [None, float("nan"), float("inf"), "high", True, [0.5], 10**400]
    )
    def test_values_that_are_no_numbers_are_left_out(self, trial, value):
        assert not is_finite(value)
        rows = [{"step": 0, METRIC: 0.1}, {"step": 1, METRIC: value}, {"step": 2, METRIC: 0.3}]
        write(trial, rows)
        trial.look(METRIC)
        assert (trial.history, trial.diverged, trial.score) == ([0.1, 0.3], False, 0.3)
        write(trial, rows[:2], **{METRIC: None, "seconds": value, "baseline/J_and_F": value})
        trial.look(METRIC)
        assert (trial.history, trial.diverged, trial.score) == ([0.1], True, None)
        made_anew = isinstance(value, str | bool | list | int)
        assert (trial.baseline, trial.seconds) == (0.1 if made_anew else None, 0.0)

    @pytest.mark.parametrize(
        ("name", "content"),
        [("metrics.jsonl", "[]\n[]\n"), ("summary.json", "{"), ("summary.json", "7")],
    )
    def test_a_broken_file_is_named_and_what_was_known_stays(self, trial, name, content):
        write(trial, [{"step": 3, METRIC: 0.3}])
        trial.look(METRIC)
        (trial.folder / name).write_text(content)
        trial.look(METRIC)
        assert str(trial.folder / name) in trial.problem
        assert (trial.step, trial.score) == (3, 0.3)
        write(trial, [{"step": 4, METRIC: 0.4}])
        trial.look(METRIC)
        assert (trial.step, trial.problem) == (4, None)

    @pytest.mark.parametrize(
        ("state", "status", "expected"),
        [
            ("running", "finished", "finished"),
            ("running", "interrupted", "interrupted"),
            ("finished", None, "interrupted"),
            ("failed", "failed", "failed"),
            ("stopped", "interrupted", "stopped"),
            ("waiting", None, "waiting"),
        ],
    )
    def test_the_state_after_an_earlier_sitting(self, trial, state, status, expected):
        trial.state = state
        write(trial, [{"step": 3, METRIC: 0.3}], **({"status": status} if status else {}))
        trial.recall(METRIC)
        assert trial.state == expected

    def test_a_folder_that_is_gone_waits_again(self, trial):
        trial.state = "finished"
        trial.recall(METRIC)
        assert trial.state == "waiting"

    def test_a_broken_file_of_an_earlier_sitting_has_the_trial_run_again(self, trial):
        trial.state = "finished"
        write(trial)
        (trial.folder / "summary.json").write_text("{")
        trial.recall(METRIC)
        assert (trial.state, trial.over) == ("failed", False)


class TestProcess:
    @pytest.mark.parametrize(
        ("code", "state"), [(0, "finished"), (3, "failed"), (143, "interrupted")]
    )
    def test_its_end_is_its_state(self, trial, tmp_path, code, state):
        start(trial, f"print('last word'); raise SystemExit({code})", tmp_path)
        assert trial.state == "running"
        trial.process.wait()
        assert trial.poll()
        assert trial.state == state
        assert trial.last_words()[-1] == "last word"
        assert not trial.poll()

    def test_it_is_told_its_folder_and_its_values(self, trial, tmp_path):
        trial.write_values({"trainer": {"seed": 0}})
        code = "import os, sys; print(sys.argv, os.environ['WANDB_SWEEP_PARAM_PATH'])"
        start(trial, code, tmp_path)
        stop_all([trial])
        assert trial.process is None
        (trial.folder / "checkpoints").mkdir()
        (trial.folder / "checkpoints" / "last.pt").touch()
        start(trial, code, tmp_path)
        trial.process.wait()
        words = trial.last_words()
        assert str(trial.folder / VALUES) in words[-1]
        assert f"'--run-dir', '{trial.folder}', '--resume'" in words[-1]

    def test_without_a_checkpoint_it_starts_from_nothing(self, trial, tmp_path):
        write(trial, [{"step": 3}])
        (trial.folder / LOG).write_text("earlier\n")
        (trial.folder / "overlays").mkdir()
        start(trial, "pass", tmp_path)
        trial.process.wait()
        assert sorted(path.name for path in trial.folder.iterdir()) == [LOG]
        assert "earlier" in (trial.folder / LOG).read_text()

    def test_hyperband_ends_it_for_good(self, trial, tmp_path):
        start(trial, "import time; time.sleep(60)", tmp_path)
        trial.stop_early()
        trial.process.wait(timeout=30)
        assert trial.poll()
        assert (trial.state, trial.over) == ("stopped", True)


class TestRecord:
    def test_what_is_written_is_read(self, tmp_path, trial):
        assert read_record(tmp_path) is None
        trial.state = "finished"
        content = {
            "sweep": {},
            "experiment": {},
            "sweep_id": "a/b/c",
            "trials": [record_row(trial)],
        }
        (tmp_path / RECORD).write_text(json.dumps(content))
        found = read_record(tmp_path)
        assert (found["sweep_id"], found["trials"]) == ("a/b/c", [trial])

    @pytest.mark.parametrize(
        "change",
        [
            {"name": "../001"},
            {"name": 1},
            {"run_id": "a/b"},
            {"values": []},
            {"state": "lost"},
            {"state": []},
        ],
    )
    def test_an_odd_trial_is_refused(self, tmp_path, trial, change):
        row = {**record_row(trial), **change}
        content = {"sweep": {}, "experiment": {}, "sweep_id": None, "trials": [row]}
        (tmp_path / RECORD).write_text(json.dumps(content))
        with pytest.raises(UserError, match=RECORD):
            read_record(tmp_path)


class TestEnvironment:
    def test_threads_are_shared(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        settings = {"group": "g", "sweep_id": None, "project": "p", "entity": None}
        assert trial_environment(2, **settings)["OMP_NUM_THREADS"] == "3"
        assert trial_environment(9, **settings)["OMP_NUM_THREADS"] == "1"
        assert trial_environment(1, **settings)["OMP_NUM_THREADS"] == "7"

    @pytest.mark.parametrize(
        ("sweep_id", "expected"),
        [
            ("abc", ("abc", "p", "e")),
            ("other/abc", ("abc", "other", "e")),
            ("team/other/abc", ("abc", "other", "team")),
        ],
    )
    def test_a_sweep_of_the_server(self, monkeypatch, sweep_id, expected):
        for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_RUN_GROUP"):
            monkeypatch.delenv(name, raising=False)
        found = trial_environment(1, group="g", sweep_id=sweep_id, project="p", entity="e")
        names = ("WANDB_SWEEP_ID", "WANDB_PROJECT", "WANDB_ENTITY")
        assert tuple(found[name] for name in names) == expected
        assert found["WANDB_MODE"] == "offline"
        assert "WANDB_RUN_GROUP" not in found
