"""Rendering of stories. Pixels depend on the story alone. Needs only NumPy.

Lengths are in units of 1/64 of the height unless stated otherwise. Edges are antialiased: the share of a pixel that a shape
covers follows from the signed distance to its border. Actors are saturated and everything else is pale, so that measurements
can separate them.
"""

import numpy as np

from mask2dit.storyworld.world import JOINT_ACTIONS, Colour, Identity, Palette, Scene, Story

# Actors
SATURATION, VALUE = 0.82, 0.92
USUAL_SIZES = (22.0, 18.0, 13.5)  # in a cast of 1, 2 and 3, with room for motion
FLOOR = 0.9  # their floor, as a share of the height from the upper edge
DARK, WHITE = (0.12, 0.11, 0.14), (0.98, 0.98, 0.98)
MARGIN = 1.0  # between an actor and the borders of its part of the width
TRAVEL, JUMP = 20.0, 10.0  # largest motion to the side, and height of a jump

# Shares of an actor's size, upwards from the lowest point of its body
BODY_HEIGHTS = {"circle": 1.0, "square": 0.88, "triangle": 0.95}
EYE_HEIGHTS = {"circle": 0.62, "square": 0.56, "triangle": 0.44}
SCARF_HEIGHTS = {"circle": (0.22, 0.42), "square": (0.18, 0.38), "triangle": (0.14, 0.33)}
BRIM_HEIGHTS = {"circle": 0.9, "square": 0.86, "triangle": 0.74}
BOOT_HEIGHT, BOOTS_LIFT = 0.24, 0.18

# Upper sky, sky at the horizon and ground, before the tints of an identity
PALETTES: dict[str, Palette] = {
    "desert": ((0.93, 0.86, 0.78), (0.95, 0.91, 0.85), (0.82, 0.72, 0.63)),
    "meadow": ((0.72, 0.82, 0.90), (0.82, 0.88, 0.92), (0.68, 0.79, 0.61)),
    "snow": ((0.58, 0.64, 0.74), (0.66, 0.70, 0.77), (0.86, 0.87, 0.89)),
    "night": ((0.52, 0.51, 0.66), (0.68, 0.63, 0.72), (0.46, 0.49, 0.60)),
    "beach": ((0.68, 0.86, 0.86), (0.79, 0.90, 0.88), (0.88, 0.77, 0.72)),
}
USUAL_WAVELENGTH = 11.0
STRIPES = 0.05  # their amplitude, as a share of full intensity


def render_story(story: Story, num_frames: int = 9, height: int = 64, width: int = 64) -> list[np.ndarray]:
    """Renders every scene of a story; see `render_scene`."""
    return [render_scene(story, k, num_frames, height, width) for k in range(len(story.scenes))]


def render_scene(story: Story, k: int, num_frames: int = 9, height: int = 64, width: int = 64) -> np.ndarray:
    """Renders a scene of a story.

    Args:
        story: the story.
        k: index of the scene, counted from 0.
        num_frames: number of frames, over which actions extend.
        height, width: size of a frame in pixels; height at least 32, width at least the height.

    Returns:
        `uint8 (num_frames, height, width, 3)`.

    Raises:
        IndexError: if the story has no such scene.
        ValueError: for fewer than two frames, or an unsupported size.
    """
    if num_frames < 2:
        raise ValueError(f"a scene needs at least 2 frames for its actions, but num_frames is {num_frames}")
    if height < 32 or width < height:
        raise ValueError(
            f"frames have to be at least 32 high and at least as wide as high, but got {height}x{width} (height x width)"
        )
    scene, identity = story.scenes[k], story.identities[k]
    background = _background(story, scene, identity, height, width)
    video = np.repeat(background[None], num_frames, axis=0)
    for position, index in enumerate(scene.present):
        actor = story.actors[index]
        size = actor_size(len(story.actors), identity.sizes[index]) * height / 64
        colour = hsv_to_rgb(actor.usual_hue + identity.hues[index], SATURATION, VALUE)
        xs, lifts = _path(scene, position, size, num_frames, height / 64, width)
        for frame, x, lift in zip(video, xs, lifts):
            _draw_shadow(frame, x, FLOOR * height, size)
            _draw_actor(frame, actor.shape, actor.accessory, colour, size, x, FLOOR * height - lift)
    return np.rint(np.clip(video, 0, 1) * 255).astype(np.uint8)


def actor_size(cast: int, log_ratio: float) -> float:
    """Returns the size of an actor in a cast of `cast`: the diameter of a circle, the base of a triangle, and 1/0.88 of a
    square's side."""
    return USUAL_SIZES[cast - 1] * float(np.exp(log_ratio))


def stripe_wavelength(log_ratio: float) -> float:
    """Returns the distance between neighbouring stripes of the ground."""
    return USUAL_WAVELENGTH * float(np.exp(log_ratio))


