"""Evaluates a run: its videos, their scores and the report. Existing results are reused."""

import dataclasses
import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from mask2dit.config import parse_shard
from mask2dit.device import choose_device
from mask2dit.encoders.fvd import NUM_FRAMES, load_extractor
from mask2dit.endpoint import UnusableEndpointError
from mask2dit.engine.config import resolve_shard
from mask2dit.engine.open import Engine, open_engine
from mask2dit.engine.share import Workers
from mask2dit.evaluation.config import INSTALL, EvaluationConfig
from mask2dit.evaluation.frechet import frechet_distance_of_features, kernel_distance
from mask2dit.evaluation.measures.base import Measure, Scores
from mask2dit.evaluation.measures.registry import build_measure, build_measures
from mask2dit.evaluation.report import write_report
from mask2dit.evaluation.results import Fault, Results, StoryResult
from mask2dit.evaluation.videos import Generator, StoryVideo, detector_version, find_video
from mask2dit.files import atomic_path, check_writable, write_text
from mask2dit.hashing import digest, fingerprint
from mask2dit.provenance import git_commit, versions
from mask2dit.stories import Story, read_stories
from mask2dit.video.files import list_videos
from mask2dit.video.frames import middle_frames
from mask2dit.video.reading import open_video

logger = logging.getLogger(__name__)

FAULTS = (ValueError, OSError, IndexError)  # of one story; the others continue


def evaluate(config: EvaluationConfig) -> int:
    """Generates missing videos, computes missing scores and writes the report.

    Returns:
        0, or 1 if a story could not be generated or scored; the report lists each with its fault.

    Raises:
        ValueError, OSError: for faults found before the first story.
    """
    config = dataclasses.replace(config, shard=resolve_shard(config))
    stories = read_stories(config.stories)[: config.limit]
    if config.detects_boundaries:
        _check_detector(config)
    output = Path(config.output)
    for folder in ("videos", "scores", "features"):
        check_writable(output / folder)
    others = [Results.read(other) for other in config.compare]
    device = choose_device(
        config.device if config.engine == "local" else "auto"
    )  # workers of a cluster choose their own
    measures, off = build_measures(config, device)
    extractors, reasons = _extractors(config)
    off |= reasons
    if not measures:
        raise ValueError(f"nothing can be measured: {'; '.join(f'{name}: {why}' for name, why in off.items())}")
    for name, reason in off.items():
        logger.info("%s is off: %s", name, reason)

    index, count = parse_shard(config.shard)
    faults: list[Fault] = []
    source, is_untrained = _source(config, stories)
    with open_engine(config) as engine:
        videos = _videos(engine, source, stories[index::count], faults)
        del source  # frees the generating model's memory for the measures
        for measure in measures:
            against = [reason for video in videos if (reason := measure.reason_against(video.story))]
            if against:
                off[measure.name] = f"not for {len(against)} of {len(videos)} stories, such as: {against[0]}"
            _score(engine, config, measure, videos, output / "scores" / measure.name, faults)
        features = {
            name: _features(engine, name, extract, videos, output / "features", faults)
            for name, extract in extractors.items()
        }
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


def _check_detector(config: EvaluationConfig) -> None:
    """Raises `ValueError` if the package that detects boundaries is not installed."""
    try:
        detector_version(config.cuts)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"boundaries=detected with cuts.detector={config.cuts.detector}: {error}: {INSTALL}"
        ) from error


def _source(config: EvaluationConfig, stories: Sequence[Story]) -> tuple[Callable[[Story], StoryVideo], bool]:
    """The function that finds or generates a story's video, and True if it generates with an untrained model."""
    if config.videos is None:
        generator = Generator(config, stories)
        return generator, generator.is_untrained
    if not Path(config.videos).is_dir():
        raise FileNotFoundError(f"there is no folder of videos {config.videos!r}")
    return partial(find_video, config), False


def _videos(
    engine: Engine, source: Callable[[Story], StoryVideo], stories: Sequence[Story], faults: list[Fault]
) -> list[StoryVideo]:
    """The videos of stories, in their order, without those that have a fault."""
    workers = Workers(load=partial(_at_worker, source), here=source, uses_gpu=isinstance(source, Generator))
    found = {}
    with closing(engine.run("videos", _find, stories, workers)) as done:
        for story, outcome in tqdm(done, total=len(stories), desc="videos", unit="story", disable=None):
            found[story.name] = outcome
    return _without_faults([(story, found[story.name]) for story in stories], "video", faults)


def _at_worker(source: Callable[[Story], StoryVideo]) -> Callable[[Story], StoryVideo]:
    if isinstance(source, Generator):
        source.device = choose_device(source.config.device)
    return source


def _find(stories: Iterable[Story], source: Callable[[Story], StoryVideo]) -> Iterator:
    """Yields each story with its video, or with the fault that it has."""
    for story in stories:
        try:
            outcome = source(story)
        except FAULTS as error:
            outcome = error
        yield story, outcome


