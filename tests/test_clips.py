import ast
import importlib.util
from dataclasses import fields, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from sam2train.clips import (
    BatchedVideoDatapoint,
    BatchedVideoMetaData,
    Clip,
    collate_fn,
    is_empty,
    make_object_index,
    scatter_objects,
)
from sam2train.errors import UserError

SIZE = (4, 6)


def prompt(object_id, points=0, mask=None):
    return {
        "object_id": object_id,
        "frame_index": 0,
        "type": "point" if mask is None else "mask",
        "points": np.zeros((points, 2), np.float32),
        "labels": np.ones(points, np.int32),
        "box": None,
        "mask": mask,
    }


def clip(video_id, num_frames, object_ids, first=0, frame_size=(48, 64)):
    """A clip whose numbers tell where they come from: image = video + frame / 100.

    Object k is on frame t where pixel t of row k is set.
    """
    frames = torch.arange(num_frames)
    images = (video_id + frames / 100).view(-1, 1, 1, 1).expand(-1, 3, *SIZE).clone()
    masks = torch.zeros(num_frames, len(object_ids), *SIZE, dtype=torch.bool)
    for k in range(len(object_ids)):
        masks[frames, k, k, frames] = True
    return Clip(
        images=images,
        masks=masks,
        prompts=[prompt(object_id, points=1) for object_id in object_ids],
        video_id=video_id,
        frame_indices=[first + t for t in range(num_frames)],
        object_ids=object_ids,
        frame_valid=torch.ones(num_frames, dtype=torch.bool),
        frame_size=frame_size,
    )


@pytest.fixture
def pair():
    """A clip of 5 frames and 1 object, and one of 3 frames and 3 objects."""
    return [clip(1, 5, [7], first=10), clip(2, 3, ["a", "b", "c"], first=4, frame_size=(30, 40))]


# One clip


def test_a_clip_reads_as_attributes_and_by_name():
    sample = clip(1, 3, [7])
    assert sample["object_ids"] is sample.object_ids
    with pytest.raises(KeyError, match="no field 'mask'; it has images, masks"):
        sample["mask"]
    with pytest.raises(KeyError):
        sample["keys"]


def test_a_prompt_is_empty_without_point_box_and_mask():
    assert is_empty(prompt(1))
    assert is_empty(prompt(1, mask=np.zeros(SIZE, bool)))
    assert not is_empty(prompt(1, points=1))
    assert not is_empty(prompt(1, mask=np.ones(SIZE, bool)))


# A batch


def test_shapes_and_types_of_a_batch(pair):
    batch = collate_fn(pair)
    assert batch.img_batch.shape == (5, 2, 3, *SIZE)
    assert batch.img_batch.dtype == torch.float32
    assert batch.masks.shape == (5, 4, *SIZE)
    assert batch.masks.dtype == torch.bool
    assert batch.obj_to_frame_idx.shape == (5, 4, 2)
    assert batch.obj_to_frame_idx.dtype == torch.int32
    assert (batch.num_frames, batch.num_videos) == (5, 2)
    assert batch.images.shape == (2, 5, 3, *SIZE)
    assert batch.object_masks.shape == (2, 5, 3, *SIZE)
    assert batch.flat_img_batch.shape == (10, 3, *SIZE)
    assert batch.frame_valid.shape == (5, 2)
    assert batch.object_valid.tolist() == [[True, False, False], [True, True, True]]
    assert batch.names == ["video 1 frames 10..14", "video 2 frames 4..6"]


def test_a_short_clip_is_padded_with_its_last_image_and_no_object(pair):
    batch = collate_fn(pair)
    assert batch.frame_valid.T.tolist() == [[True] * 5, [True, True, True, False, False]]
    for t in (3, 4):
        assert torch.equal(batch.img_batch[t, 1], pair[1].images[2])
        assert not batch.masks[t, 1:].any()
    assert torch.equal(batch.img_batch[:, 0], pair[0].images)
    assert torch.equal(batch.img_batch[:3, 1], pair[1].images)


def test_padding_of_the_clip_itself_stays_marked(pair):
    pair[0] = replace(pair[0], frame_valid=torch.tensor([True, True, True, True, False]))
    assert collate_fn(pair).frame_valid.T.tolist() == [
        [True] * 4 + [False],
        [True] * 3 + [False] * 2,
    ]


def test_objects_come_clip_by_clip(pair):
    batch = collate_fn(pair)
    assert torch.equal(batch.masks[:, :1], pair[0].masks)
    assert torch.equal(batch.masks[:3, 1:], pair[1].masks)
    assert batch.obj_to_frame_idx[..., 0].T.tolist() == [[0, 1, 2, 3, 4]] * 4
    assert batch.obj_to_frame_idx[0, :, 1].tolist() == [0, 1, 1, 1]
    assert [[p["object_id"] for p in prompts] for prompts in batch.prompts] == [
        [7],
        ["a", "b", "c"],
    ]


