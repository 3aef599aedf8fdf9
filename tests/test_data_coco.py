import shutil

import numpy as np
import pytest
import torch
from conftest import (
    SIZE,
    edit,
    fails,
    load,
    make_coco,
    moving_masks,
)
from PIL import Image

from sam2train import data_coco_files, data_source
from sam2train.data_coco import CocoVideos
from sam2train.errors import UserError

# Identity


# Frames that nobody looked at


def label(path, frames, key=None, listed=None, value=bool):
    """Only these frames keep their annotations; `key` says so of each image, or of those listed."""

    def change(content):
        places = {image["id"]: image["order_in_video"] for image in content["images"]}
        content["annotations"] = [
            annotation
            for annotation in content["annotations"]
            if places[annotation["image_id"]] in frames
        ]
        for image in content["images"]:
            if key is not None:
                image[key] = value(image["order_in_video"] in (listed or frames))

    return edit(path, change)


@pytest.mark.parametrize("key", ["is_annotated", "is_labelled", "is_vid_train_frame"])
@pytest.mark.parametrize("value", [bool, int, str])
def test_the_file_says_which_frames_are_labelled(coco, key, value):
    dataset = load(label(coco, [0, 4], key, value=value))
    assert dataset.videos[0].labelled == [0, 4]
    assert len(dataset.videos[0].frames) == 6
    assert dataset.source.notes == [f"video 1: 6 frames listed, 2 labelled (`{key}`)"]
    assert {t for k in range(9) for t in dataset[k, 0].frame_indices} == {0, 4}
    plain = load(coco, unlabelled_frames="absent")
    assert plain.videos[0].labelled == list(range(6))
    assert plain.source.notes == []


def test_a_labelled_frame_without_an_object_stays_labelled(coco):
    dataset = load(label(coco, [0, 4], "is_annotated", [0, 2, 4]))
    assert dataset.videos[0].labelled == [0, 2, 4]


def test_annotations_on_unlabelled_frames_are_left_out_and_told(coco):
    dataset = load(label(coco, range(6), "is_annotated", [0, 4]))
    assert dataset.videos[0].labelled == [0, 4]
    assert not dataset.videos[0].frames[1].annotations
    assert "8 annotations are on frames that the file calls unlabelled" in dataset.warnings[0]


def test_a_key_that_is_false_everywhere_says_nothing(coco):
    dataset = load(label(coco, range(6), "is_vid_train_frame", [9]))
    assert dataset.videos[0].labelled == list(range(6))
    assert "`is_vid_train_frame` is true on no frame" in dataset.source.notes[0]


def test_a_key_that_is_neither_true_nor_false(coco):
    message = fails(label(coco, range(6), "is_annotated", value=lambda is_labelled: "perhaps"))
    assert "image 1: `is_annotated` is 'perhaps'; expected true or false" in message


@pytest.mark.parametrize(
    ("num_frames", "annotated", "expected"),
    [
        (8, [0, 4], [0, 4]),
        (8, [0, 2, 4, 6], [0, 2, 4, 6]),
        (9, [2, 5, 8], [2, 5, 8]),
        (12, [0, 2, 6, 8], [0, 2, 4, 6, 8, 10]),  # the objects leave and return
        (8, [0, 3, 4], None),
        (8, [0, 1, 2, 3], None),
        (8, [4, 5, 6, 7], None),
        (8, [0, 7], None),
        (8, [3], None),
    ],
)
def test_regular_gaps_are_taken_for_unlabelled(tmp_path, num_frames, annotated, expected):
    path = label(make_coco(tmp_path, num_frames=num_frames), annotated)
    dataset = load(path)
    note = dataset.source.notes[0]
    assert dataset.videos[0].labelled == (expected or list(range(num_frames)))
    if expected:
        assert f"{num_frames} frames listed, {len(expected)} labelled (every " in note
    else:
        gaps = num_frames - len(annotated)
        assert note.startswith(f"video 1: {gaps} frames without any annotation count as frames")
    assert "dataset.unlabelled_frames: " in note
    assert load(path, unlabelled_frames="absent").videos[0].labelled == list(range(num_frames))
    ignored = load(path, unlabelled_frames="ignore")
    assert ignored.videos[0].labelled == annotated
    assert f"{len(annotated)} labelled" in ignored.source.notes[0]


