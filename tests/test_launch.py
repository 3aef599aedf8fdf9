"""The command line as a user meets it: what it prints, writes, and answers to a mistake."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import make_coco
from test_results import make_run

from sam2train import checkpoint, launch

ROOT = Path(__file__).parents[1]

EXPERIMENT = """\
# A small experiment of the tests.
dataset: {{data_path: "{data}", val_path: "{data}", image_size: [64, 64], video_clip_length: 3}}
model:
  config_path: sam2train/configs/sam2.1_hiera_demo.yaml
  image_size: 64
trainer: {{num_steps: 2, val_every: 2, save_every: 2, device: cpu}}
tracking: {{mode: disabled}}
"""


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("WANDB_SWEEP_PARAM_PATH", "WANDB_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    data = make_coco(tmp_path / "data", num_frames=5, size=(64, 64))
    path = tmp_path / "small.yaml"
    path.write_text(EXPERIMENT.format(data=data))
    return path


def fails(capsys, *words) -> str:
    """The message of a command that must fail as a user's mistake."""
    assert launch.main([str(word) for word in words]) == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    assert printed.startswith("error: ")
    return printed


@pytest.mark.parametrize("option", ["--help", "--list"])
def test_help_and_list_answer_at_once(option):
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, ROOT / "run.py", option], capture_output=True, text=True, check=True
        )
        seconds.append(time.perf_counter() - start)
    # Without anything heavy it takes 0.1 s; the best of three forgives a busy machine.
    assert min(seconds) < 0.5
    expected = "--dry-run" if option == "--help" else r"coco_point_bbox\.yaml +Fine-tune"
    assert re.search(expected, done.stdout)


def test_train_then_resume_then_the_same_folder_again(experiment, tmp_path, capsys):
    run_dir = tmp_path / "my run"
    assert launch.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert f"{run_dir}/" in printed
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "environment.json"):
        assert (run_dir / name).is_file()

    message = fails(capsys, experiment, "--run-dir", run_dir)
    assert "--resume" in message

    more = ["--run-dir", str(run_dir), "--resume", "trainer.num_steps=3"]
    assert launch.main([str(experiment), *more]) == 0
    summary = json.loads((run_dir / "summary.json").read_text())
    assert (summary["steps"], summary["status"]) == (3, "finished")

    message = fails(capsys, experiment, *more, "model.num_maskmem=3", "optimizer.learning_rate=1")
    assert "model.num_maskmem: 7 in the run, 3 now" in message
    assert "optimizer.learning_rate" in message


def test_runs_go_to_a_folder_of_their_own(experiment, tmp_path):
    assert launch.main([str(experiment), "--trainer.num_steps=0"]) == 0
    (first,) = (tmp_path / "runs" / "small").iterdir()
    assert launch.main([str(experiment), "--resume", "trainer.num_steps=1"]) == 0
    assert json.loads((first / "summary.json").read_text())["steps"] == 1
    assert [first] == list((tmp_path / "runs" / "small").iterdir())


def test_smoke_is_two_steps_of_anything(experiment, tmp_path):
    assert launch.main([str(experiment), "--smoke", "trainer.num_steps=2"]) == 0
    (run_dir,) = (tmp_path / "runs" / "smoke").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2


