"""CONTRIBUTING.md shows the code that the tests of formats, prompts and losses apply."""

import contextlib
import inspect
import random
import re
from pathlib import Path

import pytest
from conftest import make_coco
from soak_fuzz import KINDS
from test_datasets import Arrays
from test_losses import AREA
from test_prompts import Scribble

from sam2train import cli, commands
from sam2train.errors import UserError

TEXT = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()


def added(title):
    """The lines that the diff below a heading adds, up to the line of the table."""
    section = TEXT.split(f"\n## {title}\n")[1].split("\n## ")[0]
    lines = re.search("```diff\n(.*?)```", section, re.DOTALL)[1].splitlines()
    assert len(lines) < 30
    code = [line[1:] for line in lines if re.match(r"\+(?!\+\+ )", line)]
    return code[:-1], code[-1].strip()


@pytest.mark.parametrize(
    ("title", "source", "entry"),
    [
        ("A data format", inspect.getsource(Arrays), '"arrays": Format('),
        ("A prompt type", inspect.getsource(Scribble), '"scribble": Scribble(),'),
        ("A loss", AREA, 'Term("area", 0.5, area_term),'),
    ],
)
def test_the_code_shown_is_the_code_tested(title, source, entry):
    code, line = added(title)
    assert line.startswith(entry)
    tested = [row for row in source.splitlines() if row and "painted" not in row]
    assert [row for row in code if row] == tested


def test_the_command_shown_runs(tmp_path, monkeypatch, capsys):
    code, line = added("A command")
    namespace = dict(vars(commands))
    exec("\n".join(code), namespace)
    assert line == "CountVideos,"
    monkeypatch.setattr(cli, "COMMANDS", (*cli.COMMANDS, namespace["CountVideos"]))
    data = make_coco(tmp_path / "data", num_videos=3)
    experiment = tmp_path / "small.yaml"
    experiment.write_text(f"dataset: {{data_path: {data}}}\n")
    assert cli.main([str(experiment), "--count-videos"]) == 0
    assert capsys.readouterr().out.split()[-1] == "3"
    assert cli.main(["--count-videos", "--help"]) == 0
    assert "how many videos" in capsys.readouterr().out


@pytest.mark.parametrize("name", KINDS)
def test_the_soak_calls_the_program_as_it_is_today(name, tmp_path):
    """It is no part of the suite: a few inputs of each kind are accepted or refused by name."""
    kind = KINDS[name](tmp_path / name)
    for seed in range(3):
        kind.write(random.Random(seed))
        with contextlib.suppress(UserError):
            kind.read()