def test_a_short_video_has_the_distance_of_the_others(tmp_path):
    path = make_coco(tmp_path, num_videos=2, num_frames=8)

    def change(content):
        content["images"] = [i for i in content["images"] if i["id"] <= 8 + 5]
        content["annotations"] = [
            a for a in content["annotations"] if a["image_id"] in (1, 5, 9, 13)
        ]

    assert [video.labelled for video in load(edit(path, change)).videos] == [[0, 4], [0, 4]]


def test_one_of_two_objects_that_leaves_in_step_is_absent(coco):
    def leave(content):
        content["annotations"] = [
            a for a in content["annotations"] if a["track_id"] == 1 or a["image_id"] % 2
        ]

    dataset = load(edit(coco, leave))
    assert dataset.videos[0].labelled == list(range(6))
    assert dataset.source.notes == []


# Images without videos


def test_image_coco_is_read_as_videos_of_one_frame(coco):
    def strip(content):
        for image in content["images"]:
            del image["video_id"], image["order_in_video"]
        for annotation in content["annotations"]:
            del annotation["track_id"]

    dataset = load(edit(coco, strip))
    assert [len(video.frames) for video in dataset.videos] == [1] * 6
    assert [len(video.object_ids) for video in dataset.videos] == [2] * 6
    assert "image COCO, read as videos of one frame" in dataset.source.notes[0]
    assert dataset[0].frame_valid.tolist() == [True, False, False, False]


def test_an_export_of_frames_with_track_ids_has_a_video_in_each_folder(tmp_path):
    path = make_coco(tmp_path, num_videos=2, num_frames=12)

    def strip(content):
        for image in content["images"]:
            del image["video_id"], image["order_in_video"]

    dataset = load(edit(path, strip))
    assert [video.video_id for video in dataset.videos] == ["video_001", "video_002"]
    assert names(dataset) == [f"frame_{t:03d}.png" for t in range(12)]
    assert dataset.source.notes == [
        "no image has a `video_id`, but objects are on several images by their ids: each folder of "
        "images is a video (2)",
        "order of frames from the file names",
    ]


@pytest.mark.parametrize("change", ["order", "names"])
def test_frames_without_videos_that_could_be_of_several_are_refused(coco, change):
    (coco.parent / "video_001/frame_005.png").rename(coco.parent / "video_001/other_000.png")

    def strip(content):
        for image in content["images"]:
            del image["video_id"]
            if change == "names":
                del image["order_in_video"]
        content["images"][5]["path"] = "video_001/other_000.png"
        if change == "order":
            content["images"].pop()
            content["annotations"] = content["annotations"][:10]

    message = fails(edit(coco, strip))
    assert "1 problem\n" in message
    assert "add `video_id` to each image" in message


# Order


def reorder(coco, orders):
    def change(content):
        for image, order in zip(content["images"], orders, strict=True):
            image["order_in_video"] = order

    return load(edit(coco, change))


def names(dataset):
    return [frame.path.name for frame in dataset.videos[0].frames]


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ([0, 5, 10, 11, 30, 100], [0, 1, 2, 3, 4, 5]),
        ([5, 4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]),
        ([-3, 0, 2, -1, 7, 4], [0, 3, 1, 2, 5, 4]),
        (["8", "9", "10", "11", "12", "13"], [0, 1, 2, 3, 4, 5]),
    ],
)
def test_frames_are_sorted_by_their_number(coco, orders, expected):
    dataset = reorder(coco, orders)
    assert names(dataset) == [f"frame_{t:03d}.png" for t in expected]
    truth = moving_masks(6, 2, SIZE)
    for place, t in enumerate(expected):
        np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], place, 2), truth[t, 1])


def test_order_as_text_is_read_and_told(coco):
    warnings = reorder(coco, ["8", "9", "10", "11", "12", "13"]).warnings
    assert warnings == [
        "image 1, image 2, image 3 and 3 more: `order_in_video` is text; read as a number"
    ]


