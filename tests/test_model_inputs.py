"""What the forward pass is given: both layouts, mistakes in them, and groups of objects."""

import numpy as np
import pytest
import torch
from test_model import SIZE, assert_close, make_clip, make_model, make_prompt

from sam2train.clips import collate_fn
from sam2train.errors import UserError
from sam2train.model_inputs import group_objects


@pytest.fixture(scope="module")
def shared():
    """For tests that change nothing."""
    return make_model()


# -- forward: layouts -----------------------------------------------------------------------------


@pytest.mark.parametrize("training", [False, True])
def test_both_layouts_are_equal(shared, training):
    clips = [make_clip(("mask", 0), ("point", 0)), make_clip(("bbox", 1), seed=1)]
    batch = collate_fn(clips)
    shared.train(training)
    with torch.no_grad():
        a = shared(batch)
        b = shared(batch.images, batch.object_masks, batch.prompts)
        c = shared(batched_video_datapoint=batch)
        d = shared(images=batch.images, prompts=batch.prompts)
    shared.eval()
    for other in (b, c, d):
        assert_close(other, a)
    assert a["pred_masks"].shape == (2, 3, 2, SIZE, SIZE)
    assert a["pred_masks"].dtype == torch.float32
    assert a["iou_predictions"].shape == a["object_score_logits"].shape == (2, 3, 2)
    assert len(a["frames"]) == 3
    assert (a["pred_masks"][1, :, 1] == -1024).all()  # padding: the second clip has one object
    assert (a["object_score_logits"][1, :, 1] == -10).all()


def test_a_flat_list_of_prompts_for_one_clip(shared):
    clip = make_clip(("mask", 0), ("point", 0))
    with torch.no_grad():
        flat = shared(clip.images[None], clip.masks[None], clip.prompts)
        nested = shared(clip.images[None], clip.masks[None], [clip.prompts])
        of_batch = shared(collate_fn([clip]))
    assert_close(flat, nested)
    assert_close(flat, of_batch)


def test_masks_only_tell_the_number_of_objects(shared):
    clip = make_clip(("point", 0))
    masks = torch.zeros(1, 3, 3, SIZE, SIZE, dtype=torch.bool)
    with torch.no_grad():
        output = shared(clip.images[None], masks, clip.prompts)
        alone = shared(clip.images[None], clip.masks[None], clip.prompts)
    assert output["pred_masks"].shape[2] == 3
    torch.testing.assert_close(output["pred_masks"][:, :, :1], alone["pred_masks"])
    assert (output["pred_masks"][:, :, 1:] == -1024).all()


# -- forward: mistakes ----------------------------------------------------------------------------


def test_sizes_that_do_not_fit(shared):
    clip = make_clip(("point", 0), size=96)
    with pytest.raises(UserError, match=r"images of \(96, 96\) pixels .* built for 64"):
        shared(collate_fn([clip]))
    small = make_clip(("point", 0))
    small.prompts[0]["mask"] = np.ones((32, 32), bool)
    with pytest.raises(UserError, match=r"mask prompt of \(32, 32\) pixels"):
        shared(collate_fn([small]))


def test_layouts_that_do_not_fit(shared):
    clip = make_clip(("point", 0))
    images, masks, prompts = clip.images[None], clip.masks[None], clip.prompts
    for arguments, message in (
        ((), "give images and prompts"),
        ((images, masks), "give images and prompts"),
        ((clip.images, masks, prompts), r"expected \(B, T, C, H, W\)"),
        ((images, masks[:, :2], prompts), r"expected \(B, T, N, H, W\)"),
        ((images, clip.masks, prompts), r"expected \(B, T, N, H, W\)"),
        ((images, masks[:, :, :0], prompts), "prompts name 1 objects in a clip, masks have 0"),
        ((images.expand(2, -1, -1, -1, -1), None, prompts), "one flat list of prompts for 2 clips"),
        ((images, masks, [prompts, prompts]), "2 of prompts for 1 clips"),
    ):
        with pytest.raises(UserError, match=message):
            shared(*arguments)


@pytest.mark.parametrize("frame_index", [-1, 3])
def test_a_prompt_outside_the_clip(shared, frame_index):
    clip = make_clip(("point", 0))
    clip.prompts[0]["frame_index"] = frame_index
    with pytest.raises(UserError, match=rf"object 1 has a prompt on frame {frame_index} .*0 to 2"):
        shared(collate_fn([clip]))


def test_a_prompt_on_a_padding_frame(shared):
    short, long = make_clip(("point", 0), num_frames=2), make_clip(("mask", 0), num_frames=4)
    short.prompts[0]["frame_index"] = 2
    with pytest.raises(UserError, match="clip with 2 frames"):
        shared(collate_fn([short, long]))


