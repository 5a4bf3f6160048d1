import csv
import json

import numpy as np
import pytest

from mask2dit.data.config import DataConfig
from mask2dit.video import write_video

FPS = 12
SIZE = (32, 64)  # height, width


@pytest.fixture(autouse=True)
def no_pause_between_tries(monkeypatch):
    monkeypatch.setattr("mask2dit.data.clips.RETRY_SECONDS", 0)


def _numbered_video(path, num_frames, size=SIZE, fps=FPS):
    """Grey frames whose brightness tells their index: 4 k."""
    frames = np.broadcast_to((4 * np.arange(num_frames, dtype=np.uint8))[:, None, None, None], (num_frames, *size, 3))
    write_video(path, frames, fps)
    return path


@pytest.fixture(scope="session")
def numbered_video():
    return _numbered_video


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """A folder with 0.mp4 … 7.mp4 of 40 … 47 frames."""
    folder = tmp_path_factory.mktemp("clips")
    for k in range(8):
        _numbered_video(folder / f"{k}.mp4", 40 + k)
    return folder


@pytest.fixture
def write_csv(tmp_path):
    """Writes a manifest of (path, caption, stated frames) and gives its path."""

    def write(rows, name="clips.csv"):
        path = tmp_path / name
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["fps", "width", "height", "caption", "path", "num_frame"])
            writer.writerows([FPS, SIZE[1], SIZE[0], caption, clip, frames] for clip, caption, frames in rows)
        return path

    return write


@pytest.fixture
def write_json(tmp_path):
    """Writes a manifest of rows of (url, caption, stated frames) and gives its path."""

    def write(rows, name="videos.json"):
        path = tmp_path / name
        records = [
            {
                "prefix": f"video {k}",
                "values": [
                    {"url": url, "caption": caption, "width": SIZE[1], "height": SIZE[0], "fps": FPS}
                    | {"duration": round(frames / FPS, 2)}
                    for url, caption, frames in row
                ],
            }
            for k, row in enumerate(rows)
        ]
        path.write_text(json.dumps(records))
        return path

    return write


@pytest.fixture
def pretrain_config(clips, write_csv):
    """Eight clips, of which two samples of three make an epoch; keywords change the configuration."""

    def make(**changes):
        manifest = write_csv([(f"{k}.mp4", f"clip {k}", 40 + k) for k in range(8)])
        tiny = {"num_frames": 5, "height": 16, "width": 24, "max_stride": 2, "max_retries": 0}
        return DataConfig(**{"manifest": str(manifest), "data_root": str(clips), **tiny, **changes})

    return make


@pytest.fixture
def finetune_config(clips, write_json):
    """Three videos of 4, 3 and 6 scenes; keywords change the configuration."""

    def make(**changes):
        rows = [(0, 1, 2, 3), (4, 5, 6), (7, 6, 5, 4, 3, 2)]
        manifest = write_json([[(f"{k}.mp4", f"scene {k}", 40 + k) for k in row] for row in rows])
        tiny = {"num_frames": 5, "height": 16, "width": 24, "max_retries": 0}
        return DataConfig(
            **{"kind": "finetune", "manifest": str(manifest), "data_root": str(clips), **tiny, **changes}
        )

    return make
