"""From decoded frames to the model's input: resize, augment, normalise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import cv2
import numpy as np
from PIL import Image
from pydantic import Field

from sam2train.clips import MEAN as MEAN
from sam2train.clips import STD as STD  # beside the functions that use them
from sam2train.clips import normalise_pixels
from sam2train.config import Section

if TYPE_CHECKING:
    import torch


class AugmentConfig(Section):
    """The `augment:` section. Everything is off by default; a range of 0 is off."""

    horizontal_flip: float = Field(0.0, ge=0, le=1, description="chance, for the whole clip")
    vertical_flip: float = Field(0.0, ge=0, le=1, description="chance, for the whole clip")
    degrees: float = Field(0.0, ge=0, le=180, description="rotation, up to, either way")
    shear: float = Field(0.0, ge=0, lt=90, description="degrees, up to, either way")
    crop_scale: float = Field(1.0, gt=0, le=1, description="smallest area that a crop keeps")
    brightness: float = Field(0.0, ge=0, le=1, description="colour jitter of the whole clip")
    contrast: float = Field(0.0, ge=0, le=1, description="colour jitter of the whole clip")
    saturation: float = Field(0.0, ge=0, le=1, description="colour jitter of the whole clip")
    greyscale: float = Field(0.0, ge=0, le=1, description="chance, for the whole clip")
    frame_brightness: float = Field(0.0, ge=0, le=1, description="a second jitter, for each frame")
    frame_contrast: float = Field(0.0, ge=0, le=1, description="a second jitter, for each frame")
    frame_saturation: float = Field(0.0, ge=0, le=1, description="a second jitter, for each frame")
    reverse: float = Field(0.0, ge=0, le=1, description="chance to play the clip backwards")
    num_views: int | None = Field(
        None,
        ge=1,
        description="so many versions of each video are drawn once and for all, and clips come "
        "from them, so that the feature cache has their images; null draws each clip anew",
    )

    @property
    def repeats_images(self) -> bool:
        """Whether a frame comes again with the same pixels: it has few versions."""
        changes = (self.degrees, self.shear, self.brightness, self.contrast, self.saturation)
        of_frames = (self.frame_brightness, self.frame_contrast, self.frame_saturation)
        return self.num_views is not None or not (
            any(changes) or any(of_frames) or self.crop_scale < 1
        )


def resize_image(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 stretched to `size` as SAM 2's video predictor does it (Pillow, bicubic)."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize((size[1], size[0]), Image.Resampling.BICUBIC))


def resize_frame(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The same, in a third of the time where both sides shrink: torch's code for uint8 clamps and
    rounds in another order, so that a value of a photograph may differ by 2 of 255."""
    if image.shape[0] < size[0] or image.shape[1] < size[1] or image.shape[:2] == tuple(size):
        return resize_image(image, size)
    import torch

    pixels = torch.from_numpy(image if image.flags.writeable else image.copy())
    resized = torch.nn.functional.interpolate(
        pixels.permute(2, 0, 1)[None], size=tuple(size), mode="bicubic", antialias=True
    )
    return resized[0].permute(1, 2, 0).numpy()


def stack_frames(frames: Sequence[np.ndarray]) -> np.ndarray:
    """(T, H, W, 3) uint8 of frames (H, W, 3); in memory, colours come before rows, as a model and
    `resize_frame` have them."""
    stacked = np.empty((len(frames), 3, *frames[0].shape[:2]), np.uint8).transpose(0, 2, 3, 1)
    for place, frame in zip(stacked, frames, strict=True):
        place[:] = frame
    return stacked


class MaskPart(NamedTuple):
    """A mask by the rectangle around its pixels."""

    pixels: np.ndarray  # (h, w) bool or uint8; all else of the mask is empty
    corner: tuple[int, int]  # row and column of its first pixel
    size: tuple[int, int]  # (H, W) of the whole mask


def cut_mask(mask: np.ndarray) -> MaskPart:
    """The part of a mask (H, W) bool that has its pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return MaskPart(mask[:0, :0], (0, 0), mask.shape)
    top, left = int(rows[0]), int(columns[0])
    return MaskPart(mask[top : rows[-1] + 1, left : columns[-1] + 1], (top, left), mask.shape)


def resize_mask(mask: np.ndarray | MaskPart, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool: a pixel is set where at least half of the area it covers is.

    A side that grows is interpolated and thresholded at one half. An object too thin for that keeps
    the pixel that it covers most, so that its mask does not say that it is absent.
    """
    if isinstance(mask, np.ndarray):
        if mask.shape == tuple(size):
            return mask
        mask = cut_mask(mask)
    resized = np.zeros(size, bool)
    if not mask.pixels.size:
        return resized
    # First the sides that shrink: only there does the area rule hold.
    smaller = np.minimum(mask.size, size)
    coverage, (top, left) = _coverage(mask, smaller)
    if tuple(smaller) != tuple(size):
        whole = np.zeros(smaller, np.float32)
        whole[top : top + coverage.shape[0], left : left + coverage.shape[1]] = coverage
        coverage, top, left = cv2.resize(whole, size[::-1], interpolation=cv2.INTER_LINEAR), 0, 0
    part = resized[top : top + coverage.shape[0], left : left + coverage.shape[1]]
    np.greater_equal(coverage, 0.5 - _ROUNDING, out=part)
    if not part.any():
        part.flat[coverage.argmax()] = True
    return resized


