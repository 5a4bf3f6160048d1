"""A list of clips that could not be read, with reasons; too many of them are an error."""

import logging
import os
from pathlib import Path

from mask2dit.data.clips import Clip
from mask2dit.files import append_line, read_lines

logger = logging.getLogger(__name__)


class QuarantineError(ValueError):
    """Too many clips could not be read."""


class Quarantine:
    """A list of the clips that could not be read, one JSON object per line, shared by all processes that write to it.

    Every failure adds a line. The process that adds it then counts the different clips in the whole file, including those of
    earlier runs, and compares them with the clips of the manifest.

    Args:
        path: the file; its folder is created with the first line.
        num_clips: number of different clips in the manifest.
        max_share: the maximum share of them that may be listed.
    """

    def __init__(self, path: str | os.PathLike, num_clips: int, max_share: float):
        self.path = Path(path)
        self.num_clips = num_clips
        self.max_share = max_share

    def add(self, clip: Clip, error: Exception, **where: int) -> None:
        """Lists a clip.

        Args:
            clip: the clip that could not be read.
            error: the reason.
            **where: the epoch and position at which it was requested.

        Raises:
            OSError: if the line cannot be written.
            QuarantineError: if too many clips are then listed.
        """
        logger.warning("%s (%s) cannot be used: %s", clip.label, clip.name, error)
        record = {"clip": clip.name, "row": clip.label, "path": str(clip.path), "reason": str(error), **where}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append_line(self.path, record)
        num_listed = len(self.reasons())
        if num_listed > self.max_share * self.num_clips:
            raise QuarantineError(
                f"{num_listed} of {self.num_clips} clips could not be read, more than max_quarantined_share="
                f"{self.max_share}; the last: {error}. All are in {self.path}: repair them or take them out of the "
                "manifest, delete that file and start again"
            )

    def reasons(self) -> dict[str, str]:
        """The name of each listed clip, with its last reason.

        Raises:
            ValueError: if the file is damaged, naming the line.
        """
        return dict(read_lines(self.path, lambda record: (record["clip"], record["reason"])))
