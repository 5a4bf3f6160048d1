"""Manifests of public sets of several shots: `python -m mask2dit.data.public_sets [CONFIG.yaml] [key=value …]`.

Two forms are read. A table lists videos with the times and captions of their shots, as Panda-70M does; its shots become frame
ranges of the videos. In the other form, each video is a folder with one file per shot; captions are in a JSON file as
Shot2Story has it, or in a text file beside each shot.

The result is `sft.json` with rows of consecutive shots, `pretrain.csv` with all shots, and `left_out.jsonl` with what could
not be used and why.
"""

import ast
import csv
import io
import json
import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mask2dit.command import run_command
from mask2dit.config import check_at_least, check_choice
from mask2dit.data.config import DataConfig
from mask2dit.data.manifests import read_manifest
from mask2dit.files import check_writable, write_lines, write_text
from mask2dit.texts import parse_json, read_text
from mask2dit.video.files import list_videos, natural_order
from mask2dit.video.reading import FileReader

logger = logging.getLogger(__name__)

FORMS = ("table", "folders")
TABLE_FIELDS = ("videoID", "timestamp", "caption")
TIME = re.compile(r"(?:(\d+):)?(\d+):(\d+(?:\.\d+)?)")


@dataclass(kw_only=True)
class PublicSetConfig:
    """A public set of several shots, to be made into manifests."""

    form: str = "table"
    """Form of the set: table (a .csv as of Panda-70M: videoID, and lists of timestamp and caption) or folders (a folder per
    video with one file per shot, in the order of their names)."""
    videos: str = "videos"
    """Folder of the videos: VIDEOID.mp4, or with another suffix of videos, for a table; VIDEO/SHOT.mp4 for folders."""
    captions: str | None = None
    """The table; or, for folders, a .json as of Shot2Story, with video, video_names and captions. null: each shot of a
    folder has its caption in SHOT.txt."""
    output: str = "datasets"
    """Folder for sft.json, pretrain.csv and left_out.jsonl."""
    num_scenes: int = 3
    """Minimum number of consecutive shots in a row of sft.json."""
    max_gap: float = 1.0
    """Maximum time in seconds between shots of a table that count as consecutive."""

    def __post_init__(self):
        check_choice("form", self.form, FORMS)
        check_at_least("num_scenes", self.num_scenes, 1)
        check_at_least("max_gap", self.max_gap, 0)


@dataclass(frozen=True, kw_only=True)
class Shot:
    """A shot with its caption."""

    path: Path
    caption: str
    start: int
    end: int
    """The shot shows frames start … end - 1 of the file."""
    is_range: bool
    """False if these are all of the file."""
    fps: float
    width: int
    height: int


@dataclass
class Found:
    """Videos with their rows of consecutive shots, and what was left out."""

    rows: list[tuple[str, list[Shot]]] = field(default_factory=list)
    left_out: list[dict] = field(default_factory=list)

    def leave_out(self, video: str, shot: object, why: object) -> None:
        self.left_out.append({"video": video, "shot": shot, "why": str(why)})


def import_set(config: PublicSetConfig) -> int:
    """Writes the manifests. Returns the exit status: 1 if no shot can be used, else 0.

    Raises:
        FileNotFoundError, ValueError: if the folder or the captions cannot be read at all.
        OSError: if the manifests cannot be written.
    """
    videos, target = Path(config.videos), Path(config.output)
    if config.form == "table" and config.captions is None:
        raise ValueError("captions has to name the table for form=table")
    if not videos.is_dir():
        raise FileNotFoundError(f"there is no folder of videos {config.videos!r}")
    check_writable(target)
    found = read_table(config) if config.form == "table" else read_folders(config)
    shots = [shot for _, row in found.rows for shot in row]
    stories = [(video, row) for video, row in found.rows if len(row) >= config.num_scenes]
    write_lines(target / "left_out.jsonl", found.left_out)
    if stories:
        write_text(target / "sft.json", _json(stories, target))
        read_manifest(DataConfig(kind="finetune", manifest=str(target / "sft.json")))
    if shots:
        write_text(target / "pretrain.csv", _csv(shots, target))
        read_manifest(DataConfig(kind="pretrain", manifest=str(target / "pretrain.csv")))
    logger.info(
        "%s: %d rows of at least %d shots in sft.json, %d shots in pretrain.csv; left out: %d, see left_out.jsonl",
        target,
        len(stories),
        config.num_scenes,
        len(shots),
        len(found.left_out),
    )
    return 0 if shots else 1


