"""SAM 2's weights in the layout of transformers' `Sam2VideoModel`: names, config, processor.

The files are written without transformers. Where it is installed, `masks_of_transformers` loads
them there, so that an export can be compared.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sam2train.clips import MEAN, STD
from sam2train.errors import UserError

# SAM 2's name -> transformers' name; applied in this order, each wherever it is found.
_NAMES = (
    (r"^image_encoder\.trunk\.", "vision_encoder.backbone."),
    (r"^image_encoder\.neck\.convs\.(\d+)\.conv\.", r"vision_encoder.neck.convs.\1."),
    (r"\.patch_embed\.proj\.", ".patch_embed.projection."),
    (r"^sam_prompt_encoder\.", "prompt_encoder."),
    (r"^sam_mask_decoder\.", "mask_decoder."),
    (r"\.pe_layer\.positional_encoding_gaussian_matrix$", ".shared_embedding.positional_embedding"),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"^memory_encoder\.fuser\.", "memory_encoder.memory_fuser."),
    (r"^memory_encoder\.pix_feat_proj\.", "memory_encoder.feature_projection."),
    (r"^memory_encoder\.out_proj\.", "memory_encoder.projection."),
    (r"\.gamma$", ".scale"),
    (r"\.dwconv\.", ".depthwise_conv."),
    (r"\.pwconv(\d)\.", r".pointwise_conv\1."),
    (r"\.out_proj\.", ".o_proj."),
    (r"\.norm", ".layer_norm"),
    (r"^maskmem_tpos_enc$", "memory_temporal_positional_encoding"),
    (r"^no_mem_embed$", "no_memory_embedding"),
    (r"^no_mem_pos_enc$", "no_memory_positional_encoding"),
    (r"^no_obj_ptr$", "no_object_pointer"),
    (r"^no_obj_embed_spatial$", "occlusion_spatial_embedding_parameter"),
    (r"^obj_ptr_proj\.", "object_pointer_proj."),
    (r"^obj_ptr_tpos_proj\.", "temporal_positional_encoding_projection_layer."),
)
_MEMORY_WIDTH = 64  # the only one that transformers' memory attention has


def transformers_weights(
    sam2: nn.Module, weights: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The weights under transformers' names.

    Args:
        sam2: the model that they belong to.
        weights: its state dict.
    """
    renamed: dict[str, torch.Tensor] = {}
    points: dict[int, torch.Tensor] = {}  # of transformers' one embedding of points, row by row
    # An MLP has `layers` here, and there `proj_in`, `layers` between, `proj_out`.
    depths = {n: len(m.layers) for n, m in sam2.named_modules() if type(m).__name__ == "MLP"}
    last = len(sam2.memory_encoder.mask_downsampler.encoder) - 1

    def layer_of_mlp(found: re.Match) -> str:
        prefix, place = found[1], int(found[2])
        if prefix not in depths:
            return found[0]
        ends = {0: "proj_in", depths[prefix] - 1: "proj_out"}
        return f"{prefix}.{ends.get(place, f'layers.{place - 1}')}."

    def layer_of_downsampler(found: re.Match) -> str:
        place = int(found[1])
        part = f"layers.{place // 3}.{('conv', 'layer_norm')[place % 3]}"
        return f".mask_downsampler.{'final_conv' if place == last else part}."

    for name, value in weights.items():
        if found := re.fullmatch(r"sam_prompt_encoder\.point_embeddings\.(\d+)\.weight", name):
            points[int(found[1])] = value
            continue
        name = re.sub(r"^(.*?)\.layers\.(\d+)\.(?=weight|bias)", layer_of_mlp, name)
        name = re.sub(r"\.mask_downsampler\.encoder\.(\d+)\.", layer_of_downsampler, name)
        for pattern, theirs in _NAMES:
            name = re.sub(pattern, theirs, name)
        renamed[name] = value
    renamed["prompt_encoder.point_embed.weight"] = torch.cat([points[i] for i in sorted(points)])
    shared = renamed["prompt_encoder.shared_embedding.positional_embedding"]
    renamed["shared_image_embedding.positional_embedding"] = shared.clone()
    return renamed


