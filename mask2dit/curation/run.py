"""Runs all stages in order."""

import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from mask2dit.curation.caption import Captions, caption, caption_settings, has_attempts_left
from mask2dit.curation.captioners import OpenAICaptioner, TransformersCaptioner, check_captioner
from mask2dit.curation.config import STAGES, CaptionConfig, CurationConfig
from mask2dit.curation.doubts import DoubtfulCut, doubtful_cuts
from mask2dit.curation.duplicates import drop_duplicates, film_families, find_twins
from mask2dit.curation.embed import Embedder, Features, embed, embed_settings
from mask2dit.curation.export import export
from mask2dit.curation.group import Group, adjacent_pairs, by_film, group, single
from mask2dit.curation.probe import Film, find_films, probe, shot_times
from mask2dit.curation.report import funnel_table, similarity_plot, write_card
from mask2dit.curation.review import DECISIONS, Decision, read_decisions, write_review
from mask2dit.curation.score import Scores, apply_filters, load_scorers, score, score_settings
from mask2dit.curation.split import Scene, load_detector, split
from mask2dit.curation.stand_in import stand_in
from mask2dit.curation.store import Dropped, Workspace, kept
from mask2dit.curation.verify import Verified, verify, with_features
from mask2dit.curation.write import Clip, write
from mask2dit.data.config import DataConfig
from mask2dit.device import choose_device
from mask2dit.engine.config import resolve_shard
from mask2dit.engine.open import open_engine
from mask2dit.engine.share import Workers
from mask2dit.files import check_writable, write_lines, write_text
from mask2dit.hashing import digest
from mask2dit.optional import import_optional

logger = logging.getLogger(__name__)


def curate(config: CurationConfig) -> int:
    """Runs the stages and prints the funnel.

    Returns:
        0, or 1 if captions are missing or there is nothing to export.

    Raises:
        ValueError, OSError: for faults of the run as a whole, before the first stage if possible. Faults of one film, scene
            or group are recorded instead.
    """
    config = replace(config, shard=resolve_shard(config))
    settings = check(config)
    with open_engine(config) as engine:
        workspace = Workspace(config.output, config.shard, config.stages, engine)
        try:
            clips, features, times, doubts = _make_clips(config, workspace, settings)
            if _last_stage(config) < STAGES.index("group"):
                return 0
            return _make_manifests(config, workspace, settings, clips, features, times, doubts)
        finally:  # also after an interruption, with the results so far
            print(funnel_table(workspace.funnel))
            path = workspace.folder / f"funnel{workspace.suffix}.json"
            write_text(path, json.dumps(workspace.funnel, indent=2) + "\n")


def check(config: CurationConfig) -> dict[str, dict]:
    """The settings that the results of each needed stage depend on.

    Raises:
        ValueError: if a package or a detector is missing, the output folder is inside the folder of films, or captions cannot
            be made with these settings.
        FileNotFoundError: if weights are missing.
        OSError: if the manifests cannot be written.
    """
    if Path(config.output).resolve().is_relative_to(Path(config.films).resolve()):
        raise ValueError(
            f"output={config.output!r} is inside films={config.films!r}, and the next run would take its clips for films: "
            "choose a folder outside it"
        )
    if config.engine == "local":  # the nodes of a cluster may have other devices than this machine
        choose_device(config.device)
    if "split" in config.stages and config.shots is None:
        for name in config.split.detectors:
            load_detector(name, config.split)
    if "score" in config.stages and (config.score.motion or config.score.text):
        import_optional("cv2", "curation")
    if "score" in config.stages and config.score.text:
        import_optional("rapidocr", "curation")
        import_optional("onnxruntime", "curation")
    if "caption" in config.stages and not config.caption.missing:
        check_captioner(config.caption)
    if "group" in config.stages and config.duplicates.remove:
        import_optional("faiss", "curation")
    if "export" in config.stages and config.shard == "0/1":
        check_writable(config.export.folder)
    settings = {
        "probe": {},
        "split": {**asdict(config.split), "min_frames": _min_frames(config)},
        "write": asdict(config.write),
    }
    if config.shots is not None:
        settings["split"] |= {"is_cut": True}
    if _last_stage(config) >= STAGES.index("score"):
        settings |= {"score": score_settings(config.score), "filter": asdict(config.filter)}
    if _last_stage(config) >= STAGES.index("embed"):
        settings |= {
            "embed": embed_settings(config.embed.viclip),
            "group": asdict(config.group),
            "single": {"num_frames": config.num_frames, "max_stride": config.max_stride},
            "caption": caption_settings(config.caption),
        }
        settings["verify"] = settings["embed"]
    return settings


