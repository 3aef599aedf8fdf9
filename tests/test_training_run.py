"""One training as a user starts, stops and resumes it."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import yaml
from small_run import fails, write_experiment

from sam2train import checkpoint, cli
from sam2train.files import REPOSITORY

ROOT = REPOSITORY


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return write_experiment(tmp_path, monkeypatch)


def test_train_then_resume_then_the_same_folder_again(experiment, tmp_path, capsys):
    run_dir = tmp_path / "my run"
    assert cli.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"{run_dir}/" in printed
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "environment.json"):
        assert (run_dir / name).is_file()

    message = fails(capsys, experiment, "--run-dir", run_dir)
    assert "--resume" in message

    more = ["--run-dir", str(run_dir), "--resume", "trainer.num_steps=3"]
    assert cli.main([str(experiment), *more]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["status"]) == (3, "finished")

    message = fails(capsys, experiment, *more, "model.num_maskmem=3", "optimizer.learning_rate=1")
    assert "model.num_maskmem: 7 in the run, 3 now" in message
    assert "optimizer.learning_rate" in message


def test_runs_go_to_a_folder_of_their_own(experiment, tmp_path):
    assert cli.main([str(experiment), "--trainer.num_steps=0"]) == 0
    (first,) = (tmp_path / "runs" / "small").iterdir()
    assert cli.main([str(experiment), "--resume", "trainer.num_steps=1"]) == 0
    assert json.loads((first / "summary.json").read_text())["steps"] == 1
    assert [first] == list((tmp_path / "runs" / "small").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_whole_group_saves_first(experiment, tmp_path, number):
    """What `timeout` and some job schedulers send; processes that load data get it, too."""
    run_dir = tmp_path / "run"
    words = ["trainer.num_steps=5000", "trainer.log_every=1", "dataset.num_workers=1"]
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", experiment, *words, "--run-dir", run_dir],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        metrics = run_dir / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while not (metrics.is_file() and '"step": 3' in metrics.read_text()):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, number)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 128 + number, errors
    assert "Traceback" not in errors
    assert (run_dir / "checkpoints" / "last.pt").is_file()


def test_a_run_that_fails_ends(experiment, tmp_path):
    """Processes that load data are ended with it, whatever they do about signals."""
    words = ["dataset.val_path=null", "dataset.num_workers=1", "optimizer.learning_rate=1e30"]
    words += ["trainer.num_steps=50", f"--run-dir={tmp_path / 'run'}"]
    done = subprocess.run(
        [sys.executable, ROOT / "run.py", experiment, *words],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 1
    assert "is not finite" in done.stderr


def test_resume_auto_starts_and_then_goes_on(experiment, tmp_path, capsys):
    """The same command each time, as a job scheduler that starts a job again gives it."""
    run_dir = tmp_path / "one"
    command = [str(experiment), "--run-dir", str(run_dir), "--resume", "auto"]
    for steps in (1, 2):
        assert cli.main([*command, f"trainer.num_steps={steps}"]) == 0
        assert json.loads((run_dir / "summary.json").read_text())["steps"] == steps
    # Killed while it renamed the two.
    (run_dir / "checkpoints" / "last.pt").unlink()
    assert cli.main([*command, "trainer.num_steps=2"]) == 0
    assert "going on from the checkpoint before" in capsys.readouterr().out
    # Without a folder: the newest run, unless it is finished.
    command = [str(experiment), "trainer.num_steps=0", "--resume", "auto"]
    assert cli.main(command) == 0
    (first,) = (tmp_path / "runs" / "small").iterdir()
    summary = json.loads((first / "summary.json").read_text())
    (first / "summary.json").write_text(json.dumps(summary | {"status": "interrupted"}))
    assert cli.main(command) == 0
    assert [first] == list((tmp_path / "runs" / "small").iterdir())
    assert cli.main(command) == 0
    assert len(list((tmp_path / "runs" / "small").iterdir())) == 2


def test_a_resumed_run_is_scored_as_before(experiment, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert cli.main([str(experiment), "--run-dir", run_dir]) == 0
    message = fails(capsys, experiment, "--resume", run_dir, "evaluation.max_frames=3")
    assert "evaluation.max_frames: None in the run, 3 now" in message
    words = ["trainer.num_steps=3", "evaluation.num_overlays=0"]
    assert cli.main([str(experiment), "--resume", run_dir, *words]) == 0


def test_a_run_folder_that_cannot_be(experiment, capsys):
    assert cli.main([str(experiment), "--run-dir", str(experiment)]) == 2
    assert "cannot be the folder of the run" in capsys.readouterr().err


def test_the_end_names_files_that_are_there(experiment, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main([str(experiment), "dataset.val_path=null", "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert printed.count(str(run_dir)) == 1
    assert "\n  checkpoints/last.pt " in printed
    for absent in ("best.pt", "scores.csv", "overlays"):
        assert absent not in printed


def forget_the_seed_of_prompts(run_dir):
    """Make a run folder one of a version that drew evaluation prompts from trainer.seed."""
    last = run_dir / "checkpoints" / "last.pt"
    content = checkpoint.load(last)
    config = yaml.safe_load(content["config"])
    assert config["evaluation"].pop("seed") == config["trainer"]["seed"]
    for section in ("dataset", "model"):
        del config[section]["seed"]
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint.save(last, content | {"config": yaml.safe_dump(config)})


def test_a_run_from_before_the_seed_of_prompts_is_scored_as_before(experiment, tmp_path, capsys):
    words = [str(experiment), "trainer.seed=5", "trainer.val_every=1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    own = ["evaluation.seed=5"]  # what such a version did
    assert cli.main([*words, *own, "trainer.num_steps=3", "--run-dir", str(whole)]) == 0
    assert cli.main([*words, *own, "trainer.num_steps=2", "--run-dir", str(parts)]) == 0
    forget_the_seed_of_prompts(parts)

    more = [*words, "--resume", str(parts), "trainer.num_steps=3"]
    message = fails(capsys, *more, "evaluation.seed=0")
    assert "evaluation.seed: None in the run, 0 now" in message
    assert cli.main(more) == 0
    assert (parts / "scores.csv").read_text() == (whole / "scores.csv").read_text()
    assert yaml.safe_load((parts / "config.yaml").read_text())["evaluation"]["seed"] is None
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["evaluation_seed"] == 5
    assert cli.main([*words, "--resume", str(parts), "trainer.num_steps=4"]) == 0


def test_a_run_killed_at_once_writes_the_same_rows(experiment, tmp_path):
    words = ["trainer.num_steps=9", "trainer.log_every=5", "trainer.save_every=3"]
    words += ["evaluation.max_frames=2", "evaluation.num_overlays=0"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    process = subprocess.Popen(
        [sys.executable, ROOT / "run.py", experiment, *words, "--run-dir", parts],
        stdout=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        deadline = time.monotonic() + 120
        while not (parts / "checkpoints" / "last.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert cli.main([str(experiment), *words, "--run-dir", str(parts), "--resume"]) == 0
    assert cli.main([str(experiment), *words, "--run-dir", str(whole)]) == 0

    timed = ("seconds", "clips_per_second", "memory_gb", "features/hit_rate")
    found = []
    for run_dir in (whole, parts):
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        found.append([{k: v for k, v in row.items() if k not in timed} for row in lines])
    assert found[0] == found[1]
    assert [row["step"] for row in found[0] if "loss" in row] == [5, 9]
    for name in ("scores.csv", "horizon.csv"):
        assert (parts / name).read_text() == (whole / name).read_text()


def test_sam2_tiny_trains_a_step_on_the_cpu(tmp_path):
    """The guide's model block with random weights: Hiera-T, 512 px, num_maskmem 7."""
    words = [
        str(REPOSITORY / "experiments" / "sam2.1_tiny.yaml"),
        "model.checkpoint_path=null",
        "dataset.val_path=null",
        "dataset.test_path=null",
        "dataset.video_clip_length=2",
        "dataset.max_objects=1",
        "dataset.num_workers=0",
        "trainer.num_steps=1",
        "trainer.device=cpu",
        "tracking.mode=disabled",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    assert cli.main(words) == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["params/total"] == 38_962_498
    assert summary["params/trainable"] == 5_922_304 + 1_384_608
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    audit = next(row for row in map(json.loads, lines) if "audit/memory_encoder/tensors" in row)
    assert audit["audit/memory_encoder/with_gradient"] == 40
