"""The loop: what it writes, that it resumes bit for bit, how it stops."""

import dataclasses
import io
import json
import os
import signal
from contextlib import suppress
from functools import partial

import numpy as np
import pytest
import torch
from conftest import edit, make_coco
from rich.console import Console

from sam2train import checkpoint, demo
from sam2train import trainer as trainer_module
from sam2train.clips import collate_fn
from sam2train.config_yaml import load_yaml
from sam2train.data_coco import CocoVideos
from sam2train.errors import MachineFault, UserError
from sam2train.experiment import Experiment, build_model, load_experiment
from sam2train.export import export_checkpoint
from sam2train.files import REPOSITORY
from sam2train.machine import Interrupted
from sam2train.pretrained import MEMORY, resolve_config
from sam2train.trainer import Trainer

CONFIG = "sam2train/configs/sam2.1_hiera_demo.yaml"


@pytest.fixture
def experiment(tmp_path):
    """A small experiment on a small data set; sections are changed by keyword."""
    data = str(make_coco(tmp_path / "data", num_videos=3, num_frames=5, size=(64, 64)))

    def build(**changes) -> Experiment:
        sections = {
            "dataset": {
                "data_path": data,
                "val_path": data,
                "image_size": [64, 64],
                "video_clip_length": 3,
                "prompt_types": ["point", "bbox", "mask"],
            },
            "model": {"config_path": CONFIG, "image_size": 64, "num_maskmem": 2},
            "optimizer": {"learning_rate": 1e-3},
            "trainer": {
                "num_steps": 4,
                "val_every": 2,
                "save_every": 2,
                "log_every": 1,
                "device": "cpu",
            },
            "evaluation": {"max_videos": 1, "num_overlays": 1},
            "tracking": {"mode": "disabled"},
        }
        for name, change in changes.items():
            sections[name] = {**sections.get(name, {}), **change}
        return Experiment.model_validate(sections)

    return build


def make_trainer(experiment, run_dir, **options) -> Trainer:
    quiet = Console(quiet=True)
    return Trainer(experiment, run_dir, run_id="run", name="test", console=quiet, **options)


