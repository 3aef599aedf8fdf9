"""Mutated inputs for `soak.py`: each kind makes the input of a number, and tries it."""

from __future__ import annotations

import copy
import datetime
import io
import json
import random
import shutil
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from conftest import SIZE, make_coco
from PIL import Image
from rich.console import Console
from test_data_layouts import make_burst, make_youtube_vis
from test_data_vos import make_vos

from sam2train import checkpoint, cli
from sam2train.commands import COMMANDS
from sam2train.compare import compare_runs, show_runs
from sam2train.config import to_yaml
from sam2train.config_yaml import load_yaml
from sam2train.data_clips import ClipDataset, clip_settings
from sam2train.data_rle import decode_segmentation, run_lengths, segmentation_area
from sam2train.datasets import COCODataset, DatasetConfig, read_folders
from sam2train.errors import UserError
from sam2train.experiment import load_experiment
from sam2train.pretrained import read_weights
from sam2train.results import load_runs, load_scores
from sam2train.run_folder import RunFolder
from sam2train.scores import SCORE_COLUMNS, RowsFile
from sam2train.sweep_file import check_values, grid, load_sweep
from sam2train.sweep_search import examples
from sam2train.sweep_trials import Trial, read_record

ROOT = Path(__file__).parents[1]

# What programs stumble over, wherever a value may stand.
ODD: list[Any] = [
    *(None, True, False, 0, -1, 1, 3, 255, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400),
    *(0.5, 1.5, -0.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), -float("inf")),
    *("", " ", "x", "..", ".", "/", "~", "a" * 300, "a" * 20_000, "\0", "\n", "\x1b[31m", "[/red]"),
    *("\u202e", "\ud800", "é", "NaN", "null", "1e-4", "010", "yes", "b'x'", "[", "{", "%00", "=="),
    *("../../etc/passwd", "C:\\x", "/dev/zero", "${envvar:HOME}", "$(id)", "${args}", "--smoke"),
    *([], {}, [[]], [{}], [1], [1.5, "x"], ["a"], {"a": 1}, {"": 0}, {"value": 1}),
    *({"values": []}, {"parameters": {}}, [[1, 2]], [[0.1] * 8], [[[[1]]]], {"counts": 5}),
    *({"size": [48, 64], "counts": [2**63 - 1, 2**63 - 1, 3074]}, {"exterior": [[0, 0]]}),
]
DATES = [datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1)]
SYNTAX = ("&a ", "*a", "{", "[", "\t", "'", '"', "!!", "!!python/name:os.system ", "\n", "- ", ": ")
SYNTAX += (
    "<<: ",
    "\x00",
    "é",
    "\ufeff",
    "#",
    "? ",
    "|",
    ">",
    "%",
    "@",
    "`",
    ",",
    "}",
    "]",
    "\\",
    "\r",
)


def places(value: Any, above: tuple = (), most: int = 5) -> list[tuple]:
    """The paths to all parts of a nested value; of a list the first and last few."""
    found = [above] if above else []
    if isinstance(value, dict):
        for key in value:
            found += places(value[key], (*above, key), most)
    elif isinstance(value, list):
        for place in {*range(min(len(value), most)), len(value) - 1} - {-1}:
            found += places(value[place], (*above, place), most)
    return found


def mutate(content: Any, rng: random.Random, keys: Sequence[str], odd: Sequence[Any] = ODD) -> Any:
    """A copy in which one to three parts are replaced, deleted, added or moved."""
    content = copy.deepcopy(content)
    for _ in range(rng.choices((1, 2, 3), (6, 2, 1))[0]):
        found = places(content)
        if not found:
            break
        *above, last = rng.choice(found)
        parent = content
        for key in above:
            parent = parent[key]
        how = rng.random()
        if how < 0.55:
            parent[last] = copy.deepcopy(rng.choice(odd))
        elif how < 0.7:
            del parent[last]
        elif how < 0.8:  # what stands elsewhere
            *where, name = rng.choice(found)
            other = content
            with suppress(KeyError, IndexError, TypeError):
                for key in where:
                    other = other[key]
                parent[last] = copy.deepcopy(other[name])
        elif isinstance(parent, dict):
            parent[rng.choice(keys)] = copy.deepcopy(rng.choice(odd))
        else:
            parent.insert(last, copy.deepcopy(rng.choice(odd)))
    return content


