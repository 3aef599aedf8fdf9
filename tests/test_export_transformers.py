"""The layout of transformers: names and config; its masks where it is installed."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sam2train.errors import UserError
from sam2train.export import compare_with_transformers
from sam2train.export_transformers import (
    has_transformers,
    processor_config,
    transformers_config,
    transformers_weights,
)
from sam2train.files import REPOSITORY
from sam2train.model import SAM2Model

DEMO = REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml"


def write_wide_config(folder: Path) -> Path:
    """The demo's config twice as wide: the memory has the 64 channels that transformers has."""
    trunk = "embed_dim: 32"  # stays: `backbone_channel_list` says how wide its stages are
    pattern = rf"(?!{trunk})(\b(num_pos_feats|d_model|\w*dim): )(32|64)\b"
    text, count = re.subn(pattern, _twice, DEMO.read_text())
    assert count == 12
    path = folder / "wide.yaml"
    path.write_text(text)
    return path


def _twice(found: re.Match) -> str:
    return f"{found[1]}{2 * int(found[3])}"


def make_model(config: Path | str, **options) -> SAM2Model:
    """Random weights that call the object present."""
    torch.manual_seed(0)
    model = SAM2Model(None, config, device="cpu", image_size=64, **options).load().eval()
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    return model


def test_every_tensor_has_a_name_there(tmp_path):
    model = make_model(write_wide_config(tmp_path), num_maskmem=5)
    weights = model.sam2.state_dict()
    found = transformers_weights(model.sam2, weights)
    # Four embeddings of points are one there; one embedding is there twice.
    assert len(found) == len(weights) - 4 + 1 + 1
    for ours, theirs in {
        "maskmem_tpos_enc": "memory_temporal_positional_encoding",
        "obj_ptr_proj.layers.2.weight": "object_pointer_proj.proj_out.weight",
        "image_encoder.trunk.blocks.1.mlp.layers.1.bias": (
            "vision_encoder.backbone.blocks.1.mlp.proj_out.bias"
        ),
        "memory_attention.layers.1.norm2.weight": "memory_attention.layers.1.layer_norm2.weight",
        "memory_encoder.mask_downsampler.encoder.12.bias": (
            "memory_encoder.mask_downsampler.final_conv.bias"
        ),
        "memory_encoder.fuser.layers.0.gamma": "memory_encoder.memory_fuser.layers.0.scale",
    }.items():
        assert torch.equal(found[theirs], weights[ours])
    points = [weights[f"sam_prompt_encoder.point_embeddings.{k}.weight"] for k in range(4)]
    assert torch.equal(found["prompt_encoder.point_embed.weight"], torch.cat(points))


def test_the_config_says_what_the_model_is(tmp_path):
    config = transformers_config(make_model(write_wide_config(tmp_path), num_maskmem=5).sam2)
    assert (config["num_maskmem"], config["image_size"]) == (5, 64)
    backbone = config["vision_config"]["backbone_config"]
    assert backbone["blocks_per_stage"] == [1, 2, 3, 1]
    assert backbone["embed_dim_per_stage"] == [32, 64, 128, 256]
    assert config["memory_attention_rope_feat_sizes"] == [4, 4]
    assert json.loads(json.dumps(config)) == config
    assert processor_config(64)["video_processor"]["image_mean"] == [0.485, 0.456, 0.406]


def test_what_transformers_is_not():
    model = make_model(DEMO, max_obj_ptrs_in_encoder=0)
    with pytest.raises(UserError, match=r"32 wide.*; it reads no object pointers"):
        transformers_config(model.sam2)


@pytest.mark.skipif(not has_transformers(), reason="transformers is not installed")
@pytest.mark.parametrize("config", ["wide", "configs/sam2.1_hiera_t.yaml"])
def test_masks_are_the_same_there(tmp_path, config):
    model = make_model(write_wide_config(tmp_path) if config == "wide" else config)
    weights = transformers_weights(model.sam2, model.sam2.state_dict())
    save_file({n: v.contiguous() for n, v in weights.items()}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(transformers_config(model.sam2)))
    assert compare_with_transformers(model, tmp_path) == 0
    with torch.no_grad():  # it is a comparison: other weights give other masks
        model.sam2.sam_mask_decoder.iou_token.weight.add_(3.0)
    assert compare_with_transformers(model, tmp_path) > 0