def transformers_config(sam2: nn.Module) -> dict[str, Any]:
    """The content of `config.json`, read from the model's parts.

    Raises:
        UserError: all that transformers' model cannot be.
    """
    memory_layer = sam2.memory_attention.layers[0]
    width = memory_layer.cross_attn_image.kv_in_dim
    problems = [
        text
        for text, holds in {
            f"its memory is {width} wide, and {_MEMORY_WIDTH} is the only width there": (
                width != _MEMORY_WIDTH
            ),
            "its memory encoder has no projection": isinstance(
                sam2.memory_encoder.out_proj, nn.Identity
            ),
            "it reads no object pointers": not sam2.use_obj_ptrs_in_encoder,
            "it has no memory (num_maskmem 0)": sam2.num_maskmem == 0,
            "its decoder reads no fine features": not sam2.use_high_res_features_in_sam,
            "it predicts no object scores": not sam2.pred_obj_scores,
        }.items()
        if holds
    ]
    if problems:
        raise UserError(
            f"this model is none of transformers' Sam2VideoModel: {'; '.join(problems)}; export a "
            "file OUT.pt or OUT.safetensors, which SAM 2 itself loads"
        )
    trunk, neck = sam2.image_encoder.trunk, sam2.image_encoder.neck
    decoder, encoder = sam2.sam_mask_decoder, sam2.memory_encoder
    fuser, side = encoder.fuser.layers[0], sam2.image_size
    starts = [0, *(end + 1 for end in trunk.stage_ends)]
    tokens = side // sam2.backbone_stride
    backbone = {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": trunk.channel_list[-1],
        "num_attention_heads": trunk.blocks[0].attn.num_heads,
        "image_size": [side, side],
        "blocks_per_stage": [b - a for a, b in pairwise(starts)],
        "embed_dim_per_stage": list(reversed(trunk.channel_list)),
        "num_attention_heads_per_stage": [trunk.blocks[s].attn.num_heads for s in starts[:-1]],
        "window_size_per_stage": list(trunk.window_spec),
        "global_attention_blocks": list(trunk.global_att_blocks),
        "window_positional_embedding_background_size": list(
            trunk.window_pos_embed_bkg_spatial_size
        ),
        "num_query_pool_stages": len(trunk.q_pool_blocks),
    }
    return {
        "architectures": ["Sam2VideoModel"],
        "model_type": "sam2_video",
        "image_size": side,
        "num_maskmem": sam2.num_maskmem,
        "max_object_pointers_in_encoder": sam2.max_obj_ptrs_in_encoder,
        "max_cond_frame_num": sam2.max_cond_frames_in_attn,
        "sigmoid_scale_for_mem_enc": sam2.sigmoid_scale_for_mem_enc,
        "sigmoid_bias_for_mem_enc": sam2.sigmoid_bias_for_mem_enc,
        "enable_occlusion_spatial_embedding": sam2.no_obj_embed_spatial is not None,
        "enable_temporal_pos_encoding_for_object_pointers": sam2.proj_tpos_enc_in_obj_ptrs,
        "multimask_output_in_sam": sam2.multimask_output_in_sam,
        "multimask_output_for_tracking": sam2.multimask_output_for_tracking,
        "multimask_min_pt_num": sam2.multimask_min_pt_num,
        "multimask_max_pt_num": sam2.multimask_max_pt_num,
        "memory_attention_hidden_size": sam2.memory_attention.d_model,
        "memory_attention_num_layers": sam2.memory_attention.num_layers,
        "memory_attention_num_attention_heads": memory_layer.self_attn.num_heads,
        "memory_attention_feed_forward_hidden_size": memory_layer.linear1.out_features,
        "memory_attention_rope_feat_sizes": [tokens, tokens],
        "memory_encoder_hidden_size": encoder.pix_feat_proj.in_channels,
        "memory_encoder_output_channels": encoder.out_proj.out_channels,
        "mask_downsampler_embed_dim": encoder.mask_downsampler.encoder[-1].out_channels,
        "memory_fuser_num_layers": len(encoder.fuser.layers),
        "memory_fuser_embed_dim": fuser.pwconv2.out_features,
        "memory_fuser_intermediate_dim": fuser.pwconv1.out_features,
        "vision_config": {
            "model_type": "sam2_vision_model",
            "backbone_config": backbone,
            "backbone_channel_list": list(neck.backbone_channel_list),
            "backbone_feature_sizes": [[side // s, side // s] for s in (4, 8, 16)],
            "fpn_hidden_size": neck.d_model,
            "fpn_top_down_levels": list(neck.fpn_top_down_levels),
        },
        "prompt_encoder_config": {
            "model_type": "sam2_video_prompt_encoder",
            "hidden_size": sam2.sam_prompt_encoder.embed_dim,
            "image_size": side,
            "patch_size": sam2.backbone_stride,
        },
        "mask_decoder_config": {
            "model_type": "sam2_video_mask_decoder",
            "hidden_size": decoder.transformer_dim,
            "mlp_dim": decoder.transformer.mlp_dim,
            "num_hidden_layers": decoder.transformer.depth,
            "num_attention_heads": decoder.transformer.num_heads,
            "iou_head_hidden_dim": decoder.iou_prediction_head.layers[0].out_features,
            "iou_head_depth": decoder.iou_prediction_head.num_layers,
        },
    }


def processor_config(side: int) -> dict[str, Any]:
    """The content of `processor_config.json`: frames as they were in training, stretched with
    bicubic interpolation, which SAM 2's predictor takes too."""
    shared = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": MEAN.round(3).astype(float).round(3).tolist(),
        "image_std": STD.round(3).astype(float).round(3).tolist(),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": side, "width": side},
    }
    mask_size = {"height": side // 4, "width": side // 4}
    return {
        "processor_class": "Sam2VideoProcessor",
        "target_size": side,
        "point_pad_value": -10,
        "image_processor": {
            **shared,
            "image_processor_type": "Sam2ImageProcessor",
            "mask_size": mask_size,
        },
        "video_processor": {**shared, "video_processor_type": "Sam2VideoVideoProcessor"},
    }


def has_transformers() -> bool:
    """Whether a transformers with `Sam2VideoModel` is installed."""
    return (
        find_spec("transformers") is not None
        and find_spec("transformers.models.sam2_video") is not None
    )


@torch.no_grad()
def masks_of_transformers(folder: Path, clip: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """(T, side / 4, side / 4) logits that the exported model has there of one object.

    Args:
        folder: with `config.json` and `model.safetensors`.
        clip: (T, 3, side, side) float32, normalised.
        box: (4,) of the object on frame 0, in pixels.
    """
    from transformers import Sam2VideoModel
    from transformers.models.sam2_video.modeling_sam2_video import Sam2VideoInferenceSession

    model = Sam2VideoModel.from_pretrained(folder, dtype=torch.float32).eval()
    height, width = clip.shape[-2:]
    session = Sam2VideoInferenceSession(clip, height, width, dtype=torch.float32)
    index = session.obj_id_to_idx(1)
    points = {
        "point_coords": box.reshape(1, 1, 2, 2).float(),
        "point_labels": torch.tensor([[[2, 3]]], dtype=torch.int32),
    }
    session.add_point_inputs(index, 0, points)
    session.obj_with_new_inputs = [1]
    found = [model(inference_session=session, frame_idx=t).pred_masks for t in range(len(clip))]
    return torch.stack([masks[0, 0] for masks in found]).float()
