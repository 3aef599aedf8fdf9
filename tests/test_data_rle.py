import tracemalloc

import numpy as np
import pytest
from conftest import encode
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as rle

from sam2train.data_rle import (
    MAX_CORNERS,
    Parts,
    bounding_box,
    decode_segmentation,
    polygon_corners,
    run_lengths,
    scaled_polygons,
    segmentation_area,
)

SHAPES = st.tuples(st.integers(1, 24), st.integers(1, 24))


def test_uncompressed_runs_by_hand():
    # Down the columns of a 2x3 frame: 1 pixel out, 2 in, 3 out.
    segmentation = {"size": [2, 3], "counts": [1, 2, 3]}
    expected = [[False, True, False], [True, False, False]]
    np.testing.assert_array_equal(decode_segmentation(segmentation, (2, 3)), expected)
    assert segmentation_area(segmentation, (2, 3)) == 2


@given(SHAPES.flatmap(lambda shape: arrays(bool, shape)))
def test_rle_text_of_pycocotools_comes_back(mask):
    segmentation = encode(mask)
    decoded = decode_segmentation(segmentation, mask.shape)
    np.testing.assert_array_equal(decoded, mask)
    assert decoded.dtype == bool
    assert decoded.flags.c_contiguous
    assert segmentation_area(segmentation, mask.shape) == mask.sum()
    as_list = {"size": list(mask.shape), "counts": run_lengths(segmentation, mask.shape).tolist()}
    np.testing.assert_array_equal(decode_segmentation(as_list, mask.shape), mask)


def test_long_runs_of_a_large_frame():
    mask = np.zeros((1080, 1920), bool)
    mask[200:900, 300:1700] = True
    mask[500, 1000] = False
    np.testing.assert_array_equal(decode_segmentation(encode(mask), mask.shape), mask)


@given(
    st.integers(1, 4).flatmap(
        lambda corners: st.lists(
            st.lists(st.floats(-5, 45), min_size=6 + 2 * corners, max_size=6 + 2 * corners),
            min_size=1,
            max_size=3,
        )
    )
)
def test_polygons_are_what_pycocotools_makes_of_them(polygons):
    merged = rle.merge(rle.frPyObjects(polygons, 30, 40))
    expected = rle.decode(merged).astype(bool)
    np.testing.assert_array_equal(decode_segmentation(polygons, (30, 40)), expected)
    assert segmentation_area(polygons, (30, 40)) == expected.sum()


def test_a_square_polygon_by_hand():
    mask = decode_segmentation([[2, 1, 6, 1, 6, 4, 2, 4]], (8, 10))
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:6] = True
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.parametrize("nothing", [None, []])
def test_nothing_is_an_empty_mask(nothing):
    mask = decode_segmentation(nothing, (3, 5))
    assert mask.shape == (3, 5)
    assert not mask.any()
    assert segmentation_area(nothing, (3, 5)) == 0


GOOD = encode(np.eye(6, dtype=bool))["counts"]


