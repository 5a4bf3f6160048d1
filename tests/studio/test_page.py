"""The running page: its interface for programs, what it refuses, and one journey in a browser."""

import json
import re
import shutil
import time
from pathlib import Path

import httpx
import pytest

from mask2dit.studio.config import StudioConfig
from mask2dit.studio.run import USER, launch
from mask2dit.video.reading import open_video

pytest.importorskip("gradio")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "models/storyworld")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
STORY = """title: At the beach
cast:
  Actor1: green triangle, wearing a hat
scenes:
  - Actor1 jumps on the beach.
  - Actor1 stands still on the beach.
"""


@pytest.fixture
def serve(tmp_path):
    pages = []

    def start(**settings) -> str:
        config = StudioConfig(
            projects=str(tmp_path / "projects"), model=MODEL, device="cpu", port=0, writer_timeout=1, **settings
        )
        page, url = launch(config)
        pages.append(page)
        return url

    yield start
    for page in pages:
        page.close()


def test_programs_submit_watch_fetch_and_redo(serve, tmp_path):
    page = (ROOT / "docs/studio.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "story.yaml").write_text(STORY)
    names: dict = {}
    script = script.replace("http://127.0.0.1:7860", serve()).replace(
        '"story.yaml"', repr(str(tmp_path / "story.yaml"))
    )
    exec(script, names)
    assert open_video(names["film"]).num_frames == 18
    status = names["client"].predict(names["job"], api_name="/watch")
    assert (status["status"], status["finished"]) == ("done", [2])
    with pytest.raises(Exception, match="there is no project"):
        names["client"].predict("../x", api_name="/generate")


def test_files_outside_the_projects_and_other_names_of_this_computer_are_refused(serve, tmp_path):
    url = serve()
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "projects/open.txt").write_text("open")
    folder = tmp_path / "projects"
    for path, status in (
        (folder / "open.txt", 200),
        (tmp_path / "secret.txt", 403),
        (f"{folder}/../secret.txt", 403),
        ("/etc/passwd", 403),
        (ROOT / "pyproject.toml", 403),
    ):
        answer = httpx.get(f"{url}gradio_api/file={path}")
        assert answer.status_code == status, path
    assert httpx.get(url, headers={"Host": "evil.example"}).status_code == 400
    assert "default-src 'self'" in httpx.get(url).headers["content-security-policy"]


