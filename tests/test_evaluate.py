"""Whole videos through the streaming path: the protocol, and the training forward's answers."""

import threading
import tracemalloc
from collections import deque
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit, load, make_coco, stacks
from test_data_vos import make_vos

from sam2train.clips import collate_fn
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_source import Frame, Video
from sam2train.data_vos import VosVideos
from sam2train.datasets import COCODataset
from sam2train.errors import UserError
from sam2train.evaluate import (
    EvaluationConfig,
    TrackedFrame,
    copy_first_mask,
    first_prompts,
    score_labelled,
    track_frames,
    track_video,
    track_videos,
)
from sam2train.machine import Aside
from sam2train.memory import MemoryBank
from sam2train.metrics import mean_scores, measure
from sam2train.model import SAM2Model
from sam2train.scores import score

CONFIG = "sam2train/configs/sam2.1_hiera_demo.yaml"
SIZE = (64, 64)


def score_tracks(track, data, config, *, seed, on_frame=None, on_video=lambda index, video: None):
    """The means over all objects."""
    scores = []
    for index, video in enumerate(track_videos(track, data, config, seed=seed, on_frame=on_frame)):
        on_video(index, video)
        scores.append(video.scores)
    return mean_scores(scores)


def evaluate(model, *arguments, **options):
    """The means of a model."""
    return score_tracks(partial(track_video, model), *arguments, **options)


@pytest.fixture(scope="module")
def model() -> SAM2Model:
    torch.manual_seed(0)
    model = SAM2Model(None, CONFIG, device="cpu", image_size=64).load()
    with torch.no_grad():  # random weights call every object absent: show what the masks are
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    return model.train()


def dataset(tmp_path, prompt_type="mask", **options) -> COCODataset:
    path = make_coco(tmp_path, **options)
    return COCODataset(
        path, SIZE, video_clip_length=options["num_frames"], prompt_types=[prompt_type]
    )


@pytest.mark.parametrize("prompt_type", ["mask", "bbox", "point"])
def test_streaming_gives_what_the_training_forward_gives(model, tmp_path, prompt_type):
    """Both run SAM 2 in eval mode on the same frames: the same logits, frame by frame."""
    data = dataset(tmp_path, prompt_type, num_frames=9, size=SIZE)
    clip = data[0]
    model.eval()
    with torch.no_grad():
        whole = model(collate_fn([clip]))["pred_masks"][0]  # (T, N, H, W)
    for t, object_ids, current in track_frames(model, data, data.videos[0], clip.prompts):
        assert object_ids == clip.object_ids
        if t == 0 and prompt_type == "mask":
            continue  # the mask itself, once with and once without the way through a smaller one
        low_res = current["low_res_logits"][:, None]
        upscaled = torch.nn.functional.interpolate(low_res, SIZE, mode="bilinear")[:, 0]
        torch.testing.assert_close(upscaled, whole[t], atol=1e-4, rtol=1e-4)


def test_an_object_may_be_prompted_on_several_frames(model, tmp_path):
    """Streamed in the order of time, and the same logits as in the training forward, which takes
    the prompted frames first; the objects are prompted on different frames."""
    data = dataset(tmp_path, "bbox", num_frames=8, size=SIZE, absent=[(1, 0, 2), (1, 1, 2)])
    video, rng = data.videos[0], np.random.default_rng(0)
    prompts = [
        data.prompts.generate(
            data.read_mask(video, t, object_id), rng, object_id=object_id, frame_index=t
        )
        for object_id, t in ((1, 0), (1, 5), (2, 2), (1, 3), (2, 6))
    ]
    clip = data[0]
    model.eval()
    with torch.no_grad():
        outputs = model(clip.images[None], clip.masks[None], [prompts])
    for t, object_ids, current in track_frames(model, data, video, prompts):
        assert object_ids == [1, 2][: 1 if t < 2 else 2]
        low_res = current["low_res_logits"][:, None]
        upscaled = torch.nn.functional.interpolate(low_res, SIZE, mode="bilinear")[:, 0]
        for place in range(len(object_ids)):
            expected = outputs["pred_masks"][0, t, place]
            torch.testing.assert_close(upscaled[place], expected, atol=1e-4, rtol=1e-4)
            for name in ("iou_predictions", "object_score_logits"):
                found, expected = current[name].flatten()[place], outputs[name][0, t, place]
                torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    alone = [prompt for prompt in prompts if prompt["frame_index"] in (0, 2)]
    with_more, without = (
        stacks(track_video(model, data, video, some), video) for some in (prompts, alone)
    )
    assert (with_more[1] != without[1]).any()  # the later prompts are read


