"""What one mask picture holds: which values, on how many pixels, and how these lie."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from sam2train.data_pictures import pack_grey, read_mask_picture
from sam2train.errors import UserError

_SMALL_IDS = 127  # of 255: brighter objects on black are told from it in a JPEG, too
_MAX_COLOURS = 256  # of one picture; a photograph has more


@dataclass
class MaskFacts:
    """What one mask picture holds: pixels by value, all of them counts."""

    path: Path
    size: tuple[int, int]  # (H, W)
    kind: Literal["palette", "grey", "colour"]
    areas: Counter[int]  # the background included
    border: Counter[int]  # pixels on the border of the picture
    interior: Counter[int]  # pixels whose 3x3 neighbourhood has one value
    # Only of values without any interior, such as those of smoothed edges:
    alone: Counter[int] = field(
        default_factory=Counter
    )  # pixels without a neighbour of their value
    touching: Counter[int] = field(default_factory=Counter)  # beside another value, not background
    palette: dict[int, int] = field(default_factory=dict)  # used index -> R + 256 G + 65536 B
    whole_palette: bytes = b""

    def by_colour(self) -> MaskFacts:
        """The same counts by R + 256 G + 65536 B."""
        if self.kind == "colour":
            return self

        def packed(counts: Counter[int]) -> Counter[int]:
            merged: Counter[int] = Counter()
            for value, count in counts.items():
                merged[self.palette.get(value, pack_grey(value))] += count
            return merged

        counts = (self.areas, self.border, self.interior, self.alone, self.touching)
        return MaskFacts(self.path, self.size, "colour", *map(packed, counts))


def read_facts(path: Path) -> MaskFacts:
    """What a mask picture holds.

    Raises:
        UserError: missing, damaged, no picture, a JPEG of ids, or one with more colours than masks
            have.
    """
    picture = read_mask_picture(path)
    values = picture.values
    if picture.is_jpeg and not picture.is_colour and 0 < values.max() <= _SMALL_IDS:
        raise UserError(
            f"{path}: a JPEG, in which small ids such as 1 and 2 are not exact: this one has the "
            f"values 0 to {values.max()}; write the masks again as PNG, from where they were made"
        )
    names: np.ndarray | None = None
    if picture.is_colour:
        # Runs along rows first: a mask has few, and sorting them is far cheaper than all pixels.
        flat = values.ravel()
        starts = np.flatnonzero(np.concatenate([[True], flat[1:] != flat[:-1]]))
        names, of_run = np.unique(flat[starts], return_inverse=True)
        if len(names) > _MAX_COLOURS:
            raise UserError(
                f"{path}: a picture of mode RGB; expected a palette or grey PNG whose pixels are "
                f"the ids of objects, or at most {_MAX_COLOURS} colours, one for each object; this "
                f"one has {len(names)} colours (a photograph, or a mask that was saved as JPEG?)"
            )
        lengths = np.diff(np.append(starts, flat.size))
        values = np.repeat(of_run.ravel(), lengths).reshape(values.shape)
    kind = "colour" if picture.is_colour else "grey" if picture.palette is None else "palette"

    def count(chosen: np.ndarray) -> Counter[int]:
        numbers = np.bincount(chosen.ravel())  # many times as fast as np.unique
        used = np.flatnonzero(numbers)
        keys = used if names is None else names[used]
        return Counter(dict(zip(keys.tolist(), numbers[used].tolist(), strict=True)))

    areas = count(values)
    border = np.concatenate([values[0], values[-1], values[1:-1, 0], values[1:-1, -1]])
    along = int(np.bincount(border).argmax())
    # What follows needs the neighbours of objects only, and a byte a pixel is twice as fast.
    values = _around_objects(values, along).astype(np.uint8 if values.max() < 256 else values.dtype)
    same_across = values[:, 1:] == values[:, :-1]
    same_down = values[1:] == values[:-1]
    rows = same_across[:, 1:] & same_across[:, :-1]
    inside = rows[1:-1] & rows[:-2] & rows[2:] & same_down[:-1, 1:-1] & same_down[1:, 1:-1]
    facts = MaskFacts(
        path, picture.values.shape, kind, areas, count(border), count(values[1:-1, 1:-1][inside])
    )
    if kind == "palette":
        facts.palette = {value: int(picture.palette[value]) for value in areas}
        facts.whole_palette = np.asarray(picture.palette, np.uint32).tobytes()
        if all(colour == pack_grey(value) for value, colour in facts.palette.items()):
            facts.kind = "grey"
    if len(areas) > len(facts.interior):
        _count_thin(values, same_across, same_down, along, facts, count)
    return facts


def _around_objects(values: np.ndarray, background: int) -> np.ndarray:
    """The part of the picture with all that is not background, and a pixel around it."""
    other = values != background
    rows, columns = np.flatnonzero(other.any(1)), np.flatnonzero(other.any(0))
    if not len(rows):
        return values[:1, :1]
    return values[max(rows[0] - 1, 0) : rows[-1] + 2, max(columns[0] - 1, 0) : columns[-1] + 2]


def _count_thin(
    values: np.ndarray,
    same_across: np.ndarray,
    same_down: np.ndarray,
    background: int,
    facts: MaskFacts,
    count: Callable[[np.ndarray], Counter[int]],
) -> None:
    """Fill what is known of values without any interior."""
    alone = np.ones(values.shape, bool)
    alone[:, 1:] &= ~same_across
    alone[:, :-1] &= ~same_across
    alone[1:] &= ~same_down
    alone[:-1] &= ~same_down
    other = values != background
    touching = np.zeros(values.shape, bool)
    across = ~same_across & other[:, 1:] & other[:, :-1]
    down = ~same_down & other[1:] & other[:-1]
    touching[:, 1:] |= across
    touching[:, :-1] |= across
    touching[1:] |= down
    touching[:-1] |= down
    facts.alone, facts.touching = count(values[alone]), count(values[touching])