def hsv_to_rgb(hue: float, saturation: float, value: float) -> Colour:
    """Converts HSV to RGB. The hue is in degrees and may lie outside 0 to 360; the other values are in [0, 1]."""
    offsets = (np.array([5.0, 3.0, 1.0]) + hue / 60) % 6
    return tuple(value - value * saturation * np.clip(np.minimum(offsets, 4 - offsets), 0, 1))


def actor_layers(shape: str, accessory: str, size: float, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, ...]:
    """Computes the shares of each pixel that an actor's body, its dark parts (eyes, hat, boots) and its white parts (scarf)
    cover.

    Args:
        shape, accessory: of `world.SHAPES` and `world.ACCESSORIES`.
        size: size in pixels.
        x, y: pixel positions, broadcast against each other: to the right of the actor's axis, and above its floor.

    Returns:
        Three arrays in [0, 1], whose sum is at most 1.
    """
    y = y - BOOTS_LIFT * size if accessory == "boots" else y  # now above the body's lowest point
    if shape == "circle":
        body = _cover(_disc(x, y - size / 2, size / 2))
    elif shape == "square":
        side = BODY_HEIGHTS["square"] * size
        body = _cover(_box(x, y - side / 2, side / 2, side / 2))
    else:
        rise = BODY_HEIGHTS["triangle"]
        to_side = (np.abs(x) * rise + (y - rise * size) / 2) / np.hypot(rise, 0.5)
        body = _cover(np.maximum(to_side, -y))

    eyes = _cover(_disc(np.abs(x) - 0.16 * size, y - EYE_HEIGHTS[shape] * size, 0.065 * size))
    dark = eyes * body
    white = np.zeros_like(body)
    if accessory == "hat":
        brim = BRIM_HEIGHTS[shape] * size
        hat = _cover(_box(x, y - brim, 0.38 * size, 0.06 * size))
        dark = np.maximum(dark, np.maximum(hat, _cover(_box(x, y - brim - 0.17 * size, 0.24 * size, 0.17 * size))))
    elif accessory == "boots":
        boots = _box(
            np.abs(x) - 0.22 * size, y + (BOOTS_LIFT - BOOT_HEIGHT / 2) * size, 0.16 * size, BOOT_HEIGHT / 2 * size
        )
        dark = np.maximum(dark, _cover(boots))
    elif accessory == "scarf":
        low, high = SCARF_HEIGHTS[shape]
        white = body * _cover(np.abs(y - (low + high) / 2 * size) - (high - low) / 2 * size)
    return np.minimum(body, 1 - np.maximum(dark, white)), dark, white


