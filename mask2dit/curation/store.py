"""Results of stages, stored as JSON lines, so that a run computes only what is missing.

A stage is a generator function. It takes entries and yields each of them, in any order, with the list of entries made from
it: kept ones of the stage's own type, and `Dropped` ones with the rule and the reason. `Workspace.run` calls it with the
entries whose results are not in the stage's file yet, and writes each result as soon as it arrives.
"""

import dataclasses
import logging
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from tqdm import tqdm

from mask2dit.config import parse_shard
from mask2dit.engine.config import EngineConfig
from mask2dit.engine.local import LocalEngine
from mask2dit.engine.open import Engine
from mask2dit.engine.share import Workers
from mask2dit.files import append_line, check_writable, read_lines
from mask2dit.hashing import digest

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """The input or a result of a stage: a film, a scene, a clip, a group."""

    id: str
    """Readable name: the film's path in the folder of films, with the frame range for a part, as in "a/film.mp4#120-310"."""
    source: str
    """The film."""
    key: str = ""
    """Hash of the entry and of the key of the entry it was made from, set by the workspace. It does not include settings, so
    that a result that is the same under other settings is not processed again."""
    not_in_key: ClassVar[tuple[str, ...]] = ()
    """Fields that are left out of the key, since no result of a later stage depends on them. Later entries must not copy
    them: those that are stored would keep the old values."""


@dataclass(frozen=True, kw_only=True)
class Dropped(Entry):
    """An entry that a stage removed."""

    rule: str
    """Name of the rule, by which the funnel counts."""
    why: str
    """The reason, in numbers or as a message."""
    details: dict = field(default_factory=dict)


T = TypeVar("T", bound=Entry)
Results = Generator[tuple[Entry, Sequence[Entry]]]


class Workspace:
    """The output folder of a run.

    Each stage has `stage.jsonl`, or `stage.I-of-N.jsonl` for each part of a shared run, with one line per input entry. Lines
    of other settings stay, and are reused when these settings return.

    Args:
        folder: the output folder.
        shard: i/n, the part of the films that this process takes.
        stages: stages that may compute; the stored results of others are reused.
        engine: runs stages that have workers. None: this process runs all.

    Raises:
        OSError: if the folder is not writable.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        shard: str = "0/1",
        stages: Sequence[str] = (),
        engine: Engine | None = None,
    ):
        self.folder = Path(folder)
        self.engine = engine or LocalEngine(EngineConfig())
        self.index, self.num_shards = parse_shard(shard)
        self.suffix = "" if self.num_shards == 1 else f".{self.index}-of-{self.num_shards}"
        self.stages = stages
        self.funnel: dict[str, dict] = {}
        """By stage: the numbers of entries that went in, were kept, were dropped by each rule, and are not done."""
        check_writable(self.folder)

    def is_mine(self, source: str) -> bool:
        """True if a film belongs to this process's part."""
        return int(digest(source), 16) % self.num_shards == self.index

    def run(
        self,
        stage: str,
        made: type[T],
        entries: Sequence[Entry],
        settings: object,
        process: Callable[..., Results],
        redo: Callable[[T | Dropped], bool] = lambda result: False,
        workers: Workers | None = None,
    ) -> list[T | Dropped]:
        """The results of a stage, in the order of the entries.

        Args:
            stage: the stage's name.
            made: the type of kept results.
            entries: the input.
            settings: everything else that results depend on, as JSON values.
            process: the stage; called with entries that have no results, if any.
            redo: returns True for a stored result that has to be computed again, such as one whose file is missing.
            workers: how the engine's workers run the stage. None: it always runs in this process.

        Raises:
            ValueError: if the stage's file is damaged.
        """
        keys = {entry.key: digest([stage, settings, entry.key]) for entry in entries}
        done = self._read(stage, made, {key: made_from for made_from, key in keys.items()})
        if stage in self.stages:
            done = {key: results for key, results in done.items() if not any(map(redo, results))}
        missing = [entry for entry in entries if keys[entry.key] not in done]
        if missing and stage in self.stages:
            done_now = self.engine.run(stage, process, missing, workers) if workers else process(missing)
            with tqdm(total=len(missing), desc=stage, disable=None) as progress, closing(done_now):
                for entry, results in done_now:
                    key, fields = keys[entry.key], [_fields(result) for result in results]
                    done[key] = [_entry(made, entry.key, record) for record in fields]
                    record = {"key": key, "from": entry.id, "results": fields}
                    append_line(self.folder / f"{stage}{self.suffix}.jsonl", record)
                    progress.update()
        found = [result for entry in entries for result in done.get(keys[entry.key], [])]
        not_done = [entry for entry in entries if keys[entry.key] not in done]
        self.count(stage, len(entries), found, len(not_done))
        _warn_of_lost_films(stage, found, going_on={entry.source for entry in [*kept(found), *not_done]})
        return found

    def count(self, stage: str, num_in: int, results: Sequence[Entry], not_done: int = 0) -> None:
        """Adds a stage to the funnel."""
        dropped = Counter(result.rule for result in results if isinstance(result, Dropped))
        self.funnel[stage] = {"in": num_in, "kept": len(kept(results)), "dropped": dict(dropped), "not done": not_done}

    def _read(self, stage: str, made: type[T], wanted: dict[str, str]) -> dict[str, list[T | Dropped]]:
        """The results of wanted lines, by key, from every part's file.

        Args:
            wanted: the key of the input entry, by the key of the line.
        """

        def parse(record: dict) -> tuple[str, list[T | Dropped]] | None:
            key = record["key"]
            return (
                (key, [_entry(made, wanted[key], result) for result in record["results"]]) if key in wanted else None
            )

        done = {}
        for path in sorted([*self.folder.glob(f"{stage}.jsonl"), *self.folder.glob(f"{stage}.*-of-*.jsonl")]):
            done |= dict(filter(None, read_lines(path, parse)))
        return done


def _warn_of_lost_films(stage: str, results: Sequence[Entry], going_on: set[str]) -> None:
    """Warns of each film of which a stage dropped everything, with one reason per rule."""
    reasons: dict[str, dict[str, list[str]]] = {}
    for result in results:
        if isinstance(result, Dropped) and result.source not in going_on:
            reasons.setdefault(result.source, {}).setdefault(result.rule, []).append(result.why)
    for film, of_rule in reasons.items():
        listed = "; ".join(
            f"{rule}: {why[0]}" + (f" and {len(why) - 1} more" if len(why) > 1 else "")
            for rule, why in of_rule.items()
        )
        logger.warning("%s is left out, since the stage %s dropped all of it: %s", film, stage, listed)


def kept(entries: Iterable[T | Dropped]) -> list[T]:
    """The entries that were not dropped."""
    return [entry for entry in entries if not isinstance(entry, Dropped)]


def _fields(result: Entry) -> dict:
    return {name: value for name, value in dataclasses.asdict(result).items() if name != "key"}


def _entry(made: type[T], made_from: str, fields: dict) -> T | Dropped:
    kind = Dropped if "rule" in fields else made
    hashed = {name: value for name, value in fields.items() if name not in kind.not_in_key}
    return kind(key=digest([made_from, hashed]), **fields)
