"""MeViS: masks of all videos in one JSON."""

import json

import numpy as np
import pytest
from conftest import OBJECT_COLOURS, SIZE, encode, moving_masks
from PIL import Image
from test_data_mots import load

from sam2train.data_mevis import MevisVideos
from sam2train.errors import UserError

MASKS = moving_masks(4, 2, SIZE)


def write(root, *, names=("a", "b"), named=True, change=None):
    """Videos with two objects each, numbered through; the second is not on frame 3."""
    videos, masks = {}, {}
    for number, name in enumerate(names):
        ids = [2 * number, 2 * number + 1]
        folder = root / "JPEGImages" / name
        folder.mkdir(parents=True, exist_ok=True)
        for t in range(4):
            pixels = np.full((*SIZE, 3), 90, np.uint8)
            for k in range(2):
                pixels[MASKS[t, k]] = OBJECT_COLOURS[k]
            Image.fromarray(pixels).save(folder / f"{t:05d}.png")
        for k, object_id in enumerate(ids):
            masks[str(object_id)] = [
                None if (k, t) == (1, 3) else encode(MASKS[t, k]) for t in range(4)
            ]
        about = {"exp": "the things", "obj_id": [0, 1], "anno_id": ids if named else ids[:1]}
        frames = [f"{t:05d}" for t in range(4)]
        videos[name] = {"vid_id": number, "frames": frames, "expressions": {"0": about}}
    content = {"videos": videos}
    if change is not None:
        change(content, masks)
    (root / "meta_expressions.json").write_text(json.dumps(content))
    (root / "mask_dict.json").write_text(json.dumps(masks))
    return root


@pytest.mark.parametrize("name", ["mevis", "vos"])
def test_videos_have_the_objects_of_their_expressions(tmp_path, name):
    data, said = load(write(tmp_path), name)
    assert [video.video_id for video in data.videos] == ["a", "b"]
    assert [video.object_ids for video in data.videos] == [[0, 1], [2, 3]]
    assert ("read as dataset_type: mevis" in said[0]) == (name == "vos")
    video = data.videos[1]
    assert video.labelled == [0, 1, 2, 3]
    assert [len(video.visible(t)) for t in range(4)] == [2, 2, 2, 1]
    for t in range(4):
        np.testing.assert_array_equal(data.read_mask(video, t, 2), MASKS[t, 0])
    assert not data.read_mask(video, 3, 3).any()
    assert (data.read_frame(video, 2)[data.read_mask(video, 2, 3)] == OBJECT_COLOURS[1]).all()


def test_an_object_that_no_expression_names_is_in_the_only_video_it_fits(tmp_path):
    source = MevisVideos(write(tmp_path / "one", names=["a"], named=False))
    assert source.videos[0].object_ids == [0, 1]
    source = MevisVideos(write(tmp_path / "two", named=False))
    assert [video.object_ids for video in source.videos] == [[0], [2]]
    assert any("objects 1, 3 are named by no expression" in text for text in source.warnings)


def test_what_is_wrong_comes_together(tmp_path):
    def change(content, masks):
        content["videos"]["a"]["frames"].append("00009")
        masks["2"].pop()
        masks["3"][0]["size"] = [4, 4]

    with pytest.raises(UserError) as caught:
        MevisVideos(write(tmp_path, change=change))
    message = str(caught.value)
    for part in ("no pictures of the frames 00009", "object 2 (video 'b'): 3 masks; expected one"):
        assert part in message
    assert "object 3 (video 'b'), frame 0:" in message
    with pytest.raises(UserError, match=r"expected a folder with mask_dict\.json"):
        MevisVideos(tmp_path / "nowhere")
