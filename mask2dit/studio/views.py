"""The parts of the page that are drawn rather than filled in: progress, scenes and vocabulary, as HTML.

Everything that a person typed is escaped.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from mask2dit.storyworld import world
from mask2dit.studio.actions import ProjectView, SceneView
from mask2dit.studio.jobs import CANCELLED, DONE, FAILED, INTERRUPTED, RUNNING, WAITING
from mask2dit.studio.project import Version

FILES = "/gradio_api/file="
MOST_PLAYED = 12  # scenes that play by themselves
SMALL = 256  # pixels; smaller clips are shown with visible pixels

CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; padding: 12px 16px 48px !important; }
.studio-line .html-container { padding: 0 4px !important; }
.block.studio-line:not(:has([role="status"])) { display: none; }
.studio-bar { height: 8px; border-radius: 4px; background: var(--neutral-200); overflow: hidden; margin: 8px 0 4px; }
.dark .studio-bar { background: var(--neutral-700); }
.studio-bar > div { height: 100%; background: var(--primary-600); transition: width 0.4s; }
.studio-status { font-size: 14px; min-height: 20px; overflow-wrap: anywhere; }
.studio-fault { color: #b3261e; font-size: 14px; overflow-wrap: anywhere; }
.dark .studio-fault { color: #ffb4ab; }
.studio-note { color: var(--body-text-color-subdued); font-size: 13px; }
.studio-scenes { display: grid; grid-template-columns: repeat(auto-fill, minmax(158px, 1fr)); gap: 12px; }
.studio-scene { border: 1px solid var(--border-color-primary); border-radius: 10px; overflow: hidden; display: flex;
  flex-direction: column; background: var(--background-fill-primary); }
.studio-scene.is-selected { border-color: var(--primary-600); box-shadow: 0 0 0 1px var(--primary-600); }
.studio-scene video, .studio-scene img, .studio-empty { width: 100%; aspect-ratio: var(--shape, 1.5); display: block;
  background: var(--neutral-100); object-fit: contain; }
.dark .studio-empty, .dark .studio-scene video { background: var(--neutral-800); }
.studio-empty { display: flex; align-items: center; justify-content: center; color: var(--body-text-color-subdued);
  font-size: 13px; text-align: center; padding: 8px; box-sizing: border-box; }
.is-small video, .is-small img { image-rendering: pixelated; }
.studio-scene > div { padding: 8px 10px 10px; display: flex; flex-direction: column; gap: 4px; flex: 1; }
.studio-scene h3 { margin: 0; font-size: 14px; font-weight: 600; display: flex; gap: 6px; align-items: center;
  flex-wrap: wrap; }
.studio-scene p { margin: 0; font-size: 13px; line-height: 1.4; overflow-wrap: anywhere; }
.studio-tag { font-size: 11px; font-weight: 500; padding: 1px 6px; border-radius: 8px; background: var(--neutral-200);
  color: var(--neutral-800); }
.studio-scene button { align-self: flex-start; margin-top: auto; padding: 4px 12px; border-radius: 6px; font-size: 13px;
  border: 1px solid var(--border-color-primary); background: var(--button-secondary-background-fill);
  color: var(--button-secondary-text-color); cursor: pointer; }
.studio-scene button:focus-visible { outline: 2px solid var(--primary-600); outline-offset: 1px; }
.studio-words td, .studio-words th { padding: 2px 12px 2px 0; vertical-align: top; text-align: left; font-size: 13px; }
footer { display: none !important; }
@media (max-width: 640px) { .gradio-container main { padding: 8px !important; } }
"""


def status(view: ProjectView) -> str:
    """Draws the state of the project's job."""
    job = view.job
    if job is None:
        return f'<div class="studio-status" role="status">{escape(_estimate(view))}</div>'
    texts = {
        WAITING: f"Waiting: {view.ahead} {'generation is' if view.ahead == 1 else 'generations are'} before this one.",
        RUNNING: _running(job),
        DONE: f"Done: {_scenes(job.finished)} in {_seconds((job.ended_at or 0) - (job.started_at or 0))}. {_estimate(view)}",
        CANCELLED: f"Cancelled. {_kept(job.finished)}",
        FAILED: job.message,
        INTERRUPTED: f"Interrupted: {job.message}. {_kept(job.finished)}",
    }
    kind = "studio-fault" if job.status == FAILED else "studio-status"
    bar = ""
    if job.is_open:
        percent = round(100 * job.progress)
        bar = (
            f'<div class="studio-bar" role="progressbar" aria-label="Generation" aria-valuemin="0" aria-valuemax="100" '
            f'aria-valuenow="{percent}"><div style="width:{percent}%"></div></div>'
        )
    return f'{bar}<div class="{kind}" role="status" data-status="{job.status}">{escape(texts[job.status])}</div>'


