"""Detection of actors and background in a scene from its pixels alone, without its caption. Needs only NumPy.

Actors are saturated and everything else is pale, and each actor stays in its own part of the width. So runs of columns with
saturated pixels are actors. Shape and accessory are those of the drawing with the smallest error.

Colours are in [0, 1]. Positions and lengths are in pixels, in (F, H, W) order; pixel k extends from k to k + 1.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

import numpy as np

from mask2dit.storyworld.render import DARK, WHITE, actor_layers
from mask2dit.storyworld.world import ACCESSORIES, SHAPES, nearest_colour

ACTOR_CHROMA = 0.42  # largest minus smallest channel: pixels above it belong to actors, below it to the background
MIN_AREA = 20.0  # smallest area of an actor in (height / 64)²; smaller specks are ignored
CORE_CHROMA = 0.93  # share of an actor's own chroma from which a pixel shows the actor alone
MAX_DRAWING_ERROR = 0.3  # largest error per area of a body with which a drawing is recognized
REFINED_DRAWINGS = 3  # number of the best drawings whose position is refined
HORIZONS = (0.4, 0.85)  # range of the horizon, as shares of the height
MIN_EDGE = 0.03  # smallest root mean square difference between sky and ground at the horizon
STRIPE_FREQUENCIES = (64 / 24, 64 / 5)  # range of the stripes' frequency, per 64 units
LOWEST_ROWS = 0.95  # share of the height below which there are neither actors nor shadows
MIN_TEXTURE = 1e-5  # smallest variance of two frames there with which a cut can be detected
MIN_STRIPES = 0.3  # smallest share of the ground's variance that stripes explain


@dataclass(frozen=True, kw_only=True)
class Body:
    """An actor in one frame."""

    shape: str | None
    accessory: str | None
    """None, as is the shape, if no drawing fits."""
    hue: float
    """Degrees, -180 to 180."""
    size: float
    """Size as of `render.actor_size`, in units of 1/64 of the height."""
    x: float
    """Position of its axis, in units of 1/64 of the height."""
    floor: float
    """Position of its lowest point, downwards from the upper edge, in the same units."""

    @property
    def colour(self) -> str | None:
        """The nearest colour; None if none is near."""
        return nearest_colour(self.hue)


@dataclass(frozen=True, kw_only=True)
class Background:
    """The setting of a scene."""

    top: np.ndarray
    """Colour of the sky at the upper edge, (3,)."""
    bottom: np.ndarray
    """Colour of the sky at the horizon, (3,)."""
    ground: np.ndarray
    """Colour of the ground, (3,)."""
    horizon: float
    """Distance of the horizon from the upper edge, as a share of the height."""
    stripe_angle: float | None
    """Degrees, -90 to 90, as in `world.Identity`. None, as is the wavelength, without even stripes."""
    stripe_wavelength: float | None
    """In units of 1/64 of the height."""

    @property
    def sky(self) -> np.ndarray:
        """Mean colour of the sky, (3,)."""
        return (self.top + self.bottom) / 2

    def rows(self, height: int) -> np.ndarray:
        """Returns the colour of each row, (height, 3)."""
        down = (np.arange(height)[:, None] + 0.5) / height
        sky = self.top + np.minimum(down / self.horizon, 1) * (self.bottom - self.top)
        share_of_ground = np.clip((down - self.horizon) * height + 0.5, 0, 1)
        return sky + share_of_ground * (self.ground - sky)


@dataclass(frozen=True, kw_only=True)
class Observation:
    """Everything that is detected in a scene."""

    bodies: tuple[tuple[Body, ...], ...]
    """Actors of each frame, from left to right."""
    background: Background | None
    """None without a horizon."""


def observe_scene(video: np.ndarray) -> Observation:
    """Detects the actors and the background of a scene.

    Args:
        video: `uint8 (F, H, W, 3)`, F at least 2, H at least 32.

    Raises:
        ValueError: for another type or shape.
    """
    frames = check_video(video).astype(np.float32) / 255
    unit = frames.shape[1] / 64
    chroma = np.ptp(frames, axis=-1)
    boxes = [_find_boxes(of_frame > ACTOR_CHROMA, unit) for of_frame in chroma]
    still, seen = _without_actors(frames, boxes, unit)
    rows = _row_colours(still, seen)
    background = _observe_background(still, seen, rows, unit)
    if background is not None:
        rows = background.rows(len(rows))
    bodies = tuple(
        tuple(_observe_body(frame, rows, of_frame, k, unit) for k in range(len(of_frame)))
        for frame, of_frame in zip(frames, boxes)
    )
    return Observation(bodies=bodies, background=background)


def check_video(video: np.ndarray) -> np.ndarray:
    """Returns a video as an array.

    Raises:
        ValueError: if it is not `uint8 (F, H, W, 3)` with F at least 2 and H at least 32.
    """
    video = np.asarray(video)
    if video.dtype != np.uint8 or video.ndim != 4 or video.shape[-1] != 3:
        raise ValueError(f"a video must be uint8 (F, H, W, 3), but got {video.dtype} {video.shape}")
    if len(video) < 2 or video.shape[1] < 32 or video.shape[2] < video.shape[1]:
        raise ValueError(
            "a scene needs at least 2 frames, at least 32 high and at least as wide as high, but its shape is "
            f"{video.shape} (F, H, W, 3)"
        )
    return video


def find_cuts(video: np.ndarray) -> tuple[int, ...]:
    """Finds the first frame of every scene but the first.

    The texture of the ground does not move within a scene, and is shifted after a cut. So a cut is where the correlation of
    two frames at the lower edge, which actors do not reach, is below 0.5: where the mean square of their difference is more
    than half of the sum of their variances.

    Args:
        video: `uint8 (F, H, W, 3)`.

    Returns:
        Indices of frames, counted from 0.

    Raises:
        ValueError: for another type or shape.
    """
    frames = check_video(video)
    lowest = frames[:, round(LOWEST_ROWS * frames.shape[1]) :].mean(-1) / 255
    variance = lowest.var((1, 2))
    texture = variance[1:] + variance[:-1]
    change = np.square(np.diff(lowest, axis=0)).mean((1, 2))
    return tuple(int(k) + 1 for k in np.flatnonzero((texture > MIN_TEXTURE) & (change > 0.5 * texture)))


# Actors

_DARK, _WHITE = np.array(DARK), np.array(WHITE)
Box = tuple[int, int, int, int]  # left, right, top, bottom; right and bottom are exclusive


def _find_boxes(saturated: np.ndarray, unit: float) -> list[Box]:
    """Returns a box around each run of columns with saturated pixels (H, W), without specks."""
    columns = np.concatenate([[False], saturated.sum(0) >= max(2, 2 * unit), [False]])
    edges = np.flatnonzero(columns[1:] != columns[:-1])
    boxes = []
    for left, right in zip(edges[::2], edges[1::2]):
        part = saturated[:, left:right]
        if part.sum() >= MIN_AREA * unit**2:
            rows = np.flatnonzero(part.any(1))
            boxes.append((int(left), int(right), int(rows[0]), int(rows[-1]) + 1))
    return boxes


def _observe_body(frame: np.ndarray, rows: np.ndarray, boxes: list[Box], k: int, unit: float) -> Body:
    """Recognizes the actor in box `k`. `rows` is the background's colour in each row, (H, 3)."""
    height, width = frame.shape[:2]
    left, right, top, bottom = boxes[k]
    extent = max(right - left, bottom - top)
    # The margins leave room for accessories.
    above, below, aside = 0.5 * extent + 2, 0.35 * extent + 2, max(2, round(2 * unit))
    first, last = max(0, int(top - above)), min(height, int(bottom + below) + 1)
    # At most half of the way to a neighbour
    left_end = (boxes[k - 1][1] + left + 1) // 2 if k else 0
    right_end = (right + boxes[k + 1][0]) // 2 if k + 1 < len(boxes) else width
    columns = slice(max(left_end, left - aside), min(right_end, right + aside))
    pixels, background = frame[first:last, columns], rows[first:last, None]

    inside = frame[top:bottom, left:right].reshape(-1, 3)
    chroma = np.ptp(inside, axis=1)
    core = np.median(inside[chroma >= CORE_CHROMA * np.quantile(chroma, 0.95)], axis=0)
    x, y = np.arange(columns.start, columns.stop)[None, :] + 0.5, np.arange(first, last)[:, None] + 0.5
    direction = core - core.mean()  # orthogonal to grey stripes, white and black
    contrast = np.maximum((core - background) @ direction, 1e-3)

    def share_of_colour(difference: np.ndarray) -> np.ndarray:
        return np.clip(difference @ direction / contrast, -0.2, 1.2)

    seen = pixels - background
    near = _grow(share_of_colour(seen) > 0.5, 2)  # pixels further away may be a tree

    def moments(difference: np.ndarray) -> np.ndarray:
        """Returns area and centre of the actor's colour in a difference to the background."""
        share = share_of_colour(difference) * near
        area = max(float(share.sum()), 1.0)
        return np.array([area, float((share * x).sum()) / area, float((share * y).sum()) / area])

    seen_moments, smooth = moments(seen), _smooth(seen)  # smoothed, so that the video's sharpness has less influence

    def draw(shape: str, accessory: str, size: float, axis: float, floor: float) -> np.ndarray:
        layers = actor_layers(shape, accessory, size, x - axis, floor - y)
        return sum(layer[..., None] * (colour - background) for layer, colour in zip(layers, (core, _DARK, _WHITE)))

    def error_of(drawing: np.ndarray) -> float:
        return float(((_smooth(drawing) - smooth) ** 2).sum()) / seen_moments[0]

    tries = []
    for shape, accessory in product(SHAPES, ACCESSORIES):
        unit_area, unit_height = _drawing_moments(shape, accessory)
        size = np.sqrt(seen_moments[0] / unit_area)
        place = np.array([size, seen_moments[1], seen_moments[2] + unit_height * size])
        drawing = draw(shape, accessory, *place)
        tries.append((error_of(drawing), shape, accessory, place, drawing))
    tries.sort(key=lambda one: one[0])
    best = (np.inf, None, None, None)
    for _, shape, accessory, place, drawing in tries[:REFINED_DRAWINGS]:
        for _ in range(2):
            # Occlusion and neighbours affect the moments of the drawing and of the video alike.
            area, middle_x, middle_y = moments(drawing)
            place[1:] += seen_moments[1:] - [middle_x, middle_y]
            place[0] *= np.sqrt(seen_moments[0] / area)
            drawing = draw(shape, accessory, *place)
        best = min(best, (error_of(drawing), shape, accessory, place), key=lambda one: one[0])
    error, shape, accessory, (size, axis, floor) = best
    known = error <= MAX_DRAWING_ERROR and size <= 2 * (right - left)  # a larger one is a strip of something wider
    return Body(
        shape=shape if known else None,
        accessory=accessory if known else None,
        hue=_hue(core),
        size=float(size) / unit,
        x=float(axis) / unit,
        floor=float(floor) / unit,
    )


