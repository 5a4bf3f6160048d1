"""What a person does in the studio, without a browser."""

import json
import shutil
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

from mask2dit.config import load_config
from mask2dit.inference.config import InferenceConfig
from mask2dit.inference.run import generate, plan_generation
from mask2dit.stories import read_story
from mask2dit.studio import engine as module
from mask2dit.studio.actions import EXAMPLES
from mask2dit.studio.engine import find_models
from mask2dit.studio.jobs import CANCELLED, DONE, FAILED
from mask2dit.studio.project import Draft, DraftScene
from mask2dit.studio.views import scenes as draw_scenes
from mask2dit.studio.views import status as draw_status
from mask2dit.video.reading import open_video


def files(view) -> list[tuple[str, bytes]]:
    return [(scene.chosen.clip.name, scene.chosen.clip.read_bytes()) for scene in view.scenes]


@pytest.mark.slow
def test_a_scene_is_made_again_taken_back_and_the_film_shows_what_is_chosen(studio, draft, run_job, edit):
    name = studio.create(draft)
    job = run_job(name)
    assert (job.status, job.finished) == (DONE, (1, 2, 3)), job.message
    first = files(studio.view(name))

    edit(name, 1, prompt="Actor1 jumps on the beach.")
    assert [scene.is_changed for scene in studio.view(name).scenes] == [False, True, False]
    assert run_job(name).finished == (2,)  # only what changed
    second = studio.view(name)
    assert [a == b for a, b in zip(first, files(second))] == [True, False, True]
    assert [version.number for version in second.scenes[1].versions] == [1, 2]

    film = studio.export(name)["film"]
    clips = [open_video(scene.chosen.clip) for scene in second.scenes]
    whole = open_video(film).read(range(27))
    for i, clip in enumerate(clips):
        assert (whole[9 * i : 9 * i + 9] == clip.read(range(9))).all()
    assert studio.export(name)["film"] == film and open_video(studio.export(name)["enlarged"]).width == 256

    studio.choose(name, second.scenes[1].scene.id, 1)
    third = studio.view(name)
    assert files(third) == first and third.draft.scenes[1].prompt == draft.scenes[1].prompt
    assert studio.export(name)["film"] != film
    with pytest.raises(ValueError, match="all scenes are made"):
        studio.generate(name)

    overrides = ["redo=[3]", "seed=5"]  # the film's record is one like any other
    again = generate(load_config(InferenceConfig, film.with_suffix(".json"), overrides))
    assert (again.with_suffix("") / "scene_1.mp4").read_bytes() == second.scenes[0].chosen.clip.read_bytes()
    seeds = [scene["seed"] for scene in json.loads(again.with_suffix(".json").read_text())["scenes"]]
    assert seeds == [second.scenes[0].chosen.record["seed"], second.scenes[1].chosen.record["seed"], 5]
    prompts = [*(scene.chosen.record["prompt"] for scene in second.scenes), second.scenes[0].chosen.record["prompt"]]
    longer = ["redo=[]", f"prompts={json.dumps(prompts)}"]
    plan = plan_generation(load_config(InferenceConfig, film.with_suffix(".json"), longer), torch.device("cpu"))
    assert sorted(plan.sources) == [0, 1, 2] and plan.shape.frames == (9, 9, 9, 9)


@pytest.mark.slow
def test_scenes_are_made_one_by_one_added_and_own_clips_are_given(studio, draft, run_job, edit, own_clip):
    name = studio.create(draft)
    assert run_job(name, [2]).finished == (3,)
    assert [scene.chosen is not None for scene in studio.view(name).scenes] == [False, False, True]
    with pytest.raises(ValueError, match="scene 1, 2 is not made yet"):
        studio.export(name)
    project = studio.projects.open(name)
    studio.update(name, studio.insert_clip(name, project.load(), 0, own_clip))
    own_clip.unlink()
    job = run_job(name, [0])  # nothing to generate: it is encoded
    assert (job.status, job.finished) == (DONE, (1,)), job.message
    given = studio.view(name).scenes[0].chosen.record
    assert given["source"] == "given" and given["seed"] is None and given["context"]["indices"]
    assert run_job(name, [1], following=True).finished == (2, 3, 4)
    assert len(studio.view(name).scenes[3].versions) == 2
    page = draw_scenes(studio.view(name), "", ["", "", "", ""])
    assert page.count("<video") == 4 and "own clip" in page