@pytest.mark.parametrize(
    ("segmentation", "message"),
    [
        ({"size": [6, 5], "counts": GOOD}, r"size \[6, 5\], the frame \[6, 6\]"),
        ({"size": 6, "counts": GOOD}, r"size 6, the frame \[6, 6\]"),
        ({"size": None, "counts": GOOD}, "size None"),
        ({"counts": GOOD}, "expected an RLE with"),
        ({"size": [6, 6]}, "expected an RLE with"),
        ("polygon", "expected an RLE with"),
        (7, "expected an RLE with"),
        (True, "expected an RLE with"),
        ({"size": [6, 6], "counts": ""}, "expected RLE text or a list"),
        ({"size": [6, 6], "counts": None}, "expected RLE text or a list"),
        ({"size": [6, 6], "counts": GOOD[:-1]}, "add up to"),
        ({"size": [6, 6], "counts": GOOD + "1"}, "add up to"),
        ({"size": [6, 6], "counts": GOOD + "q"}, "no RLE text"),
        ({"size": [6, 6], "counts": GOOD + " "}, "no RLE text"),
        ({"size": [6, 6], "counts": GOOD[:3] + "é"}, "no RLE text"),
        ({"size": [6, 6], "counts": "o" * 20 + "0"}, "no RLE text"),  # one endless number
        ({"size": [6, 6], "counts": GOOD[:-1] + "o"}, "no RLE text"),  # a number cut short
        ({"size": [6, 6], "counts": [3, 4]}, "add up to 7, not 6 x 6"),
        ({"size": [6, 6], "counts": [20, -4, 20]}, "one is negative"),
        ({"size": [6, 6], "counts": []}, "not of whole numbers"),
        ({"size": [6, 6], "counts": [30.5, 5.5]}, "not of whole numbers"),
        ({"size": [6, 6], "counts": ["36"]}, "not of whole numbers"),
        ({"size": [6, 6], "counts": [[36]]}, "not of whole numbers"),
        ({"size": [6, 6], "counts": [True, 35]}, "not of whole numbers"),
        ({"size": [6, 6], "counts": [2**70, 1]}, "a run of 1180591620717411303424 pixels"),
        ([[1, 1, 4, 4]], "a polygon of 4 numbers"),
        ([[1, 1, 4, 1, 4, 4, 2]], "a polygon of 7 numbers"),
        ([[]], "a polygon of 0 numbers"),
        ([1, 1, 4, 4], "a polygon of 4 numbers"),
        ([[[[1, 1, 4, 1, 4, 4]]]], "expected polygons"),
        ([[1, 1], [4, 4]], "a polygon of 2 numbers"),
        ({"exterior": 5}, "expected polygons"),
        ({"exterior": [[1, 1], [4, 1], [4, 4]], "interiors": 5}, "`interiors` is no list"),
        ([{"size": [6, 6], "counts": GOOD}], "expected polygons"),
        ([[1, 1, 4, "1", 4, 4]], "a corner that is no number"),
        ([[1, 1, 4, float("nan"), 4, 4]], "a corner that is no number"),
        ([[1, 1, 4, 1e9, 4, 4]], r"beyond \+-60 px"),
    ],
)
def test_bad_segmentations_say_what_is_wrong(segmentation, message):
    for read in (decode_segmentation, segmentation_area):
        with pytest.raises(ValueError, match=message):
            read(segmentation, (6, 6))


@given(st.text("0123456789:;<=>?@ABCDEFGHIJKLMNOPQRSTUVWXYZ[]^_`abcdefghijklmno", max_size=12))
def test_any_text_is_a_mask_of_its_size_or_an_error(text):
    try:
        mask = decode_segmentation({"size": [4, 5], "counts": text}, (4, 5))
    except ValueError:
        return
    assert mask.shape == (4, 5)
    assert segmentation_area({"size": [4, 5], "counts": text}, (4, 5)) == mask.sum()


# Dialects

SQUARE = [2, 1, 6, 1, 6, 4, 2, 4]
PAIRS = [[2, 1], [6, 1], [6, 4], [2, 4]]
HOLE = [[3, 2], [5, 2], [5, 3], [3, 3]]


@pytest.mark.parametrize(
    ("segmentation", "remark"),
    [
        (SQUARE, "one polygon instead of a list"),
        ([SQUARE], None),
        ([[SQUARE]], "nested once more"),
        (PAIRS, "pairs"),
        ([PAIRS], "pairs"),
        ([SQUARE, [7.0, 7.0]], "left out"),
        ([[7.0, 7.0], SQUARE, [0, 0, 9, 9]], "left out"),
        ({"exterior": PAIRS}, None),
        ({"exterior": PAIRS, "interiors": []}, None),
        ([{"exterior": SQUARE, "interiors": None}], None),
    ],
)
def test_every_spelling_of_a_polygon_is_the_same_mask(segmentation, remark):
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:6] = True
    remarks = set()
    assert run_lengths(segmentation, (8, 10), remarks)[1::2].sum() == 12
    np.testing.assert_array_equal(decode_segmentation(segmentation, (8, 10)), expected)
    assert len(remarks) == (remark is not None)
    assert all(remark in line for line in remarks)


