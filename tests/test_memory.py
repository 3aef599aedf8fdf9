"""The method: what is read, decoded and written, in which order, and how far gradients travel."""

import pytest
import torch
from conftest import make_coco
from test_model import (
    DEMO,
    MEMORY,
    SIZE,
    assert_close,
    loss_of,
    make_clip,
    make_model,
    tensors_with_gradient,
)

from sam2train.clips import collate_fn
from sam2train.corrections import DecoderPass, InteractionConfig, SimulatedUser
from sam2train.datasets import build_dataset
from sam2train.experiment import Experiment, untrained_rows
from sam2train.losses import LossConfig, compute_losses
from sam2train.memory import MemoryBank, perturb_masks, track_clip
from sam2train.model import SAM2Model


def track(model, clip, **options):
    """What `track_clip` gives for the first object of a clip, all in a list."""
    features = model.encode_images(clip.images)
    prompts = {prompt["frame_index"]: [prompt] for prompt in clip.prompts}
    asked = []

    def features_of(t):
        asked.append(t)
        return features.select(torch.tensor([t]))

    outputs = list(track_clip(model.sam2, features_of, len(clip.images), prompts, **options))
    assert asked == [output.frame_idx for output in outputs]
    return outputs


# -- order and content of the bank ----------------------------------------------------------------


def test_conditioning_frames_come_first_then_the_others_in_order():
    model = make_model()
    with torch.no_grad():
        outputs = track(model, make_clip(("point", 3, 1), num_frames=6))
    assert [output.frame_idx for output in outputs] == [1, 3, 2, 4, 5]


