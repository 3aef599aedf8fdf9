"""The official recipe's experiment, number by number, against Meta's own YAML and optimiser."""

import inspect
from fnmatch import fnmatchcase
from functools import cache
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import SIZE, make_coco
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from sam2train.corrections import SimulatedUser
from sam2train.datasets import COCODataset
from sam2train.experiment import build_model, load_experiment
from sam2train.files import REPOSITORY
from sam2train.losses import compute_losses
from sam2train.optimizer import build_optimizer, set_learning_rates
from sam2train.pretrained import resolve_config
from sam2train.trainer import Trainer
from sam2train.transforms import MEAN, STD, resize_image

OFFICIAL = "configs/sam2.1_training/sam2.1_hiera_b+_MOSE_finetune.yaml"
EXPERIMENT = REPOSITORY / "experiments" / "official_recipe_base_plus.yaml"


@cache
def official():
    """Meta's recipe as nested values, its references resolved."""
    path = Path(resolve_config("configs/sam2.1_hiera_b+.yaml")).parents[2] / OFFICIAL
    if not path.exists():
        pytest.skip("this sam2 package has no training configs")
    text = path.read_text()
    raw = yaml.safe_load(text)["scratch"]
    for name in ("base_lr", "vision_lr"):
        text = text.replace(f"${{divide:${{scratch.{name}}},10}}", repr(raw[name] / 10))
    text = text.replace("${times:${scratch.num_epochs},${scratch.phases_per_epoch}}", "40")
    return OmegaConf.to_container(OmegaConf.create(text), resolve=True)


@cache
def ours():
    return load_experiment(EXPERIMENT)


def small_and_random():
    """The experiment on a model that any machine holds: the tensors are those of base plus."""
    model = ours().model.model_copy(update={"checkpoint_path": None, "image_size": 64})
    trainer = ours().trainer.model_copy(update={"device": "cpu"})
    return ours().model_copy(update={"model": model, "trainer": trainer})