def test_shuffled_entries_change_nothing(tmp_path):
    plain = make_coco(tmp_path / "a", num_videos=2)
    mixed = make_coco(tmp_path / "b", num_videos=2)

    def shuffle(content):
        rng = np.random.default_rng(0)
        rng.shuffle(content["images"])
        rng.shuffle(content["annotations"])
        content["images"].sort(key=lambda image: image["video_id"])

    edit(mixed, shuffle)
    for index in range(2):
        one, two = load(plain)[index], load(mixed)[index]
        order = [two.object_ids.index(object_id) for object_id in one.object_ids]
        assert one.frame_indices == two.frame_indices
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.masks, two.masks[:, order])


@pytest.mark.parametrize("order", [None, "first", 1.5, True, [0], "", float("inf")])
def test_an_order_that_is_no_number_is_an_error(coco, order):
    def change(content):
        content["images"][2]["order_in_video"] = order

    assert f"image 3: `order_in_video` is {order!r}; expected a whole number" in fails(
        edit(coco, change)
    )


def test_two_frames_at_one_place_are_an_error(coco):
    def change(content):
        content["images"][3]["order_in_video"] = 2

    assert "video 1: images 3 and 4 both have order_in_video 2" in fails(edit(coco, change))


def test_cocovid_calls_the_order_frame_id(coco):
    def rename(content):
        for image in content["images"]:
            image["frame_id"] = image.pop("order_in_video")

    assert names(load(edit(coco, rename))) == [f"frame_{t:03d}.png" for t in range(6)]


@pytest.mark.parametrize("key", ["frame_id", "frame_index", "frame_number"])
def test_the_order_has_several_names_and_the_choice_is_told(coco, key):
    def rename(content):
        for image in content["images"]:
            image[key] = 300 - 30 * image.pop("order_in_video")

    dataset = load(edit(coco, rename))
    assert names(dataset) == [f"frame_{t:03d}.png" for t in reversed(range(6))]
    assert dataset.source.notes == [f"order of frames from `{key}`"]


def test_without_an_order_the_names_count(tmp_path):
    """As people count, and as seconds where all names are numbers."""
    path = make_coco(tmp_path, num_frames=11)

    def strip(new):
        def change(content):
            for t, image in enumerate(content["images"]):
                del image["order_in_video"]
                (tmp_path / image["path"]).rename(tmp_path / new.format(t, t / 8))
                image["path"] = new.format(t, t / 8)
            content["images"].reverse()

        return change

    for new in ("f{0}.png", "{1}.png"):
        dataset = load(edit(make_coco(tmp_path, num_frames=11), strip(new)))
        assert names(dataset) == [new.format(t, t / 8) for t in range(11)]
        assert dataset.source.notes == ["order of frames from the file names"]
    assert path.exists()


# Paths


def test_two_videos_that_share_pictures_are_an_error(tmp_path):
    """Also by another path: the masks of one would lie on pictures of the other."""
    path = make_coco(tmp_path, num_videos=3)
    (tmp_path / "link").symlink_to(tmp_path / "video_001")

    def share(content):
        for t, (one, two) in enumerate(
            zip(content["images"][:6], content["images"][6:12], strict=True)
        ):
            two["path"] = one["path"].replace("video_001", "link" if t % 2 else "video_001")

    message = fails(edit(path, share))
    assert "1 problem\n" in message
    assert "videos 1 and 2 share 6 pictures" in message


# Pictures and sizes


def replace_frame(coco, pixels, suffix="png", **options):
    """The third frame becomes another picture; its JSON entry keeps its width and height."""
    path = coco.parent / f"video_001/other.{suffix}"
    Image.fromarray(pixels).save(path, **options)

    def change(content):
        content["images"][2]["path"] = f"video_001/other.{suffix}"

    edit(coco, change)
    return path


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def test_a_picture_that_is_stored_as_the_json_says_is_not_turned(coco):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:10] = 200
    replace_frame(coco, pixels, exif=oriented(6))
    dataset = load(coco)
    np.testing.assert_array_equal(dataset.read_frame(dataset.videos[0], 2), pixels)
    assert len(dataset.warnings) == 1
    assert "image 3: an EXIF orientation, ignored" in dataset.warnings[0]


def test_a_picture_that_is_shown_as_the_json_says_is_turned(coco):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:10] = 200
    replace_frame(coco, np.ascontiguousarray(np.rot90(pixels)), exif=oriented(6))
    dataset = load(coco)
    np.testing.assert_array_equal(dataset.read_frame(dataset.videos[0], 2), pixels)
    assert "image 3: an EXIF orientation, applied" in dataset.warnings[0]


