"""What the commands print and write."""

import json

import pytest
import torch
from small_run import fails, write_experiment
from test_results import make_run

from sam2train import cli
from sam2train.files import REPOSITORY
from sam2train.pretrained import build_sam2, resolve_config

ROOT = REPOSITORY


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return write_experiment(tmp_path, monkeypatch)


def test_smoke_is_two_steps_of_anything(experiment, tmp_path):
    assert cli.main([str(experiment), "--smoke", "trainer.num_steps=2"]) == 0
    (run_dir,) = (tmp_path / "runs" / "smoke").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2


def test_dry_run_shows_and_writes_nothing(experiment, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert cli.main([str(experiment), "--dry-run", "model.num_maskmem=4"]) == 0
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


def test_the_demo_reports_on_no_data_of_ones_own(experiment, tmp_path, capsys):
    """Its test videos are left out where the training or validation data are the user's."""
    main = str(ROOT / "experiments" / "coco_point_bbox.yaml")
    own = str(tmp_path / "data" / "annotations.json")
    words = [main, "--dry-run", f"dataset.data_path={own}", f"dataset.val_path={own}"]
    assert cli.main(words) == 0
    printed = capsys.readouterr().out
    assert "dataset.test_path is the demo's, beside data of your own: left out" in printed
    assert "test_path: null" in printed
    assert "dataset.val_path is the demo's" not in printed
    assert cli.main([*words, f"dataset.test_path={own}"]) == 0
    assert "the demo's" not in capsys.readouterr().out


def test_a_sweep_agents_typed_values_win(experiment, tmp_path, monkeypatch, capsys):
    typed = tmp_path / "params.yaml"
    typed.write_text("model.num_maskmem: {value: 5}\nwandb_version: 1\n")
    monkeypatch.setenv("WANDB_SWEEP_PARAM_PATH", str(typed))
    assert cli.main([str(experiment), "--dry-run", "--model.num_maskmem=4"]) == 0
    assert "num_maskmem: 5" in capsys.readouterr().out


def test_runs_and_compare_need_no_experiment(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    first, second = (make_run(tmp_path / "runs" / "small" / name) for name in ("one", "two"))
    assert cli.main(["--runs"]) == 0
    assert "finished" in capsys.readouterr().out
    assert cli.main(["--compare", str(first), str(second)]) == 0
    assert "over videos" in capsys.readouterr().out
    assert cli.main(["--collect", "runs/small"]) == 0
    assert "small.csv: 2 runs" in capsys.readouterr().out


def test_download_checks_the_file_that_is_there(experiment, capsys, tmp_path):
    config = "sam2train/configs/sam2.1_hiera_demo.yaml"
    sam2 = build_sam2(resolve_config(config), image_size=64, num_maskmem=7)
    torch.save({"model": sam2.state_dict()}, tmp_path / "mine.pt")
    assert cli.main([str(experiment), "--download", "model.checkpoint_path=mine.pt"]) == 0
    assert "mine.pt is there, and loads" in " ".join(capsys.readouterr().out.split())
    message = fails(capsys, experiment, "--download")
    assert "model.checkpoint_path is null" in message
    message = fails(capsys, experiment, "--download", "model.checkpoint_path=other.pt")
    assert "Meta publishes no other.pt" in message