def test_two_prompts_for_one_object_on_one_frame(shared):
    clip = make_clip(("point", 0, 0))
    with pytest.raises(UserError, match="object 1 has two prompts on frame 0"):
        shared(collate_fn([clip]))


def test_a_box_alone_is_a_prompt():
    """Fields that say nothing may be left out; a box gives its corners."""
    model = make_model().eval()
    images = torch.randn(1, 2, 3, SIZE, SIZE)
    box = np.array([8, 8, 40, 40], np.float32)
    corners = {"points": box.reshape(2, 2), "labels": np.array([2, 3], np.int32)}
    short = {"object_id": 1, "frame_index": 0, "type": "bbox", "box": box}
    with torch.no_grad():
        alone, whole = (
            model(images, None, [prompt])["pred_masks"] for prompt in (short, {**short, **corners})
        )
    assert torch.equal(alone, whole)
    assert (alone > -1000).any()


def test_a_mask_prompt_of_numbers_is_one_of_bools():
    model = make_model().eval()
    images = torch.randn(1, 2, 3, SIZE, SIZE)
    mask = np.zeros((SIZE, SIZE), bool)
    mask[8:40, 8:40] = True
    with torch.no_grad():
        one, two = (
            model(images, None, [{"object_id": 1, "frame_index": 0, "mask": m}])["pred_masks"]
            for m in (mask, mask.astype(np.uint8) * 255)
        )
    assert torch.equal(one, two)


def test_a_box_and_a_click_are_both_read():
    model = make_model().eval()
    images = torch.randn(1, 2, 3, SIZE, SIZE)
    box, click = np.array([8, 8, 40, 40], np.float32), np.array([[20, 20]], np.float32)
    common = {"object_id": 1, "frame_index": 0}
    points = np.concatenate([box.reshape(2, 2), click])
    with torch.no_grad():
        both, spelled, alone = (
            model(images, None, [common | prompt])["pred_masks"]
            for prompt in (
                {"box": torch.from_numpy(box), "points": click, "labels": np.ones(1)},
                {"points": points, "labels": np.array([2, 3, 1])},
                {"points": click, "labels": np.ones(1)},
            )
        )
    assert torch.equal(both, spelled)
    assert not torch.equal(both, alone)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"object_id": 1, "frame_index": 0, "box": [1, 2, 3]}, "a box of 3 numbers"),
        ({"object_id": None, "frame_index": 0}, "a prompt without object_id"),
        ({"object_id": 1}, "a prompt without frame_index; it has object_id"),
        (
            {"object_id": 1, "frame_index": 0, "points": np.ones((2, 2)), "labels": np.ones(1)},
            "object 1: 2 points with 1 labels",
        ),
    ],
)
def test_prompts_that_say_too_little(prompt, message):
    with pytest.raises(UserError, match=message):
        make_model()(torch.randn(1, 2, 3, SIZE, SIZE), None, [prompt])


def test_masks_of_an_object_without_a_prompt():
    masks = torch.zeros(1, 2, 2, SIZE, SIZE, dtype=torch.bool)
    masks[0, 0, 1, :9] = True
    prompt = {"object_id": 2, "frame_index": 0, "box": np.array([8, 8, 40, 40], np.float32)}
    with pytest.raises(UserError, match="masks show objects that no prompt names"):
        make_model()(torch.randn(1, 2, 3, SIZE, SIZE), masks, [prompt])


def test_a_datapoint_with_an_object_that_has_no_prompt(shared):
    """Which one is it? The place of every later object depends on it."""
    batch = collate_fn([make_clip(("point", 0), ("point", 0))])
    with pytest.raises(UserError, match="prompts name 1 objects in clip 0, the datapoint has 2"):
        shared(batched_video_datapoint=batch, prompts=[batch.prompts[0][1:]])


def test_groups_by_conditioning_frames_and_length():
    mask = np.ones((4, 4), bool)

    def prompt(object_id, frame_index):
        return make_prompt("mask", mask, object_id=object_id, frame_index=frame_index)

    clips = [
        [prompt("a", 0), prompt("b", 1), prompt("c", 0)],
        [prompt("a", 0), make_prompt("empty", object_id="b")],
        [prompt("z", 0), prompt("y", 1), prompt("y", 0)],
    ]
    groups = group_objects(clips, [4, 5, 4])
    found = {(g.num_frames, tuple(g.prompts)): g.objects for g in groups}
    # Objects are counted clip by clip, the one with the empty prompt too: it is number 4.
    assert found == {(4, (0,)): [0, 2, 5], (4, (1,)): [1], (5, (0,)): [3], (4, (0, 1)): [6]}
    (both,) = [g for g in groups if g.objects == [6]]
    assert {t: p[0]["object_id"] for t, p in both.prompts.items()} == {0: "y", 1: "y"}
