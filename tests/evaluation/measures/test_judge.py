import json

import pytest

from mask2dit.endpoint import Endpoint, EndpointError
from mask2dit.evaluation.config import JudgeConfig
from mask2dit.evaluation.measures.judge import QUESTIONS, JudgeMeasure, parse_marks, rubric

pytest.importorskip("openai", reason="pip install mask2dit[evaluation]")
MARKS = json.dumps({key: {"worst_fault": "none", "mark": mark} for key, mark in zip(QUESTIONS, (5, 4, 2.5))})


def test_the_judge_sees_rubric_texts_and_frames_of_each_scene_in_order(chat_server, story_video):
    url, asked = chat_server([f"```json\n{MARKS}\n```"])
    scores = JudgeMeasure(JudgeConfig(base_url=url, model="m", frames_per_scene=2)).score(story_video)
    assert scores.values == {
        "judge_entity_consistency": 5,
        "judge_background_consistency": 4,
        "judge_text_adherence": 2.5,
    }
    content = asked[0]["messages"][0]["content"]
    kinds = [part["type"] for part in content]
    assert kinds == ["text", *["text", "image_url", "image_url"] * 3]
    assert content[0]["text"] == rubric() and "Scene 2: Actor1 (a red fox" in content[4]["text"]
    assert content[-1]["image_url"]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "answer, message",
    [
        ("Very nice!", "did not answer with the rubric's JSON, but with 'Very nice!'"),
        (MARKS.replace("text_adherence", "text"), "did not answer with the rubric's JSON"),
        (MARKS.replace("2.5", "7"), "mark for text_adherence has to be between 1 and 5, but is 7"),
        (MARKS.replace("2.5", '"good"'), "but is 'good'"),
    ],
)
def test_answers_outside_the_rubric_are_refused(answer, message):
    with pytest.raises(ValueError, match=message):
        parse_marks(answer)


def test_an_endpoint_that_fails_is_named(chat_server, story_video):
    url, _ = chat_server([], status=401)
    with pytest.raises(ValueError, match=f"the endpoint {url} failed.*check judge.base_url"):
        JudgeMeasure(JudgeConfig(base_url=url, model="m")).score(story_video)
    with pytest.raises(ValueError, match=r"judge\.model has to name"):
        JudgeMeasure(JudgeConfig(base_url=url))


def test_marks_are_taken_from_every_kind_of_answer_that_holds_them(chat_server, story_video, real_answers):
    for answer in real_answers["taken"].values():
        url, _ = chat_server([answer(MARKS)])
        config = JudgeConfig(base_url=url, model="m", frames_per_scene=1, max_attempts=1)
        assert JudgeMeasure(config).score(story_video).values["judge_text_adherence"] == 2.5


def test_marks_outside_the_rubric_are_asked_for_again(chat_server, story_video):
    url, asked = chat_server(["Very nice!", MARKS.replace("2.5", "7"), MARKS])
    measure = JudgeMeasure(JudgeConfig(base_url=url, model="m", frames_per_scene=1))
    assert measure.score(story_video).values["judge_text_adherence"] == 2.5
    assert "text_adherence" in asked[2]["messages"][-1]["content"][0]["text"]
    url, asked = chat_server([])
    with pytest.raises(ValueError, match="no more"):
        JudgeMeasure(JudgeConfig(base_url=url, model="m", frames_per_scene=1, max_attempts=2)).score(story_video)
    assert len(asked) == 2


def test_every_other_answer_is_a_fault_that_names_the_endpoint(chat_server, story_video, real_answers):
    for kind in ("may pass", "unusable", "refused"):
        for answer in real_answers[kind].values():
            url, _ = chat_server([answer(MARKS)] * 9)
            measure = JudgeMeasure(JudgeConfig(base_url=url, model="m", frames_per_scene=1))
            measure.endpoint = Endpoint(url, "m", "NO_SUCH_KEY", max_retries=0)
            with pytest.raises(EndpointError, match=url):
                measure.score(story_video)