@pytest.mark.parametrize("num_maskmem", [0, 2])
def test_what_enters_the_memory(num_maskmem):
    """Features, positions of the same shape and a pointer; no features where nobody reads them."""
    model = make_model(num_maskmem=num_maskmem)
    with torch.no_grad():
        outputs = track(model, make_clip(("point", 0), num_frames=3))
    for output in outputs:
        memory = output.memory
        assert memory.obj_ptr.shape == (1, 64)
        if num_maskmem == 0 or output is outputs[-1]:
            assert memory.features is memory.positions is None
        else:
            assert (
                memory.features.shape == memory.positions.shape == (1, 32, SIZE // 16, SIZE // 16)
            )


def test_the_mask_of_highest_predicted_iou_is_the_one_that_is_encoded():
    model = make_model()
    with torch.no_grad():
        first, *_ = track(model, make_clip(("point", 0), num_frames=2))
        features = model.encode_images(make_clip(("point", 0), num_frames=2).images)
        encoded, _ = model.sam2._encode_new_memory(
            features.select(torch.tensor([0])).levels,
            features.sizes,
            first.mask_logits[:, None],
            first.object_score_logits,
            is_mask_from_pts=True,
        )
    assert torch.equal(first.memory.features, encoded)
    best = first.passes[-1].iou_predictions.argmax()
    assert torch.equal(first.mask_logits[0], first.passes[-1].mask_logits[0, best])


@pytest.mark.parametrize("settings", [(2, 3), (4, 2), (3, 0)])
def test_memories_that_no_frame_can_read_are_forgotten(settings, monkeypatch):
    """Without forgetting the answers are the same, to the bit."""
    num_maskmem, pointers = settings
    clip = make_clip(("mask", 0), num_frames=9)
    model = make_model(num_maskmem=num_maskmem, max_obj_ptrs_in_encoder=pointers)
    sizes = []
    forget = MemoryBank.forget_before

    def forget_and_count(bank, frame_idx):
        forget(bank, frame_idx)
        sizes.append(len(bank.tracked))

    with torch.no_grad():
        monkeypatch.setattr(MemoryBank, "forget_before", forget_and_count)
        bounded = track(model, clip)
        monkeypatch.setattr(MemoryBank, "forget_before", lambda bank, frame_idx: None)
        whole = track(model, clip)
    assert max(sizes) <= max(num_maskmem, pointers)
    for a, b in zip(bounded, whole, strict=True):
        assert torch.equal(a.mask_logits, b.mask_logits)


# -- how far gradients travel ---------------------------------------------------------------------


def test_admitting_all_gives_what_tracking_without_limits_gives():
    model = make_model()
    clip = make_clip(("point", 0, 2), num_frames=8)
    with torch.no_grad():
        free = track(model, clip)
        admitted = track(model, clip, admits=lambda output: True)
    for one, other in zip(free, admitted, strict=True):
        assert torch.equal(one.mask_logits, other.mask_logits)


def test_a_memory_that_is_not_admitted_is_never_read():
    """Refusing frames 2 and 3 tracks frame 4 as if it followed frame 1."""
    model = make_model(max_obj_ptrs_in_encoder=0)  # a pointer has a time code of its own
    clip = make_clip(("point", 0), num_frames=6)
    with torch.no_grad():
        limited = track(model, clip, admits=lambda output: output.frame_idx not in (2, 3))
        features = model.encode_images(clip.images[[0, 1, 4, 5]])
        short = track_clip(
            model.sam2,
            lambda t: features.select(torch.tensor([t])),
            6,
            {0: [clip.prompts[0]]},
        )
        short = [next(short) for _ in range(4)]
    for one, other in zip(limited[4:], short[2:], strict=True):
        torch.testing.assert_close(one.mask_logits, other.mask_logits, rtol=0, atol=1e-4)
    free = track(model, clip)
    assert not torch.allclose(limited[4].mask_logits, free[4].mask_logits)


def test_the_bank_by_rank_is_bounded():
    bank = MemoryBank(tracked=dict.fromkeys([9, 2, 5, 7], None))
    bank.keep_last(3)
    assert sorted(bank.tracked) == [5, 7, 9]
    bank.tracked = {t: t for t in bank.tracked}
    assert bank.by_rank(20).tracked == {19: 9, 18: 7, 17: 5}
    bank.conditioning = {8: None, 30: None}  # 8 keeps its place, 30 is later
    assert bank.by_rank(20).tracked == {19: 9, 17: 7, 16: 5}


def test_perturbed_masks_are_moved_swapped_or_empty():
    torch.manual_seed(0)
    logits = torch.randn(300, 1, 8, 8)
    decoded = DecoderPass(None, None, None, None, logits, None, None)
    assert torch.equal(perturb_masks(decoded, 0.0).mask_logits, logits)
    kept = (perturb_masks(decoded, 0.4).mask_logits == logits).flatten(1).all(1)
    assert 0.5 < kept.float().mean() < 0.7
    wrong = perturb_masks(decoded, 1.0).mask_logits
    empty = (wrong == -10).flatten(1).all(1)
    moved = (wrong.flatten(1).sort(1).values == logits.flatten(1).sort(1).values).all(1)
    swapped = (wrong[:, None] == logits[None]).flatten(2).all(2).any(1) & ~moved
    assert (empty | moved | swapped).all()
    for part in (empty, moved, swapped):
        assert 0.25 < part.float().mean() < 0.42
    lone = decoded._replace(mask_logits=logits[:1])
    assert perturb_masks(lone, 1.0).mask_logits.shape == (1, 1, 8, 8)


def test_memory_noise_perturbs_tracked_frames_in_training_only():
    def forward(memory_noise, train):
        model = make_model(memory_noise=memory_noise, dropout=0.0).train(train)
        torch.manual_seed(0)
        batch = collate_fn([make_clip(("point", 0), num_frames=4)])
        return model(batch)["pred_masks"]

    assert torch.equal(forward(0.0, True), forward(1.0, False))
    clean, noisy = forward(0.0, True), forward(1.0, True)
    assert torch.equal(clean[:, :2], noisy[:, :2])  # frame 1 reads the prompted frame only
    assert not torch.allclose(clean[:, 2:], noisy[:, 2:])


def test_detached_memory_trains_nothing_that_writes_it():
    model = make_model(memory_gradient="detached").train()
    loss_of(model, make_clip(("mask", 0), num_frames=4)).backward()
    assert tensors_with_gradient(model, "memory_encoder.") == set()
    assert tensors_with_gradient(model, "obj_ptr_proj.") == set()
    # These belong to reading.
    assert len(tensors_with_gradient(model, "obj_ptr_tpos_proj.")) == 2
    assert "maskmem_tpos_enc" in tensors_with_gradient(model)
    assert tensors_with_gradient(model, "memory_attention.")


def test_memory_gradient_does_not_change_the_forward_pass():
    batch = collate_fn([make_clip(("mask", 0), num_frames=4)])
    full = make_model()(batch)
    for setting in ("detached", 1, 2):
        assert_close(make_model(memory_gradient=setting)(batch), full)


def readers(memory_gradient, conditioning=(0,), num_frames=6):
    """Frame -> the frames whose loss sends a gradient into what was written there."""
    model = make_model(memory_gradient=memory_gradient)
    clip = make_clip(("mask", *conditioning), num_frames=num_frames)
    written, losses = {}, {}
    for output in track(model, clip, memory_gradient=memory_gradient):
        t, memory = output.frame_idx, output.memory
        written[t] = [x for x in (memory.features, memory.obj_ptr) if x is not None]
        losses[t] = output.low_res_logits.square().mean()
    reached = {s: set() for s in written}
    for t, loss in losses.items():
        for s, tensors in written.items():
            if s == t or not loss.requires_grad:
                continue
            grads = torch.autograd.grad(loss, tensors, retain_graph=True, allow_unused=True)
            given = [grad is not None and bool(grad.any()) for grad in grads]
            assert len(set(given)) == 1  # the spatial memory and the pointer, or none of the two
            if given[0]:
                reached[s].add(t)
    return reached


@pytest.mark.parametrize(
    ("memory_gradient", "expected"),
    [
        ("full", {0: {1, 2, 3, 4, 5}, 1: {2, 3, 4, 5}, 2: {3, 4, 5}, 3: {4, 5}, 4: {5}, 5: set()}),
        ("detached", {t: set() for t in range(6)}),
        (1, {0: {1}, 1: set(), 2: {3}, 3: set(), 4: {5}, 5: set()}),
        (2, {0: {1, 2}, 1: {2}, 2: set(), 3: {4, 5}, 4: {5}, 5: set()}),
        (9, {0: {1, 2, 3, 4, 5}, 1: {2, 3, 4, 5}, 2: {3, 4, 5}, 3: {4, 5}, 4: {5}, 5: set()}),
    ],
)
def test_gradient_travels_no_farther_than_asked(memory_gradient, expected):
    assert readers(memory_gradient) == expected
    if isinstance(memory_gradient, int):
        assert all(t - s <= memory_gradient for s, frames in expected.items() for t in frames)


def test_conditioning_frames_are_one_link():
    """They read nothing, so with two of them and one link the first tracked frame teaches both."""
    reached = readers(1, conditioning=(0, 1), num_frames=4)
    assert reached == {0: {2}, 1: {2}, 2: set(), 3: set()}


# -- temporal rows --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_frames", "rows"), [(1, []), (2, [6]), (3, [0, 6]), (4, [0, 1, 6]), (8, range(7))]
)
def test_rows_that_a_clip_trains(num_frames, rows):
    model = make_model(["maskmem_tpos_enc", "memory_attention"])
    loss_of(model, make_clip(("point", 0), num_frames=num_frames)).backward() if rows else None
    gradient = model.sam2.maskmem_tpos_enc.grad
    used = [] if gradient is None else gradient.flatten(1).any(1).nonzero()[:, 0].tolist()
    assert used == list(rows)