def rows(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def weights(path) -> dict[str, torch.Tensor]:
    return checkpoint.load(path)["model"]


def assert_same(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_a_run_writes_what_the_readme_names(experiment, tmp_path):
    run_dir = tmp_path / "run"
    trainer = make_trainer(experiment(), run_dir)
    scores = trainer.run()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    assert summary["steps"] == 4
    assert summary["seconds"] > 0
    assert summary["val/J_and_F"] == scores["J_and_F"]
    assert summary["val/J"] == scores["J"]
    assert summary["val/F"] == scores["F"]
    assert summary["void"] == "ignore"
    assert summary["best/J_and_F"] >= max(summary["baseline/J_and_F"], summary["val/J_and_F"])
    report = trainer.model.parameter_report()
    assert summary["params/total"] == sum(total for _, total in report.values()) == 2_585_138
    assert summary["params/memory_encoder"] == 253_952
    trained = report["memory_encoder"][1] + report["memory_attention"][1]
    assert summary["params/trainable"] == trained

    written = rows(run_dir)
    assert [row["step"] for row in written if "val/J_and_F" in row] == [0, 2, 4]
    losses = [row for row in written if "loss" in row]
    assert [row["step"] for row in losses] == [1, 2, 3, 4]
    terms = {"loss/focal", "loss/dice", "loss/iou", "loss/object_score", "gate/fraction", "lr"}
    assert terms <= losses[0].keys()
    assert load_yaml(run_dir / "config.yaml")["trainer"]["num_steps"] == 4
    environment = json.loads((run_dir / "environment.json").read_text())
    assert environment["packages"]["torch"].startswith(torch.__version__.split("+")[0])
    assert len(list((run_dir / "overlays").glob("step_*.png"))) == 3
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "last.pt",
        "previous.pt",
        "best.pt",
    }


def test_best_is_the_checkpoint_of_the_best_score(experiment, tmp_path):
    run_dir = tmp_path / "run"
    make_trainer(experiment(), run_dir).run()
    scored = {row["step"]: row["val/J_and_F"] for row in rows(run_dir) if "val/J_and_F" in row}
    best = checkpoint.load(run_dir / "checkpoints" / "best.pt")
    assert best["step"] == max(scored, key=lambda step: (scored[step], -step))
    assert best["scores"]["J_and_F"] == max(scored.values())


CLICKS = {
    "num_correction_pt_per_frame": 2,
    "num_frames_to_correct": 3,
    "prob_to_sample_from_gt": 0.5,
}


@pytest.mark.parametrize("stop", ["crash", "signal"])
@pytest.mark.parametrize(
    ("stopped_at", "log_every", "clicks"), [(2, 3, {}), (3, 2, CLICKS)], ids=["plain", "clicks"]
)
def test_a_resumed_run_equals_one_that_was_never_stopped(
    experiment, tmp_path, monkeypatch, stopped_at, log_every, clicks, stop
):
    """Weights, optimiser, losses and scores, bit for bit, also with dropout and augmentation."""
    # The real dropout of SAM 2, switched on where the demo config has none.
    config = (tmp_path / "dropout.yaml").resolve()
    text = resolve_config(CONFIG).read_text()
    config.write_text(text.replace("dropout: 0.0", "dropout: 0.1"))
    settings = experiment(
        model={"config_path": str(config)},
        trainer={"save_every": stopped_at, "log_every": log_every, "grad_accumulation": 2},
        augment={"horizontal_flip": 0.5, "brightness": 0.2},
        interaction=clicks,
    )
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    make_trainer(settings, whole).run()

    first = make_trainer(settings, parts)
    saved = first.save

    def save_and_crash(path):
        saved(path)
        if path.name == "last.pt" and first.step == stopped_at:
            if stop == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                raise RuntimeError("the machine goes down")

    first.save = save_and_crash
    with pytest.raises(Interrupted if stop == "signal" else RuntimeError):
        first.run()
    torch.manual_seed(12345)  # another process has another state
    second = make_trainer(settings, parts, resume=parts / "checkpoints" / "last.pt")
    assert second.step == stopped_at
    second.run()

    left, right = (checkpoint.load(d / "checkpoints" / "last.pt") for d in (whole, parts))
    assert_same(left["model"], right["model"])
    best = [checkpoint.load(d / "checkpoints" / "best.pt") for d in (whole, parts)]
    assert_same(best[0]["model"], best[1]["model"])
    assert best[0]["step"] == best[1]["step"]
    assert (whole / "scores.csv").read_text() == (parts / "scores.csv").read_text()
    for a, b in zip(
        left["optimizer"]["state"].values(), right["optimizer"]["state"].values(), strict=True
    ):
        assert_same(a, b)
    timed = ("seconds", "clips_per_second", "memory_gb", "features/hit_rate")
    plain = [
        [{k: v for k, v in row.items() if k not in timed} for row in rows(d)]
        for d in (whole, parts)
    ]
    assert plain[0] == plain[1]


def test_workers_do_not_change_the_clips(experiment, tmp_path):
    for workers in (0, 2):
        settings = experiment(dataset={"num_workers": workers}, trainer={"num_steps": 3})
        make_trainer(settings, tmp_path / str(workers)).run()
    assert_same(*(weights(tmp_path / w / "checkpoints" / "last.pt") for w in ("0", "2")))


def uneven_videos(folder):
    """Two videos: 5 frames with 3 objects, and 3 frames with 2 objects, one of them late."""
    absent = [(2, t, 3) for t in range(5)] + [(2, 0, 2)]
    path = make_coco(
        folder, num_videos=2, num_frames=5, num_objects=3, size=(64, 64), absent=absent
    )

    def shorten(content):
        kept = [i for i in content["images"] if i["video_id"] == 1 or i["order_in_video"] < 3]
        ids = {image["id"] for image in kept}
        content["images"] = kept
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] in ids]

    return str(edit(path, shorten))


def gradients_of_a_step(settings, run_dir):
    """Of the first step, with the numbers that it logs."""
    trainer = make_trainer(settings, run_dir)
    with torch.no_grad():  # random weights call every object absent, and such masks learn nothing
        trainer.model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 4
    trainer.model.train()
    scalars = trainer.train_step(trainer.batches())
    found = {n: p.grad.clone() for n, p in trainer.parameters.items() if p.grad is not None}
    return found, {name: float(value) for name, value in scalars.items()}


