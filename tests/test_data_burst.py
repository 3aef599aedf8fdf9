import json

import numpy as np
import pytest
from conftest import SIZE, edit, fails, load, make_coco, moving_masks
from test_data_youtube_vis import build_it


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
def test_what_does_not_fit_is_named(tmp_path, key, value, message):
    def change(content):
        content["sequences"][0][key] = value

    assert message in fails(edit(make_burst(tmp_path), change))


@pytest.mark.parametrize("value", [None, 7, [1], "text"])
def test_odd_categories_do_not_matter(tmp_path, value):
    def change(content):
        content["sequences"][0]["track_category_ids"] = value

    assert load(edit(make_burst(tmp_path), change)).videos[0].object_ids == [1, 2]
