"""The structure the code promises: arrows point down, imports are cheap, settings files load."""

import ast
import re
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import sam2train
from sam2train.experiment import load_experiment
from sam2train.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "sam2train"

# A group imports itself and the groups that stand before it; `data` and `model` do not import each
# other: they meet in `clips`.
GROUPS = {
    "ground": {
        *("errors", "files", "config", "config_yaml", "machine", "stats", "clips", "distributed"),
        "run_folder",
    },
    "data": {
        *("datasets", "data_source", "data_clips", "data_loader", "data_report", "data_index"),
        *("data_pictures", "data_videos", "data_vos", "data_masks", "data_mask_values"),
        *("data_coco", "data_coco_files", "data_coco_objects", "data_coco_index", "data_rle"),
        *("data_layouts", "data_cvat", "data_sav", "data_synthetic"),
        *("transforms", "prompts", "demo", "demo_videos"),
    },
    "model": {
        *("features", "memory", "model", "model_inputs", "corrections"),
        *("pretrained", "pretrained_download", "lora", "losses", "optimizer", "sharding"),
    },
    "scores": {
        *("metrics", "evaluate", "scores", "pictures", "score_pictures", "video_files"),
        "overlays",
        "attributes",
    },
    "runs": {
        *("experiment", "runlog", "runlog_wandb", "checkpoint", "probe"),
        *("export", "export_transformers"),
        *("trainer", "trainer_step", "run_scores", "training_run", "eval_checkpoint", "predict"),
    },
    "reports": {
        *("results", "ablation", "ablation_text", "compare", "figures"),
        *("sweep", "sweep_trials", "sweep_file", "sweep_search", "sweep_processes"),
    },
    "speed": {
        *("speed", "speed_clock", "speed_step", "speed_data"),
    },
    "door": {"commands", "cli"},
}
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


def imports_of(module: str) -> set[str]:
    """The modules of the package that a module imports, anywhere in it."""
    names = {
        part[1]
        for name in imports(PACKAGE / f"{module}.py", anywhere=True)
        if (part := re.match(r"sam2train\.(\w+)", name))
    }
    return names & set().union(*GROUPS.values())


def test_every_module_is_in_a_group():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    assert modules == set().union(*GROUPS.values())
    assert sum(len(modules) for modules in GROUPS.values()) == len(modules)


