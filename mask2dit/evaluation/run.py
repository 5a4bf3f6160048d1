"""The evaluation of a run: its videos, their scores, and the report. What was done is found again."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from mask2dit.config import parse_shard
from mask2dit.device import choose_device
from mask2dit.encoders.fvd import NUM_FRAMES, load_extractor
from mask2dit.endpoint import UnusableEndpointError
from mask2dit.evaluation.config import EvaluationConfig
from mask2dit.evaluation.frechet import frechet_distance_of_features, kernel_distance
from mask2dit.evaluation.measures.base import Measure, Scores
from mask2dit.evaluation.measures.registry import build_measures
from mask2dit.evaluation.report import write_report
from mask2dit.evaluation.results import Fault, Results, StoryResult
from mask2dit.evaluation.videos import Generator, StoryVideo, find_video
from mask2dit.files import atomic_path, check_writable, write_text
from mask2dit.hashing import digest, fingerprint
from mask2dit.provenance import git_commit, versions
from mask2dit.stories import Story, read_stories
from mask2dit.video.files import list_videos
from mask2dit.video.frames import middle_frames
from mask2dit.video.reading import open_video

logger = logging.getLogger(__name__)

FAULTS = (ValueError, OSError, IndexError)  # of a story, and no reason to stop the others


def evaluate(config: EvaluationConfig) -> int:
    """Generates what is missing, scores what is not scored, and writes the report.

    Returns:
        0, or 1 if a story could not be generated or scored; the report lists each with its fault.

    Raises:
        ValueError, OSError: for anything that is wrong before the first story.
    """
    stories = read_stories(config.stories)[: config.limit]
    output = Path(config.output)
    for folder in ("videos", "scores", "features"):
        check_writable(output / folder)
    others = [Results.read(other) for other in config.compare]
    device = choose_device(config.device)
    measures, off = build_measures(config, device)
    extractors, reasons = _extractors(config, device)
    off |= reasons
    if not measures:
        raise ValueError(f"nothing can be measured: {'; '.join(f'{name}: {why}' for name, why in off.items())}")
    for name, reason in off.items():
        logger.info("%s is off: %s", name, reason)

    index, count = parse_shard(config.shard)
    faults: list[Fault] = []
    source, is_untrained = _source(config, stories)
    videos = _videos(source, stories[index::count], faults)
    del source  # and with it the model, before others need its memory
    for measure in measures:
        against = [reason for video in videos if (reason := measure.reason_against(video.story))]
        if against:
            off[measure.name] = f"not for {len(against)} of {len(videos)} stories, such as: {against[0]}"
        _score(measure, videos, output / "scores" / measure.name, faults)
    features = {name: _features(name, load, videos, output / "features", faults) for name, load in extractors.items()}
    if count > 1:
        logger.info("Part %s is done; run shard=0/1 after all parts, for the report", config.shard)
        return 1 if faults else 0

    distances = {}
    for name, load in extractors.items():
        try:
            reference = _reference_features(name, load, Path(config.frechet.reference), output / "features")
            distances[name] = _distances(features[name], reference, config.frechet.allow_different_sizes)
        except FAULTS as error:
            off[f"Fréchet distance ({name})"] = str(error)
            logger.warning("Fréchet distance (%s): %s", name, error)
    results = Results(
        name=config.name,
        stories=[_result(video, measures, output / "scores") for video in videos],
        columns=[column for measure in measures for column in measure.columns],
        measured_by={column.key: measure.identity for measure in measures for column in measure.columns},
        distances=distances,
        off=off,
        faults=faults,
        notes=[
            *(["The model is untrained: its videos are noise."] if is_untrained else []),
            *(["ViCLIP is untrained: its scores mean nothing."] if any(m.is_untrained for m in measures) else []),
        ],
        settings=dataclasses.asdict(config),
        versions={**versions(), "git_commit": git_commit()},
        untrained=[
            column.key for measure in measures for column in measure.columns if is_untrained or measure.is_untrained
        ],
    )
    page = write_report(results, output, others)
    logger.info("%d of %d stories, %d faults. Wrote %s", len(videos), len(stories), len(faults), page)
    return 1 if faults else 0


def _source(config: EvaluationConfig, stories: Sequence[Story]) -> tuple[Callable[[Story], StoryVideo], bool]:
    """What finds or makes the video of a story, and whether an untrained model makes it."""
    if config.videos is None:
        generator = Generator(config, stories)
        return generator, generator.is_untrained
    if not Path(config.videos).is_dir():
        raise FileNotFoundError(f"there is no folder of videos {config.videos!r}")
    return lambda story: find_video(config, story), False


def _videos(source: Callable[[Story], StoryVideo], stories: Sequence[Story], faults: list[Fault]) -> list[StoryVideo]:
    videos = []
    for story in tqdm(stories, desc="videos", unit="story", disable=None):
        try:
            videos.append(source(story))
        except FAULTS as error:
            _note(faults, story, "video", error)
    return videos


def _score(measure: Measure, videos: Sequence[StoryVideo], folder: Path, faults: list[Fault]) -> None:
    """Writes the scores that are missing."""
    folder.mkdir(exist_ok=True)
    missing = [
        video
        for video in videos
        if measure.reason_against(video.story) is None and _read_scores(measure, video, folder) is None
    ]
    try:
        if missing:
            measure.prepare(missing)
    except FAULTS as error:
        for video in missing:
            _note(faults, video.story, measure.name, error)
        return
    for number, video in enumerate(tqdm(missing, desc=measure.name, unit="story", disable=None)):
        try:
            scores = measure.score(video)
        except UnusableEndpointError as error:  # for no story, then
            for left in missing[number:]:
                _note(faults, left.story, measure.name, error)
            return
        except FAULTS as error:
            _note(faults, video.story, measure.name, error)
            continue
        record = {"made_from": _key(measure.identity, video), "values": scores.values, "details": scores.details}
        write_text(folder / f"{video.story.name}.json", json.dumps(record, ensure_ascii=False) + "\n")


def _read_scores(measure: Measure, video: StoryVideo, folder: Path) -> Scores | None:
    path = folder / f"{video.story.name}.json"
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        made_from, scores = record["made_from"], Scores(record["values"], record["details"])
    except (ValueError, KeyError, TypeError):
        logger.warning("%s is damaged: this story is scored again", path)
        return None
    return scores if made_from == _key(measure.identity, video) else None


def _key(identity: str, video: StoryVideo) -> str:
    return digest([identity, video.identity])


def _result(video: StoryVideo, measures: Sequence[Measure], folder: Path) -> StoryResult:
    values, details = {}, {}
    for measure in measures:
        scores = _read_scores(measure, video, folder / measure.name)
        if scores is not None:
            values |= scores.values
            details[measure.name] = scores.details
    return StoryResult(
        name=video.story.name,
        title=video.story.title,
        prompts=list(video.story.prompts),
        video=str(video.path.absolute()),
        scenes=[list(scene) for scene in video.scenes],
        values=values,
        details=details,
    )


def _note(faults: list[Fault], story: Story, stage: str, error: Exception) -> None:
    logger.warning("Story %r, %s: %s", story.title, stage, error)
    faults.append(Fault(story=story.title, stage=stage, fault=str(error)))


def _extractors(config: EvaluationConfig, device: torch.device) -> tuple[dict[str, Callable], dict[str, str]]:
    """What loads each extractor, and why others are off. They are loaded only where features are missing."""
    loaders, off = {}, {}
    for name in ("videomae", "i3d"):
        path = getattr(config.frechet, name)
        if path is None or config.frechet.reference is None:
            off[f"Fréchet distance ({name})"] = (
                "not asked for" if path is None else "name real videos in frechet.reference"
            )
        elif not Path(path).is_file():
            off[f"Fréchet distance ({name})"] = f"put its weights at {path}"
        else:
            loaders[name] = _Loader(name, path, device)
    if loaders and not Path(config.frechet.reference).is_dir():
        raise FileNotFoundError(
            f"there is no folder of videos {config.frechet.reference!r}, which frechet.reference names"
        )
    return loaders, off


class _Loader:
    """An extractor that is read with the first clips it gets."""

    def __init__(self, name: str, path: str, device: torch.device):
        self.arguments = (name, path, device)
        self.identity = f"{name} {fingerprint(path)}"
        self.extractor = None

    def __call__(self, clips: list[torch.Tensor]) -> np.ndarray:
        self.extractor = self.extractor or load_extractor(*self.arguments)
        return self.extractor(clips)


def _features(
    name: str, extract: _Loader, videos: Sequence[StoryVideo], folder: Path, faults: list[Fault]
) -> list[np.ndarray]:
    """Features of the scenes of each video, (S, D): a story at a time is in memory, and what was computed is kept."""
    features = []
    for video in tqdm(videos, desc=name, unit="story", disable=None):
        path = folder / f"{name}-{_key(extract.identity, video)}.npy"
        try:
            if not path.is_file():
                clips = [video.frames(middle_frames(*scene, NUM_FRAMES)) for scene in video.scenes]
                _save(path, extract(clips))
            features.append(_load(path))
        except FAULTS as error:
            _note(faults, video.story, name, error)
    return features


def _reference_features(name: str, extract: _Loader, reference: Path, folder: Path) -> np.ndarray:
    """Features of real videos, (N, D), each file one clip."""
    files = list_videos(reference)
    if not files:
        raise ValueError(f"there are no videos in {str(reference)!r}, which frechet.reference names")
    features = []
    for file in tqdm(files, desc=f"{name}, reference", unit="video", disable=None):
        key = hashlib.sha256(f"{extract.identity} {fingerprint(file)}".encode()).hexdigest()[:16]
        path = folder / f"{name}-{key}.npy"
        if not path.is_file():
            reader = open_video(file)
            _save(path, extract([reader.read(middle_frames(0, reader.num_frames, NUM_FRAMES))]))
        features.append(_load(path))
    return np.concatenate(features)


def _distances(features: list[np.ndarray], reference: np.ndarray, allow_different_sizes: bool) -> dict[str, float]:
    if not features:
        raise ValueError("no story has features")
    scenes = np.concatenate(features)
    return {
        "frechet": frechet_distance_of_features(scenes, reference, allow_different_sizes),
        "kernel": kernel_distance(scenes, reference, allow_different_sizes),
        "scenes": len(scenes),
        "reference": len(reference),
    }


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and its features are computed again") from error


def _save(path: Path, features: np.ndarray) -> None:
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.save(file, features)
