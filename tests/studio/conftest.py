import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mask2dit.studio.actions import Studio
from mask2dit.studio.config import StudioConfig
from mask2dit.studio.engine import default_settings
from mask2dit.studio.project import Draft, DraftScene, Projects
from mask2dit.video.writing import write_video

MODEL = str(Path(__file__).parents[2] / "models/storyworld")
PROMPTS = ("Actor1 jumps on the beach.", "Actor1 stands still on the beach.", "Actor1 moves left along the beach.")


@pytest.fixture
def draft() -> Draft:
    """Three scenes of the small world that take a second."""
    return Draft(
        title="At the beach",
        cast=(("Actor1", "green triangle, wearing a hat"),),
        scenes=tuple(DraftScene(prompt=prompt) for prompt in PROMPTS),
        settings={**default_settings(MODEL), "num_inference_steps": 1, "preview_every": 0},
    )


@pytest.fixture
def projects(tmp_path) -> Projects:
    return Projects(tmp_path / "projects")


@pytest.fixture
def studio(tmp_path) -> Studio:
    return Studio(StudioConfig(projects=str(tmp_path / "projects"), model=MODEL, device="cpu"))


@pytest.fixture
def run_job(studio):
    """Generates and waits for the end."""

    def run(name, again=None, **options):
        job = studio.generate(name, again, **options)
        until = time.monotonic() + 60
        while job.is_open and time.monotonic() < until:
            time.sleep(0.02)
        return job

    return run


@pytest.fixture
def own_clip(tmp_path) -> Path:
    path = tmp_path / "my clip.mp4"
    write_video(path, np.full((30, 80, 120, 3), 90, dtype=np.uint8), fps=8)
    return path


@pytest.fixture
def edit(studio):
    """Changes a project's draft, as the page does."""

    def change(name, index=None, **changes) -> Draft:
        draft = studio.projects.open(name).load()
        if index is None:
            return studio.update(name, replace(draft, **changes))
        return studio.update(name, draft.with_scene(index, replace(draft.scenes[index], **changes)))

    return change
