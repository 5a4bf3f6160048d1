import json

import numpy as np
import pytest
from PIL import Image

from mask2dit.endpoint import (
    Endpoint,
    EndpointError,
    InvalidAnswersError,
    RefusedRequestError,
    Reply,
    UnusableEndpointError,
    ask_until_valid,
    find_json,
    image_part,
)

pytest.importorskip("openai", reason="pip install mask2dit[evaluation]")
GOOD = '{"scenes": ["a {brace}", "b"]}'
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def no_pause_between_tries(monkeypatch):
    monkeypatch.setattr("mask2dit.endpoint.MAX_PAUSE", 0)


@pytest.fixture
def ask(chat_server):
    """Sends a request to an endpoint that answers so."""

    def run(*answers, max_retries=0):
        url, asked = chat_server(list(answers))
        try:
            return Endpoint(url, "m", "NO_SUCH_KEY", max_retries=max_retries).ask(HELLO), len(asked)
        except EndpointError as error:
            assert url in str(error) and "\n" not in str(error)
            return error, len(asked)

    return run


def scenes_of(record):
    if not isinstance(record.get("scenes"), list):
        raise ValueError("there have to be scenes")
    return record["scenes"]


def test_an_answer_comes_with_its_tokens_and_pictures_go_as_jpeg(chat_server):
    url, asked = chat_server(["two words"])
    content = [image_part(Image.fromarray(np.zeros((8, 8, 3), np.uint8)))]
    reply = Endpoint(url, "m", "NO_SUCH_KEY").ask([{"role": "user", "content": content}], temperature=0.5)
    assert reply == Reply("two words", 10, 5)
    assert (asked[0]["model"], asked[0]["temperature"]) == ("m", 0.5)
    assert asked[0]["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize(
    "content, text",
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        ([{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}], "a"),
        (["a", {"type": "image_url", "image_url": {}}], "a"),
        ({"type": "text", "text": "a"}, "a"),
        ([], ""),
        (None, ""),
        ("half a pair: \ud83d", "half a pair: ?"),
    ],
)
def test_content_may_be_a_text_or_parts_and_is_always_a_text_that_a_file_holds(ask, make_completion, content, text):
    reply, _ = ask((200, make_completion(content), {}))
    assert reply.text == text


@pytest.mark.parametrize("usage", [None, {}, {"prompt_tokens": None, "completion_tokens": "many"}, "unknown"])
def test_tokens_that_are_not_counted_are_none(ask, make_completion, usage):
    reply, _ = ask((200, make_completion("a", usage=usage), {}))
    assert reply == Reply("a", 0, 0)


TRANSIENT = {
    "error in 200": (200, {"error": {"message": "rate limited upstream", "code": 429}}, {}),
    "error as a text": (200, {"error": "overloaded"}, {}),
    "error in a choice": (200, {"choices": [{"error": {"message": "upstream", "code": 502}}]}, {}),
    "empty body": (200, "", {}),
    "body cut short": (200, '{"choices": [{"mess', {}),
    "no choices": (200, {"choices": []}, {}),
    "null choices": (200, {"choices": None}, {}),
    "rate limit": (429, {"error": {"message": "slow down"}}, {"Retry-After": "0"}),
    "server error": (500, {"error": {"message": "oops"}}, {}),
    "gateway page": (502, "<html>bad gateway</html>", {"Content-Type": "text/html"}),
}
UNUSABLE = {
    "html": (200, "<!doctype html><html>Welcome</html>", {"Content-Type": "text/html"}),
    "html called json": (200, "<!doctype html><html>Welcome</html>", {}),
    "plain text": (200, "It works!", {"Content-Type": "text/plain"}),
    "list": (200, [], {}),
    "null": (200, None, {}),
    "another protocol": (200, {"detail": "hello"}, {}),
    "key": (401, {"error": {"message": "wrong key"}}, {}),
    "key in 200": (200, {"error": {"message": "wrong key", "code": "401"}}, {}),
    "no such model": (404, {"error": {"message": "no such model"}}, {}),
    "no credit": (402, {"error": {"message": "no credit"}}, {}),
}
FILTERED = {
    "filter": (400, {"error": {"message": "no", "code": "content_filter"}}, {}),
    "policy": (400, {"error": {"message": "the content management policy forbids it"}}, {}),
    "moderation": (403, {"error": {"message": "Input flagged by moderation"}}, {}),
    "filter in 200": (200, {"error": {"message": "no", "code": 400, "type": "content_policy_violation"}}, {}),
    "answer withheld": (200, {"choices": [{"finish_reason": "content_filter", "message": {"content": ""}}]}, {}),
}


@pytest.mark.parametrize("answer", TRANSIENT.values(), ids=TRANSIENT)
def test_a_failure_that_may_pass_is_met_by_asking_again(ask, make_completion, answer):
    assert ask(answer, (200, make_completion("a"), {}), max_retries=1) == (Reply("a", 10, 5), 2)
    error, _ = ask(answer)
    assert type(error) is EndpointError


@pytest.mark.parametrize("answer", UNUSABLE.values(), ids=UNUSABLE)
def test_an_address_that_can_never_answer_is_told_at_once_with_what_to_check(ask, answer):
    error, requests = ask(answer, max_retries=3)
    assert isinstance(error, UnusableEndpointError) and isinstance(error, ValueError) and requests == 1
    assert "check base_url, model and the key in NO_SUCH_KEY" in str(error)


