"""SAM2Model: what is trained, what reaches the memory, and that a batch is its objects alone."""

import re

import numpy as np
import pytest
import torch
from conftest import moving_masks

from sam2train.clips import Clip, Prompt, collate_fn
from sam2train.errors import UserError
from sam2train.experiment import ModelConfig
from sam2train.files import REPOSITORY
from sam2train.losses import LossConfig, compute_losses
from sam2train.model import SAM2Model
from sam2train.optimizer import OptimizerConfig, build_optimizer
from sam2train.prompts import mask_center, mask_to_box

DEMO = REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml"
SIZE = 64
MEMORY = ("memory_attention", "memory_encoder")


def make_prompt(kind, mask=None, *, object_id=1, frame_index=0):
    """A prompt of one kind for a (H, W) mask; `empty` gives one that says nothing."""
    prompt = Prompt(
        object_id=object_id,
        frame_index=frame_index,
        type="bbox" if kind == "bbox" else "mask" if kind == "mask" else "point",
        points=np.zeros((0, 2), np.float32),
        labels=np.zeros(0, np.int32),
        box=None,
        mask=None,
    )
    if kind == "mask":
        prompt["mask"] = mask
    elif kind == "bbox":
        prompt["box"] = mask_to_box(mask)
        prompt["points"] = prompt["box"].reshape(2, 2)
        prompt["labels"] = np.array([2, 3], np.int32)
    elif kind == "points":  # two clicks, as many as a box has corners
        prompt["points"] = np.stack([mask_center(mask), np.zeros(2, np.float32)])
        prompt["labels"] = np.array([1, 0], np.int32)
    elif kind == "point":
        prompt["points"] = mask_center(mask)[None]
        prompt["labels"] = np.array([1], np.int32)
    return prompt


def make_clip(*prompted, num_frames=3, seed=0, size=SIZE):
    """A clip of rectangles on noise; one object for each (kind, frame, ...) of `prompted`."""
    rng = np.random.default_rng(seed)
    masks = moving_masks(num_frames, len(prompted), (size, size))
    images = rng.normal(size=(num_frames, 3, size, size)).astype(np.float32)
    for t in range(num_frames):
        for k in range(len(prompted)):
            images[t, :, masks[t, k]] += np.array([k + 1, -k, 1], np.float32)
    prompts = [
        make_prompt(kind, masks[t, k], object_id=k + 1, frame_index=t)
        for k, (kind, *frames) in enumerate(prompted)
        for t in frames
    ]
    return Clip(
        images=torch.from_numpy(images),
        masks=torch.from_numpy(masks),
        prompts=prompts,
        video_id=f"clip {seed}",
        frame_indices=list(range(num_frames)),
        object_ids=list(range(1, len(prompted) + 1)),
        frame_valid=torch.ones(num_frames, dtype=torch.bool),
        frame_size=(size, size),
    )


def only(clip, k):
    """The clip with object k alone."""
    return Clip(
        images=clip.images,
        masks=clip.masks[:, k : k + 1],
        prompts=[p for p in clip.prompts if p["object_id"] == k + 1],
        video_id=clip.video_id,
        frame_indices=clip.frame_indices,
        object_ids=[k + 1],
        frame_valid=clip.frame_valid,
        frame_size=clip.frame_size,
    )


def make_model(trainable=("*",), *, config=DEMO, **settings):
    """Random weights that call every object visible: a gated one passes no gradient."""
    torch.manual_seed(0)
    settings = {"device": "cpu", "image_size": SIZE, **settings}
    model = SAM2Model(None, config, trainable, **settings).load().eval()
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 4
    return model


@pytest.fixture(scope="module")
def shared():
    """For tests that change nothing."""
    return make_model()


def loss_of(model, *clips):
    batch = collate_fn(clips)
    outputs = model(batch)
    return compute_losses(outputs["frames"], batch.masks, LossConfig(), batch.object_frame_valid)[
        "loss"
    ]


def assert_close(a, b):
    for name in ("pred_masks", "iou_predictions", "object_score_logits"):
        torch.testing.assert_close(a[name], b[name], rtol=0, atol=1e-4, msg=name)


