"""LoRA: what is trained, what is saved, and that the merged weights do the same."""

import json

import pytest
import torch
from small_run import CONFIG, write_experiment

from sam2train import checkpoint, cli
from sam2train.errors import UserError
from sam2train.export import compare_masks
from sam2train.lora import LoraLinear, is_lora, lora_layers, merge_lora
from sam2train.model import SAM2Model


def make_model(lora=(4, ["memory_attention"]), modules=(), **options) -> SAM2Model:
    """Random weights, the same each time, that call objects present."""
    torch.manual_seed(0)
    model = SAM2Model(
        None, CONFIG, modules, "cpu", 64, num_maskmem=3, lora=lora, dropout=0.0, **options
    ).load()
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    return model


def randomise(model) -> None:
    """Matrices as after a training, which move the masks."""
    torch.manual_seed(1)
    with torch.no_grad():
        for _, layer in lora_layers(model.sam2):
            layer.lora_b.normal_(std=0.5)


def test_a_layer_is_the_plain_one_at_first_and_the_merged_one_at_last():
    torch.manual_seed(0)
    plain, x = torch.nn.Linear(6, 5), torch.randn(3, 6)
    layer = LoraLinear(plain, 2)
    assert torch.equal(layer(x), plain(x))
    with torch.no_grad():
        layer.lora_b.normal_()
    expected = x @ (plain.weight + layer.lora_b @ layer.lora_a).T + plain.bias
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer.merged()(x), expected)
    assert type(layer.merged()) is torch.nn.Linear


def test_the_matrices_alone_are_trained_and_counted():
    model = make_model()
    names = model.trainable_parameters()
    assert names
    assert all(is_lora(name) and name.startswith("memory_attention.") for name in names)
    # 2 layers, 2 attentions, 4 weights: 64 x 64, but keys and values of memories 64 x 32.
    count = 4 * 2 * (4 * 128 + 2 * 128 + 2 * 96)
    report = model.parameter_report()
    assert report["memory_attention (LoRA)"] == (count, count)
    assert report["memory_attention"][0] == 0
    both = make_model(modules=["memory_attention", "memory_encoder"]).trainable_parameters()
    assert "memory_encoder.pix_feat_proj.weight" in both
    assert "memory_attention.layers.0.linear1.weight" in both
    assert "memory_attention.layers.0.self_attn.q_proj.weight" not in both  # LoRA instead


@pytest.mark.parametrize("module", ["memory_attention", "mask_decoder", "image_encoder"])
def test_nothing_changes_at_first_and_merging_changes_nothing(module):
    lora = make_model(lora=(2, [module]))
    assert compare_masks(make_model(lora=None), lora)[0] == 0
    randomise(lora)
    assert compare_masks(make_model(lora=None), lora)[0] > 0.01
    merged = make_model(lora=(2, [module]))
    merged.sam2.load_state_dict(lora.sam2.state_dict())
    merge_lora(merged.sam2)
    assert merged.sam2.state_dict().keys() == make_model(lora=None).sam2.state_dict().keys()
    apart, pixels = compare_masks(lora, merged)
    assert apart < 0.001  # rounding
    assert pixels > 0


def test_a_module_without_attention():
    with pytest.raises(UserError, match="'memory_encoder' has no attention layer"):
        make_model(lora=(2, ["memory_attention", "memory_encoder"]))


def test_a_run_its_checkpoint_and_its_export(tmp_path, monkeypatch, capsys):
    path = write_experiment(tmp_path, monkeypatch)
    base = {"model": make_model(lora=None).sam2.state_dict()}
    base["model"]["maskmem_tpos_enc"] = base["model"]["maskmem_tpos_enc"][[0, 1, 1, 1, 1, 1, 2]]
    torch.save(base, tmp_path / "base.pt")
    words = [str(path), f"model.checkpoint_path={tmp_path / 'base.pt'}", "model.lora.rank=2"]
    words += ["model.trainable_modules=[]", "optimizer.learning_rate=0.1"]
    run = tmp_path / "run"
    assert cli.main([*words, "--run-dir", str(run)]) == 0
    assert "memory_attention (LoRA)" in capsys.readouterr().out
    last = run / "checkpoints" / "last.pt"
    held = checkpoint.load(last)["model"]
    assert held
    assert all(map(is_lora, held))
    assert any(value.abs().max() > 0 for name, value in held.items() if name.endswith("lora_b"))
    assert cli.main([*words, "--export", str(last), str(tmp_path / "out.pt")]) == 0
    written = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert written.keys() == base["model"].keys()
    scores = []
    for name, source in (("a", last), ("b", tmp_path / "out.pt")):
        out = ["--no-base", "--run-dir", str(tmp_path / name)]
        assert cli.main([*words, "--evaluate", str(source), *out]) == 0
        scores.append(json.loads((tmp_path / name / "summary.json").read_text())["val/J_and_F"])
    assert scores[0] == pytest.approx(scores[1], abs=0.01)
    resumed = ["trainer.num_steps=3", "--resume", str(run)]
    assert cli.main([*words, *resumed]) == 0
    assert checkpoint.load(last)["step"] == 3
