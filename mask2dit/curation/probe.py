"""Films and the properties of their files."""

import csv
import io
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mask2dit.curation.store import Dropped, Entry, Workspace
from mask2dit.hashing import digest
from mask2dit.texts import read_text
from mask2dit.video.files import VIDEO_SUFFIXES, is_video, list_files, natural_order
from mask2dit.video.reading import FileReader

# Length of a shot that cannot be read, longer than any gap within a group.
UNKNOWN_SECONDS = 1e6

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
    not_in_key = ("warnings",)  # which are only printed
    warnings: list[str]
    """Differences between its frames and a player's; see `FileReader`."""


def find_films(folder: Path, workspace: Workspace, shots: str | None = None) -> list[Entry]:
    """The video files in this process's part, as `list_videos` finds them. Shots of a film are in order, with the film as
    their source.

    Args:
        folder: the folder of films.
        workspace: the output folder.
        shots: as in `CurationConfig`.

    Raises:
        FileNotFoundError: if there is no such folder, or no such list.
        ValueError: if there is no video in it, one is in the output folder, or the list is faulty.
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
    sources = {path.relative_to(folder).as_posix(): path.relative_to(folder).as_posix() for path in films}
    if shots == "folder":
        in_order = sorted(sources, key=lambda name: (Path(name).parent.as_posix(), natural_order(Path(name))))
        sources = {name: _folder_name(name, folder) for name in in_order}
    elif shots is not None:
        sources = read_shots(Path(shots), folder)
    entries = []
    for name, source in sources.items():
        if workspace.is_mine(source):
            status = (folder / name).stat()
            key = digest([name, status.st_size, status.st_mtime_ns, *([source] if shots else [])])
            entries.append(Entry(id=name, source=source, key=key))
    return entries


def _folder_name(name: str, folder: Path) -> str:
    parent = Path(name).parent.as_posix()
    return folder.resolve().name if parent == "." else parent


def read_shots(path: Path, folder: Path) -> dict[str, str]:
    """The film of each shot, by the shot's path in `folder`, in the order of a list.

    Raises:
        FileNotFoundError: if there is no such list.
        ValueError: if a column or a shot is missing, or a shot is listed twice.
    """
    reader = csv.DictReader(io.StringIO(read_text(path, "list of shots"), newline=""))
    if missing := [name for name in ("film", "path") if name not in (reader.fieldnames or ())]:
        raise ValueError(f"{path} has no column {missing[0]!r}: its first line has to name film and path")
    found: dict[str, str] = {}
    for number, record in enumerate(reader, start=1):
        name = Path(record["path"] or "").as_posix()
        if not record["film"] or not (folder / name).is_file():
            raise ValueError(f"{path}, row {number}: there is no film, or no shot {str(folder / name)!r}")
        if name in found:
            raise ValueError(f"{path}, row {number}: {name} is listed twice")
        found[name] = record["film"]
    return found


def shot_times(films: Iterable[Film | Dropped]) -> dict[str, float]:
    """When each shot begins in its film, in seconds, by the shot's file. Unreadable shots count as a long time."""
    ends: dict[str, float] = {}
    times = {}
    for shot in films:
        times[shot.id] = ends.get(shot.source, 0.0)
        ends[shot.source] = times[shot.id] + (UNKNOWN_SECONDS if isinstance(shot, Dropped) else shot.seconds)
    return times


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
