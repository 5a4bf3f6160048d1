"""Manifests: lists of clips with their captions, as CSV (one clip a row) or JSON (consecutive scenes a row)."""

import csv
import dataclasses
import json
import math
import shlex
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mask2dit.data.clips import Clip
from mask2dit.data.config import DataConfig

# What each format calls a clip's path and length.
PATH_FIELD = {".csv": "path", ".json": "url"}
LENGTH_FIELD = {".csv": "num_frame", ".json": "duration"}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something wrong with a row or with one of its scenes, counted from 1."""

    row: int
    scene: int | None
    field: str
    message: str
    is_warning: bool = False
    """Whether training can use the row all the same."""

    @property
    def label(self) -> str:
        return f"row {self.row}" if self.scene is None else f"row {self.row} scene {self.scene}"


def read_manifest(config: DataConfig) -> list[list[Clip]]:
    """The clips of every row: one each for CSV, the consecutive scenes of a video for JSON. No video is opened.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is neither CSV nor JSON, or a row is faulty; the message names the row and the field.
    """
    rows, problems = parse_manifest(config)
    if problems:
        first = problems[0]
        more = f" (and {len(problems) - 1} more problems)" if len(problems) > 1 else ""
        raise ValueError(
            f"{config.manifest}, {first.label}, {first.field}: {first.message}{more}; "
            f"{check_command(config)} lists everything that is wrong"
        )
    return rows


def check_command(config: DataConfig) -> str:
    """The command that checks a manifest as it is used here."""
    changed = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in ("manifest", "cache") and getattr(config, field.name) != field.default
    ]
    return shlex.join(["python", "-m", "mask2dit.data.check", config.manifest, *changed])


def parse_manifest(config: DataConfig) -> tuple[list[list[Clip]], list[Problem]]:
    """The clips of every row as `read_manifest` gives them, faulty ones left out, and what is wrong with those.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it cannot be read as CSV or JSON at all.
    """
    manifest = Path(config.manifest)
    if manifest.suffix not in PATH_FIELD:
        raise ValueError(f"a manifest is a .csv or a .json file, but this one is {str(manifest)!r}")
    if not manifest.is_file():
        raise FileNotFoundError(f"there is no manifest {str(manifest)!r}")
    root = Path(config.data_root) if config.data_root is not None else manifest.parent
    try:
        with manifest.open(encoding="utf-8-sig", newline="") as file:
            rows, problems = _parse_csv(file, root) if manifest.suffix == ".csv" else _parse_json(file, root)
    except (csv.Error, ValueError) as error:  # ValueError is also json's and the UTF-8 decoder's
        raise ValueError(f"the manifest {str(manifest)!r} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"the manifest {str(manifest)!r} has no rows")
    return rows, problems


def _parse_csv(file: Iterable[str], root: Path) -> tuple[list[list[Clip]], list[Problem]]:
    reader = csv.DictReader(file, strict=True)
    header = reader.fieldnames or []
    for name in ("path", "caption"):
        if name not in header:
            raise ValueError(f"it has no column {name!r}: its first line has to name the columns, but is {header}")
    rows, problems = [], []
    for row, record in enumerate(reader, start=1):
        rows.append([])
        if None in record or None in record.values():
            more_or_fewer = "more" if None in record else "fewer"
            message = f"{more_or_fewer} fields than the header's {len(header)}: put a caption with commas in quotes"
            problems.append(Problem(row=row, scene=None, field="columns", message=message))
            continue
        # An empty field says nothing, as a missing column does.
        stated = {name: value for name, value in record.items() if value.strip() or name in ("path", "caption")}
        clip = _clip(stated, ".csv", root, row, None, problems)
        rows[-1] += [clip] if clip else []
    return rows, problems


def _parse_json(file: Iterable[str], root: Path) -> tuple[list[list[Clip]], list[Problem]]:
    records = json.load(file)
    if not isinstance(records, list):
        raise ValueError(f"it has to be a list of rows, but is {_kind(records)}")
    rows, problems = [], []
    for row, record in enumerate(records, start=1):
        rows.append([])
        scenes = record.get("values") if isinstance(record, dict) else None
        if not isinstance(scenes, list):
            message = "has to be a list of scenes" + (f", but is {_kind(scenes)}" if scenes is not None else "")
            problems.append(Problem(row=row, scene=None, field="values", message=message))
            continue
        for scene, values in enumerate(scenes, start=1):
            if not isinstance(values, dict):
                message = f"a scene has to be an object, but is {_kind(values)}"
                problems.append(Problem(row=row, scene=scene, field="values", message=message))
                continue
            clip = _clip(values, ".json", root, row, scene, problems)
            rows[-1] += [clip] if clip else []
    return rows, problems


def _clip(record: dict, suffix: str, root: Path, row: int, scene: int | None, problems: list[Problem]) -> Clip | None:
    """The clip that a record describes; None, and the reasons added to `problems`, if it describes none."""
    before = len(problems)

    def fault(field: str, message: str) -> None:
        problems.append(Problem(row=row, scene=scene, field=field, message=message))

    def text(field: str) -> str:
        value = record.get(field)
        if value is None:
            fault(field, "is missing")
        elif not isinstance(value, str):
            fault(field, f"has to be a text, but is {value!r}")
        elif not value.strip():
            fault(field, "is empty")
        return value

    def number(field: str, whole: bool = False) -> float | int | None:
        value = record.get(field)
        if value is None:
            return None
        # A CSV holds texts only; in JSON a number in quotes is of the wrong type.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            result = float(value) if is_number or suffix == ".csv" else math.nan
        except ValueError:
            result = math.nan
        if not (math.isfinite(result) and result > 0 and (result.is_integer() or not whole)):
            fault(field, f"has to be a positive {'whole ' if whole else ''}number, but is {value!r}")
            return None
        return int(result) if whole else result

    name, caption = text(PATH_FIELD[suffix]), text("caption")
    fps, width, height = number("fps"), number("width", whole=True), number("height", whole=True)
    length = number(LENGTH_FIELD[suffix], whole=suffix == ".csv")
    if len(problems) > before:
        return None
    if suffix == ".json":  # seconds
        length = None if length is None or fps is None else round(length * fps)
    return Clip(
        root=root,
        name=name,
        caption=caption,
        row=row,
        scene=scene,
        num_frames=length,
        fps=fps,
        width=width,
        height=height,
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
