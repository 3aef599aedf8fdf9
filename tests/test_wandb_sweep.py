"""Sweeps end to end: the real `wandb sweep`, `agent` and `sync` and a server of the tests' own."""

import contextlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from conftest import make_coco
from PIL import Image
from wandb_server import KEY, Run, WandbServer, grid_trials

from sam2train.config import flatten, sweep_parameters
from sam2train.sweep_file import grid, load_sweep
from sam2train.sweep_trials import Trial

ROOT = Path(__file__).parents[1]
SWEEPS = sorted((ROOT / "sweeps").glob("*.yaml"))
PATIENCE = 240  # seconds; an agent with two trials takes 40 s, on a busy machine 120 s
METRIC = "val/J_and_F"

EXPERIMENT = """\
dataset: {{data_path: "{data}", val_path: "{data}", image_size: [64, 64], video_clip_length: 3}}
model: {{config_path: sam2train/configs/sam2.1_hiera_demo.yaml, image_size: 64}}
trainer: {{num_steps: 2, val_every: 2, save_every: 2, log_every: 1, device: cpu}}
"""
SWEEP = {
    "program": "run.py",
    "project": "loop",
    "method": "grid",
    "metric": {"name": METRIC, "goal": "maximize"},
    "command": ["${env}", "${interpreter}", "${program}", "small.yaml", "${args}"],
}
FOREVER = 100_000  # steps

# Stands in for run.py: writes down how it was called, then waits for its end.
RECORDER = """
import json, os, sys, time
from pathlib import Path

call = {"words": sys.argv[1:], "typed": os.environ["WANDB_SWEEP_PARAM_PATH"]}
path = Path(os.environ["WANDB_RUN_ID"])
path.with_suffix(".tmp").write_text(json.dumps(call))
path.with_suffix(".tmp").rename(path.with_suffix(".json"))
time.sleep(600)
"""

TABLE = """
from pathlib import Path
from sam2train.run_folder import RunFolder
from sam2train.runlog import RunLog
from sam2train.runlog_wandb import TrackingConfig

settings = {"run_id": "table", "name": "t", "settings": {}, "log_every": 1, "num_steps": 1}
with RunLog(TrackingConfig(mode="offline"), RunFolder(Path("table")), **settings) as runlog:
    runlog.report(3, {"cells": [{"prompt": "point", "J": 0.5}, {"prompt": "mask", "J": 1}]}, [])
"""


class Machine:
    """A folder from which W&B's client sees nothing but itself and the server."""

    def __init__(self, folder: Path, server: WandbServer) -> None:
        self.folder, self.server = folder, server
        for name in ("home", "work"):
            (folder / name).mkdir()
        self.work = folder / "work"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB_", "PYTEST_"))}
        self.environment = kept | {
            "HOME": str(folder / "home"),
            "NETRC": str(folder / "home" / "netrc"),
            "OMP_NUM_THREADS": "1",
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",  # an agent starts `python`
            "WANDB_AGENT_KILL_DELAY": "120",  # a busy machine needs longer than 30 s to save
            "WANDB_API_KEY": KEY,
            "WANDB_BASE_URL": server.url,
            "WANDB_CACHE_DIR": str(folder / "cache"),
            "WANDB_CONFIG_DIR": str(folder / "config"),
            "WANDB_DATA_DIR": str(folder / "data"),
            "WANDB_ERROR_REPORTING": "false",
            # W&B sends what was logged every 15 s.
            "WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.5",
        }

    def start(self, *words: object, cwd: Path | None = None, **more: str) -> subprocess.Popen:
        return subprocess.Popen(
            [sys.executable, *map(str, words)],
            cwd=cwd or self.work,
            env=self.environment | more,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: object, cwd: Path | None = None, **more: str) -> str:
        """What the command printed; it has to end well, and in time."""
        return finish(self.start(*words, cwd=cwd, **more))

    def make_sweep(self, path: Path, cwd: Path | None = None) -> str:
        """The path of a new sweep at the server, as `wandb sweep` prints it for the agents."""
        printed = self.run("-m", "wandb", "sweep", path, cwd=cwd)
        return printed.split("wandb agent ")[1].split()[0]

    def clean_up(self) -> None:
        """End every process that was started from here and still runs, wandb-core included."""
        mark = f"WANDB_CONFIG_DIR={self.folder / 'config'}\0".encode()
        for place in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                if mark in (place / "environ").read_bytes():
                    os.kill(int(place.name), signal.SIGKILL)


def finish(process: subprocess.Popen) -> str:
    """What the process printed, once it has ended well."""
    try:
        printed, _ = process.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        printed, _ = process.communicate(timeout=10)
        pytest.fail(f"{process.args} did not end:\n{printed}")
    assert process.returncode == 0, printed
    return printed


def scores(run: Run) -> list[float]:
    return [row[METRIC] for row in run.history if METRIC in row]


