"""Which annotations of a COCO file are one object, and what its masks are."""

import numpy as np
import pytest
from conftest import (
    SIZE,
    edit,
    encode,
    fails,
    load,
    make_coco,
    moving_masks,
    same,
)

from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_coco import CocoVideos
from sam2train.errors import UserError


def identities(path):
    return load(path).videos[0].object_ids


@pytest.mark.parametrize("key", ["track_id", "instance_id", "object_id"])
def test_objects_are_told_apart_by_any_identity_key(coco, key):
    def rename(content):
        for annotation in content["annotations"]:
            annotation[key] = annotation.pop("track_id") + 10

    assert identities(edit(coco, rename)) == [11, 12]


def test_a_track_id_goes_before_the_others_and_before_the_category(coco):
    def add(content):
        for annotation in content["annotations"]:
            annotation |= {"instance_id": annotation["id"], "object_id": 5, "category_id": 3}

    assert identities(edit(coco, add)) == [1, 2]


def test_without_an_identity_the_category_tells_objects_apart(coco):
    def drop(content):
        for annotation in content["annotations"]:
            annotation["category_id"] = annotation.pop("track_id") + 20

    assert identities(edit(coco, drop)) == [21, 22]


def test_zero_and_empty_text_are_identities(coco):
    def zero(content):
        for annotation in content["annotations"]:
            annotation["track_id"] -= 1
        for image in content["images"]:
            image |= {"id": image["id"] - 1, "video_id": 0}
        for annotation in content["annotations"]:
            annotation["image_id"] -= 1

    dataset = load(edit(coco, zero))
    assert dataset.videos[0].object_ids == [0, 1]
    assert dataset[0].video_id == 0


def test_one_object_needs_no_identity_at_all(coco):
    def drop(content):
        content["annotations"] = content["annotations"][::2]
        for annotation in content["annotations"]:
            del annotation["track_id"], annotation["category_id"]
        del content["categories"]

    assert identities(edit(coco, drop)) == [1]


def test_a_null_track_id_is_none(coco):
    def null(content):
        for annotation in content["annotations"]:
            annotation["category_id"] = annotation["track_id"] + 5
            annotation["track_id"] = None

    assert identities(edit(coco, null)) == [6, 7]


def test_identities_count_within_a_video(tmp_path):
    path = make_coco(tmp_path, num_videos=2)

    def mix(content):
        of_second = {image["id"] for image in content["images"] if image["video_id"] == 2}
        for annotation in content["annotations"]:
            if annotation["image_id"] in of_second:
                annotation["category_id"] = f"kind {annotation.pop('track_id')}"

    videos = load(edit(path, mix)).videos
    assert [video.object_ids for video in videos] == [[1, 2], ["kind 1", "kind 2"]]


def test_two_annotations_of_one_object_on_one_frame_are_ambiguous(coco):
    def merge(content):
        for annotation in content["annotations"]:
            del annotation["track_id"]

    message = fails(edit(coco, merge))
    assert "6 problems" in message
    assert "annotations 1 and 2 (image 1) are the same object (category_id 1)" in message
    assert "its own `track_id`" in message


def test_track_ids_and_categories_in_one_video_are_an_error(coco):
    def drop(content):
        del content["annotations"][3]["track_id"]  # its category is 1, and so is a track

    message = fails(edit(coco, drop))
    assert (
        "video 1: annotation 1 (image 1) has track_id (a number), annotation 4 (image 2) has "
        "category_id (a number); tell all objects of a video apart in one way" in message
    )


def test_two_identity_keys_in_one_video_are_an_error(coco):
    def rename(content):
        annotation = content["annotations"][3]
        annotation["object_id"] = annotation.pop("track_id")

    assert "annotation 4 (image 2) has object_id" in fails(edit(coco, rename))


def test_numbers_and_text_as_ids_in_one_video_are_an_error(coco):
    def quote(content):
        content["annotations"][3]["track_id"] = "2"

    message = fails(edit(coco, quote))
    assert "annotation 1 (image 1) has track_id (a number)" in message
    assert "annotation 4 (image 2) has track_id (text)" in message


