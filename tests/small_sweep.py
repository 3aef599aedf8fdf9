"""A sweep of trials that take no time, for the tests of local sweeps."""

import json
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from sam2train import sweep
from sam2train.errors import UserError

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
SEEDS = {"trainer.seed": {"values": [0, 1, 2]}}
EXPERIMENT = """\
dataset: {data_path: train.json, val_path: val.json, image_size: [64, 64], video_clip_length: 3}
model: {config_path: sam2train/configs/sam2.1_hiera_demo.yaml, image_size: 64}
trainer: {num_steps: 4}
"""
COMMAND = ["${env}", "${interpreter}", "${program}", "small.yaml", "${args}"]

# Stands in for run.py: a trial of 4 steps that saves each, as told by the files beside it.
TRIAL = """
import json, os, signal, sys, time
from pathlib import Path

words = sys.argv[1:]
folder = Path(words[words.index("--run-dir") + 1])
last = folder / "checkpoints" / "last.pt"
done = int(last.read_text()) if "--resume" in words else 0
last.parent.mkdir(parents=True, exist_ok=True)
names = ("OMP_NUM_THREADS", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_PROJECT", "WANDB_MODE")
call = {"words": words, "from": done, "env": {n: os.environ.get(n) for n in names}}
call["began"] = time.time()
slow = float(Path("slow").read_text()) if Path("slow").exists() else 0
seed = int(dict(w.removeprefix("--").split("=", 1) for w in words if "=" in w)["trainer.seed"])

def end(status, code):
    summary = {"status": status, "baseline/J_and_F": 0.1, "seconds": 1.0 * done}
    (folder / "summary.json").write_text(json.dumps(summary))
    with (folder.parent / "calls.jsonl").open("a") as file:
        file.write(json.dumps({**call, "ended": time.time(), "trial": folder.name}) + "\\n")
    sys.exit(code)

def stop(number, _):
    last.write_text(str(done))
    end("interrupted", 128 + number)

signal.signal(signal.SIGTERM, stop)
if Path(f"fail-{seed}").exists():
    print("a rule of the trial was broken")
    end("failed", 1)
while done < 4:
    done += 1
    row = {"step": done, "seconds": 1.0 * done, "val/J_and_F": 0.1 * done + 0.01 * seed}
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\\n")
    if slow and done == 2:
        time.sleep(slow)
end("finished", 0)
"""


def write_sweep(folder: Path, parameters, **settings) -> Path:
    """small-sweep.yaml in the folder, a grid scored by J&F unless the settings say otherwise."""
    content = {"program": "run.py", "method": "grid", "command": COMMAND}
    content |= {"metric": {"name": "val/J_and_F", "goal": "maximize"}}
    content |= {**settings, "parameters": parameters}
    path = folder / "small-sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def run(path, **options) -> int:
    return sweep.run_sweep(path, console=Console(width=200), **options)


def calls() -> list[dict]:
    """How each trial was called, in the order in which they ended."""
    path = Path("runs/sweeps/small-sweep/calls.jsonl")
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines]


def results() -> dict[str, dict[str, str]]:
    """trial -> column -> cell of results.csv."""
    import pandas as pd

    frame = pd.read_csv("runs/sweeps/small-sweep/results.csv", dtype=str, keep_default_na=False)
    return frame.set_index("trial").to_dict("index")


def problems(write, parameters, **settings) -> str:
    """The message with which a sweep is refused, before anything is run."""
    path = write(parameters, **settings)
    with pytest.raises(UserError) as caught:
        run(path)
    assert not Path("runs").exists()
    assert "small-sweep.yaml" in str(caught.value)
    return str(caught.value)
