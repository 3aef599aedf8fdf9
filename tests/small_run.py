"""A small experiment, as settings and as a file, and what its run writes."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from conftest import make_coco
from rich.console import Console

from sam2train import checkpoint, cli
from sam2train.experiment import Experiment
from sam2train.trainer import Trainer

CONFIG = "sam2train/configs/sam2.1_hiera_demo.yaml"


EXPERIMENT = """\
# A small experiment of the tests.
dataset: {{data_path: "{data}", val_path: "{data}", image_size: [64, 64], video_clip_length: 3}}
model:
  config_path: sam2train/configs/sam2.1_hiera_demo.yaml
  image_size: 64
trainer: {{num_steps: 2, val_every: 2, save_every: 2, device: cpu}}
tracking: {{mode: disabled}}
"""


def small_experiments(folder: Path) -> Callable[..., Experiment]:
    """A small experiment on a small data set; sections are changed by keyword."""
    data = str(make_coco(folder / "data", num_videos=3, num_frames=5, size=(64, 64)))

    def build(**changes) -> Experiment:
        sections = {
            "dataset": {
                "data_path": data,
                "val_path": data,
                "image_size": [64, 64],
                "video_clip_length": 3,
                "prompt_types": ["point", "bbox", "mask"],
            },
            "model": {"config_path": CONFIG, "image_size": 64, "num_maskmem": 2},
            "optimizer": {"learning_rate": 1e-3},
            "trainer": {
                "num_steps": 4,
                "val_every": 2,
                "save_every": 2,
                "log_every": 1,
                "device": "cpu",
            },
            "evaluation": {"max_videos": 1, "num_overlays": 1},
            "tracking": {"mode": "disabled"},
        }
        for name, change in changes.items():
            sections[name] = {**sections.get(name, {}), **change}
        return Experiment.model_validate(sections)

    return build


def write_experiment(folder: Path, monkeypatch) -> Path:
    """The YAML of a small experiment in a folder that becomes the working folder."""
    monkeypatch.chdir(folder)
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    data = make_coco(folder / "data", num_frames=5, size=(64, 64))
    path = folder / "small.yaml"
    path.write_text(EXPERIMENT.format(data=data))
    return path


def fails(capsys, *words) -> str:
    """The message of a command that must fail as a user's mistake."""
    assert cli.main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.startswith("error: ")
    return printed


def make_trainer(experiment, run_dir, **options) -> Trainer:
    quiet = Console(quiet=True)
    return Trainer(experiment, run_dir, run_id="run", name="test", console=quiet, **options)


def rows(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name