def mutate_text(text: str, rng: random.Random) -> str:
    """A text with one to three pieces put in, taken out, doubled or cut off."""
    for _ in range(rng.randint(1, 3)):
        place = rng.randrange(len(text) + 1)
        how = rng.random()
        if how < 0.6:
            text = text[:place] + rng.choice(SYNTAX) + text[place + rng.randrange(3) :]
        elif how < 0.8:
            text = text[:place] + text[place + rng.randrange(40) :]
        elif how < 0.9:
            text = text[:place] + text[place : place + 200] * 2 + text[place:]
        else:
            text = text[:place]
    return text


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    """The bytes with some of them flipped, cut off, doubled or replaced."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not data:
            break
        place, how = rng.randrange(len(data)), rng.random()
        if how < 0.6:
            data[place] ^= 1 << rng.randrange(8)
        elif how < 0.7:
            del data[place:]
        elif how < 0.85:
            data[place : place + rng.randrange(1, 9)] = rng.randbytes(rng.randrange(9))
        else:
            data[place:place] = data[place : place + rng.randrange(200)]
    return bytes(data)


def dump_json(content: Any, rng: random.Random) -> bytes:
    """JSON text of a value, one time in six damaged."""
    text = json.dumps(content)
    if rng.random() < 1 / 6:
        text = mutate_text(text, rng)
    return text.encode("utf-8", "surrogatepass")


def dump_yaml(content: Any, rng: random.Random) -> bytes:
    text = yaml.safe_dump(content, sort_keys=False)
    if rng.random() < 1 / 3:
        text = mutate_text(text, rng)
    return text.encode("utf-8", "surrogatepass")


class Kind:
    """Inputs of one kind, made below a folder of its own.

    `prepare` makes what all inputs share. `write` makes one in the folder and leaves the paths that
    it wrote in `written`; `read` gives it to the program.
    """

    num = 20  # inputs before another kind has its turn

    def __init__(self, folder: Path):
        self.folder = folder
        self.written: list[Path] = []
        folder.mkdir(parents=True)
        self.prepare()

    def put(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        self.written.append(path)
        return path

    def prepare(self) -> None:
        pass

    def write(self, rng: random.Random) -> None:
        raise NotImplementedError

    def read(self) -> None:
        raise NotImplementedError


class Config(Kind):
    """Files of experiments."""

    num = 300

    def prepare(self) -> None:
        files = [*sorted((ROOT / "experiments").glob("*.yaml"))]
        self.bases = [load_yaml(path) for path in files]
        self.texts = [path.read_text() for path in files]
        self.keys = sorted({key for base in self.bases for part in base.values() for key in part})
        self.keys += [*self.bases[0], "a.b", ".", "dataset.", "model.image_size"]

    def write(self, rng: random.Random) -> None:
        if rng.random() < 0.3:
            text = mutate_text(rng.choice(self.texts), rng).encode("utf-8", "surrogatepass")
        else:
            text = dump_yaml(mutate(rng.choice(self.bases), rng, self.keys, ODD + DATES), rng)
        self.put("experiment.yaml", text)

    def read(self) -> None:
        load_experiment(self.folder / "experiment.yaml")


class Words(Kind):
    """What may be typed: options, files, settings, and what is none of these."""

    num = 200

    def prepare(self) -> None:
        flags = [flag for command in COMMANDS for flag in command.options()]
        files = [str(path) for path in sorted((ROOT / "experiments").glob("*.yaml"))]
        files += [str(path) for path in sorted((ROOT / "sweeps").glob("*.yaml"))]
        settings = [f"{s}.{k}" for base in map(load_yaml, map(Path, files[:4])) for s in base
                    if isinstance(base[s], dict) for k in base[s]]  # fmt: skip
        self.flags, self.files, self.settings = flags, files, settings

    def write(self, rng: random.Random) -> None:
        words = []
        for _ in range(rng.randint(0, 6)):
            how = rng.random()
            if how < 0.3:
                word = rng.choice(self.flags)
            elif how < 0.5:
                word = rng.choice(self.files)
            elif how < 0.85:
                value = rng.choice(ODD)
                word = f"{rng.choice(['', '--'])}{rng.choice(self.settings)}={value}"
            else:
                word = str(rng.choice(ODD))
            words.append(mutate_text(word, rng) if rng.random() < 0.3 else word)
        self.put("words.json", json.dumps(words).encode())

    def read(self) -> None:
        words = json.loads((self.folder / "words.json").read_text())
        with redirect_stdout(io.StringIO()):
            if "--help" in words or "-h" in words:
                cli.help_text(words)
            command = cli.parse(words)
            if getattr(command, "takes", None) == "experiment":
                command.experiment()


class Coco(Kind):
    """Annotations in the layouts of COCO, YouTube-VIS and BURST, read as far as clips."""

    num = 60

    def prepare(self) -> None:
        makers: dict[str, Callable[[Path], Path]] = {
            "coco": lambda folder: make_coco(folder, num_videos=2, num_frames=4),
            "youtube_vis": make_youtube_vis,
            "burst": make_burst,
        }
        self.bases = {}
        for name, make in makers.items():
            (self.folder / name).mkdir()
            self.bases[name] = json.loads(make(self.folder / name).read_text())
        text = "track_id is_annotated attributes frame_id path file_name segmentation category_id "
        text += "iscrowd video_id segmentations sequences videos width height id image_id order"
        self.keys = text.split()

    def write(self, rng: random.Random) -> None:
        name = rng.choice(sorted(self.bases))
        content = mutate(self.bases[name], rng, self.keys)
        self.path = self.put(f"{name}/mutated.json", dump_json(content, rng))

    def read(self) -> None:
        data = COCODataset(self.path, image_size=SIZE, video_clip_length=3)
        _use(data)


def _use(data: ClipDataset) -> None:
    """What a training, a validation and a resumed run read of a data set."""
    data[0]
    for video in data.videos[:2]:
        for t in range(min(len(video.frames), 2)):
            data.read_frame(video, t)
            data.read_ignore(video, t)
            for object_id in video.object_ids[:3]:
                data.read_mask(video, t, object_id)
    assert len(data.fingerprint)


class Rle(Kind):
    """Segmentations: RLE as text and as lists, polygons, and what is none of these."""

    num = 4000

    def prepare(self) -> None:
        content = json.loads(make_coco(self.folder / "data", num_frames=3).read_text())
        texts = [a["segmentation"] for a in content["annotations"]]
        lists = [{"size": t["size"], "counts": run_lengths(t, SIZE).tolist()} for t in texts]
        polygons = [
            [[3, 3, 20, 3, 20.5, 30, 3, 30]],
            [[1, 1, 9, 1, 9, 9], [20, 20, 30, 20, 25, 40]],
        ]
        holes = [{"exterior": [[2, 2], [30, 2], [30, 30]], "interiors": [[[5, 5], [9, 5], [9, 9]]]}]
        self.bases = [*texts, *lists, *polygons, holes, holes[0]]

    def write(self, rng: random.Random) -> None:
        # In memory: a file each would cost more than reading it. A finding writes it.
        base = rng.choice(self.bases)
        how = rng.random()
        if isinstance(base, dict) and isinstance(base.get("counts"), str) and how < 0.5:
            text = mutate_bytes(base["counts"].encode(), rng).decode("latin-1")
            self.content: Any = {**base, "counts": text}
        elif isinstance(base, dict) and isinstance(base.get("counts"), list) and how < 0.5:
            counts = [rng.choice((rng.randrange(4000), run, run, -run)) for run in base["counts"]]
            self.content = {**base, "counts": counts[: rng.randrange(len(counts) + 1)]}
        else:
            keys = ("size", "counts", "exterior", "interiors", "x")
            self.content = mutate({"segmentation": base}, rng, keys).get("segmentation")
        self.size = rng.choice((SIZE, SIZE, SIZE, (1, 1), (64, 48), (3, 1000)))

    def save(self) -> None:
        data = json.dumps([self.content, self.size])
        self.put("segmentation.json", data.encode("utf-8", "surrogatepass"))

    def read(self) -> None:
        try:
            mask = decode_segmentation(self.content, self.size)
            area = segmentation_area(self.content, self.size)
        except ValueError as problem:  # its caller adds where it is
            raise UserError(str(problem)) from problem
        assert mask.shape == self.size
        assert mask.dtype == bool
        assert area == mask.sum()


class Checkpoint(Kind):
    """Checkpoints with other bytes, other contents and other programs' files."""

    num = 150

    def prepare(self) -> None:
        torch.manual_seed(0)
        self.model = torch.nn.Linear(4, 3)
        optimizer = torch.optim.AdamW(self.model.parameters())
        self.model(torch.ones(4)).sum().backward()
        optimizer.step()
        self.content = {
            "model": self.model.state_dict(),
            "base": {"path": None, "sha256": None, "config_path": None},
            "config": "model: {}\n",
            "step": 3,
            "best": 0.5,
            "scores": {"J_and_F": 0.5},
            "baseline": {"J_and_F": 0.4},
            "scored": 2,
            "window": {"sums": {"loss": torch.tensor(1.0)}, "counts": {"loss": 1}, "lines": 4},
            "run_id": "run",
            "data": {"train": "abc"},
            "audited": True,
            "untrained_rows": [1],
            "optimizer": optimizer.state_dict(),
            "rng": {"torch": torch.get_rng_state(), "cuda": []},
        }
        path = self.folder / "whole.pt"
        checkpoint.save(path, self.content)
        self.whole = path.read_bytes()
        torch.save({"model": self.model.state_dict()}, path)
        self.foreign = path.read_bytes()

    def write(self, rng: random.Random) -> None:
        if rng.random() < 0.4:
            data = rng.choice((self.whole, self.whole, self.foreign))
            data = data.replace(b"sha256:", b"sha255:") if rng.random() < 0.2 else data
            self.path = self.put("mutated.pt", mutate_bytes(data, rng))
            return
        odd = [one for one in ODD if not (isinstance(one, str) and "\ud800" in one)]
        odd += [torch.ones(2), torch.tensor(float("nan")), torch.zeros(0), torch.ones(3, 4).bool()]
        content = mutate(self.content, rng, [*self.content, "format", "x"], odd)
        self.path = self.folder / "mutated.pt"
        self.written.append(self.path)
        if rng.random() < 0.5:
            checkpoint.save(self.path, content)
        else:
            torch.save(content if rng.random() < 0.7 else content.get("model"), self.path)

    def read(self) -> None:
        with suppress(UserError):
            checkpoint.is_checkpoint(self.path)
        with suppress(UserError):
            read_weights(self.path)
        content = checkpoint.load(self.path)
        optimizer = torch.optim.AdamW(self.model.parameters())
        checkpoint.apply_weights(self.model, content, None, self.path)
        if content["optimizer"] is not None:
            checkpoint.restore_optimizer(optimizer, content["optimizer"], self.path)


