"""A log of a run that trains nothing, and what it wrote."""

import json
import os
import subprocess
import sys

import numpy as np
import wandb
from PIL import Image

from sam2train.overlays import Overlay
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog
from sam2train.runlog_wandb import TrackingConfig

OFF, OFFLINE = TrackingConfig(mode="disabled"), TrackingConfig(mode="offline")


def without_wandb(folder, monkeypatch):
    """No W&B variables, keys or settings of whoever runs the tests; W&B reads them once."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("NETRC", str(folder / "netrc"))
    monkeypatch.chdir(folder)
    wandb.teardown()
    yield
    wandb.teardown()


def logs_of(folder, screen):
    """A function that makes a log of the run `folder / "run"`, writing to `screen`."""

    def make(config=OFF, **changes):
        arguments = {"run_id": "abc", "name": "night", "settings": {"model": {"num_maskmem": 7}}}
        arguments |= {"log_every": 2, "num_steps": 100, "console": screen, **changes}
        return RunLog(config, RunFolder(folder / "run"), **arguments)

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
    film = tmp_path / "composed.webm"
    film.write_bytes(b"film")
    fields["film"] = film
    fields |= {"ground_truth": mask, "class_labels": {np.int64(1): "cat"}}
    return Overlay(**(fields | changes))
