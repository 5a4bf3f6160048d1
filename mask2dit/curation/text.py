"""Text on screen: the share of the picture that it covers, and subtitles, told from other text by place and persistence."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mask2dit.optional import import_optional

MIN_SCORE = 0.7  # of a box; patterns in pictures stay below it, lines of text above
MAX_LINE_SIDE = 0.3  # of the shorter side of a line, relative to the picture
LONGEST_SIDE = 960  # pixels, to which larger pictures are scaled down for the detector

# A subtitle, relative to the picture's height and width.
LOWEST_PART = 0.7  # subtitles lie below this height
MAX_OFFSET = 0.12  # of its middle from the middle of the picture
MAX_LINE_HEIGHT = 0.15
MIN_ASPECT = 2.0  # width over height of a line
SAME_LINE = 0.03  # difference of height at which lines of two frames are at the same place
MIN_FRAMES = 2  # that have a line at this place


@dataclass(frozen=True)
class Box:
    """A line of text by its upright bounds, relative to the picture, 0 to 1."""

    left: float
    top: float
    right: float
    bottom: float
    aspect: float
    """Width over height in pixels."""

    @property
    def middle(self) -> tuple[float, float]:
        return (self.left + self.right) / 2, (self.top + self.bottom) / 2


class TextDetector:
    """rapidocr's detector of lines of text, whose weights come with the package.

    Raises:
        ValueError: if rapidocr or onnxruntime is not installed.
    """

    def __init__(self) -> None:
        self.cv2 = import_optional("cv2", "curation")
        import_optional("onnxruntime", "curation")
        rapidocr = import_optional("rapidocr", "curation")
        self.detect = rapidocr.RapidOCR(
            params={
                "Global.use_cls": False,
                "Global.use_rec": False,
                "Global.log_level": "error",  # it warns of every picture without text
                "Det.limit_type": "max",
                "Det.limit_side_len": LONGEST_SIDE,
                "Det.box_thresh": MIN_SCORE,
                # One process per core runs the stage.
                "EngineConfig.onnxruntime.intra_op_num_threads": 1,
                "EngineConfig.onnxruntime.inter_op_num_threads": 1,
            }
        )

    def __call__(self, frames: np.ndarray) -> tuple[float, float]:
        """Measures frames `uint8 (T, H, W, 3)`.

        Returns:
            The largest share of a picture that text covers, since a title may show in one frame only, and the share of frames
            with subtitles.
        """
        shares, boxes = [], []
        for frame in frames:
            height, width = frame.shape[:2]
            found = self.detect(np.ascontiguousarray(frame[..., ::-1])).boxes
            corners = [] if found is None else [box for box in np.asarray(found) if _is_line(box, height, width)]
            covered = np.zeros((height, width), np.uint8)
            for polygon in corners:
                self.cv2.fillConvexPoly(covered, polygon.round().astype(np.int32), 1)
            shares.append(covered.mean())
            boxes.append([_box(polygon, height, width) for polygon in corners])
        return round(float(max(shares)), 4), round(float(np.mean(subtitled(boxes))), 4)


def subtitled(boxes: Sequence[Sequence[Box]]) -> list[bool]:
    """Whether each frame has a subtitle: a line in the lowest part and the middle of the picture, with one at the same height
    in at least `MIN_FRAMES` frames. Text in the scene moves with the camera, and rarely lies there.

    Args:
        boxes: lines of text of each frame.
    """
    placed = [[box.middle[1] for box in of_frame if _is_placed(box)] for of_frame in boxes]

    def frames_with(height: float) -> int:
        return sum(any(abs(other - height) <= SAME_LINE for other in of_frame) for of_frame in placed)

    return [any(frames_with(height) >= MIN_FRAMES for height in of_frame) for of_frame in placed]


def _is_placed(box: Box) -> bool:
    x, y = box.middle
    return (
        y >= LOWEST_PART
        and abs(x - 0.5) <= MAX_OFFSET
        and box.bottom - box.top <= MAX_LINE_HEIGHT
        and box.aspect >= MIN_ASPECT
    )


def _is_line(polygon: np.ndarray, height: int, width: int) -> bool:
    """False for large parts of the picture, such as a plain sky, which the detector sometimes marks."""
    return float(min(np.ptp(polygon, axis=0) / (width, height))) <= MAX_LINE_SIDE


def _box(polygon: np.ndarray, height: int, width: int) -> Box:
    (left, top), (right, bottom) = polygon.min(axis=0), polygon.max(axis=0)
    aspect = (right - left) / max(1.0, bottom - top)
    return Box(left / width, top / height, right / width, bottom / height, aspect)
