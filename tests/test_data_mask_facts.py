"""What one mask picture holds: counts by hand, and pictures that are no mask."""

import numpy as np
import pytest
from PIL import Image

from sam2train.data_mask_facts import read_facts
from sam2train.errors import UserError

# A block of 4 x 5 pixels, and a pixel with a line of two below it, on 8 x 10.
IDS = np.zeros((8, 10), np.uint8)
IDS[1:5, 1:6] = 1
IDS[6, 8], IDS[7, 8:10] = 2, 3


def facts_of(tmp_path, pixels, palette=None):
    picture = Image.fromarray(pixels)
    if palette is not None:
        picture.putpalette(palette)
    picture.save(tmp_path / "mask.png")
    return read_facts(tmp_path / "mask.png")


def test_counts_of_a_grey_picture(tmp_path):
    facts = facts_of(tmp_path, IDS)
    assert (facts.kind, facts.size) == ("grey", (8, 10))
    assert facts.areas == {0: 57, 1: 20, 2: 1, 3: 2}
    # The border has 2 * 10 + 2 * 6 pixels, of which the line takes two.
    assert facts.border == {0: 30, 3: 2}
    assert facts.interior[1] == 2 * 3
    assert not {2, 3} & facts.interior.keys()
    assert facts.alone[2] == 1
    assert 3 not in facts.alone
    assert facts.touching[2] == 1
    assert facts.touching[3] == 1


def test_a_palette_is_kept_and_counts_by_colour_follow(tmp_path):
    colours = [0, 0, 0, 200, 10, 0, 0, 100, 20, 9, 9, 90]
    facts = facts_of(tmp_path, IDS, palette=colours)
    assert facts.kind == "palette"
    red, green, blue = 200 + 256 * 10, 256 * 100 + 65536 * 20, 9 + 256 * 9 + 65536 * 90
    assert facts.palette == {0: 0, 1: red, 2: green, 3: blue}
    by_colour = facts.by_colour()
    assert by_colour.kind == "colour"
    assert by_colour.areas == {0: 57, red: 20, green: 1, blue: 2}
    assert by_colour.interior[red] == facts.interior[1]
    assert by_colour.by_colour() is by_colour


def test_the_colours_of_an_rgb_picture_are_counted_as_those_of_a_palette(tmp_path):
    colours = np.array([(0, 0, 0), (200, 10, 0), (0, 100, 20), (9, 9, 90)], np.uint8)
    palette = facts_of(tmp_path, IDS, palette=colours.ravel().tolist()).by_colour()
    rgb = facts_of(tmp_path, colours[IDS])
    assert rgb.kind == "colour"
    for name in ("areas", "border", "interior", "alone", "touching"):
        assert getattr(rgb, name) == getattr(palette, name), name


def test_an_empty_mask(tmp_path):
    facts = facts_of(tmp_path, np.zeros((6, 7), np.uint8))
    assert (facts.areas, facts.border) == ({0: 42}, {0: 22})
    assert not facts.touching


def test_a_picture_of_many_colours_is_no_mask(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    with pytest.raises(UserError, match=r"mask\.png: .*has 400 colours"):
        facts_of(tmp_path, pixels)
