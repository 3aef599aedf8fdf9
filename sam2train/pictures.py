"""Pictures a person can judge: tinted masks, prompts, and a sheet of truth against prediction.

Every picture is (H, W, 3) uint8 RGB: floats would turn black in `wandb.Image`.
"""

from __future__ import annotations

import colorsys
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sam2train.files import replacing
from sam2train.transforms import resize_mask_smoothly, resize_mask_to_paint

if TYPE_CHECKING:
    from IPython.display import Image as NotebookImage

    from sam2train.clips import Clip, Prompt

# Okabe and Ito, "Color Universal Design" (2008), without black. Most data sets count from 1:
# sky blue and purple come there because few real things have these colours.
OKABE_ITO = ((230, 159, 0), (86, 180, 233), (204, 121, 167), (240, 228, 66))
OKABE_ITO += ((213, 94, 0), (0, 158, 115), (0, 114, 178))

# Of these no object has one that is hard to tell from it: they are 25 or more apart in CIELAB.
ERRORS = {
    "correct": (205, 205, 205),
    "false positive": (255, 0, 0),
    "missed": (0, 0, 255),
    "wrong object": (255, 0, 200),
}
WHITE, INK = (255, 255, 255), (25, 25, 25)
POSITIVE, NEGATIVE = (0, 190, 70), (225, 0, 30)

MAX_SHEET = (1000, 1400)  # (H, W) px: a sheet on one screen, text still readable
GUTTER, GAP, STRIP = 30, 6, 26  # px: row names at the left, space between cells, frame labels


def colour(index: int) -> tuple[int, int, int]:
    """The (r, g, b) of an object, the same in every picture and run: Okabe-Ito, then generated."""
    assert index >= 0, index
    if index < len(OKABE_ITO):
        return OKABE_ITO[index]
    # The golden ratio spreads the hues; brightness alternates, since not everybody can tell hues
    # apart.
    saturation, value = ((0.55, 1.0), (0.95, 0.6), (0.85, 0.9))[index % 3]
    rgb = colorsys.hsv_to_rgb(index * 0.618034 % 1.0, saturation, value)
    return tuple(round(255 * channel) for channel in rgb)


def object_colours(num: int) -> np.ndarray:
    """(num, 3) uint8: the colours of objects 0 .. num - 1."""
    return np.array([colour(index) for index in range(num)], np.uint8).reshape(num, 3)


def to_uint8(images: np.ndarray) -> np.ndarray:
    """(T, H, W, 3) uint8 from (T, 3, H, W) ImageNet-normalised floats."""
    # imported here: they import torch, which takes seconds
    from sam2train.transforms import MEAN, STD

    assert images.shape[1:2] == (3,), images.shape
    pixels = images.transpose(0, 2, 3, 1) * STD + MEAN
    return np.clip(np.rint(pixels * 255), 0, 255).astype(np.uint8)


def id_mask(
    masks: Mapping[int, np.ndarray], order: Sequence[int], size: tuple[int, int]
) -> np.ndarray:
    """(H, W) uint8 for `wandb.Image`: 0 background, k + 1 where object `order[k]` is.

    Where objects overlap, the one first in `order` wins. `size` is (H, W).
    """
    assert len(order) <= 255, len(order)
    labels = np.zeros(size, np.uint8)
    for value, object_id in reversed(list(enumerate(order, start=1))):
        assert masks[object_id].shape == labels.shape, (object_id, masks[object_id].shape)
        labels[masks[object_id]] = value
    return labels


def draw_masks(
    frame: np.ndarray,
    masks: Mapping[int, np.ndarray],
    *,
    alpha: float = 0.4,
    contour: bool = True,
) -> np.ndarray:
    """A copy of `frame` (H, W, 3) with each (H, W) bool mask tinted, and outlined if `contour`.

    The outline and the dark line along it lie inside the mask: no pixel outside of all masks
    changes, and an object cut by the border stays open there. `alpha` is the weight of the tint, in
    [0, 1].
    """
    assert frame.dtype == np.uint8, frame.dtype
    picture = frame.copy()
    for object_id, mask in masks.items():
        assert mask.shape == frame.shape[:2], (object_id, mask.shape, frame.shape)
        _blend(picture, mask, colour(object_id), alpha)
    if contour:
        rims = {object_id: _outline(mask) for object_id, mask in masks.items()}
        for object_id, rim in rims.items():
            picture[_outline(masks[object_id] & ~rim, 1)] = INK
        for object_id, rim in rims.items():
            picture[rim] = colour(object_id)
    return picture