# -- constructor and load -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image_size": 100}, r"model\.image_size: 100 must be a multiple of 32.*96"),
        ({"image_size": 0}, r"model\.image_size: 0"),
        ({"num_maskmem": -1}, r"model\.num_maskmem: -1"),
        ({"max_obj_ptrs_in_encoder": 1}, r"model\.max_obj_ptrs_in_encoder: 1 .*divide by zero"),
        ({"max_obj_ptrs_in_encoder": -2}, r"model\.max_obj_ptrs_in_encoder: -2"),
        ({"memory_gradient": 0}, r"model\.memory_gradient: 0"),
        ({"memory_gradient": "detatched"}, r"model\.memory_gradient: 'detatched'"),
    ],
)
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(UserError, match=message):
        SAM2Model(None, DEMO, **settings)


def test_load_errors(tmp_path):
    def load(**settings):
        settings = {"config_path": DEMO, "device": "cpu", "image_size": SIZE, **settings}
        return SAM2Model(settings.pop("checkpoint_path", None), **settings).load()

    with pytest.raises(UserError, match=r"model\.config_path"):
        load(config_path="nowhere.yaml")
    with pytest.raises(UserError, match=r"model\.checkpoint_path: no file"):
        load(checkpoint_path=tmp_path / "nowhere.pt")
    with pytest.raises(UserError, match=r"'memory_attn'.*did you mean memory_att"):
        load(trainable_modules=["memory_attn"])
    with pytest.raises(UserError, match=r"unknown parameter 'num_mask_mem'; did you mean num_mask"):
        load(num_mask_mem=7)


def test_no_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    model = SAM2Model(None, DEMO, image_size=SIZE)  # the guide's default device is cuda
    assert model.device == torch.device("cuda")
    with pytest.raises(UserError, match="cuda is not available here; use `cpu`"):
        model.load()
    assert model.load("cpu").device == torch.device("cpu")


def test_not_loaded():
    model = SAM2Model(None, DEMO, device="cpu", image_size=SIZE)
    for use in (
        lambda: model.image_encoder,
        lambda: model(collate_fn([make_clip(("mask", 0))])),
        lambda: model.configure_for_training(MEMORY),
    ):
        with pytest.raises(RuntimeError, match=r"call load\(\)"):
            use()


def test_guide_defaults():
    model = SAM2Model(None, "configs/sam2.1_hiera_t.yaml")
    assert model.trainable_modules == list(MEMORY)
    assert (model.image_size, model.num_maskmem) == (512, 7)
    config = ModelConfig()
    assert config.trainable_modules == MEMORY
    assert (config.image_size, config.num_maskmem, config.memory_gradient) == (512, 7, "full")


def test_load_takes_weights_and_options(tmp_path):
    source = make_model()
    path = tmp_path / "weights.pt"
    torch.save({"model": source.sam2.state_dict()}, path)
    settings = {"device": "cpu", "image_size": SIZE, "fixed_no_obj_ptr": False}
    model = SAM2Model(path, DEMO, MEMORY, **settings).load()
    assert model.load() is model
    assert model.sam2.fixed_no_obj_ptr is False
    for name, value in model.sam2.state_dict().items():
        assert torch.equal(value, source.sam2.state_dict()[name]), name
    assert model.memory_attention is model.sam2.memory_attention
    assert model.memory_encoder is model.sam2.memory_encoder
    assert model.image_encoder is model.sam2.image_encoder


# -- what is trained ------------------------------------------------------------------------------


def test_configure_for_training_by_module_parameter_and_pattern():
    model = make_model(MEMORY)
    total = sum(p.numel() for p in model.parameters())

    def trained():
        return set(model.trainable_parameters())

    assert {name.split(".")[0] for name in trained()} == set(MEMORY)
    report = model.configure_for_training(
        ["mask_decoder", "maskmem_tpos_enc", "*.obj_score_token*"]
    )
    assert trained() == {
        name
        for name, _ in model.sam2.named_parameters()
        if name.startswith("sam_mask_decoder.") or name == "maskmem_tpos_enc"
    }
    assert report["mask_decoder"][0] == report["mask_decoder"][1] > 0
    assert report["maskmem_tpos_enc"] == (7 * 32, 7 * 32)
    assert report["memory_attention"][0] == 0
    assert report["prompt_encoder"][0] == 0
    assert sum(count for _, count in report.values()) == total == 2_585_298
    assert report == model.parameter_report()
    with pytest.raises(UserError, match=r"model\.trainable_modules: 'mask_decoderr'"):
        model.configure_for_training(["mask_decoderr"])