def test_the_readme_names_every_module_in_its_group():
    rows = re.findall(r"^\| (\w+) \| (`.*?) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    named = {group: re.findall(r"`([\w*]+)`", rooms) for group, rooms in rows if group in GROUPS}
    assert named.keys() == GROUPS.keys()
    for group, modules in GROUPS.items():
        assert {m for m in modules if not any(fnmatchcase(m, n) for n in named[group])} == set()
        assert [n for n in named[group] if not any(fnmatchcase(m, n) for m in modules)] == []


def test_every_module_has_its_test_file():
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    tested = {path.stem.removeprefix("test_") for path in (ROOT / "tests").glob("test_*.py")}
    assert not {m for m in modules - tested if not m.startswith("speed_")}  # parts of `speed`


@pytest.mark.parametrize("group", GROUPS)
def test_a_group_imports_itself_and_those_before_it(group):
    before = list(GROUPS)[: list(GROUPS).index(group) + 1]
    if group == "model":
        before.remove("data")
    allowed = set().union(*(GROUPS[name] for name in before))
    wrong = {m: sorted(imports_of(m) - allowed) for m in GROUPS[group] if imports_of(m) - allowed}
    assert not wrong


@pytest.mark.parametrize("group", GROUPS)
def test_no_circle_of_imports_in_a_group(group):
    left = {module: imports_of(module) & GROUPS[group] for module in GROUPS[group]}
    while free := [module for module, needs in left.items() if not needs & left.keys()]:
        for module in free:
            del left[module]
    assert not left


def test_the_command_line_imports_nothing_heavy():
    top = {name.split(".")[0] for name in imports(PACKAGE / "cli.py", anywhere=False)}
    assert not top & HEAVY


def test_settings_are_read_without_torch(tmp_path):
    """So that a wrong one is told in half a second."""
    file = ROOT / "experiments/coco_point_bbox.yaml"
    code = (
        "import sys; from sam2train.cli import main\n"
        f"code = main([{str(file)!r}, 'trainer.num_stepss=3'])\n"
        f"assert not sys.modules.keys() & {HEAVY - {'cv2'}}, sys.modules.keys()\n"
        "sys.exit(code)"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, "did you mean `trainer.num_steps`" in done.stderr) == (2, True)


# What Windows does not have; the libraries that we import know it, and are imported before.
WITHOUT_POSIX = """
import os, signal, socket, sys, cv2, torch, torchvision.transforms.v2, scipy.stats, pandas
import hydra, matplotlib.pyplot, pydantic, rich.live, torch.utils.data, torch.distributed
import concurrent.futures.process, multiprocessing.popen_spawn_posix
for owner, names in (
    (os, "fork setpgid setsid sched_getaffinity sysconf memfd_create waitpid getuid"),
    (signal, "SIGHUP SIGUSR1 SIGKILL SIGALRM setitimer pthread_sigmask"),
    (socket, "send_fds recv_fds"),
):
    for name in names.split():
        delattr(owner, name)
for name in ("fcntl", "resource", "termios", "pwd", "grp"):
    sys.modules[name] = None
"""


def test_importing_the_modules_leaves_no_trace(tmp_path):
    """No file, no environment variable, no CUDA, no W&B; and nothing of POSIX is needed for it."""
    modules = ", ".join(f"sam2train.{path.stem}" for path in PACKAGE.glob("*.py"))
    code = (
        f"{WITHOUT_POSIX}\nbefore = dict(os.environ)\n"  # OpenCV sets variables of its own
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
    header = "\n".join(lines[: next(k for k, line in enumerate(lines) if line[:1] != "#")])
    parts = (f"python run.py experiments/{path.name}", "# Cost: ", "# Score: ")
    places = [header.find(part) for part in parts]
    assert -1 < places[0] < places[1] < places[2], "then command, cost and score, in this order"


def test_no_path_of_the_machine_that_wrote_it():
    here = {str(ROOT.parent), str(Path.home())} - {"/"}
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in files.stdout.split():
        path = ROOT / name
        if path.suffix in {".py", ".md", ".yaml", ".toml", ".txt", ".ipynb"} and path.exists():
            text = path.read_text()
            assert not any(f"{folder}/" in text for folder in here), name


def test_one_module_spells_the_names_of_a_run_s_files():
    """Whole words of code, as in `folder / "scores.csv"`; not what a message or docstring says."""
    places = [cell.cell_contents for cell in _closures(RunFolder)]
    names = {name for place in places for name in (place, Path(place).name)}
    names -= {"wandb", "tensorboard", "overlays", "masks", "frames"}  # words for more than a folder
    assert {"metrics.jsonl", "last.pt", "checkpoints"} <= names
    spelled = {}
    for path in PACKAGE.glob("*.py"):
        texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if _is_text(node))
        words = (text for text in texts if " " not in text)
        if found := {word for word in words if names & {word, word.split("/")[-1]}}:
            spelled[path.stem] = found
    assert spelled.pop("run_folder") >= {"metrics.jsonl", "checkpoints/last.pt"}
    assert not spelled


def _closures(folder: type) -> list:
    """What the properties of a class keep: the name of a place each."""
    properties = [part for part in vars(folder).values() if isinstance(part, property)]
    return [cell for part in properties for cell in part.fget.__closure__ or ()]


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def test_the_files_of_a_release_name_one_version():
    version = sam2train.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()
    jobs = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())["jobs"]
    scripts = [step["run"].split()[-1] for job in jobs.values() for step in job["steps"][-1:]]
    assert scripts == [".ci/run", ".ci/oldest"]
    assert all((ROOT / script).is_file() for script in scripts)


def test_the_lock_has_a_version_of_all_that_the_project_names():
    """One for the oldest Python as well as the newest; within the ranges."""
    text = (ROOT / "pyproject.toml").read_text()
    named = [Requirement(line) for line in re.findall(r'"([a-z0-9-]+[=>]=[^"]+)"', text)]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and line[0] != "#"]
    assert len(named) > 25
    for python in ("3.10", "3.11", "3.12", "3.13", "3.14"):
        here = {"python_version": python, "python_full_version": f"{python}.9"}
        found = {
            canonicalize_name(pin.name): next(iter(pin.specifier)).version
            for pin in pins
            if pin.marker is None or pin.marker.evaluate(here)
        }
        for wanted in named:
            if wanted.name not in ("setuptools", "sam2train"):
                assert wanted.specifier.contains(found[canonicalize_name(wanted.name)]), wanted


def test_no_name_has_two_meanings():
    """Names at the top level of a module, defined there, private ones too."""
    found: dict[str, list[str]] = {}
    for path in PACKAGE.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            for name in _defined(node):
                found.setdefault(name, []).append(path.stem)
    assert {"Trainer", "RunFolder", "FORMATS", "PROMPTS", "TRAINED"} <= found.keys()
    assert not {name: rooms for name, rooms in found.items() if len(set(rooms)) > 1}


def _defined(node: ast.stmt) -> set[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return set()
    return {part.id for t in targets for part in ast.walk(t) if isinstance(part, ast.Name)}
