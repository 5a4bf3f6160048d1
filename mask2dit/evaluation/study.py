"""A blind user study of several runs: `python -m mask2dit.evaluation.study runs=[…] output=…` writes its page, and with
`answers=[…]` the tally of the answers.

The page shows the videos of a story side by side, in shuffled order and under neutral names. `key.json` maps names to runs;
do not send it to participants. The browser stores answers per study, so that they survive a reload.
"""

import json
import logging
import random
import shutil
import sys
from pathlib import Path

from mask2dit import cli
from mask2dit.evaluation.config import LETTERS, StudyConfig
from mask2dit.files import check_writable, write_text
from mask2dit.hashing import digest, fingerprint
from mask2dit.reporting.pages import render
from mask2dit.reporting.tables import markdown_table
from mask2dit.texts import parse_json, read_text

logger = logging.getLogger(__name__)

KEY = "key.json"
QUESTIONS = {
    "visual_consistency": "In which video do characters and places stay the same most from scene to scene?",
    "semantic_consistency": "Which video follows its texts best?",
    "quality": "Which video has the best pictures and motion?",
    "overall": "Which video is best overall?",
}


def study(config: StudyConfig) -> None:
    """Writes the page, or the tally of the answers."""
    path = tally(config) if config.answers else write_study(config)
    logger.info("Wrote %s", path)


def write_study(config: StudyConfig) -> Path:
    """Writes `index.html`, the videos and `key.json`.

    Raises:
        FileNotFoundError, ValueError: if a run has no results, or the runs share no story with the same prompts.
        FileExistsError: if the folder holds another study.
    """
    # Imported here, since a tally does not need torch.
    from mask2dit.evaluation.results import Results, shared_stories

    runs = [Results.read(folder) for folder in config.runs]
    names = [run.name for run in runs]
    if len(set(names)) < len(names):
        raise ValueError(f"two runs have the same name, so that votes could not be told apart: {', '.join(names)}")
    videos = [{story.name: story for story in run.stories} for run in runs]
    shared = sorted(shared_stories(runs))
    if not shared:
        raise ValueError(f"the runs {', '.join(names)} share no story with the same prompts")
    folder = Path(config.output)
    check_writable(folder / "videos")
    chance = random.Random(config.seed)
    chosen = chance.sample(shared, min(config.num_stories, len(shared)))

    key, items, sources = {}, [], {}
    for number, story in enumerate(chosen):
        order = chance.sample(range(len(runs)), len(runs))
        key[story] = [names[run] for run in order]
        clips = []
        for place, run in enumerate(order):
            clips.append(f"videos/{number:03d}{LETTERS[place].lower()}.mp4")
            sources[clips[-1]] = videos[run][story].video
        items.append({"name": story, "clips": clips, "prompts": videos[0][story].prompts})
    # The name depends on all that is shown: the same stories from other runs are another study.
    name = f"study-{digest([key, items, [fingerprint(source) for source in sources.values()]])}"
    if (folder / KEY).exists() and (kept := _read_of_study(folder / KEY, "runs")[0]) != name:
        raise FileExistsError(
            f"{str(folder)!r} holds {kept}, whose answers are counted with its {KEY}: choose another output for this study"
        )
    for clip, source in sources.items():
        shutil.copyfile(source, folder / clip)
    page = render(
        "study.html",
        title="Study",
        study=name,
        stories=items,
        questions=QUESTIONS,
        letters=LETTERS,
    )
    write_text(folder / "index.html", page)
    write_text(folder / KEY, json.dumps({"study": name, "runs": key}, indent=2) + "\n")
    return folder / "index.html"


def tally(config: StudyConfig) -> Path:
    """Counts votes by run and writes `tally.md` and `tally.json`.

    Raises:
        FileNotFoundError, ValueError: if the key or a file of answers is missing or does not fit, or the answers belong to
            another study.
    """
    folder = Path(config.output)
    name, key = _read_of_study(folder / KEY, "runs")
    runs = sorted({run for order in key.values() for run in order})
    votes = {question: dict.fromkeys(runs, 0) for question in QUESTIONS}
    for file in config.answers:
        answered, answers = _read_of_study(Path(file), "answers")
        if answered != name:
            raise ValueError(
                f"{file} holds answers to {answered}, but {folder / KEY} is of {name}: name the folder of {answered} "
                "as output, or write that study again from its runs, stories and seed"
            )
        for answer, place in answers.items():
            story, _, question = answer.rpartition(" ")
            if story not in key or question not in QUESTIONS or place not in range(len(key[story])):
                raise ValueError(f"{file}: {answer!r} with {place!r} is not an answer to the study in {str(folder)!r}")
            votes[question][key[story][place]] += 1
    rows = []
    for question, counts in votes.items():
        total = sum(counts.values()) or 1
        shares = [f"{100 * counts[run] / total:.1f}% ({counts[run]})" for run in runs]
        rows.append([question.replace("_", " "), *shares])
    text = f"{len(config.answers)} people, {len(key)} stories\n\n{markdown_table(['', *runs], rows)}\n"
    write_text(folder / "tally.json", json.dumps(votes, indent=2) + "\n")
    write_text(folder / "tally.md", text)
    return folder / "tally.md"


def _read_of_study(path: Path, part: str) -> tuple[str, dict]:
    """The study that a file names, and the part of it that the file holds."""
    try:
        content = parse_json(read_text(path, "file of answers or their key"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    name, held = (content.get(key) for key in ("study", part)) if isinstance(content, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(held, dict):
        raise ValueError(f'{path} has to hold {{"study": NAME, "{part}": {{…}}}}, as the study or its page writes it')
    return name, held


if __name__ == "__main__":
    sys.exit(cli.run("study", sys.argv[1:]))
