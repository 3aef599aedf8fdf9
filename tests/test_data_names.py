"""Names from data on their way to a terminal and to file names."""

from pathlib import Path

import pytest
import yaml
from conftest import edit, make_coco
from small_run import write_experiment

from sam2train import cli


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    return write_experiment(tmp_path, monkeypatch)


NASTY = "[/red]\x1b]0;title\x07\x1b[2J\u202e../a"


@pytest.fixture
def nasty_experiment(tmp_path, experiment):
    """Names from data with what a terminal would act on: of videos, objects, files, experiments."""

    def rename(content):
        for image in content["images"]:
            image["video_id"] = f"{NASTY}{image['video_id']}"
            place = tmp_path / "nasty" / image["path"]
            odd = place.with_name(f"[red]\x1b[2J\u202e{place.name}")
            place.rename(odd)
            image["path"] = str(odd.relative_to(tmp_path / "nasty"))
        for annotation in content["annotations"]:
            annotation["track_id"] = f"{NASTY}{annotation['track_id']}"

    data = edit(make_coco(tmp_path / "nasty", num_videos=2, num_frames=3, size=(64, 64)), rename)
    content = yaml.safe_load(Path(experiment).read_text())
    content["dataset"] |= {"data_path": str(data), "val_path": str(data), "test_path": str(data)}
    content["trainer"] |= {"num_steps": 1}
    path = tmp_path / "[red]\x1b[2J.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_names_from_data_reach_no_terminal_and_no_file_name_as_they_are(
    nasty_experiment, tmp_path, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    run_dir, file = tmp_path / "out" / "run", str(nasty_experiment)
    last = str(run_dir / "checkpoints" / "last.pt")
    for words in (
        ["--check-data"],
        ["--check-data", "--json"],
        ["--dry-run"],
        ["--run-dir", str(run_dir)],
        ["--evaluate", last, "--save-masks", str(tmp_path / "out" / "masks")],
        ["--run-dir", str(run_dir), "--resume"],
    ):
        code = cli.main([file, *words])  # the splits are the same pictures, which is an error
        assert code in ((1, 2) if "--check-data" in words else (0,)), words
        printed = "".join(capfd.readouterr()).replace("\n", "")
        assert printed
        assert printed.isprintable(), words
    assert cli.main(["--runs", str(tmp_path / "out")]) == 0
    broken = next((tmp_path / "nasty").rglob("*.png"))
    broken.write_bytes(b"x")
    assert cli.main([file, "--check-data"]) == 2
    printed = "".join(capfd.readouterr()).replace("\n", "")
    assert "is damaged" in printed or "is not a picture" in printed
    assert printed.isprintable()
    for path in (tmp_path / "out").rglob("*"):
        assert path.name.isprintable()
        assert not set(path.name) & set('<>:"|?*')
        assert path.resolve().is_relative_to(tmp_path / "out")
