"""Scored videos to look at: a picture of ground truth with prompts, prediction and errors, and a
film of prediction and ground truth; of the videos whose scores changed most, least and by the
median."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np

from sam2train import distributed
from sam2train.clips import Prompt
from sam2train.data_clips import ClipDataset, stack_ignored
from sam2train.data_source import Video
from sam2train.evaluate import SeenFrame, TrackedVideo
from sam2train.files import file_name, printable, write_text
from sam2train.metrics import ObjectScores
from sam2train.pictures import comparison, id_mask, pick_frames, prompt_in_video, save_picture
from sam2train.transforms import resize_mask_to_paint
from sam2train.video_files import FilmFile

MAX_SHOWN = 8  # of a picture
MAX_TOGGLED = 255  # objects in a mask of W&B's
_KEPT_SIDE = 480  # px: the longer side of kept masks, as of a film
_FILM_LENGTH = 120  # frames
_RATE = 10.0  # frames a second of a film; a guess, as data sets do not say theirs
_CELL_HEIGHT = 180  # px of a frame in a picture, at most: pictures of every validation are kept


@dataclass(frozen=True, eq=False)
class Overlay:
    """One frame with its masks, to be judged by a person.

    Raises ValueError for what W&B would show wrong without an error: it shows a float frame black,
    and stretches a mask of another size.
    """

    name: str
    path: Path  # the composed picture, on disk
    frame: np.ndarray  # (H, W, 3) uint8
    prediction: np.ndarray  # (H, W) object ids, 0..255, 0 is background
    ground_truth: np.ndarray  # (H, W) as `prediction`
    class_labels: Mapping[int, str]  # object id -> text
    film: Path | None = None  # prediction and ground truth, side by side

    def __post_init__(self) -> None:
        if self.frame.dtype != np.uint8 or self.frame.shape[2:] != (3,):
            raise ValueError(f"frame is {self.frame.dtype} {self.frame.shape}, not uint8 (H, W, 3)")
        for mask in (self.prediction, self.ground_truth):
            if mask.shape != self.frame.shape[:2] or mask.min() < 0 or mask.max() > 255:
                raise ValueError(
                    f"mask of shape {mask.shape} with ids {mask.min()}..{mask.max()} on a frame of "
                    f"{self.frame.shape[:2]}; W&B needs equal sizes and ids in 0..255"
                )


@dataclass(eq=False)
class _Kept:
    """What is left of a tracked video until it is known whether it is drawn: its predictions, not
    larger than a film shows them, packed."""

    video: Video
    prompts: list[Prompt] | None  # None: those of another step, which are the same
    size: tuple[int, int]  # (H, W) of the masks
    masks: dict[int, bytes]  # frame -> (H, W) uint16, the places of objects from 1
    score: float = math.nan  # J&F
    texts: dict[int, str] | None = None  # frame -> its J

    def prediction(self, frame_idx: int) -> dict[int | str, np.ndarray]:
        """Object id -> (H, W) bool."""
        ids = np.frombuffer(zlib.decompress(self.masks[frame_idx]), np.uint16).reshape(self.size)
        return {o: ids == place for place, o in enumerate(self.video.object_ids, start=1)}


class OverlayDrawer:
    """Draws the videos with the best, the median and the worst change, or more between these.

    `see_frame` and `see_video` keep the predictions of all videos, about 150 kB each; `draw` writes
    `folder/<name>_video_<id>.jpg`, at most as many frames as fit a screen, and a film beside it;
    `overlays` has what was written.

    Args:
        name: what was scored, such as "step_000100"; part of the title.
        most: how many videos.
    """

    def __init__(self, dataset: ClipDataset, folder: Path, name: str, most: int):
        self.dataset, self.folder, self.name, self.most = dataset, folder, name, most
        self.overlays: list[Overlay] = []
        self.kept: dict[int, _Kept] = {}  # by the place of the video
        self._taken: dict[int, str] = {}  # its name in those of pictures
        self._frames: set[int] = set()  # of the video that is being tracked, those to keep
        self.hatches = False  # whether pixels are left out of the scores

    def see_frame(self, index: int, seen: SeenFrame) -> None:
        """Keep what the model made of the frame if it may be drawn; `index` counts the videos."""
        if not self.most:
            return
        video = seen.video
        self.hatches = self.hatches or seen.ignore is not None
        if seen.frame_idx == 0:
            scale = min(1.0, _KEPT_SIDE / max(video.size))
            size = tuple(max(1, round(scale * side)) for side in video.size)
            self.kept[index] = _Kept(video, seen.prompts, size, {})
            shown, middle = _picked(video, seen.prompts)
            self._frames = {*shown, middle, *_film_frames(video)}
        if seen.frame_idx in self._frames:
            kept = self.kept[index]
            ids = np.zeros(kept.size, np.uint16)
            for place, mask in enumerate(seen.prediction.values(), start=1):
                ids[resize_mask_to_paint(mask, kept.size)] = place
            kept.masks[seen.frame_idx] = zlib.compress(ids, 6)

    def see_video(self, index: int, tracked: TrackedVideo) -> None:
        """Keep its scores; `index` counts the videos."""
        if self.most:
            kept, objects = self.kept[index], tracked.scores.objects
            kept.score = float(np.mean([s.J_and_F for s in objects])) if objects else math.nan
            kept.texts = {t: _mean_J(objects, t) for t in _picked(kept.video, kept.prompts)[0]}

    def draw(self, before: OverlayDrawer | None = None) -> None:
        """Write pictures and films: of the videos whose scores changed most, least and by the
        median since `before`, the highest, lowest and median ones without. Several processes come
        here together, and the main one draws.

        Args:
            before: has seen the same videos; draws those that are chosen now, too, unless it has.
        """
        values = self._values(before)
        chosen = pick_videos(values, self.most)
        parts = distributed.gather({k: self.kept[k] for k in chosen if k in self.kept})
        kept = {index: of_video for part in parts for index, of_video in part.items()}
        if before is not None:
            before._draw_also(kept)
        if distributed.is_main():
            for index in chosen:
                title = f"J&F {kept[index].score:.3f}"
                if before is not None and math.isfinite(values[index]):
                    title += f" ({values[index]:+.3f} against {_words(before.name)})"
                self._draw(index, kept[index], title)

    def _values(self, before: OverlayDrawer | None) -> dict[int, float]:
        """What orders the videos: place -> change or score."""
        then = before.kept if before is not None else {}
        own = {
            index: kept.score - (then[index].score if index in then else 0.0)
            for index, kept in self.kept.items()
        }
        return {k: value for part in distributed.gather(own) for k, value in part.items()}

    def _draw_also(self, chosen: Mapping[int, _Kept]) -> None:
        """Draw these videos as they were seen here, with prompts from there."""
        own = {k: self.kept[k] for k in chosen if k in self.kept and k not in self._taken}
        parts = distributed.gather(own)
        if distributed.is_main():
            for index, kept in sorted({k: v for part in parts for k, v in part.items()}.items()):
                kept.prompts = chosen[index].prompts
                self._draw(index, kept, f"J&F {kept.score:.3f}")

    def _draw(self, index: int, kept: _Kept, title: str) -> None:
        video = kept.video
        shown, middle = _picked(video, kept.prompts)
        numbers = {object_id: place for place, object_id in enumerate(video.object_ids, start=1)}
        name = file_name(f"video_{video.video_id}", set(self._taken.values()))
        self._taken[index] = name
        path = self.folder / f"{self.name}_{name}.jpg"
        ignored = [self._ignored(video, t, kept.size) for t in shown]
        sides = [kept.prediction(t) for t in shown], [self._truth(kept, t) for t in shown]
        save_picture(
            comparison(
                np.stack([self._pixels(kept, t) for t in shown]),
                *(
                    {n: np.stack([m[o] for m in side]) for o, n in numbers.items()}
                    for side in sides
                ),
                self._prompts(kept, numbers, shown),
                title=f"{printable(video.video_id)}, {_words(self.name)}: {title}",
                frame_labels=[f"frame {t}" for t in shown],
                scores=[(kept.texts or {}).get(t, "") for t in shown],
                max_frames=len(shown),
                names={number: printable(o) for o, number in numbers.items()},
                ignore=stack_ignored(ignored, kept.size),
                cell_height=_CELL_HEIGHT,
            ),
            path,
        )
        # One frame with toggled masks: the middle, where tracking shows.
        order = video.object_ids[:MAX_TOGGLED]
        self.overlays.append(
            Overlay(
                name=name,
                path=path,
                frame=self._pixels(kept, middle),
                prediction=id_mask(kept.prediction(middle), order, kept.size),
                ground_truth=id_mask(self._truth(kept, middle), order, kept.size),
                class_labels={numbers[o]: f"object {o}" for o in order},
                film=self._film(kept, path.with_suffix(".webm")),
            )
        )

    def _film(self, kept: _Kept, path: Path) -> Path | None:
        """A film of prediction and truth side by side; None where it could not be written."""
        video, titles = kept.video, ("prediction", "ground truth")
        with contextlib.ExitStack() as opened:
            film = FilmFile(path, kept.size, _RATE, titles)
            opened.push(film)
            for t in _film_frames(video):
                here = [p for p in kept.prompts if p["frame_index"] == t]
                masks = kept.prediction(t), self._truth(kept, t)
                film.add(self._pixels(kept, t), masks[0], here, self.dataset.image_size, masks[1])
        return path if path.is_file() else None

    def _pixels(self, kept: _Kept, frame_idx: int) -> np.ndarray:
        pixels = self.dataset.read_frame(kept.video, frame_idx)
        if pixels.shape[:2] == kept.size:
            return pixels
        return cv2.resize(pixels, kept.size[::-1], interpolation=cv2.INTER_AREA)

    def _truth(self, kept: _Kept, frame_idx: int) -> dict[int | str, np.ndarray]:
        return {
            o: resize_mask_to_paint(self.dataset.read_mask(kept.video, frame_idx, o), kept.size)
            for o in kept.video.object_ids
        }

    def _ignored(self, video: Video, frame_idx: int, size: tuple[int, int]) -> np.ndarray | None:
        ignored = self.dataset.read_ignore(video, frame_idx) if self.hatches else None
        return None if ignored is None else resize_mask_to_paint(ignored, size)

    def keep(self, folder: Path) -> None:
        """Copy what was drawn and seen to a folder, for `restore`."""
        arrays, texts = {}, []
        for place, overlay in enumerate(self.overlays):
            for path in filter(None, (overlay.path, overlay.film)):
                shutil.copyfile(path, folder / path.name)
            for side in ("frame", "prediction", "ground_truth"):
                arrays[f"{place}/{side}"] = getattr(overlay, side)
            labels = list(overlay.class_labels.items())
            film = overlay.film and overlay.film.name
            texts.append(
                {"name": overlay.name, "path": overlay.path.name, "film": film, "labels": labels}
            )
        videos = []
        for index, kept in self.kept.items():
            about = {"score": kept.score, "size": kept.size, "texts": [*kept.texts.items()]}
            about |= {"index": index, "name": self._taken.get(index)}
            videos.append({"num_frames": len(kept.video.frames), **about})
            for t, mask in kept.masks.items():
                arrays[f"seen/{index}/{t}"] = np.frombuffer(mask, np.uint8)
        np.savez(folder / "overlays.npz", **arrays)
        write_text(folder / "overlays.json", json.dumps({"drawn": texts, "seen": videos}))

    def restore(self, folder: Path, videos: Sequence[Video]) -> None:
        """Take over what was seen and drawn of the same videos, as if it had been drawn now.

        Raises:
            OSError, ValueError, KeyError: it is not whole.
        """
        found, kept = [], {}
        content = json.loads((folder / "overlays.json").read_text())
        with np.load(folder / "overlays.npz") as arrays:
            for place, text in enumerate(content["drawn"]):
                path = self.folder / text["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                for name in filter(None, (text["path"], text["film"])):
                    shutil.copyfile(folder / name, self.folder / name)
                sides = {s: arrays[f"{place}/{s}"] for s in ("frame", "prediction", "ground_truth")}
                labels = {int(number): label for number, label in text["labels"]}
                film = text["film"] and self.folder / text["film"]
                found.append(Overlay(text["name"], path, **sides, class_labels=labels, film=film))
            for about in content["seen"]:
                index, masks = about["index"], {}
                for name in arrays.files:
                    if name.startswith(f"seen/{index}/"):
                        masks[int(name.split("/")[2])] = arrays[name].tobytes()
                video = videos[index]
                video = replace(video, frames=video.frames[: about["num_frames"]])
                kept[index] = _Kept(video, None, tuple(about["size"]), masks)
                kept[index].score, kept[index].texts = about["score"], dict(about["texts"])
        self.overlays, self.kept = found, kept
        self._taken = {one["index"]: one["name"] for one in content["seen"] if one["name"]}

    def _prompts(self, kept: _Kept, numbers: dict[int | str, int], shown: list[int]) -> list[dict]:
        """Those on the frames shown, counted among these, in pixels of what is drawn."""
        sizes = kept.size, self.dataset.image_size
        return [
            {
                **prompt_in_video(prompt, *sizes),
                "object_id": numbers[prompt["object_id"]],
                "frame_index": shown.index(prompt["frame_index"]),
            }
            for prompt in kept.prompts
            if prompt["frame_index"] in shown
        ]


def pick_videos(values: Mapping[int, float], most: int) -> list[int]:
    """The videos, at most so many, with the highest value, the lowest, and evenly between them; the
    median alone where it is one. Those without a value come last."""
    order = sorted(values, key=lambda k: (-np.nan_to_num(values[k], nan=-math.inf), k))
    known = [index for index in order if math.isfinite(values[index])]
    if most == 1 and known:
        return [known[len(known) // 2]]
    if len(known) <= most:
        return order[:most]
    return [known[round(place)] for place in np.linspace(0, len(known) - 1, most)]


def _film_frames(video: Video) -> range:
    """The frames of a film: all, or of a long video every so manieth."""
    return range(0, len(video.frames), math.ceil(len(video.frames) / _FILM_LENGTH))


def _picked(video: Video, prompts: list[Prompt]) -> tuple[list[int], int]:
    """The frames of the picture, and the one whose masks can be toggled; labelled ones, since the
    others have no ground truth."""
    frames = video.labelled or list(range(len(video.frames)))
    prompted = {frames.index(prompt["frame_index"]) for prompt in prompts}
    shown = [frames[place] for place in pick_frames(len(frames), prompted, MAX_SHOWN)]
    return shown, frames[len(frames) // 2]


def _mean_J(objects: Iterable[ObjectScores], frame_idx: int) -> str:
    """The mean of the objects for which this frame counts, as a text."""
    found = [s.J[s.frames == frame_idx] for s in objects]
    values = np.concatenate(found) if found else np.zeros(0)
    return f"J {values.mean():.2f}" if len(values) else ""


def _words(name: str) -> str:
    """`step 100` of the name of a picture, `step_000100`."""
    kind, _, number = name.partition("_")
    return f"{kind} {int(number)}" if number.isdecimal() else name
