import json

import numpy as np
import pytest
from conftest import SIZE, edit, fails, load, make_coco, moving_masks

from sam2train.config import build
from sam2train.datasets import DatasetConfig, build_dataset
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
def test_what_does_not_fit_is_named(tmp_path, change, message):
    assert message in fails(edit(make_youtube_vis(tmp_path), change))
