"""YouTube-VIS, BURST and MeViS are read as COCO is, and layouts give the clips they gave."""

import hashlib
import json

import numpy as np
import pytest
from conftest import (
    OBJECT_COLOURS,
    SIZE,
    edit,
    encode,
    fails,
    load,
    make_coco,
    moving_masks,
    to_pixels,
)
from PIL import Image
from test_data_sav import write_json
from test_data_vos import load_folder, make_vos

from sam2train.config import build
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_layouts import MevisVideos
from sam2train.data_sav import SavVideos
from sam2train.data_vos import VosVideos
from sam2train.datasets import DatasetConfig, build_dataset
from sam2train.errors import UserError
from sam2train.evaluate import EvaluationConfig, copy_first_mask, track_videos
from sam2train.transforms import AugmentConfig


def make_youtube_vis(folder, *, num_frames=6, absent=(), sub="JPEGImages"):
    """Two videos of `make_coco` as YouTube-VIS writes them; returns the path of the JSON."""
    path = make_coco(folder, num_videos=2, num_frames=num_frames, absent=absent)
    content = json.loads(path.read_text())
    images = {image["id"]: image for image in content["images"]}
    videos, tracks = [], {}
    for video_id in (1, 2):
        names = [i["path"] for i in images.values() if i["video_id"] == video_id]
        size = {"height": SIZE[0], "width": SIZE[1], "length": num_frames}
        videos.append({"id": video_id, "file_names": names} | size)
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        key = (image["video_id"], annotation["track_id"])
        track = tracks.setdefault(key, [None] * num_frames)
        track[image["order_in_video"]] = annotation["segmentation"]
    (folder / sub).mkdir(exist_ok=True)
    for video in ("video_001", "video_002"):
        (folder / video).rename(folder / sub / video)
    annotations = [
        {"id": 10 + k, "video_id": key[0], "category_id": 3, "segmentations": masks, "iscrowd": 0}
        for k, (key, masks) in enumerate(tracks.items())
    ]
    known = {"videos": videos, "annotations": annotations, "categories": content["categories"]}
    path.write_text(json.dumps(known))
    return path


def build_it(path, **keys):
    config = build(DatasetConfig, {"data_path": str(path), "image_size": SIZE} | keys, "dataset")
    said = []
    data = build_dataset(config, AugmentConfig(), 0, str(path), training=True, say=said.append)
    return data, "\n".join(said)


@pytest.mark.parametrize("kind", ["coco", "youtube_vis"])
def test_tracks_with_a_list_of_masks_are_objects(tmp_path, kind):
    path = make_youtube_vis(tmp_path, absent=[(1, 2, 1)])
    dataset, said = build_it(path, dataset_type=kind)
    assert ("has the layout of youtube_vis" in said) == (kind == "coco")
    truth = moving_masks(6, 2, SIZE)
    assert [video.object_ids for video in dataset.videos] == [[10, 11], [12, 13]]
    for v, video in enumerate(dataset.videos):
        assert video.labelled == list(range(6))
        for t in range(6):
            for k, object_id in enumerate(video.object_ids):
                expected = truth[t, k] & ((v, t, k) != (0, 2, 0))
                mask = dataset.read_mask(video, t, object_id)
                np.testing.assert_array_equal(mask, expected)
    assert dataset[0].masks.any()


def test_frames_that_no_track_has_at_a_regular_distance_are_unlabelled(tmp_path):
    gaps = [(v, t, k) for v in (1, 2) for t in (1, 3, 5) for k in (1, 2)]
    path = make_youtube_vis(tmp_path, absent=gaps)
    dataset, said = build_it(path, dataset_type="youtube_vis")
    assert [video.labelled for video in dataset.videos] == [[0, 2, 4]] * 2
    assert "video 1: 6 frames listed, 3 labelled" in said
    dataset, _ = build_it(path, dataset_type="youtube_vis", unlabelled_frames="absent")
    assert [video.labelled for video in dataset.videos] == [list(range(6))] * 2