def _grow(mask: np.ndarray, reach: int) -> np.ndarray:
    """Dilates a mask (H, W) by `reach` rows and columns."""
    padded = np.pad(mask, reach)
    tall = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1, axis=0).any(-1)
    return np.lib.stride_tricks.sliding_window_view(tall, 2 * reach + 1, axis=1).any(-1)


def _smooth(image: np.ndarray) -> np.ndarray:
    """Convolves an image (H, W, 3) with (1, 2, 1) / 4 along both axes."""
    image = np.pad(image, ((1, 1), (1, 1), (0, 0)), mode="edge")
    image = image[:-2] + 2 * image[1:-1] + image[2:]
    return (image[:, :-2] + 2 * image[:, 1:-1] + image[:, 2:]) / 16


@cache
def _drawing_moments(shape: str, accessory: str) -> tuple[float, float]:
    """Returns the visible area of the body in a drawing of size 1, and the height of its centre above the floor."""
    size = 100
    x, y = np.arange(-size, size)[None, :] + 0.5, np.arange(-size, 2 * size)[:, None] + 0.5
    body = actor_layers(shape, accessory, size, x, y)[0]
    return float(body.sum()) / size**2, float((body * y).sum() / body.sum()) / size


def _hue(colour: np.ndarray) -> float:
    """Computes the hue of HSV in degrees, -180 to 180."""
    red, green, blue = (float(channel) for channel in colour)
    high, spread = max(red, green, blue), max(red, green, blue) - min(red, green, blue)
    if not spread:
        return 0.0
    if high == red:
        sextant = (green - blue) / spread
    elif high == green:
        sextant = 2 + (blue - red) / spread
    else:
        sextant = 4 + (red - green) / spread
    return (60 * sextant + 180) % 360 - 180


