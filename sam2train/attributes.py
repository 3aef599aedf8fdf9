"""J&F by attribute: what happens to an object (absence, occlusion, ...) beside how well it was
tracked. The attributes come from a CSV beside the data."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from sam2train.errors import UserError
from sam2train.files import read_regular_file, resolve_path
from sam2train.machine import cell
from sam2train.scores import Scores, difference

ATTRIBUTES_FILE = "attributes.csv"
ATTRIBUTE_COLUMNS = ("attribute", "model", "J_and_F", "num_objects", "num_videos")
_EXPECTED_TABLE = (
    "expected a CSV with the columns video and attribute, and object where not all objects of the "
    "video have it"
)


@dataclass(frozen=True)
class Attributes:
    """What a CSV says of objects."""

    path: Path
    # attribute -> (video id, object id; "" stands for every object)
    members: Mapping[str, set[tuple[str, str]]]


def find_attributes(setting: str | None, data_path: str) -> Attributes | None:
    """The CSV that `evaluation.attributes` names, else the one beside the data, if it is there.

    Raises:
        UserError: the file cannot be read, or is no such table.
    """
    if setting is None:
        data = resolve_path(data_path)
        path = (data if data.is_dir() else data.parent) / ATTRIBUTES_FILE
        if not path.is_file():
            return None
    else:
        path = resolve_path(setting)
    text = read_regular_file(path, _EXPECTED_TABLE).decode("utf-8-sig", "replace")
    reader = csv.DictReader(io.StringIO(text))
    missing = {"video", "attribute"} - set(reader.fieldnames or ())
    if missing:
        raise UserError(f"{path}: no column {' and '.join(sorted(missing))}; {_EXPECTED_TABLE}")
    members: dict[str, set[tuple[str, str]]] = {}
    for number, row in enumerate(reader, start=2):
        if not row["video"] or not row["attribute"]:
            raise UserError(
                f"{path}: line {number} has no video or no attribute; {_EXPECTED_TABLE}"
            )
        who = row["video"].strip(), (row.get("object") or "").strip()
        members.setdefault(row["attribute"].strip(), set()).add(who)
    return Attributes(path, members)


def _with_attribute(scores: Scores, members: set[tuple[str, str]]) -> list[dict[str, Any]]:
    """The rows of the scored objects that have it."""
    return [
        row
        for row in scores.objects
        if row["J_and_F"] is not None
        and {(str(row["video_id"]), str(row["object_id"])), (str(row["video_id"]), "")} & members
    ]


def scores_by_attribute(
    models: Sequence[Scores], attributes: Attributes
) -> tuple[list[dict[str, Any]], Table]:
    """Rows with ATTRIBUTE_COLUMNS, and a table of the same with the differences of the first model
    to each other.

    Raises:
        UserError: the CSV names no object that was scored.
    """
    table = Table("attribute", "objects", title="J&F by attribute", title_justify="left")
    for scores in models:
        table.add_column(cell(scores.label), justify="right")
    for scores in models[1:]:
        table.add_column(cell(f"first - {scores.label}"), justify="right")
    rows = []
    for name, members in attributes.members.items():
        parts = [replace(s, objects=_with_attribute(s, members)) for s in models]
        counted = parts[0].objects
        if not counted:
            continue
        means = [float(np.mean([float(r["J_and_F"]) for r in part.objects])) for part in parts]
        videos = {row["video_id"] for row in counted}
        rows += [
            {
                "attribute": name,
                "model": part.model,
                "J_and_F": mean,
                "num_objects": len(counted),
                "num_videos": len(videos),
            }
            for part, mean in zip(parts, means, strict=True)
        ]
        apart = [difference(part, parts[0]).text(sign=True) for part in parts[1:]]
        table.add_row(
            cell(name),
            f"{len(counted)} in {len(videos)}",
            *(f"{mean:.3f}" for mean in means),
            *(text.replace(" (", "\n(") for text in apart),
        )
    if not rows:
        known = sorted({str(row["video_id"]) for row in models[0].objects})
        raise UserError(
            f"{attributes.path} names no object that was scored, such as object "
            f"{models[0].objects[0]['object_id']} of video {known[0]}; {_EXPECTED_TABLE}"
        )
    table.caption = (
        f"objects in videos, of {attributes.path}; an object may have several attributes"
    )
    table.caption_justify = "left"
    return rows, table