def test_the_guides_class_reads_it_too(tmp_path):
    assert load(make_youtube_vis(tmp_path)).videos[0].object_ids == [10, 11]


def test_frames_elsewhere(tmp_path):
    path = make_youtube_vis(tmp_path, sub="pictures")
    assert "see dataset.image_root" in fails(path)
    assert len(build_it(path, image_root=str(tmp_path / "pictures"))[0]) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda c: c["annotations"][0]["segmentations"].pop(),
            "5 `segmentations` for the 6 frames",
        ),
        (lambda c: c["annotations"][0].update(segmentations=7), "no list of `segmentations`"),
        (lambda c: c["annotations"][1].update(video_id=9), "video_id 9 is no video of the file"),
        (lambda c: c["videos"][0].pop("file_names"), "video 1 has no `file_names`"),
        (lambda c: c.pop("videos"), "`videos` is missing"),
    ],
)
def test_what_does_not_fit_in_youtube_vis_is_named(tmp_path, change, message):
    assert message in fails(edit(make_youtube_vis(tmp_path), change))


def make_burst(folder, *, every=2):
    """The videos of `make_coco` as BURST writes them, every second frame annotated, its frames in
    `frames/HACS`; returns the path of the JSON."""
    path = make_coco(folder, num_videos=2)
    content = json.loads(path.read_text())
    masks = {(a["image_id"], a["track_id"]): a["segmentation"] for a in content["annotations"]}
    sequences = []
    for number in (1, 2):
        images = [image for image in content["images"] if image["video_id"] == number]
        names = [image["path"].split("/")[1] for image in images]
        sequences.append(
            {
                "id": number,
                "dataset": "HACS",
                "seq_name": f"video_{number:03d}",
                "height": SIZE[0],
                "width": SIZE[1],
                "all_image_paths": names,
                "annotated_image_paths": names[::every],
                "track_category_ids": {"1": 1, "2": 1},
                "segmentations": [
                    {
                        str(k): {"rle": masks[image["id"], k]["counts"], "is_gt": True}
                        for k in (1, 2)
                        if (number, image["order_in_video"], k) != (2, 2, 1)
                    }
                    for image in images[::every]
                ],
            }
        )
        target = folder / "frames" / "HACS" / f"video_{number:03d}"
        target.parent.mkdir(parents=True, exist_ok=True)
        (folder / f"video_{number:03d}").rename(target)
    path.write_text(json.dumps({"split": "train", "sequences": sequences}))
    return path


@pytest.mark.parametrize("kind", ["coco", "burst"])
@pytest.mark.parametrize("every", [1, 2])
def test_annotated_frames_are_labelled_and_tracks_are_objects(tmp_path, kind, every):
    dataset, said = build_it(make_burst(tmp_path, every=every), dataset_type=kind)
    assert ("has the layout of burst" in said) == (kind == "coco")
    assert ("6 frames listed, 3 labelled" in said) == (every == 2)
    truth = moving_masks(6, 2, SIZE)
    assert [video.video_id for video in dataset.videos] == ["HACS/video_001", "HACS/video_002"]
    for v, video in enumerate(dataset.videos):
        assert video.object_ids == [1, 2]
        assert video.labelled == list(range(0, 6, every))
        for t in video.labelled:
            for k in range(2):
                expected = truth[t, k] & ((v, t, k) != (1, 2, 0))
                np.testing.assert_array_equal(dataset.read_mask(video, t, k + 1), expected)
    assert set(dataset[0].frame_indices) <= set(range(0, 6, every))


