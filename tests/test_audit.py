"""The gradient audit: the counts and norms of each module, and what is said of one without any."""

import pytest
import torch
from test_model import loss_of, make_clip, make_model

from sam2train.audit import audit_gradients, has_tracked_frame, modules_without_gradient
from sam2train.clips import collate_fn
from sam2train.experiment import Experiment


def make_experiment(model, *, prompt="point", clip_length=3, **settings):
    """The experiment that trains such a model; it reads no file."""
    return Experiment.model_validate(
        {
            "dataset": {
                "data_path": "unread",
                "image_size": [64, 64],
                "video_clip_length": clip_length,
                "prompt_types": [prompt],
            },
            "model": {
                "image_size": 64,
                "trainable_modules": list(model.trainable_modules),
                "num_maskmem": model.num_maskmem,
                "max_obj_ptrs_in_encoder": model.max_obj_ptrs_in_encoder,
                "memory_gradient": model.memory_gradient,
                **settings,
            },
        }
    )


def test_counts_and_norms_by_hand():
    model = make_model(["obj_ptr_tpos_proj", "no_mem_embed"])
    for parameter in model.trainable_parameters().values():
        parameter.grad = None
    weight = model.sam2.obj_ptr_tpos_proj.weight  # its bias gets no gradient
    weight.grad = torch.zeros_like(weight)
    weight.grad[0, 0], weight.grad[1, 1] = 3, 4
    assert audit_gradients(model) == {
        "audit/obj_ptr_tpos_proj/tensors": 2,
        "audit/obj_ptr_tpos_proj/with_gradient": 1,
        "audit/obj_ptr_tpos_proj/norm": 5.0,
        "audit/no_mem_embed/tensors": 1,
        "audit/no_mem_embed/with_gradient": 0,
        "audit/no_mem_embed/norm": 0.0,
    }


@pytest.mark.parametrize(
    ("trainable", "settings", "num_frames", "reason"),
    [
        ("memory_encoder", {"memory_gradient": "detached"}, 3, "`detached`"),
        ("memory_encoder", {"num_maskmem": 0}, 3, "num_maskmem is 0"),
        ("memory_attention", {}, 1, "video_clip_length is 1"),
        ("obj_ptr_tpos_proj", {"max_obj_ptrs_in_encoder": 0}, 3, "no object pointers"),
        ("no_mem_pos_enc", {}, 3, "never reads it"),
        ("mask_downsample", {}, 3, "prompts that are masks"),
    ],
)
def test_what_is_said_of_a_module_without_gradient(trainable, settings, num_frames, reason):
    model = make_model([trainable, "mask_decoder"], **settings)
    loss_of(model, make_clip(("point", 0), num_frames=num_frames)).backward()
    (found,) = modules_without_gradient(model, make_experiment(model, clip_length=num_frames))
    assert found.text.startswith(f"{trainable} got no gradient")
    assert reason in found.text
    assert not found.may_come


def test_a_parameter_that_another_prompt_reads_may_get_its_gradient_later():
    model = make_model(["no_mem_embed", "mask_decoder"])
    loss_of(model, make_clip(("mask", 0), num_frames=3)).backward()
    (found,) = modules_without_gradient(model, make_experiment(model, prompt="point"))
    assert "prompted by points or boxes" in found.text
    assert found.may_come
    (found,) = modules_without_gradient(model, make_experiment(model, prompt="mask"))
    assert not found.may_come


def test_nothing_is_said_of_modules_that_learn():
    model = make_model(["memory_attention", "memory_encoder", "obj_ptr_proj"])
    loss_of(model, make_clip(("point", 0), num_frames=3)).backward()
    assert modules_without_gradient(model, make_experiment(model)) == []


def test_a_batch_has_a_tracked_frame_where_one_follows_a_prompt():
    last, empty = make_clip(("point", 2), num_frames=3), make_clip(("empty", 0), num_frames=3)
    assert not has_tracked_frame(collate_fn([last, empty]))
    assert has_tracked_frame(collate_fn([last, make_clip(("mask", 1), num_frames=3)]))
    # Padding is no frame: the short clip ends with its prompt, whatever the long one does.
    short = make_clip(("point", 0), num_frames=1)
    assert not has_tracked_frame(collate_fn([short, last]))
