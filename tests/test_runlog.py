"""The runlog: what lands in the files, what W&B gets, and that W&B never stops a run."""

import contextlib
import copy
import errno
import io
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import wandb
from PIL import Image
from rich.console import Console

from sam2train import runlog as runlog_room
from sam2train import runlog_wandb
from sam2train.errors import UserError
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog, parameter_table
from sam2train.runlog_wandb import TrackingConfig, choose_mode
from sam2train.video_pictures import Overlay

KEY = "a" * 40
OFF, OFFLINE = TrackingConfig(mode="disabled"), TrackingConfig(mode="offline")


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    """No W&B variables, keys or settings of whoever runs the tests; W&B reads them once."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.chdir(tmp_path)
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def start(tmp_path, screen):
    """A log of the run `tmp_path / "run"`, writing to `screen`."""

    def make(config=OFF, **changes):
        arguments = {"run_id": "abc", "name": "night", "settings": {"model": {"num_maskmem": 7}}}
        arguments |= {"log_every": 2, "num_steps": 100, "console": screen, **changes}
        return RunLog(config, RunFolder(tmp_path / "run"), **arguments)

    return make


def shown(screen):
    return screen.file.getvalue()


def rows(tmp_path):
    return [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]


def records(tmp_path):
    """type -> contents of what W&B wrote, read by W&B's own reader."""
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = {}
    for line in text.splitlines():
        record = json.loads(line)
        found.setdefault(record["type"], []).append(record[record["type"]])
    return found


def overlay(tmp_path, **changes):
    frame = np.full((6, 8, 3), 200, np.uint8)
    mask = np.zeros((6, 8), np.int64)
    mask[1:3, 2:5] = 1
    path = tmp_path / "composed.png"
    Image.fromarray(frame).save(path)
    fields = {"name": "clip0", "path": path, "frame": frame, "prediction": mask}
    fields |= {"ground_truth": mask, "class_labels": {np.int64(1): "cat"}}
    return Overlay(**(fields | changes))


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


def test_lines_are_means_since_the_last_line(start, tmp_path):
    with start(num_steps=5) as runlog:
        for step, loss in enumerate((1.0, 2.0, 4.0, 8.0, 16.0), start=1):
            lr = {"lr": 0.5} if step != 4 else {}
            runlog.log(step, {"loss": torch.tensor(loss, dtype=torch.bfloat16), **lr})
    assert [(row["step"], row["loss"], row["lr"]) for row in rows(tmp_path)] == [
        (2, 1.5, 0.5),
        (4, 6.0, 0.5),  # lr: the mean over the one step that had it
        (5, 16.0, 0.5),
    ]
    assert next(iter(rows(tmp_path)[0])) == "step"
    assert 0.01 < rows(tmp_path)[0]["memory_gb"] < 100


def test_a_tensor_reused_by_the_caller_and_its_graph_do_not_leak(start, tmp_path):
    buffer = torch.ones((), requires_grad=True)
    with start() as runlog:
        runlog.log(1, {"loss": buffer})
        with torch.no_grad():
            buffer += 2
        runlog.log(2, {"loss": buffer})
    assert rows(tmp_path)[0]["loss"] == 2.0


def test_only_a_written_line_reads_the_device(start):
    calls = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            calls.append(function.__name__)
            return super().__torch_function__(function, types, args, kwargs or {})

    readers = {"__float__", "item", "tolist", "numpy", "cpu", "to", "__bool__", "isfinite"}
    loss = torch.ones(()).as_subclass(Watched)
    with start(log_every=3) as runlog:
        runlog.log(1, {"loss": loss})
        runlog.log(2, {"loss": loss})
        assert "add" in calls
        assert not readers & set(calls)
        runlog.log(3, {"loss": loss})
        assert calls.count("__float__") == 1


def test_tensors_that_cannot_be_read_any_more_do_not_hide_the_error(start, screen, monkeypatch):
    def broken(_):
        raise RuntimeError("CUDA error: an illegal memory access")

    def train():
        with start() as runlog:
            runlog.log(1, {"loss": torch.ones(())})
            monkeypatch.setattr(torch.Tensor, "__float__", broken)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    assert "the steps since the last line are lost: CUDA error" in shown(screen)