def test_each_object_finds_its_image_in_the_flat_batch(pair):
    batch = collate_fn(pair)
    images = batch.flat_img_batch[batch.flat_obj_to_img_idx.long()]  # (T, O, 3, H, W)
    for t in range(5):
        for o in range(4):
            clip_idx = batch.obj_to_frame_idx[t, o, 1]
            assert torch.equal(images[t, o], batch.img_batch[t, clip_idx])


def test_metadata_say_where_an_object_comes_from(pair):
    metadata = collate_fn(pair).metadata
    identifier = metadata.unique_objects_identifier
    assert identifier.shape == (5, 4, 3)
    assert identifier.dtype == torch.int64
    assert identifier[0].tolist() == [[0, 0, 10], [1, 0, 4], [1, 1, 4], [1, 2, 4]]
    assert identifier[:, 1, 2].tolist() == [4, 5, 6, 6, 6]
    assert metadata.frame_orig_size.shape == (5, 4, 2)
    assert metadata.frame_orig_size[3].tolist() == [[48, 64], [30, 40], [30, 40], [30, 40]]


def test_the_simplified_layout_holds_each_clips_objects(pair):
    batch = collate_fn(pair)
    assert torch.equal(batch.images[1, :3], pair[1].images)
    assert torch.equal(batch.object_masks[0, :, :1], pair[0].masks)
    assert not batch.object_masks[0, :, 1:].any()
    assert torch.equal(batch.object_masks[1, :3], pair[1].masks)


def test_frames_count_for_an_object_where_its_clip_has_them(pair):
    valid = collate_fn(pair).object_frame_valid
    assert valid.T.tolist() == [[True] * 5] + [[True, True, True, False, False]] * 3


def test_one_clip_alone_is_passed_on_unchanged():
    sample = clip(3, 4, [1, 2])
    batch = collate_fn([sample])
    assert torch.equal(batch.images[0], sample.images)
    assert torch.equal(batch.object_masks[0], sample.masks)
    assert batch.frame_valid.all()
    assert batch.object_valid.all()


# What the specification of a sample names.
SAMPLE = ("images", "masks", "prompts", "video_id", "frame_indices", "object_ids", "frame_valid")


@pytest.mark.parametrize("kind", [dict, MappingProxyType])
@pytest.mark.parametrize("indices", [list, tuple, np.array, torch.tensor])
def test_plain_samples_are_clips(pair, kind, indices):
    """Frames of the source then count as large as the images."""
    samples = []
    for one in pair:
        sample = {name: one[name] for name in SAMPLE} | {"note": "of the user"}
        samples.append(kind({**sample, "frame_indices": indices(one.frame_indices)}))
    batch = collate_fn(samples)
    expected = collate_fn([replace(one, frame_size=SIZE) for one in pair])
    for field in fields(batch):
        found, wanted = getattr(batch, field.name), getattr(expected, field.name)
        if isinstance(found, torch.Tensor):
            assert torch.equal(found, wanted)
    assert batch.names == expected.names
    for name in ("unique_objects_identifier", "frame_orig_size"):
        assert torch.equal(getattr(batch.metadata, name), getattr(expected.metadata, name))
    mixed = collate_fn([pair[0], kind({**samples[1], "frame_size": (30, 40)})])
    assert torch.equal(mixed.metadata.frame_orig_size, collate_fn(pair).metadata.frame_orig_size)


def test_a_sample_without_masks_is_an_error(pair):
    sample = {name: pair[0][name] for name in SAMPLE if name not in ("masks", "video_id")}
    with pytest.raises(UserError, match="a sample without masks, video_id; it has images"):
        collate_fn([sample])


def test_the_order_of_clips_permutes_the_batch(pair):
    one, two = collate_fn(pair), collate_fn(pair[::-1])
    assert torch.equal(one.images, two.images.flip(0))
    assert torch.equal(one.object_masks, two.object_masks.flip(0))
    assert torch.equal(one.masks, two.masks[:, [3, 0, 1, 2]])


