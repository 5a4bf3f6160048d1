import json
import socket

import pytest

from mask2dit import cli
from mask2dit.endpoint import EndpointError
from mask2dit.inference.write import WriteConfig, write_stories
from mask2dit.stories import read_stories, read_story

pytest.importorskip("openai", reason="pip install mask2dit[evaluation]")
FOX = {"title": "The Fox", "cast": {"Actor1": "a red fox"}, "scenes": ["Actor1 walks.", "A lake. Actor1 drinks."]}
TWO = {
    "title": "Two",
    "cast": {"Actor1": "an owl", "Actor2": "a hare"},
    "scenes": ["Actor1 sees Actor2.", "Actor2 runs."],
}


def config(url, tmp_path, **changes):
    return WriteConfig(
        **{"base_url": url, "model": "m", "scenes": 2, "output": str(tmp_path / "stories.yaml"), **changes}
    )


def test_answers_become_stories_with_descriptions_filled_in(chat_server, tmp_path):
    url, asked = chat_server([f"Here it is:\n```json\n{json.dumps(FOX)}\n```", json.dumps(TWO)])
    write_stories(config(url, tmp_path, num_stories=2))
    first, second = read_stories(tmp_path / "stories.yaml")
    assert first.prompts == ("Actor1 (a red fox) walks.", "A lake. Actor1 (a red fox) drinks.")
    assert second.prompts[0] == "Actor1 (an owl) sees Actor2 (a hare)."
    assert "'The Fox'" in asked[1]["messages"][0]["content"]  # so that titles do not repeat


def test_a_faulty_answer_is_asked_for_again_with_its_fault(chat_server, tmp_path):
    faulty = {**FOX, "scenes": FOX["scenes"][:1]}
    url, asked = chat_server(["no JSON", json.dumps(faulty), json.dumps(FOX)])
    write_stories(config(url, tmp_path, num_stories=1))
    assert len(read_stories(tmp_path / "stories.yaml")) == 1
    assert "there have to be 2 scenes" in asked[2]["messages"][-1]["content"]


def test_stories_that_are_there_are_kept(chat_server, tmp_path):
    url, _ = chat_server([json.dumps(FOX)])
    write_stories(config(url, tmp_path, num_stories=1))
    url, asked = chat_server([json.dumps(TWO)])
    write_stories(config(url, tmp_path, num_stories=2))
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
        write_stories(config(url, tmp_path, num_stories=1, max_attempts=2))
    assert len(asked) == 2


def test_an_endpoint_has_to_be_named_and_to_answer(chat_server, tmp_path):
    with pytest.raises(ValueError, match=r"temperature=-1\.0 has to be at least 0"):
        config("http://127.0.0.1:9/v1", tmp_path, temperature=-1.0)
    with pytest.raises(ValueError, match="base_url has to be set"):
        WriteConfig()
    url, _ = chat_server([], status=401)
    with pytest.raises(ValueError, match=f"the endpoint {url} failed"):
        write_stories(config(url, tmp_path))


def test_stories_are_taken_from_every_kind_of_answer_that_holds_them(chat_server, tmp_path, real_answers):
    for answer in real_answers["taken"].values():
        (tmp_path / "stories.yaml").unlink(missing_ok=True)
        url, _ = chat_server([answer(json.dumps(FOX))])
        write_stories(config(url, tmp_path, num_stories=1, max_attempts=1))
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
                write_stories(config(url, tmp_path, num_stories=2))
            assert len(read_stories(tmp_path / "stories.yaml")) == 1


def test_a_name_that_is_no_actor_is_a_fault_of_the_answer(chat_server, tmp_path):
    strange = {**FOX, "cast": {"Fox (red": "a fox"}}
    url, _ = chat_server([json.dumps(strange), json.dumps(FOX)])
    write_stories(config(url, tmp_path, num_stories=1))
    assert len(read_stories(tmp_path / "stories.yaml")) == 1


def write(url, *arguments):
    return cli.main(["write", *arguments, f"base_url={url}", "model=m", "max_retries=0"])