def test_an_orientation_that_keeps_the_size_is_told(coco):
    pixels = np.zeros((*SIZE, 3), np.uint8)
    pixels[:10] = 200
    replace_frame(coco, pixels, exif=oriented(3))
    dataset = load(coco)
    np.testing.assert_array_equal(dataset.read_frame(dataset.videos[0], 2), pixels)
    assert "ignored: the pixels count as stored" in dataset.warnings[0]


def test_a_16_bit_frame_looks_like_the_others(coco):
    grey = np.linspace(0, 65535, SIZE[0] * SIZE[1]).reshape(SIZE).astype(np.uint16)
    replace_frame(coco, grey)
    dataset = load(coco)
    frame = dataset.read_frame(dataset.videos[0], 2)
    np.testing.assert_allclose(frame[..., 0], grey / 257, atol=0.5)


def test_a_truncated_frame_stops_with_its_name(coco):
    noise = np.random.default_rng(0).integers(0, 255, (*SIZE, 3), np.uint8)
    path = replace_frame(coco, noise, "jpg")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    dataset = load(coco, video_clip_length=6)
    with pytest.raises(UserError, match=r"other\.jpg: is damaged or cut short"):
        dataset[0]


def test_a_frame_that_changes_size_after_indexing_is_named(coco):
    dataset = load(coco)
    for frame in dataset.videos[0].frames:
        Image.fromarray(np.zeros((10, 10, 3), np.uint8)).save(frame.path)
    with pytest.raises(UserError, match="the picture is 10x10, expected 64x48"):
        dataset[0]


def test_a_wrong_size_in_the_json_is_told_once_and_the_picture_counts(coco):
    def change(content):
        for image in content["images"][1:]:
            image |= {"width": 1920, "height": 1080}

    dataset = load(edit(coco, change))
    assert dataset.videos[0].size == SIZE
    assert dataset.warnings == [
        "image 2, image 3, image 4 and 2 more: the file says 1920x1080, the picture is 64x48 "
        "(width x height); the picture counts"
    ]


def test_without_width_and_height_the_picture_counts(coco):
    def change(content):
        for image in content["images"]:
            del image["width"], image["height"]

    dataset = load(edit(coco, change))
    assert dataset.videos[0].size == SIZE
    assert dataset.warnings == []


def test_frames_of_two_sizes_in_one_video_are_an_error(coco):
    replace_frame(coco, np.zeros((20, 30, 3), np.uint8))

    def change(content):
        content["images"][2] |= {"width": 30, "height": 20}
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]

    assert "video 1: frames of different sizes (30x20, 64x48)" in fails(edit(coco, change))


# Segmentations


def test_polygons_of_a_picture_of_another_size_are_ambiguous(coco):
    def change(content):
        for image in content["images"][:2]:
            image |= {"width": 128, "height": 96}
        content["annotations"][0]["segmentation"] = [[2, 2, 60, 2, 60, 60]]

    message = fails(edit(coco, change))
    assert "polygons count in pixels of a picture of 128x96 as the file says or of 64x48" in message
    assert "1 problem" in message  # the RLE of the other image has a size of its own


def test_the_other_name_of_an_image_is_tried(coco):
    def change(content):
        for image in content["images"]:
            image["file_name"], image["path"] = image["path"], "elsewhere/" + image["path"]

    assert names(load(edit(coco, change)))[0] == "frame_000.png"


def test_a_path_too_long_for_a_file_and_a_file_too_deep(coco, tmp_path):
    def change(content):
        content["images"][1]["path"] = "x" * 5000

    assert "File name too long" in fails(edit(coco, change))
    deep = tmp_path / "deep.json"
    deep.write_text("[" * 100_000)
    assert "is not valid JSON" in fails(deep)


# The file as a whole