@pytest.mark.parametrize("answer", FILTERED.values(), ids=FILTERED)
def test_a_content_filter_refuses_one_request(ask, answer):
    error, requests = ask(answer, max_retries=3)
    assert isinstance(error, RefusedRequestError) and error.is_filtered and requests == 1


@pytest.mark.parametrize("status", [400, 413, 422])
def test_other_refusals_may_be_about_the_options_of_the_request(ask, status):
    error, _ = ask((status, {"error": {"message": "response_format is not supported"}}, {}))
    assert isinstance(error, RefusedRequestError) and not error.is_filtered and error.status == status


def test_a_page_of_an_error_is_shortened(ask):
    error, _ = ask((500, "<p>" + "x" * 100_000, {"Content-Type": "text/html"}))
    assert len(str(error)) < 500


def test_a_failure_tells_its_status_and_not_the_key(monkeypatch, chat_server):
    monkeypatch.setenv("ENDPOINT_TEST_KEY", "sk-secret\n")
    url, _ = chat_server([(401, {"error": {"message": "wrong key sk-secret"}}, {})])
    with pytest.raises(EndpointError, match="wrong key …") as error:
        Endpoint(url, "m", "ENDPOINT_TEST_KEY").ask(HELLO)
    assert error.value.status == 401 and error.value.__cause__ is None


def test_an_endpoint_that_is_not_there_has_no_status():
    with pytest.raises(EndpointError, match=r"127\.0\.0\.1:9.*Connection error.*refused") as error:
        Endpoint("http://127.0.0.1:9/v1", "m", "NO_SUCH_KEY", max_retries=0).ask(HELLO)
    assert error.value.status is None and type(error.value) is EndpointError


@pytest.mark.parametrize("url", ["localhost:8000", "http://[::1", "http://host:port/v1", "", "ftp://host"])
def test_an_address_that_cannot_be_asked_is_refused(url):
    with pytest.raises(ValueError, match=r"judge\.base_url must begin with http"):
        Endpoint(url, "m", "NO_SUCH_KEY", section="judge.")


def test_a_key_that_cannot_be_sent_is_refused_without_showing_it(monkeypatch):
    monkeypatch.setenv("ENDPOINT_TEST_KEY", "sk-sécret")
    with pytest.raises(ValueError, match="ENDPOINT_TEST_KEY") as error:
        Endpoint("http://host", "m", "ENDPOINT_TEST_KEY")
    assert "cret" not in str(error.value)


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Here it is:\n{GOOD}\nAnything else?",
        f"<think>I answer {{'scenes': [...]}} as asked.</think>\n{GOOD}",
        f'<think>A draft: {{"scenes": ["draft"]}}</think>{GOOD}',
        f'As asked by {{"type": "object"}}, a draft {{"scenes": ["draft"]}}, and now the answer: {GOOD}',
        f"{GOOD}\nI kept the form {{name (appearance)}}.",
        f'{GOOD}\nIts form is {{"type": "object"}}.',
        f'{{"answer": {GOOD}}}',
        f"[{GOOD}]",
        f"<think>{GOOD}</think>",  # all of it taken for reasoning
        GOOD.replace("a {", "a\n{"),
    ],
)
def test_json_is_found_wherever_it_stands(text):
    assert [" ".join(scene.split()) for scene in find_json(text, scenes_of)] == ["a {brace}", "b"]


@pytest.mark.parametrize(
    "text, fault",
    [
        ("", "holds no JSON object"),
        ("[1, 2]", "holds no JSON object"),
        (GOOD[:-3], "is not valid JSON"),
        ('{"title": "a long enough title"} and {}', "there have to be scenes"),
        ('{"title": {"a": {}}, "cut": "sho', "is not valid JSON"),
        (f'<think>{GOOD}</think>{{"scenes": 3}}', "there have to be scenes"),
        ('{"scenes": ["\\ud83d"]}', "surrogate"),
        ('{"a": ' * 5000, "is not valid JSON"),
        ('{"scenes": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_an_answer_without_a_valid_object_is_told_what_is_wrong(text, fault):
    with pytest.raises(ValueError, match=fault):
        find_json(text, scenes_of)


@pytest.mark.parametrize("as_parts", [False, True])
def test_what_is_wrong_is_fed_back_in_the_form_of_the_request(as_parts):
    asked, answers = [], ["", '{"scenes": 3}', GOOD]

    def ask(messages):
        asked.append(messages)
        return Reply(answers.pop(0), 1, 2)

    request = [{"role": "user", "content": [{"type": "text", "text": "go"}] if as_parts else "go"}]
    found, replies = ask_until_valid(ask, request, lambda text: find_json(text, scenes_of), 3)
    assert found == ["a {brace}", "b"] and len(replies) == 3 and len(request) == 1
    contents = [message["content"][0]["text"] if as_parts else message["content"] for message in asked[2]]
    assert contents[1] and "no JSON object" in contents[2] and "there have to be scenes" in contents[4]
    assert [message["role"] for message in asked[2]] == ["user", "assistant", "user", "assistant", "user"]


def test_answers_that_stay_faulty_end_with_every_fault():
    with pytest.raises(InvalidAnswersError, match="there have to be scenes") as error:
        ask_until_valid(lambda _: Reply(json.dumps({}), 1, 2), HELLO, lambda text: find_json(text, scenes_of), 2)
    assert len(error.value.faults) == len(error.value.replies) == 2
