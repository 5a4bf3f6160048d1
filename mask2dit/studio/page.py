"""The page: components and what their events call. Everything that is done is done by `Studio`."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import wraps
from typing import Any

import gradio as gr

from mask2dit.config import CONTEXTS, DTYPES, SAMPLERS
from mask2dit.pipelines.memory import MEMORY_MODES
from mask2dit.studio import views
from mask2dit.studio.actions import EXAMPLES, ProjectView, Studio
from mask2dit.studio.engine import SETTINGS, settings_of
from mask2dit.studio.jobs import explain
from mask2dit.studio.project import Draft, DraftScene

FIELDS = ("title", "style", "negative", "cast", "prompt", "seconds", "seed", *SETTINGS)
EXPECTED = (ValueError, OSError, FloatingPointError)
# Only in the address does a tab remember its project, so that two tabs do not mix.
REMEMBER = (
    "(name) => { history.replaceState(null, '', name ? '?project=' + encodeURIComponent(name) : '?'); return name; }"
)
# A click on the button of a card selects its scene.
SELECT = """element.addEventListener('click', (event) => {
  const button = event.target.closest('[data-scene]');
  if (button) trigger('click', {scene: button.dataset.scene});
});"""
FONTS = ["system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]  # no fonts from other servers


def theme() -> gr.themes.Base:
    """Returns the look of the page."""
    return gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=FONTS, font_mono=["ui-monospace", "Consolas", "monospace"]
    ).set(
        body_text_color_subdued="*neutral_600",  # enough contrast for small text
        body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600",
        block_info_text_color_dark="*neutral_300",
    )


@dataclass
class Parts:
    """The components by name."""

    parts: dict[str, Any]

    def __getitem__(self, name: str):
        return self.parts[name]

    def of(self, *names: str) -> list:
        return [self.parts[name] for name in names]


def build_page(studio: Studio) -> gr.Blocks:
    """Builds the page and its interface for programs."""
    with gr.Blocks(title="Mask²DiT Studio", analytics_enabled=False) as page:
        parts = Parts(_header(studio))
        with gr.Row(equal_height=False):
            with gr.Column(scale=5, min_width=320):
                parts.parts |= _writer(studio) | _story() | _scene() | _settings(studio)
            with gr.Column(scale=6, min_width=320):
                parts.parts |= _results()
        parts.parts["tab"] = gr.State("")
        parts.parts["base"] = gr.State(0)
        parts.parts["drawn"] = gr.State(None)
        parts.parts["timer"] = gr.Timer(1.0)
        _add_api(studio)  # first, so that its names are those of the functions
        _connect(page, parts, Handlers(studio, parts))
    return page


def _header(studio: Studio) -> dict:
    gr.Markdown("# Mask²DiT Studio")
    with gr.Row(equal_height=True):
        project = gr.Dropdown(list(studio.projects), label="Project", value=None, scale=3, min_width=200)
        example = gr.Dropdown(list(EXAMPLES), label="Begin with an example", value=None, scale=3, min_width=200)
        with gr.Column(scale=2, min_width=200):
            new = gr.Button("New project", size="md")
            opened = gr.UploadButton("Open a story file", file_types=[".yaml", ".yml", ".json", ".txt"], size="md")
    return {"project": project, "example": example, "new": new, "opened": opened}


def _writer(studio: Studio) -> dict:
    with gr.Accordion("Write with a language model", open=False, visible=studio.has_writer):
        idea = gr.Textbox(label="Idea", info="What the story is about. It becomes a new project.", max_lines=3)
        number = gr.Number(3, label="Number of scenes", precision=0, minimum=1)
        write = gr.Button("Write the story", size="md")
    return {"idea": idea, "idea_scenes": number, "write": write}


def _story() -> dict:
    title = gr.Textbox(label="Title", max_lines=1, max_length=200, interactive=False)
    cast = gr.Textbox(
        label="Cast",
        info="One actor per line, as in  Actor1: a red fox, wearing a blue scarf. Scenes name Actor1, and the description "
        "is added.",
        lines=2,
        max_lines=8,
        interactive=False,
    )
    with gr.Accordion("Style and negative prompt", open=False):
        style = gr.Textbox(label="Style", info="Appended to every prompt.", max_lines=2, interactive=False)
        negative = gr.Textbox(
            label="Negative prompt", info="What no scene should show.", max_lines=2, interactive=False
        )
    return {"title": title, "style": style, "negative": negative, "cast": cast}


def _scene() -> dict:
    parts = {"selected": gr.Radio([], label="Scene", elem_id="scene-choice")}
    parts["editing"] = gr.Textbox(visible="hidden", label="id")
    parts["prompt"] = gr.Textbox(label="Prompt of the scene", lines=3, max_lines=8, interactive=False)
    parts["counter"] = gr.HTML(elem_classes="studio-line")
    with gr.Row():
        parts["seconds"] = gr.Number(label="Seconds", info="Empty: the model's", minimum=0, min_width=120)
        parts["seed"] = gr.Number(label="Seed", info="Empty: new each time", precision=0, minimum=0, min_width=120)
    with gr.Row():
        parts["make"] = gr.Button("Make this scene", size="md", min_width=140)
        parts["follow"] = gr.Button("Make it and those after it", size="md", min_width=140)
    parts["version"] = gr.Radio([], label="Versions", visible=False)
    with gr.Row():
        parts["add"] = gr.Button("Add a scene", size="sm", min_width=120)
        parts["clip"] = gr.UploadButton("Insert own clip before", file_types=["video"], size="sm", min_width=120)
        parts["remove"] = gr.Button("Remove this scene", size="sm", min_width=120)
    with gr.Accordion("Words of the small world", open=False):
        gr.HTML(views.vocabulary())
    return parts


def _settings(studio: Studio) -> dict:
    whole = {"precision": 0, "min_width": 120}
    with gr.Accordion("Settings", open=False):
        parts = {
            "model": gr.Dropdown(
                studio.models(), label="Model", allow_custom_value=True, info="Folder, or name on the Hugging Face Hub"
            )
        }
        with gr.Row():
            parts["num_inference_steps"] = gr.Number(label="Steps", **whole)
            parts["guidance_scale"] = gr.Number(label="Guidance", min_width=120)
            parts["sampler"] = gr.Dropdown(list(SAMPLERS), label="Sampler", min_width=120)
            parts["window"] = gr.Number(label="Scenes at once", **whole)
        with gr.Row():
            parts["context"] = gr.Dropdown(
                list(CONTEXTS), label="Continue from", info="Scenes that a new one sees", min_width=160
            )
            parts["context_refresh"] = gr.Number(
                label="Context cache",
                info="Steps between refreshes of given scenes; 1: exact",
                precision=0,
                min_width=160,
            )
        with gr.Row():
            parts["num_frames"] = gr.Number(label="Frames per scene", info="Empty: the model's", **whole)
            parts["height"] = gr.Number(label="Height", info="Empty: the model's", **whole)
            parts["width"] = gr.Number(label="Width", info="Empty: the model's", **whole)
            parts["fps"] = gr.Number(label="Frames per second", **whole)
        with gr.Row():
            parts["memory"] = gr.Dropdown(list(MEMORY_MODES), label="Memory mode", min_width=120)
            parts["dtype"] = gr.Dropdown(list(DTYPES), label="Data type", min_width=120)
            parts["preview_every"] = gr.Number(label="Steps between previews", info="0: none", **whole)
    return parts


def _results() -> dict:
    with gr.Row():
        generate = gr.Button("Generate", variant="primary", min_width=160)
        cancel = gr.Button("Cancel", min_width=100, interactive=False)
    status = gr.HTML(elem_classes="studio-line")
    message = gr.HTML(elem_classes="studio-line")
    cards = gr.HTML(js_on_load=SELECT)
    with gr.Row():
        film = gr.Button("Put the film together", min_width=160)
        story_file = gr.DownloadButton("Story file", min_width=120, interactive=False)
    video = gr.HTML()
    with gr.Row():
        downloads = {
            name: gr.DownloadButton(label, visible=False, size="sm", min_width=120)
            for name, label in (("film_file", "Film"), ("enlarged", "Enlarged film"), ("sheet", "Contact sheet"))
        }
    return {
        "generate": generate,
        "cancel": cancel,
        "status": status,
        "message": message,
        "cards": cards,
        "film": film,
        "story_file": story_file,
        "video": video,
        **downloads,
    }


def told(handler: Callable) -> Callable:
    """Shows an expected error as one sentence on the page."""

    @wraps(handler)
    def wrapped(self, *arguments):
        try:
            return handler(self, *arguments)
        except EXPECTED as error:
            return {self.parts["message"]: views.note(explain(error), is_fault=True)}

    return wrapped


class Handlers:
    """What the events of the page call. Each returns the components that change."""

    def __init__(self, studio: Studio, parts: Parts):
        self.studio, self.parts = studio, parts

    @told
    def load(self, request: gr.Request) -> dict:
        name = request.query_params.get("project")
        tab = {self.parts["tab"]: secrets.token_hex(4)}
        if name in list(self.studio.projects):
            return {**self._show(name), **tab}
        fault = views.note(f"There is no project {name[:60]!r}.", is_fault=True) if name else ""
        return {**self._empty(), **tab, self.parts["message"]: fault}

    @told
    def open(self, name: str | None) -> dict:
        return self._show(name) if name else self._empty()

    @told
    def new(self) -> dict:
        return self._show(self.studio.create())

    @told
    def begin_example(self, example: str | None) -> dict:
        return self._show(self.studio.create_example(example)) if example else {self.parts["example"]: None}

    @told
    def open_file(self, path: str) -> dict:
        return self._show(self.studio.open_story(path))

    @told
    def write(self, idea: str, num_scenes: int) -> dict:
        return self._show(self.studio.write(idea, num_scenes))

    @told
    def edit(self, name, editing, tab, base, *fields) -> dict:
        if not name:  # the page is still filled in
            return {self.parts["base"]: base}
        draft = self._save(name, editing, tab, base, fields)
        return {
            self.parts["base"]: draft.revision,
            self.parts["counter"]: self._counter(draft, editing),
            self.parts["story_file"]: self._story_file(name),
            # The page's own changes come here too, and leave a message that was shown since they were sent.
            **({self.parts["message"]: ""} if draft.revision != base else {}),
        }

    @told
    def set_model(self, name, editing, tab, base, *fields) -> dict:
        project = self.studio.projects.open(name)
        model = fields[FIELDS.index("model")]
        draft = self.studio.set_model(replace(project.load(), revision=base), model)
        self.studio.update(name, draft, tab)
        return self._show(name, editing)

    @told
    def select(self, name: str, scene: str) -> dict:
        return self._show(name, scene)

    @told
    def click_card(self, name: str, event: gr.EventData) -> dict:
        return self._show(name, str(event._data["scene"]))

    @told
    def add(self, name, editing, tab, base, *fields) -> dict:
        draft = self._save(name, editing, tab, base, fields)
        scene = DraftScene()
        self.studio.update(name, draft.insert_scene(len(draft.scenes), scene), tab)
        return self._show(name, scene.id)

    @told
    def insert_clip(self, path, name, editing, tab, base, *fields) -> dict:
        draft = self._save(name, editing, tab, base, fields)
        index = next((i for i, scene in enumerate(draft.scenes) if scene.id == editing), 0)
        draft = self.studio.update(name, self.studio.insert_clip(name, draft, index, path), tab)
        return self._show(name, draft.scenes[index].id)

    @told
    def remove(self, name, editing, tab, base, *fields) -> dict:
        draft = self._save(name, editing, tab, base, fields)
        index = next((i for i, scene in enumerate(draft.scenes) if scene.id == editing), None)
        if index is None:
            raise ValueError("there is no scene to remove")
        draft = self.studio.update(name, draft.remove_scene(index), tab)
        return self._show(name, draft.scenes[min(index, len(draft.scenes) - 1)].id if draft.scenes else None)

    @told
    def generate(self, name, editing, tab, base, *fields) -> dict:
        draft = self._save(name, editing, tab, base, fields)
        self.studio.generate(name)
        return self._started(name, editing, draft)

    @told
    def make(self, name, editing, tab, base, *fields) -> dict:
        return self._make(name, editing, tab, base, fields, following=False)

    @told
    def follow(self, name, editing, tab, base, *fields) -> dict:
        return self._make(name, editing, tab, base, fields, following=True)

    @told
    def cancel(self, name: str) -> dict:
        if job := self.studio.queue.of_project(name):
            self.studio.queue.cancel(job.id)
        return {self.parts["message"]: views.note("It stops after this step.")}

    @told
    def choose(self, name, editing, tab, version) -> dict:
        self.studio.choose(name, editing, version, tab)
        return self._show(name, editing)

    @told
    def film(self, name: str) -> dict:
        files = self.studio.export(name)
        shown = files.get("enlarged", files["film"])
        player = f'<video src="{views.file_url(shown)}" aria-label="The film" controls loop muted style="width:100%"></video>'
        return {
            self.parts["message"]: "",
            self.parts["video"]: player,
            self.parts["film_file"]: gr.update(value=str(files["film"]), visible=True),
            self.parts["sheet"]: gr.update(value=str(files["sheet"]), visible=True),
            self.parts["enlarged"]: gr.update(
                value=str(files["enlarged"]) if "enlarged" in files else None, visible="enlarged" in files
            ),
        }

    @told
    def tick(self, name: str | None, editing: str, drawn: tuple | None) -> dict:
        if not name or (drawn and drawn[:2] != (name, editing)):  # sent before another scene or project was shown
            return {self.parts["drawn"]: drawn}
        view = self.studio.view(name)
        now = self._drawing(view, editing)
        if now == drawn:
            return {self.parts["drawn"]: drawn}
        return self._draw(view, editing)

    def _make(self, name, editing, tab, base, fields, following: bool) -> dict:
        draft = self._save(name, editing, tab, base, fields)
        index = next((i for i, scene in enumerate(draft.scenes) if scene.id == editing), None)
        if index is None:
            raise ValueError("the story has no scenes: add one")
        self.studio.generate(name, [index], following)
        return self._started(name, editing, draft)

    def _started(self, name: str, editing: str, draft: Draft) -> dict:
        """What changes when a generation starts. Fields do not, since a person may be typing on."""
        view = self.studio.view(name)
        return {self.parts["base"]: draft.revision, self.parts["message"]: "", **self._draw(view, editing)}

    def _save(self, name, editing, tab, base, values) -> Draft:
        """Saves what the page holds."""
        if not name:
            raise ValueError("begin with an example or a new project")
        fields = dict(zip(FIELDS, values))
        draft = replace(
            self.studio.projects.open(name).load(),
            revision=base,
            title=fields["title"],
            style=fields["style"],
            negative=fields["negative"],
            cast=parse_cast(fields["cast"]),
            settings={key: fields[key] for key in SETTINGS},
        )
        index = next((i for i, scene in enumerate(draft.scenes) if scene.id == editing), None)
        if index is not None:
            changes = {"prompt": fields["prompt"], "seconds": fields["seconds"] or None, "seed": fields["seed"]}
            draft = draft.with_scene(index, replace(draft.scenes[index], **changes))
        return self.studio.update(name, draft, tab)

    def _show(self, name: str, selected: str | None = None) -> dict:
        """Fills in the whole page."""
        view = self.studio.view(name)
        draft, parts = view.draft, self.parts
        ids = [scene.scene.id for scene in view.scenes]
        selected = selected if selected in ids else (ids[0] if ids else None)
        scene = next((entry.scene for entry in view.scenes if entry.scene.id == selected), DraftScene(id=""))
        choices = [(str(entry.number), entry.scene.id) for entry in view.scenes]
        return {
            parts["project"]: gr.update(choices=list(self.studio.projects), value=name),
            parts["example"]: None,
            parts["title"]: gr.update(value=draft.title, interactive=True),
            parts["style"]: gr.update(value=draft.style, interactive=True),
            parts["negative"]: gr.update(value=draft.negative, interactive=True),
            parts["cast"]: gr.update(
                value="\n".join(f"{actor}: {text}" for actor, text in draft.cast), interactive=True
            ),
            parts["selected"]: gr.update(choices=choices, value=selected),
            parts["editing"]: scene.id,
            parts["prompt"]: gr.update(value=scene.prompt, interactive=bool(ids)),
            parts["seconds"]: scene.seconds,
            parts["seed"]: scene.seed,
            parts["counter"]: self._counter(draft, scene.id),
            parts["base"]: draft.revision,
            parts["message"]: "",
            parts["story_file"]: self._story_file(name),
            **{parts[key]: value for key, value in settings_of(draft).items()},
            **self._draw(view, scene.id),
            **self._no_film(),
        }

    def _empty(self) -> dict:
        """The page without a project."""
        return {
            self.parts["project"]: gr.update(choices=list(self.studio.projects), value=None),
            self.parts["cards"]: views.note("Begin with an example, open a story file, or create a new project."),
        }

    def _draw(self, view: ProjectView, selected: str) -> dict:
        """Draws the job and the scenes."""
        versions = next((scene.versions for scene in view.scenes if scene.scene.id == selected), [])
        chosen = next((scene.chosen for scene in view.scenes if scene.scene.id == selected), None)
        choices = [(views.version_label(version), version.number) for version in versions]
        is_open = view.job is not None and view.job.is_open
        return {
            self.parts["status"]: views.status(view),
            self.parts["cards"]: views.scenes(view, selected, self.studio.engine.find_faults(view.draft)),
            self.parts["version"]: gr.update(
                choices=choices, value=chosen.number if chosen else None, visible=len(versions) > 1
            ),
            self.parts["cancel"]: gr.update(interactive=is_open),
            self.parts["drawn"]: self._drawing(view, selected),
        }

    def _drawing(self, view: ProjectView, selected: str) -> tuple:
        """Project, scene and what else `_draw` would draw of them, to see whether anything changed."""
        previews = [scene.preview and scene.preview.stat().st_mtime_ns for scene in view.scenes]
        chosen = [
            (scene.chosen and scene.chosen.number, len(scene.versions), scene.is_changed) for scene in view.scenes
        ]
        return view.name, selected, repr((view.job and view.job.describe(), view.ahead, previews, chosen))

    def _counter(self, draft: Draft, editing: str) -> str:
        index = next((i for i, scene in enumerate(draft.scenes) if scene.id == editing), None)
        if index is None:
            return ""
        engine, model = self.studio.engine, settings_of(draft)["model"]
        if fault := engine.find_fault(draft, index):
            return views.note(fault, is_fault=True)
        return views.counter(*engine.count_tokens(model, [draft.prompts()[index]]), engine.text_window(model))

    def _story_file(self, name: str):
        path = self.studio.projects.open(name).story_file
        return gr.update(value=str(path) if path else None, interactive=path is not None)

    def _no_film(self) -> dict:
        hidden = {self.parts[key]: gr.update(visible=False) for key in ("film_file", "enlarged", "sheet")}
        return {self.parts["video"]: "", **hidden}


def parse_cast(text: str) -> tuple[tuple[str, str], ...]:
    """Reads a cast, one actor per line, as in "Actor1: a red fox". A line without a colon is an actor without description."""
    lines = [line.partition(":") for line in text.splitlines() if line.strip()]
    return tuple((name.strip(), description.strip()) for name, _, description in lines)


def _connect(page: gr.Blocks, parts: Parts, handlers: Handlers) -> None:
    """Connects the components with the handlers."""
    everything = list({id(part): part for name, part in parts.parts.items() if name != "timer"}.values())
    quiet = {"show_progress": "hidden", "api_visibility": "private"}
    # One at a time, in the order in which the page sent them.
    ordered = {**quiet, "outputs": everything, "concurrency_id": "draft", "concurrency_limit": 1}
    scene = parts.of("project", "editing", "tab", "base", *FIELDS)
    project = parts["project"]

    def remember(event) -> None:
        event.then(None, [project], [project], js=REMEMBER, api_visibility="private")

    page.load(handlers.load, None, **ordered)
    remember(project.input(handlers.open, [project], **ordered))
    remember(parts["new"].click(handlers.new, None, **ordered))
    remember(parts["example"].select(handlers.begin_example, [parts["example"]], **ordered))
    remember(parts["opened"].upload(handlers.open_file, [parts["opened"]], **ordered))
    writing = {**ordered, "concurrency_id": "writer", "show_progress": "minimal", "show_progress_on": parts["write"]}
    remember(parts["write"].click(handlers.write, parts.of("idea", "idea_scenes"), **writing))
    for name in [name for name in FIELDS if name != "model"]:
        # Not `input`, which a text that is pasted does not trigger. The page's own changes are no changes of the draft.
        parts[name].change(handlers.edit, scene, trigger_mode="always_last", **ordered)
    parts["model"].input(handlers.set_model, scene, **ordered)
    parts["selected"].input(handlers.select, parts.of("project", "selected"), **ordered)
    parts["cards"].click(handlers.click_card, [project], **ordered)
    for name in ("add", "remove", "generate", "make", "follow"):
        parts[name].click(getattr(handlers, name), scene, **ordered)
    parts["clip"].upload(handlers.insert_clip, [parts["clip"], *scene], **ordered)
    parts["cancel"].click(handlers.cancel, [project], **ordered)
    parts["version"].input(handlers.choose, parts.of("project", "editing", "tab", "version"), **ordered)
    parts["film"].click(handlers.film, [project], **{**ordered, "concurrency_id": "film"})
    # In order too: a drawing of what was before must not come after one of what is now.
    drawing = parts.of("drawn", "status", "cards", "version", "cancel", "message")
    parts["timer"].tick(handlers.tick, parts.of("project", "editing", "drawn"), **{**ordered, "outputs": drawing})


def _add_api(studio: Studio) -> None:
    """Adds the interface for programs; docs/studio.md shows it."""

    def create(story: str) -> str:
        """Create a project from the text of a story file. Returns its name."""
        return studio.create_from_text(story)

    def generate(project: str, scenes: list[int] | None = None, following: bool = False) -> str:
        """Make scenes, counted from 1; without a list, all that are missing or changed. Returns the id of the job."""
        again = None if scenes is None else [number - 1 for number in scenes]
        return studio.generate(project, again, following).id

    def watch(job: str) -> dict:
        """Return a job's status (waiting, running, done, failed, cancelled or interrupted), progress and message."""
        return studio.queue.get(job).describe()

    def cancel(job: str) -> dict:
        """Cancel a job. Scenes that are done stay."""
        studio.queue.cancel(job)
        return studio.queue.get(job).describe()

    def set_prompt(project: str, scene: int, prompt: str) -> None:
        """Change the prompt of a scene, counted from 1."""
        studio.set_prompt(project, scene - 1, prompt)

    def choose(project: str, scene: int, version: int) -> None:
        """Choose a version of a scene, both counted from 1."""
        studio.choose(project, studio.scene_id(project, scene - 1), version)

    def film(project: str) -> gr.FileData:
        """Put the film together from the chosen versions. Returns the file."""
        return gr.FileData(path=str(studio.export(project)["film"]))

    for function in (create, generate, watch, cancel, set_prompt, choose, film):
        gr.api(_raise_for_programs(function), api_name=function.__name__)


def _raise_for_programs(function: Callable) -> Callable:
    """Passes expected errors on to the caller as one sentence."""

    @wraps(function)
    def wrapped(*arguments, **named):
        try:
            return function(*arguments, **named)
        except EXPECTED as error:
            raise gr.Error(explain(error), print_exception=False) from error

    return wrapped
