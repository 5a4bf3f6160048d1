"""Reports every fault of a story file, with its line, before anything is generated."""

from collections.abc import Iterator
from pathlib import Path

from mask2dit.config import missing_model
from mask2dit.inference.config import CheckStoryConfig
from mask2dit.inference.from_story import describe_rounding
from mask2dit.inference.sources import open_context_videos
from mask2dit.models.hub import local_model
from mask2dit.models.loading import load_tokenizer
from mask2dit.pipelines.mask2dit import Mask2DiTPipeline
from mask2dit.pipelines.story import nearest_num_frames
from mask2dit.stories import Fault, Scene, StoryError
from mask2dit.stories.files import StoryFile, load_story_file
from mask2dit.stories.story import Place, complete_prompt, describe_place, find_faults
from mask2dit.storyworld.prompts import MARKER, check_prompts, check_window
from mask2dit.video.reading import choose_scene

TRAINED_SCENES = 3  # scenes of a sample in the published training


def report_faults(config: CheckStoryConfig) -> int:
    """Prints every fault of a story file. Returns the exit status: 1 if the file cannot be used, else 0."""
    faults, summary = check_story(config)
    for fault in faults:
        level = "warning" if fault.is_warning else "error"
        print(f"{config.story}:{'' if fault.line is None else f'{fault.line}:'} {level}: {fault}")
    warnings = sum(fault.is_warning for fault in faults)
    print(f"{config.story}: {summary}errors: {len(faults) - warnings}, warnings: {warnings}")
    return 1 if len(faults) > warnings else 0


def check_story(config: CheckStoryConfig) -> tuple[list[Fault], str]:
    """Finds every fault of a story file: of its form, its given videos, and what the model does not carry.

    Returns:
        The faults in the order of the file, and what the file holds, such as "1 story, 3 scenes; ".

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file, or no model with the name that `model` has.
    """
    if not config.story:
        raise ValueError("name the story file to check, as in story=my-story.yaml")
    try:
        file = load_story_file(config.story)
    except StoryError as error:
        return list(error.faults), ""
    faults = file.find_faults()
    model = _load_model(config)
    if isinstance(model, Fault):
        faults.append(model)
        model = None
    num_scenes = 0
    for number, (prefix, record) in enumerate(file.records, start=1):
        if not isinstance(record, dict):
            continue
        scenes = record.get("scenes")
        num_scenes += len(scenes) if isinstance(scenes, list) else 0
        where = f"story {number}, " if len(file.records) > 1 or prefix else ""
        for place, message, is_warning in _scene_problems(config, file, record, model):
            line = file.line(*prefix, *place)
            at = where + describe_place(place)
            faults.append(Fault(message=message, line=line, where=at, is_warning=is_warning))
    faults.sort(key=lambda fault: fault.line or 0)
    stories = "1 story" if len(file.records) == 1 else f"{len(file.records)} stories"
    return faults, f"{stories}, {num_scenes} scene{'s' * (num_scenes != 1)}; "


def load_text_model(folder: str) -> Mask2DiTPipeline:
    """Builds a pipeline with the tokenizer and the configurations of a model, without weights."""
    pipe = Mask2DiTPipeline.skeleton(folder, configs_only=True)
    pipe.register_modules(tokenizer=load_tokenizer(Path(folder) / "tokenizer"))
    return pipe


def load_named_model(name: str) -> Mask2DiTPipeline:
    """Builds a pipeline as `load_text_model` from a folder or a name on the Hugging Face Hub.

    Raises:
        FileNotFoundError: if there is no such model.
    """
    folder = local_model(CheckStoryConfig(model=name), configs_only=True).model
    if not (Path(folder) / "transformer").is_dir():
        raise FileNotFoundError(missing_model(folder))
    return load_text_model(folder)


def _load_model(config: CheckStoryConfig) -> tuple[Mask2DiTPipeline, str] | Fault:
    """Returns the model without weights and its folder; a warning if the default model is not there."""
    local = local_model(config, configs_only=True)
    if (Path(local.model) / "transformer").is_dir():
        return load_text_model(local.model), local.model
    message = missing_model(local.model)
    if config.model != CheckStoryConfig.model:
        raise FileNotFoundError(message)
    return Fault(message=f"prompts and lengths are not checked against a model: {message}", is_warning=True)


