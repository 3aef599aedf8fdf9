"""The main job on real sequences, where they are, and with the real architecture."""

import json
from pathlib import Path

from sam2train import cli

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


def test_sam2_tiny_trains_a_step_on_the_cpu(tmp_path):
    """The guide's model block with random weights: Hiera-T, 512 px, num_maskmem 7."""
    words = [
        str(ROOT / "experiments" / "sam2.1_tiny.yaml"),
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