@pytest.mark.parametrize("trained", [["*"], ["memory_attention", "memory_encoder"]])
@pytest.mark.parametrize("data", ["uneven", "late"])
@pytest.mark.parametrize("clicks", [{}, CLICKS])
def test_accumulation_equals_a_larger_batch(experiment, tmp_path, clicks, data, trained):
    """Whatever the clips: as many objects or not, as long or not, without anything to track."""
    if data == "uneven":
        data = uneven_videos(tmp_path / "uneven")
    else:
        data = late_object(tmp_path / "late", 2, late=[1])
    found = []
    for batch_size, accumulation in ((2, 1), (1, 2)):
        settings = experiment(
            dataset={
                "data_path": data,
                "val_path": None,
                "video_clip_length": 4,
                "batch_size": batch_size,
                "prompt_types": ["point", "bbox"] if clicks else ["point", "bbox", "mask"],
            },
            model={"trainable_modules": trained, "num_maskmem": 3},
            interaction=clicks,
            trainer={"grad_accumulation": accumulation, "max_grad_norm": 1e9, "audit": "warn"},
        )
        found.append(gradients_of_a_step(settings, tmp_path / str(batch_size)))
    (joint, told), (parts, told_of_parts) = found
    assert joint.keys() == parts.keys()
    assert len(joint) > 60
    norm = torch.stack([gradient.norm() for gradient in joint.values()]).norm()
    apart = torch.stack([(joint[name] - parts[name]).norm() for name in joint]).norm()
    assert norm > 1e-3
    assert apart < 1e-5 * norm
    for name in ("audit/batches_with_gradient", "features/hit_rate"):
        told.pop(name, None)
        told_of_parts.pop(name, None)
    assert told_of_parts == pytest.approx(told, rel=1e-5, abs=1e-7)
    assert {"loss", "loss/dice", "gate/fraction", "gate/loss", "grad_norm"} <= told.keys()
    assert ("interaction/iou_after" in told) == bool(clicks)


def step_zero(experiment, run_dir, **sections):
    """The rows of scores.csv at step 0, the weights, and the names of the first clips."""
    settings = experiment(**sections)
    trainer = make_trainer(settings, run_dir)
    first = {name: p.detach().clone() for name, p in trainer.parameters.items()}
    clips = next(iter(trainer.batches()))
    trainer.run()
    return (run_dir / "scores.csv").read_text(), first, (clips.names, clips.img_batch)


def test_three_seeds_for_weights_clips_and_the_prompts_of_evaluation(experiment, tmp_path):
    """Of a run each can be set apart; trainer.seed is the default of the first two."""

    def start(name, **sections):
        sections["trainer"] = {"num_steps": 0, **sections.get("trainer", {})}
        sections["evaluation"] = {"max_videos": None, **sections.get("evaluation", {})}
        return step_zero(experiment, tmp_path / name, **sections)

    def same(one, other):
        scores = one[0] == other[0]
        weights = all(torch.equal(value, other[1][name]) for name, value in one[1].items())
        clips = one[2][0] == other[2][0] and torch.equal(one[2][1], other[2][1])
        return weights, clips, scores

    one = start("one", augment={"brightness": 0.5})
    other = {"augment": {"brightness": 0.5}, "trainer": {"seed": 1}}
    assert same(one, start("trainer", **other))[:2] == (False, False)
    assert same(one, start("weights", **other, model={"seed": 0})) == (True, False, True)
    assert same(one, start("clips", **other, dataset={"seed": 0}))[:2] == (False, True)
    prompts = {"evaluation": {"seed": 1}, "augment": {"brightness": 0.5}}
    assert same(one, start("prompts", **prompts)) == (True, True, False)


def test_the_demo_at_step_zero_hangs_on_no_seed_of_the_training(tmp_path):
    folder = tmp_path / "demo"
    demo.generate(dataclasses.replace(demo.SPLITS["easy"], num_videos=2, num_frames=5), folder)
    data = str(folder / "annotations.json")
    changes = {f"dataset.{name}": data for name in ("data_path", "val_path")}
    changes |= {"dataset.test_path": None, "trainer.num_steps": 0, "trainer.device": "cpu"}
    changes |= {"tracking.mode": "disabled", "evaluation.num_overlays": 0}
    scores = []
    for name, change in (
        ("a", {}),
        ("b", {"trainer.seed": 1}),
        ("c", {"evaluation.seed": 1}),
    ):
        path = REPOSITORY / "experiments" / "coco_point_bbox.yaml"
        make_trainer(load_experiment(path, changes | change), tmp_path / name).run()
        scores.append((tmp_path / name / "scores.csv").read_text())
        mean = json.loads((tmp_path / name / "summary.json").read_text())["baseline/J_and_F"]
        assert mean > 0.1
    assert scores[0] == scores[1]
    assert scores[2] != scores[0]


def test_dropout_hangs_on_the_seed_of_the_trainer(experiment, tmp_path):
    config = (tmp_path / "dropout.yaml").resolve()
    config.write_text(resolve_config(CONFIG).read_text().replace("dropout: 0.0", "dropout: 0.1"))
    losses = []
    for k, seed in enumerate((0, 0, 1)):
        settings = experiment(
            dataset={"seed": 0, "val_path": None},
            model={"seed": 0, "config_path": str(config)},
            trainer={"seed": seed, "num_steps": 1},
        )
        make_trainer(settings, tmp_path / str(k)).run()
        losses += [row["loss"] for row in rows(tmp_path / str(k)) if "loss" in row]
    assert losses[0] == losses[1] != losses[2]