def test_frozen_modules_stay_in_eval_mode():
    model = make_model(["memory_attention.layers.1.linear1", "no_mem_embed"]).train()
    modules = dict(model.sam2.named_modules())
    layer = modules["memory_attention.layers.1"]
    assert model.training
    assert layer.training
    assert layer.linear1.training
    assert layer.dropout.training  # without parameters: as the layer that holds it
    assert not layer.linear2.training
    assert not layer.self_attn.training
    for name in ("image_encoder", "memory_encoder", "memory_attention.layers.0.dropout1"):
        assert not modules[name].training, name
    model.eval()
    assert not any(module.training for module in model.modules())
    model.train()
    model.configure_for_training(["memory_encoder"])
    assert modules["memory_encoder"].training
    assert not modules["memory_attention"].training


def test_no_dropout_in_frozen_attention(tmp_path):
    """SAM 2's configs have a dropout of 0.1 in memory attention: off while it is frozen."""
    config = tmp_path / "dropout.yaml"
    config.write_text(re.sub(r"dropout: 0\.0", "dropout: 0.5", DEMO.read_text()))
    model = make_model(["memory_encoder"], config=config).train()
    batch = collate_fn([make_clip(("mask", 0))])
    with torch.no_grad():
        assert torch.equal(model(batch)["pred_masks"], model(batch)["pred_masks"])
        model.configure_for_training(["memory_attention"])
        assert not torch.equal(model(batch)["pred_masks"], model(batch)["pred_masks"])


def test_frozen_is_bit_identical_and_trained_all_changes():
    model = make_model((*MEMORY, "maskmem_tpos_enc")).train()
    before = {name: value.clone() for name, value in model.sam2.state_dict().items()}
    trained = model.trainable_parameters()
    optimizer = build_optimizer(trained, OptimizerConfig(learning_rate=1e-3, weight_decay=0.0))
    for seed in range(2):
        optimizer.zero_grad()
        loss_of(model, make_clip(("mask", 0), ("point", 0), num_frames=4, seed=seed)).backward()
        optimizer.step()
    for name, value in model.sam2.state_dict().items():
        assert torch.equal(value, before[name]) == (name not in trained), name
    assert len(trained) > 80


# -- gradient audit -------------------------------------------------------------------------------


def tensors_with_gradient(model, prefix=""):
    return {
        name
        for name, parameter in model.sam2.named_parameters()
        if name.startswith(prefix) and parameter.grad is not None and parameter.grad.any()
    }


# Without a gradient while every object is seen and called visible.
ONLY_FOR_ABSENCE = {"no_obj_ptr", "no_obj_embed_spatial"}


@pytest.mark.parametrize("kind", ["mask", "point", "bbox"])
def test_gradient_audit(kind):
    model = make_model().train()
    loss_of(model, make_clip((kind, 0), num_frames=4)).backward()
    assert len(tensors_with_gradient(model, "memory_encoder.")) == 40
    assert len(tensors_with_gradient(model, "obj_ptr_proj.")) == 6
    assert len(tensors_with_gradient(model, "obj_ptr_tpos_proj.")) == 2
    attention = {n for n, _ in model.sam2.named_parameters() if n.startswith("memory_attention.")}
    assert tensors_with_gradient(model, "memory_attention.") == attention

    names = {n for n, _ in model.sam2.named_parameters() if "." not in n or "mask_downsample" in n}
    silent = names - tensors_with_gradient(model)
    downsample = {"mask_downsample.weight", "mask_downsample.bias"}
    expected = {"no_mem_embed"} if kind == "mask" else downsample
    assert silent == {"no_mem_pos_enc"} | ONLY_FOR_ABSENCE | expected


def test_absence_trains_its_embeddings():
    model = make_model().train()
    with torch.no_grad():
        model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias -= 8
    loss_of(model, make_clip(("mask", 0), num_frames=4)).backward()
    assert tensors_with_gradient(model) >= ONLY_FOR_ABSENCE