@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 4)), min_size=1, max_size=4), st.data())
def test_any_clips_come_back_from_their_batch(shapes, data):
    """Whatever the lengths and object counts (none included), every image, mask, id and prompt is
    where the batch says that it is, and nothing else counts."""
    clips = []
    for video_id, (num_frames, num_objects) in enumerate(shapes):
        one = clip(
            video_id, num_frames, list(range(num_objects)), first=data.draw(st.integers(0, 9))
        )
        one.masks[:] = torch.from_numpy(
            np.random.default_rng(data.draw(st.integers(0, 99))).random(tuple(one.masks.shape))
            < 0.5
        )
        clips.append(one)
    batch = collate_fn(clips)
    longest, most = max(t for t, _ in shapes), max(n for _, n in shapes)
    total = sum(n for _, n in shapes)
    assert batch.img_batch.shape == (longest, len(clips), 3, *SIZE)
    assert batch.masks.shape == (longest, total, *SIZE)
    assert batch.object_masks.shape[:3] == (len(clips), longest, most)
    flat, first = batch.flat_img_batch, 0
    for b, (one, (num_frames, num_objects)) in enumerate(zip(clips, shapes, strict=True)):
        objects = slice(first, first + num_objects)
        first += num_objects
        assert torch.equal(batch.images[b, :num_frames], one.images)
        assert torch.equal(batch.masks[:num_frames, objects], one.masks)
        assert not batch.masks[num_frames:, objects].any()
        assert torch.equal(batch.object_masks[b, :num_frames, :num_objects], one.masks)
        assert not batch.object_masks[b, :, num_objects:].any()
        assert batch.object_valid[b].tolist() == [k < num_objects for k in range(most)]
        assert batch.frame_valid[:, b].tolist() == [t < num_frames for t in range(longest)]
        assert len(batch.prompts[b]) == num_objects
        for t in range(num_frames):
            for place in range(objects.start, objects.stop):
                assert torch.equal(flat[batch.flat_obj_to_img_idx[t, place]], one.images[t])
    counted = batch.object_frame_valid.sum().item()
    assert counted == sum(t * n for t, n in shapes)


def test_scatter_fills_what_no_clip_has():
    per_object = torch.arange(6.0).view(2, 3)  # T=2, O=3
    valid = torch.tensor([[True, False], [True, True]])
    scattered = scatter_objects(per_object, valid, fill=-1.0)
    assert scattered.tolist() == [[[0, -1], [3, -1]], [[1, 2], [4, 5]]]  # (B, T, N)


def test_scatter_passes_gradients():
    per_object = torch.zeros(2, 3, requires_grad=True)
    valid = torch.tensor([[True, False], [True, True]])
    scatter_objects(per_object, valid, fill=5.0).sum().backward()
    assert per_object.grad.tolist() == [[1, 1, 1], [1, 1, 1]]


def test_the_object_index_by_hand():
    index = make_object_index(torch.tensor([[True, True], [True, False]]), 2)
    assert index.tolist() == [[[0, 0], [0, 0], [0, 1]], [[1, 0], [1, 0], [1, 1]]]


@pytest.mark.parametrize("method", ["to", "pin_memory"])
def test_all_tensors_move_and_are_pinned_together(pair, monkeypatch, method):
    """`pin_memory` is the method that a DataLoader looks for."""
    batch, moved = collate_fn(pair), []

    def move(tensor, *args, **kwargs):
        moved.append(id(tensor))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, method, move)
    result = batch.to("cuda") if method == "to" else batch.pin_memory()
    assert isinstance(result, BatchedVideoDatapoint)
    tensors = {f.name for f in fields(batch) if isinstance(getattr(batch, f.name), torch.Tensor)}
    assert tensors >= {"img_batch", "masks", "obj_to_frame_idx", "frame_valid", "object_valid"}
    if method == "to":
        tensors.remove("object_valid")  # only the host reads it
    assert set(moved) == {id(getattr(batch, name)) for name in tensors}
    assert all(getattr(result, name) is not getattr(batch, name) for name in tensors)
    assert result.prompts is batch.prompts


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_a_pinned_batch_reaches_the_gpu(pair):
    batch = next(iter(DataLoader(pair, batch_size=2, collate_fn=collate_fn, pin_memory=True)))
    assert batch.img_batch.is_pinned()
    moved = batch.to("cuda")
    assert torch.equal(moved.masks.cpu(), collate_fn(pair).masks)
    assert moved.object_masks.device.type == "cuda"
    assert moved.object_frame_valid.device.type == "cuda"


def test_a_dataloader_collates_clips(pair):
    batch = next(iter(DataLoader(pair, batch_size=2, collate_fn=collate_fn)))
    assert torch.equal(batch.masks, collate_fn(pair).masks)


@pytest.mark.parametrize("ours", [BatchedVideoDatapoint, BatchedVideoMetaData])
def test_field_names_are_those_of_sam2(ours):
    """Read from SAM 2's source: importing it needs packages that its wheel leaves out."""
    spec = importlib.util.find_spec("sam2")
    if spec is None:
        pytest.skip("needs sam2")
    source = Path(spec.origin).parents[1] / "training" / "utils" / "data_utils.py"
    if not source.exists():
        pytest.skip("needs SAM 2's training code")
    tree = ast.parse(source.read_text())
    theirs = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == ours.__name__)
    names = {n.target.id for n in theirs.body if isinstance(n, ast.AnnAssign)}
    names |= {n.name for n in theirs.body if isinstance(n, ast.FunctionDef)}
    assert names
    for name in names:
        assert hasattr(ours, name) or name in {field.name for field in fields(ours)}, name
