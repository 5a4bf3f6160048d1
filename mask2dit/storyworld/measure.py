"""Semantic accuracy and visual consistency of videos of the small world, from their pixels alone. Needs only NumPy.

Semantic accuracy is the share of captioned attributes that a video shows. Visual consistency is the agreement of scenes in
what captions do not name: 1 - d / d0 for each part, where d is the mean difference between two scenes, and d0 the mean
difference between the same scenes of unrelated stories. So 1 is identical, and 0 is chance.
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

PERSISTENCE = 2 / 3  # share of frames in which an actor has to be seen, with the attributes of its caption
MIN_TRAVEL = 1.6  # smallest motion to the side, in units of 1/64 of the height; less is standing still
MIN_JUMP = 4.0  # smallest height of a jump, in the same units
MAX_STRAY = (1.5, 0.1)  # largest root mean square deviation from the motion's curve: at rest, and per unit of motion
MAX_SETTING_ERROR = 0.1  # largest root mean square error of a colour after its tint is removed
EXTRA_TINT = 0.03  # tolerance of a setting's tint beyond the tints of rendered stories

# The parts of visual consistency by group. Groups have equal weight, and so have the parts of a group.
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
# The mean difference between unrelated stories with the same captions. Each part is distributed uniformly, so that two draws
# differ by a third of the range on average; `python -m mask2dit.storyworld.validate` finds the same on rendered stories.
# Units are degrees for hue and angle, natural logarithms of ratios for size and wavelength, and shares for the rest.
UNRELATED = {
    part: float(np.ptp(IDENTITY_RANGES[_RANGE_OF.get(part, part)])) / 3
    for parts in IDENTITY_GROUPS.values()
    for part in parts
}


@dataclass(frozen=True, kw_only=True)
class SceneMeasurement:
    """The captioned attributes that a scene shows, and its identity."""

    right: dict[str, tuple[bool, ...]]
    """True for each captioned attribute that is seen: "cast" (the number of actors) and "setting" once, "colour", "shape" and
    "accessory" per actor, "action" per actor that acts alone, "joint" for a pair that acts together."""
    identity: dict[str, float | dict[int, float | None] | None]
    """The values of the parts of `UNRELATED`: hue and size by actor number, the others once. None if a part is not found, or
    belongs to an actor without its captioned colour or to a background that is not the captioned one."""

    @property
    def all_right(self) -> bool:
        return all(all(values) for values in self.right.values())

    @property
    def share_right(self) -> float:
        """Share of the captioned attributes that are right."""
        values = [value for of_kind in self.right.values() for value in of_kind]
        return sum(values) / len(values)


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Agreement of scenes in what no caption names: 1 for identical scenes, 0 for those of unrelated stories. A part that is
    not found in a scene counts as 0."""

    overall: float
    """Mean over the groups of `IDENTITY_GROUPS`."""
    by_group: dict[str, float]
    """Consistency of each group, without hue and size if no two scenes share an actor."""


@dataclass(frozen=True, kw_only=True)
class StoryMeasurement:
    """The measurements of a video of several scenes."""

    scenes: tuple[SceneMeasurement, ...]
    consistency: Consistency
    """Mean over all pairs of scenes."""
    adjacent: Consistency
    """Mean over neighbouring scenes."""
    first_to_last: Consistency
    """Consistency of the first and the last scene."""
    drift: tuple[float, ...]
    """1 - consistency with the first scene, per scene; 0 for the first."""
    missing_cuts: tuple[int, ...]
    """First frames of scenes at which no cut is found."""
    extra_cuts: tuple[int, ...]
    """Frames inside a scene at which a cut is found."""

    @property
    def cuts_right(self) -> bool:
        """True if cuts are found where scenes begin and nowhere else."""
        return not (self.missing_cuts or self.extra_cuts)


def code_identity() -> str:
    """Returns a hash of the measuring code, since results of another version are measured again."""
    files = [__file__, world.__file__, render.__file__, observe.__file__]
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:16]


def measure_story(
    video: np.ndarray, captions: Sequence[str], num_frames: int | Sequence[int] | None = None
) -> StoryMeasurement:
    """Measures a video of several scenes.

    Args:
        video: `uint8 (frames of all scenes, H, W, 3)`.
        captions: one per scene, at least two.
        num_frames: frames per scene: one number for all scenes, or one per scene. None: equal lengths.

    Raises:
        ValueError: for captions outside this world, for fewer than two, or if the frames do not divide into so many scenes.
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
        video: `uint8 (F, H, W, 3)`, F at least 2, H at least 32.
        description: the content of its caption, from `world.describe` or `world.parse_caption`.

    Raises:
        ValueError: for a video of another type or shape.
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

    joint_action, joint_motions = None, []  # a scene has at most one pair
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
    """Returns the setting with the nearest colours, apart from its tint; None if none is near."""
    return nearest_palette(background.sky, background.ground)


def nearest_palette(sky: np.ndarray, ground: np.ndarray) -> str | None:
    """Returns the setting with the nearest mean colours of sky and ground; None if none is near."""
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
    """Computes the visual consistency of scenes.

    Args:
        scenes: at least two.
        pairs: the pairs of scenes, counted from 0, whose mean is taken. None: all.

    Raises:
        ValueError: for fewer than two scenes.
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
    """Returns the differences between two scenes in each part of `UNRELATED`, in its units: one per actor that both captions
    name, or one. A part that is not found in one of them differs as in unrelated stories."""
    return {part: _differences_in(part, a.identity, b.identity) for part in UNRELATED}


def _differences_in(part: str, a: dict, b: dict) -> list[float]:
    """Returns the differences between two identities in one part: one per actor that both captions name, or one."""
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
        elif part == "stripe_angle":  # which has a period of 180 degrees
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

Track = list[Body | None]  # a described actor in each frame; None where it is not seen


def _match(observation: Observation, actors: Sequence[DescribedActor]) -> list[Track]:
    """Assigns bodies to described actors, from left to right in each frame. If their numbers differ, those are assigned whose
    hues fit best."""
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
    """Distance of a body's hue from the captioned colour in degrees; 0 if the caption names none."""
    return hue_distance(body.hue, HUES[actor.colour]) if actor.colour else 0.0


def _motion(track: Track) -> str | None:
    """Recognizes one of `world.ACTIONS`; None if none fits, or the actor is recognized in too few frames."""
    seen = [(k, body) for k, body in enumerate(track) if body is not None and body.shape is not None]
    if len(seen) < PERSISTENCE * len(track):
        return None
    times = np.array([k for k, _ in seen]) / (len(track) - 1)
    places = np.array([(body.x, -body.floor) for _, body in seen])
    # Uniform motion to the side, and a parabola upwards
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
        # Hues relative to the colour's own do not wrap around.
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
    """Returns warmth and brightness of a colour, or of the difference of two, (3,); see `world.Identity`."""
    return float(colour[0] - colour[2]) / 2, float(colour.mean())


def _untinted(difference: np.ndarray, place: str) -> np.ndarray:
    """Removes the tint that explains most of a colour's difference to a palette's."""
    warmth, brightness = _tint(difference)
    warmest, brightest = (IDENTITY_RANGES[f"{place}_{kind}"][1] + EXTRA_TINT for kind in ("warmth", "brightness"))
    warm = np.array([1.0, 0.0, -1.0])
    return difference - np.clip(warmth, -warmest, warmest) * warm - np.clip(brightness, -brightest, brightest)
