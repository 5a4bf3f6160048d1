"""Manifests: lists of clips with their captions, as CSV (one clip per row) or JSON (consecutive scenes per row)."""

import csv
import dataclasses
import io
import math
import shlex
from dataclasses import dataclass
from pathlib import Path

from mask2dit.data.clips import Clip
from mask2dit.data.config import DataConfig
from mask2dit.texts import find_encoding_fault, parse_json, read_text

# Names of a clip's path and length in each format.
PATH_FIELD = {".csv": "path", ".json": "url"}
LENGTH_FIELD = {".csv": "num_frame", ".json": "duration"}
# Names of the part of a file that a clip shows, in both formats: frames start … end - 1, and top, left, height and width in
# pixels.
RANGE_FIELDS = ("start", "end", "crop")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem of a row or of one of its scenes, counted from 1."""

    row: int
    scene: int | None
    field: str
    message: str
    is_warning: bool = False
    """True if training can still use the row."""

    @property
    def label(self) -> str:
        return f"row {self.row}" if self.scene is None else f"row {self.row} scene {self.scene}"


def read_manifest(config: DataConfig) -> list[list[Clip]]:
    """The clips of every row: one per row for CSV, the consecutive scenes of a video for JSON. No video is opened.

    Raises:
        FileNotFoundError: if the manifest does not exist.
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
    """The command that checks a manifest with these settings."""
    changed = [
        f"{field.name}={getattr(config, field.name)}"
        for field in dataclasses.fields(config)
        if field.name not in ("manifest", "cache") and getattr(config, field.name) != field.default
    ]
    return shlex.join(["python", "-m", "mask2dit.data.check", config.manifest, *changed])


def parse_manifest(config: DataConfig) -> tuple[list[list[Clip]], list[Problem]]:
    """The clips of every row as `read_manifest` returns them, without faulty ones, and the problems of those.

    Raises:
        FileNotFoundError: if the manifest does not exist.
        ValueError: if it cannot be read as CSV or JSON at all.
    """
    manifest = Path(config.manifest)
    suffix = manifest_suffix(config)
    if suffix not in PATH_FIELD:
        raise ValueError(f"a manifest is a .csv or a .json file, but this one is {str(manifest)!r}")
    text = read_text(manifest, "manifest")
    root = Path(config.data_root) if config.data_root is not None else manifest.parent
    try:
        rows, problems = _parse_csv(text, root) if suffix == ".csv" else _parse_json(text, root)
    except ValueError as error:
        raise ValueError(f"the manifest {str(manifest)!r} cannot be read: {error}") from error
    if not rows:
        raise ValueError(f"the manifest {str(manifest)!r} has no rows")
    return rows, problems


def manifest_suffix(config: DataConfig) -> str:
    """The suffix of the manifest: .csv or .json, the keys of `PATH_FIELD` and `LENGTH_FIELD`, or any other."""
    return Path(config.manifest).suffix.lower()


