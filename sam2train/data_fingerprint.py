"""A hash of data by its content, so that two numbers can be known to speak of the same data."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from sam2train.data_source import VideoSource
from sam2train.files import check_regular

# Files up to this size are read whole. Of larger ones three pieces are read, so that films and
# large data sets take seconds; another frame rarely has as many bytes and the same pieces.
_WHOLE = 64 * 1024
_PIECE = 16 * 1024
# Frames whose bytes are read, spread evenly over all; of the others the size counts. A data set of
# a million frames would otherwise be read once more at the start of each run. Masks are all read.
MAX_READ = 2000


def fingerprint(source: VideoSource) -> str:
    """sha256 in hexadecimal over videos, labelled frames, objects, masks, and the picture files by
    their sizes and samples of their bytes. Folders do not count: moved data is the same data.
    """
    files = list({frame.path: None for video in source.videos for frame in video.frames})
    step = max(len(files) / MAX_READ, 1.0)
    read = {int(k * step) for k in range(min(len(files), MAX_READ))}
    with ThreadPoolExecutor(8) as pool:  # waits for the disk
        found = pool.map(lambda k: _sample(files[k], read_bytes=k in read), range(len(files)))
        samples = dict(zip(files, found, strict=True))

    def plain(value: Any) -> str:
        """What JSON does not know: a file that holds masks, bytes of an RLE, a number of NumPy."""
        if isinstance(value, Path):
            if value not in samples:
                samples[value] = _sample(value)
            return samples[value]
        return value.hex() if isinstance(value, bytes) else str(value)

    total = hashlib.sha256()
    for video in source.videos:
        total.update(repr((video.video_id, video.size, video.object_ids)).encode())
        for frame in video.frames:
            head = (frame.is_labelled, frame.page, samples[frame.path], frame.ignored)
            masks = [
                (repr(object_id), int(annotation.area), annotation.segmentation)
                for object_id, annotation in frame.annotations.items()
            ]
            total.update(json.dumps((head, masks), default=plain).encode())
    return total.hexdigest()


def _sample(path: Path, *, read_bytes: bool = True) -> str:
    """Hash of a file's size and bytes, or of pieces at its start, middle and end."""
    if not read_bytes:
        return str(path.stat().st_size)
    check_regular(path)
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        if size <= _WHOLE:
            digest.update(file.read())
        else:
            for start in (0, (size - _PIECE) // 2, size - _PIECE):
                file.seek(start)
                digest.update(file.read(_PIECE))
    return digest.hexdigest()
