"""What the pixel values of mask pictures mean, decided for each video from all of its masks: ids,
colours, grey levels, smoothed edges, and values of no object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from sam2train.data_masks import MaskFacts

# How pixel values are read. `auto` decides from the masks; the others override it.
#   ids      the palette index or grey value (R + 256 G + 65536 B of an RGB picture) is the object's
#            id, 0 the background, and 255 beside other values void.
#   colours  each colour or grey level is an object, but for the background; nothing is void.
#   binary   one object: what is brighter than half, or not of the colour of the background.
MaskValues = Literal["auto", "ids", "colours", "binary"]

VOID = 255
MOTS_IGNORE = 10000  # of the MOTS PNG format, whose ids are class * 1000 + number
_MAX_OBJECTS = 64  # colours of a video; more are taken for noise
_VOID_COLOURS = (0xFFFFFF, 0xC0E0E0)  # white, and that of index 255 of DAVIS, R + 256 G + 65536 B
_MAX_LEVELS = 8  # grey levels that were spread over 0..255
_FLECKED = 0.05  # share of object pixels without a neighbour of their value: dithering has far more
_BESIDE = 0.7  # share of the pixels of an outline that lie beside another value
_MOSTLY = 0.6  # share of object pixels; smoothing leaves more than the rest untouched
_RESIZED = 0.05  # share of object pixels on soft edges; small objects beside others are less
_BACKGROUND = 0.6  # share of the border of all masks that makes a value the background
_ON_BLEND = 16.0  # distance in RGB within which a colour counts as a mixture of two others
_SETTING = "set dataset.mask_values to ids, colours or binary"


class Reading(NamedTuple):
    """How the masks of one video are read: a pixel belongs to the object that has its value."""

    objects: dict[int, tuple[int, ...]]  # object id -> values
    ignored: tuple[int, ...] = ()  # values of no object that are not the background either
    colours: bool = False  # values are R + 256 G + 65536 B, not palette indices or grey values
    note: str = "pixel values are object ids"  # what was concluded and why


def decide(facts: Sequence[MaskFacts], setting: MaskValues = "auto") -> Reading:
    """How the masks of one video are read, from what all of them hold.

    Raises:
        ValueError: the pictures fit more than one reading, or none; the message names the setting
            or the edit that helps, without saying which video it is.
    """
    kinds = {one.kind for one in facts}
    if setting == "binary":
        return _binary(facts)
    if setting == "ids":
        colours = "colour" in kinds
        facts = [one.by_colour() for one in facts] if colours else facts
        reading = _ids(_values(facts), colours)
        return reading._replace(note=f"{reading.note}, as dataset.mask_values says")
    if setting == "colours" and kinds == {"grey"}:
        note = "each grey value but 0 is an object, as dataset.mask_values says"
        return Reading({v: (v,) for v in _values(facts) if v}, note=note)
    if setting == "colours":
        packed = [one.by_colour() for one in facts]
        background = _background(packed)
        values = [v for v in _values(packed) if v != background]
        note = f"each colour is an object, as dataset.mask_values says; {_hex(background)} is none"
        return Reading(_named(values), (), True, note)
    if "colour" in kinds:
        return _colours([one.by_colour() for one in facts], "mask colours are ids")
    if "palette" in kinds:
        return _palettes(facts)
    return _greys(facts)


def decide_folder(facts: Sequence[MaskFacts], setting: MaskValues = "auto") -> Reading | None:
    """The same for masks of one object each; None: the object is all that is not 0."""
    kinds = {one.kind for one in facts}
    if setting == "binary" or kinds & {"colour"}:
        return _binary(facts)
    if kinds == {"grey"}:
        values = _values(facts)
        if edges := _edges(facts, values, keep=max(values, default=0)):
            return _half(values, _smoothed_note(edges))
    return None


# The kinds of pictures


def _ids(values: list[int], colours: bool = False) -> Reading:
    """Values are ids, 0 is the background, and 255 beside other values void."""
    objects = [value for value in values if value != 0]
    if objects == [VOID] and not colours:
        return Reading({1: (VOID,)}, note="one object, the pixels of value 255")
    if VOID in objects and not colours and max(objects) == VOID and VOID - 1 not in objects:
        rest = [value for value in objects if value != VOID]
        return Reading({v: (v,) for v in rest}, (VOID,), note=_void_note(VOID))
    note = "the id of an object is R + 256 G + 65536 B" if colours else Reading({}).note
    return Reading({v: (v,) for v in objects}, (), colours, note)


def _void_note(value: int) -> str:
    return f"pixel values are object ids, {value} is void: left out of the loss and of scores"


def _palettes(facts: Sequence[MaskFacts]) -> Reading:
    """Palette indices are ids where every picture has the same colour for an index."""
    painted = [one for one in facts if one.kind == "palette"]
    colour_of: dict[int, set[int]] = {}
    index_of: dict[int, set[int]] = {}
    for one in painted:
        for index, colour in one.palette.items():
            colour_of.setdefault(index, set()).add(colour)
            index_of.setdefault(colour, set()).add(index)
    one_palette = len({one.whole_palette for one in painted}) == 1
    stable = all(len(colours) == 1 for colours in colour_of.values())
    moved = not one_palette and any(len(indices) > 1 for indices in index_of.values())
    packed = [one.by_colour() for one in facts]
    if not stable or moved:
        files = Counter(colour for one in painted for colour in set(one.palette.values()))
        again = sum(number for number in files.values() if number > 1)
        if again < 0.5 * files.total():
            raise ValueError(
                f"palettes differ between frames ({painted[0].path.name} and others), and so do "
                "their colours: neither indices nor colours follow an object; set "
                "dataset.mask_values to ids if the indices do, or to colours"
            )
        if any(len(set(one.palette.values())) < len(one.palette) for one in painted):
            raise ValueError(
                "palettes differ between frames, and one has the same colour twice; set "
                "dataset.mask_values to ids if the indices follow objects, or write one palette"
            )
        return _colours(packed, "palettes differ between frames: objects are matched by colour")
    values = _values(facts)
    # Index 0 is the background, unless it has a colour while black is used, or is not the one that
    # lies along the border.
    zero = next(iter(colour_of.get(0, {0})))
    border = sum((one.border for one in facts), Counter())
    if zero != 0:
        widest = max(border, key=border.__getitem__)
        black = [index for index, colours in colour_of.items() if colours == {0}]
        if widest != 0 and (black == [widest] or not black):
            return _colours(packed, "palette index 0 is an object: objects are told by colour")
        if black and widest != 0:
            raise ValueError(
                f"palette index 0 is {_hex(zero)} and index {black[0]} black, and neither lies "
                "along the border: which one is the background? Set dataset.mask_values to ids "
                "(index 0) or colours (black)"
            )
    if 0 not in values and _background(packed) is not None:
        return _colours(packed, "palette index 0 is not used: objects are told by colour")
    reading = _ids(values)
    if len(_edges(facts, values, keep=0)) > 2:
        return _colours(packed, "mask colours are ids")
    _refuse_dithering(facts, background=0)
    return reading._replace(note=f"{reading.note} (palette of {painted[0].path.name})")


def _greys(facts: Sequence[MaskFacts]) -> Reading:
    """Grey values are ids, unless they are levels spread over the range or smoothed edges."""
    if reading := _with_other_background(facts):
        return reading
    values = [value for value in _values(facts) if value]
    if not values:
        return Reading({}, note="no pixel of an object")
    # MOTS: ids of class * 1000 + number beside the value for what is to be ignored.
    mots = [value for value in values if value != MOTS_IGNORE]
    if MOTS_IGNORE in values and all(1000 <= value < MOTS_IGNORE for value in mots):
        note = "ids of MOTS (class * 1000 + number), 10000 is left out of the loss and of scores"
        return Reading({v: (v,) for v in mots}, (MOTS_IGNORE,), note=note)
    top = values[-1]
    peak = 65535 if top > 255 else 255
    if values == [peak]:
        return Reading({1: (peak,)}, note=f"one object, the pixels of value {peak}")
    if reading := _soft_levels(facts, values, peak) or _resized_ids(facts, values, peak):
        return reading
    if top == peak:
        if levels := _spread_levels(values, peak):
            note = f"grey levels {_few(values)} are {levels} steps of 0..{peak}: each is an object"
            return Reading({v: (v,) for v in values}, note=note)
        others = values[:-1]
        if peak == VOID and others[0] >= 64 and others[-1] != VOID - 1:
            raise ValueError(
                f"grey masks with the values {_few(values)}: 255 may be an object or void; set "
                "dataset.mask_values to ids (255 is void) or colours (each value is an object)"
            )
        if peak != VOID:
            return Reading({v: (v,) for v in others}, (peak,), note=_void_note(peak))
    if top > 255:
        return Reading({v: (v,) for v in values})
    return _ids(values)


def _with_other_background(facts: Sequence[MaskFacts]) -> Reading | None:
    """Where another value than 0 lies along the border of all masks and 0 is not used, that is the
    background; ValueError where 0 is used like an object."""
    values = _values(facts)
    border: Counter[int] = sum((one.border for one in facts), Counter())
    widest = max(border, key=border.__getitem__, default=0)
    along_all = all(widest in one.border for one in facts)
    if not widest or not along_all or border[widest] < _BACKGROUND * border.total():
        return None
    if values == [0, widest]:
        raise ValueError(
            f"the pixels of value {widest} lie along the border of all masks: they look like the "
            "background, and those of value 0 like the object; set dataset.mask_values to ids if "
            f"{widest} is the object, or invert the masks"
        )
    if 0 in values or len(values) == 1:
        return None
    note = f"0 is not used, and {widest} along the border is the background"
    return Reading({v: (v,) for v in values if v != widest}, note=note)


def _soft_levels(facts: Sequence[MaskFacts], values: list[int], peak: int) -> Reading | None:
    """One bright object with soft edges, cut at half; ValueError for several such levels."""
    top = values[-1]
    if 2 * top <= peak:
        return None
    edges = _edges(facts, values, keep=top)
    rest = [value for value in values if value not in edges]
    if edges and len(rest) == 1:
        return _half(values, _smoothed_note(edges))
    if len(edges) > 1 and min(np.diff([0, *rest])) >= 16:
        raise ValueError(
            f"grey masks with smoothed edges between several levels ({_few(rest)}; {_few(edges)} "
            "only along outlines): the edge of one looks like another; write the masks without "
            "smoothing, or set dataset.mask_values to binary for one object"
        )
    # As JPEG leaves black and white: specks of several values near white, and little between.
    areas: Counter[int] = sum((one.areas for one in facts), Counter())
    interior: Counter[int] = sum((one.interior for one in facts), Counter())
    near_white = [value for value in values if value > peak * 7 / 8]
    white = max(near_white, key=areas.__getitem__, default=top)
    specks = [value for value in near_white if value != white]
    between = sum(areas[v] for v in values if peak / 8 < v <= peak * 7 / 8)
    are_specks = sum(interior[v] for v in specks) < 0.3 * sum(areas[v] for v in specks)
    if len(specks) > 1 and are_specks and between < 0.1 * sum(areas[v] for v in near_white):
        return _half(values, f"{len(values)} grey values near black and white")
    return None


def _resized_ids(facts: Sequence[MaskFacts], values: list[int], peak: int) -> Reading | None:
    """Interpolation leaves values between the background and an id: one id is cut at half;
    ValueError for several."""
    top = values[-1]
    areas: Counter[int] = sum((one.areas for one in facts), Counter())
    edges = _edges(facts, values, keep=top)
    if top == peak or sum(areas[v] for v in edges) <= _RESIZED * (areas.total() - areas[0]):
        return None
    solid = [value for value in values if value not in edges]
    if len(solid) == 1:
        half = _half(values, _smoothed_note(edges))
        return half._replace(objects={top: half.objects[1]})
    raise ValueError(
        f"grey masks in which the values {_few(edges)} only lie along outlines, beside the ids "
        f"{_few(solid)}: were they resized with interpolation? Resize them with the nearest pixel, "
        "or set dataset.mask_values to ids if these are objects"
    )


def _colours(facts: Sequence[MaskFacts], why: str) -> Reading:
    """Each colour is an object; a colour that only lies along outlines goes to the nearer of the
    two that it mixes."""
    background = _background(facts)
    values = [value for value in _values(facts) if value != background]
    edges = _edges(facts, values, keep=None, background=background)
    if len(values) > _MAX_OBJECTS:
        areas = sum((one.areas for one in facts), Counter())
        few = sum(area for _, area in areas.most_common(8))
        if few > 0.95 * areas.total():
            raise ValueError(
                f"{len(values)} colours, of which 8 cover nearly all pixels: was the mask saved as "
                "JPEG? Write it as PNG, or set dataset.mask_values to colours, or to binary for "
                "one object"
            )
    outline = [v for v in edges if v in _VOID_COLOURS] if len(edges) <= 2 else []
    edges = [value for value in edges if value not in outline]
    values = [value for value in values if value not in outline]
    solid = [value for value in values if value not in edges]
    owners = {value: [value] for value in solid}
    ends = solid if background is None else [background, *solid]
    areas = sum((one.areas for one in facts), Counter())
    if sum(areas[edge] for edge in edges) > _MOSTLY * (areas.total() - areas[background]):
        _refuse_dithering(facts, background)
    for edge in edges:
        owner = _blended(edge, ends)
        if owner is not None:
            owners.get(owner, []).append(edge)  # the background needs no list
        elif len(edges) <= 2:
            owners[edge] = [edge]  # a thin object that always touches another
        else:
            _refuse_dithering(facts, background)
            raise ValueError(
                f"colours that only lie along outlines ({_few(map(_hex, edges))}) and mix no two "
                "others: was the mask dithered, or saved as JPEG? Write it without; or set "
                "dataset.mask_values to colours, or to binary for one object"
            )
    named = _named(list(owners))
    ignored = tuple(outline)
    if len(named) > 1 and VOID in named and _is_davis(owners):
        ignored += tuple(owners.pop(named.pop(VOID)[0]))
    what = "each colour is an object"
    what += ", numbered as in the palette of DAVIS" if _is_davis(owners) else ""
    what += "" if _is_davis(owners) else ", its id R + 256 G + 65536 B"
    what += "" if background in (0, None) else f"; {_hex(background)} along the border is none"
    what += f"; {_smoothed_note(edges)}" if edges else ""
    objects = {object_id: tuple(owners[values[0]]) for object_id, values in named.items()}
    return Reading(objects, ignored, True, f"{why}: {what}")


def _binary(facts: Sequence[MaskFacts]) -> Reading:
    """One object: the bright half of grey levels, or every colour but that of the background."""
    if {one.kind for one in facts} == {"grey"}:
        values = _values(facts)
        return _half(values, "one object")
    packed = [one.by_colour() for one in facts]
    background = _background(packed)
    values = [value for value in _values(packed) if value != background]
    return Reading({1: tuple(values)} if values else {}, (), True, "one object, of all colours")


def _half(values: Iterable[int], why: str) -> Reading:
    """One object of the grey values above half of the largest."""
    values = list(values)
    top = max(values, default=0)
    bright = tuple(value for value in values if 2 * value > top)
    return Reading(
        {1: bright} if top else {}, note=f"{why}: the object is what is above {top / 2:g}"
    )


# What values there are, and what they look like


def _values(facts: Sequence[MaskFacts]) -> list[int]:
    return sorted(set().union(*(one.areas for one in facts)))


def _background(facts: Sequence[MaskFacts]) -> int | None:
    """Black where it is used; else the colour along most of the border of the pictures, if that is
    on all of them; None: objects fill the frames."""
    border: Counter[int] = sum((one.border for one in facts), Counter())
    if any(0 in one.areas for one in facts) or not border:
        return 0
    widest = max(border, key=border.__getitem__)
    everywhere = all(widest in one.border for one in facts)
    return widest if everywhere and border[widest] >= _BACKGROUND * border.total() else None


def _edges(
    facts: Sequence[MaskFacts],
    values: Iterable[int],
    keep: int | None,
    background: int | None = 0,
) -> list[int]:
    """Values that only lie along outlines: nowhere with a neighbourhood of their own, nearly always
    beside another value.

    Args:
        keep: a value that is none, whatever it looks like.
    """
    interior: Counter[int] = sum((one.interior for one in facts), Counter())
    areas: Counter[int] = sum((one.areas for one in facts), Counter())
    touching: Counter[int] = sum((one.touching for one in facts), Counter())
    return [
        value
        for value in values
        if value not in (keep, background)
        and not interior[value]
        and touching[value] >= _BESIDE * areas[value]
    ]


def _refuse_dithering(facts: Sequence[MaskFacts], background: int | None) -> None:
    """ValueError where pixels of several values alternate, as in a dithered picture."""
    areas: Counter[int] = sum((one.areas for one in facts), Counter())
    alone: Counter[int] = sum((one.alone for one in facts), Counter())
    touching: Counter[int] = sum((one.touching for one in facts), Counter())
    flecks = {
        v: n for v, n in alone.items() if v != background and touching[v] >= _BESIDE * areas[v]
    }
    of_objects = areas.total() - areas[background]
    if sum(flecks.values()) > max(_FLECKED * of_objects, 8):
        raise ValueError(
            f"dithered masks, or ones saved as JPEG: pixels of the values {_few(sorted(flecks))} "
            "stand alone among others (Pillow's convert('P') and quantize() dither); write them "
            f"again as PNG without dithering (dither=Image.Dither.NONE), or {_SETTING}"
        )


def _spread_levels(values: Sequence[int], peak: int) -> int | None:
    """Into how many steps the range was divided, if ids were spread over it: 2 for 127 and 255, 3
    for 85, 170 and 255; None if they were not. At least half of the levels must be used."""
    for steps in range(2, _MAX_LEVELS + 1):
        levels = {k * peak // steps for k in range(1, steps + 1)}
        levels |= {round(k * peak / steps) for k in range(1, steps + 1)}
        if 2 * len(values) >= steps and len(values) <= steps and levels >= set(values):
            return steps
    return None


def _blended(colour: int, ends: Sequence[int]) -> int | None:
    """Which of the colours a mixture of two of them is nearer to; None for no mixture."""
    point, corners = _rgb([colour])[0], _rgb(ends)
    best, owner = _ON_BLEND, None
    for i in range(len(ends)):
        for j in range(i + 1, len(ends)):
            along = corners[j] - corners[i]
            share = float((point - corners[i]) @ along / max(along @ along, 1))
            distance = float(np.linalg.norm(point - corners[i] - share * along))
            if 0 < share < 1 and distance < best:
                best, owner = distance, ends[i] if share <= 0.5 else ends[j]
    return owner


def _named(colours: Sequence[int]) -> dict[int, tuple[int, ...]]:
    """Object ids of colours: indices of the DAVIS palette if all are from it, else the colours."""
    if _is_davis(colours):
        return {_DAVIS[colour]: (colour,) for colour in sorted(colours, key=_DAVIS.__getitem__)}
    return {colour: (colour,) for colour in colours}


def _is_davis(colours: Iterable[int]) -> bool:
    return all(colour in _DAVIS for colour in colours)


def _davis_palette() -> dict[int, int]:
    """Packed colour -> index: the bits of the index, dealt to red, green and blue in turn, from the
    highest bit of each down (that of PASCAL VOC)."""
    palette = {}
    for index in range(256):
        red, green, blue = (
            sum(((index >> (3 * k + c)) & 1) << (7 - k) for k in range(3)) for c in range(3)
        )
        palette[red + 256 * green + 65536 * blue] = index
    return palette


_DAVIS = _davis_palette()


def _rgb(colours: Iterable[int]) -> np.ndarray:
    packed = np.array(list(colours), np.int64).reshape(-1, 1)
    return (packed >> np.array([0, 8, 16]) & 255).astype(np.float64)


def _hex(colour: int | None) -> str:
    return (
        "no colour" if colour is None else "rgb({:.0f}, {:.0f}, {:.0f})".format(*_rgb([colour])[0])
    )


def _few(values: Iterable[object], most: int = 6) -> str:
    texts = [str(value) for value in values]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if texts[most:] else "")


def _smoothed_note(edges: Sequence[int]) -> str:
    return f"smoothed edges ({len(edges)} values that only lie along outlines)"