def test_only_what_is_listed_changes(experiment, tmp_path):
    settings = experiment(model={"trainable_modules": ["memory_encoder", "maskmem_tpos_enc"]})
    before = build_model(settings).sam2.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    make_trainer(settings, tmp_path / "run").run()
    after = weights(tmp_path / "run" / "checkpoints" / "last.pt")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    listed = {n for n in before if n.startswith("memory_encoder.") or n == "maskmem_tpos_enc"}
    assert changed == listed


def test_a_signal_saves_first_and_the_run_goes_on(experiment, tmp_path):
    run_dir = tmp_path / "run"
    settings = experiment(trainer={"save_every": 100, "val_every": 100})
    trainer = make_trainer(settings, run_dir)
    step = trainer.train_step

    def step_and_signal(batches):
        scalars = step(batches)
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return scalars

    trainer.train_step = step_and_signal
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as stopped:
        trainer.run()
    assert stopped.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    last = run_dir / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["step"] == 2
    make_trainer(settings, run_dir, resume=last).run()
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "finished"


def test_a_loss_that_is_not_finite_stops_before_the_weights(experiment, tmp_path):
    trainer = make_trainer(experiment(), tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.sam2.state_dict().items()}
    clip = dataclasses.replace(trainer.train_data[0], image_keys=None)
    clip.images[:, :, 10, 10] = float("nan")
    trainer.batches = lambda: iter([collate_fn([clip])])
    with pytest.raises(FloatingPointError, match=r"step 1: .*not finite.* video 1 frames \d\.\.\d"):
        trainer.run()
    assert_same(before, trainer.model.sam2.state_dict())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"


def spoil_parameter(trainer, clip, monkeypatch):
    next(iter(trainer.parameters.values())).data[0] = float("nan")
    return next(iter(trainer.parameters))


def spoil_input(trainer, clip, monkeypatch):
    clip.images[:, :, 10, 10] = float("inf")
    return "the input, the frames of video 1"


def spoil_loss(trainer, clip, monkeypatch):
    """What it is computed from is finite: the term alone is not."""
    computed = trainer_module.sum_losses

    def with_a_bad_term(*arguments):
        sums = computed(*arguments)
        return {**sums, "loss/dice": sums["loss/dice"] * float("nan")}

    monkeypatch.setattr(trainer_module, "sum_losses", with_a_bad_term)
    return "the loss loss/dice, nan"


def spoil_gradient(trainer, clip, monkeypatch):
    """The loss is finite, and a gradient overflows on its way back."""
    name, parameter = list(trainer.parameters.items())[3]
    parameter.register_hook(lambda gradient: gradient * float("inf"))
    return f"the gradient of {name}, "


@pytest.mark.parametrize("spoil", [spoil_parameter, spoil_input, spoil_loss, spoil_gradient])
def test_a_step_that_is_not_finite_is_kept(experiment, tmp_path, monkeypatch, spoil):
    """With what was bad first; the run goes on from the step before, bit for bit."""
    settings = experiment(trainer={"save_every": 100, "val_every": 100}, dataset={"shuffle": False})
    whole = make_trainer(settings, tmp_path / "whole")
    whole.run()
    trainer = make_trainer(settings, tmp_path / "run")
    step = trainer.train_step

    def third_is_bad(batches):
        if trainer.step != 2:
            return step(batches)
        found.append({n: p.detach().clone() for n, p in trainer.parameters.items()})
        # It is spoilt after it got its keys.
        clip = dataclasses.replace(trainer.train_data[0], image_keys=None)
        expected.append(spoil(trainer, clip, monkeypatch))
        return step(iter([collate_fn([clip])]))

    found, expected = [], []
    trainer.train_step = third_is_bad
    with pytest.raises(FloatingPointError, match="Bad first was") as caught:
        trainer.run()
    assert expected[0] in str(caught.value)
    kept = torch.load(tmp_path / "run" / "bad_batch_3.pt", weights_only=True)
    assert expected[0] in kept["first_bad"]
    assert kept["step"] == 3
    assert kept["clips"][0].startswith("video 1 frames")
    assert kept["batches"][0]["images"].shape == (3, 1, 3, 64, 64)
    assert {"loss/dice", "loss/focal"} <= kept["losses"].keys()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["step"] == 2
    monkeypatch.undo()
    if spoil is not spoil_parameter:
        make_trainer(settings, tmp_path / "run", resume=last).run()
        assert_same(weights(last), weights(tmp_path / "whole" / "checkpoints" / "last.pt"))


