"""How far a video shows what its captions say, and stays itself from scene to scene: from its pixels alone. Needs only NumPy.

Semantic accuracy is the share of what captions name that is seen. Visual consistency is how far what they do not name agrees
between scenes: 1 - d / d0 for each part of it, where d is the mean difference between two scenes and d0 that between the same
scenes of unrelated stories. So 1 is identical and 0 is what chance gives.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from mask2dit.storyworld import observe, render, world
from mask2dit.storyworld.observe import (
    Background,
    Body,
    Observation,
    check_video,
    find_cuts,
    observe_scene,
)
from mask2dit.storyworld.render import PALETTES
from mask2dit.storyworld.world import (
    HUES,
    IDENTITY_RANGES,
    JOINT_ACTIONS,
    DescribedActor,
    Description,
    hue_distance,
    parse_caption,
)

PERSISTENCE = 2 / 3  # the share of frames in which an actor has to be seen, with the look that its caption gives it
MIN_TRAVEL = 1.6  # in units of 1/64 of the height: less is standing still
MIN_JUMP = 4.0
MAX_STRAY = (1.5, 0.1)  # root mean square off an even motion: at rest, and more for each unit of the way
MAX_SETTING_ERROR = 0.1  # root mean square of a colour, beyond what tints explain
EXTRA_TINT = 0.03  # that a setting may have beyond the tints of rendered stories

# What visual consistency is made of: groups count equally, and so do the parts of each.
IDENTITY_GROUPS = {
    "hue": ("hue",),
    "size": ("size",),
    "horizon": ("horizon",),
    "sky": ("sky_warmth", "sky_brightness"),
    "ground": ("ground_warmth", "ground_brightness"),
    "stripes": ("stripe_angle", "stripe_wavelength"),
}
OF_ACTORS = ("hue", "size")
_RANGE_OF = {"hue": "hues", "size": "sizes"}
# The mean difference between unrelated stories with the same captions. Each part is drawn evenly, and two even draws are a
# third of the range apart on average; `python -m mask2dit.storyworld.validate` finds the same on rendered stories. In degrees
# for hue and angle, natural logarithms of ratios for size and wavelength, and shares for the rest.
UNRELATED = {
    part: float(np.ptp(IDENTITY_RANGES[_RANGE_OF.get(part, part)])) / 3
    for parts in IDENTITY_GROUPS.values()
    for part in parts
}


@dataclass(frozen=True, kw_only=True)
class SceneMeasurement:
    """What of a caption one scene shows, and what it shows besides."""

    right: dict[str, tuple[bool, ...]]
    """Whether each thing that the caption names is seen: "cast" (as many actors as named) and "setting" once, "colour",
    "shape" and "accessory" for each actor, "action" for each that acts alone, "joint" for a pair that acts together."""
    identity: dict[str, float | dict[int, float | None] | None]
    """What is seen of `UNRELATED`'s parts: hue and size for each actor's number, the others once. None: not found, as is
    everything of an actor without its colour and of a background that is not the caption's."""

    @property
    def all_right(self) -> bool:
        return all(all(values) for values in self.right.values())

    @property
    def share_right(self) -> float:
        """Of everything that the caption names."""
        values = [value for of_kind in self.right.values() for value in of_kind]
        return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """How far scenes agree in what no caption names: 1 identical, 0 as unrelated stories do. What is not found in a scene
    agrees with no other, and counts as 0."""

    overall: float
    """The mean over the groups of `IDENTITY_GROUPS`."""
    by_group: dict[str, float]
    """Without those of actors where no two scenes share one."""