def test_frames_under_image_root_keep_their_folders(tmp_path):
    path = make_burst(tmp_path)
    (tmp_path / "frames").rename(tmp_path / "elsewhere")
    assert "HACS/video_001/frame_000.png: no such file" in fails(path)
    assert len(load(path, image_root=tmp_path / "elsewhere").videos) == 2


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("segmentations", [], "as many `segmentations`"),
        ("height", None, "sequence 'video_001'; expected BURST"),
        ("all_image_paths", ["a.png"], "frame_000.png is annotated, but not in `all_image_paths`"),
        ("segmentations", [1, 2, 3], "frame_000.png has no mapping"),
    ],
)
def test_what_does_not_fit_in_burst_is_named(tmp_path, key, value, message):
    def change(content):
        content["sequences"][0][key] = value

    assert message in fails(edit(make_burst(tmp_path), change))


@pytest.mark.parametrize("value", [None, 7, [1], "text"])
def test_odd_categories_do_not_matter(tmp_path, value):
    def change(content):
        content["sequences"][0]["track_category_ids"] = value

    assert load(edit(make_burst(tmp_path), change)).videos[0].object_ids == [1, 2]


def read(layout, root, size):
    """A data set of pictures and masks of whole numbers, which every machine draws alike."""
    if layout == "davis":
        make_vos(root, names=("bear",))
        folder, source, num_frames = root / "JPEGImages" / "bear", VosVideos, 6
    else:
        write_json(root / "sav_1_manual.json")
        folder, source, num_frames = root / "JPEGImages_24fps" / "sav_1", SavVideos, 10
        folder.mkdir(parents=True)
    rows, columns = np.indices(SIZE)
    for t in range(num_frames):
        pixels = np.stack([rows * 3 + t, columns * 2, rows * columns + 7 * t], axis=2)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{t:05d}.png")
    settings = clip_settings(image_size=size, video_clip_length=3, prompt_types=["point", "bbox"])
    return ClipDataset(source(root), settings)


# Of each object: means of J and of F, exactly.
SCORES = {
    "davis": [
        ("0x1.21d40dbcfad77p-1", "0x1.0152aff56a805p-1"),
        ("0x1.21d40dbcfad77p-1", "0x1.ce98b3a62ce99p-2"),
    ],
    "sav": [
        ("0x1.c71c71c71c71cp-2", "0x1.270746c7c5c9dp-1"),
        ("0x1.c71c71c71c71cp-2", "0x1.1435e50d79436p-1"),
    ],
}
CLIPS = {
    "davis": "cb0c13d0d98f69853b3007e52345d5edd5b88547ba6e45c7bfcb44537cc3bbdd",
    "sav": "bd7dff2f982e2aa46fe8a07bf172cc0455b1fd6a8f6cef00125203a8d584f217",
}


@pytest.mark.parametrize("layout", ["davis", "sav"])
def test_copying_the_first_mask_scores_what_it_scored(layout, tmp_path):
    data = read(layout, tmp_path, SIZE)
    (video,) = track_videos(copy_first_mask, data, EvaluationConfig(), seed=0)
    found = [
        (float(of_object.J.mean()).hex(), float(of_object.F.mean()).hex())
        for of_object in video.measures.values()
    ]
    assert found == SCORES[layout]


@pytest.mark.parametrize("layout", ["davis", "sav"])
def test_clips_are_what_they_were(layout, tmp_path):
    """Frames at their own size, masks at half of it as well, and prompts."""
    digest = hashlib.sha256()
    for name, size in (("whole", SIZE), ("half", (SIZE[0] // 2, SIZE[1] // 2))):
        data = read(layout, tmp_path / name, size)
        for epoch in range(3):
            clip = data[epoch, 0]
            if size == SIZE:
                digest.update(np.ascontiguousarray(to_pixels(clip.images)).tobytes())
            digest.update(np.packbits(clip.masks.numpy()).tobytes())
            for prompt in clip.prompts:
                digest.update(repr((prompt["type"], prompt["points"].tolist())).encode())
    assert digest.hexdigest() == CLIPS[layout]


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
    data, said = load_folder(write(tmp_path), name)
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
