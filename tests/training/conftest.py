import csv
import dataclasses
import json
import multiprocessing.connection
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState, PartialState

from mask2dit.data.config import DataConfig
from mask2dit.training.config import TrainConfig
from mask2dit.training.run import train
from mask2dit.video.writing import write_video

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A folder with eight clips of a moving square, `pretrain.csv` of all and `sft.json` of two rows of four scenes."""
    folder = tmp_path_factory.mktemp("clips")
    random = np.random.default_rng(0)
    for i in range(8):
        colour = random.integers(0, 255, 3)
        frames = np.empty((30, 64, 96, 3), np.uint8)
        frames[:] = colour
        for t in range(30):
            frames[t, 20:40, 3 * t % 80 : 3 * t % 80 + 16] = 255 - colour
        write_video(folder / f"clip_{i}.mp4", frames, fps=8)
    with (folder / "pretrain.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["fps", "width", "height", "caption", "path", "num_frame"])
        rows.writerows([8, 96, 64, f"clip {i}", f"clip_{i}.mp4", 30] for i in range(8))
    scene = {"width": 96, "height": 64, "duration": 3.75, "fps": 8}
    stories = [
        {
            "prefix": "",
            "values": [{**scene, "vid": str(i), "url": f"clip_{i}.mp4", "caption": f"scene {i}"} for i in row],
        }
        for row in (range(4), range(4, 8))
    ]
    (folder / "sft.json").write_text(json.dumps(stories))
    return folder


@pytest.fixture
def config(clips, small_model, tmp_path):
    """A run of the small model that takes seconds; keywords change it, `data__x` its data."""

    def make(**changes) -> TrainConfig:
        data = {key.removeprefix("data__"): changes.pop(key) for key in list(changes) if key.startswith("data__")}
        return TrainConfig(
            **{
                "model": str(small_model),
                "output_dir": str(tmp_path / "run"),
                "max_steps": 4,
                "batch_size": 2,
                "learning_rate": 1e-3,
                "warmup_steps": 2,
                "max_grad_norm": 1.0,
                "precision": "fp32",
                "num_workers": 0,
                "trackers": [],
                "log_every": 1,
                "checkpoint_every": 2,
                **changes,
                "data": DataConfig(
                    **{"manifest": str(clips / "pretrain.csv"), "num_frames": 9, "height": 32, "width": 48, **data}
                ),
            }
        )

    return make


@pytest.fixture
def run():
    """Trains in this process; accelerate keeps state that the next run must not find."""

    def train_here(config: TrainConfig) -> int:
        try:
            return train(config)
        finally:
            for state in (AcceleratorState, GradientState, PartialState):
                state._reset_state()

    return train_here


@pytest.fixture
def launcher(tmp_path):
    """Starts the launcher with two processes, as a user would. Each takes seconds to import what it needs, which `start`
    and `launch` avoid."""

    def start(config: TrainConfig, **environment: str) -> subprocess.Popen:
        launcher = ["-m", "mask2dit.training.launch", "--nproc_per_node=2", f"--master_port={free_port()}"]
        return subprocess.Popen(
            [sys.executable, *launcher, "-m", "mask2dit.training", write_config(config, tmp_path)],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def write_config(config: TrainConfig, folder: Path) -> str:
    path = folder / "config.json"
    path.write_text(json.dumps({"config": dataclasses.asdict(config)}))
    return str(path)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as free:  # other tests may run at the same time
        return free.getsockname()[1]


@pytest.fixture
def start(fork, tmp_path):
    """Starts to train in forked processes. `before` is code that each runs first. Returns the processes."""

    def begin(config: TrainConfig, processes: int = 1, before: str = "") -> list:
        command = ["mask2dit.training", write_config(config, tmp_path)]
        environment = {"TORCH_EXTENSIONS_DIR": str(tmp_path / "compiled")}
        if processes == 1 and not config.deepspeed:
            return [fork(command, environment, before)]
        environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}  # as torchrun sets them
        environment |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        ranks = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
        return [fork(command, environment | rank, before) for rank in ranks]

    return begin


@pytest.fixture
def launch(start):
    """Trains in other processes. Returns the first status that is not 0, if any, and what they wrote to stderr."""

    def until_one_fails(config: TrainConfig, processes: int = 1, before: str = "") -> subprocess.CompletedProcess:
        running = start(config, processes, before)
        while not any(process.exitcode for process in running) and (alive := [p for p in running if p.is_alive()]):
            multiprocessing.connection.wait([process.sentinel for process in alive])
        status = next((process.exitcode for process in running if process.exitcode), 0)
        return subprocess.CompletedProcess([], status, stderr="".join(process.errors() for process in running))

    return until_one_fails


@pytest.fixture
def metrics():
    """The lines of a run's metrics.jsonl."""
    return lambda config: [
        json.loads(line) for line in (Path(config.output_dir) / "metrics.jsonl").read_text().splitlines()
    ]
