"""`trainer.sharding: fsdp`: the same training with a part of the image encoder in each process."""

# ruff: noqa: F811

import json

import pytest
import torch
from test_distributed import together
from test_trainer import experiment, make_trainer, rows, weights  # noqa: F401

from sam2train import distributed, sharding

# Of the largest of a tensor's changes. AdamW makes a step of full size of the smallest gradient, so
# that rounding moves single values further: 4 of the 2,048 of a position embedding were measured,
# and 19 with two processes and no sharding. The biases of keys are left out: attention does not
# depend on them, and their gradients are nothing but rounding.
BOUND, SHARE = 2e-3, 0.01


def train(settings, run_dir, resume=None):
    """The shares of the encoder that this process keeps, of its weights and of their moments, and
    what `bad_shards` says of a bad value in one process."""
    run = make_trainer(settings, run_dir, resume=resume)
    run.run()
    of_encoder = {n: p for n, p in run.parameters.items() if n.startswith("image_encoder.")}
    moments = [run.optimizer.state[p]["exp_avg"] for p in of_encoder.values()]
    shares = []
    for tensors in (of_encoder.values(), moments):
        own = sum((t.to_local() if sharding.is_sharded(t) else t).numel() for t in tensors)
        shares.append(own / sum(t.numel() for t in tensors))
    if distributed.rank() == 1:
        of_encoder["image_encoder.trunk.blocks.1.norm1.weight"].to_local().data.fill_(torch.nan)
    return shares, sharding.bad_shards(run.model)


@pytest.fixture
def settings(experiment):
    """All of the model is trained. Prompts are drawn for each clip, and one process has the only
    video that is scored: what is called in a process differs."""

    def build(batch_size, num_steps, sharded):
        return experiment(
            dataset={"batch_size": batch_size, "test_path": experiment().dataset.data_path},
            model={
                "trainable_modules": [
                    *("image_encoder", "memory", "mask_decoder", "prompt_encoder")
                ]
            },
            interaction={"num_correction_pt_per_frame": 1},
            trainer={
                "num_steps": num_steps,
                "val_every": 3,
                "grad_accumulation": 2,
                "audit": "warn",
                "sharding": "fsdp" if sharded else "none",
            },
        )

    return build


def test_a_sharded_run_equals_one_process_and_goes_on_either_way(tmp_path, settings):
    begun = make_trainer(settings(2, 3, False), tmp_path / "began")
    began = {name: p.detach().clone() for name, p in begun.parameters.items()}
    assert train(settings(2, 3, True), tmp_path / "alone") == ([1, 1], (None, None))
    folder = tmp_path / "together"
    found = together(2, train, settings(1, 3, True), folder)
    for shares, (parameter, gradient) in found:
        assert all(0.4 < share < 0.6 for share in shares)
        assert parameter.startswith("the parameter sam2.image_encoder.trunk.blocks.1.norm1.weight,")
        assert gradient is None
    paths = [run / "checkpoints" / "last.pt" for run in (tmp_path / "alone", folder)]
    check_same(began, *map(weights, paths))
    # AdamW hides gradients that are too long by one factor; their norm, before clipping, does not.
    for single, joint in zip(*(rows(path.parents[1]) for path in paths), strict=True):
        for name in {"loss", "grad_norm"} & single.keys():
            assert joint[name] == pytest.approx(single[name], rel=1e-4), name
    key = "test/base/J_and_F"
    scores = [json.loads((path.parents[1] / "summary.json").read_text()) for path in paths]
    assert scores[0][key] == scores[1][key]  # the same weights were put in their place

    # One more step, of each checkpoint the other way.
    train(settings(2, 4, False), tmp_path / "alone", resume=paths[1])
    found = together(2, train, settings(1, 4, True), folder, paths[0])
    assert all(isinstance(result, tuple) for result in found), found
    check_same(began, *map(weights, paths))


def check_same(began, one, several):
    assert one.keys() == several.keys()
    for name, start in began.items():
        if not name.endswith("k_proj.bias"):
            change = (one[name] - start).abs().max()
            apart = (one[name] - several[name]).abs() > BOUND * change
            assert apart.float().mean() <= SHARE, name


def test_nothing_is_divided_where_there_is_nothing_to_divide(experiment, tmp_path, monkeypatch):
    said = []
    model = make_trainer(experiment(), tmp_path / "run").model
    sharding.shard(model, said.append)
    monkeypatch.setattr(distributed, "num_processes", lambda: 2)
    sharding.shard(model, said.append)
    assert "nothing to divide with one process" in said[0]
    assert "no part of the image encoder is trained" in said[1]
    assert not any(map(sharding.is_sharded, model.parameters()))
