"""Our evaluation against SAM2VideoPredictor, the class that users deploy: the same masks.

They agree where the switches that exist for evaluation only are set alike. `SWITCHES` are those of
the predictor; `build_sam2_video_predictor` sets the first five otherwise unless it is called with
`apply_postprocessing=False`. Two habits of the predictor have no switch, `like_the_predictor` does
the same to our model:
  - it stores memories in bfloat16;
  - of a prompted frame it encodes the mask after a detour through a quarter of the size. For clicks
    and boxes that is where the mask comes from; a mask prompt loses its fine outline.
"""

from contextlib import contextmanager

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_coco, stacks
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from sam2train.datasets import COCODataset
from sam2train.evaluate import EvaluationConfig, first_prompts, track_frames, track_video
from sam2train.files import REPOSITORY
from sam2train.model import SAM2Model

DEMO = REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml"
SIZE = 64

SWITCHES = {
    # Set by build_sam2_video_predictor; here as in training:
    "binarize_mask_from_pts_for_mem_enc": False,
    "fill_hole_area": 0,
    "sam_mask_decoder_extra_args.dynamic_multimask_via_stability": False,
    "sam_mask_decoder_extra_args.dynamic_multimask_stability_delta": 0.05,  # unused without it
    "sam_mask_decoder_extra_args.dynamic_multimask_stability_thresh": 0.98,
    # As they are by default.
    "non_overlap_masks": False,  # it hides the loser's logit; the masks below are without overlap
    "non_overlap_masks_for_mem_enc": False,
    "clear_non_cond_mem_around_input": False,
    "add_all_frames_to_correct_as_cond": False,
    "memory_temporal_stride_for_eval": 1,
}


