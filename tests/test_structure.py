"""The structure the code promises: arrows point down, imports are cheap, settings files load."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sam2train.experiment import load_experiment

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sam2train"

# A module imports from lower levels only.
LEVELS = [
    {"errors", "interrupt"},
    {
        "intervals",
        "clips",
        "config",
        "metrics",
        "checkpoint",
        "devices",
        "images",
        "pretrained",
        "shapes",
    },
    {
        "demo_videos",
        "model_inputs",
        "prompts",
        "losses",
        "transforms",
        "tracking",
        "optimizer",
        "videos",
        "synthetic",
    },
    {"demo", "overlays", "corrections", "coco", "mask_cache", "presence", "results"},
    {"sampling", "ablation", "memory"},
    {"datasets", "vos", "figures", "model"},
    {"sav", "compare"},
    {"evaluate"},
    {"experiment", "environment", "horizon", "video_overlays", "mask_files", "prompt_cells"},
    {"audit", "build", "scoring", "score_figures", "sweep_file", "sweep_trials"},
    {"trainer", "describe", "export", "check", "benchmark", "sweep_search", "sweep_report"},
    {"sweep"},
    {"launch"},
]
HEAVY = {"torch", "torchvision", "sam2", "wandb", "hydra", "cv2", "pandas", "matplotlib", "scipy"}


def imports(path: Path, *, anywhere: bool) -> set[str]:
    """Names of imported modules, everywhere or at the top level only."""
    tree = ast.parse(path.read_text())
    nodes = ast.walk(tree) if anywhere else tree.body
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_module_has_a_level():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set().union(*LEVELS)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.stem)
def test_arrows_point_down(path):
    level = {name: k for k, names in enumerate(LEVELS) for name in names}
    for name in imports(path, anywhere=True):
        match = re.match(r"sam2train\.(\w+)", name)
        if match and match[1] in level and path.stem != "__init__":
            assert level[match[1]] < level[path.stem], f"{path.stem} imports {match[1]}"


def test_the_launcher_imports_nothing_heavy():
    top = {name.split(".")[0] for name in imports(PACKAGE / "launch.py", anywhere=False)}
    assert not top & HEAVY


def test_importing_the_modules_leaves_no_trace(tmp_path):
    """No file, no environment variable, no CUDA, no W&B."""
    modules = ", ".join(f"sam2train.{path.stem}" for path in PACKAGE.glob("*.py"))
    code = (
        "import os, sys, cv2; before = dict(os.environ)\n"  # OpenCV sets variables of its own
        f"import {modules.replace('.__init__', '')}\n"
        "assert dict(os.environ) == before\n"
        "assert 'wandb' not in sys.modules\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "path", sorted((ROOT / "experiments").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_experiment_loads_and_says_what_it_is(path):
    load_experiment(path)
    lines = path.read_text().splitlines()
    assert re.match(r"# \w.{20,98}[.]$", lines[0]), "the first line describes the experiment"
    assert f"python run.py experiments/{path.name}" in "\n".join(lines[1:4]), "then its command"


def test_no_path_of_the_machine_that_wrote_it():
    here = {str(ROOT.parent), str(Path.home())} - {"/"}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".ipynb"} and path.exists():
            text = path.read_text()
            assert not any(f"{folder}/" in text for folder in here), name