def lags(run: Run) -> bool:
    """Ends the trial that would never end, once training shows in its score."""
    return run.config["trainer.num_steps"] == FOREVER and len(scores(run)) >= 2


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine")
    with WandbServer(stop=lags) as server:
        there = Machine(folder, server)
        data = make_coco(there.work / "data", num_frames=5, size=(64, 64))
        (there.work / "small.yaml").write_text(EXPERIMENT.format(data=data))
        (there.work / "run.py").symlink_to(ROOT / "run.py")
        try:
            yield there
        finally:
            there.clean_up()


@pytest.fixture(scope="module")
def agent(machine):
    """(sweep at the server, what the agent printed) of two trials, the first of them stopped."""
    parameters = {
        "dataset.prompt_types": {"value": ["point", "bbox"]},
        "loss": {"parameters": {"dice": {"value": 3.5}, "focal": {"value": 1.0e-05}}},
        "trainer.bf16": {"value": False},
        "trainer.num_steps": {"values": [FOREVER, 2]},
    }
    path = machine.work / "sweep.yaml"
    path.write_text(yaml.safe_dump({**SWEEP, "parameters": parameters}))
    sweep = machine.make_sweep(path)
    # A trial that is stopped early must not count as one that failed.
    options = ("--count", "2", "--max-consecutive-failed-runs", "1")
    printed = machine.run("-m", "wandb", "agent", *options, sweep)
    assert machine.server.unknown == []
    return machine.server.sweeps[sweep.split("/")[-1]], printed


def run_folder(machine: Machine, run: Run) -> Path:
    return machine.work / "runs" / "small" / run.id


def check_arrived(run: Run, folder: Path) -> None:
    """The server has the scores, pictures and summary that lie in the run's folder."""
    summary = json.loads((folder / "summary.json").read_text())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    named = [row for row in rows if METRIC in row]
    assert scores(run) == pytest.approx([row[METRIC] for row in named])
    steps = [row["trainer/global_step"] for row in run.history if METRIC in row]
    assert steps == [row["step"] for row in named]
    losses = [row["loss"] for row in run.history if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in rows if "loss" in row])
    parameters = {name for name in summary if name.startswith("params/")}
    assert {"params/total", "params/trainable", "params/memory_attention"} <= parameters
    for name in (*parameters, METRIC, "baseline/J_and_F", "best/J_and_F", "status", "steps"):
        assert run.summary[name] == pytest.approx(summary[name])

    pictures = [row for row in run.history if "overlays/video_1" in row]
    assert [row["trainer/global_step"] for row in pictures] == steps
    for row in pictures:
        with Image.open(io.BytesIO(run.files[row["overlays/video_1"]["path"]])) as composed:
            assert np.asarray(composed).std() > 10  # no black one
        toggled = row["masks/video_1"]
        with Image.open(io.BytesIO(run.files[toggled["path"]])) as frame:
            size = frame.size
        assert set(toggled["masks"]) == {"prediction", "ground_truth"}
        with Image.open(io.BytesIO(run.files[toggled["masks"]["ground_truth"]["path"]])) as mask:
            assert mask.size == size
            assert set(np.unique(mask)) == {0, 1, 2}


def test_agent_runs_the_trials_of_a_sweep(machine, agent):
    sweep, printed = agent
    assert (sweep.project, sweep.config["program"]) == ("loop", "run.py")
    assert [values["trainer.num_steps"] for values in sweep.trials.values()] == [FOREVER, 2]
    assert "--loss={'dice': 3.5, 'focal': 1e-05}" in printed
    run = machine.server.runs[list(sweep.trials)[1]]
    assert (run.sweep, run.exit_code, run.summary["status"]) == (sweep.id, 0, "finished")
    assert (run.config["trainer.num_steps"], run.config["dataset"]["num_workers"]) == (2, 0)
    assert (run.config["loss"]["dice"], run.config["loss"]["focal"]) == (3.5, 1e-05)
    check_arrived(run, run_folder(machine, run))
    assert run.summary["steps"] == 2
    # Values of every type, dotted and nested, as the trial understood them.
    settings = flatten(yaml.safe_load((run_folder(machine, run) / "config.yaml").read_text()))
    assert settings["dataset.prompt_types"] == ["point", "bbox"]
    assert (settings["loss.dice"], settings["loss.focal"]) == (3.5, 1e-05)
    assert settings["trainer.bf16"] is False


def test_a_trial_that_is_stopped_early_saves_and_does_not_count_as_failed(machine, agent):
    sweep, printed = agent
    first, second = (machine.server.runs[run_id] for run_id in sweep.trials)
    assert machine.server.stopped == [first.id]
    assert "consecutive failed runs" not in printed
    assert second.exit_code == 0  # the agent went on
    folder = run_folder(machine, first)
    again = rf"saved\. Go on with:\n  python run\.py small\.yaml .* --resume runs/small/{first.id}"
    assert re.search(again, printed)
    assert (folder / "checkpoints" / "last.pt").is_file()
    assert first.sweep == sweep.id
    assert first.summary["status"] == "interrupted"
    assert 2 <= first.summary["steps"] < FOREVER
    check_arrived(first, folder)  # what was logged before the signal, to the last row