def test_throughput_leaves_validation_out(start, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=100.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(runlog_room, "time", clock)
    with start(num_steps=4) as runlog:
        for step in (1, 2, 3, 4):
            clock.now += 1.0
            runlog.log(step, {"loss": 0.0}, clips=3)
            if step == 3:
                clock.now += 50.0
                runlog.record(3, {"val/J": 0.5})
    first, validation, second = rows(tmp_path)
    assert validation == {"step": 3, "val/J": 0.5}
    assert (first["clips_per_second"], first["seconds"]) == (3.0, 2.0)
    assert (second["clips_per_second"], second["seconds"]) == (3.0, 54.0)


def test_an_interrupted_run_keeps_the_steps_since_the_last_line(start, tmp_path):
    def train():
        with start(log_every=10) as runlog:
            for step in (1, 2, 3):
                runlog.log(step, {"loss": float(step)})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [(3, 2.0)]


def test_not_finite_is_null_and_numpy_is_a_number(start, tmp_path):
    with start() as runlog:
        scores = {"a": math.nan, "b": -math.inf, "c": np.float32(0.5), "d": torch.tensor(2)}
        runlog.record(0, scores)
        runlog.summary({"x": {"y": [np.int64(3), math.inf]}, "status": "done"})
    assert rows(tmp_path) == [{"step": 0, "a": None, "b": None, "c": 0.5, "d": 2}]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary == {"x": {"y": [3, None]}, "status": "done"}


def test_a_resumed_run_drops_what_came_after_the_checkpoint(start, tmp_path, screen):
    with start() as runlog:
        for step in range(1, 9):
            runlog.log(step, {"loss": 1.0})
        runlog.record(8, {"val/J": 0.5})
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write('{"step": 10, "lo')
    before = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    with start(first_step=5) as runlog:
        assert runlog.seconds >= json.loads(before[1])["seconds"]
        for step in (6, 7):
            runlog.log(step, {"loss": 2.0})
    after = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert after[:2] == before[:2]
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)[2:]] == [(6, 2.0), (7, 2.0)]
    assert "dropped 4 lines from after the checkpoint of step 5" in shown(screen)


def test_a_resumed_run_goes_on_with_the_sums_of_its_checkpoint(start, tmp_path):
    """A number and a tensor, one name at some steps only; the line of the end is written again."""
    some = [{}, {"b": torch.tensor(3.0)}, {}, {"b": torch.tensor(5.0)}]

    def train():
        with start(log_every=4) as runlog:
            for step in (1, 2):
                runlog.log(step, {"a": 2 * step, **some[step - 1]})
            state.update(copy.deepcopy(runlog.state_dict()))
            raise KeyboardInterrupt

    state = {}
    with pytest.raises(KeyboardInterrupt):
        train()
    assert [row["step"] for row in rows(tmp_path)] == [2]
    with start(first_step=2, resume=state):
        pass  # nothing was done, and nothing is written
    assert rows(tmp_path) == []
    with start(log_every=4, first_step=2, resume=state) as runlog:
        for step in (3, 4):
            runlog.log(step, {"a": 2 * step, **some[step - 1]})
    assert [(row["step"], row["a"], row["b"]) for row in rows(tmp_path)] == [(4, 5.0, 4.0)]