def _disc(x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    return np.hypot(x, y) - radius


def _box(x: np.ndarray, y: np.ndarray, half_width: float, half_height: float) -> np.ndarray:
    return np.maximum(np.abs(x) - half_width, np.abs(y) - half_height)


def _cover(distance: np.ndarray) -> np.ndarray:
    """Returns the covered share of a pixel, from the signed distance of its centre to the border in pixels."""
    return np.clip(0.5 - distance, 0, 1)


def _path(scene: Scene, position: int, size: float, num_frames: int, unit: float, width: int):
    """Returns the position of an actor's axis and its height above the floor in each frame, in pixels.

    Actors divide the width evenly and stay in their parts, so that none hides another.
    """
    action, share = scene.actions[position], width / len(scene.present)
    if action in JOINT_ACTIONS:
        first = scene.actions.index(action)
        action = JOINT_ACTIONS[action][position - first]
    time = np.linspace(0, 1, num_frames)
    room = share - 2 * MARGIN * unit - size
    goes = {"moves right": 1, "moves left": -1}.get(action, 0)
    travel = min(room, TRAVEL * unit) if goes else 0.0
    left = position * share + MARGIN * unit + size / 2 + scene.starts[position] * (room - travel)
    x = left + travel * (time if goes >= 0 else 1 - time)
    lift = JUMP * unit * 4 * time * (1 - time) if action == "jumps" else np.zeros(num_frames)
    return x, lift


def _window(frame: np.ndarray, left: float, right: float, top: float, bottom: float):
    """Returns the part of a frame between these lines, and the positions of its pixels' centres."""
    columns = slice(max(0, int(left)), min(frame.shape[1], int(right) + 1))
    rows = slice(max(0, int(top)), min(frame.shape[0], int(bottom) + 1))
    x = np.arange(columns.start, columns.stop) + 0.5
    y = np.arange(rows.start, rows.stop) + 0.5
    return frame[rows, columns], x[None, :], y[:, None]


def _blend(target: np.ndarray, cover: np.ndarray, colour: Colour) -> None:
    target += cover[..., None] * (np.asarray(colour) - target)


def _draw_actor(
    frame: np.ndarray, shape: str, accessory: str, colour: Colour, size: float, axis: float, floor: float
) -> None:
    target, x, y = _window(frame, axis - 0.6 * size, axis + 0.6 * size, floor - 1.4 * size, floor + 1)
    layers = actor_layers(shape, accessory, size, x - axis, floor - y)
    target *= 1 - sum(layers)[..., None]
    for layer, of_layer in zip(layers, (colour, DARK, WHITE)):
        target += layer[..., None] * np.asarray(of_layer)


def _draw_shadow(frame: np.ndarray, axis: float, floor: float, size: float) -> None:
    target, x, y = _window(frame, axis - 0.6 * size, axis + 0.6 * size, floor - 0.1 * size - 1, floor + 0.1 * size + 1)
    flat = 6.0  # ratio of its width to its height
    shadow = _cover((np.hypot(x - axis, flat * (y - floor)) - 0.48 * size) / flat)
    target *= 1 - 0.2 * shadow[..., None]


def _background(story: Story, scene: Scene, identity: Identity, height: int, width: int) -> np.ndarray:
    """Renders sky, decorations, and ground with its stripes, float (height, width, 3)."""
    unit, horizon = height / 64, identity.horizon * height
    x, y = np.arange(width)[None, :] + 0.5, np.arange(height)[:, None] + 0.5
    tints = tinted(story.palette or PALETTES[story.setting], identity)
    above, at_horizon, ground = (np.asarray(colour) for colour in tints)
    down = np.clip(y / horizon, 0, 1)[..., None]
    image = np.broadcast_to(above + down * (at_horizon - above), (height, width, 3)).copy()
    _decorate(image, story.setting, scene.camera * width, horizon, unit, x, y)

    angle, wavelength = np.deg2rad(identity.stripe_angle), stripe_wavelength(identity.stripe_wavelength) * unit
    along = (x * np.cos(angle) + y * np.sin(angle)) / wavelength
    stripes = STRIPES * np.cos(2 * np.pi * (along - scene.camera))
    cover = np.broadcast_to(_cover(horizon - y), (height, width))
    return image + cover[..., None] * (ground + stripes[..., None] - image)


def tinted(palette: Palette, identity: Identity) -> list[np.ndarray]:
    """Returns a palette with the tints of an identity."""
    warm = np.array([1.0, 0.0, -1.0])
    sky = identity.sky_brightness + identity.sky_warmth * warm
    ground = identity.ground_brightness + identity.ground_warmth * warm
    return [np.asarray(colour) + tint for colour, tint in zip(palette, (sky, sky, ground))]


def _decorate(
    image: np.ndarray, setting: str | None, pan: float, horizon: float, unit: float, x: np.ndarray, y: np.ndarray
) -> None:
    """Draws the decorations of a named setting at the horizon and in the sky; the ground is drawn over them."""
    width = image.shape[1]

    def to_right_of(share: float) -> np.ndarray:
        """Returns the distance of each pixel to the right of a place, which wraps around at the borders."""
        return (x - share * width - pan + width / 2) % width - width / 2

    def disc(share: float, up: float, radius: float, colour: Colour, opacity: float = 1.0) -> None:
        _blend(image, opacity * _cover(_disc(to_right_of(share), y - up, radius * unit)), colour)

    def box(share: float, left: float, right: float, low: float, high: float, colour: Colour) -> None:
        across = to_right_of(share) - (left + right) / 2 * unit
        up = horizon - y - (low + high) / 2 * unit
        _blend(image, _cover(_box(across, up, (right - left) / 2 * unit, (high - low) / 2 * unit)), colour)

    def fir(share: float, half_width: float, high: float, colour: Colour) -> None:
        up = horizon - y
        slope = np.hypot(half_width, high)
        to_side = (np.abs(to_right_of(share)) * high - half_width * (high * unit - up)) / slope
        _blend(image, _cover(to_side), colour)

    if setting == "desert":
        disc(0.7, 9 * unit, 5, (1.0, 0.95, 0.82))
        box(0.25, -1.2, 1.2, 0, 10, (0.68, 0.72, 0.64))
        box(0.25, -4.2, 0, 4, 6, (0.68, 0.72, 0.64))
        box(0.25, -4.2, -2.4, 4, 8, (0.68, 0.72, 0.64))
    elif setting == "meadow":
        for share, radius in ((0.2, 5), (0.65, 4)):
            box(share, -0.8, 0.8, 0, 4, (0.64, 0.60, 0.57))
            disc(share, horizon - (3 + radius) * unit, radius, (0.65, 0.71, 0.63))
    elif setting == "snow":
        for share, half_width, high in ((0.15, 4, 12), (0.28, 3, 9), (0.7, 4, 11)):
            fir(share, half_width, high, (0.50, 0.58, 0.58))
    elif setting == "night":
        disc(0.3, 10 * unit, 5, (0.93, 0.92, 0.84))
        for share, up in ((0.05, 6), (0.55, 15), (0.68, 5), (0.85, 11), (0.95, 20)):
            disc(share, up * unit, 0.8, (0.95, 0.95, 0.92))
    elif setting == "beach":
        for share, up, radius in ((0.2, 9, 4), (0.28, 8, 5), (0.36, 10, 3.5), (0.75, 16, 3), (0.81, 15, 4)):
            disc(share, up * unit, radius, (0.96, 0.97, 0.97), 0.8)