EVERY_FRAME = {"num_frames_to_correct": 4, "rand_frames_to_correct": False}


@pytest.mark.parametrize(
    ("length", "num_maskmem", "modules", "conditioning", "interaction", "rows"),
    [
        (1, 7, "memory", 1, {}, []),
        (2, 3, "memory", 1, {}, [2]),
        (4, 7, "memory", 1, {}, [0, 1, 6]),
        (4, 3, "memory", 1, {}, [0, 1, 2]),
        (3, 1, "memory", 1, {}, [0]),
        (5, 5, "memory", 3, {}, [0, 1, 2, 4]),
        (4, 7, "memory_attention", 1, {}, []),
        (4, 0, "memory", 1, {}, []),
        # Corrected frames become conditioning frames, of which all read the last row.
        (4, 7, "memory", 1, EVERY_FRAME, [6]),
        (5, 5, "memory", 1, EVERY_FRAME, [0, 1, 2, 4]),
        (4, 5, "memory", 2, {**EVERY_FRAME, "rand_frames_to_correct": True}, [0, 1, 4]),
        (4, 5, "memory", 1, {**EVERY_FRAME, "add_all_frames_to_correct_as_cond": False}, [0, 1, 4]),
    ],
)
def test_the_rows_with_a_gradient_are_those_that_are_said_to_be_trained(
    tmp_path, length, num_maskmem, modules, conditioning, interaction, rows
):
    data = make_coco(tmp_path, num_videos=2, num_frames=6, size=(SIZE, SIZE))
    clicks = {"num_correction_pt_per_frame": 1, **interaction} if interaction else {}
    experiment = Experiment.model_validate(
        {
            "dataset": {
                "data_path": str(data),
                "image_size": [SIZE, SIZE],
                "video_clip_length": length,
                "max_conditioning_frames": conditioning,
                "prompt_types": ["point"] if interaction else ["point", "mask"],
            },
            "model": {
                "image_size": SIZE,
                "num_maskmem": num_maskmem,
                "trainable_modules": [modules],
            },
            "interaction": clicks,
        }
    )
    clips = build_dataset(
        experiment.dataset, experiment.augment, experiment.clips_seed, str(data), training=True
    )
    model = make_model([modules, "mask_decoder"], num_maskmem=num_maskmem)
    user = SimulatedUser(experiment.interaction, 0) if interaction else None
    for epoch in range(3):  # further conditioning frames and corrections are drawn
        batch = collate_fn([clips[epoch, 0], clips[epoch, 1]])
        frames = model(batch, interaction=user)["frames"]
        loss = compute_losses(frames, batch.masks, LossConfig(), batch.object_frame_valid)["loss"]
        loss.backward()
    gradient = model.sam2.maskmem_tpos_enc.grad
    found = [] if gradient is None else gradient.flatten(1).any(1).nonzero()[:, 0].tolist()
    said = [row for row in range(num_maskmem) if row not in untrained_rows(experiment)]
    assert found == said == rows