def _score(
    engine: Engine,
    config: EvaluationConfig,
    measure: Measure,
    videos: Sequence[StoryVideo],
    folder: Path,
    faults: list[Fault],
) -> None:
    """Computes and writes missing scores."""
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
        _without_faults([(video.story, error) for video in missing], measure.name, faults)
        return
    of_name = {video.story.name: video for video in missing}
    outcomes = {}
    workers = Workers(load=partial(build_measure, config, measure.name), here=measure, uses_gpu=measure.uses_gpu)
    run = (
        _score_each(missing, measure)
        if measure.is_of_one_process
        else engine.run("score", _score_each, missing, workers)
    )
    with closing(run) as done:
        for story, outcome in tqdm(done, total=len(missing), desc=measure.name, unit="story", disable=None):
            outcomes[story.name] = outcome
            if isinstance(outcome, Scores):
                made_from = _key(measure.identity, of_name[story.name])
                record = {"made_from": made_from, "values": outcome.values, "details": outcome.details}
                write_text(folder / f"{story.name}.json", json.dumps(record, ensure_ascii=False) + "\n")
    _without_faults([(video.story, outcomes[video.story.name]) for video in missing], measure.name, faults)


def _score_each(videos: Iterable[StoryVideo], measure: Measure) -> Iterator[tuple[Story, Scores | Exception]]:
    """Yields each story with its scores, or with the fault that it has."""
    unusable: UnusableEndpointError | None = None  # affects all stories after it
    for video in videos:
        outcome: Scores | Exception
        try:
            outcome = unusable or measure.score(video)
        except UnusableEndpointError as error:
            outcome = unusable = error
        except FAULTS as error:
            outcome = error
        yield video.story, outcome


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


def _without_faults(outcomes: Iterable[tuple[Story, Any]], stage: str, faults: list[Fault]) -> list:
    """The outcomes that are not exceptions, which are noted."""
    kept = []
    for story, outcome in outcomes:
        if isinstance(outcome, Exception):
            _note(faults, story, stage, outcome)
        else:
            kept.append(outcome)
    return kept


def _note(faults: list[Fault], story: Story, stage: str, error: Exception) -> None:
    logger.warning("Story %r, %s: %s", story.title, stage, error)
    faults.append(Fault(story=story.title, stage=stage, fault=str(error)))


def _extractors(config: EvaluationConfig) -> tuple[dict[str, Callable], dict[str, str]]:
    """The available extractors, and why others are off. An extractor is loaded only if features are missing."""
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
            loaders[name] = _Loader(name, path, config.device)
    if loaders and not Path(config.frechet.reference).is_dir():
        raise FileNotFoundError(
            f"there is no folder of videos {config.frechet.reference!r}, which frechet.reference names"
        )
    return loaders, off


class _Loader:
    """An extractor that is loaded on its first call."""

    def __init__(self, name: str, path: str, device: str):
        self.arguments = (name, path, device)
        self.identity = f"{name} {fingerprint(path)}"
        self.extractor = None

    def __call__(self, clips: list[torch.Tensor]) -> np.ndarray:
        if self.extractor is None:
            name, path, device = self.arguments
            self.extractor = load_extractor(name, path, choose_device(device))
        return self.extractor(clips)


def _features(
    engine: Engine, name: str, extract: _Loader, videos: Sequence[StoryVideo], folder: Path, faults: list[Fault]
) -> list[np.ndarray]:
    """Features of the scenes of each video, (S, D), cached in `folder`."""
    paths = {video.story.name: folder / f"{name}-{_key(extract.identity, video)}.npy" for video in videos}
    missing = [(video, paths[video.story.name]) for video in videos if not paths[video.story.name].is_file()]
    outcomes: dict[str, Exception | None] = {}
    workers = Workers(load=partial(_Loader, *extract.arguments), here=extract, uses_gpu=True)
    with closing(engine.run("features", _extract, missing, workers)) as done:
        for story, fault in tqdm(done, total=len(missing), desc=name, unit="story", disable=None):
            outcomes[story.name] = fault
    features = []
    for video in videos:
        try:
            if fault := outcomes.get(video.story.name):
                raise fault
            features.append(_load(paths[video.story.name]))
        except FAULTS as error:
            _note(faults, video.story, name, error)
    return features


def _extract(videos: Iterable[tuple[StoryVideo, Path]], extract: _Loader) -> Iterator[tuple[Story, Exception | None]]:
    """Writes features. Yields each story with the fault that it has. One story's frames are in memory at a time."""
    for video, path in videos:
        fault = None
        try:
            clips = [video.frames(middle_frames(*scene, NUM_FRAMES)) for scene in video.scenes]
            _save(path, extract(clips))
        except FAULTS as error:
            fault = error
        yield video.story, fault


def _reference_features(name: str, extract: _Loader, reference: Path, folder: Path) -> np.ndarray:
    """Features of real videos, (N, D), one clip per file."""
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