def test_whole_floats_are_ids(coco):
    def as_pandas_does(content):
        for image in content["images"]:
            image |= {"id": float(image["id"]), "order_in_video": float(image["order_in_video"])}
        for annotation in content["annotations"]:
            annotation["track_id"] = float(annotation["track_id"])

    ids = identities(edit(coco, as_pandas_does))
    assert ids == [1, 2]
    assert {type(object_id) for object_id in ids} == {int}


BAD_IDS = [True, [1], {"a": 1}, 1.5, float("nan"), float("inf")]


@pytest.mark.parametrize("value", BAD_IDS)
@pytest.mark.parametrize(
    ("part", "key", "named"),
    [
        ("images", "id", "the image at position 1: `id` is"),
        ("images", "video_id", "image 2: `video_id` is"),
        ("annotations", "image_id", "annotation 2: `image_id` is"),
        ("annotations", "track_id", "annotation 2 (image 1): `track_id` is"),
    ],
)
def test_values_that_are_no_id_are_named(coco, part, key, named, value):
    def spoil(content):
        content[part][1][key] = value

    message = fails(edit(coco, spoil))
    assert f"{named} {value!r}; expected a whole number or text" in message


@pytest.mark.parametrize("value", [None, *BAD_IDS])
def test_an_annotation_needs_no_id_of_its_own(coco, value):
    def spoil(content):
        content["annotations"][1] |= {"id": value, "segmentation": {"size": [1, 1], "counts": [1]}}

    assert "annotation at position 1 (image 1): segmentation: " in fails(edit(coco, spoil))


def notes(path, **options):
    return load(path, **options).source.notes


@pytest.mark.parametrize("name", ["track_id", "Track ID", "trackId", "track", "tracking-id"])
@pytest.mark.parametrize("none", ["missing", None, -1, -1.0, "-1"])
def test_a_track_id_among_the_attributes_is_read_and_told(coco, name, none):
    def move(content):
        for annotation in content["annotations"]:
            track = annotation.pop("track_id")
            if none != "missing":
                annotation["track_id"] = none
            annotation["attributes"] = {"occluded": False, name: track - 1, "object": "a b"}

    dataset = load(edit(coco, move))
    assert dataset.videos[0].object_ids == [0, 1]
    assert dataset.source.notes == [f"object identity from attributes.{name}"]


def test_a_check_box_is_no_id(coco):
    def add(content):
        for annotation in content["annotations"]:
            annotation["attributes"] = {"track": True, "object_id": annotation.pop("track_id")}

    assert notes(edit(coco, add)) == ["object identity from attributes.object_id"]


def test_ids_that_start_anew_in_each_category(coco):
    """The first object is person 1 and then gone, the second is car 1 and comes later."""

    def restart(content):
        content["categories"] = [{"id": 1, "name": "person"}, {"id": 2, "name": "car"}]
        content["annotations"] = [
            annotation | {"track_id": 1, "category_id": annotation["track_id"]}
            for annotation in content["annotations"]
            if (annotation["track_id"] == 1) == (annotation["image_id"] <= 3)
        ]

    dataset = load(edit(coco, restart))
    assert dataset.videos[0].object_ids == ["person 1", "car 1"]
    truth = moving_masks(6, 2, SIZE)
    for object_id, k, frames in (("person 1", 0, range(3)), ("car 1", 1, range(3, 6))):
        for t in range(6):
            mask = dataset.read_mask(dataset.videos[0], t, object_id)
            np.testing.assert_array_equal(mask, truth[t, k] * (t in frames))
    (note,) = dataset.source.notes
    assert "track_id 1 has several categories, so ids are unique within a category" in note


def test_two_categories_with_one_id_on_one_frame(coco):
    def restart(content):
        for annotation in content["annotations"]:
            annotation |= {"track_id": 1, "category_id": annotation["track_id"]}

    assert identities(edit(coco, restart)) == ["thing 1", "2 1"]


