"""The folder of a run: what counts as a run, which checkpoint is taken, what a person is told."""

from pathlib import Path

import pytest

from sam2train.run_folder import RunFolder


def touch(folder: Path, *names: str) -> RunFolder:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return RunFolder(folder)


@pytest.mark.parametrize(
    ("names", "is_run"),
    [
        ([], False),
        (["config.yaml"], False),  # written by hand, or a run that never started
        (["config.yaml", "summary.json"], True),
        (["config.yaml", "metrics.jsonl"], True),
        (["config.yaml", "environment.json"], True),
        (["evaluation.yaml", "summary.json", "scores.csv"], False),
    ],
)
def test_what_is_a_run(tmp_path, names, is_run):
    assert touch(tmp_path, *names).is_run == is_run


@pytest.mark.parametrize(
    ("names", "goes_on", "taken"),
    [
        ([], False, None),
        (["best"], False, "best"),
        (["last"], True, "last"),
        (["previous"], True, None),  # killed between two renames
        (["best", "last", "previous"], True, "best"),
    ],
)
def test_which_checkpoint_goes_on_and_which_is_taken(tmp_path, names, goes_on, taken):
    folder = touch(tmp_path, *(f"checkpoints/{name}.pt" for name in names))
    assert folder.can_go_on == goes_on
    assert folder.checkpoint == (taken and tmp_path / "checkpoints" / f"{taken}.pt")


def test_the_run_of_a_checkpoint():
    folder = RunFolder(Path("runs/a/b"))
    for path in (folder.best, folder.last, folder.previous, folder.damaged):
        assert RunFolder.of_checkpoint(path) == folder


def test_runs_and_evaluations_of_an_experiment_are_apart():
    """A name with a slash stays one folder, so that no experiment writes into another's."""
    runs = RunFolder.of_experiment("a/b")
    assert runs.parent == Path("runs")
    assert RunFolder.of_evaluations("a/b").parent == runs


def test_contents_names_what_is_there(tmp_path):
    folder = touch(tmp_path, "summary.json", "checkpoints/best.pt")
    lines = list(folder.contents("summary", "metrics", "best"))
    assert [line.split()[0] for line in lines] == [str(folder.summary), str(folder.best)]
    assert all(len(line.split()) > 3 for line in lines)