def _make_clips(
    config: CurationConfig, workspace: Workspace, settings: dict
) -> tuple[dict[str, Clip], list[Features], dict[str, float] | None, dict[str, list[int]]]:
    """Runs the stages from films to features. Returns the clips that pass the filters, by id, their features, the times of
    shots as `by_film` takes them, and the frames of possible transitions, by the scene's id."""
    run, folder, folder_of_films = workspace.run, workspace.folder, Path(config.films)

    def is_gone(made: Clip | Features | Dropped) -> bool:
        return not isinstance(made, Dropped) and not (folder / made.path).is_file()

    found = find_films(folder_of_films, workspace, config.shots)
    films = run(
        "probe", Film, found, settings["probe"], partial(probe, folder=folder_of_films), workers=Workers(batch=8)
    )
    for film in kept(films):
        for warning in film.warnings:
            logger.warning("%s: %s", film.id, warning)

    min_frames = _min_frames(config)
    process = partial(
        split,
        folder=folder_of_films,
        config=config.split,
        min_frames=min_frames,
        device=config.device,
        is_cut=config.shots is not None,
    )
    workers = Workers(uses_gpu=config.shots is None and "transnet" in config.split.detectors)
    scenes = run("split", Scene, kept(films), settings["split"], process, workers=workers)
    doubts = {scene.id: scene.doubts for scene in kept(scenes)}

    process = partial(write, films=folder_of_films, folder=folder, config=config.write, settings=settings["write"])
    workers = Workers(batch=8)  # scenes of a film, which share an open file and the search for borders
    written = run("write", Clip, kept(scenes), settings["write"], process, is_gone, workers)
    clips = {clip.id: clip for clip in kept(written)}
    if _last_stage(config) < STAGES.index("score"):
        return clips, [], None, doubts

    process = partial(score, folder=folder, config=config.score)
    workers = Workers(
        load=partial(load_scorers, config.score, config.device), batch=8, uses_gpu=bool(config.score.clip)
    )
    scores = run("score", Scores, list(clips.values()), settings["score"], process, workers=workers)
    passed = run("filter", Scores, kept(scores), settings["filter"], partial(apply_filters, config=config.filter))
    clips = {entry.id: clips[entry.id] for entry in kept(passed)}
    if _last_stage(config) < STAGES.index("embed"):
        return clips, [], None, doubts

    process = partial(embed, folder=folder, batch_size=config.embed.batch_size, settings=settings["embed"])
    load = partial(Embedder, config.embed.viclip, config.device)
    workers = Workers(load=load, batch=config.embed.batch_size, uses_gpu=True)
    features = kept(run("embed", Features, list(clips.values()), settings["embed"], process, is_gone, workers))
    times = shot_times(films) if config.shots is not None else None
    return {entry.id: clips[entry.id] for entry in features}, features, times, doubts