def read_table(config: PublicSetConfig) -> Found:
    """The shots of a table. Shots of a video that overlap or lie more than `max_gap` apart begin a new row."""
    reader = csv.DictReader(io.StringIO(read_text(Path(config.captions), "table"), newline=""))
    if missing := [name for name in TABLE_FIELDS if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{config.captions} has no column {missing[0]!r}, but {reader.fieldnames}")
    files = {path.stem: path for path in list_videos(config.videos)}
    found = Found()
    for record in reader:
        video = record["videoID"]
        try:
            times, captions = _list(record, "timestamp"), _list(record, "caption")
            if len(times) != len(captions):
                raise ValueError(f"it has {len(times)} times, but {len(captions)} captions")
            if video not in files:
                raise FileNotFoundError(f"there is no video {video} in {config.videos}")
            file = FileReader(files[video])
        except (OSError, ValueError) as error:
            found.leave_out(video, None, error)
            continue
        shots = []
        for number, (time, caption) in enumerate(zip(times, captions), start=1):
            try:
                start, end = (round(_seconds(value) * file.fps) for value in time)
                # Times are rounded to milliseconds, and may end a frame late.
                end = min(end, file.num_frames) if end <= file.num_frames + 1 else end
                if not 0 <= start < end <= file.num_frames:
                    raise ValueError(f"frames {start} to {end - 1}, but the video has {file.num_frames}")
                shots.append(_shot(file, caption, start, end))
            except (ValueError, TypeError) as error:
                found.leave_out(video, number, error)
        found.rows += [(video, row) for row in _consecutive(shots, config.max_gap)]
    return found


def read_folders(config: PublicSetConfig) -> Found:
    """The shots of folders. A shot that cannot be used ends a row, and the next one begins another."""
    found = Found()
    for video, names, captions in _listed_shots(config, found):
        row: list[Shot] = []
        for name, caption in zip(names, captions):
            try:
                path = _find_shot(Path(config.videos), video, name)
                text = read_text(path.with_suffix(".txt"), "caption") if caption is None else caption
                row.append(_shot(FileReader(path), text))
            except (OSError, ValueError) as error:
                found.leave_out(video, name, error)
                found.rows += [(video, row)] if row else []
                row = []
        found.rows += [(video, row)] if row else []
    return found


def _listed_shots(config: PublicSetConfig, found: Found) -> Iterator[tuple[str, list[str], Sequence[str | None]]]:
    """Yields each video with the names and the captions of its shots."""
    root = Path(config.videos)
    if config.captions is None:
        folders: dict[Path, list[str]] = {}
        for path in sorted(list_videos(root), key=natural_order):
            folders.setdefault(path.parent, []).append(path.name)
        for folder, names in folders.items():
            yield folder.relative_to(root).as_posix(), names, [None] * len(names)
        return
    try:
        records = parse_json(read_text(Path(config.captions), "file of captions"))
        listed = [(record["video"], record["video_names"], record["captions"]) for record in records]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{config.captions} has to be a list of videos with video, video_names and captions: {error!r}"
        ) from error
    for video, names, captions in listed:
        if len(names) != len(captions):
            found.leave_out(video, None, f"it has {len(names)} shots, but {len(captions)} captions")
        else:
            yield Path(video).stem, names, captions


def _find_shot(root: Path, video: str, name: str) -> Path:
    """A shot's file, in its video's folder or directly in `root`."""
    for path in (root / video / name, root / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"there is no {root / video / name}")


def _shot(file: FileReader, caption: object, start: int | None = None, end: int | None = None) -> Shot:
    """A shot of a file that is open, with its properties, so that the file can be closed."""
    if not isinstance(caption, str) or not caption.strip():
        raise ValueError("the caption is empty")
    return Shot(
        path=file.path,
        caption=" ".join(caption.split()),
        start=start or 0,
        end=file.num_frames if end is None else end,
        is_range=start is not None,
        fps=file.fps,
        width=file.width,
        height=file.height,
    )


def _consecutive(shots: Sequence[Shot], max_gap: float) -> list[list[Shot]]:
    rows = [[shot] for shot in shots[:1]]
    for before, after in pairwise(shots):
        gap = (after.start - before.end) / after.fps
        if 0 <= gap <= max_gap:
            rows[-1].append(after)
        else:
            rows.append([after])
    return rows


def _list(record: dict, name: str) -> list:
    try:
        values = ast.literal_eval(record[name] or "")
    except (ValueError, SyntaxError) as error:
        raise ValueError(f"{name} is not a list: {record[name]!r}") from error
    if not isinstance(values, list):
        raise ValueError(f"{name} is not a list: {record[name]!r}")
    return values


def _seconds(text: str) -> float:
    found = TIME.fullmatch(text)
    if not found:
        raise ValueError(f"{text!r} is not a time such as 0:00:16.300")
    hours, minutes, seconds = found.groups()
    return 3600 * int(hours or 0) + 60 * int(minutes) + float(seconds)


def _json(rows: Sequence[tuple[str, list[Shot]]], target: Path) -> str:
    def scene(video: str, shot: Shot) -> dict:
        part = {"start": shot.start, "end": shot.end} if shot.is_range else {}
        return {
            "vid": f"{video}#{shot.start}-{shot.end}" if shot.is_range else f"{video}/{shot.path.name}",
            "width": shot.width,
            "height": shot.height,
            "duration": round((shot.end - shot.start) / shot.fps, 4),
            "fps": shot.fps,
            "url": os.path.relpath(shot.path, target),
            "caption": shot.caption,
            **part,
        }

    records = [{"prefix": video, "values": [scene(video, shot) for shot in row]} for video, row in rows]
    return json.dumps(records, indent=2, ensure_ascii=False) + "\n"


def _csv(shots: Sequence[Shot], target: Path) -> str:
    fields = ["fps", "width", "height", "caption", "path", "num_frame"]
    has_ranges = shots[0].is_range
    with io.StringIO(newline="") as file:
        writer = csv.writer(file)
        writer.writerow(fields + (["start", "end"] if has_ranges else []))
        for shot in shots:
            path = os.path.relpath(shot.path, target)
            values = [shot.fps, shot.width, shot.height, shot.caption, path, shot.end - shot.start]
            writer.writerow(values + ([shot.start, shot.end] if has_ranges else []))
        return file.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(PublicSetConfig, "mask2dit.data.public_sets:import_set", None, sys.argv[1:]))