def test_every_problem_is_reported_at_once_and_none_twice(coco, tmp_path):
    (tmp_path / "video_001/frame_001.png").unlink()

    def change(content):
        content["images"][3]["id"] = 3
        content["images"][5]["video_id"] = None
        content["annotations"][0]["image_id"] = 999

    message = fails(edit(coco, change))
    problems = message.split("\n  - ")[1:]
    # Annotations of a broken image are no further problem, but those of image 4 lost theirs.
    assert [problem.split(":")[0] for problem in problems] == [
        "image 2",
        "image 3",
        "image 6",
        "annotation 1",
        "annotation 7",
        "annotation 8",
    ]
    assert message.startswith(f"{coco}: 6 problems\n")
    assert "image 3: the id is used twice" in message
    assert "annotation 1: image_id 999 is no image of the file" in message


def test_many_problems_are_counted(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["image_id"] += 100
        content["annotations"] *= 2

    message = fails(edit(coco, change))
    assert "24 problems" in message
    assert message.count("\n  - ") == 12
    assert message.endswith("\n  and 12 more")


def test_warnings_gather_what_is_alike(coco):
    def change(content):
        for annotation in content["annotations"][1:]:
            annotation["id"] = 1

    warnings = load(edit(coco, change)).warnings
    assert warnings == ["annotation 1, annotation 1, annotation 1 and 8 more: the id is used twice"]


def test_objects_that_never_return_are_told(coco):
    def change(content):
        for annotation in content["annotations"]:
            annotation["track_id"] = annotation["id"]  # as tools write that number annotations

    warnings = load(edit(coco, change)).warnings
    assert warnings == ["video 1: no object is on more than one frame: nothing to track"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty"),
        ("{", "is not valid JSON"),
        ("[]", "the top level is a list"),
        ('"text"', "the top level is a str"),
        ('{"annotations": [{}]}', "`images` is missing"),
        ('{"images": [{}]}', "`annotations` is missing"),
        ('{"images": {}, "annotations": []}', "`images` is missing or no list"),
        ('{"images": [1], "annotations": [{}]}', "`images` is missing or no list of mappings"),
        ('{"images": [{}], "annotations": [1]}', "`annotations` is missing or no list of map"),
        ('{"images": [], "annotations": [{}]}', "`images` is empty"),
        ('{"images": [{"id": 1}], "annotations": []}', "`annotations` is empty"),
        ('{"images": [{"id": 1}], "annotations": [{}]}', "`path` (or `file_name`) is missing"),
        ('{"videos": [{}], "annotations": [{"segmentations": []}]}', "expected YouTube-VIS"),
        ('{"sequences": [{"annotated_image_paths": []}]}', "expected BURST"),
    ],
)
def test_what_is_no_coco_video_file_says_so(tmp_path, content, message):
    path = tmp_path / "annotations.json"
    path.write_text(content)
    assert message in fails(path)


def test_files_that_are_none(tmp_path):
    assert "nothing.json: no such file" in fails(tmp_path / "nothing.json")
    assert "is a folder; expected a COCO JSON" in fails(tmp_path)
    path = tmp_path / "binary.json"
    path.write_bytes(b"\xff\xfe\x00\x01")
    assert "is not valid JSON" in fails(path)


def test_a_byte_order_mark_is_read(coco):
    coco.write_bytes(b"\xef\xbb\xbf" + coco.read_bytes())
    assert load(coco)[0].masks.any()


def test_many_images_are_indexed_without_decoding_them(coco, monkeypatch):
    """Twenty thousand images take seconds: headers are read once each, pictures never."""
    calls = []  # of threads: to append is one step, to count is not
    header = data_coco_files.read_header(coco.parent / "video_001/frame_000.png")

    def count(path):
        calls.append(path)
        return header

    def refuse(*args):
        raise AssertionError("a picture was decoded")

    monkeypatch.setattr(data_coco_files, "read_header", count)
    monkeypatch.setattr(data_source, "read_image", refuse)

    def grow(content):
        image, annotation = content["images"][0], content["annotations"][0]
        content["images"] = [
            image
            | {"id": k, "video_id": k // 100, "order_in_video": k % 100}
            | {"path": f"{k // 100}.png"}
            for k in range(2000)
        ]
        content["annotations"] = [annotation | {"id": k, "image_id": k} for k in range(2000)]

    for k in range(20):
        shutil.copy(coco.parent / "video_001/frame_000.png", coco.parent / f"{k}.png")
    source = CocoVideos(edit(coco, grow))
    assert len(source.videos) == 20
    assert source.warnings == []
    assert len(calls) == 2000