# Background


def _free_of(boxes: list[Box], shape: tuple[int, int], unit: float) -> np.ndarray:
    """Returns a mask (H, W) that is False where an actor or its accessory is."""
    free = np.ones(shape, dtype=bool)
    aside = max(2, round(2 * unit))
    for left, right, top, bottom in boxes:
        extent = max(right - left, bottom - top)
        above, below = int(0.5 * extent) + aside, int(0.25 * extent) + aside  # for a hat and for boots
        free[max(0, top - above) : bottom + below, max(0, left - aside) : right + aside] = False
    return free


def _without_actors(frames: np.ndarray, boxes: list[list[Box]], unit: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mean frame without actors, (H, W, 3), and the number of frames without an actor at each pixel, (H, W)."""
    free = np.stack([_free_of(of_frame, frames.shape[1:3], unit) for of_frame in boxes])
    seen = free.sum(0)
    return (frames * free[..., None]).sum(0) / np.maximum(seen, 1)[..., None], seen


def _row_colours(still: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Returns the median colour of each row, (H, 3), interpolated where actors hide a row in all frames."""
    rows = np.full((len(still), 3), np.nan, dtype=np.float32)
    for row, (colours, free) in enumerate(zip(still, seen > 0)):
        if free.any():
            rows[row] = np.median(colours[free], axis=0)
    known = np.flatnonzero(~np.isnan(rows[:, 0]))
    if not len(known):
        return np.zeros_like(rows)
    every = np.arange(len(rows))
    return np.stack([np.interp(every, known, rows[known, channel]) for channel in range(3)], axis=1)


def _observe_background(still: np.ndarray, seen: np.ndarray, rows: np.ndarray, unit: float) -> Background | None:
    height = len(rows)
    centres = np.arange(height) + 0.5
    # The horizon is the row with the best fit of a sky that is linear in y above it and a ground of one colour below it.
    gap = max(1, round(unit))  # rows that the edge may blur
    best = (np.inf, 0)
    for edge in range(int(HORIZONS[0] * height), int(HORIZONS[1] * height)):
        above, ground = rows[: edge - gap], rows[edge + gap :].mean(0)
        slope, at_zero = np.polyfit(centres[: edge - gap], above, 1)
        sky = at_zero + slope * centres[: edge - gap, None]
        best = min(best, (((above - sky) ** 2).mean() + ((rows[edge + gap :] - ground) ** 2).mean(), edge))
    edge = best[1]
    ground = np.median(rows[edge + gap :], axis=0)
    slope, at_zero = _fit_line(centres[: edge - gap], rows[: edge - gap])
    step = ground - (at_zero + slope * edge)
    if np.sqrt((step**2).mean()) < MIN_EDGE:
        return None
    # The sum of the ground's shares in the rows around the edge, which blur does not change
    reach = max(3, round(3 * unit))
    near = slice(edge - reach, min(height, edge + reach))
    share = (rows[near] - (at_zero + slope * centres[near, None])) @ step / (step @ step)
    horizon = near.stop - float(np.clip(share, 0, 1).sum())
    first = int(np.ceil(horizon + unit))
    angle, wavelength, ground_between = _observe_stripes(still[first:], seen[first:].astype(np.float32), unit)
    return Background(
        top=at_zero,
        bottom=at_zero + slope * horizon,
        ground=ground if ground_between is None else ground_between,
        horizon=horizon / height,
        stripe_angle=angle,
        stripe_wavelength=wavelength,
    )


def _fit_line(x: np.ndarray, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fits a line to rows (N, 3) over x (N,) without outliers, such as rows where trees hide the sky.

    Returns:
        Slope and value at zero, each (3,).
    """
    slope, at_zero = np.polyfit(x, rows, 1)
    for _ in range(3):
        off = np.abs(rows - (at_zero + slope * x[:, None])).max(1)
        kept = off <= 2.5 * np.median(off) + 1e-3
        slope, at_zero = np.polyfit(x[kept], rows[kept], 1)
    return slope, at_zero


def _observe_stripes(
    ground: np.ndarray, weights: np.ndarray, unit: float
) -> tuple[float | None, float | None, np.ndarray | None]:
    """Fits the plane wave that explains most of the ground, (H, W, 3), with weights (H, W).

    Returns:
        Its angle in degrees, its wavelength in units, and the colour half-way between its crests and troughs, (3,); three
        times None if it explains less than `MIN_STRIPES`.
    """
    nothing = None, None, None
    used = weights > 0
    if used.sum() < 100 * unit**2:
        return nothing
    rows, columns = np.nonzero(used)
    root = np.sqrt(weights[used])[:, None]
    colours = ground[used]
    colours = colours - (mean := np.average(colours, axis=0, weights=weights[used]))
    variance = float(((root * colours) ** 2).sum())
    if variance < 1e-6 * weights.sum():
        return nothing
    x, y = np.arange(ground.shape[1]) / unit, np.arange(ground.shape[0]) / unit
    low, high = (frequency / 64 for frequency in STRIPE_FREQUENCIES)

    # The peak of the grey spectrum, since stripes are grey
    grey = np.zeros(weights.shape)
    grey[used] = colours.mean(1) * weights[used]
    across, down = np.arange(0, high, 1 / 160), np.arange(-high, high, 1 / 160)  # cycles per unit
    power = np.abs(np.exp(-2j * np.pi * down[:, None] * y) @ grey @ np.exp(-2j * np.pi * x[:, None] * across))
    length = np.hypot(across[None, :], down[:, None])
    power[(length < low) | (length > high)] = 0
    row, column = np.unravel_index(power.argmax(), power.shape)
    peak = np.array([across[column], down[row]])

    def fit(frequency: np.ndarray) -> tuple[float, np.ndarray]:
        """Fits a wave of this frequency and a constant by least squares. Returns the squared error and the constant."""
        phase = 2 * np.pi * (frequency[0] * x[columns] + frequency[1] * y[rows])
        waves = np.stack([np.cos(phase), np.sin(phase), np.ones_like(phase)], axis=1) * root
        moments = waves.T @ (root * colours)
        factors = np.linalg.solve(waves.T @ waves + 1e-9 * np.eye(3), moments)
        return variance - float((moments * factors).sum()), factors[2]

    step = 1 / 320
    while step > 1e-4:
        moves = [peak + step * np.array(move) for move in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))]
        chosen = int(np.argmin([fit(frequency)[0] for frequency in moves]))
        peak = moves[chosen]
        if not chosen:
            step /= 2
    unexplained, between = fit(peak)
    if unexplained > (1 - MIN_STRIPES) * variance:
        return nothing
    angle = float(np.rad2deg(np.arctan2(peak[1], peak[0])))
    return (angle + 90) % 180 - 90, float(1 / np.hypot(*peak)), mean + between
