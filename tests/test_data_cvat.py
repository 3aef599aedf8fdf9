import json

import numpy as np
import pytest
from conftest import SIZE, load, make_coco, moving_masks
from test_data_layouts import build_it

from sam2train.data_rle import decode_segmentation
from sam2train.errors import UserError

TRUTH = moving_masks(6, 2, SIZE)
META = (
    "<version>1.1</version><meta><task><size>6</size>{}<original_size><width>64</width>"
    "<height>48</height></original_size></task></meta>"
)


def cropped(mask):
    """A mask as CVAT writes it: run lengths along the rows of its rectangle, zeros first."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    part = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    flat = np.concatenate([[False], part.ravel()])
    cuts = np.flatnonzero(np.diff(flat.astype(int), append=2 if flat[-1] else -1))
    runs = np.diff(np.concatenate([[0], cuts]))
    height, width = part.shape
    return (
        f'rle="{", ".join(map(str, runs))}" left="{columns[0]}" top="{rows[0]}" '
        f'width="{width}" height="{height}"'
    )


def outline(mask):
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    x1, y1, x2, y2 = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return f'points="{x1}.00,{y1}.00;{x2}.00,{y1}.00;{x2}.00,{y2}.00;{x1}.00,{y2}.00"'


def shape(kind, mask, more="", attributes=""):
    inner = f"{outline(mask) if kind == 'polygon' else cropped(mask)} {more}"
    return f'<{kind} {inner} occluded="0" z_order="0">{attributes}</{kind}>'


def attribute(name, value):
    return f'<attribute name="{name}">{value}</attribute>'


def track(name, shapes, label="thing"):
    return f'<track id="{name}" label="{label}" source="manual">{"".join(shapes)}</track>'


def on_frame(kind, t, k, outside=0):
    more = f'frame="{t}" outside="{outside}" keyframe="1"'
    return shape(kind, TRUTH[t, k], more)


def make_frames_beside(folder, name="images/frame_{:06d}.png"):
    """The 6 frames of `make_coco`, alone in a folder."""
    make_coco(folder)
    (folder / "annotations.json").unlink()
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for t in range(6):
        (folder / "video_001" / f"frame_{t:03d}.png").rename(folder / name.format(t))
    (folder / "video_001").rmdir()


def write_xml(folder, body, meta=""):
    path = folder / "annotations.xml"
    head = '<?xml version="1.0" encoding="utf-8"?>\n'
    path.write_text(f"{head}<annotations>{META.format(meta)}{body}</annotations>")
    return path


def masks_of(dataset, video=0):
    """Object -> the labelled frames on which its mask is there, each checked against the truth of
    the object with the nearest mask."""
    found = {}
    video = dataset.videos[video]
    for object_id in video.object_ids:
        for t in video.labelled:
            mask = dataset.read_mask(video, t, object_id)
            if mask.any():
                k = int((mask & TRUTH[t, 1]).any())
                np.testing.assert_array_equal(mask, TRUTH[t, k])
                found.setdefault(object_id, []).append((t, k))
    return found


def refused(path, **keys):
    with pytest.raises(UserError) as caught:
        build_it(path, **{"dataset_type": "cvat"} | keys)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["coco", "cvat", "vos"])
@pytest.mark.parametrize("drawn", ["polygon", "mask"])
def test_tracks_are_objects_and_outside_is_absent(tmp_path, kind, drawn):
    make_frames_beside(tmp_path)
    one = [on_frame(drawn, t, 0, outside=int(t in (2, 3))) for t in range(6)]
    two = [on_frame(drawn, t, 1) for t in range(4)] + [on_frame(drawn, 4, 1, outside=1)]
    path = write_xml(tmp_path, track(0, one) + track(7, two))
    dataset, said = build_it(tmp_path if kind == "vos" else path, dataset_type=kind)
    assert "CVAT's XML for video" in said
    assert "by the numbers in their names" in said
    assert masks_of(dataset) == {
        0: [(t, 0) for t in (0, 1, 4, 5)],
        7: [(t, 1) for t in range(4)],
    }
    assert dataset.videos[0].labelled == list(range(6))
    assert dataset[0].masks.any()


def test_frames_between_key_frames_are_unlabelled_not_absent(tmp_path):
    make_frames_beside(tmp_path)
    shapes = [[on_frame("polygon", t, k) for t in (0, 3, 4)] for k in (0, 1)]
    path = write_xml(tmp_path, track(1, shapes[0]) + track(2, shapes[1]))
    dataset, said = build_it(path, dataset_type="cvat")
    assert dataset.videos[0].labelled == [0, 3, 4]
    assert "only key frames are in the file" in said
    assert "6 frames listed, 3 labelled" in said


def test_frames_that_the_task_leaves_out_are_unlabelled(tmp_path):
    make_frames_beside(tmp_path)
    body = track(1, [on_frame("polygon", t, 0) for t in (1, 3)])
    meta = "<start_frame>1</start_frame><stop_frame>4</stop_frame>"
    meta += "<frame_filter>step=2</frame_filter>"
    dataset, _ = build_it(write_xml(tmp_path, body, meta), dataset_type="cvat")
    assert dataset.videos[0].labelled == [1, 3]


@pytest.mark.parametrize("first", [0, 1, 5])
def test_pictures_that_count_from_1_are_taken_by_place_and_told(tmp_path, first):
    make_frames_beside(tmp_path)
    for t in reversed(range(6)):
        old = tmp_path / "images" / f"frame_{t:06d}.png"
        old.rename(tmp_path / "images" / f"picture {t + first}.png")
    path = write_xml(tmp_path, track(1, [on_frame("mask", t, 0) for t in range(6)]))
    dataset, said = build_it(path, dataset_type="cvat")
    assert ("frame 0 is picture" in said) == (first > 0)
    assert masks_of(dataset) == {1: [(t, 0) for t in range(6)]}


def test_pictures_that_fit_neither_number_nor_place_are_refused(tmp_path):
    make_frames_beside(tmp_path, "images/frame_{:06d}.png")
    (tmp_path / "images" / "frame_000000.png").unlink()
    path = write_xml(tmp_path, track(1, [on_frame("polygon", t, 0) for t in range(5)]))
    assert "has 5 pictures, frame_000001.png the first, the task 6 frames" in refused(path)
    (tmp_path / "images" / "frame_000002.png").rename(tmp_path / "images" / "frame_000000.png")
    assert "a mask on frame 2, and there is no picture for it" in refused(path)
    for picture in (tmp_path / "images").iterdir():
        picture.unlink()
    assert "no pictures in" in refused(path)


def test_masks_drawn_on_single_frames_are_told_apart_by_label(tmp_path):
    """CVAT writes each brush mask as a track of its own, with one frame and the next outside."""
    make_frames_beside(tmp_path)
    tracks = [
        track(2 * t + k, [on_frame("mask", t, k), on_frame("mask", t + 1, k, 1)], f"label {k}")
        for t in range(5)
        for k in (0, 1)
    ]
    dataset, said = build_it(write_xml(tmp_path, "".join(tracks)), dataset_type="cvat")
    assert "single shapes, not tracks" in said
    assert "object identity from category_id" in said
    assert masks_of(dataset) == {k + 1: [(t, k) for t in range(5)] for k in (0, 1)}
    assert dataset.videos[0].labelled == list(range(6))


def image(t, shapes, name="frame_{:06d}.png"):
    inner = "".join(shapes)
    return f'<image id="{t}" name="{name.format(t)}" width="64" height="48">{inner}</image>'


@pytest.mark.parametrize("name", ["images/frame_{:06d}.png", "images/train/frame_{}.png"])
@pytest.mark.parametrize("suffix", [".png", ""])
@pytest.mark.parametrize("identity", ["track_id", "label"])
def test_images_with_an_attribute_or_labels(tmp_path, name, suffix, identity):
    make_frames_beside(tmp_path, name)
    listed_as = name.removeprefix("images/").replace(".png", suffix)
    images = [
        image(
            t,
            [
                shape(
                    "mask" if k else "polygon",
                    TRUTH[t, k],
                    f'label="{"thing" if identity == "track_id" else f"thing {k}"}"',
                    attribute("track_id", 10 + k) * (identity == "track_id")
                    + attribute("colour", "__undefined__"),
                )
                for k in (0, 1)
            ],
            listed_as,
        )
        for t in reversed(range(6))
    ]
    dataset, said = build_it(write_xml(tmp_path, "".join(images)), dataset_type="coco")
    assert "CVAT's XML for images" in said
    assert f"object identity from {'attributes.track_id' if identity == 'track_id' else 'cat'}" in (
        said
    )
    assert len(dataset.videos) == 1
    first = 10 if identity == "track_id" else 1
    found = masks_of(dataset)
    assert sorted(k for [(_, k), *_] in found.values()) == [0, 1]
    assert {len(frames) for frames in found.values()} == {6}
    assert set(found) == {first, first + 1}


def test_unrelated_images_are_videos_of_one_frame(tmp_path):
    make_frames_beside(tmp_path)
    both = [shape("polygon", TRUTH[0, k], 'label="thing"') for k in (0, 1)]
    dataset, said = build_it(write_xml(tmp_path, image(0, both) + image(1, both)))
    assert len(dataset.videos) == 2
    assert "image COCO" in said


@pytest.mark.parametrize("kind", ["box", "ellipse", "polyline", "points", "cuboid"])
def test_what_is_no_mask_is_refused_by_name_or_left_out_and_told(tmp_path, kind):
    make_frames_beside(tmp_path)
    other = f'<{kind} frame="0" outside="0" xtl="1" ytl="1" xbr="9" ybr="9"></{kind}>'
    message = refused(write_xml(tmp_path, track(1, [other])))
    assert f"only 1 <{kind}>" in message
    assert "draw polygons or masks" in message
    good = track(2, [on_frame("polygon", t, 0) for t in range(6)])
    dataset, said = build_it(write_xml(tmp_path, track(1, [other]) + good), dataset_type="cvat")
    assert dataset.videos[0].object_ids == [2]
    assert f"1 <{kind}> left out" in said


def bomb(levels=9):
    grown = "".join(f'<!ENTITY a{k} "{f"&a{k - 1};" * 10}">' for k in range(1, levels))
    return f'<!DOCTYPE x [<!ENTITY a0 "ha">{grown}]>', f"<x>&a{levels - 1};</x>"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_a_document_type_is_refused_before_an_entity_grows(tmp_path, encoding):
    head, body = bomb()
    path = tmp_path / "annotations.xml"
    text = f'<?xml version="1.0" encoding="{encoding}"?>{head}<annotations>{body}</annotations>'
    path.write_bytes(text.encode(encoding))
    assert "has a <!DOCTYPE>" in refused(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("<annotations>", "not valid XML"),
        ('<?xml version="1.0" encoding="klingon"?><annotations/>', "not valid XML"),
        ("<annotations/>", "neither <image> nor <track>"),
        ("<svg><image/></svg>", "neither <image> nor <track>"),
        ("<a>" * 50 + "</a>" * 50, "more than 32 levels"),
        (f"<annotations>{track(1, [])}{image(0, [])}</annotations>", "both <image> and <track>"),
    ],
)
def test_a_file_that_is_no_cvat_xml_is_named(tmp_path, text, message):
    path = tmp_path / "annotations.xml"
    path.write_text(text)
    problem = refused(path)
    assert message in problem
    assert str(path) in problem
    assert "no such file" in refused(tmp_path / "other.xml")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rle="', 'rle="-1, ', "no list of run lengths"),
        ('rle="', 'rle="1, ', "the run lengths add up to"),
        ('left="', 'left="90', "is not within the frame"),
        ('left="', 'left="x', "expected a whole number"),
        ('frame="0"', 'frame="-1"', "expected a whole number"),
        (' frame="1"', ' frame="0"', "has two masks on frame 0"),
        ('<track id="1"', '<track id="1" task_id="3"', "tracks of 2 tasks"),
    ],
)
def test_damaged_shapes_are_named(tmp_path, old, new, message):
    make_frames_beside(tmp_path)
    tracks = [track(k + 1, [on_frame("mask", t, k) for t in range(6)]) for k in (0, 1)]
    path = write_xml(tmp_path, "".join(tracks))
    build_it(path, dataset_type="cvat")
    path.write_text(path.read_text().replace(old, new, 1))
    assert message in refused(path)


@pytest.mark.parametrize("points", ["", "1,1;2,2", "1,1;2,2;3", "1,1;2,2;a,b"])
def test_damaged_polygons_are_named(tmp_path, points):
    make_frames_beside(tmp_path)
    path = write_xml(
        tmp_path, track(1, [f'<polygon frame="3" outside="0" points="{points}"></polygon>'])
    )
    assert "<polygon> on frame 3" in refused(path)


def test_a_validation_file_beside_another_format(tmp_path):
    make_frames_beside(tmp_path / "val")
    body = track(1, [on_frame("mask", t, 0) for t in range(6)])
    val = write_xml(tmp_path / "val", body)
    from sam2train.config import build
    from sam2train.datasets import DatasetConfig, build_dataset
    from sam2train.transforms import AugmentConfig

    for kind in ("coco", "vos", "cvat"):
        raw = {"dataset_type": kind, "data_path": "x", "image_size": SIZE}
        config = build(DatasetConfig, raw, "dataset")
        found = build_dataset(
            config, AugmentConfig(), 0, str(val), training=False, say=lambda text: None
        )
        assert found.videos[0].object_ids == [1]
    path = make_coco(tmp_path / "coco")
    found = build_dataset(
        config, AugmentConfig(), 0, str(path), training=False, say=lambda text: None
    )
    assert found.videos[0].object_ids == [1, 2]


def test_the_run_lengths_of_the_tests_are_those_of_a_known_mask():
    """By hand: the columns 1 and 2 of the rows 1 and 2, and the last pixel of row 2."""
    mask = np.zeros((4, 5), bool)
    mask[1:3, 1:3] = mask[2, 3] = True
    assert cropped(mask) == 'rle="0, 2, 1, 3" left="1" top="1" width="3" height="2"'
    from xml.etree import ElementTree

    from sam2train.data_cvat import _read_mask

    element = ElementTree.fromstring(f"<mask {cropped(mask)}/>")
    found = json.loads(json.dumps(_read_mask(element, (4, 5))))
    np.testing.assert_array_equal(decode_segmentation(found, (4, 5)), mask)


def test_the_guide_s_class_takes_the_xml(tmp_path):
    make_frames_beside(tmp_path)
    path = write_xml(tmp_path, track(3, [on_frame("mask", t, 0) for t in range(6)]))
    assert load(path)[0].object_ids == [3]


def test_several_files_in_one_folder_have_frames_in_folders_of_their_names(tmp_path):
    found = []
    for k, name in enumerate(("a", "b")):
        make_frames_beside(tmp_path / name)
        shapes = [on_frame("mask", t, k) for t in range(6)]
        write_xml(tmp_path, track(k, shapes)).rename(tmp_path / f"{name}.xml")
        dataset, said = build_it(tmp_path / f"{name}.xml", dataset_type="cvat")
        assert masks_of(dataset) == {k: [(t, k) for t in range(6)]}
        assert str(tmp_path / name / "images") in said
        found.append(dataset.videos[0].video_id)
    assert found == ["a", "b"]
