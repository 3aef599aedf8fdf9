"""The memory of a step, measured in processes of their own."""

import io
import sys

import pytest
from rich.console import Console
from small_run import fails, write_experiment
from test_trainer import experiment  # noqa: F401

from sam2train import probe
from sam2train.errors import MachineFault, explain
from sam2train.experiment import Experiment, build_model, load_experiment
from sam2train.probe import (
    Found,
    Setting,
    estimate_step,
    fits,
    measure_setting,
    memory_warning,
    settings_of,
)

# ruff: noqa: F811


def test_more_frames_take_more_memory(experiment):
    few, many = (
        measure_setting(experiment(), Setting(frames, 2, 128, False), 64 << 30)
        for frames in (2, 24)
    )
    assert few.problem == many.problem == ""
    assert many.peak > few.peak + 20e6
    assert 100e6 < few.peak < 3e9
    settings = Setting(24, 2, 128, False).apply(experiment(dataset={"max_objects": 2}))
    assert 0.8 * many.peak < estimate_step(settings, build_model(settings)) < 1.6 * many.peak


def test_a_step_that_runs_out_of_memory_ends_alone(experiment):
    found = measure_setting(experiment(), Setting(1000, 2, 128, False), 10**9)
    assert found.peak is None
    assert "out of memory" in found.problem


def test_a_setting_is_that_of_the_step(experiment):
    changed = Setting(5, 3, 96, True).apply(experiment())
    assert (changed.dataset.video_clip_length, changed.model.image_size) == (5, 96)
    assert changed.dataset.image_size == (96, 96)
    assert changed.trainer.activation_checkpointing
    assert not changed.features.cache
    batch = probe.made_up_batch(changed, 3)
    assert batch.img_batch.shape == (5, 1, 3, 96, 96)
    assert batch.masks.shape == (5, 3, 96, 96)


def test_nothing_larger_is_tried_than_what_does_not_fit(experiment, monkeypatch):
    """A step takes a GB for each frame, and there are 10."""
    asked = []

    def pretend(experiment, setting, limit):
        asked.append(setting)
        return Found(setting, setting.frames * setting.objects * 10**9 // 2, 1.0)

    monkeypatch.setattr(probe, "measure_setting", pretend)
    monkeypatch.setattr(probe, "memory_here", lambda experiment: (10 * 10**9, "a test"))
    console = Console(file=io.StringIO(), width=120)
    settings = experiment(dataset={"max_objects": 2})
    rows = probe.probe(settings, console)
    assert [row.setting for row in rows] == asked
    assert {(s.frames, s.objects) for s in asked} == {(3, 2), (6, 2), (12, 2), (3, 4), (3, 8)}
    assert [fits(row, 10 * 10**9) for row in rows if row.setting.frames == 12] == [False]
    text = console.file.getvalue()
    assert "12.00" in text
    assert "a test, 10.0 GB" in text
    (own,) = settings_of(settings)[1]
    assert own == Setting(3, 2, 64, False)


def test_where_free_memory_is_not_told_the_probe_says_so(monkeypatch):
    """As on macOS and Windows, which have no /proc; `resource` is not on Windows."""
    experiment = Experiment.model_validate(
        {"dataset": {"data_path": "x"}, "trainer": {"device": "cpu"}}
    )
    monkeypatch.setattr(probe.Path, "read_text", raises(FileNotFoundError))
    monkeypatch.setitem(sys.modules, "resource", None)
    with pytest.raises(MachineFault, match="--probe needs it, or a CUDA device"):
        probe.memory_here(experiment)
    assert probe.free_memory(experiment) is None


def raises(kind):
    def function(*_, **__):
        raise kind

    return function


def test_the_message_of_a_full_memory_names_the_probe():
    with pytest.raises(MemoryError) as caught:
        raise MemoryError
    assert "--probe measures which fit" in explain(caught.value)


def test_the_estimate_grows_with_what_takes_memory(experiment):
    def estimate(trained=("memory_attention",), clicks=0, **setting):
        base = {"frames": 4, "objects": 2, "size": 64, "checkpointing": False}
        changed = experiment(
            model={"trainable_modules": list(trained)},
            interaction={"num_correction_pt_per_frame": clicks},
            dataset={"max_objects": {**base, **setting}["objects"], "prompt_types": ["point"]},
        )
        changed = Setting(**{**base, **setting}).apply(changed)
        return estimate_step(changed, build_model(changed))

    least = estimate(checkpointing=True)
    assert least < estimate()
    for more in ({"frames": 8}, {"objects": 4}, {"size": 128}, {"clicks": 3}, {"trained": ["*"]}):
        assert estimate(**more) > estimate()


def test_a_smoke_that_needs_more_than_there_is_is_refused(tmp_path, monkeypatch, capsys):
    """A training is only warned: the estimate is rough."""
    path = write_experiment(tmp_path, monkeypatch)
    monkeypatch.setattr("sam2train.training_run.free_memory", lambda experiment: 10**8)
    message = fails(capsys, path, "--smoke")
    assert "a step is estimated to take 1 GB, and 0.1 GB of memory are free; lower" in message
    changed = load_experiment(path)
    assert memory_warning(changed, build_model(changed), 10**10) is None
    assert memory_warning(changed, build_model(changed), None) is None  # nobody knows
