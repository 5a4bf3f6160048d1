"""The video files of a folder."""

import logging
import os
import re
from collections import deque
from pathlib import Path

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    [
        ".3gp",
        ".avi",
        ".flv",
        ".m2ts",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".mts",
        ".ogv",
        ".ts",
        ".webm",
        ".wmv",
    ]
)  # lower case


def is_video(path: Path) -> bool:
    """True if a file has a video suffix and is not hidden, unlike macOS's "._a.mp4"."""
    return path.suffix.lower() in VIDEO_SUFFIXES and not path.name.startswith(".")


def natural_order(path: Path) -> tuple:
    """A sorting key by which shot_2 comes before shot_10."""
    parts = re.split(r"(\d+)", path.as_posix())
    return tuple(int(part) if i % 2 else part for i, part in enumerate(parts)), path.as_posix()


def list_videos(folder: str | os.PathLike) -> list[Path]:
    """The videos in a folder and its subfolders, sorted; see `is_video` and `list_files`."""
    return [path for path in list_files(folder) if is_video(path)]


def list_files(folder: str | os.PathLike) -> list[Path]:
    """The files in a folder and its subfolders, sorted, without hidden files and the contents of hidden folders.

    Links to files and folders are followed. A folder that is reachable by several paths is listed once, by a path without
    links if there is one. Dead links and unreadable folders are skipped with a warning.

    Raises:
        OSError: if the folder itself cannot be read.
    """
    files: list[Path] = []
    seen = set()
    waiting = deque([Path(folder)])
    while waiting:
        current = waiting.popleft()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            if current == Path(folder):
                raise
            logger.warning("%s is left out: %s", current, error.strerror)
            continue
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = current / entry.name
            if path.is_file():
                files.append(path)
            elif not path.is_dir():
                if entry.is_symlink():
                    logger.warning("%s is left out: it is a dead link to %s", path, os.readlink(path))
            elif entry.is_symlink():
                waiting.append(path)  # last, since the link may point to one of the other folders
            else:
                waiting.appendleft(path)
    return sorted(files)
