"""Reads a whole manifest before training: `python -m mask2dit.data.check MANIFEST [key=value …]`.

The keys are those of `CheckConfig`. Every frame that training may read with these settings is decoded: those of the frame
ranges if `num_windows` is set, else all frames from which ranges are taken.
"""

import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from mask2dit import cli
from mask2dit.data.clips import (
    Clip,
    describe_required_frames,
    frames_to_read,
    is_long_enough,
    required_frames,
    scene_windows,
)
from mask2dit.data.config import CheckConfig, DataConfig
from mask2dit.data.manifests import LENGTH_FIELD, PATH_FIELD, Problem, manifest_suffix, parse_manifest
from mask2dit.reporting.tables import text_table
from mask2dit.video.reading import FileReader, RangeReader

if TYPE_CHECKING:
    from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

FRAMES_AT_ONCE = 16
FPS_TOLERANCE = 0.01  # 23.98 stands for 24000/1001


@dataclass(frozen=True, kw_only=True)
class Report:
    """The problems of a manifest, in the order of its rows."""

    num_rows: int
    num_clips: int
    """Number of clips that could be checked; faulty entries name none."""
    problems: list[Problem]

    @property
    def unusable_rows(self) -> set[int]:
        return {problem.row for problem in self.problems if not problem.is_warning}

    def __str__(self) -> str:
        """A table with one line per problem, and a summary."""
        rows = [
            (problem.label, problem.field, "warning" if problem.is_warning else "error", problem.message)
            for problem in self.problems
        ]
        lines = [text_table(("row", "field", "level", "problem"), rows)] if rows else []
        warnings = sum(problem.is_warning for problem in self.problems)
        summary = (
            f"{self.num_rows} rows, {self.num_clips} clips; errors: {len(self.problems) - warnings}, "
            f"warnings: {warnings}, unusable rows: {len(self.unusable_rows)}"
        )
        return "\n".join([*lines, summary])


def check_manifest(config: DataConfig, model: str | None = None) -> Report:
    """Checks every row of a manifest and decodes its videos.

    Args:
        config: the data set, as in training.
        model: the model folder whose tokenizer measures captions. None: captions are not measured.

    Raises:
        FileNotFoundError, ValueError: if the manifest or the model cannot be read at all.
    """
    pipe = None
    if model is not None:
        # Imported here, since without a model to check captions against, diffusers is not needed.
        from mask2dit.models.loading import load_tokenizer
        from mask2dit.pipelines.mask2dit import Mask2DiTPipeline

        pipe = Mask2DiTPipeline.skeleton(model, configs_only=True)
        pipe.register_modules(tokenizer=load_tokenizer(Path(model) / "tokenizer"))
    rows, problems = parse_manifest(config)
    clips = [clip for row in rows for clip in row]
    # FFmpeg releases Python's global lock while decoding.
    with ThreadPoolExecutor() as pool:
        videos = list(
            tqdm(pool.map(partial(_decode, config), clips), total=len(clips), desc="clips", unit="clip", disable=None)
        )
    of_clip = dict(zip(clips, videos))
    faulty = {problem.row for problem in problems}
    for number, row in enumerate(rows, start=1):
        # Fine-tuning skips scenes that are too short according to the manifest.
        avoidable = config.kind == "finetune" and bool(scene_windows(row, config))
        for clip in row:
            problems += _check_caption(pipe, clip) if pipe else []
            problems += _check_clip(config, clip, of_clip[clip], avoidable)
        if config.kind == "finetune" and number not in faulty:
            problems += _check_row(config, number, row, [of_clip[clip] for clip in row])
    problems += _check_repeats(config, rows)
    problems.sort(key=lambda problem: (problem.row, problem.scene or 0))
    return Report(num_rows=len(rows), num_clips=len(clips), problems=problems)


@dataclass(frozen=True)
class _Video:
    """The properties of a video file."""

    num_frames: int
    fps: float
    width: int
    height: int
    warnings: tuple[str, ...]


def _decode(config: DataConfig, clip: Clip) -> _Video | str:
    """Decodes every frame of a clip that training may read. Returns its properties, or the reason of a failure."""
    try:
        if not clip.path.exists():
            return f"there is no file {clip.path}"
        whole = FileReader(clip.path)
        reader = RangeReader(whole, clip.start, clip.end, clip.crop)
        if reader.num_frames >= required_frames(config):
            indices = frames_to_read(config, clip.name, reader.num_frames)
            for start in range(0, len(indices), FRAMES_AT_ONCE):
                reader.read(indices[start : start + FRAMES_AT_ONCE])
    except (OSError, ValueError) as error:
        return str(error)
    return _Video(reader.num_frames, reader.fps, reader.width, reader.height, whole.warnings)


