"""The three YAML blocks of the guide, word for word but for their paths, train a step."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_coco, make_frames
from guide_blocks import COCO, MODEL, VIDEO

from sam2train import checkpoint, cli
from sam2train.pretrained import build_sam2, resolve_config


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file of the layout of Meta's, of random weights."""
    torch.manual_seed(0)
    model = build_sam2(resolve_config("configs/sam2.1_hiera_t.yaml"), image_size=512, num_maskmem=7)
    path = tmp_path_factory.mktemp("meta") / "sam2.1_hiera_tiny.pt"
    torch.save({"model": model.state_dict()}, path)
    return path


@pytest.mark.parametrize("block", [VIDEO, COCO], ids=["video", "coco"])
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
def test_the_blocks_train_a_step(block, weights, tmp_path):
    if block == COCO:
        data = make_coco(tmp_path / "data", num_objects=1)
    else:
        data = tmp_path / "data"
        make_frames(data / "video_001", [f"frame_{t:03d}.jpg" for t in range(1, 7)])
    text = (block + MODEL).replace("/path/to/sam2_checkpoint.pt", str(weights))
    old = yaml.safe_load(block)["dataset"]["data_path"]
    path = tmp_path / "experiment.yaml"
    path.write_text(text.replace(old, str(data)))
    run = tmp_path / "run"
    words = ["trainer.num_steps=1", "trainer.device=cpu", "tracking.mode=disabled"]
    words += ["dataset.batch_size=1", "dataset.video_clip_length=2"]  # in a few seconds
    if block == VIDEO:
        words.append("dataset.synthetic.max_objects=1")
    assert cli.main([str(path), *words, "--run-dir", str(run)]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["status"], summary["steps"]) == ("finished", 1)
    assert summary["params/trainable"] == 5_922_304 + 1_384_608
    trained = checkpoint.load(run / "checkpoints" / "last.pt")["model"]
    before = torch.load(weights, weights_only=True)["model"]
    changed = {n.split(".")[0] for n, value in trained.items() if not value.equal(before[n])}
    assert changed == {"memory_attention", "memory_encoder"}


def test_the_python_lines_of_the_readme(tmp_path, monkeypatch):
    """They train the model on a COCO JSON: run as they stand, in a folder that has one."""
    readme = (Path(__file__).parents[1] / "experiments/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    make_coco(tmp_path, num_videos=2).rename(tmp_path / "train.json")
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(block, names)
    assert names["outputs"]["pred_masks"].shape == (2, 5, 2, 128, 128)
    model = names["model"]
    assert all(p.grad is not None for p in model.memory_encoder.parameters())
    batch = names["batch"]
    again = model(batch.images, batch.object_masks, batch.prompts)  # the line in the comment
    assert again["pred_masks"].shape == names["outputs"]["pred_masks"].shape
