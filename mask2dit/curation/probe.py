"""Films and what their files say of themselves, by PyAV."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from mask2dit.curation.optional import import_optional
from mask2dit.curation.store import Dropped, Entry, Workspace
from mask2dit.hashing import digest
from mask2dit.video.files import VIDEO_SUFFIXES, is_video, list_files

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Film(Entry):
    """A video file that plays. Sizes are as shown: a rotation is applied."""

    width: int
    height: int
    fps: float
    seconds: float | None
    """None where the file does not say."""
    codec: str
    rotation: int
    """Degrees, by which a player turns the stored picture."""


def find_films(folder: Path, workspace: Workspace) -> list[Entry]:
    """The video files of this process's part, as `list_videos` finds them.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if there is no video in it, or one lies in the folder of the run.
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
    """Opens each file and decodes its first frame. What cannot be read is dropped with the reason."""
    av = import_optional("av")
    for entry in entries:
        if any("\ud800" <= character <= "\udfff" for character in entry.id):
            why = "its name is not UTF-8, which manifests are written in: rename it"
            yield entry, [Dropped(id=entry.id, source=entry.source, rule="unreadable", why=why)]
            continue
        try:
            # Absolute, or FFmpeg takes a folder with a colon in its name for a protocol.
            with av.open(str((folder / entry.id).absolute())) as container:
                stream = container.streams.video[0]
                frame = next(container.decode(stream))
                seconds = stream.duration * stream.time_base if stream.duration else None
                if seconds is None and container.duration:
                    seconds = container.duration / av.time_base
                turned = frame.rotation % 180 != 0
                film = Film(
                    id=entry.id,
                    source=entry.source,
                    width=frame.height if turned else frame.width,
                    height=frame.width if turned else frame.height,
                    fps=float(stream.average_rate),
                    seconds=None if seconds is None else round(float(seconds), 3),
                    codec=stream.codec_context.name,
                    rotation=frame.rotation,
                )
            yield entry, [film]
        except (av.FFmpegError, OSError, IndexError, StopIteration, TypeError) as error:
            # IndexError: no video stream; StopIteration: no frame; TypeError: no frame rate.
            reasons = {IndexError: "no video in it", StopIteration: "no frame in it", TypeError: "no frame rate"}
            why = reasons.get(type(error)) or getattr(error, "strerror", None) or str(error)
            yield entry, [Dropped(id=entry.id, source=entry.source, rule="unreadable", why=why)]
