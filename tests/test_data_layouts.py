"""Layouts other than COCO's are read as COCO is, and give the clips they gave."""

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
from sam2train.data_rle import decode_brush
from sam2train.data_sav import MevisVideos, SavVideos
from sam2train.data_vos import VosVideos
from sam2train.datasets import DatasetConfig, build_dataset
from sam2train.errors import UserError
from sam2train.evaluate import EvaluationConfig, copy_first_mask, track_videos
from sam2train.transforms import AugmentConfig

TRUTH = moving_masks(6, 2, SIZE)
HEIGHT, WIDTH = SIZE
LENGTHS = (3, 4, 8, 16)  # bits of a run length, those that the editor writes


def encode_brush(mask, colour=(255, 160, 0, 255)):
    """A mask as the brush of Label Studio has it: R, G, B, A of each pixel, equal values as runs
    and others one by one."""
    values = np.zeros((*mask.shape, 4), np.uint8)
    values[mask] = colour
    values = values.ravel()
    cuts = np.flatnonzero(np.diff(values)) + 1
    pieces = np.split(values, cuts)
    bits = f"{values.size:032b}" + f"{7:05b}" + "".join(f"{n - 1:04b}" for n in LENGTHS)

    def head(is_run, count):
        which = next(k for k, n in enumerate(LENGTHS) if count <= 1 << n)
        return f"{is_run}{which:02b}{count - 1:0{LENGTHS[which]}b}"

    single: list[int] = []

    def flush():
        nonlocal bits
        for start in range(0, len(single), 1 << 16):
            chunk = single[start : start + (1 << 16)]
            bits += head(0, len(chunk)) + "".join(f"{value:08b}" for value in chunk)
        single.clear()

    for piece in pieces:
        if len(piece) < 3:
            single.extend(piece.tolist())
            continue
        flush()
        for start in range(0, len(piece), 1 << 16):
            bits += head(1, len(piece[start : start + (1 << 16)])) + f"{piece[0]:08b}"
    flush()
    bits += "0" * (-len(bits) % 8)
    return [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]


def region(name, kind, label, mask, **more):
    """A result with the mask of a region."""
    if kind == "brushlabels":
        value = {"format": "rle", "rle": encode_brush(mask)}
    else:
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x1, x2 = (100 * x / WIDTH for x in (columns[0], columns[-1] + 1))
        y1, y2 = (100 * y / HEIGHT for y in (rows[0], rows[-1] + 1))
        value = {"points": [[x1, y1], [x2, y1], [x2, y2], [x1, y2]], "closed": True}
    return {
        "id": name,
        "type": kind,
        "from_name": "label",
        "to_name": "image",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": value | {kind: [label]},
    } | more


def make_tasks(folder, results, name="frames/frame_{:03d}.png"):
    """Tasks of 6 frames, with `results(t)` each, the last frame first; returns the JSON's path."""
    path = make_coco(folder)
    (folder / "video_001").rename(folder / "frames")
    tasks = []
    for t in reversed(range(6)):
        annotation = {"id": 100 + t, "was_cancelled": False, "result": results(t)}
        tasks.append(
            {
                "id": 10 + t,
                "data": {"image": name.format(t), "note": "any text", "icon": "icon.png"},
                "annotations": [annotation],
                "predictions": [],
            }
        )
    path.write_text(json.dumps(tasks))
    return path


def both(kind="brushlabels", labels=("left", "right"), **more):
    def results(t):
        return [region(f"r{k}", kind, labels[k], TRUTH[t, k], **more) for k in (0, 1)]

    return results


def refused(path, **keys):
    with pytest.raises(UserError) as caught:
        build_it(path, **{"dataset_type": "label_studio"} | keys)
    assert str(path) in str(caught.value)
    return str(caught.value)


def assert_truth(dataset, frames=range(6)):
    (video,) = dataset.videos
    assert video.labelled == list(frames)
    assert len(video.object_ids) == 2
    for t in video.labelled:
        found = [dataset.read_mask(video, t, o) for o in video.object_ids]
        order = (0, 1) if (found[0] & TRUTH[t, 0]).any() else (1, 0)
        for mask, k in zip(found, order, strict=True):
            np.testing.assert_array_equal(mask, TRUTH[t, k])


@pytest.mark.parametrize("kind", ["coco", "label_studio"])
@pytest.mark.parametrize("drawn", ["brushlabels", "polygonlabels"])
def test_masks_of_labels_are_objects_of_a_video(tmp_path, kind, drawn):
    dataset, said = build_it(make_tasks(tmp_path, both(drawn)), dataset_type=kind)
    assert ("has the layout of label_studio" in said) == (kind == "coco")
    assert "object identity from category_id" in said
    assert "videos: 1, frames: 6" in said
    assert_truth(dataset)
    assert dataset[0].masks.any()


