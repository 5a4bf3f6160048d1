import json

import pytest

from mask2dit.endpoint import EndpointError
from mask2dit.evaluation.write_prompts import WritePromptsConfig, write_prompts
from mask2dit.stories import read_stories

pytest.importorskip("openai", reason="pip install mask2dit[evaluation]")
FOX = {"title": "The Fox", "cast": {"Actor1": "a red fox"}, "scenes": ["Actor1 walks.", "A lake. Actor1 drinks."]}
TWO = {
    "title": "Two",
    "cast": {"Actor1": "an owl", "Actor2": "a hare"},
    "scenes": ["Actor1 sees Actor2.", "Actor2 runs."],
}


def config(url, tmp_path, **changes):
    return WritePromptsConfig(
        **{"base_url": url, "model": "m", "num_scenes": 2, "output": str(tmp_path / "stories.yaml"), **changes}
    )


def test_answers_become_stories_with_descriptions_filled_in(chat_server, tmp_path):
    url, asked = chat_server([f"Here it is:\n```json\n{json.dumps(FOX)}\n```", json.dumps(TWO)])
    write_prompts(config(url, tmp_path, num_stories=2))
    first, second = read_stories(tmp_path / "stories.yaml")
    assert first.prompts == ("Actor1 (a red fox) walks.", "A lake. Actor1 (a red fox) drinks.")
    assert second.prompts[0] == "Actor1 (an owl) sees Actor2 (a hare)."
    assert "'The Fox'" in asked[1]["messages"][0]["content"]  # so that titles do not repeat


def test_a_faulty_answer_is_asked_for_again_with_its_fault(chat_server, tmp_path):
    faulty = {**FOX, "scenes": FOX["scenes"][:1]}
    url, asked = chat_server(["no JSON", json.dumps(faulty), json.dumps(FOX)])
    write_prompts(config(url, tmp_path, num_stories=1))
    assert len(read_stories(tmp_path / "stories.yaml")) == 1
    assert "there have to be 2 scenes" in asked[2]["messages"][-1]["content"]


def test_stories_that_are_there_are_kept(chat_server, tmp_path):
    url, _ = chat_server([json.dumps(FOX)])
    write_prompts(config(url, tmp_path, num_stories=1))
    url, asked = chat_server([json.dumps(TWO)])
    write_prompts(config(url, tmp_path, num_stories=2))
    assert [story.title for story in read_stories(tmp_path / "stories.yaml")] == ["The Fox", "Two"]
    assert len(asked) == 1


@pytest.mark.parametrize(
    "answer, message",
    [
        ({**FOX, "cast": {}}, "the cast has to describe 1 characters"),
        ({**FOX, "scenes": ["Actor1 walks.", "Rain."]}, "every scene has to name an actor"),
        ({**FOX, "scenes": ["Actor1 walks.", "Actor2 runs."]}, "Actor2 is not in the cast"),
        ({**FOX, "title": ""}, "needs a title"),
    ],
)
def test_what_never_becomes_valid_ends_with_the_last_fault(chat_server, tmp_path, answer, message):
    url, asked = chat_server([json.dumps(answer)] * 2)
    with pytest.raises(ValueError, match=f"no valid story after 2 attempts: .*{message}"):
        write_prompts(config(url, tmp_path, num_stories=1, max_attempts=2))
    assert len(asked) == 2


def test_an_endpoint_has_to_be_named_and_to_answer(chat_server, tmp_path):
    with pytest.raises(ValueError, match="base_url has to be set"):
        WritePromptsConfig()
    url, _ = chat_server([], status=401)
    with pytest.raises(ValueError, match=f"the endpoint {url} failed"):
        write_prompts(config(url, tmp_path))


def test_stories_are_taken_from_every_kind_of_answer_that_holds_them(chat_server, tmp_path, real_answers):
    for answer in real_answers["taken"].values():
        (tmp_path / "stories.yaml").unlink(missing_ok=True)
        url, _ = chat_server([answer(json.dumps(FOX))])
        write_prompts(config(url, tmp_path, num_stories=1, max_attempts=1))
        assert len(read_stories(tmp_path / "stories.yaml")) == 1


def test_every_other_answer_ends_in_an_error_that_names_the_endpoint_and_keeps_stories(
    chat_server, tmp_path, real_answers, monkeypatch
):
    monkeypatch.setattr("mask2dit.endpoint.MAX_PAUSE", 0)
    for kind in ("may pass", "unusable", "refused"):
        for answer in real_answers[kind].values():
            (tmp_path / "stories.yaml").unlink(missing_ok=True)
            url, _ = chat_server([json.dumps(FOX), *[answer("")] * 9])
            with pytest.raises(EndpointError, match=url):
                write_prompts(config(url, tmp_path, num_stories=2))
            assert len(read_stories(tmp_path / "stories.yaml")) == 1


def test_a_name_that_is_no_actor_is_a_fault_of_the_answer(chat_server, tmp_path):
    strange = {**FOX, "cast": {"Fox (red": "a fox"}}
    url, _ = chat_server([json.dumps(strange), json.dumps(FOX)])
    write_prompts(config(url, tmp_path, num_stories=1))
    assert len(read_stories(tmp_path / "stories.yaml")) == 1