@pytest.mark.parametrize("num_maskmem", [2, 4, 7])
def test_the_row_that_each_frame_uses(num_maskmem):
    """Row r is that of the memory r + 1 frames back, the last that of the conditioning frame."""
    model = make_model(num_maskmem=num_maskmem)
    batch = collate_fn([make_clip(("mask", 0), num_frames=num_maskmem + 2)])
    rows = model.sam2.maskmem_tpos_enc
    with torch.no_grad():
        before = model(batch)["pred_masks"][0]
        for row in range(num_maskmem):
            rows[row] += 1
            changed = (model(batch)["pred_masks"][0] - before).flatten(1).abs().amax(1) > 1e-6
            rows[row] -= 1
            first = 1 if row == num_maskmem - 1 else row + 2
            assert changed.tolist() == [t >= first for t in range(num_maskmem + 2)], row


@pytest.mark.parametrize("num_maskmem", [0, 1, 9])
def test_other_numbers_of_memories(tmp_path, num_maskmem):
    torch.save({"model": make_model().sam2.state_dict()}, tmp_path / "w.pt")
    model = SAM2Model(tmp_path / "w.pt", DEMO, ["*"], "cpu", SIZE, num_maskmem).load()
    loss_of(model, make_clip(("point", 0), num_frames=3)).backward()
    memory = [n for n in tensors_with_gradient(model) if n.startswith(("memory_", "maskmem_"))]
    assert bool(memory) == (num_maskmem > 0)


def test_no_object_pointers():
    """At 0 not even the conditioning frame's pointer is read, and nothing is missing on disk."""
    model = make_model(max_obj_ptrs_in_encoder=0).train()
    assert model.sam2.state_dict().keys() == make_model().sam2.state_dict().keys()
    clip = make_clip(("point", 0), ("mask", 0), num_frames=4)
    loss_of(model, clip).backward()
    assert tensors_with_gradient(model, "obj_ptr") == set()
    assert len(tensors_with_gradient(model, "memory_encoder.")) == 40
    with torch.no_grad():
        before = model(collate_fn([clip]))
        model.sam2.obj_ptr_proj.layers[0].weight += 1
        model.sam2.obj_ptr_tpos_proj.weight += 1
        assert_close(model(collate_fn([clip])), before)


@pytest.mark.parametrize("gradient", ["full", 1])
def test_frames_that_are_computed_again_give_the_same_gradients(gradient):
    """With dropout, correction clicks and a memory that is cut: to the last bit."""
    batch = collate_fn([make_clip(("point", 0), ("bbox", 1), num_frames=4)])
    found = []
    for recompute in (False, True):
        model = make_model(
            MEMORY, memory_gradient=gradient, dropout=0.1, activation_checkpointing=recompute
        ).train()
        user = SimulatedUser(InteractionConfig(num_correction_pt_per_frame=2), 0)
        torch.manual_seed(1)
        frames = model(batch, interaction=user, only_frames=True)["frames"]
        compute_losses(frames, batch.masks, LossConfig())["loss"].backward()
        found.append([p.grad for p in model.trainable_parameters().values()])
    assert any(g is not None and g.abs().max() > 0 for g in found[0])
    for kept, again in zip(*found, strict=True):
        assert (kept is None) == (again is None)
        assert kept is None or torch.equal(kept, again)


def test_computing_again_keeps_less():
    """Bytes that autograd holds after the forward pass."""
    batch = collate_fn([make_clip(("point", 0), num_frames=4)])
    held = []
    for recompute in (False, True):
        model = make_model(MEMORY, activation_checkpointing=recompute).train()
        blocks = {}

        def keep(tensor, blocks=blocks):
            storage = tensor.untyped_storage()
            blocks[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            frames = model(batch, only_frames=True)["frames"]
        assert frames
        own = {p.untyped_storage().data_ptr() for p in model.sam2.parameters()}
        held.append(sum(size for place, size in blocks.items() if place not in own))
    assert held[1] < 0.4 * held[0]
