"""A step that is not finite: it stops the run before the weights, and is kept with what was bad."""

import json
from dataclasses import replace

import pytest
import torch
from small_run import (
    assert_same,
    make_trainer,
    small_experiments,
    weights,
)

from sam2train import checkpoint
from sam2train import trainer as trainer_module
from sam2train.clips import collate_fn


@pytest.fixture
def experiment(tmp_path):
    return small_experiments(tmp_path)


def test_a_loss_that_is_not_finite_stops_before_the_weights(experiment, tmp_path):
    trainer = make_trainer(experiment(), tmp_path / "run")
    before = {name: value.clone() for name, value in trainer.model.sam2.state_dict().items()}
    clip = replace(trainer.train_data[0], image_keys=None)
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
        clip = replace(trainer.train_data[0], image_keys=None)
        expected.append(spoil(trainer, clip, monkeypatch))
        return step(iter([collate_fn([clip])]))

    found, expected = [], []
    trainer.train_step = third_is_bad
    with pytest.raises(FloatingPointError, match="The first bad value") as caught:
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