@pytest.mark.slow
@pytest.mark.parametrize("again, finished", [(None, (1,)), ([1], (1, 2))])
def test_a_changed_prompt_of_an_own_clip_is_what_other_scenes_continue_from(
    studio, draft, run_job, edit, own_clip, again, finished
):
    name = studio.create(draft)
    project = studio.projects.open(name)
    studio.update(name, studio.insert_clip(name, project.load(), 0, own_clip))
    assert run_job(name).finished == (1, 2, 3, 4)
    before = files(studio.view(name))
    edit(name, 0, prompt="Actor1 moves right along the beach.")
    assert [scene.is_changed for scene in studio.view(name).scenes] == [True, False, False, False]
    assert run_job(name, again).finished == finished
    view = studio.view(name)
    assert not any(scene.is_changed for scene in view.scenes)
    assert [a == b for a, b in zip(before, files(view))][finished[-1] :] == [True] * (4 - finished[-1])
    made = view.scenes[finished[-1] - 1].chosen.record["run"]["config"]["prompts"]
    assert made[0].endswith("moves right along the beach.")


@pytest.mark.slow
def test_a_model_of_the_hub_is_checked_without_its_weights_and_fetched_to_generate(studio, draft, run_job, hub):
    scenes = tuple(DraftScene(prompt=prompt) for prompt in ("a fox", "a lake"))
    hubs = studio.set_model(replace(draft, cast=(), scenes=scenes), hub.name)
    small = {"num_inference_steps": 1, "dtype": "float32", "height": 64, "width": 96, "num_frames": 9}
    name = studio.create(replace(hubs, settings={**hubs.settings, **small}))
    assert studio.engine.find_faults(studio.view(name).draft) == ["", ""]
    studio.engine.plan(studio.projects.open(name), studio.projects.open(name).load())
    assert hub.fetched and not hub.fetched_weights()
    job = run_job(name)
    assert (job.status, job.finished) == (DONE, (1, 2)), job.message
    assert hub.fetched_weights()
    config = studio.view(name).scenes[0].chosen.record["run"]["config"]
    assert (config["model"], config["revision"]) == (hub.name, hub.commit)
    with pytest.raises(ValueError, match="all scenes are made"):
        studio.generate(name)
    record = studio.export(name)["record"]
    again = generate(load_config(InferenceConfig, record, ["redo=[2]", "seed=5"]))
    assert [scene["source"] for scene in json.loads(again.with_suffix(".json").read_text())["scenes"]] == [
        "kept",
        "generated",
    ]


def test_a_hub_that_refuses_a_model_is_told_on_every_scene(studio, draft, hub):
    hub.refuses = (401, "")
    faults = studio.engine.find_faults(replace(draft, settings={"model": hub.name}))
    assert len(faults) == 3 and all("hf auth login" in fault for fault in faults)


