"""Forms in which others write stories, as records of this project's form.

An importer takes what a file holds and returns the record of a story, which is checked like any other. Values of a wrong type
are passed on, so that the check names them.
"""

import re
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def import_story(content: Any, title: str) -> Record | None:
    """Returns the record of a story in another form; None if the content is in none of them.

    Args:
        content: the value that a JSON or YAML file holds.
        title: title of the story if the form has none.
    """
    for recognises, importer in IMPORTERS:
        if recognises(content):
            return importer(content, title)
    return None


def from_storymem(content: dict, title: str) -> Record:
    """Imports a script of StoryMem: `scenes`, each with `video_prompts` and `cut`, one mark per prompt.

    A prompt whose cut is False continues the shot before it. A scene here is one shot, so it is added to that shot's prompt.
    The script's `story_overview` is not a prompt, and is left out.
    """
    shots: list[Any] = []
    for scene in content["scenes"]:
        prompts = scene.get("video_prompts") if isinstance(scene, dict) else None
        if not isinstance(prompts, list):
            shots.append({"prompt": prompts})
            continue
        cuts = scene.get("cut", True)
        cuts = cuts if isinstance(cuts, list) else [cuts] * len(prompts)
        for index, prompt in enumerate(prompts):
            continues = index < len(cuts) and str(cuts[index]).strip().lower() == "false"
            if continues and shots and isinstance(shots[-1], str) and isinstance(prompt, str):
                shots[-1] = f"{shots[-1]} {prompt}"
            else:
                shots.append(prompt if isinstance(prompt, str) else {"prompt": prompt})
    return {"title": title, "scenes": shots}


def from_local_prompts(content: dict, title: str) -> Record:
    """Imports a global prompt with local prompts and their lengths in frames.

    The keys are `global_prompt`, `local_prompts` (a list, or a text with | or line breaks between prompts) and optionally
    `segment_lengths` (a list, or numbers with commas) and `frame_rate`, with which lengths become seconds. The global prompt
    becomes the style.
    """
    prompts, lengths = content.get("local_prompts"), content.get("segment_lengths")
    if isinstance(prompts, str):
        prompts = [prompt.strip() for prompt in re.split(r"[|\n]", prompts) if prompt.strip()]
    if isinstance(lengths, str):
        lengths = [_number(length) for length in lengths.split(",") if length.strip()]
    record: Record = {"title": title, "style": content.get("global_prompt"), "scenes": prompts}
    if isinstance(prompts, list) and isinstance(lengths, list) and lengths:
        rate = content.get("frame_rate")
        record["scenes"] = [
            {"prompt": prompt, **_length(lengths[i] if i < len(lengths) else None, rate)}
            for i, prompt in enumerate(prompts)
        ]
    return record


def from_text(text: str, title: str) -> tuple[Record, list[int]]:
    """Imports a plain text: each paragraph is a scene, and blank lines separate paragraphs.

    Returns:
        The record, and the first line of each scene, counted from 1.
    """
    scenes: list[str] = []
    starts: list[int] = []
    is_open = False
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            is_open = False
        elif is_open:
            scenes[-1] += f" {line.strip()}"
        else:
            scenes.append(line.strip())
            starts.append(number)
            is_open = True
    return {"title": title, "scenes": scenes}, starts


def from_manifest_row(row: dict, title: str) -> Record:
    """Imports a row of a fine-tuning manifest such as `sft.json`: captions are prompts, and the prefix is the title."""
    values = row["values"] if isinstance(row["values"], list) else []
    scenes = [{"prompt": value.get("caption")} if isinstance(value, dict) else value for value in values]
    return {"title": row.get("prefix") or title, "scenes": scenes}


def _is_storymem(content: Any) -> bool:
    scenes = content.get("scenes") if isinstance(content, dict) else None
    return isinstance(scenes, list) and any(isinstance(scene, dict) and "video_prompts" in scene for scene in scenes)


IMPORTERS: list[tuple[Callable[[Any], bool], Callable[[Any, str], Record]]] = [
    (_is_storymem, from_storymem),
    (lambda content: isinstance(content, dict) and "local_prompts" in content, from_local_prompts),
    (lambda content: isinstance(content, dict) and "values" in content, from_manifest_row),
]
"""Each form: how it is recognised, and its importer."""


def _length(frames: Any, rate: Any) -> Record:
    """The length of a scene: in seconds if the frame rate is known, else in frames."""
    if frames is None:
        return {}
    if type(rate) in (int, float) and rate > 0 and type(frames) in (int, float):
        return {"seconds": round(frames / rate, 4)}
    return {"frames": int(frames) if isinstance(frames, float) and frames.is_integer() else frames}


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text.strip()
