"""--download against a small server on this machine: what arrives is checked before it counts."""

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sam2train import pretrained
from sam2train.download import fetch_checkpoint
from sam2train.errors import UserError
from sam2train.model import ModelConfig

CONFIG = "sam2train/configs/sam2.1_hiera_demo.yaml"
NAME = "sam2.1_hiera_tiny.pt"


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_):
        pass


@pytest.fixture
def published(tmp_path, monkeypatch) -> Path:
    """The folder that a server stands for Meta's address with."""
    folder = tmp_path / "published"
    folder.mkdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setattr(pretrained, "DOWNLOAD_ADDRESS", f"http://127.0.0.1:{server.server_port}/")
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def weights() -> dict:
    sam2 = pretrained.build_sam2(pretrained.resolve_config(CONFIG), image_size=64, num_maskmem=7)
    return {"model": sam2.state_dict()}


def fetch(target: Path | None) -> Path:
    path = None if target is None else str(target)
    config = ModelConfig(checkpoint_path=path, config_path=CONFIG, image_size=64)
    return fetch_checkpoint(config, Console(quiet=True))


def test_a_good_file_is_kept(published, tmp_path):
    torch.save(weights(), published / NAME)
    target = tmp_path / "checkpoints" / NAME
    assert fetch(target) == target
    assert target.read_bytes() == (published / NAME).read_bytes()
    assert [path.name for path in target.parent.iterdir()] == [NAME]
    (published / NAME).unlink()
    assert fetch(target) == target  # it is there: nothing is fetched


@pytest.mark.parametrize("content", [b"<html>sorry</html>", b"", None])
def test_a_bad_download_leaves_nothing(published, tmp_path, content):
    if content is not None:
        (published / NAME).write_bytes(content)
    target = tmp_path / "checkpoints" / NAME
    with pytest.raises(UserError) as caught:
        fetch(target)
    assert NAME in str(caught.value)
    assert not list(target.parent.glob("*"))


def test_weights_of_another_architecture_are_refused(published, tmp_path):
    torch.save({"model": {"a": torch.zeros(1)}}, published / NAME)
    with pytest.raises(UserError, match="does not fit"):
        fetch(tmp_path / NAME)
    assert not (tmp_path / NAME).exists()


def test_what_is_not_published_is_said_before_any_request(tmp_path):
    with pytest.raises(UserError, match=r"sam2\.1_hiera_large\.pt"):
        fetch(tmp_path / "mine.pt")
    with pytest.raises(UserError, match="null"):
        fetch(None)


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained, "DOWNLOAD_ADDRESS", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(tmp_path / NAME)
