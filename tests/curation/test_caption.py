import itertools
import json
import logging
import threading
import time
from dataclasses import replace
from functools import partial

import pytest

from mask2dit.curation.answers import PROMPT_VERSION
from mask2dit.curation.caption import caption, caption_settings, has_attempts_left
from mask2dit.curation.captioners import OpenAICaptioner, RateLimit
from mask2dit.curation.config import CaptionConfig
from mask2dit.curation.stand_in import good_answer, stand_in
from mask2dit.curation.store import Dropped
from mask2dit.endpoint import EndpointError


@pytest.fixture
def ask(story, monkeypatch):
    """Captions the story, once for each of some groups, at an endpoint that answers by a function."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-the-test")
    group, clips, folder = story

    def run(answer, count=1, **changes):
        groups = [replace(group, id=f"{group.id} {i}", key=f"{i}") for i in range(count)]
        with stand_in(answer) as url:
            settings = {"base_url": url, "model": "m", "max_retries": 0, "timeout": 10.0, "concurrency": 1}
            config = CaptionConfig(**{**settings, **changes})
            return [result for _, [result] in caption(groups, clips, folder, config, OpenAICaptioner(config))]

    return run


STORY = {"messages": [{"content": [{"type": "text", "text": f"Scene {i}:"} for i in (1, 2, 3)]}]}


@pytest.fixture
def collect(story):
    """Captions copies of the story at an endpoint that answers by a function of the request and its number. Returns the
    results and the error that ended the run, if any."""
    group, clips, folder = story
    lock, count_asked = threading.Lock(), itertools.count(1)

    def numbered(answer, request):
        with lock:
            turn = next(count_asked)
        return answer(request, turn)

    def run(answer, count=1, **changes):
        groups = [replace(group, id=f"{group.id} {i}", key=f"{i}") for i in range(count)]
        found, error = [], None
        with stand_in(partial(numbered, answer)) as url:
            config = CaptionConfig(**{"base_url": url, "model": "m", "max_retries": 0, "timeout": 10.0, **changes})
            try:
                for _, [result] in caption(groups, clips, folder, config, OpenAICaptioner(config)):
                    found.append(result)
            except (ValueError, OSError) as caught:
                error = caught
        return found, error

    return run


def test_a_group_is_shown_scene_by_scene_and_captioned_together(ask, story):
    asked = []

    def answer(request):
        asked.append(request)
        return good_answer(request)

    [found] = ask(answer, frames_per_scene=2)
    content = asked[0]["messages"][0]["content"]
    assert [part["type"] for part in content] == ["text", *["text", "image_url", "image_url"] * 3]
    assert [content[i]["text"] for i in (1, 4, 7)] == ["Scene 1:", "Scene 2:", "Scene 3:"]
    assert content[-1]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert asked[0]["response_format"]["json_schema"]["schema"]["required"] == ["actors", "scenes"]
    assert (found.clips, len(found.captions), list(found.actors)) == (story[0].clips, 3, ["Actor1"])
    assert (found.model, found.prompt_version, found.attempts) == ("m", PROMPT_VERSION, 1)
    assert found.input_tokens > 0 and found.output_tokens > 0


def test_what_is_wrong_is_fed_back_and_tokens_of_all_attempts_are_counted(ask):
    asked = []

    def answer(request):
        asked.append(request)
        status, text = good_answer(request)
        record = json.loads(text)
        if len(asked) == 1:
            return 200, "no JSON"
        if len(asked) == 2:
            record["scenes"].pop()
        return status, json.dumps(record)

    [found] = ask(answer)
    assert found.attempts == 3
    roles = [message["role"] for message in asked[2]["messages"]]
    assert roles == ["user", "assistant", "user", "assistant", "user"]
    assert "holds no JSON object" in asked[1]["messages"][-1]["content"][0]["text"]
    assert "there are 3 scenes, but 2 captions" in asked[2]["messages"][-1]["content"][0]["text"]
    assert found.output_tokens > len(" ".join(found.captions).split())


def test_answers_that_stay_faulty_drop_the_group_with_every_fault(ask):
    def undeclared(request):
        record = json.loads(good_answer(request)[1])
        record["actors"] = []
        return 200, json.dumps(record)

    [found] = ask(undeclared, max_attempts=2)
    assert isinstance(found, Dropped) and found.rule == "invalid_captions"
    assert "mentions Actor1, who is not declared" in found.why
    assert len(found.details["faults"]) == 2


def test_rate_limits_and_server_errors_are_waited_out(ask):
    statuses = [429, 503]
    [found] = ask(lambda request: (statuses.pop(0), "busy") if statuses else good_answer(request), max_retries=3)
    assert found.attempts == 1 and not statuses


def test_slow_answers_come_in_and_out_of_order(ask):
    lock, count = threading.Lock(), []

    def answer(request):
        with lock:
            count.append(1)
            turn = len(count)
        time.sleep(0.3 if turn == 1 else 0)
        return good_answer(request)

    found = ask(answer, count=3, concurrency=3)
    assert {entry.id[-1] for entry in found} == {"0", "1", "2"}


def test_an_endpoint_that_never_answers_ends_the_run_after_some_groups(ask):
    released = threading.Event()

    def never(request):
        released.wait(20)
        return good_answer(request)

    with pytest.raises(OSError, match=r"5 requests in a row failed, the last because .* Run again"):
        try:
            ask(never, count=8, timeout=0.2)
        finally:
            released.set()


def test_one_request_that_fails_is_left_for_the_next_run(ask, caplog):
    turns = iter([200, 500, 200])

    def answer(request):
        status = next(turns)
        return good_answer(request) if status == 200 else (status, "out of order")

    found = ask(answer, count=3)
    assert [entry.id[-1] for entry in found] == ["0", "2"]
    assert "out of order" in caplog.text and "1 requests failed: run again" in caplog.text


def test_a_refused_key_ends_the_run_and_is_not_shown(ask):
    with pytest.raises(ValueError, match=r"check caption\.base_url, .* and the key in OPENAI_API_KEY") as error:
        ask(lambda request: (401, "Incorrect API key provided: sk-secret-of-the-test"))
    assert "secret" not in str(error.value) and "Incorrect API key provided: …" in str(error.value)


def test_the_estimate_comes_first_and_may_be_too_much(ask, caplog):
    asked = []
    prices = {"price_input": 1000.0, "price_output": 1000.0}
    with pytest.raises(ValueError, match=r"would cost about \d+\.\d\d, more than caption.max_cost=0.01"):
        ask(lambda request: asked.append(request) or good_answer(request), max_cost=0.01, **prices)
    assert not asked
    with caplog.at_level(logging.INFO, "mask2dit"):
        ask(good_answer, **prices)
    assert "1 requests, about" in caplog.text and "which cost about" in caplog.text


def test_the_run_stops_once_it_has_cost_too_much(ask):
    prices = {"price_input": 1000.0, "price_output": 1000.0, "tokens_per_image": 0, "max_cost": 3.0}
    asked = []

    def wasteful(request):
        asked.append(request)
        return 200, good_answer(request)[1] + " " + "word " * 3000

    with pytest.raises(ValueError, match="have cost"):
        ask(wasteful, count=3, **prices)
    assert len(asked) < 3


PAID = {"price_input": 0.0, "price_output": 1000.0, "concurrency": 3}


def test_what_a_run_that_stops_at_its_cost_has_paid_for_is_kept_and_counted(collect, caplog):
    """Two requests run while the first answer costs too much; the others are not sent."""
    caplog.set_level(logging.INFO, "mask2dit")
    started = threading.Barrier(3)

    def answer(request, turn):
        if turn <= 3:
            started.wait(10)
        time.sleep(0.3 if turn > 1 else 0)
        return 200, good_answer(request)[1] + " word" * 6000

    found, error = collect(answer, count=9, max_cost=5.0, **PAID)
    kept = sum(result.output_tokens for result in found)
    assert len(found) in (3, 4) and kept > len(found) * 6000  # a worker may begin another before it is cancelled
    assert isinstance(error, ValueError) and f"have cost {kept / 1000:.2f}" in str(error)
    assert f"and {kept} out, which cost" in caplog.text


@pytest.mark.parametrize("status", [503, 401])
def test_what_was_running_when_requests_fail_is_kept_and_counted(collect, caplog, status):
    caplog.set_level(logging.INFO, "mask2dit")
    started, failed = threading.Event(), []

    def answer(request, turn):
        if turn == 1:
            started.set()
            while len(failed) < (5 if status == 503 else 1):
                time.sleep(0.01)
            time.sleep(0.3)
            return good_answer(request)
        started.wait(10)
        failed.append(turn)
        return status, "not now"

    found, error = collect(answer, count=12, **PAID)
    assert len(found) == 1 and isinstance(error, OSError)
    assert f"and {found[0].output_tokens} out, which cost" in caplog.text


def test_tokens_of_answers_before_a_failure_are_counted(collect, caplog):
    caplog.set_level(logging.INFO, "mask2dit")
    found, error = collect(lambda request, turn: (200, "one two three") if turn == 1 else (503, "busy"), **PAID)
    assert not found and not error and "and 3 out, which cost" in caplog.text


def test_requests_are_spread_over_the_minute():
    rate = RateLimit(6000)
    started = time.monotonic()
    for _ in range(6):
        rate.wait()
    assert time.monotonic() - started >= 0.05


def test_captions_depend_on_what_is_asked_and_not_on_how_fast():
    base = caption_settings(CaptionConfig(model="m"))
    assert base["prompt"] == PROMPT_VERSION
    assert caption_settings(CaptionConfig(model="m", concurrency=9, base_url="http://elsewhere")) == base
    assert caption_settings(CaptionConfig(model="m", max_attempts=9)) == base
    assert caption_settings(CaptionConfig(model="n")) != base


def test_a_group_that_was_dropped_has_attempts_left_once_there_are_more(ask):
    [found] = ask(lambda request: (200, "no"), max_attempts=2)
    assert not has_attempts_left(found, CaptionConfig(max_attempts=2))
    assert has_attempts_left(found, CaptionConfig(max_attempts=3))
    [found] = ask(good_answer)
    assert not has_attempts_left(found, CaptionConfig(max_attempts=3))


def test_an_answer_without_a_text_is_asked_for_again(ask):
    answers = ["", None]

    def answer(request):
        if answers:
            return 200, answers.pop() or ""
        assert all(part["text"] for part in request["messages"][1]["content"])
        return good_answer(request)

    [found] = ask(answer)
    assert found.attempts == 3


def test_an_endpoint_that_cannot_be_reached_is_an_error_that_may_pass(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    config = CaptionConfig(base_url="http://127.0.0.1:9/v1", model="m", max_retries=0)
    with pytest.raises(EndpointError, match="Connection error"):
        OpenAICaptioner(config).ask([{"role": "user", "content": [{"type": "text", "text": "hello"}]}])


def test_an_endpoint_that_knows_no_schema_is_told_how_to_go_without(ask, caplog):
    ask(lambda request: (400, "response_format is not supported"))
    assert "response_format is not supported" in caplog.text and "caption.json_schema=false" in caplog.text
    caplog.clear()
    ask(lambda request: (400, "too large"), json_schema=False)
    assert "too large" in caplog.text and "json_schema" not in caplog.text


@pytest.fixture
def ask_in_order(story, chat_server, monkeypatch):
    """Captions the story, once for each of some answers of an endpoint, and gives the results by the numbers of groups."""
    monkeypatch.setattr("mask2dit.endpoint.MAX_PAUSE", 0)
    group, clips, folder = story
    good = good_answer(STORY)[1]

    def run(*answers, count=None, max_retries=0):
        groups = [replace(group, id=f"group {i}", key=f"{i}") for i in range(count or len(answers))]
        url, asked = chat_server([answer(good) for answer in answers])
        config = CaptionConfig(base_url=url, model="m", max_retries=max_retries, concurrency=1, max_attempts=1)
        found = {}
        try:
            for entry, [result] in caption(groups, clips, folder, config, OpenAICaptioner(config)):
                found[int(entry.id.split()[1])] = result
        except (ValueError, OSError) as error:
            assert url in str(error) and "\n" not in str(error)
            return found, error
        return found, len(asked)

    return run


def test_captions_are_taken_from_every_kind_of_answer_that_holds_them(ask_in_order, real_answers):
    answers = real_answers["taken"].values()
    found, _ = ask_in_order(*answers)
    assert len(found) == len(answers) and not any(isinstance(result, Dropped) for result in found.values())


def test_answers_that_may_pass_are_asked_for_again_or_left_for_the_next_run(ask_in_order, real_answers):
    good = real_answers["taken"]["plain"]
    for answer in real_answers["may pass"].values():
        assert list(ask_in_order(good, answer, good)[0]) == [0, 2]
        found, requests = ask_in_order(answer, good, count=1, max_retries=1)
        assert not isinstance(found[0], Dropped) and requests == 2


def test_an_address_of_another_protocol_ends_the_run_and_records_nothing(ask_in_order, real_answers):
    good = real_answers["taken"]["plain"]
    for answer in real_answers["unusable"].values():
        found, error = ask_in_order(good, answer, good)
        assert isinstance(error, ValueError) and "caption.base_url" in str(error) and 1 not in found


def test_refused_content_drops_its_group_alone(ask_in_order, real_answers):
    good, filtered = real_answers["taken"]["plain"], real_answers["refused"]["filter"]
    found, _ = ask_in_order(*[filtered] * 7, good)
    assert [isinstance(found[i], Dropped) for i in range(8)] == [True] * 7 + [False]
    assert found[0].rule == "refused" and "by policy" in found[0].why
    assert not has_attempts_left(found[0], CaptionConfig(max_attempts=9))


def test_a_refusal_of_unknown_reason_is_recorded_once_another_group_was_answered(ask_in_order, real_answers):
    def refused(text):
        return 400, {"error": {"message": "cannot read the third picture"}}, {}

    good = real_answers["taken"]["plain"]
    found, _ = ask_in_order(*[refused] * 6, good, refused)
    assert [isinstance(found[i], Dropped) for i in range(8)] == [True] * 6 + [False, True]
    assert ask_in_order(refused, refused) == ({}, 2)
    found, error = ask_in_order(*[refused] * 30)
    assert not found and isinstance(error, OSError) and "20 requests in a row" in str(error)
