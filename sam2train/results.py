"""Runs on disk, or in a W&B project -> DataFrames of one shape, a row a run or a row a step."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sam2train.config import flatten
from sam2train.config_yaml import load_yaml, quote
from sam2train.errors import UserError
from sam2train.metrics import TRAINED
from sam2train.run_folder import (
    EVALUATIONS,
    TEXTS,
    RunFolder,
    Say,
    read_environment,
    read_metrics,
    read_summary,
    read_table,
)
from sam2train.runlog_wandb import STEP_AXIS
from sam2train.stats import (
    mean_interval,
)

if TYPE_CHECKING:
    import pandas as pd


# Runs that differ in these only form a group: the seeds of one experiment.
_NOT_OF_THE_GROUP = {
    "trainer.seed",
    "trainer.save_every",
    "trainer.log_every",
    "dataset.num_workers",
    "dataset.mask_cache_mb",
    "evaluation.num_overlays",
}
# A run that says it is running and wrote nothing for so long was killed. Seconds; a guess, raised
# to three times the longest silence the run had before.
QUIET = 1800
_ID_COLUMNS = ("video_id", "object_id")
_SCORES = ("step", "split", "model", "video_id", "object_id", "J", "F", "J_and_F", "num_frames")
_COUNTS = ("params/", "trainable/")
_RUN_COLUMNS = ("group", "seed", "evaluation_seed", "step", "num_steps", "baseline", "last", "best")
_RUN_COLUMNS += ("scored", "gain", "seconds", "written", "commit", "device")
_WANDB_STATES = {"killed": "interrupted", "preempted": "interrupted", "preempting": "interrupted"}


def find_runs(folder: Path) -> list[Path]:
    """The run folders at and below a folder, by path; what lies inside a run is not searched, nor
    the evaluations of checkpoints, which train nothing.

    Raises:
        UserError: no such folder, or no run in it.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; runs are written below runs/")
    found = []
    for place, names, _ in os.walk(folder):
        if RunFolder(Path(place)).is_run:
            found.append(Path(place))
            names.clear()
        names[:] = [name for name in names if not name.startswith(".") and name != EVALUATIONS]
    if not found:
        raise UserError(
            f"{folder}: no run in it; a run is a folder with config.yaml and metrics.jsonl, as "
            "`python run.py experiments/coco_point_bbox.yaml` writes"
        )
    return sorted(found)


def load_runs(folder: Path) -> pd.DataFrame:
    """One row a run, in the order of their paths.

    Columns:
        source, path: "disk" and the run's folder; "wandb" and entity/project/id.
        experiment, run, sweep: the folder the run lies in, its own name, the sweep's name or None.
        group: the same text for runs that differ only in `trainer.seed` (and in what moves no
            result, such as the number of workers); `seed` tells them apart. A model.seed or
            dataset.seed of its own is a setting like any other, and so is evaluation.seed.
        evaluation_seed: what drew the prompts that were scored.
        status: finished; interrupted (saved, can be resumed); failed (stopped by an error);
            running; crashed (it says running and has been silent for long: killed); unreadable,
            see `problem`.
        step, num_steps, seconds, written (UTC), commit, device: of the last line that was written.
        baseline, last, best: J&F of the validation at step 0, the last, and the highest; gain is
            last - baseline, scored the step of the last. NaN where there was no validation.
        params/...: total, trainable, and each module's; trainable/...: what is trained of it.
        dotted names: every setting; a list of words is joined by "+".

    Raises:
        UserError: as `find_runs`.
    """
    import pandas as pd

    runs = pd.DataFrame([_read_run(path) for path in find_runs(folder)])
    # All of them where no run can be read, too.
    return runs.reindex(columns=list(dict.fromkeys([*runs.columns, *_RUN_COLUMNS])))