def test_limits_of_the_memory_apply_to_each_object_and_stand_beside_its_scores(model, tmp_path):
    data = dataset(tmp_path, num_frames=8, size=SIZE)
    video = data.videos[0]
    prompts = first_prompts(data, video, np.random.default_rng(0))

    def logits(**limits):
        rules = EvaluationConfig(memory_admission=limits)
        frames = track_frames(model, data, video, prompts, rules=rules)
        return torch.stack([tensors["low_res_logits"] for _, _, tensors in frames])

    free, none = logits(), logits(min_object_score=1e9)
    torch.testing.assert_close(logits(min_object_score=-1e9), free, rtol=0, atol=2e-4)
    assert not torch.allclose(none, free)
    # With the prompted frame alone in memory, a frame does not depend on those between.
    assert torch.equal(none[:2], logits(min_predicted_iou=1.0)[:2])
    config = EvaluationConfig(memory_admission={"min_predicted_iou": 0.75, "min_object_score": 0})
    track = partial(track_video, model, rules=config)
    rows = score(track, data, config, split="val", model="base", step=0, seed=0).objects
    assert {row["memory_admission"] for row in rows} == {"score>=0 iou>=0.75"}


def test_each_object_is_prompted_on_its_first_frame_and_empty_before(model, tmp_path):
    data = dataset(tmp_path, num_frames=6, absent=[(1, 0, 2), (1, 1, 2)])
    video = data.videos[0]
    prompts = first_prompts(data, video, np.random.default_rng(0))
    assert {p["object_id"]: p["frame_index"] for p in prompts} == {1: 0, 2: 2}
    masks = stacks(track_video(model, data, video, prompts), video)
    assert masks[2].shape == (6, 48, 64)
    assert not masks[2][:2].any()
    # A mask prompt is the answer on its own frame, but for the way through the model's size.
    truth = data.read_mask(video, 0, 1)
    assert (masks[1][0] & truth).sum() / (masks[1][0] | truth).sum() > 0.9


def test_objects_never_overlap(model, tmp_path):
    data = dataset(tmp_path, "point", num_frames=4, num_objects=3)
    video = data.videos[0]
    prompts = first_prompts(data, video, np.random.default_rng(0))
    masks = stacks(track_video(model, data, video, prompts), video)
    assert np.stack(list(masks.values())).sum(0).max() <= 1


def test_scores_repeat_and_the_model_is_left_as_it_was(model, tmp_path):
    data = dataset(tmp_path, "point", num_frames=4, num_videos=2)
    random_state = torch.get_rng_state()
    model.train()
    config = EvaluationConfig()
    first = evaluate(model, data, config, seed=1)
    assert evaluate(model, data, config, seed=1) == first
    assert model.training
    assert model.memory_attention.training
    assert torch.equal(torch.get_rng_state(), random_state)
    assert first["num_objects"] == 4
    assert first["J_and_F"] == pytest.approx((first["J"] + first["F"]) / 2)


def test_the_memory_of_a_long_video_is_bounded(model, tmp_path, monkeypatch):
    data = dataset(tmp_path, num_frames=30, num_objects=1)
    held = []
    forget_before = MemoryBank.forget_before

    def watch(bank, frame_idx):
        held.append(len(bank.tracked) + len(bank.conditioning))  # with the memory of this frame
        forget_before(bank, frame_idx)

    monkeypatch.setattr(MemoryBank, "forget_before", watch)
    prompts = first_prompts(data, data.videos[0], np.random.default_rng(0))
    deque(track_video(model, data, data.videos[0], prompts), maxlen=0)
    assert len(held) == 30
    # The prompt, as many frames as object pointers reach, and the one that is tracked.
    assert max(held) <= 1 + 16 + 1


def test_limits_and_prompt_types_of_the_section(model, tmp_path):
    data = dataset(tmp_path, "mask", num_frames=5, num_videos=3)
    seen, frames = [], []
    config = EvaluationConfig(max_videos=2, max_frames=3, prompt_types=("bbox",))
    evaluate(
        model,
        data,
        config,
        seed=0,
        on_frame=lambda index, frame: frames.append((index, frame)),
        on_video=lambda index, video: seen.append(video),
    )
    assert [len(video.video.frames) for video in seen] == [3, 3]
    assert {p["type"] for video in seen for p in video.prompts} == {"bbox"}
    assert [(index, f.frame_idx) for index, f in frames] == [
        (v, t) for v in (0, 1) for t in (0, 1, 2)
    ]
    assert frames[0][1].prediction[1].shape == frames[0][1].ground_truth[2].shape == (48, 64)
    assert [len(values) for values in seen[0].measures[1]] == [3] * 4