def _parse_csv(text: str, root: Path) -> tuple[list[list[Clip]], list[Problem]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise ValueError(f"its first line has to name the columns, but {error}") from error
    for name in ("path", "caption"):
        if name not in header:
            raise ValueError(f"it has no column {name!r}: its first line has to name the columns, but is {header}")
    for name in ("path", "caption", "fps", "width", "height", "num_frame", *RANGE_FIELDS):
        if header.count(name) > 1:
            raise ValueError(f"it has the column {name!r} {header.count(name)} times: leave one of them")
    rows: list[list[Clip]] = []
    problems: list[Problem] = []
    while True:
        try:
            values = next(reader)
        except StopIteration:
            return rows, problems
        except csv.Error as error:  # the reader continues with the next line
            rows.append([])
            message = f"{error}: put a text with commas or quotes in quotes, and write a quote within them twice"
            problems.append(Problem(row=len(rows), scene=None, field="quotes", message=message))
            continue
        if not any(value.strip() for value in values):
            continue  # an empty line, or a spreadsheet's empty row
        rows.append([])
        while len(values) > len(header) and not values[-1].strip():
            values.pop()
        if len(values) != len(header):
            more_or_fewer = "more" if len(values) > len(header) else "fewer"
            message = f"{more_or_fewer} fields than the header's {len(header)}: put a caption with commas in quotes"
            problems.append(Problem(row=len(rows), scene=None, field="columns", message=message))
            continue
        # An empty field counts as missing, like a missing column.
        record = dict(zip(header, values))
        stated = {name: value for name, value in record.items() if value.strip() or name in ("path", "caption")}
        clip = _clip(stated, ".csv", root, len(rows), None, problems)
        rows[-1] += [clip] if clip else []


def _parse_json(text: str, root: Path) -> tuple[list[list[Clip]], list[Problem]]:
    records = parse_json(text)
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


class _Record:
    """Reads the fields of a clip's record. Those that are faulty are added to `problems`."""

    def __init__(self, values: dict, suffix: str, row: int, scene: int | None, problems: list[Problem]):
        self.values, self.suffix, self.row, self.scene, self.problems = values, suffix, row, scene, problems

    def fault(self, field: str, message: str) -> None:
        self.problems.append(Problem(row=self.row, scene=self.scene, field=field, message=message))

    def text(self, field: str) -> str:
        value = self.values.get(field)
        if value is None:
            self.fault(field, "is missing")
        elif not isinstance(value, str):
            self.fault(field, f"has to be a text, but is {value!r}")
        elif not value.strip():
            self.fault(field, "is empty")
        elif "\0" in value:
            self.fault(field, f"holds a NUL character: {value!r}")
        elif wrong := find_encoding_fault(value):
            self.fault(field, wrong)
        return value

    def number(self, field: str, whole: bool = False, least: int | None = None) -> float | int | None:
        """A positive number, or one of at least `least`; None if it is missing or faulty."""
        value = self.values.get(field)
        if value is None:
            return None
        # A CSV holds only texts; in JSON, a number in quotes has the wrong type.
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        try:
            result = float(value) if is_number or self.suffix == ".csv" else math.nan
        except (ValueError, OverflowError):  # OverflowError: an integer beyond the range of floats
            result = math.nan
        is_enough = result > 0 if least is None else result >= least
        if not (math.isfinite(result) and is_enough and (result.is_integer() or not whole)):
            kind = f"{'whole ' if whole else ''}number"
            kind = f"positive {kind}" if least is None else f"{kind} of at least {least}"
            self.fault(field, f"has to be a {kind}, but is {value!r}")
            return None
        return int(result) if whole else result

    def crop(self) -> tuple[int, int, int, int] | None:
        value = self.values.get("crop")
        if value is None:
            return None
        values = value.split() if self.suffix == ".csv" else value
        try:
            top, left, high, wide = (int(v) for v in values if self.suffix == ".csv" or type(v) is int)
        except (ValueError, TypeError):
            top = -1
        if top < 0 or left < 0 or high < 1 or wide < 1 or len(values) != 4:
            form = (
                "four numbers, such as 16 0 128 192" if self.suffix == ".csv" else "a list, such as [16, 0, 128, 192]"
            )
            self.fault("crop", f"has to be top, left, height and width in pixels as {form}, but is {value!r}")
            return None
        return top, left, high, wide

    def length(self, fps: float | None, start: int | None, end: int | None) -> int | None:
        """The number of frames: those of the range if its end is known, else the stated ones."""
        length = self.number(LENGTH_FIELD[self.suffix], whole=self.suffix == ".csv")
        if self.suffix == ".json" and length is not None:  # seconds
            length = math.inf if fps is None else length * fps
            if fps is not None and not math.isfinite(length):
                self.fault("duration", f"is too long: {self.values['duration']!r} s at {fps!r} fps")
            length = round(length) if math.isfinite(length) else None
        if start is not None and end is not None and end <= start:
            self.fault("end", f"has to be above start={start}, but is {end}: a clip shows frames start to end - 1")
        elif end is not None:
            in_range = end - (start or 0)
            # A duration is rounded.
            if length is not None and abs(length - in_range) > (1 if self.suffix == ".json" else 0):
                message = f"is {length} frames, but start and end hold {in_range}: leave it out, or correct them"
                self.fault(LENGTH_FIELD[self.suffix], message)
            return in_range
        return length


def _clip(values: dict, suffix: str, root: Path, row: int, scene: int | None, problems: list[Problem]) -> Clip | None:
    """The clip that a record describes. If it is faulty: None, with the reasons added to `problems`."""
    before = len(problems)
    record = _Record(values, suffix, row, scene, problems)
    name, caption = record.text(PATH_FIELD[suffix]), record.text("caption")
    fps = record.number("fps")
    width, height = record.number("width", whole=True), record.number("height", whole=True)
    start, end = record.number("start", whole=True, least=0), record.number("end", whole=True)
    length, crop = record.length(fps, start, end), record.crop()
    if len(problems) > before:
        return None
    return Clip(
        root=root,
        file=name,
        caption=caption,
        row=row,
        scene=scene,
        start=start,
        end=end,
        crop=crop,
        num_frames=length,
        fps=fps,
        width=width,
        height=height,
    )


def _kind(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    return names.get(type(value), "a number")
