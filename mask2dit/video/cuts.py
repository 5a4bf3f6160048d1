"""Cut detection by PySceneDetect, and comparison with the intended cuts. A cut is the first frame of a scene."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mask2dit.video.reading import VideoReader

if TYPE_CHECKING:
    from scenedetect import SceneDetector

FRAMES_AT_ONCE = 32


def detect_cuts(reader: VideoReader, threshold: float = 27.0, min_scene_frames: int = 5) -> list[int]:
    """The cuts that PySceneDetect's content detector finds.

    Args:
        reader: the video, of which a few frames are in memory at a time.
        threshold: minimum mean change of hue, saturation and brightness, in 0 … 255, at which a frame begins a new scene;
            27 is the detector's default.
        min_scene_frames: minimum number of frames between two cuts.

    Raises:
        ModuleNotFoundError: without the optional extra `evaluation`.
    """
    # Imported here, since it is an optional extra.
    from scenedetect import ContentDetector
    from scenedetect.detector import FlashFilter

    # Not FlashFilter.Mode.MERGE, which would move a cut because of a flash shortly after it.
    return run_detector(ContentDetector(threshold, min_scene_frames, filter_mode=FlashFilter.Mode.SUPPRESS), reader)


def run_detector(detector: "SceneDetector", reader: VideoReader) -> list[int]:
    """The cuts that a PySceneDetect detector finds in one pass. Detectors keep state, so each video needs a new one."""
    from scenedetect import FrameTimecode

    cuts = []
    for start in range(0, reader.num_frames, FRAMES_AT_ONCE):
        indices = range(start, min(start + FRAMES_AT_ONCE, reader.num_frames))
        for index, frame in zip(indices, reader.read(indices).numpy()):
            position = FrameTimecode(index, fps=reader.fps)
            cuts += detector.process_frame(position, np.ascontiguousarray(frame[..., ::-1]))
    cuts += detector.post_process(position)
    return [cut.frame_num for cut in cuts]


@dataclass(frozen=True, kw_only=True)
class CutComparison:
    """Comparison of detected cuts with intended ones."""

    accuracy: float
    """Met cuts as a percentage of all intended and superfluous ones; 100: every intended cut and no other."""
    deviation: float | None
    """Mean distance of matched cuts in frames, however far apart they are; None without matches."""


def compare_cuts(detected: Sequence[int], intended: Sequence[int], tolerance: int = 2) -> CutComparison:
    """Matches cuts one to one, the closest pairs first.

    Args:
        detected, intended: frame numbers of the cuts.
        tolerance: maximum distance in frames at which an intended cut counts as met.
    """
    if not intended and not detected:
        return CutComparison(accuracy=100.0, deviation=None)
    distances = []
    free, open_ = list(detected), list(intended)
    while free and open_:
        distance, found, meant = min((abs(found - meant), found, meant) for found in free for meant in open_)
        distances.append(distance)
        free.remove(found)
        open_.remove(meant)
    met = sum(distance <= tolerance for distance in distances)
    return CutComparison(
        accuracy=100 * met / (len(intended) + len(detected) - met),
        deviation=float(np.mean(distances)) if distances else None,
    )
