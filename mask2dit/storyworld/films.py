"""Stories as films with the manifests for training: `python -m mask2dit.storyworld.films [CONFIG.yaml] [key=value …]`.

The folder gets `pretrain.csv` with single scenes of unrelated stories, `sft.json` with stories of consecutive scenes,
`held_out.json` with stories of combinations that the others never show, and the videos, one per scene. With `thresholds`,
every story of `sft.json` has a `similarity`: the lowest visual consistency of its neighbouring scenes. For each threshold, a
manifest such as `sft_0.6.json` lists the stories that are at least that similar.
"""

import csv
import io
import json
import logging
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mask2dit.command import run_command
from mask2dit.config import check_at_least
from mask2dit.data.clips import required_frames
from mask2dit.data.config import DataConfig
from mask2dit.files import check_writable, write_text
from mask2dit.storyworld.measure import measure_scene, nearest_palette, visual_consistency
from mask2dit.storyworld.render import render_story, tinted
from mask2dit.storyworld.world import CAST_SHARES, HELD_OUT_ACTIONS, Story, caption, describe, sample_story
from mask2dit.video.writing import write_clips

logger = logging.getLogger(__name__)

STORIES_PER_CALL = 50  # stories that a process renders and writes together
# Limits of unnamed backgrounds, which the named ones meet too: largest minus smallest channel, and root mean square
# difference between sky and ground at the horizon.
MAX_BACKGROUND_CHROMA = 0.2
MIN_BACKGROUND_EDGE = 0.1


@dataclass(kw_only=True)
class FilmsConfig:
    """Films to render. `configs/storyworld/films.yaml` holds the recipe."""

    output_dir: str = "datasets/storyworld"
    """Folder for the videos and the manifests."""

    # Number of stories
    num_clips: int = 6000
    """Number of single scenes in `pretrain.csv`, each from a different story and none from a story in `sft.json`."""
    num_stories: int = 3000
    """Number of stories in `sft.json`."""
    num_held_out: int = 100
    """Number of stories in `held_out.json`."""
    seed: int = 0
    """Seed of the first story. The stories of `sft.json` are numbered first, then the clips."""

    # Size
    num_scenes: int = 3
    """Scenes per story."""
    num_frames: int = 9
    """Frames per scene in training."""
    height: int = 64
    """Height in pixels."""
    width: int = 64
    """Width in pixels."""
    fps: int = 8
    """Frames per second."""

    # Stories with inconsistent scenes
    drifting_share: float = 0.0
    """Share of the stories in `sft.json`, 0 to 1, whose identity changes from scene to scene, some slightly, some
    completely."""
    thresholds: list[float] = field(default_factory=list)
    """Minimum similarities. For each, a manifest lists the stories whose scenes are at least that similar. Measuring the
    similarity takes four times as long as drawing and writing a story."""

    # Stories with more actors
    cast_shares: list[float] = field(default_factory=lambda: list(CAST_SHARES))
    """Probabilities of one, two and three actors in `sft.json`. Larger casts end up less frequent, since a story whose scenes
    do not show all of its actors is drawn again."""

    # Stories with incomplete captions
    unnamed_colours: float = 0.0
    """Share of the actors in `sft.json`, 0 to 1, whose colour captions leave out. It may be any colour that does not give a
    held-out look."""
    unnamed_settings: float = 0.0
    """Share of the stories in `sft.json`, 0 to 1, whose setting captions leave out. The background may have any pale colours
    that do not match a setting in which one of the actions is held out."""

    num_workers: int = 2
    """Number of processes."""

    def __post_init__(self):
        for name in ("num_clips", "num_stories", "num_held_out", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} has to be 0 or more")
        for name in ("num_scenes", "fps", "num_workers"):
            check_at_least(name, getattr(self, name), 1)
        if self.num_frames < 2:
            raise ValueError(f"num_frames={self.num_frames} has to be at least 2, for something to happen")
        if self.height < 32 or self.width < self.height or self.height % 2 or self.width % 2:
            raise ValueError(
                f"height={self.height} and width={self.width} have to be even, the height at least 32 and the width no less"
            )
        if not 0 <= self.drifting_share <= 1:
            raise ValueError(f"drifting_share={self.drifting_share} has to be between 0 and 1")
        for name in ("unnamed_colours", "unnamed_settings"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} has to be between 0 and 1")
        if (
            len(self.cast_shares) != len(CAST_SHARES)
            or min(self.cast_shares) < 0
            or abs(sum(self.cast_shares) - 1) > 1e-8  # as NumPy, which would refuse them at the first story
        ):
            raise ValueError(
                f"cast_shares={self.cast_shares} have to be {len(CAST_SHARES)} probabilities that sum to 1"
            )
        if self.thresholds and self.num_scenes < 2:
            raise ValueError("thresholds are for the similarity of scenes: set num_scenes=2 or more, or thresholds=[]")