def make_models(**switches):
    """Ours and SAM 2's predictor with the same random weights."""
    torch.manual_seed(0)
    ours = SAM2Model(None, DEMO, device="cpu", image_size=SIZE, num_maskmem=4).load().eval()
    with torch.no_grad():
        # Random weights call every object absent, and everything far from a click empty.
        ours.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias.fill_(5.0)
    node = OmegaConf.load(DEMO).model
    tokens = [SIZE // 16] * 2
    settings = {
        "_target_": "sam2.sam2_video_predictor.SAM2VideoPredictor",
        "image_size": SIZE,
        "num_maskmem": 4,
        "memory_attention.layer.self_attention.feat_sizes": tokens,
        "memory_attention.layer.cross_attention.feat_sizes": tokens,
        **SWITCHES,
        **switches,
    }
    for name, value in settings.items():
        OmegaConf.update(node, name, value, force_add=True)
    theirs = instantiate(node).eval()
    theirs.load_state_dict(ours.sam2.state_dict())
    return ours, theirs


@contextmanager
def like_the_predictor(model, monkeypatch):
    """Our model with the predictor's two habits that have no switch."""
    sam2 = model.sam2
    encode, use_mask = sam2._encode_new_memory, sam2._use_mask_as_output

    def encode_in_bfloat16(*args, **options):
        features, positions = encode(*args, **options)
        return features.to(torch.bfloat16).float(), positions

    def use_small_mask(*args):
        outputs = list(use_mask(*args))
        low_res = outputs[3]
        outputs[4] = F.interpolate(low_res, (SIZE, SIZE), mode="bilinear", align_corners=False)
        return tuple(outputs)

    with monkeypatch.context() as patch:
        patch.setattr(sam2, "_encode_new_memory", encode_in_bfloat16)
        patch.setattr(sam2, "_use_mask_as_output", use_small_mask)
        yield


def make_video(folder, size, **options):
    """A data set of one video, and the same frames as the JPEG folder that the predictor reads.

    Both read the JPEGs: our frames are written again from them, without loss.
    """
    path = make_coco(folder, size=size, **options)
    jpegs = folder / "jpegs"
    jpegs.mkdir()
    for t, picture in enumerate(sorted((folder / "video_001").iterdir())):
        jpeg = jpegs / f"{t:05d}.jpg"
        Image.open(picture).save(jpeg, quality=95)
        Image.open(jpeg).save(picture)
    return path, jpegs


def predict(predictor, jpegs, prompts, object_ids, size):
    """Object id -> (T, H, W) logits, as a user of the predictor gets them.

    Objects that begin together share a session. A later one has its own, as in SAM 2's script for
    such data sets: in a shared one the predictor would track it before its prompt, backwards from
    there, and remember what it saw.
    """
    num_frames = len(list(jpegs.iterdir()))
    logits = {o: torch.full((num_frames, *size), -1024.0) for o in object_ids}
    for begin in sorted({prompt["frame_index"] for prompt in prompts}):
        state = predictor.init_state(str(jpegs))
        for prompt in (p for p in prompts if p["frame_index"] == begin):
            where = (state, begin, prompt["object_id"])
            if prompt["mask"] is not None:
                predictor.add_new_mask(*where, prompt["mask"])
            else:
                points = torch.from_numpy(prompt["points"]) / SIZE
                predictor.add_new_points_or_box(
                    *where, points, torch.from_numpy(prompt["labels"]), normalize_coords=False
                )
        for t, ids, found in predictor.propagate_in_video(state):
            for object_id, logit in zip(ids, found, strict=True):
                logits[object_id][t] = logit[0]
    return logits


def as_masks(logits):
    """Where objects overlap the higher logit wins, as `non_overlap_masks` does it."""
    surest, winner = torch.stack(list(logits.values())).max(dim=0)
    return {o: ((winner == k) & (surest > 0)).numpy() for k, o in enumerate(logits)}


def our_logits(model, data, video, prompts, rules=None):
    """Object id -> (T, H, W) logits at the video's own size, -1024 before the prompt."""
    logits = {o: torch.full((len(video.frames), *video.size), -1024.0) for o in video.object_ids}
    for t, object_ids, current in track_frames(model, data, video, prompts, rules=rules):
        low_res = current["low_res_logits"][:, None]
        resized = F.interpolate(low_res, video.size, mode="bilinear", align_corners=False)
        for object_id, logit in zip(object_ids, resized, strict=True):
            logits[object_id][t] = logit[0]
    return logits


def assert_same(ours, theirs, data, video, prompts):
    """Logits to rounding; masks but for pixels where two objects of random weights are equal."""
    for object_id, logits in our_logits(ours, data, video, prompts).items():
        torch.testing.assert_close(logits, theirs[object_id], atol=1e-5, rtol=1e-5)
    masks = as_masks(theirs)
    assert all(mask.any() for mask in masks.values()), "nothing to compare"
    assert agreement(stacks(track_video(ours, data, video, prompts), video), masks) > 0.999


def agreement(ours, theirs):
    """Share of equal pixels, over all objects and frames."""
    return np.mean([ours[o] == theirs[o] for o in ours])


@pytest.fixture(autouse=True)
def no_bars(monkeypatch):
    monkeypatch.setattr("sam2.sam2_video_predictor.tqdm", lambda frames, **_: frames)
    monkeypatch.setattr("sam2.utils.misc.tqdm", lambda frames, **_: frames)


@pytest.mark.parametrize("size", [(SIZE, SIZE), (48, 80)], ids=["model size", "own size"])
@pytest.mark.parametrize("kind", ["point", "bbox", "mask"])
def test_the_same_masks(kind, size, tmp_path, monkeypatch):
    path, jpegs = make_video(tmp_path, size, num_frames=9, num_objects=2)
    data = COCODataset(path, (SIZE, SIZE), prompt_types=[kind])
    (video,) = data.videos
    prompts = first_prompts(data, video, np.random.default_rng(0))
    ours, predictor = make_models()
    theirs = predict(predictor, jpegs, prompts, video.object_ids, size)
    with like_the_predictor(ours, monkeypatch):
        assert_same(ours, theirs, data, video, prompts)
    # Without its two habits the predictor's masks are near, and not these.
    masks = stacks(track_video(ours, data, video, prompts), video)
    assert agreement(masks, as_masks(theirs)) > 0.98


def test_the_predictor_as_it_is_deployed(tmp_path, monkeypatch):
    """`build_sam2_video_predictor` turns these on; filling holes needs SAM 2's CUDA extension."""
    path, jpegs = make_video(tmp_path, (SIZE, SIZE), num_frames=6, num_objects=2)
    data = COCODataset(path, (SIZE, SIZE), prompt_types=["point"])
    (video,) = data.videos
    prompts = first_prompts(data, video, np.random.default_rng(0))
    ours, predictor = make_models(
        **{
            "binarize_mask_from_pts_for_mem_enc": True,
            "sam_mask_decoder_extra_args.dynamic_multimask_via_stability": True,
        }
    )
    theirs = predict(predictor, jpegs, prompts, video.object_ids, (SIZE, SIZE))
    with like_the_predictor(ours, monkeypatch):
        deployed = our_logits(ours, data, video, prompts, EvaluationConfig(predictor_defaults=True))
        plain = our_logits(ours, data, video, prompts)
    for object_id, logits in deployed.items():
        torch.testing.assert_close(logits, theirs[object_id], atol=1e-5, rtol=1e-5)
        assert not torch.allclose(logits, plain[object_id])
    assert not ours.sam2.binarize_mask_from_pts_for_mem_enc  # as before


def test_an_object_that_comes_late(tmp_path, monkeypatch):
    absent = [(1, t, 2) for t in range(3)]
    path, jpegs = make_video(tmp_path, (SIZE, SIZE), num_frames=8, num_objects=2, absent=absent)
    data = COCODataset(path, (SIZE, SIZE), prompt_types=["bbox"])
    (video,) = data.videos
    prompts = first_prompts(data, video, np.random.default_rng(0))
    assert [prompt["frame_index"] for prompt in prompts] == [0, 3]
    ours, predictor = make_models()
    theirs = predict(predictor, jpegs, prompts, video.object_ids, (SIZE, SIZE))
    with like_the_predictor(ours, monkeypatch):
        assert_same(ours, theirs, data, video, prompts)


@pytest.mark.parametrize(
    "switches",
    [{"binarize_mask_from_pts_for_mem_enc": True}, {"memory_temporal_stride_for_eval": 2}],
    ids=lambda switches: next(iter(switches)),
)
def test_a_switch_that_differs_shows(switches, tmp_path, monkeypatch):
    """The list is not decoration: turned the other way, masks change."""
    path, jpegs = make_video(tmp_path, (SIZE, SIZE), num_frames=9, num_objects=2)
    data = COCODataset(path, (SIZE, SIZE), prompt_types=["bbox"])
    (video,) = data.videos
    prompts = first_prompts(data, video, np.random.default_rng(0))
    _, agreeing = make_models()
    _, other = make_models(**switches)
    size = (SIZE, SIZE)
    one, two = (predict(m, jpegs, prompts, video.object_ids, size) for m in (agreeing, other))
    # Ten times what equal ones differ by.
    assert max((one[o] - two[o]).abs().max() for o in one) > 1e-4
