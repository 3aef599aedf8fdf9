"""The runlog: what lands in the files, what W&B gets, and that W&B never stops a run."""

import copy
import errno
import io
import json
import math
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console
from small_runlog import logs_of, rows, shown, without_wandb

from sam2train import runlog as runlog_room
from sam2train.runlog import parameter_table


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    yield from without_wandb(tmp_path, monkeypatch)


@pytest.fixture
def screen():
    return Console(file=io.StringIO(), width=100)


@pytest.fixture
def start(tmp_path, screen):
    return logs_of(tmp_path, screen)


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
        assert calls.count("__float__") == 1  # the first step is shown
        calls.clear()
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
    steps = [1, *range(20, 201, 20)]  # the first one tells at once that it goes on
    assert [line.split()[1] for line in lines] == [f"{step}/200" for step in steps]
    assert "loss 0.25  lr 1.0e-05" in lines[0]
    assert lines[-1].endswith("GB")
    assert "0:00:00 left" in lines[-1]
    assert "saved [red]last.pt " + "x" * 120 in shown(screen)
    assert "\x1b" not in shown(screen)


def test_the_time_left_knows_what_scoring_costs(start, screen, monkeypatch):
    """Of 4 steps and a validation of 5 videos after every second; then 3 test videos, scored for
    checkpoint, base and copy."""
    clock = SimpleNamespace(now=0.0)
    clock.perf_counter = lambda: clock.now
    monkeypatch.setattr(runlog_room, "time", clock)
    with start(log_every=1, num_steps=4) as runlog:
        runlog.scoring = 2, 5, 3
        for step in (1, 2, 3, 4):
            clock.now += 10.0
            runlog.log(step, {"loss": 1.0}, clips=2)
            for model, seconds in (("trained", 100.0), ("copy_first_mask", 10.0)):
                with runlog.counting("val videos", 5, model):
                    clock.now += seconds
            runlog.record(step, {})
    lines = [line for line in shown(screen).splitlines() if line.startswith("step ")]
    left = [30, 20 + 100 + 126, 10 + 100 + 126, 126]
    assert [line.split("  ")[3] for line in lines] == [
        f"{timedelta(seconds=seconds)} left" for seconds in left
    ]
    assert "loss 1  0.2 clips/s" in lines[0]


def test_videos_are_counted_beside_the_steps(start):
    terminal = Console(
        file=io.StringIO(), width=80, force_terminal=True, _environ={"TERM": "xterm"}
    )
    with start(console=terminal) as runlog:
        for _ in range(2):  # before the first step, and after it
            with runlog.counting("val videos, step 3", 5, "trained") as count:
                count()
                count()
                bar = runlog._progress
                assert bar is None or (bar.tasks[-1].completed, bar.tasks[-1].total) == (2, 5)
            runlog.log(1, {"loss": 1.0})
        assert len(runlog._progress.tasks) == 1


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