def make_films(config: FilmsConfig) -> None:
    """Renders the films and writes the manifests.

    Raises:
        OSError: if a file cannot be written.
    """
    folder = Path(config.output_dir)
    for part in ("clips", "stories", "held_out"):
        check_writable(folder / part)

    first_clip = config.seed + config.num_stories
    clips = _make(config, "clips", range(first_clip, first_clip + config.num_clips))
    if clips:
        _write_csv(folder / "pretrain.csv", [scene for story in clips for scene in story["values"]])
    stories = _make(config, "stories", range(config.seed, first_clip))
    held_out = _make(config, "held_out", range(config.seed, config.seed + config.num_held_out))
    for name, rows in (("sft", stories), ("held_out", held_out)):
        if rows:
            _write_json(folder / f"{name}.json", rows)
    for threshold in config.thresholds:
        similar = [row for row in stories if row["similarity"] >= threshold]
        _write_json(folder / f"sft_{threshold:g}.json", similar)
        logger.info("%d of %d stories have a similarity of at least %g", len(similar), len(stories), threshold)
    logger.info("films and manifests are in %s", folder)


def story_of(config: FilmsConfig, part: str, seed: int) -> Story:
    """The story behind a film.

    Args:
        part: "clips" (one scene), "stories" (some of which drift) or "held_out".
        seed: seed of the story.
    """
    if part == "clips":
        return sample_story(seed, num_scenes=1)
    if part == "held_out":
        return sample_story(seed, config.num_scenes, "held_out")
    drifts, drift = np.random.default_rng([seed, 3]).random(2)
    drift = drift if drifts < config.drifting_share else 0.0
    story = sample_story(
        seed, config.num_scenes, drift=drift, unnamed=config.unnamed_colours, cast_shares=config.cast_shares
    )
    rng = np.random.default_rng([seed, 4])
    return leave_out_setting(story, rng) if rng.random() < config.unnamed_settings else story


def leave_out_setting(story: Story, rng: np.random.Generator) -> Story:
    """The same story with a background of random colours that captions do not name.

    None of its tinted backgrounds is closest to a setting in which an action of the story is held out.
    """
    actions = {action for scene in story.scenes for action in scene.actions}
    held_out = {setting for action, setting in HELD_OUT_ACTIONS if action in actions}
    while True:
        sky, ground = rng.uniform(0.45, 0.95, (2, 3))
        at_horizon = sky + rng.uniform(-0.04, 0.16)
        pale = max(np.ptp(sky), np.ptp(ground)) < MAX_BACKGROUND_CHROMA and at_horizon.max() < 1
        has_edge = np.sqrt(np.square(at_horizon - ground).mean()) > MIN_BACKGROUND_EDGE
        palette = (tuple(sky), tuple(at_horizon), tuple(ground))
        tints = [tinted(palette, identity) for identity in story.identities]
        seen = {nearest_palette((above + below) / 2, of_ground) for above, below, of_ground in tints}
        if pale and has_edge and not seen & held_out:
            return replace(story, setting=None, palette=palette)


def _make(config: FilmsConfig, part: str, seeds: range) -> list[dict]:
    """Writes the films of stories and returns their rows in the form of `sft.json`."""
    chunks = [seeds[start : start + STORIES_PER_CALL] for start in range(0, len(seeds), STORIES_PER_CALL)]
    rows = []
    with ProcessPoolExecutor(config.num_workers) as pool, tqdm(total=len(seeds), desc=part, disable=None) as progress:
        for some in pool.map(partial(_make_some, config, part), chunks):
            rows += some
            progress.update(len(some))
    return rows


def _make_some(config: FilmsConfig, part: str, seeds: Sequence[int]) -> list[dict]:
    num_frames = config.num_frames
    if part == "clips":  # pre-training takes its frames from the middle of longer clips
        num_frames = required_frames(DataConfig(kind="pretrain", num_frames=num_frames, max_stride=1))
    rows, paths, videos = [], [], []
    for seed in seeds:
        story = story_of(config, part, seed)
        scenes = render_story(story, num_frames, config.height, config.width)
        row = {"prefix": f"{part}/{seed:06d}", "values": []}
        if config.thresholds and part == "stories":
            row["similarity"] = round(_similarity(story, scenes), 4)
        for k, scene in enumerate(scenes):
            name = f"{seed:06d}_{k + 1}"
            row["values"].append(
                {
                    "vid": name,
                    "width": config.width,
                    "height": config.height,
                    "duration": num_frames / config.fps,
                    "fps": config.fps,
                    "url": f"{part}/{name}.mp4",
                    "caption": caption(story, k),
                }
            )
            paths.append(Path(config.output_dir) / part / f"{name}.mp4")
            videos.append(scene)
        rows.append(row)
    write_clips(paths, videos, config.fps, full_chroma=True)
    return rows


def _similarity(story: Story, scenes: Sequence[np.ndarray]) -> float:
    """The lowest visual consistency of neighbouring scenes."""
    measured = [measure_scene(scene, describe(story, k)) for k, scene in enumerate(scenes)]
    return min(visual_consistency(pair).overall for pair in pairwise(measured))


def _write_json(path: Path, rows: list[dict]) -> None:
    write_text(path, json.dumps(rows, indent=1))


def _write_csv(path: Path, scenes: list[dict]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["fps", "width", "height", "caption", "path", "num_frame"])
    for scene in scenes:
        num_frames = round(scene["duration"] * scene["fps"])
        writer.writerow([scene["fps"], scene["width"], scene["height"], scene["caption"], scene["url"], num_frames])
    write_text(path, text.getvalue())


if __name__ == "__main__":
    sys.exit(run_command(FilmsConfig, "mask2dit.storyworld.films:make_films", None, sys.argv[1:]))