def leaves(tree, prefix=""):
    """Dotted path -> value."""
    if isinstance(tree, dict | list):
        pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
        return {
            path: value
            for key, branch in pairs
            for path, value in leaves(branch, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: tree}


def architecture():
    """The leaves of the config that the experiment builds."""
    config = OmegaConf.load(resolve_config(ours().model.config_path))
    return leaves(OmegaConf.to_container(config)["model"])


def prob_of(kind):
    dataset = ours().dataset
    weights = dict(zip(dataset.prompt_types, dataset.prompt_weights, strict=True))
    return weights[kind] / sum(weights.values())


TRANSFORMS = "vos.train_transforms.0.transforms"
OPTIONS = "trainer.optim.options"
CLICKS = 1 - 0.5  # the share of clips without a mask as prompt

# Meta's number -> ours.
SAME = {
    "scratch.resolution": lambda e: e.model.image_size,
    "scratch.train_batch_size": lambda e: e.dataset.batch_size,
    "scratch.num_train_workers": lambda e: e.dataset.num_workers,
    "scratch.num_frames": lambda e: e.dataset.video_clip_length,
    "scratch.max_num_objects": lambda e: e.dataset.max_objects,
    "scratch.base_lr": lambda e: e.optimizer.learning_rate,
    "scratch.vision_lr": lambda e: e.optimizer.learning_rates["image_encoder"],
    "launcher.gpus_per_node": lambda e: e.trainer.grad_accumulation,
    f"{TRANSFORMS}.1.degrees": lambda e: e.augment.degrees,
    f"{TRANSFORMS}.1.shear": lambda e: e.augment.shear,
    f"{TRANSFORMS}.2.sizes": lambda e: e.dataset.image_size[0],
    f"{TRANSFORMS}.2.square": lambda e: e.dataset.image_size[0] == e.dataset.image_size[1],
    f"{TRANSFORMS}.3.brightness": lambda e: e.augment.brightness,
    f"{TRANSFORMS}.3.contrast": lambda e: e.augment.contrast,
    f"{TRANSFORMS}.3.saturation": lambda e: e.augment.saturation,
    f"{TRANSFORMS}.4.p": lambda e: e.augment.greyscale,
    f"{TRANSFORMS}.5.brightness": lambda e: e.augment.frame_brightness,
    f"{TRANSFORMS}.5.contrast": lambda e: e.augment.frame_contrast,
    f"{TRANSFORMS}.5.saturation": lambda e: e.augment.frame_saturation,
    **{f"{TRANSFORMS}.7.mean.{k}": lambda e, k=k: round(float(MEAN[k]), 6) for k in range(3)},
    **{f"{TRANSFORMS}.7.std.{k}": lambda e, k=k: round(float(STD[k]), 6) for k in range(3)},
    "trainer.seed_value": lambda e: e.trainer.seed,
    "trainer.model.image_size": lambda e: e.model.image_size,
    "trainer.model.num_maskmem": lambda e: e.model.num_maskmem,
    "trainer.model.image_encoder.trunk.drop_path_rate": lambda e: e.model.drop_path_rate,
    "trainer.model.prob_to_use_pt_input_for_train": lambda e: prob_of("point") + prob_of("bbox"),
    "trainer.model.prob_to_use_box_input_for_train": lambda e: prob_of("bbox") / CLICKS,
    "trainer.model.prob_to_sample_from_gt_for_train": (
        lambda e: e.interaction.prob_to_sample_from_gt
    ),
    "trainer.model.num_frames_to_correct_for_train": lambda e: e.interaction.num_frames_to_correct,
    "trainer.model.rand_frames_to_correct_for_train": (
        lambda e: e.interaction.rand_frames_to_correct
    ),
    "trainer.model.add_all_frames_to_correct_as_cond": (
        lambda e: e.interaction.add_all_frames_to_correct_as_cond
    ),
    "trainer.model.num_correction_pt_per_frame": (
        lambda e: e.interaction.num_correction_pt_per_frame
    ),
    "trainer.model.num_init_cond_frames_for_train": lambda e: e.dataset.max_conditioning_frames,
    "trainer.data.train.shuffle": lambda e: e.dataset.shuffle,
    "trainer.data.train.batch_sizes.0": lambda e: e.dataset.batch_size,
    "trainer.data.train.num_workers": lambda e: e.dataset.num_workers,
    "trainer.data.train.datasets.0.dataset.datasets.0.sampler.num_frames": (
        lambda e: e.dataset.video_clip_length
    ),
    "trainer.data.train.datasets.0.dataset.datasets.0.sampler.max_num_objects": (
        lambda e: e.dataset.max_objects
    ),
    "trainer.optim.amp.enabled": lambda e: e.trainer.bf16,
    "trainer.optim.gradient_clip.max_norm": lambda e: e.trainer.max_grad_norm,
    "trainer.optim.param_group_modifiers.0.layer_decay_value": lambda e: e.optimizer.layer_decay,
    "trainer.optim.param_group_modifiers.0.overrides.0.value": (
        lambda e: e.optimizer.layer_decay_overrides["*pos_embed*"]
    ),
    f"{OPTIONS}.lr.0.scheduler.start_value": lambda e: e.optimizer.learning_rate,
    f"{OPTIONS}.lr.0.scheduler.end_value": (
        lambda e: e.optimizer.learning_rate * e.optimizer.final_ratio
    ),
    f"{OPTIONS}.lr.1.scheduler.start_value": (
        lambda e: e.optimizer.learning_rates["image_encoder"]
    ),
    f"{OPTIONS}.lr.1.scheduler.end_value": (
        lambda e: e.optimizer.final_learning_rates["image_encoder"]
    ),
    f"{OPTIONS}.weight_decay.0.scheduler.value": lambda e: e.optimizer.weight_decay,
    "trainer.loss.all.weight_dict.loss_mask": lambda e: e.loss.focal,
    "trainer.loss.all.weight_dict.loss_dice": lambda e: e.loss.dice,
    "trainer.loss.all.weight_dict.loss_iou": lambda e: e.loss.iou,
    "trainer.loss.all.weight_dict.loss_class": lambda e: e.loss.object_score,
    "trainer.loss.all.supervise_all_iou": lambda e: e.loss.supervise_all_iou,
    "trainer.loss.all.iou_use_l1_loss": lambda e: e.loss.iou_l1,
    "trainer.logging.log_freq": lambda e: e.trainer.log_every,
}

# What has no key here because it is always so, with the value that Meta has.
ALWAYS = {
    **{f"{TRANSFORMS}.{k}.consistent_transform": k != 5 for k in range(6)},
    "trainer.model.rand_init_cond_frames_for_train": True,  # 1 to max_conditioning_frames
    "trainer.optim.gradient_clip.norm_type": 2,
    f"{OPTIONS}.weight_decay.1.scheduler.value": 0.0,
    "trainer.loss.all.pred_obj_scores": True,
    "trainer.loss.all.focal_gamma_obj_score": 0.0,  # these two: plain binary cross-entropy
    "trainer.loss.all.focal_alpha_obj_score": -1.0,
    "trainer.checkpoint.model_weight_initializer.strict": True,
}

# How Meta's program runs on its machines, what it does in evaluation, and the length of its epochs,
# which `test_the_number_of_steps` looks at.
NOT_TRAINING = (
    "trainer.model.*_for_eval",
    "trainer.model.use_act_ckpt_iterative_pt_sampling",
    "trainer.max_epochs",
    "trainer.data.train.phases_per_epoch",
    "trainer.data.train.pin_memory",
    "trainer.data.train.drop_last",
    "trainer.data.train.collate_fn._partial_",
    "trainer.data.train.datasets.0.dataset.datasets.0.training",
    "trainer.data.train.datasets.0.dataset.datasets.0.multiplier",
    "trainer.distributed.*",
    "trainer.logging.tensorboard_writer.*",
    "trainer.checkpoint.save_freq",
    "trainer.checkpoint.model_weight_initializer._partial_",
    "trainer.optim.param_group_modifiers.0._partial_",
    "scratch.num_epochs",
    "scratch.phases_per_epoch",
    "dataset.multiplier",
    "launcher.num_nodes",
    "submitit.*",
)


@pytest.mark.parametrize("path", SAME)
def test_a_number(path):
    theirs = leaves(official())[path]
    assert theirs is not None
    value = SAME[path](ours())
    assert type(value) is bool or type(theirs) is not bool
    assert value == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("path", ALWAYS)
def test_what_is_always_so(path):
    assert leaves(official())[path] == ALWAYS[path]


def test_words():
    theirs, experiment = leaves(official()), ours()
    modifier = "trainer.optim.param_group_modifiers.0"
    assert theirs[f"{modifier}.apply_to"] == "image_encoder.trunk"
    assert theirs[f"{modifier}.overrides.0.pattern"] in experiment.optimizer.layer_decay_overrides
    assert theirs["trainer.optim.amp.amp_dtype"] == "bfloat16"
    assert theirs[f"{OPTIONS}.lr.0.scheduler._target_"].endswith("CosineParamScheduler")
    assert experiment.optimizer.schedule == "cosine"
    assert experiment.optimizer.warmup_steps == 0
    state = "trainer.checkpoint.model_weight_initializer.state_dict.checkpoint_path"
    assert Path(theirs[state]) == Path(experiment.model.checkpoint_path)
    assert theirs[f"{TRANSFORMS}.1.image_interpolation"] == "bilinear"
    assert prob_of("mask") == CLICKS == 0.5
    assert prob_of("point") == prob_of("bbox") == 0.25


def test_chances_and_noise_that_meta_leaves_to_its_code():
    transforms = pytest.importorskip("training.dataset.transforms")
    losses = pytest.importorskip("training.loss_fns")
    from sam2.modeling.sam2_utils import sample_box_points

    def default(function, name):
        return inspect.signature(function).parameters[name].default

    experiment = ours()
    flip = default(transforms.RandomHorizontalFlip, "p")
    assert experiment.augment.horizontal_flip == flip == 0.5
    assert experiment.dataset.box_jitter == default(sample_box_points, "noise") == 0.1
    loss = losses.MultiStepMultiMasksAndIous
    assert experiment.loss.focal_alpha == default(loss, "focal_alpha") == 0.25
    assert experiment.loss.focal_gamma == default(loss, "focal_gamma") == 2
    betas = default(torch.optim.AdamW, "betas")
    assert experiment.optimizer.betas == betas == (0.9, 0.999)


def test_the_number_of_steps():
    """40 epochs; in each, 8 GPUs share every video twice, a clip a step."""
    theirs = official()
    num_videos = 1246  # the lines of training/assets/MOSE_sample_train_list.txt
    clips = theirs["dataset"]["multiplier"] * num_videos
    a_gpu = -(-clips // theirs["launcher"]["gpus_per_node"])  # the sampler fills the last step up
    assert ours().trainer.num_steps == theirs["scratch"]["num_epochs"] * a_gpu


# -- what Meta's program does otherwise -----------------------------------------------------------


def header():
    """The comment at the top of the experiment, as one line."""
    comment = EXPERIMENT.read_text().split("\ndataset:")[0]
    return " ".join(comment.replace("\n#", " ").split())


def test_metas_sampler_takes_objects_of_the_first_frame_only(tmp_path):
    sampler = pytest.importorskip("training.dataset.vos_sampler")
    assert "Meta takes only objects that are visible on the first frame of the clip" in header()
    shows = {t: {1: torch.ones(1), 2: torch.tensor([float(t > 0)])} for t in range(8)}
    video = SimpleNamespace(video_name="a", frames=[SimpleNamespace(frame_idx=t) for t in shows])
    loader = SimpleNamespace(load=shows.get)
    assert sampler.RandomUniformSampler(8, 3).sample(video, loader).object_ids == [1]
    path = make_coco(tmp_path, num_frames=8, absent=[(1, 0, 2)])
    assert COCODataset(path, SIZE, 8, max_objects=3)[0].object_ids == [1, 2]
    assert "Here short ones are padded" in header()
    with pytest.raises(Exception, match="only has 8 annotated"):
        sampler.RandomUniformSampler(9, 3).sample(video, loader)
    assert COCODataset(path, SIZE, 9)[0].frame_valid.tolist() == [True] * 8 + [False]


def test_metas_transforms_resize_last_and_bilinearly():
    transforms = pytest.importorskip("training.dataset.transforms")
    steps = official()["vos"]["train_transforms"][0]["transforms"]
    names = [step["_target_"].rsplit(".")[-1] for step in steps]
    assert names[:3] == ["RandomHorizontalFlip", "RandomAffine", "RandomResizeAPI"]
    assert "resizes them afterwards, bilinearly" in header()
    resized = inspect.signature(transforms.F.resize).parameters["interpolation"].default
    assert resized == transforms.InterpolationMode.BILINEAR
    assert "interpolation" not in inspect.getsource(transforms.resize)
    picture = (np.random.default_rng(0).random((9, 13, 3)) * 255).astype(np.uint8)
    bicubic = Image.fromarray(picture).resize((20, 20), Image.Resampling.BICUBIC)
    assert np.array_equal(resize_image(picture, (20, 20)), bicubic)


def test_metas_turn_is_dropped_where_it_loses_an_object_of_the_first_frame():
    transforms = pytest.importorskip("training.dataset.transforms")
    data = pytest.importorskip("training.utils.data_utils")
    assert "Meta leaves the clip unturned" in header()
    corner = torch.zeros(16, 16, dtype=torch.uint8)
    corner[0, 0] = 1
    objects = [data.Object(1, 0, corner), data.Object(2, 0, torch.ones_like(corner))]
    frame = data.Frame(torch.rand(3, 16, 16), objects)
    clip = data.VideoDatapoint([frame], 0, (16, 16))
    turn = transforms.RandomAffine(
        [45, 45], True, log_warning=False, image_interpolation="bilinear"
    )
    before = frame.data.clone()
    assert torch.equal(turn(clip).frames[0].data, before)
    del objects[0]
    assert not torch.equal(turn(clip).frames[0].data, before)


def test_metas_model_draws_alike_on_every_gpu_and_prompts_absent_objects():
    model = pytest.importorskip("training.model.sam2")
    assert "once for all 8 clips of a step" in header()
    assert "default_rng(seed=42)" in inspect.getsource(model.SAM2Train.__init__)
    assert "an empty box or a click on the background" in header()
    empty = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    points, labels = model.get_next_point(empty, None, "uniform")
    assert (points.shape, labels.tolist()) == ((1, 1, 2), [[0]])


def test_the_architecture():
    """The config that the weights are published with says the same as the one they train with."""
    theirs = leaves(official()["trainer"]["model"])
    published = architecture()
    for path in theirs.keys() & published.keys() - {"_target_"}:
        assert theirs[path] == published[path], path
    assert published.keys() - theirs.keys() == {"compile_image_encoder"}
    of_training = {f"trainer.model.{path}" for path in theirs.keys() - published.keys()}
    assert all(covered(path) for path in of_training)


def covered(path):
    return path in SAME or path in ALWAYS or any(fnmatchcase(path, p) for p in NOT_TRAINING)


def test_no_number_is_left_out():
    built = {f"trainer.model.{path}" for path in architecture()}
    numbers = {
        path for path, value in leaves(official()).items() if isinstance(value, bool | int | float)
    }
    # The transforms are said once and referred to.
    numbers = {path for path in numbers if ".dataset.datasets.0.transforms." not in path}
    assert {path for path in numbers - built if not covered(path)} == set()


@pytest.mark.parametrize("where", [0.0, 0.3, 0.999])
def test_learning_rate_and_weight_decay_of_every_parameter(where):
    """What SAM 2's own optimiser gives each of the tensors of base plus, along the cosine."""
    pytest.importorskip("fvcore")
    reference = pytest.importorskip("training.optimizer")
    experiment = small_and_random()
    model = build_model(experiment)
    optim = official()["trainer"]["optim"]
    theirs = reference.construct_optimizer(
        model.sam2,
        OmegaConf.create(optim["optimizer"]),
        OmegaConf.create(optim["options"]),
        [OmegaConf.create(modifier) for modifier in optim["param_group_modifiers"]],
    )
    theirs.step_schedulers(where, 0)
    optimizer = build_optimizer(model.trainable_parameters(), experiment.optimizer, model.sam2)
    set_learning_rates(optimizer, round(1000 * where), 1000, experiment.optimizer)

    def settings(groups):
        return {
            id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]
        }

    expected, found = settings(theirs.optimizer.param_groups), settings(optimizer.param_groups)
    names = {id(p): name for name, p in model.sam2.named_parameters()}
    assert expected.keys() == found.keys() == names.keys()
    for key, name in names.items():
        assert found[key] == pytest.approx(expected[key], rel=1e-9), name
    rates = {lr for lr, _ in found.values()}
    assert len(rates) == len({lr for lr, _ in expected.values()}) > 24


def scaled_down(data, **more):
    """The experiment on the demo's model and the data of a test, short clips, a CPU in float32.
    Without dropped paths: what they drop hangs on how images are batched."""
    changes = {
        "dataset.dataset_type": "coco",
        "dataset.data_path": str(data),
        "dataset.image_size": [64, 64],
        "dataset.video_clip_length": 4,
        "dataset.num_workers": 0,
        "model.checkpoint_path": None,
        "model.config_path": "sam2train/configs/sam2.1_hiera_demo.yaml",
        "model.image_size": 64,
        "model.drop_path_rate": 0.0,
        "trainer.device": "cpu",
        "trainer.bf16": False,
        "tracking.mode": "disabled",
    }
    return load_experiment(EXPERIMENT, changes | more)


def test_a_step_has_the_gradient_of_one_batch_of_its_clips(tmp_path):
    """8 clips of one to three objects with the recipe's prompts, clicks, loss and clipping."""
    few = [(v, t, k) for v in range(1, 9) for t in range(10) for k in (2, 3) if k > 1 + v % 3]
    data = make_coco(
        tmp_path / "data", num_videos=8, num_frames=10, num_objects=3, size=(64, 64), absent=few
    )
    experiment = scaled_down(data)
    options = {"run_id": "run", "name": "test", "console": Console(quiet=True)}
    trainer = Trainer(experiment, tmp_path / "run", **options)
    score_head = trainer.model.sam2.sam_mask_decoder.pred_obj_score_head
    with torch.no_grad():  # random weights call every object absent, and such masks learn nothing
        score_head.layers[-1].bias += 4
    trainer.model.train()
    counts = [batch.masks.shape[1] for batch, _ in zip(trainer.batches(), range(8), strict=False)]
    assert set(counts) == {1, 2, 3}
    assert experiment.dataset.batch_size == 1

    at_once = {"dataset.batch_size": experiment.trainer.grad_accumulation}
    at_once |= {"trainer.grad_accumulation": 1}
    (batch,) = islice(Trainer(scaled_down(data, **at_once), tmp_path, **options).batches(), 1)
    assert batch.masks.shape[1] == sum(counts)
    user = SimulatedUser(experiment.interaction, experiment.trainer.seed)
    frames = trainer.model(batch, interaction=user)["frames"]
    losses = compute_losses(frames, batch.masks, experiment.loss, batch.object_frame_valid)
    losses["loss"].backward()
    expected = {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    assert norm > experiment.trainer.max_grad_norm == 0.1

    scalars = trainer.train_step(trainer.batches())
    found = {n: p.grad for n, p in trainer.parameters.items() if p.grad is not None}
    assert found.keys() == expected.keys()
    apart = [(found[n] - 0.1 / norm * expected[n]).norm() for n in found]
    assert torch.stack(apart).norm() < 1e-5 * 0.1
    assert scalars["loss"].item() == pytest.approx(losses["loss"].item(), rel=1e-5)
    assert scalars["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-5)


def test_drop_path_reaches_the_blocks():
    blocks = build_model(small_and_random()).image_encoder.trunk.blocks
    rates = [getattr(block.drop_path, "drop_prob", 0.0) for block in blocks]
    assert rates == pytest.approx([0.1 * k / (len(rates) - 1) for k in range(len(rates))])
