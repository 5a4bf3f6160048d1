"""VBench, run as a program in its own environment, since its requirements conflict with this project's."""

import json
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mask2dit.evaluation.config import VBenchConfig
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.hashing import fingerprint
from mask2dit.video.writing import write_video


class VBenchMeasure(Measure):
    """VBench's dimensions for custom videos, times 100. Each scene is scored as a separate video; scores are averaged.

    Args:
        config: the program and its dimensions.
        folder: working folder of this process alone; `prepare` empties it.
    """

    name = "vbench"
    is_of_one_process = True

    def __init__(self, config: VBenchConfig, folder: Path):
        self.config = config
        self.folder = folder
        self.columns = tuple(
            Column(f"vbench_{dimension}", f"VBench: {dimension.replace('_', ' ')}") for dimension in config.dimensions
        )
        self.identity = f"vbench {fingerprint(config.command)} {config.dimensions}"
        self._results: dict[str, dict[str, float]] = {}

    def prepare(self, videos: Sequence[StoryVideo]) -> None:
        """Runs VBench once per dimension over the scenes of all videos, since each run loads its models again.

        Raises:
            ValueError: if it fails; the message holds the end of its output.
        """
        shutil.rmtree(self.folder, ignore_errors=True)
        clips = self.folder / "scenes"
        clips.mkdir(parents=True)
        for video in videos:
            for number, (start, stop) in enumerate(video.scenes):
                # H.264 needs even sizes.
                frames = video.frames(range(start, stop)).numpy()
                height, width = (side - side % 2 for side in frames.shape[1:3])
                write_video(clips / f"{video.story.name}_{number}.mp4", frames[:, :height, :width], video.reader.fps)
        for dimension in self.config.dimensions:
            self._results[dimension] = self._run(dimension, clips)

    def score(self, video: StoryVideo) -> Scores:
        values, details = {}, {}
        for dimension in self.config.dimensions:
            names = [f"{video.story.name}_{number}.mp4" for number in range(len(video.scenes))]
            missing = [name for name in names if name not in self._results[dimension]]
            if missing:
                raise ValueError(f"VBench gave no {dimension} for {missing[0]}")
            details[dimension] = [self._results[dimension][name] for name in names]
            values[f"vbench_{dimension}"] = float(np.mean(details[dimension]))
        return Scores(values, details)

    def _run(self, dimension: str, clips: Path) -> dict[str, float]:
        """The score of each clip by file name."""
        output = self.folder / dimension
        output.mkdir()
        # Absolute: VBench runs in the folder of its output, where it also leaves other files.
        command = [
            str(Path(self.config.command).absolute()),
            "evaluate",
            "--mode=custom_input",
            "--dimension",
            dimension,
        ]
        command += ["--videos_path", str(clips.absolute()), "--output_path", str(output.absolute())]
        result = subprocess.run(command, cwd=output, capture_output=True, text=True, check=False)
        files = sorted(output.glob("*_eval_results.json"))
        if result.returncode or not files:
            said = (result.stderr or result.stdout).strip()[-500:]
            raise ValueError(f"VBench failed at {dimension} (exit status {result.returncode}): {said or 'no message'}")
        _, videos = json.loads(files[-1].read_text(encoding="utf-8"))[dimension]
        # VBench divides imaging quality by 100 only in its average; dynamic degree is true or false for each video.
        scale = 1 if dimension == "imaging_quality" else 100
        return {Path(video["video_path"]).name: scale * float(video["video_results"]) for video in videos}
