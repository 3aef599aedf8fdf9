"""Exported weights: what is written is what SAM 2 loads, and a file that would not be is not."""

import io
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from rich.console import Console
from small_run import fails, write_experiment
from test_export_transformers import write_wide_config

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
    assert 'build_sam2_video_predictor("configs/sam2.1/sam2.1_hiera_t.yaml"' in meta
    assert '"++model.num_maskmem=3"' in meta
    assert '"++model.image_size=64"' in meta
    assert "hydra.core" not in meta
    assert "use_obj_ptrs_in_encoder=false" in how_to_load(
        small(max_obj_ptrs_in_encoder=0), tmp_path / "x.pt"
    )


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_what_is_printed_runs_when_pasted(exported, tmp_path, name):
    """For a config that is none of SAM 2's package, too; and the weights are those of the file."""
    out, said = tmp_path / name, Console(record=True, file=io.StringIO(), width=80)
    export_checkpoint(small(), exported, out, half=False, console=said)
    lines = said.export_text().splitlines()
    code = "\n".join(line[2:] for line in lines if line.startswith("  "))
    given: dict = {}
    try:
        exec(code, given)
    finally:
        GlobalHydra.instance().clear()
    before = torch.load(exported, weights_only=True)["model"]
    for name, value in given["predictor"].state_dict().items():
        assert torch.equal(value, before[name])
    assert given["predictor"].num_maskmem == 3


def test_safetensors_keep_what_the_file_says_of_its_rows(exported, tmp_path):
    content = torch.load(exported, weights_only=True)
    torch.save({**content, "untrained_rows": [1]}, tmp_path / "w.pt")
    out = tmp_path / "w.safetensors"
    export_checkpoint(small(), tmp_path / "w.pt", out, half=False, console=Console(quiet=True))
    again = build_model(small(checkpoint_path=str(out)))
    assert again.untrained_rows.keys() == {1}
    assert torch.equal(again.sam2.no_obj_ptr, content["model"]["no_obj_ptr"])


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


def test_a_folder_has_a_model_card(experiment_file, tmp_path, capsys):
    config = write_wide_config(tmp_path)
    run_dir, out = tmp_path / "run", tmp_path / "mine"
    words = [str(experiment_file), f"model.config_path={config}"]
    assert cli.main([*words, "--run-dir", str(run_dir)]) == 0
    source = run_dir / "checkpoints" / "last.pt"
    assert cli.main([*words, "--export", str(source), str(out)]) == 0
    assert "transformers" in capsys.readouterr().out
    names = {"config.json", "model.safetensors", "processor_config.json", "README.md"}
    assert {path.name for path in out.iterdir()} == names | {"sam2.pt", "sam2.yaml"}
    card = (out / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: transformers")
    for text in ("| val | 1 |", "## Settings", "image_size: 64", "Apache-2.0", "- train: `"):
        assert text in card
    assert str(tmp_path) not in card.split("## Settings")[0]  # no path of this machine
    again = [*words, "--dry-run", f"model.checkpoint_path={out / 'sam2.pt'}"]
    assert cli.main(again) == 0


def test_a_model_that_transformers_does_not_have(experiment_file, exported, tmp_path, capsys):
    words = (experiment_file, "model.num_maskmem=3", "--export", exported, tmp_path / "mine")
    message = fails(capsys, *words)
    assert "its memory is 32 wide, and 64 is the only width there" in message
    assert not (tmp_path / "mine").exists()


class TestPush:
    """Everything that can be missing is told before anything is written."""

    @pytest.fixture
    def hub(self, monkeypatch):
        hub, errors = ModuleType("huggingface_hub"), ModuleType("huggingface_hub.errors")
        done: list = []
        hub.get_token = lambda: "token"
        hub.HfApi = lambda: SimpleNamespace(
            create_repo=lambda name, exist_ok: f"https://huggingface.co/{name}",
            upload_folder=lambda repo_id, folder_path: done.append((repo_id, folder_path)),
        )
        errors.HfHubHTTPError = type("HfHubHTTPError", (Exception,), {})
        hub.done, hub.error = done, errors.HfHubHTTPError
        monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
        monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
        return hub

    def words(self, experiment_file, exported, target):
        return (experiment_file, "model.num_maskmem=3", "--export", exported, target, "--push")

    def test_mistakes(self, hub, experiment_file, exported, tmp_path, capsys, monkeypatch):
        words = self.words(experiment_file, exported, tmp_path / "mine")
        assert "expected ORG/NAME" in fails(capsys, *words, "mine")
        file = self.words(experiment_file, exported, tmp_path / "mine.pt")
        assert "uploads a folder" in fails(capsys, *file, "me/mine")
        hub.get_token = lambda: None
        assert "hf auth login" in fails(capsys, *words, "me/mine")
        monkeypatch.setitem(sys.modules, "huggingface_hub", None)
        assert "pip install huggingface_hub" in fails(capsys, *words, "me/mine")
        assert not (tmp_path / "mine").exists()

    def test_the_folder_is_uploaded(self, hub, experiment_file, tmp_path, capsys):
        config = write_wide_config(tmp_path)
        torch.manual_seed(0)
        model = build_model(small(config_path=str(config)))
        torch.save({"model": model.sam2.state_dict()}, tmp_path / "w.pt")
        words = self.words(experiment_file, tmp_path / "w.pt", tmp_path / "mine")
        words = [str(word) for word in (*words, "me/mine", f"model.config_path={config}")]
        assert cli.main(words) == 0
        assert "uploaded to https://huggingface.co/me/mine" in capsys.readouterr().out
        assert hub.done == [("me/mine", tmp_path / "mine")]

        def refuse(**how):
            raise hub.error("403 Forbidden")

        hub.HfApi = lambda: SimpleNamespace(create_repo=lambda *a, **k: "", upload_folder=refuse)
        words[words.index(str(tmp_path / "mine"))] = str(tmp_path / "second")
        message = fails(capsys, *words)
        assert "403 Forbidden" in message
        assert "hf upload me/mine" in message