def field(name, region_id, value):
    return {"id": region_id, "type": "number", "from_name": name, "value": value}


@pytest.mark.parametrize("how", ["track_id", "Instance", "object-id", "text", "choice", "meta"])
def test_a_field_or_meta_of_a_region_says_which_object_it_is(tmp_path, how):
    def results(t):
        found = both(labels=("car", "car"))(t)
        for k in (0, 1):
            if how == "meta":
                found[k]["meta"] = {"text": [f"the {'first' if k else 'second'}"]}
            elif how == "choice":
                found.append(field("instance", f"r{k}", {"choices": [f"number {k}"]}))
            elif how == "text":
                found.append(field("instance", f"r{k}", {"text": [str(4 + k)]}))
            else:
                found.append(field(how, f"r{k}", {"number": 4 + k}))
        return found[::-1] if t % 2 else found

    dataset, said = build_it(make_tasks(tmp_path, results), dataset_type="label_studio")
    assert "object identity from attributes.track_id" in said
    assert_truth(dataset)
    ids = dataset.videos[0].object_ids
    if how in ("track_id", "Instance", "object-id", "text"):
        assert sorted(ids) == [4, 5]


def test_several_objects_of_a_label_without_ids_are_images_alone_and_told(tmp_path):
    path = make_tasks(tmp_path, both(labels=("car", "car")))
    dataset, said = build_it(path, dataset_type="label_studio")
    assert len(dataset.videos) == 6
    assert "videos of one frame" in said


def test_the_random_part_of_uploads_neither_orders_nor_divides_frames(tmp_path):
    path = make_tasks(tmp_path, both(), name="/data/upload/3/{:08x}-frame_000.png")
    tasks = json.loads(path.read_text())
    for t, task in zip(reversed(range(6)), tasks, strict=True):
        random = (t * 2654435761) % 2**32
        task["data"]["image"] = f"/data/upload/3/{random:08x}-frame_{t:03d}.png"
    path.write_text(json.dumps(tasks))
    assert "set dataset.image_root" in refused(path)
    root = tmp_path / "frames"
    dataset, _ = build_it(path, dataset_type="label_studio", image_root=str(root))
    assert_truth(dataset)
    for task in tasks:  # as the export with pictures has them
        name = task["data"]["image"].split("/")[-1]
        (root / name.split("-")[1]).rename(root / name)
    dataset, _ = build_it(path, dataset_type="label_studio", image_root=str(root))
    assert_truth(dataset)


def test_local_files_keep_their_folders_as_videos(tmp_path):
    path = make_tasks(tmp_path, both(), name="/data/local-files/?d=frames/frame_{:03d}.png")
    dataset, _ = build_it(path, dataset_type="label_studio", image_root=str(tmp_path))
    assert_truth(dataset)


def test_what_nobody_annotated_is_unlabelled_and_what_is_empty_is_absent(tmp_path):
    def change(tasks):
        tasks[0]["annotations"] = []  # frame 5
        tasks[1]["annotations"][0]["was_cancelled"] = True  # frame 4
        tasks[2]["annotations"][0]["result"] = []  # frame 3
        tasks[3]["predictions"] = [{"result": both()(0)}]

    path = edit(make_tasks(tmp_path, both()), change)
    dataset, said = build_it(path, dataset_type="label_studio")
    (video,) = dataset.videos
    assert video.labelled == [0, 1, 2, 3]
    assert video.visible(3) == []
    assert "predictions of 1 tasks are not read" in said


def test_one_of_several_annotations_counts_only_if_it_is_said_which(tmp_path):
    def change(tasks):
        tasks[0]["annotations"].append({"id": 200, "result": both()(0)})

    path = edit(make_tasks(tmp_path, both()), change)
    message = refused(path)
    assert "task 15: has 2 annotations (105, 200)" in message
    assert "ground truth" in message
    edit(path, lambda tasks: tasks[0]["annotations"][0].update(ground_truth=True))
    assert_truth(build_it(path, dataset_type="label_studio")[0])


def test_labels_beside_a_brush_without_labels(tmp_path):
    def results(t):
        found = []
        for one in both()(t):
            label = one["value"].pop("brushlabels")
            found.append(one | {"type": "brush"})
            found.append(one | {"type": "labels", "value": one["value"] | {"labels": label}})
        return found

    dataset, _ = build_it(make_tasks(tmp_path, results), dataset_type="label_studio")
    assert_truth(dataset)


@pytest.mark.parametrize("kind", ["rectanglelabels", "ellipselabels", "keypointlabels", "bitmask"])
def test_what_is_no_mask_is_refused_by_name_or_left_out_and_told(tmp_path, kind):
    other = {"id": "b", "type": kind, "value": {"x": 1, "y": 1, "width": 9, "height": 9}}
    message = refused(make_tasks(tmp_path / "a", lambda t: [other]))
    assert f"only 6 {kind}" in message
    assert "draw brush masks or polygons" in message
    path = make_tasks(tmp_path / "b", lambda t: [*both()(t), other])
    dataset, said = build_it(path, dataset_type="label_studio")
    assert f"6 {kind} left out" in said
    assert_truth(dataset)