class Sweeps(Kind):
    """Sweep files, as far as the commands of their trials."""

    num = 100

    def prepare(self) -> None:
        files = sorted((ROOT / "sweeps").glob("*.yaml"))
        self.bases = [yaml.safe_load(path.read_text()) for path in files]
        spread = {"distribution": "q_log_uniform_values", "min": 0.1, "max": 3, "q": 0.1}
        nested = {"parameters": {"focal": {"values": [1, 2], "probabilities": [0.5, 0.5]}}}
        more = {"loss.dice": spread, "trainer.seed": {"min": 0, "max": 9}, "loss": nested}
        self.bases.append({**self.bases[0], "method": "random", "run_cap": 3, "parameters": more})
        text = (
            "min max q mu sigma values value distribution parameters probabilities command method"
        )
        self.keys = [*text.split(), "run_cap", "early_terminate", "a.b", ".", "..", "loss.dice.x"]

    def write(self, rng: random.Random) -> None:
        content = mutate(rng.choice(self.bases), rng, self.keys, ODD + DATES)
        self.put("sweep.yaml", dump_yaml(content, rng))

    def read(self) -> None:
        sweep = load_sweep(self.folder / "sweep.yaml")
        is_grid = sweep.config.method == "grid"
        values = grid(sweep)[:20] if is_grid else examples(sweep.specs)
        check_values(sweep, values)
        for one in values[:3]:
            sweep.command(one)
        if not is_grid and sweep.config.method != "bayes":
            sweep.next_values([])