def _make_manifests(
    config: CurationConfig,
    workspace: Workspace,
    settings: dict,
    clips: Mapping[str, Clip],
    features: list[Features],
    times: dict[str, float] | None,
    doubts: Mapping[str, list[int]],
) -> int:
    """Runs the stages from groups to manifests, and writes the review page. Returns the exit status."""
    run, folder = workspace.run, workspace.folder
    clips, features, families = _remove_duplicates(config, workspace, clips, features)
    process = partial(group, folder=folder, config=config.group)
    windows = run(
        "group", Group, by_film(features, clips, times), settings["group"], process, workers=Workers(batch=16)
    )
    cosines = list(adjacent_pairs(windows).values())
    if cosines and workspace.num_shards == 1:
        plot = similarity_plot(cosines, config.group.threshold, config.group.ceiling)
        write_text(folder / "similarity.svg", plot)
    groups = kept(windows)
    if config.caption.singles:
        grouped = {name for entry in groups for name in entry.clips}
        alone = [clip for clip in clips.values() if clip.id not in grouped]
        data = DataConfig(kind="pretrain", num_frames=config.num_frames, max_stride=config.max_stride)
        groups = groups + kept(run("single", Group, alone, settings["single"], partial(single, data=data)))
    # Keys depend on the clips alone, so that captions are reused under another threshold.
    groups = [replace(entry, key=digest([clips[name].key for name in entry.clips])) for entry in groups]
    if _last_stage(config) < STAGES.index("caption"):
        return 0

    if "caption" in config.stages and config.caption.missing:
        logger.warning(
            "There are no captions, and so no manifests: set %s, or caption.backend=stand_in to try the rest. Everything "
            "before the captions is done",
            config.caption.missing,
        )
        return 1
    process = partial(_caption, clips=clips, folder=folder, config=config.caption)
    redo = partial(has_attempts_left, config=config.caption)
    captions = kept(run("caption", Captions, groups, settings["caption"], process, redo))

    verified = _verify(config, workspace, settings, captions, features)
    if workspace.num_shards > 1:
        logger.info("Part %s is done; run shard=0/1 after all parts, for the review page and the export", config.shard)
        return 0

    decisions = read_decisions(folder / DECISIONS, captions, config.caption.max_words)
    cuts = doubtful_cuts(windows, clips, config.group.ceiling, doubts)
    _write_page(config, folder, groups, clips, captions, verified, decisions, cuts)
    if "export" not in config.stages:
        return 0
    rows, exported = export(folder, config, clips, captions, decisions, families)
    workspace.count("export", len(captions), exported)
    if not any(rows.values()):
        logger.warning(
            "There is nothing to export: the table says which rules removed it, and what is not done yet. Manifests of "
            "earlier runs stay"
        )
        return 1
    write_card(
        Path(config.export.folder), config, workspace.funnel, rows, list(clips.values()), captions, verified, cosines
    )
    for name, count in rows.items():
        path = Path(config.export.folder) / name
        stays = "; the one that is there is older" if path.exists() else ""
        logger.info("%s: %d rows%s", path, count, "" if count else f", so it is not written{stays}")
    has_all = rows["sft.json"] and (rows["pretrain.csv"] or not config.caption.singles)
    return 0 if has_all and not workspace.funnel["caption"]["not done"] else 1


def _remove_duplicates(
    config: CurationConfig, workspace: Workspace, clips: Mapping[str, Clip], features: list[Features]
) -> tuple[Mapping[str, Clip], list[Features], dict[str, str]]:
    """Leaves out all but one of near-identical clips. Returns the clips, their features and the families of films."""
    if not config.duplicates.remove:
        return clips, features, {}
    twins = find_twins(features, clips, workspace.folder, config.duplicates)
    results = drop_duplicates(features, clips, twins)
    workspace.count("duplicates", len(features), results)
    dropped = [entry for entry in results if isinstance(entry, Dropped)]
    lines = [{"clip": entry.id, **entry.details} for entry in dropped]
    write_lines(workspace.folder / f"duplicates{workspace.suffix}.jsonl", lines)
    left = kept(results)
    return {entry.id: clips[entry.id] for entry in left}, left, film_families(clips, twins)


def _write_page(
    config: CurationConfig,
    folder: Path,
    groups: list[Group],
    clips: Mapping[str, Clip],
    captions: list[Captions],
    verified: list[Verified],
    decisions: Mapping[str, Decision],
    cuts: list[DoubtfulCut],
) -> None:
    of_id = {entry.id: entry for entry in groups}
    cosines_of = {entry.id: entry.cosines for entry in verified}
    page = write_review(folder, of_id, clips, captions, cosines_of, decisions, config.verify.flag_below, cuts)
    num_decided = sum(entry.key in decisions for entry in captions)
    logger.info("%s shows %d captions; decisions: %d", page, len(captions), num_decided)


def _verify(
    config: CurationConfig, workspace: Workspace, settings: dict, captions: list[Captions], features: list[Features]
) -> list[Verified]:
    captioned = with_features(captions, {entry.id: entry for entry in features})
    workers = Workers(load=partial(Embedder, config.embed.viclip, config.device), batch=16, uses_gpu=True)
    process = partial(verify, folder=workspace.folder)
    return kept(workspace.run("verify", Verified, captioned, settings["verify"], process, workers=workers))


def _caption(groups: Iterable[Group], clips: Mapping[str, Clip], folder: Path, config: CaptionConfig) -> Iterator:
    with ExitStack() as stack:
        if config.backend == "stand_in":
            config = replace(config, base_url=stack.enter_context(stand_in()), model="stand-in")
        captioner = TransformersCaptioner(config) if config.backend == "transformers" else OpenAICaptioner(config)
        yield from caption(groups, clips, folder, config, captioner)


def _last_stage(config: CurationConfig) -> int:
    return max(map(STAGES.index, config.stages))


def _min_frames(config: CurationConfig) -> int:
    return config.num_frames + 2 * config.write.trim_frames
