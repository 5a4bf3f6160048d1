"""A vision-language model as a judge, with the rubric that docs/evaluation.md also prints."""

import numpy as np
from PIL import Image

from mask2dit.endpoint import Endpoint, ask_until_valid, find_json, image_part
from mask2dit.evaluation.config import JudgeConfig
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.video.frames import middle_frames

QUESTIONS = {
    "entity_consistency": "Characters and objects that appear in several scenes look the same in all of them: face, body, "
    "clothing, colours, what they hold.",
    "background_consistency": "Places, lighting and style fit together from scene to scene, except where the texts ask for a "
    "change.",
    "text_adherence": "Each scene shows what its text says: who is there, what they do and where.",
}
RUBRIC = """You see frames of a video of several scenes in order, with the text that each scene was to show.
Judge each of these on a scale of 1 to 5:
{questions}
5: no fault found. 4: faults only on close inspection. 3: faults that are easily seen, but most is right. 2: more is wrong
than right. 1: nothing is right. Judge only what is visible, and name the worst fault for each.
Answer with JSON alone: {{{answer}}}"""
LONGEST_SIDE = 512


class JudgeMeasure(Measure):
    """Marks from 1 to 5 for the questions of the rubric."""

    name = "judge"
    is_of_one_process = True
    columns = tuple(
        Column(f"judge_{key}", f"Judge: {key.replace('_', ' ')} (1-5)", is_percentage=False) for key in QUESTIONS
    )

    def __init__(self, config: JudgeConfig):
        if not config.model:
            raise ValueError("judge.model has to name the model that judges")
        self.config = config
        self.endpoint = Endpoint(config.base_url, config.model, config.api_key_env, section="judge.")
        self.identity = f"{config.model} {config.frames_per_scene} {rubric()}"

    def score(self, video: StoryVideo) -> Scores:
        content: list[dict] = [{"type": "text", "text": rubric()}]
        for number, (scene, prompt) in enumerate(zip(video.scenes, video.story.prompts), start=1):
            content.append({"type": "text", "text": f"Scene {number}: {prompt}"})
            frames = video.frames(middle_frames(*scene, self.config.frames_per_scene)).numpy()
            content += [image_part(_scaled(frame)) for frame in frames]
        marks, replies = ask_until_valid(
            lambda messages: self.endpoint.ask(messages, temperature=0),
            [{"role": "user", "content": content}],
            parse_marks,
            self.config.max_attempts,
        )
        return Scores({f"judge_{key}": mark for key, mark in marks.items()}, {"answer": replies[-1].text})


def rubric() -> str:
    """The text of the rubric for the judge."""
    questions = "\n".join(f"- {key}: {text}" for key, text in QUESTIONS.items())
    answer = ", ".join(f'"{key}": {{"worst_fault": "...", "mark": 1-5}}' for key in QUESTIONS)
    return RUBRIC.format(questions=questions, answer=answer)


def parse_marks(answer: str) -> dict[str, float]:
    """The marks in an answer, found by `find_json`.

    Raises:
        ValueError: if a mark is missing or is not a number from 1 to 5.
    """
    try:
        return find_json(answer, _marks_from)
    except ValueError as error:
        raise ValueError(
            f"the judge did not answer with the rubric's JSON, but with {answer[:200]!r}: {error}"
        ) from error


def _marks_from(record: dict) -> dict[str, float]:
    marks = {}
    for key in QUESTIONS:
        judged = record.get(key)
        mark = judged.get("mark") if isinstance(judged, dict) else None
        if isinstance(mark, bool) or not isinstance(mark, int | float) or not 1 <= mark <= 5:
            raise ValueError(f"the mark for {key} has to be between 1 and 5, but is {mark!r}")
        marks[key] = float(mark)
    return marks


def _scaled(frame: np.ndarray) -> Image.Image:
    image = Image.fromarray(frame)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    return image