def test_a_category_that_changes_in_place_is_one_object(coco):
    def relabel(content):
        content["annotations"][4]["category_id"] = 2

    dataset = load(edit(coco, relabel))
    assert dataset.videos[0].object_ids == [1, 2]
    assert dataset.source.notes == ["video 1: track_id 1 changes its category in place: one object"]


def test_the_category_as_identity_is_told(coco):
    def drop(content):
        for annotation in content["annotations"]:
            annotation["category_id"] = annotation.pop("track_id") + 20

    (note,) = notes(edit(coco, drop))
    assert note.startswith("object identity from category_id, as there is no `track_id`")


@pytest.mark.parametrize("track_id", ["missing", -1, None])
def test_a_category_that_leaps_is_no_object(coco, track_id):
    """One object on the first frames, another one far from it on the others."""

    def leap(content):
        corner = np.zeros((2, *SIZE), bool)
        corner[0, :12, :12] = corner[1, -12:, -12:] = True
        content["annotations"] = content["annotations"][::2]
        for annotation in content["annotations"]:
            annotation["segmentation"] = encode(corner[int(annotation["image_id"] > 3)])
            del annotation["track_id"]
            if track_id != "missing":
                annotation["track_id"] = track_id

    message = fails(edit(coco, leap))
    assert "video 1: 'thing' leaps from (0, 0) on image 3 to (52, 36) on image 4" in message
    assert "give each object its own `track_id`" in message


def test_a_fast_object_and_one_that_returns_do_not_leap(coco):
    def move(content):
        masks = np.zeros((6, *SIZE), bool)
        for t in range(6):
            masks[t, 4:8, 11 * t : 11 * t + 4] = True
        content["annotations"] = [
            annotation | {"segmentation": encode(masks[annotation["image_id"] - 1])}
            for annotation in content["annotations"][::2]
            if annotation["image_id"] not in (3, 4)
        ]
        for annotation in content["annotations"]:
            del annotation["track_id"]

    assert load(edit(coco, move)).videos[0].object_ids == [1]


@pytest.mark.parametrize("setting", ["unite", "error"])
def test_several_annotations_of_one_object_on_one_frame(coco, setting):
    """The parts of an object behind a post: its mask is their union."""
    truth = moving_masks(6, 2, SIZE)

    def part(content):
        halves = []
        for annotation in content["annotations"]:
            if annotation["track_id"] == 2:
                continue
            mask = truth[annotation["image_id"] - 1, 0]
            left = np.flatnonzero(mask.any(axis=0))[0]
            for columns in (slice(left, left + 6), slice(left + 8, None)):
                half = np.zeros(SIZE, bool)
                half[:, columns] = mask[:, columns]
                halves.append(annotation | {"segmentation": encode(half), "id": len(halves) + 100})
        content["annotations"] = halves

    path = edit(coco, part)
    if setting == "error":
        message = fails(path, same_object_twice="error")
        assert "6 problems" in message
        assert "annotations 100 and 101 (image 1) are the same object (track_id 1)" in message
        assert "dataset.same_object_twice: unite" in message
        return
    dataset = load(path, same_object_twice="unite")
    assert len(dataset.warnings) == 1
    assert "object 1 on image 1, object 1 on image 2" in dataset.warnings[0]
    assert "united; dataset.same_object_twice: error refuses them" in dataset.warnings[0]
    for t in range(6):
        expected = truth[t, 0].copy()
        left = np.flatnonzero(expected.any(axis=0))[0]
        expected[:, left + 6 : left + 8] = False
        assert dataset.videos[0].frames[t].annotations[1].area == expected.sum()
        np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], t, 1), expected)