def _scene_problems(
    config: CheckStoryConfig, file: StoryFile, record: dict, model: tuple[Mask2DiTPipeline, str] | None
) -> Iterator[tuple[Place, str, bool]]:
    """Finds what only the model and the videos show, in the scenes that have no other fault.

    Yields:
        Where it is, what it is, and True for a warning.
    """
    faults = list(find_faults(record))
    faulty = {place[:2] for place, _ in faults}
    if {("scenes",), ("cast",), ("style",)} & faulty:
        return
    cast = {str(actor): text for actor, text in (record.get("cast") or {}).items() if isinstance(text, str)}
    scenes = [_scene(given) for i, given in enumerate(record.get("scenes") or ()) if ("scenes", i) not in faulty]
    places = [("scenes", i) for i in range(len(record.get("scenes") or ())) if ("scenes", i) not in faulty]
    for here, scene in zip(places, scenes):
        if scene.video is not None:
            yield from ((here, message, False) for message in _video_faults(config, file, scene, model))
        if model is not None:
            prompt = complete_prompt(scene.prompt, cast, record.get("style") or "")
            yield from ((here, *problem) for problem in _model_problems(config, scene, prompt, *model))
    if scenes and all(scene.video is not None for scene in scenes):
        yield ("scenes",), "every scene is given, so nothing is left to generate", False
    if model is not None and not faults:
        try:
            check_window(model[1], len(scenes), config.window)
        except ValueError as error:
            yield ("scenes",), str(error), False
        at_once = min(config.window or len(scenes), len(scenes))
        if at_once > TRAINED_SCENES and not (Path(model[1]) / MARKER).is_file():
            message = f"{at_once} scenes are generated together, but the method was trained with {TRAINED_SCENES}"
            yield ("scenes",), f"{message}: set window={TRAINED_SCENES}", True


def _scene(record: str | dict) -> Scene:
    record = {"prompt": record} if isinstance(record, str) else record
    return Scene(**{"seconds" if key == "duration" else key: value for key, value in record.items()})


def _model_problems(
    config: CheckStoryConfig, scene: Scene, prompt: str, pipe: Mask2DiTPipeline, folder: str
) -> Iterator[tuple[str, bool]]:
    """Finds what the model does not carry: words, tokens or frames. Yields the message, and True for a warning."""
    try:
        check_prompts(folder, [prompt], 1)
    except ValueError as error:
        yield str(error), False
    if cut := pipe.describe_cut(prompt):
        yield cut, True
    wanted = scene.length(config.fps)
    if wanted is None:
        return
    num_frames = nearest_num_frames(pipe, wanted)
    if num_frames != wanted:
        yield describe_rounding(scene, num_frames, config.fps), True
    height, width, trained = pipe.fill_size(None, None, None)
    try:
        pipe.video_shape(height, width, num_frames, 1)
    except ValueError as error:
        yield str(error), False
    if num_frames > trained:
        yield f"{num_frames} frames are more than the {trained} per scene that the model was trained with", True


def _video_faults(
    config: CheckStoryConfig, file: StoryFile, scene: Scene, model: tuple[Mask2DiTPipeline, str] | None
) -> Iterator[str]:
    """Finds why the video of a given scene cannot be used."""
    path = str(file.path.parent / scene.video)
    try:
        sources = open_context_videos([path])
        if len(sources) > 1:
            yield f"{path} holds {len(sources)} scenes, as its record says: name a file with one scene"
            return
        num_frames = config.num_frames
        if model is not None:
            wanted = scene.length(config.fps)
            default = model[0].fill_size(None, None, config.num_frames)[2]
            num_frames = default if wanted is None else nearest_num_frames(model[0], wanted)
        if num_frames is not None:
            [(_, _, frames)] = sources
            choose_scene(frames, path, num_frames, start="center", generator=None)
    except (OSError, ValueError) as error:
        yield str(error)