@pytest.mark.parametrize("name", ["/data/upload/1/film.mp4", "/data/local-files/?d=a/film.MOV"])
def test_video_boxes_are_refused_by_name(tmp_path, name):
    path = make_tasks(tmp_path, lambda t: [{"id": "v", "type": "videorectangle", "value": {}}])
    edit(path, lambda tasks: [task.update(data={"video": name}) for task in tasks])
    for kind in ("coco", "label_studio"):
        message = refused(path, dataset_type=kind)
        assert "is a video with videorectangle" in message
        assert "boxes train nothing here" in message


def test_the_minimal_export_is_refused_by_name(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"id": 1, "image": "a.png", "annotation_id": 3, "label": []}]))
    assert "JSON-MIN" in refused(path, dataset_type="coco")


def first(tasks):
    return tasks[-1]["annotations"][0]["result"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tasks: first(tasks)["value"].update(rle="abc"), "no list of bytes"),
        (lambda tasks: first(tasks)["value"].update(rle=[1, 2, 300]), "no list of bytes"),
        (lambda tasks: first(tasks)["value"]["rle"].__delitem__(slice(20, None)), "bits, before"),
        (lambda tasks: first(tasks)["value"]["rle"].__setitem__(0, 200), "expected 12288 of 8"),
        (lambda tasks: first(tasks).update(original_width=32), "expected 6144 of 8"),
        (lambda tasks: first(tasks).update(original_width=None), "expected pixels"),
        (lambda tasks: first(tasks).update(original_width=10**9), "expected pixels"),
        (lambda tasks: first(tasks).update(image_rotation=90), "turned by 90 degrees"),
        (lambda tasks: tasks[0].update(data={"a": "a.png", "b": "b.png"}), "names 2 pictures"),
        (lambda tasks: tasks[0].update(data=None), "names 0 pictures"),
        (lambda tasks: tasks[0].update(annotations=[1]), "no list of mappings"),
        (lambda tasks: tasks[0].update(annotations=[{"result": 1}]), "no list of mappings"),
        (lambda tasks: tasks.append(7), "expected Label Studio's export JSON"),
    ],
)
def test_damage_is_named(tmp_path, change, message):
    path = edit(make_tasks(tmp_path, both()), change)
    assert message in refused(path)


@pytest.mark.parametrize("points", [None, [], [[1, 2], [3, 4]], [[1, 2], [3], [4, 5]], ["a"] * 3])
def test_damaged_polygons_are_named(tmp_path, points):
    path = make_tasks(tmp_path, both("polygonlabels"))
    edit(path, lambda tasks: first(tasks)["value"].update(points=points))
    assert "region 'r0' (left): `points`" in refused(path)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("colour", [(255, 160, 0, 255), (255, 255, 255, 255), (0, 0, 0, 1)])
def test_any_mask_comes_back_from_the_brush_code(seed, colour):
    rng = np.random.default_rng(seed)
    mask = rng.random((60, 90)) < (0.5, 0.02, 0.98, 0.2)[seed]
    np.testing.assert_array_equal(decode_brush(encode_brush(mask, colour), (60, 90)), mask)


def test_a_brush_code_by_hand():
    """8 values of 8 bits (2 pixels), lengths of 3, 4, 8 and 16 bits: a run of 4 zeros, and then
    the 4 single values 1, 2, 3, 255."""
    bits = f"{8:032b}" + "00111" + "0010" + "0011" + "0111" + "1111"
    bits += "1" + "00" + "011" + "00000000"
    bits += "0" + "00" + "011" + "00000001" + "00000010" + "00000011" + "11111111"
    bits += "0" * (-len(bits) % 8)
    code = [int(bits[k : k + 8], 2) for k in range(0, len(bits), 8)]
    assert decode_brush(code, (1, 2)).tolist() == [[False, True]]
    assert decode_brush(code, (2, 1)).tolist() == [[False], [True]]
    with pytest.raises(ValueError, match="expected 12 of 8"):
        decode_brush(code, (1, 3))


def test_a_large_file_comes_from_its_index_the_second_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = make_tasks(tmp_path, both())
    edit(path, lambda tasks: tasks[0].update(meta="x" * (1 << 20)))
    first, _ = build_it(path, dataset_type="coco")
    assert list(tmp_path.glob("cache/index/*"))
    second, said = build_it(path, dataset_type="coco")
    assert "has the layout of label_studio" in said
    for dataset in (first, second):
        assert_truth(dataset)


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