@dataclass(frozen=True, kw_only=True)
class StoryMeasurement:
    """What a whole video shows."""

    scenes: tuple[SceneMeasurement, ...]
    consistency: Consistency
    """Over all pairs of scenes."""
    adjacent: Consistency
    """Over neighbours."""
    first_to_last: Consistency
    drift: tuple[float, ...]
    """Of each scene, the distance to the first: 1 - consistency with it, 0 for the first itself."""
    missing_cuts: tuple[int, ...]
    """First frames of scenes at which no cut is seen."""
    extra_cuts: tuple[int, ...]
    """Frames inside a scene at which one is."""

    @property
    def cuts_right(self) -> bool:
        """Whether cuts are seen where scenes begin and nowhere else."""
        return not (self.missing_cuts or self.extra_cuts)


def code_identity() -> str:
    """Names the code that measures: what another version of it measured is measured again."""
    files = [__file__, world.__file__, render.__file__, observe.__file__]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def measure_story(
    video: np.ndarray, captions: Sequence[str], num_frames: int | Sequence[int] | None = None
) -> StoryMeasurement:
    """Measures a video of several scenes.

    Args:
        video: `uint8 (frames of all scenes, H, W, 3)`.
        captions: one for each scene, at least two.
        num_frames: frames of a scene, or of each; None: all scenes are equally long.

    Raises:
        ValueError: if the captions are not of this world, there are too few, or the frames do not divide into so many scenes.
    """
    video = check_video(video)
    if len(captions) < 2:
        raise ValueError(
            f"a story has at least 2 scenes, but there are {len(captions)} captions; use measure_scene for one"
        )
    descriptions = [parse_caption(text) for text in captions]
    lengths = _scene_lengths(len(video), len(captions), num_frames)
    boundaries = np.cumsum(lengths)[:-1]
    scenes = tuple(map(measure_scene, np.split(video, boundaries), descriptions))
    cuts, expected = set(find_cuts(video)), {int(boundary) for boundary in boundaries}
    count = len(scenes)
    return StoryMeasurement(
        scenes=scenes,
        consistency=visual_consistency(scenes),
        adjacent=visual_consistency(scenes, [(k, k + 1) for k in range(count - 1)]),
        first_to_last=visual_consistency(scenes, [(0, count - 1)]),
        drift=(0.0, *(1 - visual_consistency(scenes, [(0, k)]).overall for k in range(1, count))),
        missing_cuts=tuple(sorted(expected - cuts)),
        extra_cuts=tuple(sorted(cuts - expected)),
    )


def measure_scene(video: np.ndarray, description: Description) -> SceneMeasurement:
    """Measures one scene.

    Args:
        video: `uint8 (F, H, W, 3)`, H at least 32.
        description: what its caption says, see `world.describe` and `world.parse_caption`.

    Raises:
        ValueError: if `video` is none.
    """
    observation = observe_scene(video)
    tracks = _match(observation, description.actors)
    expected = len(description.actors)
    is_right: dict[str, list[bool]] = {
        "cast": [np.mean([len(bodies) == expected for bodies in observation.bodies]) >= PERSISTENCE],
    }
    if description.setting is not None:
        background = observation.background
        is_right["setting"] = [background is not None and nearest_setting(background) == description.setting]

    def note(kind: str, value: bool) -> None:
        is_right.setdefault(kind, []).append(value)

    joint_action, joint_motions = None, []  # of the one pair that a scene may have
    for actor, track in zip(description.actors, tracks):
        for kind in ("colour", "shape", "accessory") if actor.colour else ("shape", "accessory"):
            seen = [body is not None and getattr(body, kind) == getattr(actor, kind) for body in track]
            note(kind, np.mean(seen) >= PERSISTENCE)
        if actor.action in JOINT_ACTIONS:
            joint_action = actor.action
            joint_motions.append(_motion(track))
        else:
            note("action", _motion(track) == actor.action)
    if joint_action is not None:
        note("joint", tuple(joint_motions) == JOINT_ACTIONS[joint_action])
    right = {kind: tuple(bool(value) for value in values) for kind, values in is_right.items()}
    return SceneMeasurement(right=right, identity=_identity(observation, description, tracks))