def test_a_password_is_needed_where_one_is_set(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("PAGE_PASSWORD", "correct horse")
    url = serve(password_env="PAGE_PASSWORD")
    (tmp_path / "projects/open.txt").write_text("open")
    assert httpx.get(f"{url}gradio_api/file={tmp_path}/projects/open.txt").status_code == 401
    from gradio_client import Client

    with pytest.raises(Exception, match=r"."):
        Client(url, auth=(USER, "wrong"), verbose=False)
    assert (
        Client(url, auth=(USER, "correct horse"), verbose=False).predict(STORY, api_name="/create") == "at-the-beach"
    )


@pytest.fixture
def handlers(studio):
    """The handlers of the page, whose components are their names."""
    from mask2dit.studio.page import FIELDS, Handlers

    class Names(dict):
        __missing__ = str

    handlers = Handlers(studio, Names())

    def fields(shown: dict) -> list:
        """The values of the fields that the page shows."""
        values = [shown[name] for name in FIELDS]
        return [value["value"] if isinstance(value, dict) else value for value in values]

    handlers.fields = fields
    return handlers


def test_only_a_persons_changes_take_a_message_away(handlers):
    shown = handlers.new()
    name, fields = shown["project"]["value"], handlers.fields(shown)
    filled_in = handlers.edit(name, shown["editing"], "tab", shown["base"], *fields)
    assert filled_in["base"] == shown["base"] and "message" not in filled_in
    typed = handlers.edit(name, shown["editing"], "tab", shown["base"], "Another title", *fields[1:])
    assert typed["base"] > shown["base"] and typed["message"] == ""


def test_a_drawing_of_the_scene_that_was_shown_before_is_left_out(handlers):
    shown = handlers.new()
    name, first = shown["project"]["value"], shown["editing"]
    added = handlers.add(name, first, "tab", shown["base"], *handlers.fields(shown))
    assert "cards" not in handlers.tick(name, first, added["drawn"])
    assert "cards" not in handlers.tick(name, added["editing"], added["drawn"])  # nothing changed
    assert "Edit scene 2" in handlers.tick(name, added["editing"], None)["cards"]


def test_drawings_and_changes_of_a_page_come_one_after_another(studio):
    from mask2dit.studio.page import build_page

    queues = {fn.name: (fn.concurrency_id, fn.concurrency_limit) for fn in build_page(studio).fns.values()}
    assert queues["tick"] == queues["insert_clip"] == queues["edit"] == ("draft", 1)


@pytest.fixture
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium")
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.mark.browser
def test_a_story_is_written_generated_mended_and_found_again_in_a_browser(serve, browser, tmp_path):
    url = serve()
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    requests, faults = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("dialog", lambda dialog: faults.append("a script ran"))
    page.goto(url)
    page.get_by_role("button", name="New project").click()
    page.get_by_role("button", name="Edit scene 1").wait_for()

    # Write, with texts that are no HTML
    page.get_by_label("Title", exact=True).fill("Red <img src=x onerror=alert(1)>")
    page.get_by_label("Cast").fill("Actor1: red circle, wearing a hat")
    page.get_by_label("Prompt of the scene").fill("A cat sleeps.")
    page.get_by_text("outside the story world").first.wait_for()
    page.get_by_label("Prompt of the scene").fill("Actor1 jumps in the meadow.")
    page.get_by_text("11 of 32 tokens").wait_for()
    page.get_by_role("button", name="Add a scene").click()
    page.get_by_role("button", name="Edit scene 2").wait_for()
    page.get_by_label("Prompt of the scene").fill("Actor1 stands still in the meadow.")
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("Steps", exact=True).fill("2")

    # Generate, and see the scenes come
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_role("progressbar", name="Generation").wait_for()
    page.get_by_label("Scene 1, version 1").wait_for(timeout=60_000)
    page.locator("[data-status=done]").wait_for(timeout=60_000)

    # Make one again, by the keyboard, and take it back
    page.get_by_role("button", name="Edit scene 2").press("Enter")
    page.get_by_role("radio", name="2", exact=True).and_(page.locator(":checked")).wait_for()
    page.get_by_role("button", name="Make this scene").press("Enter")
    page.get_by_label("Scene 2, version 2").wait_for(timeout=60_000)
    page.locator("[data-status=done]").wait_for(timeout=60_000)
    page.get_by_role("radio", name="Version 1: Actor1").check()
    page.get_by_label("Scene 2, version 1").wait_for()

    # Everything is there after a reload; nothing is in another tab
    page.reload()
    page.get_by_label("Scene 2, version 1").wait_for()
    assert page.get_by_label("Title", exact=True).input_value() == "Red <img src=x onerror=alert(1)>"
    other = browser.new_page()
    other.goto(url)
    other.get_by_text("Begin with an example, open").wait_for()

    # Download
    page.get_by_role("button", name="Put the film together").click()
    page.get_by_label("The film").wait_for()
    with page.expect_download() as download:
        page.get_by_role("button", name="Film", exact=True).click()
    download.value.save_as(tmp_path / "film.mp4")
    assert open_video(tmp_path / "film.mp4").num_frames == 18

    # No sideways scrolling on a phone, every control has a name, and nothing came from elsewhere
    page.set_viewport_size({"width": 420, "height": 900})
    assert page.evaluate("document.documentElement.scrollWidth") <= 420
    controls = page.locator("button:visible, input:visible, textarea:visible")
    assert (
        controls.evaluate_all("all => all.filter(c => !c.innerText && !c.labels?.length && !c.ariaLabel).length") == 0
    )
    assert [address for address in requests if not address.startswith((url, "data:", "blob:"))] == []
    assert faults == []


@pytest.mark.browser
def test_a_clip_of_ones_own_is_inserted_and_what_is_no_video_is_told(serve, browser, own_clip, tmp_path):
    page = browser.new_page()
    page.goto(serve())
    page.get_by_label("Begin with an example").click()
    page.get_by_role("option", name="small world: a walk on the beach").click()
    page.get_by_role("button", name="Edit scene 3").wait_for()
    (tmp_path / "notes.mp4").write_text("These are notes, and no video.")
    upload = page.locator("input[type=file]").nth(1)
    upload.set_input_files(tmp_path / "notes.mp4")
    page.get_by_text("notes.mp4 is not a video").wait_for()
    upload.set_input_files(own_clip)
    page.get_by_role("button", name="Edit scene 4").wait_for()
    assert page.get_by_text("own clip", exact=True).is_visible()
    (folder,) = (tmp_path / "projects").glob("a-walk*")
    until = time.monotonic() + 10
    while len(list((folder / "clips").iterdir())) != 1 and time.monotonic() < until:
        time.sleep(0.1)
    assert json.loads((folder / "draft.json").read_text())["scenes"][0]["video"].startswith("my-clip-")