class Vos(Kind):
    """Folders of frames and masks: names, bytes, modes, sizes, lists."""

    num = 40

    def prepare(self) -> None:
        base = make_vos(self.folder / "base", names=("bear",))
        files = [path for path in base.rglob("*") if path.is_file()]
        self.files = {path.relative_to(base): path.read_bytes() for path in files}

    def write(self, rng: random.Random) -> None:
        root = self.folder / "mutated"
        shutil.rmtree(root, ignore_errors=True)
        for name, data in self.files.items():  # from memory: a link may lead out of the folder
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        self.written.append(root)
        for _ in range(rng.choices((1, 2, 3), (6, 2, 1))[0]):
            path = rng.choice(sorted(root.rglob("*")))
            how = rng.random()
            with suppress(OSError, ValueError):  # a name that no file can have
                if how < 0.3 and path.is_file():
                    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
                elif how < 0.5:
                    name = rng.choice(
                        [v for v in ODD if isinstance(v, str)] + ["00009.png", "x.txt"]
                    )
                    path.rename(path.with_name(name + rng.choice(["", ".png", ".jpg"])))
                elif how < 0.6:
                    shutil.rmtree(path) if path.is_dir() else path.unlink()
                elif how < 0.8 and path.is_file():
                    mode = rng.choice(
                        ("1", "L", "P", "RGB", "RGBA", "I;16", "F", "CMYK", "LA", "I")
                    )
                    size = rng.choice((SIZE[::-1], SIZE, (1, 1), (1000, 1)))
                    picture = Image.open(path).convert("RGB").resize(size)
                    picture = picture.convert("L").convert(mode) if mode[0] in "IF" else picture
                    picture.convert(mode[0] if mode == "I;16" else mode).save(
                        path, rng.choice(("PNG", "TIFF", "JPEG", "GIF", "WEBP"))
                    )
                elif how < 0.9 and path.is_file():
                    path.write_bytes(np.random.default_rng(0).bytes(rng.randrange(200)))
                else:
                    target = rng.choice([".", "..", "/dev/null", "nowhere", "../../../base"])
                    (path if path.is_dir() else path.parent).joinpath("link.png").symlink_to(target)
        self.path = root
        if rng.random() < 0.3:
            text = mutate_text("bear\nbear/00000.jpg bear/00000.png\n", rng)
            self.path = root / "list.txt"
            self.path.write_bytes(text.encode("utf-8", "surrogatepass"))

    def read(self) -> None:
        settings = clip_settings(image_size=SIZE, video_clip_length=4)
        config = DatasetConfig(dataset_type="vos", data_path=str(self.path))
        _use(ClipDataset(read_folders(self.path, config), settings))


