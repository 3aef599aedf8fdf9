"""A tracked video as files, written frame by frame, so that it may be of any length.

Palette PNGs as those who score them want them, a COCO video JSON, and a film.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any, Literal, TextIO
from zipfile import ZipFile

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle

from sam2train.clips import Prompt
from sam2train.data_source import Video
from sam2train.data_videos import PICTURE_SUFFIXES
from sam2train.errors import UserError
from sam2train.evaluate import SeenFrame
from sam2train.files import file_name, replacing, write_text
from sam2train.pictures import draw_masks, object_colours, paint_prompts, prompt_in_video
from sam2train.transforms import resize_mask_to_paint

_FILM_SIDE = (320, 640)  # px: the longer side of a film lies between these
_TWO_SIDES = (256, 480)  # px: that of each of several sides
# Browsers play VP8 and VP9, and OpenCV's wheels cannot write H.264. VP8 takes a sixth of the time
# of VP9 and twice the room: VP8 for films that a run waits for.
_CODECS = {".webm": ("VP80",), ".mp4": ("vp09", "mp4v")}


# How masks lie for those who score them.
#   davis        <video>/<frame>.png, the pixel is the object's number. DAVIS' program, and MOSE's
#                server, which wants the videos at the top of the zip (`make_zip` in Cutie's
#                cutie/inference/utils/results_utils.py).
#   youtube_vos  the same below Annotations/, of the frames that are asked for alone. The servers of
#                YouTube-VOS (`make_zip`) and of LVOS (evaluation_codalab.py of lvos-evaluation).
#   sav          <video>/<object in 3 digits>/<frame>.png of 0 and 1, so that objects may overlap.
#                SA-V's program (sav_dataset/README.md of SAM 2; `save_masks_to_dir` in its
#                tools/vos_inference.py).
MaskLayout = Literal["davis", "youtube_vos", "sav"]


class MaskFolder:
    """Writes the masks of videos as palette PNGs into a folder, or into a zip where that is the
    path's suffix; see `MaskLayout`. A zip is whole at the end of the `with` block; without an end,
    or after an error, there is none.

    A folder has the name of its video; where that is not a safe or free file name, `videos.json`
    says which video it is.

    In one PNG of all objects, a number is the object's id where all ids of the video are 1 to 255;
    else objects count from 1 in their order of appearance, and `objects.json` in the folder says
    which is which. Where objects overlap there, the later one has the pixel. Frames are named as
    their pictures are, or by position where these names repeat (a film).

    Raises:
        UserError: the folder holds something already, or the zip exists.
    """

    def __init__(self, path: Path, layout: MaskLayout = "davis"):
        self.path, self.layout = Path(path), layout
        self.is_zip = self.path.suffix.lower() == ".zip"
        free_folder = not self.is_zip and self.path.is_dir() and not any(self.path.iterdir())
        if self.path.exists() and not free_folder:
            raise UserError(
                f"--save-masks {path}: there is something already; name a new or empty folder, or "
                "a new zip"
            )
        self.colours = [0, 0, 0, *object_colours(256)[1:].ravel().tolist()]
        self.renamed: dict[str, dict[int, str]] = {}
        self.videos: dict[str, str] = {}
        self.taken = {"objects.json", "videos.json"}
        # Of the video that is being written.
        self.name = ""
        self.numbers: dict[int | str, int] = {}
        self.folders: dict[int | str, str] = {}  # of its objects
        self.names: list[str] = []
        # Of the zip.
        self._open = ExitStack()
        self._zip: ZipFile | None = None

    def __enter__(self) -> MaskFolder:
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is not None:
            self._open.__exit__(*error)
            return
        with self._open:
            for name, content in (("videos.json", self.videos), ("objects.json", self.renamed)):
                if content and self._zip is not None:
                    self._zip.writestr(name, json.dumps(content, indent=2) + "\n")

    def write(self, seen: SeenFrame) -> None:
        """Write one frame's prediction; the frames of a video come in order.

        Raises:
            UserError: more than 255 objects for one PNG.
        """
        video = seen.video
        if seen.frame_idx == 0:
            self._begin(video)
        if self.layout == "sav":
            for object_id, mask in seen.prediction.items():
                self._write_png(mask.astype(np.uint8), seen.frame_idx, self.folders[object_id])
        elif self.layout == "davis" or video.asked is None or seen.frame_idx in video.asked:
            ids = np.zeros(video.size, np.uint8)
            for object_id, mask in seen.prediction.items():
                ids[mask] = self.numbers[object_id]
            self._write_png(ids, seen.frame_idx)

    def what(self) -> str:
        """What lies at the path, for people."""
        frame = {
            "davis": "VIDEO/FRAME.png, as DAVIS and MOSE have it",
            "youtube_vos": "Annotations/VIDEO/FRAME.png, as YouTube-VOS and LVOS have it",
            "sav": "VIDEO/OBJECT/FRAME.png, as SA-V has it",
        }
        return f"masks as palette PNGs: {frame[self.layout]}"

    def _begin(self, video: Video) -> None:
        self.name = file_name(video.video_id, self.taken)
        self.names = _frame_names(video)
        if self.name != str(video.video_id):
            self.videos[self.name] = str(video.video_id)
            self._write_json("videos.json", self.videos)
        if self.layout == "sav":
            taken: set[str] = set()
            ids = [f"{o:03d}" if isinstance(o, int) else o for o in video.object_ids]
            names = [file_name(o, taken) for o in ids]
            self.folders = dict(zip(video.object_ids, names, strict=True))
        else:
            self.numbers = self._number(video, self.name)

    def _number(self, video: Video, name: str) -> dict[int | str, int]:
        if len(video.object_ids) > 255:
            raise UserError(
                f"--save-masks: video {video.video_id!r} has {len(video.object_ids)} objects; a "
                "palette PNG holds 255; --save-masks-as sav writes one for each object"
            )
        if all(isinstance(o, int) and 1 <= o <= 255 for o in video.object_ids):
            return {o: o for o in video.object_ids}
        numbers = {o: place for place, o in enumerate(video.object_ids, start=1)}
        self.renamed[name] = {number: str(o) for o, number in numbers.items()}
        self._write_json("objects.json", self.renamed)
        return numbers

    def _write_png(self, pixels: np.ndarray, t: int, *below: str) -> None:
        picture = Image.fromarray(pixels)
        picture.putpalette(self.colours)
        top = ["Annotations"] if self.layout == "youtube_vos" else []
        place = PurePosixPath(*top, self.name, *below, f"{self.names[t]}.png")
        if not self.is_zip:
            path = self.path / place
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path)
            return
        if self._zip is None:
            self._zip = self._open.enter_context(
                ZipFile(self._open.enter_context(replacing(self.path)), "w")
            )
        content = BytesIO()
        picture.save(content, "PNG")
        self._zip.writestr(str(place), content.getvalue())

    def _write_json(self, name: str, content: Mapping[str, Any]) -> None:
        """Anew with each video, in case the process is killed; into a zip at its end."""
        if not self.is_zip:
            write_text(self.path / name, json.dumps(content, indent=2) + "\n")


def _frame_names(video: Video) -> list[str]:
    """The names of the pictures; positions where these repeat, or for the frames of a film."""
    stems = [file_name(frame.path.stem) for frame in video.frames]
    pictures = all(frame.path.suffix.lower() in PICTURE_SUFFIXES for frame in video.frames)
    if pictures and len({stem.casefold() for stem in stems}) == len(stems):
        return stems
    return [f"{t:05d}" for t in range(len(stems))]


class CocoFile:
    """A COCO video JSON that is written annotation by annotation: a long video has too many to be
    kept."""

    def __init__(self, file: TextIO):
        self.file, self.number = file, 0
        self.has_names = False

    def begin(self, video: Video, picture_of: Callable[[int], Path], first: int) -> None:
        """All but the annotations; frames before `first` are marked as not annotated.

        Args:
            picture_of: the file of a frame; paths are relative to the folder of this one where they
                lie below.
        """
        # A reader takes one kind of id in a video.
        self.has_names = any(isinstance(object_id, str) for object_id in video.object_ids)
        height, width = video.size
        size = {"width": width, "height": height}
        about = {"id": 1, "name": str(video.video_id), "length": len(video.frames), **size}
        categories = json.dumps([{"id": 1, "name": "object"}])
        self.file.write(f'{{"videos": {json.dumps([about])},\n"categories": {categories},\n')
        home = Path(self.file.name).resolve().parent
        self.file.write('"images": [')
        for t in range(len(video.frames)):
            path = picture_of(t).resolve()
            name = path.relative_to(home) if path.is_relative_to(home) else path
            entry = {"id": t + 1, "video_id": 1, "order_in_video": t, "path": name.as_posix()}
            self._row({**entry, **size, "is_annotated": t >= first}, t)
        self.file.write('],\n"annotations": [')

    def add(self, t: int, object_id: int | str, mask: np.ndarray, score: float) -> None:
        """A mask (H, W) bool that is not empty."""
        code = rle.encode(np.asfortranarray(mask.view(np.uint8)))
        entry = {
            "id": self.number + 1,
            "image_id": t + 1,
            "category_id": 1,
            "track_id": str(object_id) if self.has_names else object_id,
            "segmentation": {"size": list(mask.shape), "counts": code["counts"].decode()},
            "area": int(rle.area(code)),
            "bbox": rle.toBbox(code).tolist(),
            "score": score,
            "iscrowd": 0,
        }
        self._row(entry, self.number)
        self.number += 1

    def _row(self, entry: Mapping[str, Any], place: int) -> None:
        self.file.write(("," if place else "") + "\n" + json.dumps(entry))

    def __exit__(self, *error: Any) -> None:
        self.file.write("]}\n")


class FilmFile:
    """An MP4 or WebM of frames with masks and prompts; none where OpenCV has no encoder.

    Args:
        size: (H, W) of the video.
        rate: frames a second.
        titles: of two or more sides of the film, side by side; none: there is one, without title.
    """

    def __init__(self, path: Path, size: tuple[int, int], rate: float, titles: Sequence[str] = ()):
        self.titles = titles
        self.path, self.partial = path, path.with_name(f".{path.name}")
        self.scale = np.clip(max(size), *(_TWO_SIDES if titles else _FILM_SIDE)) / max(size)
        # Codecs store colours for squares of two pixels.
        self.size = tuple(max(2, 2 * round(self.scale * side / 2)) for side in size)
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.size[1] * max(len(titles), 1), self.size[0]
        for codec in _CODECS[path.suffix]:
            how = cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*codec), rate, whole
            with _quiet_opencv():
                self.writer = cv2.VideoWriter(str(self.partial), *how)
            if self.writer.isOpened():
                break
        # Encoding a frame takes as long as tracking it on a GPU: it goes on beside that.
        self.pool = ThreadPoolExecutor(1)
        self.encoded: Future | None = None

    def add(
        self,
        pixels: np.ndarray,
        masks: Mapping[int | str, np.ndarray],
        prompts: Iterable[Prompt],
        image_size: tuple[int, int],
        *beside: Mapping[int | str, np.ndarray],
    ) -> None:
        """The next frame, (H, W, 3) uint8, with the prompts given on it, in pixels of the model's
        input; objects have their colours by their order in `masks`.

        Args:
            beside: the masks on each further side of the film, of the same objects.
        """
        if self.encoded is not None:
            self.encoded.result()  # raises what went wrong
        self.encoded = self.pool.submit(self._add, pixels, (masks, *beside), prompts, image_size)

    def _add(
        self,
        pixels: np.ndarray,
        sides: Sequence[Mapping[int | str, np.ndarray]],
        prompts: Iterable[Prompt],
        image_size: tuple[int, int],
    ) -> None:
        smooth = cv2.INTER_AREA if self.scale < 1 else cv2.INTER_CUBIC
        picture = cv2.resize(pixels, self.size[::-1], interpolation=smooth)
        numbers = {object_id: place for place, object_id in enumerate(sides[0], start=1)}
        here = [
            {
                **prompt_in_video(p, pixels.shape[:2], image_size),
                "object_id": numbers[p["object_id"]],
            }
            for p in prompts
        ]
        painted = []
        for place, masks in enumerate(sides):
            shown = {numbers[o]: mask for o, mask in masks.items() if mask.any()}
            smaller = {n: resize_mask_to_paint(mask, self.size) for n, mask in shown.items()}
            side = paint_prompts(draw_masks(picture, smaller), here, self.scale)
            if self.titles:
                _write_title(side, self.titles[place])
            painted.append(side)
        self.writer.write(cv2.cvtColor(np.concatenate(painted, axis=1), cv2.COLOR_RGB2BGR))

    def __exit__(self, kind: type | None, *error: Any) -> None:
        self.pool.shutdown()
        self.writer.release()
        if kind is None and self.encoded is not None:
            self.encoded.result()
        with contextlib.suppress(FileNotFoundError):
            if kind is None:
                os.replace(self.partial, self.path)
            else:
                self.partial.unlink()


def _write_title(picture: np.ndarray, text: str) -> None:
    """Write a text at the upper left of a picture (H, W, 3) uint8, light with a dark rim."""
    scale = max(picture.shape[0] / 640, 0.4)
    x, y = 6, round(30 * scale) + 4
    for dx, dy, ink in ((-1, 0, 0), (1, 0, 0), (0, -1, 0), (0, 1, 0), (0, 0, 255)):
        how = cv2.FONT_HERSHEY_SIMPLEX, scale, (ink,) * 3, 1, cv2.LINE_AA
        cv2.putText(picture, text, (x + dx, y + dy), *how)


@contextlib.contextmanager
def _quiet_opencv() -> Iterator[None]:
    """For the start of a film: OpenCV says of each WebM that its codec has no tag, and of each
    encoder that it lacks, on the file descriptor of stderr."""
    try:
        kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    except OSError:  # there is no stderr
        yield
        return
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