@pytest.mark.slow
def test_a_failing_disk_or_a_cancelled_job_keeps_what_was_done(studio, draft, run_job, monkeypatch):
    name = studio.create(replace(draft, settings={**draft.settings, "window": 1}))
    project = studio.projects.open(name)
    add = project.add_version

    def full_after_one(*args, **kwargs):
        if any(project.versions(scene.id) for scene in draft.scenes):
            raise OSError(28, "cannot write: make room on that disk and run again")
        return add(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(project, "add_version", full_after_one)
        job = run_job(name)
    assert job.status == FAILED and "make room" in draw_status(studio.view(name)) and job.finished == (1,)

    def cancel_after_one(*args, **kwargs):
        studio.queue.cancel(studio.queue.of_project(name).id)
        return add(*args, **kwargs)

    monkeypatch.setattr(project, "add_version", cancel_after_one)
    job = run_job(name)
    assert job.status == CANCELLED and len(project.versions(draft.scenes[1].id)) == 1
    assert not project.versions(draft.scenes[2].id)


BAD = {
    "no scenes": ({"scenes": ()}, "no scenes: add one"),
    "an empty prompt": ({"scenes": (DraftScene(prompt=" "),)}, "^scene 1: the prompt is missing$"),
    "an unknown actor": ({"scenes": (DraftScene(prompt="Actor2 jumps on the beach."),)}, "Actor2 is not in the cast"),
    "another name": ({"cast": (("Bob", "a man"),)}, "Bob"),
    "another world": ({"scenes": (DraftScene(prompt="A cat sleeps."),)}, "outside the story world"),
    "no description": ({"cast": (("Actor1", ""),)}, "Actor1.* no description"),
}


@pytest.mark.parametrize("changes, message", BAD.values(), ids=BAD)
def test_what_cannot_be_generated_is_told_in_one_sentence_before_it_is_queued(studio, draft, changes, message):
    name = studio.create(replace(draft, **changes))
    with pytest.raises(ValueError, match=message) as error:
        studio.generate(name)
    assert "\n" not in str(error.value)
    assert studio.view(name).job is None and studio.view(name).draft.scenes == replace(draft, **changes).scenes


def test_a_missing_model_and_wrong_settings_are_told(studio, draft, edit, tmp_path):
    name = studio.create(draft)
    with pytest.raises(FileNotFoundError, match=r"no model in '.*nowhere'"):
        studio.set_model(draft, str(tmp_path / "nowhere"))
    for settings, message in (
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"memory": "x"}, "memory has to be"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(name, settings={**draft.settings, **settings})
    shutil.rmtree(studio.projects.folder / name)
    with pytest.raises(ValueError, match="there is no project"):
        studio.view(name)


def test_fifty_scenes_with_html_in_every_text_are_shown_as_text(studio, draft):
    evil = '<img src=x onerror="alert(1)"> Actor1 & "co"'
    scenes = tuple(DraftScene(prompt=f"{evil} {i}") for i in range(50))
    name = studio.create(Draft(title=evil, style=evil, cast=(("Actor1", evil),), scenes=scenes))
    view = studio.view(name)
    page = draw_scenes(view, "", studio.engine.find_faults(view.draft)) + draw_status(view)
    assert page.count("<article") == 50 and "<img" not in page and "&lt;img" in page
    assert set(studio.engine.find_faults(view.draft)) != {""}


def test_prompts_over_the_text_window_and_of_other_scripts_are_counted(studio, draft, monkeypatch):
    monkeypatch.setattr(module, "check_prompts", lambda *args: None)
    long, short = DraftScene(prompt="Actor1 " + "jumps " * 60), DraftScene(prompt="狐狸在雪地里跑")
    faults = studio.engine.find_faults(replace(draft, scenes=(long, short)))
    assert "but the model reads 32: shorten it by" in faults[0] and faults[1] == ""


@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_can_be_generated_as_they_are(studio, example):
    name = studio.create_example(example)
    view = studio.view(name)
    if example.startswith("small world"):
        assert studio.engine.find_faults(view.draft) == ["", "", ""]
    assert view.draft.story().title == view.draft.title


def test_a_story_file_is_opened_and_its_faults_are_told(studio, tmp_path):
    text = "title: A story\ncast:\n  Actor1: red circle\nscenes:\n  - Actor1 jumps on the beach.\n"
    name = studio.create_from_text(text)
    assert read_story(studio.projects.open(name).story_file).record() == yaml.safe_load(text)
    for wrong, message in ((text + "seens: 1\n", "did you mean 'scenes'"), ("title: [", "not YAML"), ("", "empty")):
        with pytest.raises(ValueError, match=message) as error:
            studio.create_from_text(wrong)
        assert "/tmp" not in str(error.value)
    with pytest.raises(ValueError, match="insert them here"):
        studio.create_from_text("title: A\nscenes:\n  - {prompt: a fox, video: /etc/passwd}\n")


def test_models_beside_the_default_one_are_offered(studio):
    assert studio.config.model in find_models(Path(studio.config.model).parent) == studio.models()


@pytest.fixture
def writer(studio, monkeypatch):
    """Sets the studio's writer."""

    def set_up(url):
        monkeypatch.setattr(studio.config, "writer_base_url", url)
        monkeypatch.setattr(studio.config, "writer_model", "m")
        monkeypatch.setattr(studio.config, "writer_timeout", 1.0)

    return set_up


def test_a_story_is_written_and_what_the_model_cannot_show_is_fed_back(studio, writer, chat_server):
    pytest.importorskip("openai")
    story = {
        "title": "A day",
        "cast": {"Actor1": "red circle"},
        "scenes": ["Actor1 sleeps.", "Actor1 jumps in the snow."],
    }
    good = {**story, "scenes": ["Actor1 moves left across the snow.", "Actor1 jumps in the snow."]}
    url, asked = chat_server([json.dumps(story), json.dumps(good)])
    with pytest.raises(ValueError, match="no writer is set"):
        studio.write("a day in the snow", 2)
    writer(url)
    name = studio.write("a day in the snow", 2)
    assert [scene.prompt for scene in studio.projects.open(name).load().scenes] == good["scenes"]
    assert "a day in the snow" in str(asked[0]) and "it has to end with a setting" in str(asked[1])
    for idea, number, message in (("", 2, "what the story is about"), ("a fox", 0, "between 1 and 100")):
        with pytest.raises(ValueError, match=message):
            studio.write(idea, number)


@pytest.mark.slow
def test_an_endpoint_that_hangs_or_refuses_is_told_and_creates_nothing(studio, writer, chat_server):
    pytest.importorskip("openai")
    with socket.create_server(("127.0.0.1", 0)) as silent:
        writer(f"http://127.0.0.1:{silent.getsockname()[1]}/v1")
        with pytest.raises(OSError, match=r"127\.0\.0\.1"):
            studio.write("a fox", 2)
    writer(chat_server([(401, {"error": {"message": "no key"}}, {})])[0])
    with pytest.raises(OSError, match="no key"):
        studio.write("a fox", 2)
    writer(chat_server(["I cannot help with that."] * 3)[0])
    with pytest.raises(ValueError, match="after 3 attempts"):
        studio.write("a fox", 2)
    assert list(studio.projects) == []