def test_dry_run_shows_and_writes_nothing(experiment, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert launch.main([str(experiment), "--dry-run", "model.num_maskmem=4"]) == 0
    printed = capsys.readouterr().out
    for part in (
        "num_maskmem: 4",
        "memory_attention",
        "(3, 1, 3, 64, 64)",
        "object 1:",
        "training",
    ):
        assert part in printed
    assert sorted(tmp_path.rglob("*")) == before


def test_export_gives_weights_that_sam2_loads(experiment, tmp_path, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "out" / "sam2.pt"
    assert launch.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    source = str(run_dir / "checkpoints" / "last.pt")
    assert launch.main([str(experiment), "--export", source, str(out)]) == 0
    again = [str(experiment), "--dry-run", f"model.checkpoint_path={out}"]
    assert launch.main(again) == 0
    capsys.readouterr()
    half = out.with_name("half.pt")
    assert launch.main([str(experiment), "--half", "--export", source, str(half)]) == 0
    assert half.stat().st_size < 6e6


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
    assert launch.main([str(experiment), *words, "--run-dir", str(parts), "--resume"]) == 0
    assert launch.main([str(experiment), *words, "--run-dir", str(whole)]) == 0

    timed = ("seconds", "clips_per_second", "memory_gb")
    found = []
    for run_dir in (whole, parts):
        lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
        found.append([{k: v for k, v in row.items() if k not in timed} for row in lines])
    assert found[0] == found[1]
    assert [row["step"] for row in found[0] if "loss" in row] == [5, 9]
    for name in ("scores.csv", "horizon.csv"):
        assert (parts / name).read_text() == (whole / name).read_text()


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


def test_export_replaces_nothing(experiment, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert launch.main([str(experiment), "--run-dir", str(run_dir)]) == 0
    source = run_dir / "checkpoints" / "last.pt"
    before = source.read_bytes()
    for target in (source, tmp_path):
        assert launch.main([str(experiment), "--export", str(source), str(target)]) == 2
        assert f"--export {target}: there is something already" in capsys.readouterr().err
    assert source.read_bytes() == before
    target = experiment / "x" / "out.pt"  # below a file
    assert launch.main([str(experiment), "--export", str(source), str(target)]) == 2
    assert "name another place" in capsys.readouterr().err


def test_export_takes_the_model_as_the_run_had_it(experiment, tmp_path, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "sam2.pt"
    changed = ("model.num_maskmem=3", "model.max_obj_ptrs_in_encoder=0")
    assert launch.main([str(experiment), *changed, "--run-dir", str(run_dir)]) == 0
    source = str(run_dir / "checkpoints" / "last.pt")
    assert launch.main([str(experiment), "--export", source, str(out)]) == 0
    printed = capsys.readouterr().out
    assert "++model.num_maskmem=3" in printed
    assert "++model.use_obj_ptrs_in_encoder=false" in printed


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--half"], "--half is a form of --export"),
        (["--dry-run", "--check-data"], "--dry-run and --check-data are two commands"),
        (["--evaluate", "base", "--export", "a", "b"], "--export and --evaluate are two commands"),
        (["--evaluate", "base", "--resume"], "--evaluate does not train"),
        (["--dry-run", "--run-dir", "x"], "--run-dir is for a run"),
    ],
)
def test_options_that_do_not_go_together(experiment, words, message, capsys):
    assert launch.main([str(experiment), *words]) == 2
    assert message in capsys.readouterr().err


def test_the_demo_reports_on_no_data_of_ones_own(experiment, tmp_path, capsys):
    """Its test videos are left out where the training or validation data are the user's."""
    main = str(ROOT / "experiments" / "coco_point_bbox.yaml")
    own = str(tmp_path / "data" / "annotations.json")
    words = [main, "--dry-run", f"dataset.data_path={own}", f"dataset.val_path={own}"]
    assert launch.main(words) == 0
    printed = capsys.readouterr().out
    assert "dataset.test_path is the demo's, beside data of your own: left out" in printed
    assert "test_path: null" in printed
    assert "dataset.val_path is the demo's" not in printed
    assert launch.main([*words, f"dataset.test_path={own}"]) == 0
    assert "the demo's" not in capsys.readouterr().out


def test_a_resumed_run_is_scored_as_before(experiment, tmp_path, capsys):
    run_dir = str(tmp_path / "run")
    assert launch.main([str(experiment), "--run-dir", run_dir]) == 0
    message = fails(capsys, experiment, "--resume", run_dir, "evaluation.max_frames=3")
    assert "evaluation.max_frames: None in the run, 3 now" in message
    words = ["trainer.num_steps=3", "evaluation.num_overlays=0"]
    assert launch.main([str(experiment), "--resume", run_dir, *words]) == 0


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
    assert launch.main([*words, *own, "trainer.num_steps=3", "--run-dir", str(whole)]) == 0
    assert launch.main([*words, *own, "trainer.num_steps=2", "--run-dir", str(parts)]) == 0
    forget_the_seed_of_prompts(parts)

    more = [*words, "--resume", str(parts), "trainer.num_steps=3"]
    message = fails(capsys, *more, "evaluation.seed=0")
    assert "evaluation.seed: None in the run, 0 now" in message
    assert launch.main(more) == 0
    assert (parts / "scores.csv").read_text() == (whole / "scores.csv").read_text()
    assert yaml.safe_load((parts / "config.yaml").read_text())["evaluation"]["seed"] is None
    summary = json.loads((parts / "summary.json").read_text())
    assert summary["evaluation_seed"] == 5
    assert launch.main([*words, "--resume", str(parts), "trainer.num_steps=4"]) == 0


def test_a_run_folder_that_cannot_be(experiment, capsys):
    assert launch.main([str(experiment), "--run-dir", str(experiment)]) == 2
    assert "cannot be the folder of the run" in capsys.readouterr().err


def test_the_end_names_files_that_are_there(experiment, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert launch.main([str(experiment), "dataset.val_path=null", "--run-dir", str(run_dir)]) == 0
    printed = capsys.readouterr().out
    assert str(run_dir / "checkpoints" / "last.pt") in printed
    for absent in ("best.pt", "scores.csv", "overlays"):
        assert str(run_dir / absent) not in printed
        assert f"/{absent}" not in printed


def test_a_sweep_agents_typed_values_win(experiment, tmp_path, monkeypatch, capsys):
    typed = tmp_path / "params.yaml"
    typed.write_text("model.num_maskmem: {value: 5}\nwandb_version: 1\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(typed))
    assert launch.main([str(experiment), "--dry-run", "--model.num_maskmem=4"]) == 0
    assert "num_maskmem: 5" in capsys.readouterr().out


def test_runs_and_compare_need_no_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = (make_run(tmp_path / "runs" / "small" / name) for name in ("one", "two"))
    assert launch.main(["--runs"]) == 0
    assert "finished" in capsys.readouterr().out
    assert launch.main(["--compare", str(first), str(second)]) == 0
    assert "over videos" in capsys.readouterr().out
    assert launch.main(["--collect", "runs/small"]) == 0
    assert "small.csv: 2 runs" in capsys.readouterr().out


class TestMistakes:
    def test_runs_and_compare(self, capsys, experiment, tmp_path):
        assert "nowhere" in fails(capsys, "--runs", tmp_path / "nowhere")
        assert "no run in it" in fails(capsys, "--runs", tmp_path / "data")
        assert "is no run" in fails(capsys, "--compare", tmp_path, tmp_path / "data")
        assert "key=value" in fails(capsys, "--runs", tmp_path, "--key=value")
        assert "small.yaml" in fails(capsys, experiment, "--runs")
        assert "--runs --collect" in fails(capsys, "--collect", "--runs")

    def test_no_file(self, capsys):
        assert "experiments/coco_point_bbox.yaml" in fails(capsys)

    def test_a_file_that_is_not_there(self, capsys, experiment):
        assert "small.yaml" in fails(capsys, experiment.with_name("smal.yaml"))

    def test_an_unknown_option(self, capsys, experiment):
        assert "--dryrun" in fails(capsys, experiment, "--dryrun")

    def test_an_unknown_key_names_the_near_one(self, capsys, experiment):
        message = fails(capsys, experiment, "trainer.num_step=3")
        assert "trainer.num_step" in message
        assert "trainer.num_steps" in message

    def test_a_word_that_is_no_override(self, capsys, experiment):
        assert "epochs" in fails(capsys, experiment, "epochs")

    def test_data_that_is_not_there(self, capsys, experiment):
        assert "nowhere.json" in fails(capsys, experiment, "dataset.data_path=nowhere.json")

    def test_a_checkpoint_that_is_not_there_names_the_address(self, capsys, experiment):
        path = "checkpoints/sam2.1_hiera_tiny.pt"
        message = fails(capsys, experiment, f"model.checkpoint_path={path}")
        assert (
            "https://dl.fbaipublicfiles.com/segment_anything_2/092824/sam2.1_hiera_tiny.pt"
            in message
        )
        assert "--download" in message

    def test_nothing_to_resume(self, capsys, experiment):
        assert "runs/small" in fails(capsys, experiment, "--resume")

    def test_a_gpu_that_is_not_there(self, capsys, experiment):
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is one")
        assert "cuda" in fails(capsys, experiment, "trainer.device=cuda")

    def test_nothing_to_train(self, capsys, experiment):
        assert "trainable_modules" in fails(capsys, experiment, "model.trainable_modules=[]")

    def test_a_module_that_does_not_exist(self, capsys, experiment):
        message = fails(capsys, experiment, "model.trainable_modules=[memory_atention]")
        assert "memory_attention" in message