def test_mask_prompt_comes_back(shared):
    clip = make_clip(("mask", 0))
    with torch.no_grad():
        output = shared(collate_fn([clip]))
    assert torch.equal(output["pred_masks"][0, 0, 0] == 10, clip.masks[0, 0])
    assert (output["pred_masks"][0, 0, 0].abs() == 10).all()
    assert output["iou_predictions"][0, 0, 0] == 1
    assert output["object_score_logits"][0, 0, 0] == 10


def test_the_mask_of_highest_predicted_iou_comes_out(shared):
    with torch.no_grad():
        output = shared(collate_fn([make_clip(("point", 0), ("bbox", 0))]))
    for t, passes in enumerate(output["frames"]):
        for prediction in passes:
            candidates = prediction.mask_logits.shape[1]
            # A box counts as two points: no choice. One click and tracking give three masks.
            assert candidates == (1 if t == 0 and prediction.objects.tolist() == [1] else 3)
            best = prediction.iou_predictions.argmax(1)
            for row, k in enumerate(prediction.objects.tolist()):
                assert torch.equal(
                    output["pred_masks"][0, t, k], prediction.mask_logits[row, best[row]]
                )
                assert output["iou_predictions"][0, t, k] == prediction.iou_predictions[row].max()


def test_gradient_through_pred_masks():
    """Through the stacked output and through the frames' predictions it is the same."""
    model = make_model(["memory_encoder"])
    batch = collate_fn([make_clip(("point", 0), ("bbox", 1)), make_clip(("mask", 0), seed=1)])
    weights = torch.randn(2, 3, 2, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    weights[0, 0, 1] = 0  # before its prompt

    outputs = model(batch)
    (outputs["pred_masks"] * weights).mean().backward()
    stacked = {n: p.grad.clone() for n, p in model.trainable_parameters().items()}

    model.zero_grad()
    total = torch.zeros(())
    places = batch.object_valid.nonzero().tolist()
    for t, passes in enumerate(model(batch)["frames"]):
        for prediction in passes:
            rows = torch.arange(len(prediction.objects))
            best = prediction.mask_logits[rows, prediction.iou_predictions.argmax(1)]
            for mask, k in zip(best, prediction.objects.tolist(), strict=True):
                clip, slot = places[k]
                total = total + (mask * weights[clip, t, slot]).sum()
    (total / weights.numel()).backward()
    for name, parameter in model.trainable_parameters().items():
        torch.testing.assert_close(parameter.grad, stacked[name], rtol=1e-4, atol=1e-9, msg=name)
        assert stacked[name].any(), name


# -- forward: a batch is its objects alone --------------------------------------------------------


def assert_objects_alone_are_equal(model, clip, output, row=0):
    for k in range(len(clip.object_ids)):
        with torch.no_grad():
            alone = model(collate_fn([only(clip, k)]))
        num_frames = len(clip.images)
        for name in ("pred_masks", "iou_predictions", "object_score_logits"):
            torch.testing.assert_close(
                output[name][row, :num_frames, k], alone[name][0, :, 0], rtol=0, atol=1e-4
            )


def test_kinds_and_frames_mixed_in_one_clip(shared):
    clip = make_clip(
        ("mask", 0), ("point", 1), ("bbox", 0), ("points", 0), ("point", 0), num_frames=4
    )
    batch = collate_fn([clip])
    with torch.no_grad():
        output = shared(batch)
    assert_objects_alone_are_equal(shared, clip, output)
    # Four kinds of pass on frame 0 over two groups, then one pass a group.
    assert [len(passes) for passes in output["frames"]] == [3, 2, 2, 2]
    for t, passes in enumerate(output["frames"]):
        objects = sorted(k for prediction in passes for k in prediction.objects.tolist())
        assert objects == [k for k in range(5) if t >= 1 or k != 1]


def test_two_conditioning_frames(shared):
    clip = make_clip(("point", 0, 2), ("mask", 0), ("bbox", 2, 0), num_frames=4)
    with torch.no_grad():
        output = shared(collate_fn([clip]))
    assert_objects_alone_are_equal(shared, clip, output)


def test_clips_mixed_in_one_batch(shared):
    clips = [
        make_clip(("mask", 0), ("bbox", 1)),
        make_clip(("point", 0), seed=1),
        make_clip(("bbox", 1), ("mask", 1), ("point", 0), seed=2),
    ]
    with torch.no_grad():
        output = shared(collate_fn(clips))
    for row, clip in enumerate(clips):
        assert_objects_alone_are_equal(shared, clip, output, row)


def test_padding_is_invisible(shared):
    """A short clip gets the same answer beside a long one: SAM 2's time code counts real frames."""
    clips = [
        make_clip(("point", 0), ("mask", 1), num_frames=3),
        make_clip(("mask", 0), num_frames=5),
    ]
    batch = collate_fn(clips)
    with torch.no_grad():
        output = shared(batch)
    for row, clip in enumerate(clips):
        assert_objects_alone_are_equal(shared, clip, output, row)
    assert (output["pred_masks"][0, 3:] == -1024).all()
    assert [sorted(p.objects.tolist()) for p in output["frames"][4]] == [[2]]


def test_padding_has_no_loss():
    model = make_model(MEMORY)
    short, long = make_clip(("point", 0), num_frames=2), make_clip(("mask", 0), num_frames=4)
    both = loss_of(model, short, long)
    apart = (loss_of(model, short) + loss_of(model, long)) / 2  # the mean over objects
    assert both.item() == pytest.approx(apart.item(), rel=1e-5)


def test_frames_before_the_prompt(shared):
    clip = make_clip(("mask", 2), num_frames=4)
    with torch.no_grad():
        output = shared(collate_fn([clip]))
    assert (output["pred_masks"][0, :2] == -1024).all()
    assert (output["object_score_logits"][0, :2] == -10).all()
    assert (output["iou_predictions"][0, :2] == 0).all()
    assert [len(passes) for passes in output["frames"]] == [0, 0, 1, 1]
    assert (output["pred_masks"][0, 2:] > -1024).all()


def test_an_empty_prompt_leaves_its_object_out(shared):
    clip = make_clip(("point", 0), ("empty", 0), ("mask", 0))
    with torch.no_grad():
        output = shared(collate_fn([clip]))
        nobody = shared(collate_fn([make_clip(("empty", 0))]))
    assert (output["pred_masks"][0, :, 1] == -1024).all()
    assert (nobody["pred_masks"] == -1024).all()
    assert nobody["pred_masks"].shape == (1, 3, 1, SIZE, SIZE)
    for k in (0, 2):
        with torch.no_grad():
            alone = shared(collate_fn([only(clip, k)]))
        torch.testing.assert_close(
            output["pred_masks"][0, :, k], alone["pred_masks"][0, :, 0], rtol=0, atol=1e-4
        )


def test_an_empty_mask_prompt_says_nothing(shared):
    clip = make_clip(("mask", 0))
    clip.prompts[0]["mask"] = np.zeros((SIZE, SIZE), bool)
    with torch.no_grad():
        assert (shared(collate_fn([clip]))["pred_masks"] == -1024).all()


def test_bfloat16_autocast_keeps_outputs_in_float32(shared):
    batch = collate_fn([make_clip(("mask", 0), ("point", 0), ("bbox", 1))])
    with torch.no_grad():
        full = shared(batch)
        with torch.autocast("cpu", torch.bfloat16):
            half = shared(batch)
    for name in ("pred_masks", "iou_predictions", "object_score_logits"):
        assert half[name].dtype == torch.float32
        assert half[name].isfinite().all()
    # Away from rounding the two agree.
    assert (half["object_score_logits"] - full["object_score_logits"]).abs().max() < 0.5


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("memory_attention", r"expected a list of names, \['memory"),
        (None, "expected a list"),
        ([1], "1 is no text"),
    ],
)
def test_trainable_modules_are_a_list_of_names(names, message):
    with pytest.raises(UserError, match=message):
        SAM2Model(None, DEMO, names)


def test_no_such_device():
    with pytest.raises(UserError, match="device: 'cudua'; expected cpu, cuda"):
        SAM2Model(None, DEMO, device="cudua")
    with pytest.raises(UserError, match="device: meta is not available here"):
        SAM2Model(None, DEMO, device="meta", image_size=SIZE).load()