def test_holes_are_outside():
    shape = {"exterior": PAIRS, "interiors": [HOLE]}
    expected = np.zeros((8, 10), bool)
    expected[1:4, 2:6] = True
    expected[2:3, 3:5] = False
    np.testing.assert_array_equal(decode_segmentation(shape, (8, 10)), expected)
    # The hole of one shape does not cut another shape.
    np.testing.assert_array_equal(
        decode_segmentation([shape, SQUARE], (8, 10)), decode_segmentation([SQUARE], (8, 10))
    )


@given(SHAPES.flatmap(lambda shape: arrays(bool, shape)), st.booleans())
def test_what_python_and_json_make_of_bytes_is_read(mask, as_bytes):
    segmentation = encode(mask)
    counts = segmentation["counts"].encode()
    written = str(counts).encode() if as_bytes else str(counts)
    remarks = set()
    runs = run_lengths(segmentation | {"counts": written}, mask.shape, remarks)
    np.testing.assert_array_equal(runs, run_lengths(segmentation, mask.shape))
    assert len(remarks) == 1
    doubled = segmentation | {"counts": segmentation["counts"].replace("\\", "\\" * 2)}
    np.testing.assert_array_equal(decode_segmentation(doubled, mask.shape), mask)


def test_floats_that_are_whole_numbers_are_run_lengths():
    remarks = set()
    runs = run_lengths({"size": [2, 3], "counts": [1.0, 2, 3.0]}, (2, 3), remarks)
    assert runs.tolist() == [1, 2, 3]
    assert remarks == {"run lengths are floats such as 3.0; read as whole numbers"}


def test_a_union_of_parts():
    parts = Parts(([SQUARE], {"size": [8, 10], "counts": [0, 3, 77]}))
    mask = decode_segmentation(parts, (8, 10))
    assert mask.sum() == segmentation_area(parts, (8, 10)) == 15
    assert mask[0:3, 0].all()


def test_shares_of_the_frame_become_pixels():
    shares = [[x / 10 if k % 2 == 0 else x / 8 for k, x in enumerate(SQUARE)]]
    pixels = scaled_polygons(shares, (8, 10))
    np.testing.assert_array_equal(
        decode_segmentation(pixels, (8, 10)), decode_segmentation([SQUARE], (8, 10))
    )
    assert polygon_corners(shares) == shares
    assert polygon_corners({"size": [8, 10], "counts": [80]}) == []


@given(SHAPES.flatmap(lambda shape: arrays(bool, shape)))
def test_the_box_of_runs_is_that_of_the_mask(mask):
    box = bounding_box(run_lengths(encode(mask), mask.shape), mask.shape[0])
    rows, columns = np.nonzero(mask)
    if not len(rows):
        assert box is None
    else:
        assert box == (columns.min(), rows.min(), columns.max(), rows.max())


# Sizes


@pytest.mark.parametrize(
    "counts",
    [
        [9223372036854775807, 9223372036854775807, 3074],  # the sum wraps to 64 x 48
        [2**63 - 1, 2**63 - 1, 2, 3072],
        [-(2**62), 2**62, 3072],
        [0] * 10_000 + [3072],
    ],
)
def test_run_lengths_that_are_too_large_or_many_are_refused(counts):
    with pytest.raises(ValueError, match=r"frame of 64 x 48"):
        decode_segmentation({"size": [64, 48], "counts": counts}, (64, 48))


@pytest.mark.parametrize(
    "polygon",
    [
        [0.5] * 2_000_000,  # a million corners
        [[1.0, 2.0]] * 1_000_000,
        [0, 0, 19_000, 19_000] * 5_000,  # few corners, a long way between them
    ],
)
def test_polygons_that_are_too_large_are_refused_before_memory_is_taken(polygon):
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"more than {MAX_CORNERS}|outline of .* px, more than"):
        decode_segmentation([polygon], (1080, 1920))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100e6