def paint_prompts(picture: np.ndarray, prompts: Iterable[dict], scale: float = 1.0) -> np.ndarray:
    """A copy of `picture` with the prompts of one frame, each in the colour of its object.

    A positive click is a green disc, a negative one a red cross; a box is a rectangle, a mask a
    hatched area. What lies on the border or beyond is moved inside, by its own size, to be seen.

    Args:
        picture: (H, W, 3) uint8, the frame times `scale`.
        prompts: dicts of a sample (`object_id`, `points` (P, 2) as (x, y), `labels` (P,), `box`
            (4,) or None, `mask` (h, w) bool or None), in pixels of the frame before scaling.
    """
    from sam2train.prompts import type_of  # here, since torch comes with it

    canvas = PromptCanvas(picture.copy(), scale)
    for prompt in prompts:
        canvas.ink = colour(prompt["object_id"])
        type_of(prompt).paint(prompt, canvas)
    return canvas.finish()


def prompt_in_video(prompt: Prompt, size: tuple[int, int], image_size: tuple[int, int]) -> Prompt:
    """A prompt in pixels of the model's input, in pixels of a video of this size (H, W)."""
    scale = np.array(size, np.float32)[::-1] / np.array(image_size)[::-1]
    box, mask = prompt["box"], prompt["mask"]
    return {
        **prompt,
        "points": prompt["points"] * scale,
        "box": None if box is None else box * np.tile(scale, 2),
        "mask": None if mask is None else resize_mask_smoothly(mask, size),
    }


class PromptCanvas:
    """A picture that prompts are painted on, in `ink`: the colour of their object.

    Args:
        picture: (H, W, 3) uint8, the frame times `scale`; painted over.
    """

    def __init__(self, picture: np.ndarray, scale: float):
        self.picture, self.scale = picture, scale
        self.ink = WHITE
        self.size = max(3, round(min(picture.shape[:2]) / 45))  # px: radius of a click
        self._clicks: list[tuple[np.ndarray, bool, tuple[int, int, int]]] = []

    def place(self, xy: np.ndarray, margin: int = 0) -> tuple[int, int]:
        """The pixel of the picture of a pixel of the frame, moved inside by at least `margin`."""
        height, width = self.picture.shape[:2]
        inside = (margin, margin), (width - 1 - margin, height - 1 - margin)
        # + 0.5 - 0.5: from the centre of a pixel of the frame to the centre of its enlargement.
        x, y = np.clip((np.asarray(xy) + 0.5) * self.scale - 0.5, *inside)
        return round(float(x)), round(float(y))

    def paint_mask(self, mask: np.ndarray) -> None:
        """Hatch a mask (h, w) bool of any size, and outline it."""
        mask = resize_mask_to_paint(mask, self.picture.shape[:2])
        rows, columns = np.indices(mask.shape)
        hatched = mask & ((rows + columns) % (3 * self.size) < self.size)
        _blend(self.picture, hatched, WHITE, 0.7)
        self.picture[_outline(mask)] = self.ink

    def paint_box(self, box: np.ndarray) -> None:
        """A rectangle (4,)."""
        corners = self.place(box[:2]), self.place(box[2:])
        for shade, thickness in ((INK, 4), (self.ink, 2)):
            cv2.rectangle(self.picture, *corners, shade, thickness)

    def paint_click(self, point: np.ndarray, positive: bool) -> None:
        """A click at (x, y), once all else is painted: it is small and must not be hidden."""
        self._clicks.append((point, positive, self.ink))

    def finish(self) -> np.ndarray:
        """The picture, with the clicks on top."""
        for point, positive, ink in self._clicks:
            x, y = self.place(point, margin=self.size)
            for shade, rim in zip((INK, ink, WHITE), (4, 3, 1), strict=True):
                cv2.circle(self.picture, (x, y), self.size + rim, shade, cv2.FILLED, cv2.LINE_AA)
            if positive:
                disc = self.size - 1, POSITIVE, cv2.FILLED, cv2.LINE_AA
                cv2.circle(self.picture, (x, y), *disc)
            else:
                shape = cv2.MARKER_TILTED_CROSS, 2 * self.size - 2, max(2, self.size // 2)
                cv2.drawMarker(self.picture, (x, y), NEGATIVE, *shape, cv2.LINE_AA)
        return self.picture


def hatch_ignored(picture: np.ndarray, ignore: np.ndarray | None) -> np.ndarray:
    """A copy of the picture (H, W, 3) with the pixels (H, W) bool hatched that no loss and no score
    counts; the picture itself where there are none.

    Dark and light lines that rise to the right, where those of a mask prompt fall: they show on
    every frame, and differ from prompts.
    """
    if ignore is None or not ignore.any():
        return picture
    picture = picture.copy()
    rows, columns = np.indices(ignore.shape)
    width = max(2, round(min(ignore.shape) / 60))  # px
    phase = (columns - rows) % (3 * width)
    _blend(picture, ignore & (phase < width), INK, 0.8)
    _blend(picture, ignore & (phase >= width) & (phase < 2 * width), WHITE, 0.5)
    return picture


def draw_errors(
    frame: np.ndarray,
    prediction: Mapping,
    ground_truth: Mapping,
    ignore: np.ndarray | None = None,
) -> np.ndarray:
    """The greyed frame with correct, false positive, missed and wrongly named pixels painted.

    Both mappings hold the same ids. A pixel claimed by one object and missed by another belongs to
    the wrong object. Pixels of `ignore` (H, W) bool are neither right nor wrong.
    """
    correct, extra, missed = np.zeros((3, *frame.shape[:2]), bool)
    for object_id, truth in ground_truth.items():
        found = prediction[object_id]
        correct |= found & truth
        extra |= found & ~truth
        missed |= truth & ~found
    if ignore is not None:
        correct, extra, missed = (area & ~ignore for area in (correct, extra, missed))
    grey = cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY)
    picture = cv2.cvtColor((grey * 0.5).astype(np.uint8), cv2.COLOR_GRAY2RGB)
    areas = (correct & ~extra & ~missed, extra & ~missed, missed & ~extra, missed & extra)
    for area, ink, alpha in zip(areas, ERRORS.values(), (0.5, 0.85, 0.85, 0.85), strict=True):
        _blend(picture, area, ink, alpha)
    return picture


