"""Checkpoints: whole or not at all, nothing executed, no weights over a foreign base."""

import os
import pickle
import re
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from sam2train import checkpoint
from sam2train.errors import UserError
from sam2train.pretrained import read_weights
from sam2train.run_folder import RunFolder

CONTENT = {
    "model": {"weight": torch.arange(6.0).view(2, 3)},
    "base": {"path": "weights.pt", "sha256": "ab" * 32, "config_path": "c.yaml"},
    "step": 7,
    "rng": {"torch": torch.get_rng_state(), "cuda": []},
    "optimizer": None,
    "scores": {"J": 0.5},
    "config": "model: {}",
    "best": 0.5,
    "baseline": {"J": 0.25},
    "run_id": "run",
    "audited": True,
    "scored": 4,
    "window": {"sums": {"loss": torch.ones(())}, "counts": {"loss": 1}, "lines": 3},
    "untrained_rows": [0],
}
OLD = {
    k: v
    for k, v in CONTENT.items()
    if k in checkpoint._PARTS and k not in ("audited", "scored", "window", "untrained_rows")
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
    content = {**CONTENT, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
    checkpoint.save(tmp_path / "a.pt", content)
    step(model, optimizer)

    again, its_optimizer = make()
    loaded = checkpoint.load(tmp_path / "a.pt")
    again.load_state_dict(loaded["model"])
    checkpoint.restore_optimizer(its_optimizer, loaded["optimizer"], tmp_path / "a.pt")
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


@pytest.mark.parametrize("seed", range(3))
def test_a_flipped_bit_anywhere_is_found(tmp_path, seed):
    """Also in the tensors, between them, in the zip's directory and in the digest itself."""
    path = tmp_path / "last.pt"
    checkpoint.save(path, CONTENT)
    data = bytearray(path.read_bytes())
    rng = np.random.default_rng(seed)
    places = [*rng.choice(len(data), 60, replace=False), *range(len(data) - 80, len(data), 3)]
    places.append(data.index(CONTENT["model"]["weight"].numpy().tobytes()) + 5)
    for place in places:
        bit = 1 << int(rng.integers(8))
        data[place] ^= bit
        path.write_bytes(data)
        with pytest.raises(checkpoint.DamagedCheckpoint, match=re.escape(str(path))):
            checkpoint.load(path)
        data[place] ^= bit
    path.write_bytes(data)
    assert checkpoint.load(path)["step"] == 7


def test_other_programs_read_the_file(tmp_path):
    checkpoint.save(tmp_path / "a.pt", CONTENT)
    assert torch.load(tmp_path / "a.pt", weights_only=True)["step"] == 7
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert archive.testzip() is None


def test_checkpoints_from_before_the_digest_load(tmp_path):
    torch.save({"format": 1, **OLD}, tmp_path / "old.pt")
    assert checkpoint.load(tmp_path / "old.pt")["step"] == 7


def test_a_newer_version_is_named(tmp_path):
    torch.save({"format": checkpoint.FORMAT + 1, "weights": 1}, tmp_path / "new.pt")
    with pytest.raises(UserError, match=r"newer version.*format 3.*update"):
        checkpoint.load(tmp_path / "new.pt")


@pytest.mark.parametrize("key", OLD)
def test_each_missing_and_each_wrong_key_is_named(tmp_path, key):
    path = tmp_path / "last.pt"
    checkpoint.save(path, {name: value for name, value in CONTENT.items() if name != key})
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"{key} is missing, expected"):
        checkpoint.load(path)
    checkpoint.save(path, CONTENT | {key: {1, 2}})
    with pytest.raises(checkpoint.DamagedCheckpoint, match=f"{key} is a set of 2, expected"):
        checkpoint.load(path)


def test_the_one_before_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    last, previous = folder.last, folder.previous
    for step in (1, 2, 3):
        checkpoint.save(last, {**CONTENT, "step": step}, previous)
    assert [checkpoint.load(path)["step"] for path in (last, previous)] == [3, 2]
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(last, {**CONTENT, "bad": Unwritable()}, previous)
    assert [checkpoint.load(path)["step"] for path in (last, previous)] == [3, 2]


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


DAMAGES = {
    "torn": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "flipped": _flip,
    "empty": lambda path: path.write_bytes(b""),
    "incomplete": lambda path: checkpoint.save(path, {"step": 1}),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_last_falls_back_to_the_one_before(tmp_path, damage):
    folder = RunFolder(tmp_path)
    last, previous = folder.last, folder.previous
    checkpoint.save(last, {**CONTENT, "step": 1}, previous)
    checkpoint.save(last, {**CONTENT, "step": 2}, previous)
    DAMAGES[damage](last)
    said = []
    content, path = checkpoint.load_last(RunFolder(tmp_path), said.append)
    assert (content["step"], path) == (1, previous)
    assert str(last) in said[0]
    assert f"{previous}, of step 1" in said[0]
    # What is damaged does not become the one before.
    checkpoint.save(last, {**CONTENT, "step": 3}, previous)
    assert checkpoint.load(previous)["step"] == 1
    _flip(previous)
    _flip(last)
    with pytest.raises(UserError, match=r"no checkpoint of this run is whole; start again"):
        checkpoint.load_last(RunFolder(tmp_path), said.append)


def test_a_newer_last_is_no_reason_to_go_back(tmp_path):
    checkpoint.save(RunFolder(tmp_path).previous, CONTENT)
    torch.save({"format": 9}, RunFolder(tmp_path).last)
    with pytest.raises(UserError, match="newer version"):
        checkpoint.load_last(RunFolder(tmp_path), print)


@pytest.mark.parametrize("read", [checkpoint.load, read_weights])
def test_a_bomb_is_refused_before_it_takes_memory(tmp_path, read):
    path = tmp_path / "bomb.pt"
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "small.pt")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        with zipfile.ZipFile(tmp_path / "small.pt") as small:
            for entry in small.infolist():
                bomb.writestr(entry.filename.replace("small", "bomb"), small.read(entry))
        with bomb.open("bomb/data/1", "w", force_zip64=True) as file:
            for _ in range(256):
                file.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(UserError, match=r"bomb\.pt: has [\d,]+ bytes and unpacks to 268,4"):
        read(path)
    assert tracemalloc.get_traced_memory()[1] < 1 << 24
    tracemalloc.stop()


def test_optimizer_state_of_other_parameters(tmp_path):
    def make(width):
        model = nn.Linear(3, width)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return optimizer

    state = make(2).state_dict()
    with pytest.raises(UserError, match=r"last\.pt: optimizer\.state\[0\]\.exp_avg is \(2, 3\)"):
        checkpoint.restore_optimizer(make(4), state, tmp_path / "last.pt")
    state["param_groups"][0]["params"] = [0]
    with pytest.raises(UserError, match="does not fit the trained parameters"):
        checkpoint.restore_optimizer(make(2), state, tmp_path / "last.pt")


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


@pytest.mark.parametrize(
    "state",
    [
        {"state": {0: torch.ones(2)}, "param_groups": []},
        {"state": {}, "param_groups": [torch.tensor(1.0)]},
        {"state": {}, "param_groups": [{"params": torch.tensor(1.0)}]},
        {"state": {0: {"step": 10**400}}, "param_groups": [{"params": [0, 1]}]},
        {"state": {0: {"step": "x"}}, "param_groups": [{"params": [0, 1]}]},
    ],
)
def test_an_odd_state_of_the_optimiser_is_named(tmp_path, state):
    path = tmp_path / "last.pt"
    optimizer = torch.optim.AdamW(torch.nn.Linear(2, 2).parameters())
    checkpoint.save(path, {**CONTENT, "optimizer": state})
    with pytest.raises(UserError, match=r"last\.pt: .*optimizer"):
        checkpoint.restore_optimizer(optimizer, checkpoint.load(path)["optimizer"], path)