def load_metrics(run: Path, say: Say = print, say_value: Say | None = None) -> pd.DataFrame:
    """What a run wrote, a row each step (the index) and a column each name.

    A resumed run appends to its file: where the step goes back, what the earlier segment wrote from
    there on is left out, and so is a last line that was cut off. Other lines
    and values that are not as a run writes them are told, see `read_metrics`.

    Raises:
        UserError: no such file, or one that cannot be read.
    """
    path = RunFolder(Path(run)).metrics
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a run folder")
    return _by_step(read_metrics(path, say, say_value))


def load_scores(run: Path, model: str = TRAINED, say: Say = print) -> pd.DataFrame:
    """`scores.csv` of a run, of what it trained or of one of its baselines: step, split, video_id,
    object_id, J, F, J_and_F, num_frames and more; a row for each object at each scoring. Ids are
    text. `say` gets a line on rows that are not whole, which are left out.

    Raises:
        UserError: no such file, or columns missing.
    """
    path = RunFolder(Path(run)).scores
    if not path.is_file():
        raise UserError(f"{path}: no such file; a run with validation videos writes it")
    scores = read_csv(path, _SCORES, say)
    return scores[scores["model"] == model]


def load_curves(runs: pd.DataFrame, key: str = "val/J_and_F", api: Any = None) -> pd.DataFrame:
    """Long: experiment, run, group, seed, settings (as `labels` has them), step, value; a row for
    each time a run wrote `key`."""
    import pandas as pd

    columns = ["experiment", "run", "group", "seed", "settings"]
    parts = []
    for row in runs.assign(settings=labels(runs)).itertuples():
        if row.status == "unreadable":
            continue
        if row.source == "wandb":
            metrics = _wandb_metrics((api or _wandb_api()).run(row.path), key)
        elif not RunFolder(Path(row.path)).metrics.is_file():
            continue  # it has not come that far
        else:
            metrics = load_metrics(row.path)
        if key in metrics:
            values = metrics[key].dropna()
            names = {name: getattr(row, name) for name in columns}
            parts.append(pd.DataFrame({**names, "step": values.index, "value": values.to_numpy()}))
    empty = pd.DataFrame(columns=[*columns, "step", "value"])
    return pd.concat(parts, ignore_index=True) if parts else empty


def load_wandb(project: str, api: Any = None) -> pd.DataFrame:
    """As `load_runs`, from a W&B project, "project" or "entity/project"; needs a key.

    `experiment` is the run's name there.

    Raises:
        UserError: no key, no such project, or no run in it.
    """
    import pandas as pd
    import wandb

    api = api or _wandb_api()
    try:
        found = list(api.runs(project, lazy=False))  # lazily, each run would need a request
    except (ValueError, OSError, wandb.Error) as error:
        raise UserError(f"W&B project {project}: {error}; expected entity/project") from error
    if not found:
        raise UserError(f"W&B project {project}: no run in it; `wandb sync` uploads offline runs")
    return pd.DataFrame([_read_wandb_run(run) for run in found])


def varied(runs: pd.DataFrame) -> list[str]:
    """The settings, by dotted name, in which these runs differ, without the seed.

    A setting that only some have differs; runs that cannot be read do not count.
    """
    known = runs[runs["status"] != "unreadable"]
    return [
        name for name in runs.columns if _of_the_group(name) and known[name].map(str).nunique() > 1
    ]


def labels(runs: pd.DataFrame) -> pd.Series:
    """For each run its settings in which these runs differ, as one text: "num_maskmem=7"."""
    names = varied(runs)
    if not names:
        return runs["experiment"].map(str)
    leaves = [name.split(".")[-1] for name in names]
    # "seed" alone means trainer.seed, in every table.
    clear = len({*leaves}) == len(leaves) and "seed" not in leaves
    words = leaves if clear else names
    # As text: a run without one of the settings, from an older version, is a group of its own.
    columns = [word + "=" + runs[name].map(str) for word, name in zip(words, names, strict=True)]
    return columns[0].str.cat(columns[1:], sep=" ")