def test_a_second_error_does_not_hide_the_first(experiment, tmp_path, monkeypatch):
    trainer = make_trainer(experiment(), tmp_path / "run")

    def disk_is_full(values):
        raise OSError(28, "No space left on device")

    def fails_so(batches):
        trainer.runlog.summary = disk_is_full
        raise MachineFault("the first")

    trainer.train_step = fails_so
    with pytest.raises(MachineFault, match="the first") as caught:
        trainer.run()
    assert "could not be written: " in caught.value.__notes__[0]


def test_a_listed_module_without_gradient_stops_the_run(experiment, tmp_path):
    settings = experiment(
        model={"memory_gradient": "detached"}, dataset={"prompt_types": ["point"]}
    )
    trainer = make_trainer(settings, tmp_path / "run")
    with pytest.raises(UserError, match=r"memory_encoder got no gradient.*memory_gradient"):
        trainer.run()


def test_a_run_may_be_told_to_go_on_without_a_gradient(experiment, tmp_path, monkeypatch):
    settings = experiment(
        model={"num_maskmem": 0, "trainable_modules": ["memory_attention", "mask_decoder"]},
        trainer={"audit": "warn", "num_steps": 1},
    )
    trainer = make_trainer(settings, tmp_path / "run")
    said = []
    monkeypatch.setattr(trainer.runlog, "say", said.append)
    before = {name: value.clone() for name, value in trainer.model.sam2.state_dict().items()}
    trainer.run()
    assert "memory_attention got no gradient" in "".join(said)
    after = trainer.model.sam2.state_dict()
    changed = {name.split(".")[0] for name, value in after.items() if not value.equal(before[name])}
    assert changed == {"sam_mask_decoder"}


def test_the_audit_is_logged_at_step_one(experiment, tmp_path):
    make_trainer(experiment(), tmp_path / "run").run()
    audit = next(row for row in rows(tmp_path / "run") if "audit/memory_encoder/norm" in row)
    assert audit["step"] == 1
    assert (
        audit["audit/memory_encoder/with_gradient"] == audit["audit/memory_encoder/tensors"] == 40
    )
    assert audit["audit/memory_attention/norm"] > 0


def late_object(folder, num_videos, late):
    """Videos of three frames, in some of which the one object shows on the last frame only."""
    absent = [(video_id, t, 1) for video_id in late for t in (0, 1)]
    sizes = {"num_videos": num_videos, "num_frames": 3, "num_objects": 1, "size": (64, 64)}
    return str(make_coco(folder, absent=absent, **sizes))


def test_a_clip_without_anything_to_track_is_passed_over(experiment, tmp_path):
    """Its loss has no graph; the audit waits for a clip that says something."""
    data = late_object(tmp_path / "late", 2, late=[1])
    settings = experiment(
        dataset={"data_path": data, "val_path": None, "shuffle": False}, trainer={"num_steps": 3}
    )
    trainer = make_trainer(settings, tmp_path / "run")
    trainer.run()
    lines = rows(tmp_path / "run")
    learnt = [r["audit/batches_with_gradient"] for r in lines if "audit/batches_with_gradient" in r]
    assert learnt == [0, 1, 0]
    (audit,) = [row for row in lines if "audit/memory_encoder/norm" in row]
    assert audit["step"] == 2


def test_a_resumed_run_goes_on_waiting_for_the_audit(experiment, tmp_path):
    data = late_object(tmp_path / "late", 3, late=[1, 2])
    settings = {
        "dataset": {"data_path": data, "val_path": None, "shuffle": False},
        "model": {"memory_gradient": "detached"},
    }
    first = experiment(**settings, trainer={"num_steps": 2})
    make_trainer(first, tmp_path / "run").run()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    with pytest.raises(UserError, match="memory_encoder got no gradient"):
        make_trainer(experiment(**settings), tmp_path / "run", resume=last).run()


def test_data_without_anything_to_track_stop_the_run(experiment, tmp_path):
    data = late_object(tmp_path / "late", 2, late=[1, 2])
    settings = experiment(dataset={"data_path": data, "val_path": None})
    with pytest.raises(UserError, match="no frame after a prompt was there to learn from"):
        make_trainer(settings, tmp_path / "run").run()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dataset": {"video_clip_length": 1}}, "dataset.video_clip_length is 1"),
        ({"model": {"num_maskmem": 0}}, "model.num_maskmem is 0"),
        (
            {"model": {"trainable_modules": ["obj_ptr_proj"], "max_obj_ptrs_in_encoder": 0}},
            "model.max_obj_ptrs_in_encoder is 0",
        ),
        ({"model": {"trainable_modules": ["no_mem_pos_enc"]}}, "SAM 2 never reads it"),
        (
            {"model": {"trainable_modules": ["no_obj_ptr"], "max_obj_ptrs_in_encoder": 0}},
            "model.max_obj_ptrs_in_encoder is 0",
        ),
        (
            {"model": {"trainable_modules": ["no_obj_embed_spatial"], "num_maskmem": 0}},
            "model.num_maskmem is 0",
        ),
        (
            {
                "model": {"trainable_modules": ["memory_attention", "mask_downsample"]},
                "dataset": {"prompt_types": ["point"]},
            },
            "mask_downsample got no gradient: it is read for prompts that are masks only",
        ),
        (
            {
                "model": {"trainable_modules": ["no_mem_embed"]},
                "dataset": {"prompt_types": ["mask"]},
            },
            "points or boxes only",
        ),
    ],
)
def test_the_audit_says_why(experiment, tmp_path, changes, reason):
    with pytest.raises(UserError, match=reason) as caught:
        make_trainer(experiment(**changes), tmp_path / "run").run()
    assert "trainer.audit=warn" in str(caught.value)


