"""The notebooks run from the first cell to the last, on results made here, and stay short."""

import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
import yaml
from conftest import make_coco
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_results import make_run

from sam2train.ablation import MASKMEM, POINTERS, PROMPT_TYPES, compact_results
from sam2train.pictures import save_picture
from sam2train.results import load_runs

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))


def make_sweep(folder: Path, settings: list[dict]) -> None:
    """Two seeds of each of these settings, each better than the one before; a horizon in each."""
    for place, values in enumerate(settings):
        for seed in range(2):
            score = 0.5 + place / 32 + seed / 64
            run = make_run(
                folder / f"t{place}s{seed}",
                [(0, 0.25), (10, score)],
                settings={**values, "trainer.seed": seed},
            )
            rows = [
                f"10,val,trained,horizon/{metric},{at},{score},9"
                for metric in ("J", "recall_after_absence")
                for at in (1, 2, 4)
            ]
            text = "\n".join(["step,split,model,metric,at,value,count", *rows])
            (run / "horizon.csv").write_text(text)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder as the repository is after both ablations and a few other runs."""
    root = tmp_path_factory.mktemp("root")
    sweeps = root / "runs" / "sweeps"
    types = [["point"], ["bbox"], ["point", "bbox"]]
    make_sweep(sweeps / "prompts", [{PROMPT_TYPES: words} for words in types])
    cells = [{MASKMEM: num, POINTERS: many} for num in (1, 7) for many in (0, 16)]
    make_sweep(sweeps / "num_maskmem", cells)
    (root / "experiments" / "results").mkdir(parents=True)
    for name in ("prompts", "num_maskmem"):
        path = root / "experiments" / "results" / f"{name}.csv"
        compact_results(load_runs(sweeps / name)).to_csv(path, index=False)
    for name, status in (("one", "finished"), ("two", "failed")):
        run = make_run(root / "runs" / "coco" / name, status=status)
        for step in (0, 20):
            picture = np.full((40, 60, 3), 100 + step, np.uint8)
            save_picture(picture, run / "overlays" / f"step_{step:06d}_video_1.png")
    (make_run(root / "runs" / "coco" / "broken") / "config.yaml").write_text("")

    data = str(make_coco(root / "data", num_videos=3, num_frames=6, absent=[(1, 2, 1)]))
    dataset = {"data_path": data, "val_path": data, "image_size": [64, 64]}
    dataset |= {"video_clip_length": 4, "prompt_types": ["point", "bbox"]}
    experiment = {"dataset": dataset, "model": {"image_size": 64}}
    (root / "experiments" / "coco_point_bbox.yaml").write_text(yaml.safe_dump(experiment))
    return root


def execute(path: Path, root: Path, monkeypatch) -> nbformat.NotebookNode:
    """The notebook with the outputs of a kernel of its own."""
    monkeypatch.setenv("SAM2TRAIN_ROOT", str(root))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent))  # as if the package was installed
    monkeypatch.setenv("IPYTHONDIR", str(root / "ipython"))
    monkeypatch.setenv("MPLCONFIGDIR", str(root / "matplotlib"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": NOTEBOOKS}})
    return client.execute()


def outputs(notebook: nbformat.NotebookNode, kind: str) -> list[str]:
    """What its cells gave of one MIME type, in order."""
    found = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output["data"][kind] for output in found if kind in output.get("data", {})]


def test_there_are_four():
    assert [path.name[:2] for path in PATHS] == ["01", "02", "03", "04"]


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_cells_are_short_and_prose_states_no_number(path):
    """A sentence with a result would not follow the data; only the code may make one."""
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "code":
            assert len([line for line in cell.source.splitlines() if line.strip()]) <= 10
        else:
            assert not re.search(r"\d\.\d|\d ?%|±", cell.source), cell.source


class TestExecuted:
    def test_browse_runs(self, root, monkeypatch):
        notebook = execute(NOTEBOOKS / "01_browse_runs.ipynb", root, monkeypatch)
        assert (
            "17 runs: 15 finished, 1 unreadable, 1 failed" in outputs(notebook, "text/markdown")[0]
        )
        assert len(outputs(notebook, "image/png")) == 3  # J&F, loss, parameters
        assert len(outputs(notebook, "image/jpeg")) == 1  # overlays
        table, failed = outputs(notebook, "text/html")
        assert table.count("<tr") == 1 + 17
        assert "stopped by an error" in failed
        assert "broken/config.yaml" in failed

    def test_prompts(self, root, monkeypatch):
        notebook = execute(NOTEBOOKS / "02_prompt_ablation.ipynb", root, monkeypatch)
        said, gained = outputs(notebook, "text/markdown")
        assert "**prompt_types point+bbox** against point: J&F +0.062 ± 0.000" in said
        assert "Shown in J&F: prompt_types bbox is higher than point" in said
        assert "2 comparisons, corrected by Holm" in said
        assert "Shown in J&F gained since step 0" in gained
        assert len(outputs(notebook, "image/png")) == 2
        assert "point+bbox" in outputs(notebook, "text/html")[0]

    def test_memories(self, root, monkeypatch):
        notebook = execute(NOTEBOOKS / "03_num_maskmem_ablation.ipynb", root, monkeypatch)
        memories, pointers, gained, far = outputs(notebook, "text/markdown")
        assert "Shown in J&F gained since step 0" in gained
        assert "max_obj_ptrs_in_encoder 0: **num_maskmem 7** against 1: J&F +0.062" in memories
        assert "num_maskmem 7: **max_obj_ptrs_in_encoder 16** against 0: J&F +0.031" in pointers
        assert "recall_after_absence at 3 to 4 frames" in far
        assert "these videos only" in far
        assert len(outputs(notebook, "image/png")) == 2

    def test_data(self, root, monkeypatch):
        notebook = execute(NOTEBOOKS / "04_look_at_the_data.ipynb", root, monkeypatch)
        (said,) = outputs(notebook, "text/markdown")
        assert "Of 6 objects, 0 appear after the first frame, 1 vanish, and 1 of these" in said
        assert len(outputs(notebook, "image/png")) == 2
        assert len(outputs(notebook, "image/jpeg")) == 2

    def test_without_results_a_message_says_what_makes_them(self, tmp_path, monkeypatch):
        with pytest.raises(CellExecutionError) as caught:
            execute(NOTEBOOKS / "02_prompt_ablation.ipynb", tmp_path, monkeypatch)
        shown = str(caught.value)
        assert "error: prompts.csv is not there yet" in shown
        assert "python run.py --collect runs/sweeps/prompts" in shown
        assert "Traceback" not in shown
