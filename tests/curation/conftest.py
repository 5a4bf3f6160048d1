import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from mask2dit.curation.config import CaptionConfig, CurationConfig, EmbedConfig, ExportConfig, GroupConfig, SplitConfig
from mask2dit.curation.group import Group
from mask2dit.curation.write import Clip
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.video.writing import write_video

SCRIPT = Path(__file__).parents[2] / "scripts/draw_example_films.py"


@pytest.fixture(scope="session", autouse=True)
def packages_of_the_extra():
    for package in ("av", "cv2", "openai", "scenedetect"):
        pytest.importorskip(package, reason="pip install mask2dit[curation]")


@pytest.fixture(scope="session")
def drawing():
    """The script that draws the example films, as a module."""
    spec = importlib.util.spec_from_file_location("draw_example_films", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def films(drawing, tmp_path_factory):
    """The example films, with a file that is no video and one that is no film."""
    folder = tmp_path_factory.mktemp("films")
    drawing.main(folder)
    (folder / "notes.txt").write_text("not a film")
    return folder


@pytest.fixture
def damage():
    """Overwrites the last third of a video's frames, which only decoding shows."""

    def overwrite(path):
        data = path.read_bytes()
        header = data.index(b"moov") - 4  # behind the frames
        path.write_bytes(data[: header * 2 // 3] + bytes(header - header * 2 // 3) + data[header:])

    return overwrite


@pytest.fixture
def config(films, tiny_viclip, tmp_path):
    """The whole path over the example films; keywords change it."""

    def make(**changes):
        settings = {
            "films": str(films),
            "output": str(tmp_path / "out"),
            "num_frames": 17,
            "split": SplitConfig(detectors=["content"]),
            "embed": EmbedConfig(viclip=ViCLIPConfig(weights=str(tiny_viclip))),
            "group": GroupConfig(threshold=0.7, ceiling=0.9999),
            "caption": CaptionConfig(backend="stand_in"),
            "export": ExportConfig(folder=str(tmp_path / "manifests"), validation_share=0.0),
            "device": "cpu",
        }
        return CurationConfig(**{**settings, **changes})

    return make


@pytest.fixture
def with_caption():
    """A configuration with other keys of `caption`."""
    return lambda config, **changes: replace(config, caption=replace(config.caption, **changes))


@pytest.fixture
def story(tmp_path):
    """A group of three clips with their files: the group, the clips by their ids, and their folder."""
    clips = {}
    for number in range(3):
        name = f"film.mp4#{10 * number}-{10 * number + 9}"
        frames = np.full((9, 64, 96, 3), 60 * number + 40, np.uint8)
        write_video(tmp_path / f"{number}.mp4", frames, 8)
        clips[name] = Clip(
            id=name,
            source="film.mp4",
            key=f"clip {number}",
            file="film.mp4",
            path=f"{number}.mp4",
            start=10 * number,
            stop=10 * number + 9,
            crop=[0, 0, 64, 96],
            num_frames=9,
            fps=8.0,
            width=96,
            height=64,
        )
    similarity = [[1.0, 0.9, 0.8], [0.9, 1.0, 0.9], [0.8, 0.9, 1.0]]
    group = Group(id="film.mp4#0-29", source="film.mp4", key="group", clips=list(clips), similarity=similarity)
    return group, clips, tmp_path
