"""The folder of a run: what counts as a run, which checkpoint is taken, what a person is told."""

import json
import os
from pathlib import Path

import pytest

from sam2train.errors import UserError
from sam2train.run_folder import (
    RunFolder,
    parse_row,
    read_environment,
    read_metrics,
    read_summary,
    read_table,
)


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
    assert [line.split()[0] for line in lines] == ["summary.json", "checkpoints/best.pt"]
    assert all(len(line.split()) > 3 for line in lines)


ROWS = '{"step": 0, "val/J_and_F": 0.25, "seconds": 1.0}\n{"step": 5, "loss": null}\n'


@pytest.mark.parametrize(
    ("text", "steps", "told"),
    [
        ("", [], ""),
        (ROWS, [0, 5], ""),
        (ROWS + '{"step": 9, "lo', [0, 5], ""),  # what a kill leaves
        (ROWS + "[]\n", [0, 5], "line 3 is no row"),
        ('{"step": -1}\n' + ROWS, [0, 5], "line 1 is no row"),
        ('{"step": true}\n' + ROWS, [0, 5], "line 1 is no row"),
        ("\0\n" * 9 + ROWS, [0, 5], "and 4 more"),
        (ROWS + '{"step": 6, "loss": "x", "lr": 1.0}\n', [0, 5, 6], "line 3: loss is 'x'"),
        (ROWS + '{"step": 6, "loss": 1' + "0" * 400 + "}\n", [0, 5, 6], "beyond 2**53"),
        (ROWS + '{"step": 6, "loss": NaN, "x": 1e999}\n', [0, 5, 6], "x is inf"),
    ],
)
def test_rows(tmp_path, text, steps, told):
    path, said = tmp_path / "metrics.jsonl", []
    path.write_text(text)
    rows = read_metrics(path, said.append)
    assert [row["step"] for row in rows] == steps
    assert told in "\n".join(said)
    assert bool(said) == bool(told)
    assert rows[2:] == [] or rows[2]["loss"] is None  # as a run writes NaN


def test_a_row_that_a_run_writes_again_is_whole():
    assert parse_row('{"step": 1, "loss": 0.5}') == {"step": 1, "loss": 0.5}
    for line in ('{"step": 1, "loss": "x"}', '{"loss": 1}', "", "[" * 100_000):
        assert parse_row(line) is None


def test_an_odd_summary_is_made_anew_from_the_rows(tmp_path):
    summary, metrics, said = tmp_path / "summary.json", tmp_path / "metrics.jsonl", []
    metrics.write_text(ROWS)
    assert read_summary(summary, metrics, said.append) == {}
    whole = {"status": "finished", "steps": 5, "best/J_and_F": 0.25, "warnings": ["x"]}
    summary.write_text(json.dumps(whole))
    assert read_summary(summary, metrics, said.append) == whole
    assert not said
    summary.write_text(json.dumps({**whole, "steps": "x", "best/J_and_F": []}))
    assert read_summary(summary, metrics, said.append) == whole
    assert "steps is 'x'; best/J_and_F is []" in said[0]
    summary.write_text("{")
    anew = read_summary(summary, metrics, said.append)
    assert (anew["status"], anew["steps"], anew["best/J_and_F"]) == ("running", 5, 0.25)
    assert "made anew" in said[1]


def test_a_pipe_is_no_file_of_a_run(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="no regular file"):
        read_metrics(tmp_path / "metrics.jsonl", print)


def test_an_environment(tmp_path):
    path, said = tmp_path / "environment.json", []
    assert read_environment(path, said.append) == (None, None)
    path.write_text('{"code": {"commit": "abc"}, "device": "cpu"}')
    assert read_environment(path, said.append) == ("abc", "cpu")
    assert not said
    path.write_text('{"code": 3, "device": "cpu"}')
    assert read_environment(path, said.append) == (None, "cpu")
    assert said


@pytest.mark.parametrize("cell", ["x", "1,2", "\0", '"'])
def test_a_table_without_its_odd_rows(tmp_path, cell):
    path, said = tmp_path / "scores.csv", []
    path.write_text(f"step,model,J\n0,a,0.5\n1,b,{cell}\n")
    columns, rows = read_table(path, ("step", "model", "J"), said.append)
    assert columns == ["step", "model", "J"]
    assert rows == [{"step": "0", "model": "a", "J": "0.5"}]
    assert "1 of 2 rows" in said[0]
    path.write_text("step,J,J\n0,1,2\n")
    with pytest.raises(UserError, match="twice"):
        read_table(path, ("step", "J"), said.append)
