"""What W&B gets of a run, and that W&B never stops one."""

import contextlib
import io
import json
import math
import multiprocessing
import os
import shutil
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from rich.console import Console
from small_runlog import OFF, OFFLINE, logs_of, overlay, records, rows, shown, without_wandb

from sam2train import runlog_wandb
from sam2train.errors import UserError
from sam2train.runlog_wandb import TrackingConfig, choose_mode

KEY = "a" * 40


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    yield from without_wandb(tmp_path, monkeypatch)


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def start(tmp_path, screen):
    return logs_of(tmp_path, screen)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_mode_of_the_experiment_wins(monkeypatch, mode):
    monkeypatch.setenv("WANDB_MODE", "online")
    assert choose_mode(TrackingConfig(mode=mode)) == (mode, f"tracking.mode is {mode}")


@pytest.mark.parametrize(
    ("value", "mode"), [("offline", "offline"), ("dryrun", "offline"), ("disabled", "disabled")]
)
def test_mode_from_the_environment_beats_a_key(monkeypatch, value, mode):
    monkeypatch.setenv("WANDB_MODE", value)
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode(TrackingConfig()) == (mode, f"WANDB_MODE={value}")


def test_a_loader_process_may_import_a_package_that_wandb_watches(tmp_path, monkeypatch, start):
    """Augmentation imports torchvision there, for the first time; W&B's hook raised on it."""
    (tmp_path / "lightgbm.py").write_text("")  # on W&B's list, as torchvision is
    monkeypatch.syspath_prepend(tmp_path)
    with start(OFFLINE):
        child = multiprocessing.get_context("fork").Process(target=__import__, args=("lightgbm",))
        child.start()
        child.join()
    assert child.exitcode == 0


def test_mode_that_wandb_does_not_know(monkeypatch, start, screen):
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with start(TrackingConfig()) as runlog:
        runlog.record(1, {"a": 1})
    assert "WANDB_MODE=ofline is none of online, offline, disabled" in shown(screen)


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_mode_of_the_settings_file_beats_a_key(tmp_path, monkeypatch, mode):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text(f"[default]\nmode = {mode}\n")
    chosen, reason = choose_mode(TrackingConfig())
    assert (chosen, f"wandb {mode}" in reason) == (mode, True)


def test_key_makes_online_and_no_key_offline(monkeypatch):
    chosen, reason = choose_mode(TrackingConfig())
    assert (chosen, "wandb login" in reason) == ("offline", True)
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode(TrackingConfig()) == ("online", "a key was found")


