"""Films and the properties of their files."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mask2dit.curation.store import Dropped, Entry, Workspace
from mask2dit.hashing import digest
from mask2dit.video.files import VIDEO_SUFFIXES, is_video, list_files
from mask2dit.video.reading import FileReader

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Film(Entry):
    """A readable video file. Sizes are as displayed: upright, in square pixels."""

    width: int
    height: int
    fps: float
    """Frame rate; the average if it varies."""
    seconds: float
    codec: str
    warnings: list[str]
    """Differences between its frames and a player's; see `FileReader`."""


def find_films(folder: Path, workspace: Workspace) -> list[Entry]:
    """The video files in this process's part, as `list_videos` finds them.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no video in it, or one is in the output folder.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder of films {str(folder)!r}")
    files = list_files(folder)
    films = [path for path in files if is_video(path)]
    if not films:
        raise ValueError(f"there is no video in {str(folder)!r}; looked at are {', '.join(sorted(VIDEO_SUFFIXES))}")
    output = workspace.folder.resolve()
    for path in films:
        if path.resolve().is_relative_to(output):
            raise ValueError(
                f"{path} links into output={str(workspace.folder)!r}, whose clips are not films: remove the link"
            )
    if others := Counter(path.suffix for path in files if not is_video(path)):
        listed = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in others.most_common())
        logger.info("Files that are not videos by their suffix: %s", listed)
    entries = []
    for path in films:
        name, status = path.relative_to(folder).as_posix(), path.stat()
        if workspace.is_mine(name):
            entries.append(Entry(id=name, source=name, key=digest([name, status.st_size, status.st_mtime_ns])))
    return entries


def probe(entries: Iterable[Entry], folder: Path) -> Iterator[tuple[Entry, list[Film | Dropped]]]:
    """Opens each file as later stages do. Drops unreadable files with the reason."""
    for entry in entries:
        if any("\ud800" <= character <= "\udfff" for character in entry.id):
            why = "its name is not UTF-8, which manifests are written in: rename it"
            yield entry, [Dropped(id=entry.id, source=entry.source, rule="unreadable", why=why)]
            continue
        try:
            reader = FileReader(folder / entry.id)
        except (OSError, ValueError) as error:
            yield entry, [Dropped(id=entry.id, source=entry.source, rule="unreadable", why=str(error))]
            continue
        film = Film(
            id=entry.id,
            source=entry.source,
            width=reader.width,
            height=reader.height,
            fps=reader.fps,
            seconds=round(reader.num_frames / reader.fps, 3),
            codec=reader.codec,
            warnings=list(reader.warnings),
        )
        yield entry, [film]
