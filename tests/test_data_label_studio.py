import json

import numpy as np
import pytest
from conftest import SIZE, edit, make_coco, moving_masks
from test_data_layouts import build_it

from sam2train.data_label_studio import decode_brush
from sam2train.errors import UserError

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
