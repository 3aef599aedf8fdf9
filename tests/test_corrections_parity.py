"""Correction clicks against SAM 2's own simulation: outputs, loss and gradients."""

import types

import pytest
import torch
from test_parity import (
    assert_same_step,
    make_clip,
    make_models,
    prompts_of,
    reference_model,
)

from sam2train.clips import collate_fn
from sam2train.corrections import InteractionConfig, SimulatedUser, uniform_clicks

# T, objects of each clip, prompt, conditioning frames, clicks, corrected frames, SAM 2's settings;
# in eval mode SAM 2 clicks on the centre of the largest error, in train mode anywhere in it.
CASES = [
    ("eval", 1, (2,), "point", 1, 3, 1, {}),
    ("eval", 3, (1, 2), "point", 1, 2, 2, {"add_all_frames_to_correct_as_cond": True}),
    ("eval", 4, (2,), "bbox", 2, 2, 3, {"add_all_frames_to_correct_as_cond": False}),
    ("eval", 3, (2,), "mask", 1, 2, 2, {"add_all_frames_to_correct_as_cond": True}),
    (
        "train",
        8,
        (3,),
        "point",
        1,
        7,
        2,
        {"add_all_frames_to_correct_as_cond": True, "prob_to_sample_from_gt_for_train": 0.1},
    ),
    (
        "train",
        4,
        (2,),
        "bbox",
        2,
        2,
        2,
        {"add_all_frames_to_correct_as_cond": True, "prob_to_sample_from_gt_for_train": 0.5},
    ),
    ("train", 4, (1, 1), "point", 1, 1, 4, {"add_all_frames_to_correct_as_cond": False}),
]


@pytest.mark.parametrize(
    ("mode", "num_frames", "objects", "prompt", "num_cond", "num_clicks", "num_corrected", "more"),
    CASES,
)
def test_clicks_outputs_loss_and_gradients(
    monkeypatch, mode, num_frames, objects, prompt, num_cond, num_clicks, num_corrected, more
):
    settings = {
        "num_correction_pt_per_frame": num_clicks,
        f"num_frames_to_correct_for_{mode}": num_corrected,
        **more,
    }
    ours, theirs = make_models(64, 7, prompt=prompt, num_cond=num_cond, clicks=settings)
    ours.train(mode == "train")
    theirs.train(mode == "train")
    batch = collate_fn([make_clip(num_frames, n, 64, seed=k) for k, n in enumerate(objects)])
    user = SimulatedUser(
        InteractionConfig(
            num_correction_pt_per_frame=num_clicks,
            num_frames_to_correct=num_corrected,
            prob_to_sample_from_gt=more.get("prob_to_sample_from_gt_for_train", 0.0),
            add_all_frames_to_correct_as_cond=more.get("add_all_frames_to_correct_as_cond", False),
            point_sampling="uniform" if mode == "train" else "center",
        ),
        seed=0,
    )
    if mode == "train":
        places = [(k, place) for k, n in enumerate(objects) for place in range(n)]
        click_as_ours(theirs, user, places, monkeypatch)
    their_frames = theirs(batch)
    corrected = set(theirs.seen["frames_to_add_correction_pt"])
    assert len(corrected) == (0 if prompt == "mask" else num_corrected)
    user.sample_frames = lambda clip, conditioning, num_frames: corrected
    outputs = ours(batch, prompts=prompts_of(theirs.seen, batch), interaction=user)

    for t, frame in enumerate(their_frames):
        passes = outputs["frames"][t]
        assert len(passes) == len(frame["multistep_pred_ious"]) == 1 + num_clicks * (t in corrected)
        for step, prediction in enumerate(passes):
            for name, expected in (
                ("mask_logits", frame["multistep_pred_multimasks_high_res"][step]),
                ("iou_predictions", frame["multistep_pred_ious"][step]),
                ("object_score_logits", frame["multistep_object_score_logits"][step]),
            ):
                torch.testing.assert_close(
                    getattr(prediction, name),
                    expected,
                    rtol=0,
                    atol=1e-4,
                    msg=f"frame {t}, pass {step}: {name}",
                )
    assert_same_step(ours, theirs, outputs, their_frames, batch)


class Replay:
    """Random numbers that our user has drawn, in the order in which SAM 2's model asks for them."""

    def __init__(self, user, frames, places):
        self.numbers = []
        for t in frames:
            drawn = user.correct(t, places, torch.zeros(len(places), 1, 1, dtype=torch.bool))
            for draws, ignores in zip(drawn.draws.T, drawn.ignores.T, strict=True):
                if user.config.prob_to_sample_from_gt:
                    assert ignores.all() or not ignores.any()
                    self.numbers.append(0.0 if ignores.any() else 1.0)
                self.numbers.append(draws)

    def random(self):
        return self.numbers.pop(0)


def click_as_ours(theirs, user, places, monkeypatch):
    """Once SAM 2's model has drawn its prompts, its clicks come from our function, with the random
    numbers that ours will draw."""
    prepare = theirs.prepare_prompt_inputs

    def next_point(gt_masks, pred_masks, method):
        assert method == "uniform"
        predicted = torch.zeros_like(gt_masks) if pred_masks is None else pred_masks
        return uniform_clicks(gt_masks[:, 0], predicted[:, 0], theirs.rng.random())

    def prepare_and_switch(self, *arguments, **options):
        prepared = prepare(*arguments, **options)
        order = prepared["init_cond_frames"] + prepared["frames_not_in_init_cond"]
        corrected = prepared["frames_to_add_correction_pt"]
        self.rng = Replay(user, [t for t in order if t in corrected], places)
        monkeypatch.setattr(reference_model, "get_next_point", next_point)
        return prepared

    theirs.prepare_prompt_inputs = types.MethodType(prepare_and_switch, theirs)


def test_as_many_frames_are_corrected_as_in_sam2():
    """The counts over many draws: 1 to 3 corrected frames in a clip of 6, one or two prompted."""
    config = InteractionConfig(num_correction_pt_per_frame=1, num_frames_to_correct=3)
    user = SimulatedUser(config, seed=0)
    _, theirs = make_models(
        64,
        7,
        prompt="point",
        clicks={
            "num_frames_to_correct_for_train": 3,
            "rand_frames_to_correct_for_train": True,
            "num_init_cond_frames_for_train": 2,
            "rand_init_cond_frames_for_train": True,
        },
    )
    batch = collate_fn([make_clip(6, 1, 64, seed=0)])
    counts = {"ours": {}, "theirs": {}}
    for clip in range(600):
        prepared = theirs.prepare_prompt_inputs({}, batch)
        conditioning = prepared["init_cond_frames"]
        for name, frames in (
            ("theirs", set(prepared["frames_to_add_correction_pt"])),
            ("ours", user.sample_frames(clip, conditioning, 6)),
        ):
            assert set(conditioning) <= frames <= set(range(6))
            key = (len(conditioning), len(frames))
            counts[name][key] = counts[name].get(key, 0) + 1
    assert counts["ours"].keys() == counts["theirs"].keys()
    assert set(counts["theirs"]) == {(1, 1), (1, 2), (1, 3), (2, 2), (2, 3)}
    for key, count in counts["theirs"].items():
        # 600 draws of a chance of 1/6 or 1/4 stray by 11 at most, four of those apart.
        assert abs(count - counts["ours"][key]) < 60, key
