"""Clips that could not be read: listed with the reason, counted, and too many of them an error."""

import json
import logging
import os
from pathlib import Path

from mask2dit.data.clips import Clip

logger = logging.getLogger(__name__)


class QuarantineError(ValueError):
    """Too many clips could not be read."""


class Quarantine:
    """A list of the clips that could not be read, one JSON object a line, shared by all processes that write to it.

    Every failure is a line of its own, appended by a single write, so that the lines of workers and ranks on one machine
    do not mix. The share is taken where all of them can be seen: whoever adds a line counts the different clips in the whole
    file, those of earlier runs too, against the clips of the manifest.

    Args:
        path: the file; its folder is created with the first line.
        num_clips: different clips in the manifest.
        max_share: the share of them that may be listed.
    """

    def __init__(self, path: str | os.PathLike, num_clips: int, max_share: float):
        self.path = Path(path)
        self.num_clips = num_clips
        self.max_share = max_share

    def add(self, clip: Clip, error: Exception, **where: int) -> None:
        """Lists a clip.

        Args:
            clip: that could not be read.
            error: why.
            **where: the epoch and position at which it was asked for.

        Raises:
            QuarantineError: if that makes too many.
        """
        logger.warning("%s (%s) cannot be used: %s", clip.label, clip.name, error)
        record = {"clip": clip.name, "row": clip.label, "path": str(clip.path), "reason": str(error), **where}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, (json.dumps(record, ensure_ascii=False) + "\n").encode())
        finally:
            os.close(file)
        num_listed = len(self.reasons())
        if num_listed > self.max_share * self.num_clips:
            raise QuarantineError(
                f"{num_listed} of {self.num_clips} clips could not be read, more than max_quarantined_share="
                f"{self.max_share}; the last: {error}. All are in {self.path}: repair them or take them out of the "
                "manifest, delete that file and start again"
            )

    def reasons(self) -> dict[str, str]:
        """The name of each clip that is listed, with the last reason."""
        if not self.path.is_file():
            return {}
        lines = self.path.read_text(encoding="utf-8").split("\n")[:-1]  # another process may be writing the last one
        records = [json.loads(line) for line in lines]
        return {record["clip"]: record["reason"] for record in records}