def test_a_new_start_drops_only_a_half_written_line(start, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 7, "a": 1}\n{"step": 8, "a')
    with start() as runlog:
        runlog.record(1, {"a": 2})
    assert rows(tmp_path) == [{"step": 7, "a": 1}, {"step": 1, "a": 2}]


def test_summary_merges_over_processes_and_names_a_broken_file(start, tmp_path):
    for values in ({"a": 1, "status": "running"}, {"status": "done"}):
        with start() as runlog:
            runlog.summary(values)
    path = tmp_path / "run/summary.json"
    assert json.loads(path.read_text()) == {"a": 1, "status": "done"}
    assert not list(path.parent.glob("*.tmp"))
    path.write_text("{")


@pytest.mark.parametrize("broken", [b"{", b"", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_broken_summary_is_named_and_made_anew_from_the_rows(start, tmp_path, screen, broken):
    with start() as runlog:
        runlog.record(0, {"val/J_and_F": 0.5, "val/J": 0.5, "horizon/J@1": 0.25})
        runlog.record(4, {"val/J_and_F": 0.75, "val/J": 0.5, "seconds": 3.0})
        runlog.record(8, {"val/J_and_F": 0.625, "val/J": 0.375})
    (tmp_path / "run/summary.json").write_bytes(broken)
    with start() as runlog:
        runlog.summary({"a": 2})
    assert "summary.json: " in shown(screen)
    assert "It is made anew from" in shown(screen)
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {
        **{"val/J_and_F": 0.625, "val/J": 0.375, "baseline/J_and_F": 0.5, "best/J_and_F": 0.75},
        **{"steps": 8, "seconds": 3.0, "status": "running", "a": 2},
    }


BROKEN_ROWS = (b"{", b"[1]", b"null", b"7", b'{"a": 1}', b'{"step": "2"}', b'{"step": 2.5}')
BROKEN_ROWS += (b'{"step": 2, "loss": {"a": 1}}', b"\xff\x00", b"[" * 100_000, b'{"step": true}')


@pytest.mark.parametrize("broken", BROKEN_ROWS)
@pytest.mark.parametrize("how", [{"first_step": 6}, {"resume": {"sums": {}, "counts": {}}}])
def test_a_broken_row_is_named_and_left_out(start, tmp_path, screen, broken, how):
    (tmp_path / "run").mkdir()
    rows_of = [f'{{"step": {step}, "a": {step}}}'.encode() for step in (1, 2, 3)]
    rows_of[1] = broken
    (tmp_path / "run/metrics.jsonl").write_bytes(b"\n".join(rows_of) + b"\n")
    if "resume" in how:
        how["resume"]["lines"] = 3
    with start(**how) as runlog:
        runlog.record(4, {"a": 4})
    assert [row["step"] for row in rows(tmp_path)] == [1, 3, 4]
    assert "line 2 is not a row" in shown(screen)


def test_a_full_disk_names_the_file(start, monkeypatch, tmp_path):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    with start() as runlog, monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left") as caught:
            runlog.record(4, {"a": 4})
    assert caught.value.filename == str(tmp_path / "run/metrics.jsonl")


def test_the_parts_of_the_memory_stand_together(screen):
    report = {"no_obj_ptr": (0, 64), "mask_decoder": (7, 7), "memory_encoder": (1_000, 1_000)}
    screen.print(parameter_table(report))
    lines = [line.split("│")[1:-1] for line in shown(screen).splitlines() if line.startswith("│")]
    assert [[line[0].rstrip(), *map(str.strip, line[1:])] for line in lines] == [
        [" mask_decoder", "7", "0"],
        [" memory", "1,000", "64"],
        ["   memory_encoder", "1,000", "0"],
        ["   no_obj_ptr", "0", "64"],
        [" total", "1,007", "64"],
    ]
    assert "a name for model.trainable_modules" in " ".join(shown(screen).split())


def test_tables(start, tmp_path, screen):
    with start() as runlog:
        runlog.parameters({"image_encoder": (0, 2_000_000), "memory_attention": (1_500, 2_000)})
    lines = [
        [cell.strip() for cell in line.split("│")[1:-1]] for line in shown(screen).splitlines()
    ]
    assert ["image_encoder", "0", "2,000,000"] in lines
    assert ["memory_attention", "1,500", "500"] in lines
    assert ["total", "1,500", "2,000,500"] in lines
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {
        "params/total": 2_002_000,
        "params/trainable": 1_500,
        "params/image_encoder": 2_000_000,
        "params/memory_attention": 2_000,
        "trainable/image_encoder": 0,
        "trainable/memory_attention": 1_500,
    }


def test_plain_lines_without_a_terminal(start, screen):
    with start(log_every=5, num_steps=200) as runlog:
        for step in range(1, 201):
            runlog.log(step, {"loss": 0.25, "lr": 1e-5}, clips=1)
        runlog.say("saved [red]last.pt " + "x" * 120)
    lines = [line for line in shown(screen).splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in lines] == [f"{step}/200" for step in range(20, 201, 20)]
    assert "loss 0.25  lr 1.0e-05" in lines[0]
    assert lines[-1].endswith("GB")
    assert "0:00:00 left" in lines[-1]
    assert "saved [red]last.pt " + "x" * 120 in shown(screen)
    assert "\x1b" not in shown(screen)


def test_live_line_gives_the_cursor_back_when_training_fails(start):
    terminal = Console(
        file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm"}
    )

    def train():
        with start(console=terminal) as runlog:
            runlog.log(1, {"loss": 1.0})
            runlog.log(2, {"loss": 2.0})
            runlog.say("in between")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        train()
    text = shown(terminal)
    assert text.rfind("\x1b[?25l") < text.rfind("\x1b[?25h")
    assert "2/100  loss 1.5" in text
    assert "in between\n" in text


def test_offline_data_arrives(start, tmp_path, screen):
    config = TrackingConfig(mode="offline", project="p", group="g", tags=("t",))
    with start(config, num_steps=2) as runlog:
        runlog.record(0, {"val/J": 0.5})
        runlog.log(1, {"loss": torch.tensor(1.0)})
        runlog.log(2, {"loss": torch.tensor(3.0)})
        runlog.overlays(2, [overlay(tmp_path)])
        runlog.summary({"status": "done", "best/J_and_F": 0.5})
        assert runlog.wandb.mode == "offline"
        first = shown(screen).splitlines()[0]
        assert first.startswith("W&B is offline: tracking.mode is offline. Upload later: ")
        assert first.endswith(runlog.wandb.how_to_sync)
        folder = runlog.wandb.how_to_sync.removeprefix("wandb sync ")
    assert (tmp_path / folder / "run-abc.wandb").is_file()
    assert "off from here" not in shown(screen)

    found = records(tmp_path)
    (run,) = found["run"]
    assert (run["run_id"], run["display_name"], run["project"]) == ("abc", "night", "p")
    assert (run["tags"], run["run_group"], run["job_type"]) == (["t"], "g", "train")
    assert run["config"]["update"]["model"] == {"num_maskmem": 7}
    history = [row["item"] for row in found["history"]]
    assert (history[0]["trainer/global_step"], history[0]["val/J"]) == (0, 0.5)
    assert (history[1]["trainer/global_step"], history[1]["loss"]) == (2, 2.0)
    pictures = history[2]
    assert pictures["overlays/clip0.format"] == "png"
    ids = pictures["masks/clip0.masks.prediction.path"]
    assert "masks/clip0.masks.ground_truth.path" in pictures
    with Image.open(tmp_path / folder / "files" / ids) as image:
        assert np.array_equal(np.array(image), overlay(tmp_path).prediction)
    assert {"status": "done", "best/J_and_F": 0.5} in [row["update"] for row in found["summary"]]
    assert [row["exit_code"] for row in found["exit"]] == [0]


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
    assert complaints[0].endswith(runlog.wandb.how_to_sync)
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