def pick_frames(num_frames: int, prompted: Iterable[int], max_frames: int) -> list[int]:
    """At most `max_frames` ascending indices, even, with the prompted frames and the last one.

    Where not all of these fit, the first prompted frame is kept first, then the last frame.
    """
    prompted, last = sorted(prompted), num_frames - 1
    picked = np.linspace(0, last, min(num_frames, max_frames), dtype=int).tolist()
    for place, frame_idx in enumerate(dict.fromkeys([*prompted[:1], last, *prompted])):
        # The first `place` entries stay; the nearest of the others is replaced.
        if picked[place:]:
            picked.remove(min(picked[place:], key=lambda other: abs(other - frame_idx)))
            picked.insert(place, frame_idx)
    return sorted(picked)


def comparison(
    frames: np.ndarray,
    prediction: Mapping[int, np.ndarray],
    ground_truth: Mapping[int, np.ndarray],
    prompts: Sequence[dict],
    *,
    title: str,
    frame_labels: Sequence[str] | None = None,
    scores: Sequence[str] | None = None,
    max_frames: int = 8,
    cell_height: int = 240,
    names: Mapping[int, str] | None = None,
    ignore: np.ndarray | None = None,
) -> np.ndarray:
    """A sheet, at most 1400 px wide: ground truth with prompts, prediction, errors; frame by frame.

    Args:
        frames: (T, H, W, 3) uint8.
        prediction, ground_truth: object id -> (T, H, W) bool; an id in only one is absent in the
            other.
        prompts: dicts as in `paint_prompts`, with `type` and `frame_index` in [0, T).
        title: what is compared, with the overall score.
        frame_labels: T names of the frames ("frame 0", ... where None).
        scores: T short texts, such as "J 0.83".
        cell_height: px, at most; cells shrink to fit the sheet, and wide ones wrap into bands.
        names: of the objects in the legend; their ids where None.
        ignore: (T, H, W) bool, pixels that no score counts, hatched; None: there are none.
    """
    num_frames, height, width = frames.shape[:3]
    for masks in (prediction, ground_truth):
        for object_id, mask in masks.items():
            assert mask.shape == frames.shape[:3], (object_id, mask.shape, frames.shape)
    for texts in (frame_labels, scores):
        assert texts is None or len(texts) == num_frames, (texts, num_frames)
    object_ids = sorted({*prediction, *ground_truth})
    chosen = pick_frames(num_frames, (p["frame_index"] for p in prompts), max_frames)
    columns, scale = _layout(len(chosen), height, width, cell_height)
    cell = max(1, round(height * scale)), max(1, round(width * scale))

    names = names or {object_id: str(object_id) for object_id in object_ids}
    legend = [("objects", None)] + [(names[i], colour(i)) for i in object_ids]
    legend += [("   errors", None), *list(ERRORS.items())[: 4 if len(object_ids) > 1 else 3]]
    sheet_width = max(GUTTER + columns * (cell[1] + GAP), 520)
    header = _header(title, legend, sheet_width)
    band_height = STRIP + 3 * (cell[0] + GAP) + GAP
    bands = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (sheet_width, header.height + bands * band_height), WHITE)
    sheet.paste(header)
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(17)

    for position, t in enumerate(chosen):
        band, column = divmod(position, columns)
        left = GUTTER + column * (cell[1] + GAP)
        top = header.height + band * band_height
        here = [prompt for prompt in prompts if prompt["frame_index"] == t]

        label = frame_labels[t] if frame_labels else f"frame {t}"
        if here:
            label += " · " + ", ".join(sorted({prompt["type"] for prompt in here}))
        score = scores[t] if scores else ""
        pen.text((left + cell[1], top + 2), score, INK, font, anchor="ra")
        room = cell[1] - font.getlength(score + "  ")
        pen.text((left, top + 2), _fit(label, font, room), INK, font)

        # Outlines come after the resize, so that they are equally crisp at every frame size.
        smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        image = cv2.resize(frames[t], cell[::-1], interpolation=smooth)
        absent = np.zeros(cell, bool)
        truth, found = (
            {i: resize_mask_to_paint(m[i][t], cell) if i in m else absent for i in object_ids}
            for m in (ground_truth, prediction)
        )
        void = None if ignore is None else resize_mask_to_paint(ignore[t], cell)
        rows = {
            "ground truth": paint_prompts(
                hatch_ignored(draw_masks(image, truth), void), here, scale
            ),
            "prediction": hatch_ignored(draw_masks(image, found), void),
            "errors": hatch_ignored(draw_errors(image, found, truth, void), void),
        }
        for row, (name, picture) in enumerate(rows.items()):
            y = top + STRIP + row * (cell[0] + GAP)
            sheet.paste(Image.fromarray(picture), (left, y))
            if column == 0:
                sheet.paste(_sideways(_fit(name, font, cell[0]), font, cell[0]), (0, y))
    return np.array(sheet)