def test_polygons_and_both_kinds_of_rle_are_read(coco):
    truth = moving_masks(6, 2, SIZE)[:, 0]
    y, x = np.nonzero(truth[1])
    box = [x.min(), y.min(), x.max() + 1, y.max() + 1]
    corners = [[float(box[i]) for i in (0, 1, 2, 1, 2, 3, 0, 3)]]
    columns = truth[2].T.ravel().astype(int)
    edges = np.flatnonzero(np.diff(columns, prepend=0, append=columns[-1])) if columns.any() else []
    counts = np.diff([0, *edges, columns.size]).tolist()

    def change(content):
        content["annotations"][2]["segmentation"] = corners
        content["annotations"][4]["segmentation"] = {"size": list(SIZE), "counts": counts}

    dataset = load(edit(coco, change))
    for t in range(3):
        np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], t, 1), truth[t])


def test_other_spellings_of_masks_are_read_and_told(coco):
    truth = moving_masks(6, 2, SIZE)[:, 0]
    plain = [load(coco).read_mask(load(coco).videos[0], t, 1) for t in range(6)]

    def change(content):
        for t, annotation in enumerate(content["annotations"][::2]):
            y, x = np.nonzero(truth[t])
            box = [int(x.min()), int(y.min()), int(x.max()) + 1, int(y.max()) + 1]
            corners = [box[i] for i in (0, 1, 2, 1, 2, 3, 0, 3)]
            pairs = [corners[k : k + 2] for k in range(0, 8, 2)]
            annotation["segmentation"] = [
                corners,
                [[corners]],
                {"exterior": pairs, "interiors": []},
                [corners, [40.0, 30.0]],
                {"size": list(SIZE), "counts": str(encode(truth[t])["counts"].encode())},
                encode(truth[t]),
            ][t]

    dataset = load(edit(coco, change))
    for t in range(6):
        np.testing.assert_array_equal(dataset.read_mask(dataset.videos[0], t, 1), plain[t])
    said = "\n".join(dataset.source.notes)
    assert "annotation 1: `segmentation` is one polygon" in said
    assert "annotation 3: polygons are nested once more" in said
    assert "annotation 9: `counts` is Python's text of bytes" in said
    assert dataset.warnings == [
        "annotation 7: single points or lines beside the polygons are left out"
    ]


@pytest.mark.parametrize("nested", [False, True])
def test_polygons_in_shares_of_the_frame_are_scaled_and_told(coco, nested):
    truth = moving_masks(6, 2, SIZE)

    def change(content):
        for annotation in content["annotations"]:
            y, x = np.nonzero(truth[annotation["image_id"] - 1, annotation["track_id"] - 1])
            box = [x.min() / 64, y.min() / 48, (x.max() + 1) / 64, (y.max() + 1) / 48]
            corners = [float(box[i]) for i in (0, 1, 2, 1, 2, 3, 0, 3)]
            annotation["segmentation"] = [[corners]] if nested else [corners]

    dataset = load(edit(coco, change))
    assert "polygons lie in 0..1: shares of width and height, scaled" in dataset.source.notes[0]
    for t in range(6):
        for k in range(2):
            mask = dataset.read_mask(dataset.videos[0], t, k + 1)
            np.testing.assert_array_equal(mask, truth[t, k])


def test_shares_beside_pixels_are_ambiguous(coco):
    def change(content):
        pixels, shares = content["annotations"][0], content["annotations"][1]
        pixels["segmentation"] = [[1, 1, 9, 1, 9, 9]]
        shares["segmentation"] = [[0.1, 0.1, 0.9, 0.1, 0.9, 0.9]]

    assert "annotation 2 (image 1): segmentation: its polygons lie in 0..1" in fails(
        edit(coco, change)
    )


def test_empty_segmentations_mean_absent_and_are_counted(coco):
    empty = encode(np.zeros(SIZE, bool))

    def change(content):
        for place, nothing in zip((0, 2, 4), ([], None, empty), strict=True):
            content["annotations"][place]["segmentation"] = nothing
        del content["annotations"][6]["segmentation"]

    dataset = load(edit(coco, change), video_clip_length=6)
    assert dataset.warnings == ["4 annotations have no pixel: the object counts as absent there"]
    sample = dataset[0]
    shown = sample.masks.flatten(2).any(dim=2)  # (T, N)
    assert shown[:, sample.object_ids.index(1)].tolist() == [False] * 4 + [True] * 2
    assert shown[:, sample.object_ids.index(2)].all()
    assert sample.prompts[sample.object_ids.index(1)]["frame_index"] == 4