@pytest.mark.parametrize(("max_frames", "expected"), [(2, 5), (3, 9), (4, 12), (None, 12)])
def test_the_limit_of_frames_counts_labelled_ones(tmp_path, max_frames, expected):
    """Frames between them are seen, and the video ends with the last labelled one."""
    path = make_coco(tmp_path, num_frames=12)

    def change(content):
        for image in content["images"]:
            image["is_annotated"] = image["order_in_video"] % 4 == 0

    data, seen, scores = load(edit(path, change)), [], []
    score_tracks(
        copy_first_mask,
        data,
        EvaluationConfig(max_frames=max_frames),
        seed=0,
        on_frame=lambda index, frame: seen.append(frame.frame_idx),
        on_video=lambda index, video: scores.append(video.scores),
    )
    assert seen == list(range(expected))
    # The first frame is prompted.
    assert [o.frames.tolist() for o in scores[0].objects] == [[4, 8][: (max_frames or 3) - 1]] * 2


def test_masks_of_a_long_video_are_not_kept(tmp_path):
    """Frames are scored as they come: ten times the frames take no more memory."""

    def tracker(dataset, video, prompts):
        rng = np.random.default_rng(0)
        for _ in video.frames:
            yield TrackedFrame({o: rng.random(video.size) > 0.5 for o in video.object_ids}, {})

    peaks = []
    for num_frames in (12, 120):
        path = make_coco(tmp_path / str(num_frames), num_frames=num_frames, size=(240, 320))
        data = COCODataset(path, SIZE, prompt_types=["mask"], mask_cache_mb=0)
        tracemalloc.start()
        score_tracks(tracker, data, EvaluationConfig(), seed=0)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    one_mask = 240 * 320
    assert peaks[1] < peaks[0] + 10 * one_mask  # with all masks kept: 432 more


def test_nothing_to_score_is_an_error(model, tmp_path):
    data = dataset(tmp_path, num_frames=1)
    with pytest.raises(UserError, match="no frame to score"):
        evaluate(model, data, EvaluationConfig(), seed=0)


def test_what_is_said_on_unlabelled_frames_does_not_count(tmp_path):
    data = ClipDataset(
        VosVideos(make_vos(tmp_path, names=["bear"], every=2)), clip_settings((48, 64), 2)
    )
    video = data.videos[0]

    def tracker(dataset, video, prompts):
        """Right on labelled frames, everywhere on the others."""
        for t in range(len(video.frames)):
            masks = {o: dataset.read_mask(video, t, o) for o in video.object_ids}
            yield TrackedFrame(
                masks if t in video.labelled else {o: ~mask for o, mask in masks.items()}, {}
            )

    seen = []
    scores = score_tracks(
        tracker, data, EvaluationConfig(), seed=0, on_video=lambda index, video: seen.append(video)
    )
    assert video.labelled == [0, 2, 4]
    assert scores["J_and_F"] == 1
    assert seen[0].scores.objects[0].frames.tolist() == [2, 4]


def test_unlabelled_frames_are_tracked_and_not_scored():
    """Every second of 7 frames is labelled; what the model says between them does not matter."""
    frames = [Frame(Path(f"{t}"), {}, t % 2 == 0) for t in range(7)]
    video = Video(1, (8, 8), frames, [1])
    truth, prediction = np.zeros((2, 7, 8, 8), bool)
    truth[::2, 2:6, 2:6] = True
    prediction[::2, 2:6, 2:6] = True
    prediction[1::2] = True
    prediction[6, 4:] = False  # half of the object
    labelled = measure(prediction[video.labelled], truth[video.labelled])
    scored = score_labelled(video, {1: labelled}, "after_prompt")
    (scores,) = scored.objects
    assert scores.frames.tolist() == [2, 4, 6]
    assert scores.J.tolist() == [1, 1, 0.5]


def test_frames_are_decoded_ahead_and_measured_behind(model, tmp_path, monkeypatch):
    """The scores are those of one after the other, bit for bit; an error in a thread is an error
    here, and no thread is left."""
    data = dataset(tmp_path, num_frames=7, num_videos=2)
    track = partial(track_video, model)
    beside = list(track_videos(track, data, EvaluationConfig(), seed=0))
    threads = {thread.name for thread in threading.enumerate()}

    def at_once(aside, work):
        task = Future()
        task.set_result(work())
        aside.waiting.append(task)

    with monkeypatch.context() as patched:
        patched.setattr(Aside, "do", at_once)
        one_by_one = list(track_videos(track, data, EvaluationConfig(), seed=0))
    for first, second in zip(beside, one_by_one, strict=True):
        assert str(first.scores) == str(second.scores)
        for o, found in first.measures.items():
            for values, expected in zip(found, second.measures[o], strict=True):
                np.testing.assert_array_equal(values, expected)
            np.testing.assert_array_equal(first.object_scores[o], second.object_scores[o])

    def fails(index, seen):
        if seen.frame_idx == 3:
            raise ArithmeticError("in the thread")

    with pytest.raises(ArithmeticError, match="in the thread"):
        list(track_videos(track, data, EvaluationConfig(), seed=0, on_frame=fails))
    monkeypatch.setattr(data, "read_frame", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(track_videos(track, data, EvaluationConfig(), seed=0))
    assert {thread.name for thread in threading.enumerate()} == threads