def test_explicit_online_beats_the_environment_but_not_a_missing_key(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    chosen, reason = choose_mode(TrackingConfig(mode="online"))
    assert (chosen, reason.startswith("tracking.mode is online, but no key")) == ("offline", True)
    wandb.teardown()
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    assert choose_mode(TrackingConfig(mode="online")) == ("online", "tracking.mode is online")
    assert wandb.setup().settings.mode == "offline"  # asked, not changed


def test_ill_formed_key_goes_offline_and_says_so(monkeypatch, capsys):
    monkeypatch.setenv("WANDB_API_KEY", "abc")
    chosen, reason = choose_mode(TrackingConfig())
    assert chosen == "offline"
    assert "40+ characters" in reason
    assert capsys.readouterr() == ("", "")


def test_config_takes_a_yaml_list_and_refuses_names_that_wandb_refuses():
    assert TrackingConfig.model_validate({"tags": ["a", "b"]}).tags == ("a", "b")
    for bad in ("my/project", "", "p" * 129):
        with pytest.raises(ValueError, match="project"):
            TrackingConfig(project=bad)


def test_offline_data_arrives(start, tmp_path, screen):
    config = TrackingConfig(
        mode="offline", project="p", group="g", tags=("t", "bbox"), notes="a note", log_model="best"
    )
    best = tmp_path / "run/checkpoints/best.pt"
    settings = {"model": {"num_maskmem": 7}, "trainer": {"seed": 3}}
    settings["dataset"] = {"dataset_type": "coco", "prompt_types": ["point", "bbox"]}
    with start(config, num_steps=2, settings=settings) as runlog:
        runlog.record(0, {"val/J": 0.5, "val/J_and_F": 0.75})
        runlog.record(0, {"val/J_and_F": 0.25})
        best.parent.mkdir()
        best.write_bytes(b"weights")
        runlog.saved(best, 2, {"train": "f" * 32})
        runlog.parameters({"memory_attention": (3, 5)})
        print("a line that W&B keeps")
        runlog.log(1, {"loss": torch.tensor(1.0)})
        runlog.log(2, {"loss": torch.tensor(3.0)})
        runlog.overlays(2, [overlay(tmp_path)])
        runlog.report(2, {"scores": [{"J": 0.5, "id": "a"}, {"J": 0.25}]}, [])
        runlog.summary({"status": "done", "best/J_and_F": 0.5, "val/J_and_F": 0.25})
        assert runlog.wandb.mode == "offline"
        first, second = shown(screen).splitlines()[:2]
        assert first == "W&B is offline: tracking.mode is offline. Upload later:"
        assert second == f"  {runlog.wandb.how_to_sync}"
        folder = runlog.wandb.how_to_sync.removeprefix("wandb sync ")
    assert (tmp_path / folder / "run-abc.wandb").is_file()
    assert "off from here" not in shown(screen)

    found = records(tmp_path)
    (run,) = found["run"]
    assert (run["run_id"], run["project"]) == ("abc", "p")
    assert run["display_name"] == "night point+bbox s3"
    assert (run["tags"], run["run_group"], run["job_type"]) == (
        *(["t", "bbox", "coco", "point"], "g", "train"),
    )
    assert run["notes"] == "a note"
    assert run["config"]["update"]["model"] == {"num_maskmem": 7}
    assert run["config"]["update"]["text/dataset.prompt_types"] == "point+bbox"
    counts = [row["update"] for row in found["config"] if "params/total" in row["update"]]
    assert counts[0]["params/total"] == 5
    assert "a line that W&B keeps" in [row["line"] for row in found["output_raw"]]
    assert "a line that W&B keeps" in (tmp_path / folder / "files/output.log").read_text()

    data, model = (row for row in found["artifact"] if row["type"] in ("dataset", "model"))
    assert (data["name"], data["type"]) == ("data-" + "f" * 16, "dataset")
    assert data["use_after_commit"]  # what the model comes from
    assert (model["name"], model["type"]) == ("model-abc", "model")
    assert {"best", "step_2"} <= set(model["aliases"])
    assert json.loads(model["metadata"])["data"] == {"train": "f" * 32}

    best_shown = [row for row in found["metric"] if row.get("name") == "val/J_and_F"]
    assert best_shown[0]["summary"] == {"max": True}
    kept = [
        row["update"]["val/J_and_F"] for row in found["summary"] if "val/J_and_F" in row["update"]
    ]
    assert kept[-1] == {"max": 0.75}  # and not the last one, which the run's own summary has
    history = [row["item"] for row in found["history"]]
    assert (history[0]["trainer/global_step"], history[0]["val/J"]) == (0, 0.5)
    assert (history[2]["trainer/global_step"], history[2]["loss"]) == (2, 2.0)
    pictures = history[3]
    assert pictures["films/clip0._type"] == "video-file"
    assert history[4]["tables/scores.nrows"] == 2
    assert pictures["overlays/clip0.format"] == "png"
    ids = pictures["masks/clip0.masks.prediction.path"]
    assert "masks/clip0.masks.ground_truth.path" in pictures
    with Image.open(tmp_path / folder / "files" / ids) as image:
        assert np.array_equal(np.array(image), overlay(tmp_path).prediction)
    assert {"status": "done", "best/J_and_F": 0.5} in [row["update"] for row in found["summary"]]
    assert [row["exit_code"] for row in found["exit"]] == [0]


def test_a_failed_run_alerts_and_sends_no_model(start, tmp_path):
    def train():
        with start(TrackingConfig(mode="offline", log_model="best")) as runlog:
            best = tmp_path / "run/checkpoints/best.pt"
            best.parent.mkdir()
            best.write_bytes(b"weights")
            runlog.saved(best, 2, {})
            raise FloatingPointError("step 3: loss nan")

    with pytest.raises(FloatingPointError):
        train()
    found = records(tmp_path)
    (alert,) = found["alert"]
    assert (alert["title"], alert["level"]) == ("night failed", "ERROR")
    assert alert["text"] == "FloatingPointError: step 3: loss nan"
    assert "artifact" not in found


def test_a_sweep_steers_by_the_last_score(start, monkeypatch):
    """W&B keeps one number of a metric in the summary, which its sweeps read."""
    monkeypatch.setenv("WANDB_SWEEP_ID", "abc")
    assert not start(OFF).wandb.shows_best


def test_tensorboard_has_the_numbers_and_pictures(start, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = TrackingConfig(mode="disabled", also=("tensorboard",))
    with start(config) as runlog:
        for step, loss in ((1, 1.0), (2, 3.0), (3, 5.0), (4, math.nan)):
            runlog.log(step, {"loss": loss, "lr": 0.5})
        runlog.overlays(4, [overlay(tmp_path)])
    with start(config, first_step=2) as runlog:  # what came after step 2 comes again
        runlog.record(4, {"loss": 7.0})
    events = reader.EventAccumulator(str(tmp_path / "run/tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(2, 2.0), (4, 7.0)]
    assert [(e.step, e.value) for e in events.Scalars("lr")] == [(2, 0.5)]


def test_tensorboard_that_is_not_there_is_told(start, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"tracking\.also: .*`pip install tensorboard`"):
        start(TrackingConfig(mode="disabled", also=("tensorboard",))).__enter__()


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (SystemExit(143), 143),
        (SystemExit(), 0),
        (SystemExit("text"), 1),
        (KeyboardInterrupt(), 130),
        (UserError("x"), 2),
        (FloatingPointError("x"), 1),
    ],
)
def test_wandb_is_told_what_the_shell_sees(start, monkeypatch, error, code):
    told = []
    monkeypatch.setattr(wandb.Run, "finish", lambda run, exit_code: told.append(exit_code))
    monkeypatch.setattr(wandb, "init", lambda **_: wandb.Run(wandb.Settings(mode="disabled")))
    monkeypatch.setattr(wandb.Run, "define_metric", lambda *_, **__: None)
    monkeypatch.setattr(wandb.Run, "dir", "x/files")
    runlog = start(OFFLINE)
    runlog.__enter__()
    assert not runlog.__exit__(type(error), error, None)
    assert told == [code]


def test_wandb_that_fails_later_costs_one_line(start, tmp_path, screen, monkeypatch):
    def broken(*_, **__):
        raise OSError("no space left on device\nsecond line")

    with start(OFFLINE) as runlog:
        runlog.log(1, {"loss": 1.0})
        runlog.log(2, {"loss": 1.0})
        monkeypatch.setattr(wandb.Run, "log", broken)
        for step in range(3, 9):
            runlog.log(step, {"loss": 1.0})
        runlog.record(8, {"val/J": 0.5})
        runlog.overlays(8, [overlay(tmp_path)])
        runlog.summary({"status": "done"})
    assert [row["step"] for row in rows(tmp_path)] == [2, 4, 6, 8, 8]
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"status": "done"}
    complaints = [line for line in shown(screen).splitlines() if "off from here" in line]
    assert len(complaints) == 1
    assert "log failed (OSError: no space left on device)" in complaints[0]
    assert f"\n  {runlog.wandb.how_to_sync}\n" in shown(screen)
    # What W&B had got before is finished and readable.
    assert [row["item"]["trainer/global_step"] for row in records(tmp_path)["history"]] == [2]


def test_wandb_that_does_not_start_costs_one_line(start, tmp_path, screen, monkeypatch):
    def broken(**_):
        raise ImportError("libfoo.so")

    monkeypatch.setattr(wandb, "init", broken)
    with start(OFFLINE) as runlog:
        runlog.record(1, {"a": 1})
        assert (runlog.wandb.mode, runlog.wandb.how_to_sync) == ("disabled", None)
    assert rows(tmp_path) == [{"step": 1, "a": 1}]
    assert shown(screen) == "W&B is off, it did not start (ImportError: libfoo.so)\n"


def test_online_without_a_server_falls_back_to_offline(start, tmp_path, screen, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setattr(runlog_wandb, "INIT_TIMEOUT", 1.0)
    with start(TrackingConfig()) as runlog:
        runlog.record(1, {"a": 1})
        assert runlog.wandb.mode == "offline"
    assert "W&B is offline: going online failed: " in shown(screen)
    assert records(tmp_path)["history"][0]["item"]["a"] == 1


def test_disabled_leaves_no_trace_of_wandb(start, tmp_path, screen):
    with start(OFF) as runlog:
        runlog.record(1, {"a": 1})
        runlog.overlays(1, [overlay(tmp_path)])
        assert (runlog.wandb.mode, runlog.wandb.how_to_sync) == ("disabled", None)
    assert shown(screen) == "W&B is off: tracking.mode is disabled\n"
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["metrics.jsonl"]


@pytest.mark.parametrize(
    "changes",
    [
        {"frame": np.zeros((6, 8, 3), np.float32)},
        {"frame": np.zeros((6, 8), np.uint8)},
        {"prediction": np.zeros((8, 6), np.int64)},
        {"ground_truth": np.full((6, 8), 256)},
        {"ground_truth": np.full((6, 8), -1)},
    ],
)
def test_overlays_that_wandb_would_show_wrong_are_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"uint8|0\.\.255"):
        overlay(tmp_path, **changes)


def by_step(tmp_path):
    """Rows of numbers in W&B's folders, in order of time: (step, value) of a name each."""
    found = []
    for folder in sorted((tmp_path / "run/wandb").glob("offline-run-*"), key=os.path.getmtime):
        command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        rows = [json.loads(line) for line in text.splitlines()]
        items = [row["history"]["item"] for row in rows if row["type"] == "history"]
        found.append([(i["trainer/global_step"], i.get("loss", i.get("val/J"))) for i in items])
    return found


def test_rows_that_a_kill_kept_from_the_disk_are_sent_again(start, tmp_path):
    """W&B writes every two seconds: after a SIGKILL its folder may lack what metrics.jsonl has."""
    config = TrackingConfig(mode="offline")
    with start(config) as runlog:
        runlog.summary({"status": "running"})
        runlog.record(0, {"val/J": 0.5})
        runlog.log(1, {"loss": torch.tensor(1.0)})
        runlog.log(2, {"loss": torch.tensor(3.0)})
        state = runlog.state_dict()
    shutil.rmtree(tmp_path / "run/wandb")  # nothing came to the disk, and the summary says running
    with start(config, resume=state, first_step=2) as runlog:
        runlog.log(3, {"loss": torch.tensor(1.0)})
        runlog.log(4, {"loss": torch.tensor(5.0)})
        runlog.summary({"status": "finished"})
    assert by_step(tmp_path) == [[(0, 0.5), (2, 2.0), (4, 3.0)]]


def test_rows_of_a_run_that_was_stopped_are_not_sent_twice(start, tmp_path):
    """Nor the means of the steps since the last line, which come again with the others."""
    config = TrackingConfig(mode="offline")
    with contextlib.suppress(SystemExit), start(config) as runlog:
        runlog.log(1, {"loss": torch.tensor(1.0)})
        runlog.log(2, {"loss": torch.tensor(3.0)})
        runlog.log(3, {"loss": torch.tensor(1.0)})
        state = runlog.state_dict()
        runlog.summary({"status": "interrupted"})
        raise SystemExit(143)
    assert by_step(tmp_path) == [[(2, 2.0)]]
    assert [row["step"] for row in rows(tmp_path)] == [2, 3]  # the file has them, as long as it is
    time.sleep(1.1)  # W&B names its folders by the second
    with start(config, resume=state, first_step=3) as runlog:
        runlog.log(4, {"loss": torch.tensor(5.0)})
    assert by_step(tmp_path) == [[(2, 2.0)], [(4, 3.0)]]
    assert [row["step"] for row in rows(tmp_path)] == [2, 4]