def test_an_idea_becomes_a_story_file(chat_server, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    url, asked = chat_server([json.dumps(FOX)])
    assert write(url, "a fox with {braces} in snow", "out.yaml", "scenes=2") == 0
    story = read_story("out.yaml")
    assert (story.title, story.cast) == ("The Fox", FOX["cast"])
    assert [scene.prompt for scene in story.scenes] == FOX["scenes"]
    request = asked[0]["messages"][0]["content"]
    assert "a fox with {braces} in snow" in request and "2 scenes" in request
    assert write(url, "another", "out.yaml", "scenes=2") == 1  # before the endpoint is asked
    assert "out.yaml is there already" in capsys.readouterr().err and len(asked) == 1
    assert write(url, "another", "out.txt") == 1
    assert "has to end in .yaml" in capsys.readouterr().err


def test_a_line_becomes_a_specific_prompt(chat_server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    scene = {"title": "Snow", "cast": {}, "scenes": ["Snow falls on a lake."]}
    url, asked = chat_server([json.dumps(scene)])
    assert write(url, "snow on a lake", "expand=true", "scenes=5") == 0
    assert read_story("story.yaml").prompts == ("Snow falls on a lake.",)
    assert "Expand this line" in asked[0]["messages"][0]["content"]


LONG = "walks over the snow and into the forest with a lantern " * 20
FRENCH = "marche lentement dans la forêt enneigée vers une cabane où brûle une petite lampe jaune pendant que la nuit tombe."
FAULTY = {
    "too long": ({**FOX, "scenes": [f"Actor1 {LONG}.", "Actor1 sleeps."]}, "scene 1 is too long"),
    "too few scenes": ({**FOX, "scenes": FOX["scenes"][:1]}, "there have to be 2 scenes"),
    "an undeclared actor": ({**FOX, "scenes": ["Actor1 sees Actor2.", "Actor1 runs."]}, "Actor2 is not in the cast"),
    "a cast of nobody": ({**FOX, "cast": {}}, "1 to 3 characters"),
    "another script": ({**FOX, "scenes": ["Actor1 走在雪中。", "Actor1 在湖边喝水。"]}, "in English"),
    "another language": ({**FOX, "scenes": [f"Actor1 {FRENCH}", f"Actor1 {FRENCH}"]}, "in English"),
    "a refusal": ("I am sorry, but I cannot help with that.", "no JSON object"),
    "nothing": ("", "no JSON object"),
}


@pytest.mark.parametrize("answer, fault", FAULTY.values(), ids=FAULTY)
def test_a_faulty_story_is_asked_for_again_with_its_fault_and_a_lasting_fault_is_told(
    chat_server, tmp_path, monkeypatch, capsys, answer, fault
):
    monkeypatch.chdir(tmp_path)
    text = answer if isinstance(answer, str) else json.dumps(answer)
    url, asked = chat_server([text, json.dumps(FOX)])
    assert write(url, "a fox", "out.yaml", "scenes=2") == 0
    assert fault in asked[1]["messages"][-1]["content"]
    assert read_story("out.yaml").title == "The Fox"
    url, _ = chat_server([text] * 2)
    assert write(url, "a fox", "other.yaml", "scenes=2", "max_attempts=2") == 1
    error = capsys.readouterr().err
    assert "no valid story after 2 attempts" in error and fault in error
    assert not (tmp_path / "other.yaml").exists()


def test_the_text_window_of_a_model_is_counted_in_its_tokens(chat_server, tmp_path, monkeypatch, small_model):
    monkeypatch.chdir(tmp_path)
    long = {**FOX, "scenes": [f"Actor1 {' '.join(LONG.split()[:140])}.", "Actor1 sleeps."]}
    url, asked = chat_server([json.dumps(long), json.dumps(FOX)])
    assert write(url, "a fox", "scenes=2", f"text_model={small_model}") == 0
    assert "tokens is longer than the text window" in asked[1]["messages"][-1]["content"]


def test_an_endpoint_that_hangs_ends_in_one_sentence(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:  # takes the connection and never answers
        url = f"http://127.0.0.1:{server.getsockname()[1]}/v1"
        assert write(url, "a fox", "timeout=0.3") == 1
    error = capsys.readouterr().err
    assert url in error and "timed out" in error and error.count("\n") == 1
