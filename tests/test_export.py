"""Exported weights: what is written is what SAM 2 loads, and a file that would not be is not."""

import pytest
import torch
from rich.console import Console
from small_run import write_experiment

from sam2train import cli
from sam2train.errors import UserError
from sam2train.experiment import Experiment, build_model
from sam2train.export import compare_masks, export_checkpoint, how_to_load

DEMO = "sam2train/configs/sam2.1_hiera_demo.yaml"


def small(**model) -> Experiment:
    model = {"config_path": DEMO, "image_size": 64, "num_maskmem": 3} | model
    dataset = {"data_path": "unused.json", "image_size": [64, 64]}
    return Experiment.model_validate({"dataset": dataset, "model": model})


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Random weights that call objects present, as a file `{"model": state_dict}`."""
    model = build_model(small())
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    path = tmp_path_factory.mktemp("weights") / "w.pt"
    torch.save({"model": model.sam2.state_dict()}, path)
    return path


@pytest.mark.parametrize("half", [False, True])
def test_what_is_written_is_what_the_model_has(exported, tmp_path, half):
    out, said = tmp_path / "deep" / "out.pt", Console(record=True, quiet=False, width=200)
    export_checkpoint(small(), exported, out, half=half, console=said)
    written = torch.load(out, weights_only=True)
    before = torch.load(exported, weights_only=True)["model"]
    assert set(written) == {"model"}
    assert written["model"].keys() == before.keys()
    for name, value in written["model"].items():
        assert torch.equal(value, before[name].half() if half else before[name])
    text = said.export_text()
    assert "it loads strictly and gives" in text
    assert ("the same masks" in text) or half
    assert [path.name for path in out.parent.iterdir()] == ["out.pt"]  # nothing half written


def test_masks_that_do_not_survive_are_an_error(exported, tmp_path, monkeypatch):
    monkeypatch.setattr("sam2train.export.compare_masks", lambda one, other: (0.2, 100))
    out = tmp_path / "out.pt"
    with pytest.raises(UserError, match=r"20\.00% of the pixels .* without --half"):
        export_checkpoint(small(), exported, out, half=True, console=Console(quiet=True))
    assert list(tmp_path.iterdir()) == []


def test_masks_are_compared_pixel_by_pixel(exported):
    settings = small(checkpoint_path=str(exported))
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
    meta = how_to_load(small(config_path="configs/sam2.1/sam2.1_hiera_t.yaml"), tmp_path / "x.pt")
    assert meta.startswith('build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml"')
    assert '"++model.num_maskmem=3"' in meta
    assert '"++model.image_size=64"' in meta
    ours = how_to_load(small(max_obj_ptrs_in_encoder=0), tmp_path / "x.pt")
    assert "use_obj_ptrs_in_encoder=false" in ours
    assert "Hydra's config folder" in ours


# -- the command


@pytest.fixture
def experiment_file(tmp_path, monkeypatch):
    return write_experiment(tmp_path, monkeypatch)


def test_export_gives_weights_that_sam2_loads(experiment_file, tmp_path, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "out" / "sam2.pt"
    assert cli.main([str(experiment_file), "--run-dir", str(run_dir)]) == 0
    source = str(run_dir / "checkpoints" / "last.pt")
    assert cli.main([str(experiment_file), "--export", source, str(out)]) == 0
    again = [str(experiment_file), "--dry-run", f"model.checkpoint_path={out}"]
    assert cli.main(again) == 0
    capsys.readouterr()
    half = out.with_name("half.pt")
    assert cli.main([str(experiment_file), "--half", "--export", source, str(half)]) == 0
    assert half.stat().st_size < 6e6


def test_export_replaces_nothing(experiment_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    assert cli.main([str(experiment_file), "--run-dir", str(run_dir)]) == 0
    source = run_dir / "checkpoints" / "last.pt"
    before = source.read_bytes()
    for target in (source, tmp_path):
        assert cli.main([str(experiment_file), "--export", str(source), str(target)]) == 2
        assert f"--export {target}: there is something already" in capsys.readouterr().err
    assert source.read_bytes() == before
    target = experiment_file / "x" / "out.pt"  # below a file
    assert cli.main([str(experiment_file), "--export", str(source), str(target)]) == 2
    assert "name another place" in capsys.readouterr().err


def test_export_takes_the_model_as_the_run_had_it(experiment_file, tmp_path, capsys):
    run_dir, out = tmp_path / "run", tmp_path / "sam2.pt"
    changed = ("model.num_maskmem=3", "model.max_obj_ptrs_in_encoder=0")
    assert cli.main([str(experiment_file), *changed, "--run-dir", str(run_dir)]) == 0
    source = str(run_dir / "checkpoints" / "last.pt")
    assert cli.main([str(experiment_file), "--export", source, str(out)]) == 0
    printed = capsys.readouterr().out
    assert "++model.num_maskmem=3" in printed
    assert "++model.use_obj_ptrs_in_encoder=false" in printed
