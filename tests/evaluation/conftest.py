import json
from pathlib import Path

import numpy as np
import pytest

from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.evaluation.config import CutConfig, EvaluationConfig, FrechetConfig, QualityConfig
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.stories import Scene, Story, write_stories
from mask2dit.video.writing import write_video

FOX = "a red fox, wearing a blue scarf"
COLOURS = ((200, 60, 60), (60, 180, 60), (60, 60, 200))


def make_story(title: str = "The Fox") -> Story:
    prompts = [f"Actor1 ({FOX}) {does}." for does in ("walks", "runs", "sleeps")]
    return Story(title=title, cast={"Actor1": FOX}, scenes=tuple(Scene(prompt=prompt) for prompt in prompts))


def paint_video(path: Path, lengths=(9, 9, 9), seed: int = 0) -> Path:
    """Scenes of one colour each, with a little noise."""
    rng = np.random.default_rng(seed)
    scenes = [COLOURS[i] + rng.normal(0, 2, (length, 64, 96, 3)) for i, length in enumerate(lengths)]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, np.concatenate(scenes).clip(0, 255).astype(np.uint8), fps=8)
    return path


@pytest.fixture
def story() -> Story:
    return make_story()


@pytest.fixture
def story_video(tmp_path, story) -> StoryVideo:
    path = paint_video(tmp_path / f"{story.name}.mp4")
    return StoryVideo(story=story, path=path, boundaries=(9, 18))


@pytest.fixture
def config(tmp_path, tiny_viclip):
    """An evaluation of three painted videos whose cuts are where they are meant to be; keywords change it."""
    titles = ("The Fox", "The Owl", "The Hare")
    write_stories(tmp_path / "stories.yaml", [make_story(title) for title in titles])
    for seed, title in enumerate(titles):
        path = paint_video(tmp_path / "in" / f"{make_story(title).name}.mp4", seed=seed)
        path.with_suffix(".json").write_text(json.dumps({"boundaries": [9, 18]}))

    def make(**changes) -> EvaluationConfig:
        off = QualityConfig(clip=None, aesthetic_head=None, dino=None, background_clip=None)
        settings = {
            "name": "painted",
            "output": str(tmp_path / "out"),
            "stories": str(tmp_path / "stories.yaml"),
            "videos": str(tmp_path / "in"),
            "viclip": ViCLIPConfig(weights=str(tiny_viclip)),
            "cuts": CutConfig(min_scene_frames=4),
            "frechet": FrechetConfig(videomae=None, i3d=None),
            "quality": off,
            "device": "cpu",
        }
        return EvaluationConfig(**{**settings, **changes})

    return make
