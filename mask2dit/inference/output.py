"""The files of a run: each scene as soon as it is done, and at the end the whole video with its contact sheet and record.

For a run with the name 00001, these are

    00001.mp4                        the video: its scenes' files joined, without encoding them again
    00001.png, 00001.json            contact sheet and record
    00001_4x.mp4                     enlarged, if the video is small
    00001/scene_1.mp4, …             the scenes
    00001/scene_1.safetensors, …     their latents, from which a later run goes on
"""

import json
import re
import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mask2dit.files import move_new, write_errors, write_text
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.sources import KeptScene, latents_file, save_latents
from mask2dit.video.reading import open_video
from mask2dit.video.writing import contact_sheet, join_videos, write_image, write_video

SHEET_COLUMNS = 6
COMPARED_COLUMNS = 12
SMALL = 256  # pixels; videos with a smaller shorter side are also written enlarged
STORE = "scenes"  # folder of finished scenes' latents, which later runs of the same story reuse


class StoryFiles:
    """The files of a run. Scenes are added in order.

    Args:
        output: path of the video.
        config: the resolved configuration.
    """

    def __init__(self, output: Path, config: InferenceConfig):
        self.output, self.config = output, config
        self.factor = -(-SMALL // min(config.height, config.width))
        self.clips: list[Path] = []
        self.frame_counts: list[int] = []
        self._rows: list[np.ndarray] = []

    @property
    def enlarged(self) -> Path | None:
        return self._enlarged(self.output) if self.factor > 1 else None

    def add_scene(self, frames: np.ndarray, latents: torch.Tensor) -> Path:
        """Writes a scene, uint8 (frames, H, W, 3) and (1, F, C, h, w). Returns the path of its video."""
        clip = self._next_clip()
        write_video(clip, frames, self.config.fps)
        save_latents(clip, latents)
        self._add(clip, frames)
        return clip

    def write_preview(self, scene: int, image: np.ndarray) -> Path:
        """Writes a preview of a scene (index) in place of the one before. Returns its path."""
        path = self.output.with_suffix("") / f"scene_{scene + 1}_preview.png"
        write_image(path, Image.fromarray(image))
        return path

    def keep_scene(self, scene: KeptScene) -> Path:
        """Copies the files of a kept scene. Returns the path of its video."""
        clip = self._next_clip()
        shutil.copyfile(scene.clip, clip)
        shutil.copyfile(latents_file(scene.clip), latents_file(clip))
        reader = open_video(clip)
        if self._enlarged(scene.clip).is_file():
            shutil.copyfile(self._enlarged(scene.clip), self._enlarged(clip))
        self._add(clip, reader.read(range(reader.num_frames)).numpy())
        return clip

    def finish(self, given: Sequence[int], title: str | None, record: dict) -> None:
        """Joins the scenes, and writes sheet and record. The video comes last: where it is, everything is."""
        write_image(
            self._sheet, contact_sheet(self._rows, self.config.prompts, SHEET_COLUMNS, title=title, given=given)
        )
        write_text(self._record, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        if self.enlarged:
            join_videos(self.enlarged, [self._enlarged(clip) for clip in self.clips])
        joined = self.output.with_suffix("") / "video.mp4"
        join_videos(joined, self.clips)
        move_new(joined, self.output)

    def discard(self) -> None:
        """Removes what is there of an unfinished run."""
        for path in (self._sheet, self._record, self._enlarged(self.output)):
            path.unlink(missing_ok=True)
        shutil.rmtree(self.output.with_suffix(""))

    def _add(self, clip: Path, frames: np.ndarray) -> None:
        clip.with_name(f"{clip.stem}_preview.png").unlink(missing_ok=True)
        large = self._enlarged(clip)
        if self.factor > 1 and not large.is_file():  # nearest neighbour keeps pixels visible
            write_video(large, (f.repeat(self.factor, 0).repeat(self.factor, 1) for f in frames), self.config.fps)
        shown = np.linspace(0, len(frames) - 1, min(SHEET_COLUMNS, len(frames))).round().astype(int)
        self._rows.append(frames[shown])
        self.frame_counts.append(len(frames))
        self.clips.append(clip)

    def _next_clip(self) -> Path:
        return self.output.with_suffix("") / f"scene_{len(self.clips) + 1}.mp4"

    def _enlarged(self, video: Path) -> Path:
        return video.with_stem(f"{video.stem}_{self.factor}x")

    @property
    def _sheet(self) -> Path:
        return self.output.with_suffix(".png")

    @property
    def _record(self) -> Path:
        return self.output.with_suffix(".json")


@contextmanager
def claim_output(config: InferenceConfig) -> Generator[StoryFiles]:
    """Takes the name of a run, which no other run can take then, and yields its files. On any failure, they are removed.

    Raises:
        FileExistsError: if the name that the configuration asks for is taken.
        OSError: if the disk is full; the message names the folder.
    """
    folder = Path(config.save_path)
    with write_errors(folder):
        files = StoryFiles(_claim(folder, config.name), config)
        try:
            yield files
        except BaseException:
            files.discard()
            raise


def check_name(config: InferenceConfig) -> None:
    """Raises `FileExistsError` if the name of a run is taken."""
    folder = Path(config.save_path)
    if config.name is not None and _is_taken(folder, config.name):
        raise FileExistsError(
            f"{config.name}.mp4 is in {config.save_path!r} already: choose another name, or leave name out"
        )


def comparison_sheet(outputs: Sequence[Path], seeds: Sequence[int]) -> Path:
    """Draws videos of the same story with one row per seed: the middle frame of each scene. Returns the sheet's path."""
    rows = []
    for output in outputs:
        scenes = json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))["scenes"]
        reader = open_video(output)
        middles = [sum(scene["frames"]) // 2 for scene in scenes]
        rows.append(reader.read(middles if len(middles) > 1 else range(reader.num_frames)).numpy())
    sheet = outputs[0].with_name(f"{outputs[0].stem}-{outputs[-1].stem}.png")
    labels = [f"{output.name}, seed {seed}" for output, seed in zip(outputs, seeds)]
    write_image(sheet, contact_sheet(rows, columns=min(COMPARED_COLUMNS, max(2, len(rows[0]))), labels=labels))
    return sheet


def _claim(folder: Path, name: str | None) -> Path:
    """Makes the folder of a run's scenes. Returns the path of its video."""
    while True:
        output = folder / f"{name or _next_number(folder)}.mp4"
        try:
            output.with_suffix("").mkdir(parents=True)
            return output
        except FileExistsError:
            if name is not None:
                raise FileExistsError(f"{output} is being made by another run: choose another name") from None


def _is_taken(folder: Path, name: str) -> bool:
    return name == STORE or (folder / f"{name}.mp4").exists() or (folder / name).exists()


def _next_number(folder: Path) -> str:
    paths = [path for path in folder.iterdir() if path.is_dir() or path.suffix == ".mp4"]
    taken = [int(path.stem) for path in paths if re.fullmatch("[0-9]+", path.stem)]
    return f"{max(taken, default=0) + 1:05d}"