def nearest_setting(background: Background) -> str | None:
    """The setting whose colours, tinted as far as stories are, are nearest; None if none is near."""
    return nearest_palette(background.sky, background.ground)


def nearest_palette(sky: np.ndarray, ground: np.ndarray) -> str | None:
    """The setting whose colours are nearest to a mean colour of the sky and one of the ground; None if none is near."""
    errors = {}
    for name, (above, at_horizon, its_ground) in PALETTES.items():
        sky_off = sky - (np.asarray(above) + at_horizon) / 2
        ground_off = ground - np.asarray(its_ground)
        rest = [_untinted(sky_off, "sky"), _untinted(ground_off, "ground")]
        errors[name] = float(np.sqrt(np.mean(np.square(rest))))
    nearest = min(errors, key=errors.get)
    return nearest if errors[nearest] <= MAX_SETTING_ERROR else None


def visual_consistency(
    scenes: Sequence[SceneMeasurement], pairs: Sequence[tuple[int, int]] | None = None
) -> Consistency:
    """How far scenes agree in what no caption names.

    Args:
        scenes: at least two.
        pairs: of scenes, counted from 0, over which to take the mean; None: all.

    Raises:
        ValueError: if there are fewer than two scenes.
    """
    if len(scenes) < 2:
        raise ValueError(f"consistency is between scenes: at least 2 are needed, but there are {len(scenes)}")
    pairs = list(combinations(range(len(scenes)), 2)) if pairs is None else pairs
    of_pairs = [differences(scenes[a], scenes[b]) for a, b in pairs]
    by_group = {}
    for group, parts in IDENTITY_GROUPS.items():
        found = {part: [value for of_pair in of_pairs for value in of_pair[part]] for part in parts}
        if all(found.values()):
            by_group[group] = float(np.mean([1 - np.mean(values) / UNRELATED[part] for part, values in found.items()]))
    return Consistency(overall=float(np.mean(list(by_group.values()))), by_group=by_group)


def differences(a: SceneMeasurement, b: SceneMeasurement) -> dict[str, list[float]]:
    """Between two scenes in each part of `UNRELATED`, in its units: a number for each actor that both captions name, or one.
    What was not found in one of them differs as far as in unrelated stories."""
    return {part: _differences_in(part, a.identity, b.identity) for part in UNRELATED}


def _differences_in(part: str, a: dict, b: dict) -> list[float]:
    """Between two scenes' identities in one part: a number for each actor that both captions name, else one."""
    if part in OF_ACTORS:
        values = [(a[part][number], b[part][number]) for number in sorted(a[part].keys() & b[part].keys())]
    else:
        values = [(a[part], b[part])]
    result = []
    for one, other in values:
        if one is None or other is None:
            result.append(UNRELATED[part])
        elif part == "hue":
            result.append(hue_distance(one, other))
        elif part == "stripe_angle":  # the same again after half a turn
            result.append(abs((one - other + 90) % 180 - 90))
        else:
            result.append(abs(one - other))
    return result