def clip_sheet(
    clips: Mapping[str, Clip], *, max_frames: int = 8, cell_height: int = 160
) -> np.ndarray:
    """A sheet with a row for each clip, titled by its key: frames with their masks and prompts.

    Padding is left out; a long clip shows the frames that `pick_frames` picks.
    """
    rows = {}
    for title, clip in clips.items():
        frames = to_uint8(clip.images.numpy())
        numbers = {object_id: place for place, object_id in enumerate(clip.object_ids, start=1)}
        prompts = [{**p, "object_id": numbers[p["object_id"]]} for p in clip.prompts]
        scale = cell_height / frames.shape[1]
        cell = cell_height, max(1, round(frames.shape[2] * scale))
        cells = []
        prompted = {p["frame_index"] for p in prompts}
        for t in pick_frames(int(clip.frame_valid.sum()), prompted, max_frames):
            image = cv2.resize(frames[t], cell[::-1], interpolation=cv2.INTER_CUBIC)
            masks = {
                k + 1: resize_mask_to_paint(m.numpy(), cell) for k, m in enumerate(clip.masks[t])
            }
            here = [prompt for prompt in prompts if prompt["frame_index"] == t]
            void = None if clip.ignore is None else clip.ignore[t].numpy()
            void = None if void is None else resize_mask_to_paint(void, cell)
            picture = hatch_ignored(draw_masks(image, masks), void)
            cells += [paint_prompts(picture, here, scale), _gap(cell_height)]
        rows[title] = np.concatenate(cells[:-1], axis=1)
    return stacked(rows)


def stacked(pictures: Mapping[str, np.ndarray]) -> np.ndarray:
    """The (H, W, 3) uint8 pictures one below the other on white, each under its title."""
    font = ImageFont.load_default(17)
    width = max(picture.shape[1] for picture in pictures.values())
    sheet = Image.new("RGB", (width, sum(STRIP + p.shape[0] for p in pictures.values())), WHITE)
    pen, y = ImageDraw.Draw(sheet), 0
    for title, picture in pictures.items():
        pen.text((0, y + 3), _fit(title, font, width), INK, font)
        sheet.paste(Image.fromarray(picture), (0, y + STRIP))
        y += STRIP + picture.shape[0]
    return np.array(sheet)