def test_what_hangs_on_the_draw_is_a_warning(experiment, tmp_path, monkeypatch):
    """No mask prompt has come at the first step; later ones may bring one."""
    settings = experiment(
        model={"trainable_modules": ["memory_attention", "mask_downsample"]},
        dataset={"prompt_types": ["point", "mask"], "prompt_weights": [1e9, 1]},
        trainer={"num_steps": 1},
    )
    trainer = make_trainer(settings, tmp_path / "run")
    said = []
    monkeypatch.setattr(trainer.runlog, "say", said.append)
    trainer.run()
    assert "warning: model.trainable_modules: mask_downsample got no gradient" in "".join(said)


def said_by(trainer, monkeypatch) -> list[str]:
    said = []
    monkeypatch.setattr(trainer.runlog, "say", said.append)
    return said


def test_memory_trains_its_seven_parts_and_those_that_rest_are_no_error(
    experiment, tmp_path, monkeypatch
):
    settings = experiment(model={"trainable_modules": ["memory"]}, trainer={"num_steps": 1})
    trainer = make_trainer(settings, tmp_path / "run")
    with torch.no_grad():  # all objects are called visible: nothing reads the embeddings of absence
        trainer.model.sam2.sam_mask_decoder.pred_obj_score_head.layers[-1].bias += 20
    said = said_by(trainer, monkeypatch)
    trainer.run()
    assert "got no gradient" not in "".join(said)
    written = weights(tmp_path / "run" / "checkpoints" / "last.pt")
    assert set(MEMORY) <= {name.split(".")[0] for name in written}


@pytest.mark.parametrize(
    ("model", "dead", "alive"),
    [
        ({"num_maskmem": 0}, ["memory_attention", "memory_encoder"], []),
        (
            {"memory_gradient": "detached"},
            ["memory_encoder", "obj_ptr_proj"],
            ["memory_attention", "maskmem_tpos_enc", "obj_ptr_tpos_proj"],
        ),
    ],
)
def test_memory_hides_no_dead_part(experiment, tmp_path, model, dead, alive):
    model = {"trainable_modules": ["memory", "mask_decoder"], **model}
    with pytest.raises(UserError) as caught:
        make_trainer(experiment(model=model), tmp_path / "run").run()
    for part in dead:
        assert f"{part} (of `memory`) got no gradient" in str(caught.value)
    for part in alive:
        assert f"{part} (of" not in str(caught.value)


def test_memory_without_pointers_is_a_warning(experiment, tmp_path, monkeypatch):
    """Nothing reads their projections then, and the experiment says so itself."""
    model = {"trainable_modules": ["memory"], "max_obj_ptrs_in_encoder": 0}
    trainer = make_trainer(experiment(model=model, trainer={"num_steps": 1}), tmp_path / "run")
    said = said_by(trainer, monkeypatch)
    trainer.run()
    text = "".join(said)
    for part in ("obj_ptr_proj", "obj_ptr_tpos_proj"):
        assert f"{part} (of `memory`) got no gradient: model.max_obj_ptrs_in_encoder is 0" in text


BASE_ROWS = {"num_maskmem": 4, "config_path": CONFIG, "image_size": 64}


@pytest.fixture
def base(experiment, tmp_path):
    """A base of four temporal rows that says that rows 1 and 2 were never trained."""
    model = build_model(experiment(model=BASE_ROWS))
    content = {"model": model.sam2.state_dict(), "untrained_rows": [1, 2]}
    torch.save(content, tmp_path / "base.pt")
    return str(tmp_path / "base.pt")


