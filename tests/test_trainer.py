"""The loop: what it writes, that it resumes bit for bit, how it stops."""

import dataclasses
import io
import json
import os
import signal
import traceback
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import edit, make_coco
from rich.console import Console
from small_run import (
    CONFIG,
    assert_same,
    make_trainer,
    rows,
    small_experiments,
    weights,
)
from test_trainer_step import late_object
from torch.utils._python_dispatch import TorchDispatchMode

from sam2train import checkpoint, demo
from sam2train.config_yaml import load_yaml
from sam2train.data_coco import CocoVideos
from sam2train.errors import MachineFault, UserError
from sam2train.experiment import build_model, load_experiment
from sam2train.files import REPOSITORY
from sam2train.machine import Interrupted
from sam2train.pretrained import resolve_config
from sam2train.trainer import Trainer


@pytest.fixture
def experiment(tmp_path):
    return small_experiments(tmp_path)


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
    assert len(list((run_dir / "overlays").glob("step_*.jpg"))) == 3
    assert {p.name for p in (run_dir / "checkpoints").iterdir()} == {
        "last.pt",
        "previous.pt",
        "best.pt",
    }


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
    demo.generate(dataclasses.replace(demo.SPLITS["clips"], num_videos=2, num_frames=16), folder)
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


class _Waits(TorchDispatchMode):
    """Counts what would make a program wait for its GPU: values that are read, and shapes that
    depend on values; by the line of ours or of SAM 2's that asks."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.__name__
        masked = name.startswith(("index.", "index_put")) and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in args[1]
        )
        reads = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "equal", "is_nonzero")
        if masked or name.startswith(reads):
            places = [f for f in traceback.extract_stack() if "/sam2" in f.filename]
            self.found[Path(places[-1].filename).stem, places[-1].line] += 1
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("clicks", [0, 1])
def test_a_healthy_step_waits_for_the_device_once(experiment, tmp_path, monkeypatch, clicks):
    prompts = {"prompt_types": ["point", "bbox"]}
    clicking = {"num_correction_pt_per_frame": clicks}
    settings = experiment(features={"cache": False}, interaction=clicking, dataset=prompts)
    trainer = make_trainer(settings, tmp_path / "run")
    tolist, read = torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda t: read.append(t.shape) or tolist(t))
    with trainer.runlog:
        trainer.model.train()
        batches = trainer.batches()
        trainer.train_step(batches)  # positions and the audit are of the first step alone
        trainer.step += 1
        collected = trainer._next_batches(batches)
        monkeypatch.setattr(trainer, "_next_batches", lambda _: collected)
        # On CUDA one kernel steps all parameters; on a CPU each count of steps is read.
        monkeypatch.setattr(trainer.optimizer, "step", lambda: None)
        read.clear()
        with _Waits() as waits:
            trainer.train_step(batches)
    ((module, line), count), *others = waits.found.items()
    assert (module, "isfinite" in line, count, others) == ("trainer", True, 1, [])
    assert read == [
        torch.Size([trainer.experiment.dataset.batch_size])
    ]  # `object_valid`, on the CPU


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(("bf16", "tolerance"), [(False, 1e-3), (True, 2e-2)])
def test_the_first_step_on_cuda_has_the_loss_of_the_cpu(experiment, tmp_path, bf16, tolerance):
    losses = []
    for device in ("cpu", "cuda"):
        settings = experiment(
            trainer={"device": device, "bf16": bf16 and device == "cuda"}, model={"dropout": 0.0}
        )
        trainer = make_trainer(settings, tmp_path / device)
        with trainer.runlog:
            trainer.model.train()
            losses.append(trainer.train_step(trainer.batches())["loss"].item())
        assert bool(trainer.optimizer.defaults["fused"]) == (device == "cuda")
    assert losses[1] == pytest.approx(losses[0], rel=tolerance)
