"""Files of stories: reading with the line of every fault, and writing."""

import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
import yaml.reader

from mask2dit.files import write_text
from mask2dit.stories.importers import from_text, import_story
from mask2dit.stories.story import Place, Story, describe_place, file_name, find_faults, story_from
from mask2dit.texts import find_encoding_fault, parse_json, read_text

MAX_VALUES = 100_000  # in one file; aliases can make a few lines of YAML hold billions
NULL = "tag:yaml.org,2002:null"
TEXT_KEYS = {"title", "style", "negative", "prompt", "video"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault of a story file."""

    message: str
    line: int | None = None
    """Line in the file, from 1; None: unknown."""
    where: str = ""
    """Part of the story, such as "scene 3"; empty: the file."""
    is_warning: bool = False
    """True if the story can be generated all the same."""

    def __str__(self) -> str:
        return f"{self.where}: {self.message}" if self.where else self.message


class StoryError(ValueError):
    """A file of stories is faulty. The message is the first fault, and says how many more there are.

    Attributes:
        path: the file.
        faults: all faults, in the order of the file.
    """

    def __init__(self, path: str | os.PathLike, faults: Sequence[Fault]):
        first = faults[0]
        line = "" if first.line is None else f":{first.line}"
        more = f" (and {len(faults) - 1} more: `mask2dit check {path}` lists them)" if len(faults) > 1 else ""
        super().__init__(f"{path}{line}: {first}{more}")
        self.path, self.faults = Path(path), tuple(faults)


@dataclass(frozen=True, kw_only=True)
class StoryFile:
    """The content of a story file."""

    path: Path
    records: list[tuple[Place, object]]
    """The record of each story, and its place in the file."""
    lines: dict[Place, int] = field(default_factory=dict)
    """Line of each value, by its place."""
    faults: list[Fault] = field(default_factory=list)
    """Faults of the file's form, such as a key that is there twice."""

    def line(self, *place: str | int) -> int | None:
        """Line of a value, or of the nearest one around it."""
        while place and place not in self.lines:
            place = place[:-1]
        return self.lines.get(place)

    def find_faults(self) -> list[Fault]:
        """Finds every fault of the file and its stories."""
        faults = list(self.faults)
        names: set[str] = set()
        for number, (prefix, record) in enumerate(self.records, start=1):
            for place, message in find_faults(record):
                where = describe_place(place)
                if len(self.records) > 1 or prefix:
                    where = f"story {number}, {where}"
                faults.append(Fault(message=message, line=self.line(*prefix, *place), where=where))
            title = record.get("title") if isinstance(record, dict) else None
            name = file_name(title) if isinstance(title, str) else ""
            if name and name in names:
                message = f"several stories are named {name!r}: give each its own title"
                faults.append(Fault(message=message, line=self.line(*prefix, "title"), where=f"story {number}"))
            names.add(name)
        return sorted(faults, key=lambda fault: fault.line or 0)

    def stories(self) -> list[Story]:
        """Builds the stories. Raises `StoryError` if anything is faulty."""
        if faults := self.find_faults():
            raise StoryError(self.path, faults)
        return [story_from(record) for _, record in self.records]


def read_story(path: str | os.PathLike) -> Story:
    """Reads a file with one story.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        StoryError: if it is not a story file, or faulty; all faults are in `faults`.
    """
    stories = read_stories(path)
    if len(stories) > 1:
        titles = ", ".join(repr(story.title) for story in stories[:3])
        raise ValueError(
            f"{path} holds {len(stories)} stories ({titles}, …): put the one to use into a file of its own"
        )
    return stories[0]


def read_stories(path: str | os.PathLike) -> list[Story]:
    """Reads a file with one story, or with a list of them under the key `stories`.

    Also reads the forms of `mask2dit.stories.importers`, among them a fine-tuning manifest such as `sft.json`.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        StoryError: if it is not such a file, a story is faulty, or two stories have the same name.
    """
    return load_story_file(path).stories()


def write_story(path: str | os.PathLike, story: Story) -> None:
    """Writes a story in the form that `read_story` reads."""
    write_text(path, _as_yaml(story.record()))


def write_stories(path: str | os.PathLike, stories: Sequence[Story], header: str = "") -> None:
    """Writes stories in the form that `read_stories` reads, below a header of comment lines."""
    write_text(path, header + _as_yaml({"stories": [story.record() for story in stories]}))


def _as_yaml(record: dict) -> str:
    text = yaml.safe_dump(record, sort_keys=False, allow_unicode=True, width=118)
    # Line breaks of other systems, such as U+0085, are lost unless they are escaped.
    is_whole = yaml.safe_load(text) == record
    return text if is_whole else yaml.safe_dump(record, sort_keys=False, width=118)


def is_story_file(path: str | os.PathLike, config_keys: Collection[str]) -> bool:
    """Tells whether a file is for stories, by its suffix or what it holds.

    Texts are, and YAML files unless they are a configuration. JSON files are unless they hold a list, as manifests do.

    Args:
        path: the file; it may be missing.
        config_keys: keys that a configuration may have.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix in (".txt", ".md") or (suffix in (".yaml", ".yml") and not path.is_file()):
        return True
    if suffix not in (".yaml", ".yml", ".json") or not path.is_file():
        return False
    try:
        text = read_text(path, "story file")
        content = parse_json(text) if suffix == ".json" else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return suffix != ".json"
    if suffix == ".json":
        return isinstance(content, dict)
    return not (isinstance(content, dict) and content and content.keys() <= set(config_keys) - {"seed"})


def load_story_file(path: str | os.PathLike) -> StoryFile:
    """Reads a file of stories without checking them.

    Raises:
        FileNotFoundError, IsADirectoryError: if there is no such file.
        StoryError: if it is not YAML or JSON, or does not hold stories.
    """
    path = Path(path)
    text = read_text(path, "story file")
    if not text.strip():
        raise StoryError(path, [Fault(message="the file is empty: a story has a title and scenes", line=1)])
    title = path.stem.replace("_", " ").strip() or path.name
    if path.suffix.lower() in (".txt", ".md"):
        record, starts = from_text(text, title)
        lines: dict[Place, int] = {("scenes", index): line for index, line in enumerate(starts)}
        return StoryFile(path=path, records=[((), record)], lines=lines)
    if path.suffix.lower() == ".json":
        # A YAML parser misreads some JSON: "\ud83c\udf82" as two halves of a character.
        try:
            content = parse_json(text)
        except ValueError as error:
            message = f"this is not JSON: {' '.join(str(error).split())}"
            raise StoryError(path, [Fault(message=message, line=getattr(error, "lineno", None))]) from error
        lines, faults = _json_lines(text), []
    else:
        content, lines, faults = _parse_yaml(path, text)
    file = StoryFile(path=path, records=_records(content, title), lines=lines, faults=faults)
    if not file.records:
        message = "the file has to hold a story with a title and scenes, or a list of stories under the key 'stories'"
        raise StoryError(path, [Fault(message=message, line=1)])
    return file


def _records(content: object, title: str) -> list[tuple[Place, object]]:
    """Returns the record of each story in a file, and its place."""
    if isinstance(content, list):
        found = [((index,), record) for index, record in enumerate(content)]
    elif isinstance(content, dict) and "stories" in content and "scenes" not in content:
        stories = content["stories"]
        found = [(("stories", i), record) for i, record in enumerate(stories)] if isinstance(stories, list) else []
    else:
        found = [((), content)] if isinstance(content, dict) else []
    return [(place, import_story(record, title) or record) for place, record in found]


def _parse_yaml(path: Path, text: str) -> tuple[object, dict[Place, int], list[Fault]]:
    """Parses YAML into values, their lines and the faults of its form.

    Texts are taken literally: a prompt or a title may be `007` or `yes`.
    """
    for number, line in enumerate(text.splitlines(), start=1):
        if wrong := find_encoding_fault(line):
            raise StoryError(path, [Fault(message=f"the text {wrong}", line=number)])
    try:
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = None if mark is None else mark.line + 1
        raise StoryError(path, [Fault(message=_explain(error), line=line)]) from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position if isinstance(error.position, int) else 0) + 1
        code = error.character if isinstance(error.character, int) else ord(error.character)
        message = f"the file holds the control character U+{code:04X}, so it is not a text"
        raise StoryError(path, [Fault(message=message, line=line)]) from error
    except RecursionError as error:
        raise StoryError(path, [Fault(message="this is not YAML: it is nested too deeply")]) from error
    lines: dict[Place, int] = {}
    faults: list[Fault] = []
    try:
        content = _Values(lines, faults).of(root, (), False) if root else None
    except RecursionError as error:
        raise StoryError(path, [Fault(message="this is not YAML: it is nested too deeply")]) from error
    except ValueError as error:
        raise StoryError(path, [Fault(message=str(error))]) from error
    return content, lines, faults


def _json_lines(text: str) -> dict[Place, int]:
    """Returns the lines of the values in a JSON text, as far as a YAML parser reads it; nothing if it does not."""
    lines: dict[Place, int] = {}
    try:
        if root := yaml.compose(text.replace("\t", " "), yaml.SafeLoader):
            _Values(lines, []).of(root, (), True)
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}
    return lines


class _Values:
    """Builds the values of YAML nodes, and notes their lines and faults."""

    def __init__(self, lines: dict[Place, int], faults: list[Fault]):
        self.lines, self.faults, self.count = lines, faults, 0

    def of(self, node: yaml.Node, place: Place, is_text: bool) -> object:
        self.count += 1
        if self.count > MAX_VALUES:
            raise ValueError(f"the file holds more than {MAX_VALUES} values, or an alias that contains itself")
        self.lines[place] = node.start_mark.line + 1
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, place)
        if isinstance(node, yaml.SequenceNode):
            of_scenes = place[-1:] == ("scenes",)
            return [self.of(item, (*place, index), of_scenes) for index, item in enumerate(node.value)]
        if is_text and node.tag != NULL:
            return node.value
        try:
            return yaml.SafeLoader("").construct_object(node)
        except (yaml.YAMLError, ValueError):  # a tag that is unknown, or a date such as 2024-13-01
            return node.value

    def _mapping(self, node: yaml.MappingNode, place: Place) -> dict:
        values: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = str(key_node.value) if isinstance(key_node, yaml.ScalarNode) else "a key that is not a text"
            line = key_node.start_mark.line + 1
            if key in values:
                where = describe_place(place) if place else ""
                self.faults.append(Fault(message=f"the key {key!r} is there twice", line=line, where=where))
            values[key] = self.of(value_node, (*place, key), key in TEXT_KEYS or place[-1:] == ("cast",))
            self.lines[(*place, key)] = line
        return values


def _explain(error: yaml.MarkedYAMLError) -> str:
    """Explains in one sentence why a text is not YAML."""
    problem = " ".join(str(error.problem).split())
    if "'\\t'" in problem:
        return "a line begins with a tab: YAML is indented with spaces"
    if "mapping values are not allowed" in problem:
        return "a colon within a text: put quotes around the text"
    return f"this is not YAML: {problem}"
