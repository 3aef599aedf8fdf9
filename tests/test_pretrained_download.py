"""`--download` from a server on this machine: what arrives is checked before it counts."""

import hashlib
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sam2train import pretrained_download
from sam2train.errors import UserError
from sam2train.files import REPOSITORY
from sam2train.pretrained import build_sam2, read_weights
from sam2train.pretrained_download import fetch_checkpoint

DEMO = REPOSITORY / "sam2train" / "configs" / "sam2.1_hiera_demo.yaml"
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
    monkeypatch.setattr(
        pretrained_download, "DOWNLOAD_ADDRESS", f"http://127.0.0.1:{server.server_port}/"
    )
    monkeypatch.setattr(pretrained_download, "_SCHEMES", ("http",))  # the server has no certificate
    yield folder
    server.shutdown()
    server.server_close()
    thread.join()


def demo_weights() -> dict:
    return {"model": build_sam2(DEMO, image_size=64, num_maskmem=7).state_dict()}


def fetch(target: Path | None) -> Path:
    path = None if target is None else str(target)
    return fetch_checkpoint(path, DEMO, Console(quiet=True))


def test_a_good_file_is_kept(published, tmp_path):
    torch.save(demo_weights(), published / NAME)
    target = tmp_path / "checkpoints" / NAME
    assert fetch(target) == target
    assert target.read_bytes() == (published / NAME).read_bytes()
    pin = target.with_name(f"{NAME}.sha256")
    assert sorted(target.parent.iterdir()) == [target, pin]
    assert pin.read_text() == f"{hashlib.sha256(target.read_bytes()).hexdigest()}  {NAME}\n"
    (published / NAME).unlink()
    assert fetch(target) == target  # it is there: nothing is fetched
    # Another file of the same layout is told from the one that was verified.
    torch.save({"model": {n: v + 1 for n, v in demo_weights()["model"].items()}}, target)
    for use in (fetch, read_weights):
        with pytest.raises(UserError, match=r"not the file that was downloaded.*sha256 is"):
            use(target)
    pin.unlink()
    read_weights(target)


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


STATUS = {403: "HTTPS_PROXY", 404: "may have moved", 429: "later", 503: "later", 418: "Teapot"}


@pytest.mark.parametrize("code", STATUS)
def test_a_status_is_named_with_a_way_out(published, monkeypatch, tmp_path, code):
    monkeypatch.setattr(QuietHandler, "do_GET", lambda self: self.send_error(code))
    with pytest.raises(UserError, match=f"the server answers {code}.*{STATUS[code]}.*Fetch it on"):
        fetch(tmp_path / NAME)


@pytest.mark.parametrize("reply", [b"", b"what is this\r\n\r\n", b"HTTP/1.1 200 OK\r\nA" * 70_000])
def test_what_is_no_http_is_named(published, monkeypatch, tmp_path, reply):
    monkeypatch.setattr(QuietHandler, "do_GET", lambda self: self.wfile.write(reply))
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(tmp_path / NAME)
    assert not (tmp_path / NAME).exists()


def test_only_https_is_asked_and_followed(published, monkeypatch, tmp_path):
    def redirect(handler):
        handler.send_response(302)
        handler.send_header("Location", "ftp://elsewhere/weights.pt")
        handler.end_headers()

    with monkeypatch.context() as patch:
        patch.setattr(QuietHandler, "do_GET", redirect)
        with pytest.raises(UserError, match=r"ftp://elsewhere/weights\.pt is not https"):
            fetch(tmp_path / NAME)
    monkeypatch.setattr(pretrained_download, "_SCHEMES", ("https",))
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1.* is not https"):
        fetch(tmp_path / NAME)


def test_a_download_without_end_is_cut_off(published, monkeypatch, tmp_path):
    (published / NAME).write_bytes(bytes(1 << 21))
    monkeypatch.setattr(pretrained_download, "MAX_DOWNLOAD", 1 << 20)
    with pytest.raises(UserError, match="more than 1,048,576 bytes"):
        fetch(tmp_path / NAME)
    assert list(tmp_path.glob("*.pt*")) == []


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setattr(pretrained_download, "_SCHEMES", ("http",))
    monkeypatch.setattr(pretrained_download, "DOWNLOAD_ADDRESS", "http://127.0.0.1:9/")
    with pytest.raises(UserError, match="could not be fetched"):
        fetch(tmp_path / NAME)
