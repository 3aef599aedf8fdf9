"""PNGs of ids as KITTI MOTS, MOTSChallenge and CVAT's export "MOTS PNG" have them."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sam2train.data_facts_cache import FactsCache
from sam2train.data_source import Video, shared_pictures, tracking_warnings
from sam2train.data_videos import list_pictures, subfolders
from sam2train.data_vos import MaskReport, VosVideos, index_folder
from sam2train.errors import UserError
from sam2train.machine import num_cores, watched

_FRAMES = ("images", "image_02", "img1")  # CVAT, KITTI MOTS, MOTSChallenge
_MASKS = "instances"
_LABELS = "labels.txt"


class MotsVideos(VosVideos):
    """Videos in `images` with PNGs of the same names in `instances`, 16 bits a pixel: class * 1000
    + number is an object, 0 the background, and 10000 a region that no loss and no score counts.

    One video lies in the two folders themselves, several in sub-folders of the same name in both,
    or each with two such folders in a folder of its own.

    Args:
        path: the folder that holds `images` and `instances`, or the folders that do.

    Raises:
        UserError: no such folders, or all problems of frames and masks at once.
    """

    def __init__(self, path: Path):
        places = _places(path)
        if not places:
            what = "no images with instances" if path.is_dir() else "no such folder"
            raise UserError(
                f"{path}: {what}; expected {_FRAMES[0]}/*.jpg and {_MASKS}/*.png of the same names "
                f"(or {_FRAMES[0]}/<video>/ and {_MASKS}/<video>/), as in CVAT's export MOTS PNG"
            )
        report = MaskReport(FactsCache(path))
        videos: list[Video] = []
        with ThreadPoolExecutor(max(8, num_cores())) as pool:  # see `VosVideos`
            for name, frames, masks in watched(places, "videos", len(places)):
                if not masks.is_dir():
                    report.problems.append(f"{masks}: no such folder; expected masks of {frames}")
                elif video := index_folder(frames, masks, pool, report, "auto", name):
                    videos.append(video)
        report.facts.write()
        for video in videos:
            wrong = [o for o in video.object_ids if not 1000 <= int(o) < 10000]
            if wrong:
                report.problems.append(
                    f"video {video.video_id!r}: ids {wrong[:5]}; expected class * 1000 + number. "
                    "If these are plain ids, name the folders JPEGImages/<video> and "
                    "Annotations/<video> and set dataset.dataset_type: vos"
                )
        warnings = report.warnings + tracking_warnings(videos)
        problems = report.problems + shared_pictures(videos)
        # Not that of VosVideos, which looks for its own folders.
        super(VosVideos, self).__init__(path, videos, warnings, problems, report.notes())

    @staticmethod
    def recognise(path: Path) -> bool:
        """Whether the folders of a path are those of this format."""
        return bool(_places(path))


def _places(path: Path) -> list[tuple[str, Path, Path]]:
    """Name, frames and masks of each video; the masks may be missing."""
    if not path.is_dir():
        return []
    found = []
    for root in (path, *subfolders(path)):
        masks = root / _MASKS
        frames = next((root / name for name in _FRAMES if (root / name).is_dir()), None)
        if frames is None or not masks.is_dir():
            continue
        if list_pictures(frames):
            found.append((root.name or root.resolve().name, frames, masks))
        else:
            found += [(below.name, below, masks / below.name) for below in subfolders(frames)]
    return found