_ROUNDING = 1e-9  # of areas: exactly half counts as half, whatever the fractions of pixels


def _coverage(mask: MaskPart, size: np.ndarray) -> tuple[np.ndarray, tuple[int, int]]:
    """Shares of the cells of a smaller grid that the mask covers, and row and column of the first.

    The sum of the pixels above and left of a point, interpolated, is the area there: so four of its
    values give the area in any rectangle.
    """
    sums = cv2.integral(np.ascontiguousarray(mask.pixels).view(np.uint8))  # (h + 1, w + 1)
    first = []
    for axis in (0, 1):
        cell = mask.size[axis] / size[axis]  # pixels
        start, length = mask.corner[axis], mask.pixels.shape[axis]
        cells = np.arange(int(start / cell), int(np.ceil((start + length) / cell - _ROUNDING)) + 1)
        edges = np.clip(cells * cell - start, 0, length)
        whole = np.minimum(edges.astype(np.int64), length - 1)
        share = (edges - whole).reshape(-1, 1) if axis == 0 else edges - whole
        low, high = sums.take(whole, axis), sums.take(whole + 1, axis)
        sums = np.diff(low + share * (high - low), axis=axis) / cell
        first.append(int(cells[0]))
    return sums, tuple(first)


def resize_mask_to_paint(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of `size` for a picture: a mask that grows keeps the corners of its pixels.

    One that shrinks and would vanish is set wherever it covers any of a pixel.
    """
    enlarge = mask.shape[0] <= size[0]
    how = cv2.INTER_NEAREST_EXACT if enlarge else cv2.INTER_AREA
    cover = cv2.resize(mask.astype(np.float32), size[::-1], interpolation=how)
    return cover >= 0.5 if (cover >= 0.5).any() else cover > 0


def resize_mask_smoothly(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W) bool of `size` for a picture: the outline that `resize_image` gives a white shape."""
    picture = np.repeat(mask[..., None].astype(np.uint8) * 255, 3, axis=2)
    return resize_image(picture, size)[..., 0] > 127


def normalise(images: np.ndarray) -> torch.Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W) float32, ImageNet-normalised."""
    return normalise_pixels(channels_first(images))


def channels_first(images: np.ndarray) -> torch.Tensor:
    """(T, H, W, 3) uint8 -> (T, 3, H, W) uint8."""
    import torch

    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))


def image_keys(images: np.ndarray) -> list[str]:
    """A key for each image that only the same pixels have. `images` is (T, H, W, 3) uint8."""
    size = f"{images.shape[1]}x{images.shape[2]}"
    return [
        f"{hashlib.sha256(image).hexdigest()[:32]}-{size}"
        for image in np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    ]


def augment(
    images: np.ndarray,
    masks: np.ndarray,
    config: AugmentConfig,
    rng: np.random.Generator,
    frame_rngs: Sequence[np.random.Generator] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """The clip after one random change of all frames and masks, and one of each frame's colours.

    Args:
        images: (T, H, W, 3) uint8.
        masks: (T, N, H, W) bool.
        frame_rngs: T, for the colours of each frame; None takes them from `rng`.
    """
    if config == AugmentConfig(num_views=config.num_views):
        return images, masks
    import torch
    from torchvision import tv_tensors
    from torchvision.transforms import v2

    size = images.shape[1:3]
    clip_steps = [
        v2.RandomHorizontalFlip(config.horizontal_flip),
        v2.RandomVerticalFlip(config.vertical_flip),
    ]
    if config.degrees or config.shear:
        clip_steps.append(
            v2.RandomAffine(
                config.degrees,
                shear=config.shear or None,
                interpolation=v2.InterpolationMode.BILINEAR,  # masks: always nearest
                # Corners that a turned frame leaves empty get the mean colour, about 0 once
                # normalised, as in SAM 2's training.
                fill={tv_tensors.Image: (255 * MEAN).astype(int).tolist(), tv_tensors.Mask: 0},
            )
        )
    if config.crop_scale < 1:
        clip_steps.append(
            v2.RandomResizedCrop(size, scale=(config.crop_scale, 1.0), antialias=True)
        )
    clip_steps.append(v2.ColorJitter(config.brightness, config.contrast, config.saturation))
    clip_steps.append(v2.RandomGrayscale(config.greyscale))
    frame_jitter = v2.ColorJitter(
        config.frame_brightness, config.frame_contrast, config.frame_saturation
    )

    frames = tv_tensors.Image(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    layers = tv_tensors.Mask(torch.from_numpy(masks))
    # torchvision draws from torch's global generator: seeded from ours, and put back afterwards.
    # Not torch.manual_seed, which would seed the generators of CUDA devices for good.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(rng.integers(2**63)))
        frames, layers = v2.Compose(clip_steps)(frames, layers)
        jittered = []
        for place, frame in enumerate(frames):
            if frame_rngs is not None:
                torch.default_generator.manual_seed(int(frame_rngs[place].integers(2**63)))
            jittered.append(frame_jitter(frame))
        frames = torch.stack(jittered)
    return frames.numpy().transpose(0, 2, 3, 1), layers.numpy().astype(bool)