def test_runs_made_offline_join_the_sweep(machine):
    server = machine.server
    content = {**SWEEP, "parameters": {"trainer.seed": {"values": [5, 6]}}}
    (machine.work / "offline.yaml").write_text(yaml.safe_dump(content))
    sweep = machine.make_sweep(machine.work / "offline.yaml")
    before = len(server.operations)
    table = machine.start("-c", TABLE, PYTHONPATH=str(ROOT))
    machine.run("run.py", "offline.yaml", "--count", "1", WANDB_SWEEP_ID=sweep)
    finish(table)
    assert server.operations[before:] == []  # there is a key, and yet nothing went online
    folder = machine.work / "runs" / "sweeps" / "offline" / "001"
    found = [*folder.glob("wandb/offline-run-*"), *machine.work.glob("table/wandb/offline-run-*")]
    assert len(found) == 2
    machine.run("-m", "wandb", "sync", *found)
    assert server.unknown == []

    (run,) = [run for run in server.runs.values() if run.sweep == sweep.split("/")[-1]]
    assert (run.project, run.exit_code, run.config["trainer"]["seed"]) == ("loop", 0, 5)
    check_arrived(run, folder)

    (row,) = server.runs["table"].history
    assert (row["trainer/global_step"], row["tables/cells"]["nrows"]) == (3, 2)
    content = json.loads(server.runs["table"].files[row["tables/cells"]["path"]])
    assert content["data"] == [["point", 0.5], ["mask", 1]]
    (artifact,) = [a for a in server.artifacts.values() if a.run == "table"]
    assert artifact.committed
    assert "wandb_manifest.json" in artifact.files


def local_trials(path: Path) -> list[dict]:
    """name -> value of the first trials that `python run.py` makes of the file."""
    made = load_sweep(path)
    if made.config.method == "grid":
        return grid(made)
    drawn = []
    for name in ("001", "002", "003"):
        values = made.next_values(drawn)
        drawn.append(Trial(name, name, values, Path(name), state="running"))
    return [trial.values for trial in drawn]


def trials_of_wandb(content: dict) -> list[dict]:
    """The server's own grid; what W&B's engine draws for bayes follows from its random numbers."""
    if content["method"] == "grid":
        return list(grid_trials(content))
    return local_trials(ROOT / "sweeps" / f"{content['name']}.yaml")


@pytest.fixture(scope="module")
def calls(tmp_path_factory):
    """Sweep file -> run id -> how an agent ran its trials; all agents at the same time."""
    folder = tmp_path_factory.mktemp("agents")
    with WandbServer(at_once=1000, trials=trials_of_wandb) as server:
        machine = Machine(folder, server)
        (machine.work / "run.py").write_text(RECORDER)
        try:
            made = [machine.start("-m", "wandb", "sweep", path) for path in SWEEPS]
            sweeps = [finish(one).split("wandb agent ")[1].split()[0] for one in made]
            agents = [machine.start("-m", "wandb", "agent", sweep) for sweep in sweeps]
            found = [server.sweeps[sweep.split("/")[-1]] for sweep in sweeps]
            deadline = time.monotonic() + PATIENCE
            while any(agent.poll() is None for agent in agents):
                assert time.monotonic() < deadline, [agent.args for agent in agents]
                for sweep in found:
                    files = [machine.work / f"{run_id}.json" for run_id in sweep.trials]
                    if files and all(file.is_file() for file in files):
                        sweep.state = "CANCELED"
                time.sleep(0.1)
            for agent in agents:
                finish(agent)
            assert server.unknown == []
            yield {
                path: {
                    run_id: json.loads((machine.work / f"{run_id}.json").read_text())
                    for run_id in sweep.trials
                }
                for path, sweep in zip(SWEEPS, found, strict=True)
            }
        finally:
            machine.clean_up()


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_the_same_trials_by_agent_and_here(calls, path):
    made, trials = load_sweep(path), local_trials(path)
    assert len(calls[path]) == len(trials) >= 3
    for call, values in zip(calls[path].values(), trials, strict=True):
        assert call["words"] == made.command(values)[2:]  # behind `python run.py`
        typed = sweep_parameters(Path(call["typed"]))
        assert repr(sorted(typed.items())) == repr(sorted(flatten(values).items()))


def test_nested_parameters_are_one_value():
    inner = {"b": {"values": [1, 2]}, "a": {"value": None}}
    sweep = {"parameters": {"y": {"values": ["u", "v"]}, "x": {"parameters": inner}}}
    assert list(grid_trials(sweep)) == [
        {"x": {"a": None, "b": b}, "y": y} for b in (1, 2) for y in ("u", "v")
    ]


def test_the_server_refuses_what_it_does_not_know():
    import urllib.error
    import urllib.request

    with WandbServer() as server:
        body = json.dumps({"query": "query Weather { sky }"}).encode()
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/graphql", body, timeout=10)
        with refused.value:
            assert b"Weather" in refused.value.read()
        assert [text.split(":")[0] for text in server.unknown] == ["Weather"]
