"""Exported weights: what is written is what SAM 2 loads, and a file that would not be is not."""

import pytest
import torch
from rich.console import Console

from sam2train.errors import UserError
from sam2train.experiment import Experiment, build_model
from sam2train.export import compare_masks, export_checkpoint, how_to_load

CONFIG = "sam2train/configs/sam2.1_hiera_demo.yaml"


def experiment(**model) -> Experiment:
    model = {"config_path": CONFIG, "image_size": 64, "num_maskmem": 3} | model
    dataset = {"data_path": "unused.json", "image_size": [64, 64]}
    return Experiment.model_validate({"dataset": dataset, "model": model})


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Random weights that call objects present, as a file `{"model": state_dict}`."""
    model = build_model(experiment())
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save({"model": model.sam2.state_dict()}, path)
    return path


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_what_the_model_has(weights, tmp_path, half):
    out, said = tmp_path / "deep" / "out.pt", Console(record=True, quiet=False, width=200)
    export_checkpoint(experiment(), weights, out, half=half, console=said)
    written = torch.load(out, weights_only=True)
    before = torch.load(weights, weights_only=True)["model"]
    assert set(written) == {"model"}
    assert written["model"].keys() == before.keys()
    for name, value in written["model"].items():
        assert torch.equal(value, before[name].half() if half else before[name])
    text = said.export_text()
    assert "it loads strictly and gives" in text
    assert ("the same masks" in text) or half
    assert [path.name for path in out.parent.iterdir()] == ["out.pt"]  # nothing half written


def test_masks_that_do_not_survive_are_an_error(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("sam2train.export.compare_masks", lambda one, other: (0.2, 100))
    out = tmp_path / "out.pt"
    with pytest.raises(UserError, match=r"20\.00% of the pixels .* without --half"):
        export_checkpoint(experiment(), weights, out, half=True, console=Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_masks_are_compared_pixel_by_pixel(weights):
    settings = experiment(checkpoint_path=str(weights))
    one, other = build_model(settings), build_model(settings)
    apart, pixels = compare_masks(one, other)
    assert apart == 0
    assert pixels > 0
    with torch.no_grad():
        for parameter in other.sam2.sam_mask_decoder.parameters():
            parameter.add_(torch.full_like(parameter, 0.3))
    assert compare_masks(one, other)[0] > 0
    with torch.no_grad():
        next(other.sam2.sam_mask_decoder.parameters()).fill_(float("nan"))
    assert compare_masks(one, other)[0] > 0.5  # NaN is no mask


def test_the_call_of_sam2_names_what_differs_from_its_config(tmp_path):
    meta = how_to_load(
        experiment(config_path="configs/sam2.1/sam2.1_hiera_t.yaml"), tmp_path / "x.pt"
    )
    assert meta.startswith('build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml"')
    assert '"++model.num_maskmem=3"' in meta
    assert '"++model.image_size=64"' in meta
    ours = how_to_load(experiment(max_obj_ptrs_in_encoder=0), tmp_path / "x.pt")
    assert "use_obj_ptrs_in_encoder=false" in ours
    assert "Hydra's config folder" in ours