@pytest.mark.parametrize(
    ("modules", "num_maskmem", "length", "warned"),
    [
        (["memory_attention"], 4, 5, "of the base in rows 1 to 2,"),
        (["memory_encoder"], 3, 5, "of the base in row 1,"),
        (["memory_attention"], 2, 5, None),
        (
            ["memory_attention"],
            6,
            5,
            "of the base and copies of row 2 in rows 1 to 4,",
        ),
        (["memory"], 4, 5, None),
        (["*"], 6, 7, None),
        (["memory"], 4, 3, "of the base in rows 1 to 2,"),
        (["mask_decoder"], 4, 5, None),
    ],
)
def test_memories_with_untrained_rows_are_warned_of_once(
    experiment, tmp_path, monkeypatch, base, modules, num_maskmem, length, warned
):
    settings = experiment(
        model={
            "checkpoint_path": base,
            "num_maskmem": num_maskmem,
            "trainable_modules": modules,
        },
        dataset={"video_clip_length": length, "val_path": None},
        trainer={"num_steps": 2, "audit": "warn"},
    )
    trainer = make_trainer(settings, tmp_path / "run")
    said = said_by(trainer, monkeypatch)
    trainer.run()
    found = [text for text in said if "maskmem_tpos_enc keeps" in text]
    assert len(found) == (warned is not None)
    if warned:
        assert f"warning: maskmem_tpos_enc keeps random values {warned} while" in found[0]
        assert ("`memory` in model.trainable_modules" in found[0]) == (modules != ["memory"])


def test_a_base_that_says_nothing_is_warned_of_where_the_memory_grew(
    experiment, tmp_path, monkeypatch
):
    base = tmp_path / "base.pt"
    torch.save({"model": build_model(experiment(model=BASE_ROWS)).sam2.state_dict()}, base)
    for num_maskmem, warned in ((4, 0), (3, 0), (6, 1)):
        model = {"checkpoint_path": str(base), "num_maskmem": num_maskmem}
        settings = experiment(model=model, trainer={"num_steps": 0}, dataset={"val_path": None})
        trainer = make_trainer(settings, tmp_path / f"run_{num_maskmem}")
        said = said_by(trainer, monkeypatch)
        trainer.run()
        assert "".join(said).count("keeps copies of row 2 in rows 3 to 4,") == warned


@pytest.mark.parametrize(
    ("modules", "length", "steps", "left"),
    [
        (["memory_attention"], 5, 2, [1, 2]),
        (["memory"], 5, 2, []),
        (["memory"], 4, 2, [2]),
        (["memory"], 5, 0, [1, 2]),
    ],
)
def test_checkpoints_and_exports_say_which_rows_are_untrained(
    experiment, tmp_path, base, modules, length, steps, left
):
    settings = experiment(
        model={"checkpoint_path": base, "num_maskmem": 4, "trainable_modules": modules},
        dataset={"video_clip_length": length, "val_path": None},
        trainer={"num_steps": steps},
    )
    make_trainer(settings, tmp_path / "run").run()
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    assert checkpoint.load(last)["untrained_rows"] == left
    quiet = Console(quiet=True)
    export_checkpoint(settings, last, tmp_path / "out.pt", half=False, console=quiet)
    written = torch.load(tmp_path / "out.pt", weights_only=True)
    assert written.get("untrained_rows", []) == left
    # And as the base of another run.
    model = {"checkpoint_path": str(tmp_path / "out.pt"), "num_maskmem": 4}
    assert list(build_model(experiment(model=model)).untrained_rows) == left

    # A checkpoint from before it said so: frozen rows are those of the base.
    content = checkpoint.load(last)
    del content["untrained_rows"]
    checkpoint.save(last, content)
    export_checkpoint(settings, last, tmp_path / "old.pt", half=False, console=quiet)
    written = torch.load(tmp_path / "old.pt", weights_only=True)
    assert written.get("untrained_rows", []) == ([] if modules == ["memory"] else left)


def test_a_resumed_run_remembers_which_rows_it_has_trained(experiment, tmp_path, base):
    model = {"checkpoint_path": base, "num_maskmem": 4, "trainable_modules": ["memory"]}
    build = partial(experiment, model=model, dataset={"video_clip_length": 5, "val_path": None})
    last = tmp_path / "run" / "checkpoints" / "last.pt"
    make_trainer(build(trainer={"num_steps": 2}), tmp_path / "run").run()
    make_trainer(build(trainer={"num_steps": 2}), tmp_path / "run", resume=last).run()
    assert checkpoint.load(last)["untrained_rows"] == []


def test_frames_in_two_splits_are_warned_of(experiment, tmp_path):
    settings = experiment()
    copied = tmp_path / "data" / "copy.json"
    copied.write_text((tmp_path / "data" / "annotations.json").read_text())
    other = str(make_coco(tmp_path / "other", num_frames=5, size=(64, 64)))
    dataset = {"data_path": other, "test_path": str(copied)}
    settings = experiment(dataset=dataset, trainer={"num_steps": 1, "val_every": 1})
    make_trainer(settings, tmp_path / "run").run()
    (warning,) = json.loads((tmp_path / "run" / "summary.json").read_text())["warnings"]
    assert "val_path and dataset.test_path share frames (video 1, 2, 3)" in warning
    assert "too high" in warning