class Runs(Kind):
    """What runs and sweeps write, damaged, as tables and a sweep that goes on read it."""

    num = 15

    def prepare(self) -> None:
        self.files = {}
        experiment = load_experiment(ROOT / "experiments" / "coco_point_bbox.yaml")
        self.files["config.yaml"] = to_yaml(experiment).encode()
        score = dict.fromkeys(SCORE_COLUMNS, 1.0) | {"split": "val", "model": "trained"}
        lines, rows = [], [",".join(SCORE_COLUMNS)]
        for step in (0, 5, 10):
            lines.append({"step": step, "val/J_and_F": 0.1 + step / 50, "seconds": 1.0 + step})
            lines.append({"step": step + 1, "loss": 1.0, "lr": 1e-3, "seconds": 2.0 + step})
            for video in ("1", "2", "3"):
                cells = score | {"step": step, "video_id": video, "object_id": "1"}
                cells |= {"J_and_F": 0.1 * int(video) + step / 50}
                rows.append(",".join(str(cells[name]) for name in SCORE_COLUMNS))
        self.files["metrics.jsonl"] = "".join(json.dumps(line) + "\n" for line in lines).encode()
        self.files["scores.csv"] = ("\n".join(rows) + "\n").encode()
        summary = {"status": "finished", "steps": 10, "seconds": 12.5, "baseline/J_and_F": 0.1}
        summary |= {"best/J_and_F": 0.3, "params/total": 10, "params/trainable": 5}
        self.files["summary.json"] = json.dumps(summary).encode()
        environment = {"device": "cpu", "code": {"commit": "abc", "changed": False}}
        self.files["environment.json"] = json.dumps(environment).encode()
        row = {"name": "001", "run_id": "abc", "values": {"trainer.seed": 1}, "state": "finished"}
        record = {"sweep": {"method": "grid"}, "experiment": {}, "sweep_id": None, "trials": [row]}
        self.files["../sweep.json"] = json.dumps(record).encode()

    def write(self, rng: random.Random) -> None:
        runs = self.folder / "sweep"
        shutil.rmtree(runs, ignore_errors=True)
        self.written.append(runs)
        changed = rng.sample(sorted(self.files), rng.randint(1, 2))
        for run in ("001", "002"):
            (runs / run).mkdir(parents=True)
            for name, data in self.files.items():
                if name in changed and run == "001":
                    data = self._mutated(name, data, rng)
                if data is not None:
                    (runs / run / name).write_bytes(data)

    def _mutated(self, name: str, data: bytes, rng: random.Random) -> bytes | None:
        how = rng.random()
        if how < 0.05:
            return None
        if name.endswith(".json") and how < 0.6:
            keys = ("status", "steps", "code", "values", "trials", "x")
            return dump_json(mutate(json.loads(data), rng, keys), rng)
        if name.endswith(".jsonl") and how < 0.6:
            lines = data.decode().splitlines()
            place = rng.randrange(len(lines))
            line = mutate(json.loads(lines[place]), rng, ("step", "loss", "val/J_and_F", "seconds"))
            lines[place] = json.dumps(line)
            return "\n".join(lines).encode("utf-8", "surrogatepass")
        if how < 0.8:
            text = mutate_text(data.decode(), rng)
            return text.encode("utf-8", "surrogatepass")
        return mutate_bytes(data, rng)

    def read(self) -> None:
        runs = self.folder / "sweep"
        one, two = RunFolder(runs / "001"), RunFolder(runs / "002")
        found = load_runs(runs)
        assert len(found) >= 1, "the other run is whole"
        console = Console(file=io.StringIO(), width=100)
        show_runs(runs, console)
        with suppress(UserError):
            load_scores(one.path)
        with suppress(UserError):
            compare_runs([one.path, two.path], console)
        RowsFile(one.scores, SCORE_COLUMNS, 5, say=lambda line: None)
        trial = Trial("001", "abc", {"trainer.seed": 1}, one.path)
        trial.recall("val/J_and_F")
        read_record(runs)


KINDS: dict[str, type[Kind]] = {
    "config": Config,
    "words": Words,
    "coco": Coco,
    "rle": Rle,
    "checkpoint": Checkpoint,
    "sweep": Sweeps,
    "vos": Vos,
    "runs": Runs,
}