def test_a_bad_segmentation_is_named_with_its_annotation_and_image(coco):
    def change(content):
        content["annotations"][3]["segmentation"] = encode(np.ones((10, 10), bool))
        content["annotations"][5]["segmentation"]["counts"] += "zz"

    message = fails(edit(coco, change))
    assert "2 problems" in message
    assert "annotation 4 (image 2): segmentation: the RLE has size [10, 10]" in message
    assert "annotation 6 (image 3): segmentation: `counts` is no RLE text" in message


def test_boxes_alone_are_no_masks(coco):
    def change(content):
        for annotation in content["annotations"]:
            del annotation["segmentation"]
            annotation["bbox"] = [1, 2, 3, 4]

    assert "no annotation has a mask" in fails(edit(coco, change))


def test_area_and_bbox_of_the_file_are_not_believed(coco):
    plain = load(coco)[0]

    def change(content):
        for annotation in content["annotations"]:
            annotation |= {"area": 0, "bbox": [0, 0, 0, 0]}

    assert same(load(edit(coco, change))[0], plain)


def add_crowd(content, where=slice(0, 6), *, every=True, **more):
    """A region at the top right of each frame, beside the objects."""
    region = np.zeros(SIZE, bool)
    region[where, -20:] = True
    for image in content["images"]:
        content["annotations"].append(
            {"id": 900 + image["id"], "image_id": image["id"], "category_id": 1}
            | {"segmentation": encode(region), "iscrowd": 1}
            | more
        )


def test_crowds_are_ignored_and_no_object(tmp_path):
    data = load(edit(make_coco(tmp_path), add_crowd))
    (video,) = data.videos
    assert video.object_ids == [1, 2]
    for t in range(6):
        expected = np.zeros(SIZE, bool)
        expected[:6, -20:] = True
        for object_id in (1, 2):
            expected &= ~data.read_mask(video, t, object_id)
        np.testing.assert_array_equal(data.read_ignore(video, t), expected)
    assert data[0].ignore.any()
    assert any("6 annotations are regions to ignore" in note for note in data.source.notes)


def test_regions_with_ignore_are_ignored(tmp_path):
    more = {"iscrowd": 0, "ignore": 1}
    data = load(edit(make_coco(tmp_path), lambda content: add_crowd(content, **more)))
    assert data.videos[0].object_ids == [1, 2]
    assert data.read_ignore(data.videos[0], 0).any()


def test_iscrowd_of_all_rles_says_how_they_are_written(tmp_path):
    """As CVAT flags masks: they have tracks, and no RLE is without the flag."""

    def flag(content):
        for annotation in content["annotations"]:
            annotation["iscrowd"] = 1

    path = edit(make_coco(tmp_path), flag)
    data = load(path)
    assert data.videos[0].object_ids == [1, 2]
    assert data.read_ignore(data.videos[0], 0) is None
    assert any("dataset.crowds: ignore" in note for note in data.source.notes)
    with pytest.raises(UserError, match="no annotation has a mask"):
        ClipDataset(CocoVideos(path, crowds="ignore"), clip_settings(SIZE))


def test_crowds_may_be_objects(tmp_path):
    path = edit(make_coco(tmp_path), lambda content: add_crowd(content, track_id=9))
    assert load(path).videos[0].object_ids == [1, 2]
    source = CocoVideos(path, crowds="objects")
    assert source.videos[0].object_ids == [1, 2, 9]


def test_a_frame_with_a_crowd_alone_was_looked_at(tmp_path):
    def thin(content):
        add_crowd(content)
        content["annotations"] = [
            a for a in content["annotations"] if a["id"] > 900 or a["image_id"] in (1, 3, 5)
        ]

    assert load(edit(make_coco(tmp_path), thin)).videos[0].labelled == list(range(6))