def as_jpeg(picture: np.ndarray, quality: int = 85) -> NotebookImage:
    """The picture (H, W, 3) uint8 for a notebook that is kept with its outputs: as PNG, which
    Pillow's own display adds, frames take ten times the room."""
    from IPython.display import Image as NotebookImage

    data = io.BytesIO()
    Image.fromarray(picture).save(data, format="JPEG", quality=quality)
    return NotebookImage(data.getvalue(), format="jpeg")


def read_picture(path: str | Path) -> np.ndarray:
    """(H, W, 3) uint8 of a picture that `save_picture` wrote."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB"))


def save_picture(picture: np.ndarray, path: str | Path, quality: int = 68) -> None:
    """Write `picture` (H, W, 3) uint8 to `path`, whole or not at all; creates the folder.

    It is a JPEG where the name says so: of a sheet of frames a tenth of a PNG, and W&B's browser
    and terminal views show it.
    """
    jpeg = Path(path).suffix == ".jpg"
    how = {"format": "JPEG", "quality": quality, "optimize": True} if jpeg else {"format": "PNG"}
    with replacing(Path(path)) as partial:
        Image.fromarray(picture).save(partial, **how)


def _gap(height: int) -> np.ndarray:
    return np.full((height, GAP, 3), 255, np.uint8)


def _blend(picture: np.ndarray, mask: np.ndarray, ink: tuple, alpha: float) -> None:
    mixed = (1 - alpha) * picture[mask] + alpha * np.array(ink)
    picture[mask] = np.rint(mixed).astype(np.uint8)


def _outline(mask: np.ndarray, thickness: int | None = None) -> np.ndarray:
    """(H, W) bool: the rim of the mask, inside it; None is 1 px, or 2 from 200 px on."""
    thickness = thickness or (1 if min(mask.shape) < 200 else 2)
    kernel = np.ones((3, 3), np.uint8)
    return mask & (cv2.erode(mask.astype(np.uint8), kernel, iterations=thickness) == 0)


def _layout(num_cells: int, height: int, width: int, cell_height: int) -> tuple[int, float]:
    """(columns, scale) of the largest cells that fit `MAX_SHEET`; fewest bands where equal."""

    def scale(columns: int) -> float:
        bands = math.ceil(num_cells / columns)
        across = (MAX_SHEET[1] - GUTTER) / columns - GAP
        down = ((MAX_SHEET[0] - 80) / bands - STRIP - 4 * GAP) / 3  # 80 px: the usual header
        return min(cell_height / height, across / width, down / height)

    columns = max(range(num_cells, 0, -1), key=scale)
    return columns, scale(columns)


def _fit(text: str, font: ImageFont.FreeTypeFont, room: float) -> str:
    """`text`, cut with an ellipsis where it is wider than `room` px."""
    cuts = (text[:end] + "…" for end in range(len(text) - 1, -1, -1))
    return next((cut for cut in (text, *cuts) if font.getlength(cut) <= room), "")


def _sideways(text: str, font: ImageFont.FreeTypeFont, length: int) -> Image.Image:
    label = Image.new("RGB", (length, GUTTER), WHITE)
    ImageDraw.Draw(label).text((length / 2, GUTTER / 2), text, INK, font, anchor="mm")
    return label.rotate(90, expand=True)


def _header(title: str, legend: list[tuple[str, tuple | None]], width: int) -> Image.Image:
    """The words of the title, then the legend with its swatches, both wrapped to `width`."""
    image = Image.new("RGB", (width, 60 + 32 * len(title.split()) + 26 * len(legend)), WHITE)
    pen, y = ImageDraw.Draw(image), 6
    words = [(word, None) for word in title.split()]
    for items, size, line, space in ((words, 24, 34, 7), (legend, 17, 26, 16)):
        font, x = ImageFont.load_default(size), GUTTER
        for text, swatch in items:
            span = font.getlength(text) + (24 if swatch else 0)
            if x > GUTTER and x + span > width:
                x, y = GUTTER, y + line
            if swatch:
                pen.rectangle((x, y + 3, x + 16, y + 17), swatch, INK)
            pen.text((x + span, y), text, INK, font, anchor="ra")
            x += span + space
        y += line
    return image.crop((0, 0, width, y + GAP))
