"""How much faster our J and F are than the DAVIS 2017 code, as `vos-benchmark` carries it.

    pip install vos-benchmark && python tests/metrics_speed.py

Prints both times, their ratio, and the largest difference of a score. No test: times are the
machine's business.
"""

import time

import cv2
import numpy as np
from vos_benchmark.evaluator import Evaluator

from sam2train.metrics import score_video

NUM_FRAMES, SIZE = 60, (480, 854)  # as a DAVIS video


def ellipses(seed: int) -> np.ndarray:
    """(T, H, W) uint8: three objects that wander, the later above the earlier."""
    rng = np.random.default_rng(seed)
    ids = np.zeros((NUM_FRAMES, *SIZE), np.uint8)
    for number in (1, 2, 3):
        centre, speed = rng.uniform((200, 100), (650, 380)), rng.uniform(-4, 4, 2)
        axes = rng.integers(30, 110, 2)
        for t in range(NUM_FRAMES):
            x, y = np.round(centre + speed * t).astype(int).tolist()
            cv2.ellipse(ids[t], (x, y), axes.tolist(), 3.0 * t, 0, 360, number, -1)
    return ids


def main() -> None:
    truth, prediction = ellipses(0), ellipses(0)
    prediction = np.stack([np.roll(frame, 5, axis=1) for frame in prediction])
    slow, fast, ours = [], [], None
    for _ in range(3):  # taken in turn, since a machine is not the same twice
        start = time.perf_counter()
        reference = Evaluator()
        for mask, true in zip(prediction[1:], truth[1:], strict=True):
            reference.feed_frame(mask, true)
        j, f = reference.conclude()
        slow.append(time.perf_counter() - start)
        start = time.perf_counter()
        pair = ({k: ids == k for k in (1, 2, 3)} for ids in (prediction, truth))
        ours = score_video(*pair, "after_prompt")
        fast.append(time.perf_counter() - start)
    apart = max(
        max(abs(100 * s.J_mean - j[s.object_id]), abs(100 * s.F_mean - f[s.object_id])) / 100
        for s in ours.objects
    )
    print(
        f"DAVIS code {min(slow):.2f} s, ours {min(fast):.2f} s: {min(slow) / min(fast):.1f} times"
    )
    print(f"largest difference of a mean: {apart:.1e}")


if __name__ == "__main__":
    main()