def overview(runs: pd.DataFrame) -> pd.DataFrame:
    """`load_runs` as a table to look at: its main columns and what was varied, best first."""
    import pandas as pd

    names = ("experiment", "run", "seed", "status", "step", "baseline", "last", "best")
    table = runs.sort_values(["last", "path"], ascending=[False, True], na_position="last")
    table = table.assign(
        minutes=(table["seconds"] / 60).round(1),
        written=pd.to_datetime(table["written"], utc=True).dt.strftime("%Y-%m-%d %H:%M"),
    )
    table = table.reindex(columns=[*names, "params/trainable", "minutes", "written", *varied(runs)])
    # Whole numbers that may be missing, where a run cannot be read.
    whole = dict.fromkeys(("seed", "step", "params/trainable"), "Int64")
    return table.astype(whole).reset_index(drop=True)


def newest(runs: pd.DataFrame) -> pd.DataFrame:
    """The readable runs of the experiment or sweep in which something was written last."""
    runs = runs[runs["status"] != "unreadable"]
    last = runs.loc[runs["written"].idxmax()]
    group = "sweep" if isinstance(last["sweep"], str) else "experiment"  # None becomes NaN
    return runs[runs[group] == last[group]]


def best(runs: pd.DataFrame) -> pd.Series:
    """The run with the highest last J&F; the first one where none was scored."""
    return runs.loc[runs["last"].idxmax() if runs["last"].notna().any() else runs.index[0]]


def status_text(runs: pd.DataFrame) -> str:
    """How many runs there are, how they ended, and which is best: a sentence or two."""
    counts = runs["status"].value_counts()
    ended = ", ".join(f"{num} {name}" for name, num in counts.items())
    text = f"{len(runs)} run{'s' * (len(runs) != 1)}: {ended}."
    top = best(runs)
    if top["last"] == top["last"]:  # not NaN
        where = f"{top['experiment']}/{top['run']}"
        text += f" The highest last J&F is {top['last']:.3f}, of {where}."
        if runs.get("dataset.val_path", runs["run"].iloc[:0]).nunique() > 1:
            text += " They were scored on different videos."
    return text