def _check_clip(config: DataConfig, clip: Clip, video: _Video | str, avoidable: bool) -> list[Problem]:
    """Problems of a file that cannot be read, is too short, or differs from the manifest."""

    def problem(field: str, message: str, is_warning: bool = False) -> Problem:
        return Problem(row=clip.row, scene=clip.scene, field=field, message=message, is_warning=is_warning)

    suffix = manifest_suffix(config)
    if isinstance(video, str):
        return [problem(PATH_FIELD[suffix], video)]
    length, shown = LENGTH_FIELD[suffix], "file" if clip.name == clip.file else "frame range"
    problems = [problem(PATH_FIELD[suffix], warning, is_warning=True) for warning in video.warnings]
    if video.num_frames < required_frames(config):
        is_left_out = avoidable and not is_long_enough(clip, config)
        message = f"the {shown} has {video.num_frames} frames, but {describe_required_frames(config)}"
        problems.append(problem(length, message, is_warning=is_left_out))
    for field, stated, actual, tolerance in (
        (length, clip.num_frames, video.num_frames, 1 if length == "duration" else 0),  # a duration is rounded
        ("fps", clip.fps, video.fps, FPS_TOLERANCE),
        ("width", clip.width, video.width, 0),
        ("height", clip.height, video.height, 0),
    ):
        if stated is not None and abs(stated - actual) > tolerance:
            unit = " frames" if field == length else ""
            message = f"the manifest says {stated:.6g}{unit}, but the {shown} has {actual:.6g}"
            problems.append(problem(field, message, is_warning=True))
    return problems


def _check_caption(pipe: "Mask2DiTPipeline", clip: Clip) -> list[Problem]:
    """A warning if the caption exceeds the text window."""
    message = pipe.describe_cut(clip.caption)
    if message is None:
        return []
    return [Problem(row=clip.row, scene=clip.scene, field="caption", message=message, is_warning=True)]


def _check_repeats(config: DataConfig, rows: list[list[Clip]]) -> list[Problem]:
    """Warnings of clips listed more than once: in the whole manifest for pre-training, in one row for fine-tuning."""
    field = PATH_FIELD[manifest_suffix(config)]
    problems = []
    listed: dict[tuple, str] = {}
    for row in rows:
        if config.kind == "finetune":
            listed = {}
        for clip in row:
            if clip.frames in listed:
                means = "a sample never takes it twice" if config.kind == "pretrain" else "a sample may show it twice"
                message = f"is listed twice, first in {listed[clip.frames]}; {means}"
                problems.append(Problem(row=clip.row, scene=clip.scene, field=field, message=message, is_warning=True))
            listed.setdefault(clip.frames, clip.label)
    return problems


def _check_row(config: DataConfig, number: int, row: list[Clip], videos: list[_Video | str]) -> list[Problem]:
    """Problems of a row with too few scenes, or with scenes that differ in size or frame rate."""
    problems = []
    if len(row) < config.num_scenes:
        message = f"the row has {len(row)} scenes, but a sample takes {config.num_scenes}"
        problems.append(Problem(row=number, scene=None, field="values", message=message))
    elif not scene_windows(row, config):
        message = f"no {config.num_scenes} consecutive scenes of the row are long enough"
        problems.append(Problem(row=number, scene=None, field="values", message=message))
    readable = [video for video in videos if isinstance(video, _Video)]
    sizes = list(dict.fromkeys(f"{video.width}x{video.height}" for video in readable))
    rates = list(dict.fromkeys(f"{video.fps:.6g}" for video in readable))
    for field, values in (("width, height", sizes), ("fps", rates)):
        if len(values) > 1:
            message = f"differs within the row: {', '.join(values)}"
            problems.append(Problem(row=number, scene=None, field=field, message=message, is_warning=True))
    return problems


def report_problems(config: CheckConfig) -> int:
    """Prints the report. Returns the exit status: 1 if a row is unusable, else 0."""
    model = None
    if config.model:
        from mask2dit.models.hub import fetch_model

        model = fetch_model(config.model, revision=config.revision, configs_only=True)
    report = check_manifest(config, model)
    print(
        f"{config.manifest} for kind={config.kind}: samples of {config.num_scenes} scenes, {config.num_frames} frames each"
    )
    print(report)
    return 1 if report.unusable_rows else 0


def main(arguments: Sequence[str]) -> int:
    return cli.run("check", arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