def test_no_validation_videos_is_no_scores(experiment, tmp_path):
    run_dir = tmp_path / "run"
    settings = experiment(dataset={"val_path": None}, trainer={"num_steps": 2})
    assert make_trainer(settings, run_dir).run() == {}
    assert (run_dir / "checkpoints" / "last.pt").exists()
    summary = json.loads((run_dir / "summary.json").read_text())
    assert "val/J_and_F" not in summary
    assert summary["status"] == "finished"


def test_zero_steps_evaluates_and_saves(experiment, tmp_path):
    settings = experiment(trainer={"num_steps": 0})
    scores = make_trainer(settings, tmp_path / "run").run()
    assert scores["J_and_F"] >= 0
    assert (tmp_path / "run" / "checkpoints" / "last.pt").exists()


def test_best_pt_cannot_be_resumed(experiment, tmp_path):
    make_trainer(experiment(), tmp_path / "run").run()
    with pytest.raises(UserError, match=r"last\.pt"):
        make_trainer(
            experiment(), tmp_path / "run", resume=tmp_path / "run" / "checkpoints" / "best.pt"
        )


def test_a_short_training_lowers_the_loss(experiment, tmp_path):
    """Not the overfit proof: a sign that gradients go the right way through the whole loop."""
    settings = experiment(
        model={"trainable_modules": ["*"]},
        dataset={"prompt_types": ["mask"], "shuffle": False},
        trainer={"num_steps": 25, "val_every": 100, "save_every": 100, "max_grad_norm": 1.0},
        optimizer={"learning_rate": 2e-3, "schedule": "constant"},
    )
    make_trainer(settings, tmp_path / "run").run()
    losses = [row["loss/dice"] for row in rows(tmp_path / "run") if "loss" in row]
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.05


def test_folders_of_frames_train_and_real_masks_validate(experiment, tmp_path):
    """The other data set of the guide through the same loop; scores from the masks of a JSON."""
    video = experiment().dataset.model_dump(exclude={"number_of_points", "synthetic"})
    video |= {"dataset_type": "video", "data_path": str(tmp_path / "data")}
    settings = experiment(dataset=video, trainer={"num_steps": 2})
    trainer = make_trainer(settings, tmp_path / "run")
    assert trainer.train_data.source.makes_objects
    assert isinstance(trainer.val_data.source, CocoVideos)
    assert trainer.run()["num_objects"] == 2  # those of the JSON
    assert len([row for row in rows(tmp_path / "run") if "loss" in row]) == 2


def test_bad_clips_are_left_out_counted_and_told_also_after_a_stop(experiment, tmp_path):
    skip = {"on_bad_sample": "skip", "max_bad_fraction": 0.5}
    config = experiment(dataset={"val_path": None, **skip}, trainer={"num_steps": 6})

    def train(run_dir, *, stop_at=None, resume=None):
        said = io.StringIO()
        options = {"run_id": "run", "name": "test", "console": Console(file=said)}
        run = Trainer(config, run_dir, resume=resume, **options)
        step = run.train_step

        def step_and_stop(batches):
            if run.step + 1 == stop_at:
                run.stop.received = signal.SIGTERM
            return step(batches)

        run.train_step = step_and_stop
        path = tmp_path / "data" / "video_002"
        for frame in path.glob("*.png"):
            frame.write_bytes(whole[frame.name][:90])
        try:
            with suppress(Interrupted):
                run.run()
        finally:
            for frame in path.glob("*.png"):  # the next trainer reads its head
                frame.write_bytes(whole[frame.name])
        return said.getvalue(), json.loads((run_dir / "summary.json").read_text())

    whole = {p.name: p.read_bytes() for p in (tmp_path / "data" / "video_002").glob("*.png")}
    text, summary = train(tmp_path / "whole")
    assert summary["clips_left_out"] == 2  # of 6 clips of 3 videos
    assert "left out, and another clip drawn: " in text
    assert "video_002" in text
    train(tmp_path / "parts", stop_at=3)
    last = tmp_path / "parts" / "checkpoints" / "last.pt"
    assert train(tmp_path / "parts", resume=last)[1]["clips_left_out"] == 2
    assert_same(weights(tmp_path / "whole" / "checkpoints" / "last.pt"), weights(last))
    config = experiment(dataset={"val_path": None, "on_bad_sample": "skip"})
    with pytest.raises(UserError, match=r"max_bad_fraction=0\.01.*\n.*video_002"):
        train(tmp_path / "few")