def failures(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs that did not end well: path, status, step, num_steps, and what to do about it."""
    ways_out = {
        "interrupted": "saved; `--resume` goes on with it",
        "crashed": "killed, without an error message; `--resume` goes on from its last checkpoint",
        "failed": "stopped by an error that stands at the end of its output",
    }
    shown = runs[~runs["status"].isin(["finished", "running"])]
    what = shown["problem"].where(shown["problem"].notna(), shown["status"].map(ways_out))
    table = shown.reindex(columns=["path", "status", "step", "num_steps"]).assign(what=what)
    return table.reset_index(drop=True)


def overlay_files(run: Path) -> pd.DataFrame:
    """The pictures that a run on disk drew: step, video, path; by video, then step."""
    import pandas as pd

    rows = []
    for path in RunFolder(Path(run)).overlays.glob("step_*.[jp][pn]g"):  # PNGs in older runs
        _, step, video = path.stem.split("_", 2)
        rows.append({"step": int(step), "video": video, "path": str(path)})
    return pd.DataFrame(rows, columns=["step", "video", "path"]).sort_values(["video", "step"])


def overlays_to_compare(runs: pd.DataFrame, most: int = 3) -> dict[str, str]:
    """Title -> path of pictures of one video: the best run before training and at its end, then the
    next best runs at their ends, up to `most` of them. Empty where no run drew any on this disk."""
    chosen: dict[str, str] = {}
    video = None
    for row in runs.sort_values("last", ascending=False).to_dict("records"):
        found = overlay_files(row["path"])
        video = video or min(found["video"][found["step"] == found["step"].max()], default=None)
        found = found[found["video"] == video]
        if found.empty or len(chosen) > most:
            continue
        for picture in found.iloc[[-1] if chosen else [0, -1]].to_dict("records"):
            chosen[f"{row['run']}, step {picture['step']}"] = picture["path"]
    return chosen


def over_seeds(frame: pd.DataFrame, by: Sequence[str], value: str = "last") -> pd.DataFrame:
    """A row for each combination of `by`: mean, low, high, num (of seeds), text.

    NaN values are left out; runs that repeat a seed count as one, by their mean.
    """
    import pandas as pd

    rows = []
    for names, part in frame.dropna(subset=[value]).groupby(list(by), sort=True, dropna=False):
        found = mean_interval(part.groupby("seed")[value].mean())
        numbers = {"mean": found.value, "low": found.low, "high": found.high, "num": found.num}
        rows.append({**dict(zip(by, names, strict=True)), **numbers, "text": found.text()})
    return pd.DataFrame(rows, columns=[*by, "mean", "low", "high", "num", "text"])


def _read_run(path: Path) -> dict[str, Any]:
    folder, parent = RunFolder(path), path.resolve().parent
    swept = (parent / "results.csv").is_file() or parent.parent.name == "sweeps"
    row: dict[str, Any] = {
        "source": "disk",
        "path": str(path),
        "experiment": parent.name,
        "run": path.resolve().name,
        "sweep": parent.name if swept else None,
        "status": "unreadable",
        "problem": None,
    }
    said: list[str] = []
    try:
        config = flatten(load_yaml(folder.config))
        _check_numbers(config, folder.config)
        summary = read_summary(folder.summary, folder.metrics, said.append)
        commit, device = read_environment(folder.environment, said.append)
        metrics = _by_step(read_metrics(folder.metrics, said.append))
    except UserError as error:
        return {**row, "problem": str(error)}
    row["problem"] = "; ".join(dict.fromkeys(said)) or None
    row |= _run_numbers(config, summary, metrics)
    places = (folder.config, folder.metrics, folder.summary, folder.scores)
    places += (folder.checkpoints, folder.overlays)
    written = max(place.stat().st_mtime for place in places if place.exists())
    row["status"] = summary.get("status", "running")
    if row["status"] == "running":
        stamps = metrics["seconds"].dropna() if "seconds" in metrics else ()
        longest = float(stamps.diff().max()) if len(stamps) > 1 else 0.0
        if time.time() - written > max(QUIET, 3 * longest):
            row["status"] = "crashed"
    row["written"] = datetime.fromtimestamp(written, timezone.utc)
    row["commit"], row["device"] = commit, device
    return row | _settings(config)


def _check_numbers(config: Mapping[str, Any], path: Path) -> None:
    """UserError for settings that tables count with and that are no whole numbers."""
    for name in ("trainer.seed", "trainer.num_steps", "evaluation.seed"):
        value = config.get(name)
        missing = value is None and name != "evaluation.seed"
        if missing or (value is not None and (type(value) is not int or abs(value) >= 2**63)):
            raise UserError(f"{path}: {name} is {quote(value)}; expected a whole number")


def _read_wandb_run(run: Any) -> dict[str, Any]:
    config = {n: value for n, value in flatten(run.config).items() if "/" not in n}
    summary, metrics = dict(run.summary_metrics), _wandb_metrics(run, "val/J_and_F")
    said = summary.get("status")
    ended = said if said in ("finished", "interrupted", "failed") else None
    row = {
        "source": "wandb",
        "path": "/".join(run.path),
        "experiment": run.config.get("text/experiment", run.name),
        "run": run.id,
        "sweep": run.sweep_name,
        "status": ended or _WANDB_STATES.get(run.state, run.state),
        "problem": None,
        **_run_numbers(config, summary, metrics),
        # When it began; W&B writes UTC, with or without the Z that Python 3.10 does not read.
        "written": datetime.fromisoformat(run.created_at.rstrip("Z")).replace(tzinfo=timezone.utc),
        "commit": run.commit,
        "device": None,
    }
    return row | _settings(config)


def _run_numbers(
    config: Mapping[str, Any], summary: Mapping[str, Any], metrics: pd.DataFrame
) -> dict[str, Any]:
    """Group, seed, progress, scores and parameters, from what both sources have."""
    curve = metrics["val/J_and_F"].dropna() if "val/J_and_F" in metrics else ()
    scores = dict.fromkeys(("baseline", "last", "best", "scored"), math.nan)
    if len(curve):
        baseline = float(curve.loc[0]) if 0 in curve.index else math.nan
        scores = {"baseline": baseline, "last": float(curve.iloc[-1]), "best": float(curve.max())}
        scores["scored"] = int(curve.index[-1])
    settings = {name: value for name, value in config.items() if _of_the_group(name)}
    text = json.dumps(settings, sort_keys=True, default=str)
    # The summary gets its numbers at the end of a run, the metrics have them during it.
    seconds = metrics["seconds"].max() if "seconds" in metrics else 0
    of_prompts = config.get("evaluation.seed")
    return {
        "group": hashlib.sha256(text.encode()).hexdigest()[:8],
        "seed": config.get("trainer.seed"),
        # None, and in runs from before the key: that of the training.
        "evaluation_seed": config.get("trainer.seed") if of_prompts is None else of_prompts,
        "step": int(max(summary.get("steps") or 0, metrics.index.max() if len(metrics) else 0)),
        "num_steps": config.get("trainer.num_steps"),
        **scores,
        "gain": scores["last"] - scores["baseline"],
        "seconds": float(max(summary.get("seconds") or 0, seconds)),
        **{name: value for name, value in summary.items() if name.startswith(_COUNTS)},
    }


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as cells that can be grouped and written to CSV."""

    def cell(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            words = bool(value) and all(isinstance(item, str) for item in value)
            return "+".join(value) if words else json.dumps(value)
        return json.dumps(value) if isinstance(value, Mapping) else value

    return {name: cell(value) for name, value in config.items()}


def _of_the_group(name: str) -> bool:
    """Whether this is a setting that can move a result, the seed aside."""
    return (
        "." in name
        and "/" not in name
        and not name.startswith("tracking.")
        and name not in _NOT_OF_THE_GROUP
    )


def _by_step(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    import pandas as pd

    joined: dict[int, dict[str, float]] = {}
    latest = -1
    for row in rows:
        step = int(row["step"])
        if step < latest:
            joined = {before: values for before, values in joined.items() if before < step}
        latest = step
        values = {n: math.nan if v is None else v for n, v in row.items() if n != "step"}
        joined.setdefault(step, {}).update(values)
    frame = pd.DataFrame.from_dict(joined, orient="index").sort_index()
    return frame.rename_axis("step")


def read_csv(path: Path, names: Sequence[str], say: Say = print) -> pd.DataFrame:
    """The table in a CSV file that runs or `--collect` wrote; ids are text.

    Raises:
        UserError: a file that is no table, or one without all of these columns.
    """
    import pandas as pd

    columns, rows = read_table(path, names, say)
    if missing := [name for name in names if name not in columns]:
        raise UserError(
            f"{path}: without the column {', '.join(missing)}; expected {', '.join(names)}"
        )
    frame = pd.DataFrame(rows, columns=columns)
    for name in columns:
        cells = frame[name]
        if name in _ID_COLUMNS:
            frame[name] = cells.where(cells != "")
        elif name not in TEXTS:  # a setting may be a word
            with contextlib.suppress(ValueError):
                frame[name] = pd.to_numeric(cells.where(cells != ""))
    return frame


def _wandb_api() -> Any:
    import wandb

    if not wandb.login(prompt=False, verify=False):
        raise UserError("W&B: no key was found; `wandb login` stores one")
    return wandb.Api()


def _wandb_metrics(run: Any, key: str) -> pd.DataFrame:
    rows = run.scan_history(keys=[STEP_AXIS, key])
    return _by_step([{"step": row[STEP_AXIS], key: row[key]} for row in rows])