def scenes(view: ProjectView, selected: str, faults: Sequence[str]) -> str:
    """Draws all scenes as cards, with the clips of the chosen versions."""
    making = view.job.making if view.job and view.job.is_open else ()
    cards = []
    for scene, fault in zip(view.scenes, faults):
        classes = ["studio-scene"]
        if scene.scene.id == selected:
            classes.append("is-selected")
        if scene.chosen and min(scene.chosen.record["size"]) < SMALL:
            classes.append("is-small")
        cards.append(
            f'<article class="{" ".join(classes)}" aria-label="Scene {scene.number}"{_shape(scene)}>'
            + _picture(scene, scene.number in making, len(view.scenes) <= MOST_PLAYED)
            + f"<div><h3>Scene {scene.number}{_tags(scene, making)}</h3>"
            f"<p>{escape(scene.scene.prompt) or '<em>no prompt yet</em>'}</p>"
            f'<p class="studio-note">{escape(_facts(scene))}</p>'
            + (f'<p class="studio-fault">{escape(fault)}</p>' if fault else "")
            + f'<button type="button" data-scene="{scene.scene.id}">Edit scene {scene.number}</button></div></article>'
        )
    if not cards:
        return '<p class="studio-note">The story has no scenes yet: add one.</p>'
    return f'<div class="studio-scenes">{"".join(cards)}</div>'


def counter(tokens: int, window: int) -> str:
    """Draws how much of the text window a prompt takes."""
    if tokens > window:
        return (
            f'<div class="studio-fault" role="status">{tokens} of {window} tokens with descriptions and style: the last '
            f"{tokens - window} are cut off</div>"
        )
    return f'<div class="studio-note" role="status">{tokens} of {window} tokens, with descriptions and style</div>'


def note(text: str, is_fault: bool = False) -> str:
    """Draws a sentence."""
    return f'<div class="{"studio-fault" if is_fault else "studio-note"}" role="status">{escape(text)}</div>'


def vocabulary() -> str:
    """Draws what prompts for the small world's model can say."""
    worn = _or(text for text in world.ACCESSORIES.values() if text)
    rows = {
        "Looks": f"{_or(world.COLOURS)}; {_or(world.SHAPES)}; {worn}",
        "Actions": _or(world.ACTIONS),
        "Two together": _or(world.JOINT_ACTIONS),
        "Settings": _or(phrase for phrases in world.SETTINGS.values() for phrase in phrases),
        "Example of a cast": "Actor1: red circle, wearing a scarf",
        "Example of a scene": "Actor1 moves right along the beach.",
    }
    lines = "".join(f"<tr><th scope='row'>{name}</th><td>{escape(text)}</td></tr>" for name, text in rows.items())
    return f'<table class="studio-words">{lines}</table>'


def version_label(version: Version) -> str:
    """Names a version in a choice."""
    text, seed = version.record["text"], version.record["seed"]
    shown = text if len(text) <= 50 else f"{text[:48]}…"
    return f"Version {version.number}: {shown}" + (f" (seed {seed})" if seed is not None else "")


def file_url(path: Path) -> str:
    """Returns the address at which the page fetches a file of a project."""
    return FILES + quote(str(path))


def _or(words) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}"


def _running(job) -> str:
    if not job.making:
        return "Loading the model, or decoding …" if not job.finished else f"{_scenes(job.finished)} done …"
    steps = f", step {job.step} of {job.num_steps}" if job.num_steps else ""
    return f"Making {_scenes(job.making)}{steps}"


def _scenes(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return f"scene {numbers[0]}"
    return f"scenes {', '.join(map(str, numbers[:-1]))} and {numbers[-1]}" if numbers else "no scene"


def _kept(finished: Sequence[int]) -> str:
    if not finished:
        return "No scene was done yet."
    return f"{_scenes(finished).capitalize()} {'is' if len(finished) == 1 else 'are'} kept."


def _estimate(view: ProjectView) -> str:
    missing = sum(scene.chosen is None or scene.is_changed for scene in view.scenes)
    if not missing:
        return ""
    about = f", about {_seconds(missing * view.seconds_per_scene)} as before" if view.seconds_per_scene else ""
    return f"{missing} {'scene' if missing == 1 else 'scenes'} to make{about}."


def _seconds(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _shape(scene: SceneView) -> str:
    if scene.chosen is None:
        return ""
    height, width = scene.chosen.record["size"]
    return f' style="--shape: {width / height:.3f}"'


def _picture(scene: SceneView, is_making: bool, is_played: bool) -> str:
    if is_making and scene.preview:
        address = f"{file_url(scene.preview)}?at={scene.preview.stat().st_mtime_ns}"
        return f'<img src="{address}" alt="Preview of scene {scene.number}">'
    if is_making or scene.chosen is None:
        return f'<div class="studio-empty">{"being made …" if is_making else "not made yet"}</div>'
    label = f"Scene {scene.number}, version {scene.chosen.number}"
    plays = "autoplay" if is_played else ""
    return (
        f'<video src="{file_url(scene.chosen.clip)}" aria-label="{label}" controls loop muted playsinline {plays} '
        'preload="metadata"></video>'
    )


def _tags(scene: SceneView, making: Sequence[int]) -> str:
    tags = []
    if scene.scene.video:
        tags.append("own clip")
    if scene.number in making:
        tags.append("being made")
    elif scene.is_changed:
        tags.append("prompt changed")
    return "".join(f'<span class="studio-tag">{tag}</span>' for tag in tags)


def _facts(scene: SceneView) -> str:
    if scene.chosen is None:
        return ""
    record = scene.chosen.record
    seed = f"seed {record['seed']}, " if record["seed"] is not None else ""
    length = record["num_frames"] / record["fps"]
    versions = f"version {scene.chosen.number} of {len(scene.versions)}, " if len(scene.versions) > 1 else ""
    return f"{versions}{seed}{length:.3g} s long, made in {_seconds(record['seconds'])}"