def _scene_lengths(total: int, count: int, num_frames: int | Sequence[int] | None) -> list[int]:
    if num_frames is None:
        if total % count:
            raise ValueError(f"{total} frames do not divide into {count} equal scenes; give num_frames of each")
        return [total // count] * count
    lengths = [num_frames] * count if isinstance(num_frames, int) else list(num_frames)
    if len(lengths) != count or sum(lengths) != total:
        raise ValueError(
            f"the video has {total} frames, but {count} captions with num_frames={num_frames} take {sum(lengths)} in "
            f"{len(lengths)} scenes"
        )
    return lengths


# Actors through a scene

Track = list[Body | None]  # of one described actor in each frame; None: not seen


def _match(observation: Observation, actors: Sequence[DescribedActor]) -> list[Track]:
    """Who is who: in each frame actors and bodies pair off from left to right, those that fit best by hue where some are
    missing or too many."""
    tracks: list[Track] = [[] for _ in actors]
    for bodies in observation.bodies:
        size = min(len(bodies), len(actors))
        fits = [
            (sum(_hue_error(bodies[b], actors[a]) for a, b in zip(chosen, others)), chosen, others)
            for chosen in combinations(range(len(actors)), size)
            for others in combinations(range(len(bodies)), size)
        ]
        _, chosen, others = min(fits)
        found = dict(zip(chosen, others))
        for k, track in enumerate(tracks):
            track.append(bodies[found[k]] if k in found else None)
    return tracks


def _hue_error(body: Body, actor: DescribedActor) -> float:
    """Degrees off the colour that a caption names; any fits where it names none."""
    return hue_distance(body.hue, HUES[actor.colour]) if actor.colour else 0.0


def _motion(track: Track) -> str | None:
    """The one of `world.ACTIONS` that is seen; None if none is, or no actor of any look is there for long enough."""
    seen = [(k, body) for k, body in enumerate(track) if body is not None and body.shape is not None]
    if len(seen) < PERSISTENCE * len(track):
        return None
    times = np.array([k for k, _ in seen]) / (len(track) - 1)
    places = np.array([(body.x, -body.floor) for _, body in seen])
    # Even motion to the side, and a parabola upwards.
    terms = np.stack([np.ones_like(times), times - 0.5, 4 * times * (1 - times)], axis=1)
    factors, *_ = np.linalg.lstsq(terms, places, rcond=None)
    stray = np.sqrt(((places - terms @ factors) ** 2).sum(1).mean())
    travel, jump = factors[1, 0], factors[2, 1]
    at_rest, on_the_way = MAX_STRAY
    if stray > at_rest + on_the_way * (abs(travel) + abs(jump)):
        return None
    if jump >= MIN_JUMP:
        return "jumps" if abs(travel) < MIN_TRAVEL else None
    if abs(travel) >= MIN_TRAVEL:
        return "moves right" if travel > 0 else "moves left"
    return "stands still"


# Identity


def _identity(observation: Observation, description: Description, tracks: Sequence[Track]) -> dict:
    found = {part: {} if part in OF_ACTORS else None for part in UNRELATED}
    for actor, track in zip(description.actors, tracks):
        bodies = [body for body in track if body is not None and actor.colour in (None, body.colour)]
        seen = len(bodies) >= PERSISTENCE * len(track)
        # Hues are taken off the colour's own, where the circle has no seam.
        offsets = [(body.hue - HUES.get(actor.colour, 0.0) + 180) % 360 - 180 for body in bodies]
        found["hue"][actor.number] = float(np.median(offsets)) if seen else None
        found["size"][actor.number] = float(np.median([np.log(body.size) for body in bodies])) if seen else None
    background = observation.background
    if background is None or description.setting not in (None, nearest_setting(background)):
        return found
    found["horizon"] = background.horizon
    for place, colour in (("sky", background.sky), ("ground", background.ground)):
        found[f"{place}_warmth"], found[f"{place}_brightness"] = _tint(colour)
    if background.stripe_angle is not None:
        found["stripe_angle"] = background.stripe_angle
        found["stripe_wavelength"] = float(np.log(background.stripe_wavelength))
    return found


def _tint(colour: np.ndarray) -> tuple[float, float]:
    """Warmth and brightness of a colour or of the difference of two, (3,); see `world.Identity`."""
    return float(colour[0] - colour[2]) / 2, float(colour.mean())


def _untinted(difference: np.ndarray, place: str) -> np.ndarray:
    """What remains of a colour's difference to a palette's without the tint that explains most of it."""
    warmth, brightness = _tint(difference)
    warmest, brightest = (IDENTITY_RANGES[f"{place}_{kind}"][1] + EXTRA_TINT for kind in ("warmth", "brightness"))
    warm = np.array([1.0, 0.0, -1.0])
    return difference - np.clip(warmth, -warmest, warmest) * warm - np.clip(brightness, -brightest, brightest)
