"""Checkpoints: whole or not at all, nothing executed, no weights over a foreign base."""

import os
import pickle

import pytest
import torch
from torch import nn

from sam2train import checkpoint
from sam2train.errors import UserError

CONTENT = {
    "model": {"weight": torch.arange(6.0).view(2, 3)},
    "base": {"path": "weights.pt", "sha256": "ab" * 32, "config_path": "c.yaml"},
    "step": 7,
    "rng": {"torch": torch.get_rng_state(), "cuda": []},
    "optimizer": None,
    "scores": {"J": 0.5},
}


def test_round_trip(tmp_path):
    path = tmp_path / "checkpoints" / "last.pt"  # the folder is made
    checkpoint.save(path, CONTENT)
    loaded = checkpoint.load(path)
    assert loaded["step"] == 7
    assert loaded["scores"] == {"J": 0.5}
    torch.testing.assert_close(loaded["model"]["weight"], CONTENT["model"]["weight"])
    assert [p.name for p in path.parent.iterdir()] == ["last.pt"]


def test_optimizer_state_round_trip(tmp_path):
    def make():
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model, optimizer):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer = make()
    step(model, optimizer)
    content = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(tmp_path / "a.pt", content)
    step(model, optimizer)

    again, its_optimizer = make()
    loaded = checkpoint.load(tmp_path / "a.pt")
    again.load_state_dict(loaded["model"])
    its_optimizer.load_state_dict(loaded["optimizer"])
    step(again, its_optimizer)
    assert torch.equal(again.weight, model.weight)


class Unwritable:
    """Pickles half way."""

    def __reduce__(self):
        raise OSError("disk full")


def test_a_failing_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "last.pt"
    checkpoint.save(path, CONTENT)
    before = path.read_bytes()
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(path, {**CONTENT, "step": 8, "bad": Unwritable()})
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


def test_a_first_failing_write_leaves_nothing(tmp_path):
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path / "last.pt", {"bad": Unwritable()})
    assert list(tmp_path.iterdir()) == []


def test_interrupted_before_the_rename(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    checkpoint.save(path, CONTENT)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(path, {**CONTENT, "step": 8})
    assert checkpoint.load(path)["step"] == 7
    assert [p.name for p in tmp_path.iterdir()] == ["last.pt"]


class Malicious:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_nothing_in_the_file_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"format": checkpoint.FORMAT, "bad": Malicious()}, tmp_path / "bad.pt")
    with pytest.raises(UserError, match="not a checkpoint that torch can read"):
        checkpoint.load(tmp_path / "bad.pt")
    assert not (tmp_path / "executed").exists()


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such checkpoint") as caught:
        checkpoint.load(tmp_path / "none.pt")
    assert str(tmp_path / "none.pt") in str(caught.value)
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_file_cut_short(tmp_path, share):
    path = tmp_path / "last.pt"
    checkpoint.save(path, CONTENT)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="cut short"):
        checkpoint.load(path)


@pytest.mark.parametrize("content", [{"model": {}}, {"format": 0}, [1, 2], torch.ones(2)])
def test_a_file_of_another_program(tmp_path, content):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"model\.checkpoint_path"):
        checkpoint.load(tmp_path / "other.pt")


def test_a_plain_pickle(tmp_path):
    (tmp_path / "other.pt").write_bytes(pickle.dumps({"format": checkpoint.FORMAT}))
    with pytest.raises(UserError):
        checkpoint.load(tmp_path / "other.pt")


# -- weights over a base --------------------------------------------------------------------------


def make_model(width=3):
    return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 1))


def delta(model, *, sha256, names=("1.weight", "1.bias")):
    weights = {name: torch.full_like(model.state_dict()[name], 9.0) for name in names}
    return {"model": weights, "base": {"path": "base.pt", "sha256": sha256}}


def test_part_of_the_weights_over_the_same_base(tmp_path):
    model = make_model()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint.apply_weights(model, delta(model, sha256="a" * 64), "a" * 64, tmp_path / "x.pt")
    after = model.state_dict()
    assert (after["1.weight"] == 9).all()
    assert (after["1.bias"] == 9).all()
    assert torch.equal(after["0.weight"], before["0.weight"])


@pytest.mark.parametrize(("of_file", "here"), [("a" * 64, "b" * 64), ("a" * 64, None)])
def test_another_base_is_an_error(tmp_path, of_file, here):
    model = make_model()
    before = model.state_dict()["1.weight"].clone()
    with pytest.raises(UserError, match=r"holds 2 of 4 tensors.*base\.pt.*model\.checkpoint_path"):
        checkpoint.apply_weights(model, delta(model, sha256=of_file), here, tmp_path / "x.pt")
    assert torch.equal(model.state_dict()["1.weight"], before)


def test_part_of_random_weights_is_an_error(tmp_path):
    """Random weights have no file to compare: a part of them says nothing about the rest."""
    model = make_model()
    with pytest.raises(UserError, match="random weights"):
        checkpoint.apply_weights(model, delta(model, sha256=None), None, tmp_path / "x.pt")


def test_complete_weights_need_no_base(tmp_path):
    model, names = make_model(), list(make_model().state_dict())
    checkpoint.apply_weights(model, delta(model, sha256=None, names=names), "c" * 64, tmp_path)
    assert all((value == 9).all() for value in model.state_dict().values())


def test_weights_of_another_architecture(tmp_path):
    model = make_model()
    content = delta(make_model(width=5), sha256="a" * 64)
    with pytest.raises(UserError, match=r"1 tensors do not fit.*1\.weight \(1, 5\)"):
        checkpoint.apply_weights(model, content, "a" * 64, tmp_path / "x.pt")
    content["model"]["2.weight"] = torch.ones(1)
    with pytest.raises(UserError, match="2 tensors do not fit"):
        checkpoint.apply_weights(model, content, "a" * 64, tmp_path / "x.pt")
