"""Stories of the small world: vocabulary, random sampling, and writing and parsing of captions. Independent of pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

# The vocabulary of captions
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "yellow", "green", "blue", "purple")
ACCESSORIES = {"none": "", "hat": "wearing a hat", "scarf": "wearing a scarf", "boots": "wearing boots"}
ACTIONS = ("moves right", "moves left", "jumps", "stands still")
# Actions of two neighbours together, with the motions of the left and the right one
JOINT_ACTIONS = {"move towards each other": ("moves right", "moves left"), "move apart": ("moves left", "moves right")}
# The words of a setting after an action with motion to the side, and after others
SETTINGS = {
    "desert": ("across the desert", "in the desert"),
    "meadow": ("across the meadow", "in the meadow"),
    "snow": ("across the snow", "in the snow"),
    "night": ("through the night", "in the night"),
    "beach": ("along the beach", "on the beach"),
}
MAX_ACTORS = 3
# Replaces a word that a caption leaves out, with its punctuation: the mask token of the text encoder's training.
UNNAMED = "<extra_id_0>"

# Hues of the colours in degrees, and the largest deviation of a hue with that name. Hues are at least twice as far apart.
HUES = {"red": -4.0, "yellow": 54.0, "green": 130.0, "blue": 214.0, "purple": 284.0}
MAX_HUE_ERROR = 29.0

Colour = tuple[float, float, float]  # in [0, 1]
Palette = tuple[Colour, Colour, Colour]  # upper sky, sky at the horizon and ground, before the tints of an identity

SPLITS = ("train", "held_out")
# Combinations that training stories never have; a held-out story has at least one. Each word occurs in training with others.
HELD_OUT_LOOKS = frozenset({("circle", "purple"), ("square", "yellow"), ("triangle", "blue")})
HELD_OUT_ACTIONS = frozenset({("moves left", "desert"), ("jumps", "snow"), ("moves right", "night")})

# Probabilities of 1, 2 and 3 actors, of a scene with all actors, and of a joint action
CAST_SHARES = (0.6, 0.3, 0.1)
ALL_PRESENT_SHARE = 0.6
JOINT_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Actor:
    """The captioned appearance of an actor, the same in every scene."""

    shape: str
    colour: str | None
    """None if captions leave it out; `hue` then determines its appearance."""
    accessory: str
    """A key of `ACCESSORIES`."""
    hue: float | None = None
    """Hue in degrees; None for a named colour, whose hue is in `HUES`."""

    @property
    def usual_hue(self) -> float:
        """Hue in degrees to which the identity's deviation is added."""
        return HUES[self.colour] if self.hue is None else self.hue


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A scene of a story. Its values are not part of the identity and differ between scenes."""

    present: tuple[int, ...]
    """Indices of the visible actors, from left to right, in the order of the cast."""
    actions: tuple[str, ...]
    """Action of each of them: one of `ACTIONS`, or one of `JOINT_ACTIONS` for two neighbours."""
    starts: tuple[float, ...]
    """Start of each actor in the range that its motion leaves, 0 (left) to 1 (right)."""
    camera: float
    """Position of the camera along the horizon, 0 to 1, with period 1. Decorations and ground texture shift with it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """Values that all scenes of a story share and no caption names."""

    hues: tuple[float, ...]
    """Deviation of each actor from the hue of its colour in degrees."""
    sizes: tuple[float, ...]
    """Size of each actor, as the logarithm of the ratio to the usual size."""
    horizon: float
    """Distance of the horizon from the upper edge, as a share of the height."""
    sky_warmth: float
    """Added to red and subtracted from blue, as a share of full intensity."""
    sky_brightness: float
    """Added to all three channels."""
    ground_warmth: float
    """Same as `sky_warmth`, for the ground."""
    ground_brightness: float
    """Same as `sky_brightness`, for the ground."""
    stripe_angle: float
    """Angle between the wave vector of the ground's stripes and the horizon in degrees."""
    stripe_wavelength: float
    """Distance between stripes, as the logarithm of the ratio to the usual one."""


# Ranges of the values of an identity, which are uniformly distributed
IDENTITY_RANGES = {
    "hues": (-14.0, 14.0),
    "sizes": (-0.18, 0.18),
    "horizon": (0.5, 0.75),
    "sky_warmth": (-0.06, 0.06),
    "sky_brightness": (-0.05, 0.05),
    "ground_warmth": (-0.06, 0.06),
    "ground_brightness": (-0.05, 0.05),
    "stripe_angle": (-45.0, 45.0),
    "stripe_wavelength": (-0.35, 0.35),
}


@dataclass(frozen=True, kw_only=True)
class Story:
    """A cast, a setting and scenes."""

    actors: tuple[Actor, ...]
    setting: str | None
    """None if captions leave it out; `palette` then determines its appearance."""
    scenes: tuple[Scene, ...]
    identities: tuple[Identity, ...]
    """Identity of each scene, equal in all of them unless the story drifts."""
    palette: Palette | None = None
    """Colours of the background; None for a named setting, whose palette is in `render.PALETTES`."""

    def __post_init__(self):
        if len(self.identities) != len(self.scenes):
            raise ValueError(
                f"a story needs one identity per scene, but has {len(self.identities)} for {len(self.scenes)} scenes"
            )


@dataclass(frozen=True, kw_only=True)
class DescribedActor:
    """An actor as a caption describes it."""

    number: int
    """Number of the actor, counted from 1, as in "Actor1"."""
    shape: str
    colour: str | None
    """None if the caption leaves it out."""
    accessory: str
    action: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """The content of a caption."""

    actors: tuple[DescribedActor, ...]
    """Actors from left to right."""
    setting: str | None
    """None if the caption leaves it out."""


def sample_story(
    seed: int,
    num_scenes: int = 3,
    split: Literal["train", "held_out"] = "train",
    drift: float = 0.0,
    unnamed: float = 0.0,
    cast_shares: Sequence[float] = CAST_SHARES,
) -> Story:
    """Draws a random story, which depends on the arguments alone.

    Args:
        seed: seed of the story, at least 0; the same seed gives unrelated stories in the two splits.
        num_scenes: number of scenes.
        split: "train" for stories without the combinations of `HELD_OUT_LOOKS` and `HELD_OUT_ACTIONS`, "held_out" for stories
            with at least one of them.
        drift: change of the identity from scene to scene, from 0 (none) to 1 (as between unrelated stories).
        unnamed: probability that captions leave out the colour of an actor, which is then any that does not give a held-out
            look. Such training stories break the inference of an actor's shape from its colour.
        cast_shares: probabilities of 1, 2 and 3 actors. Stories whose scenes do not show all actors, and those of the other
            split, are drawn again.

    Raises:
        ValueError: if an argument is out of its range.
    """
    if seed < 0 or num_scenes < 1:
        raise ValueError(f"seed must be at least 0 and num_scenes at least 1, but got {seed} and {num_scenes}")
    if split not in SPLITS:
        raise ValueError(f'split must be "train" or "held_out", but got {split!r}')
    if not 0 <= drift <= 1:
        raise ValueError(f"drift must lie between 0 (none) and 1 (as between unrelated stories), but got {drift}")
    if not 0 <= unnamed <= 1 or (unnamed and split == "held_out"):
        raise ValueError(f'unnamed must lie between 0 and 1, and be 0 for split="held_out", but got {unnamed}')
    rng = np.random.default_rng([seed, split == "held_out"])
    while True:
        actors, setting, scenes = _sample_cast(rng, cast_shares), _choose(rng, SETTINGS), []
        for _ in range(num_scenes):
            scenes.append(_sample_scene(rng, len(actors), scenes[-1] if scenes else None))
        identities = (_sample_identity(rng, len(actors)),) * num_scenes
        story = Story(actors=actors, setting=setting, scenes=tuple(scenes), identities=identities)
        everyone_appears = len({actor for scene in scenes for actor in scene.present}) == len(actors)
        if everyone_appears and is_held_out(story) == (split == "held_out"):
            break
    if drift:
        own = [_sample_identity(rng, len(actors)) for _ in scenes]
        story = replace(story, identities=tuple(_blend(story.identities[0], other, drift) for other in own))
    if unnamed:
        story = replace(story, actors=_leave_out_colours(rng, story, unnamed))
    return story


def is_held_out(story: Story) -> bool:
    """Returns True if a story has a combination that no training story has."""
    looks = {(actor.shape, actor.colour) for actor in story.actors}
    actions = {(action, story.setting) for scene in story.scenes for action in scene.actions}
    return bool(looks & HELD_OUT_LOOKS or actions & HELD_OUT_ACTIONS)


def with_new_identity(story: Story, seed: int) -> Story:
    """Returns a story with the same captions and an unrelated identity, the reference of visual consistency."""
    identity = _sample_identity(np.random.default_rng([seed, 2]), len(story.actors))
    return replace(story, identities=(identity,) * len(story.scenes))


def _choose(rng: np.random.Generator, options):
    options = list(options)
    return options[rng.integers(len(options))]


def _sample_cast(rng: np.random.Generator, shares: Sequence[float]) -> tuple[Actor, ...]:
    size = 1 + rng.choice(MAX_ACTORS, p=shares)
    return tuple(
        Actor(shape=_choose(rng, SHAPES), colour=COLOURS[colour], accessory=_choose(rng, ACCESSORIES))
        for colour in rng.permutation(len(COLOURS))[:size]
    )


def nearest_colour(hue: float) -> str | None:
    """Returns the colour that a hue belongs to; None if it belongs to none."""
    nearest = min(HUES, key=lambda colour: hue_distance(hue, HUES[colour]))
    return nearest if hue_distance(hue, HUES[nearest]) <= MAX_HUE_ERROR else None


def hue_distance(a: float, b: float) -> float:
    """Returns the distance between two hues in degrees, 0 to 180."""
    return abs((a - b + 180) % 360 - 180)


def _leave_out_colours(rng: np.random.Generator, story: Story, share: float) -> tuple[Actor, ...]:
    """Replaces the colours of a share of the actors by random hues, which are no other actor's and give no held-out look."""
    result = list(story.actors)
    for k, actor in enumerate(story.actors):
        if rng.random() >= share:
            continue
        others = [other.usual_hue for other in result if other is not actor]
        while True:
            hue = float(rng.uniform(0, 360))
            looks = {(actor.shape, nearest_colour(hue + identity.hues[k])) for identity in story.identities}
            if not looks & HELD_OUT_LOOKS and all(hue_distance(hue, other) > MAX_HUE_ERROR for other in others):
                break
        result[k] = replace(actor, colour=None, hue=hue)
    return tuple(result)


def _sample_scene(rng: np.random.Generator, num_actors: int, previous: Scene | None) -> Scene:
    if rng.random() < ALL_PRESENT_SHARE:
        present = range(num_actors)
    else:
        present = sorted(rng.permutation(num_actors)[: rng.integers(1, num_actors + 1)])
    actions = [_choose(rng, ACTIONS) for _ in present]
    if len(actions) > 1 and rng.random() < JOINT_SHARE:
        left = rng.integers(len(actions) - 1)
        actions[left : left + 2] = [_choose(rng, JOINT_ACTIONS)] * 2
    # The camera moves by at least a quarter at each cut, so that every cut can be detected.
    camera = rng.random() if previous is None else (previous.camera + rng.uniform(0.25, 0.75)) % 1
    starts = tuple(float(start) for start in rng.random(len(actions)))
    return Scene(present=tuple(int(k) for k in present), actions=tuple(actions), starts=starts, camera=float(camera))


def _sample_identity(rng: np.random.Generator, num_actors: int) -> Identity:
    values = {}
    for name, (low, high) in IDENTITY_RANGES.items():
        is_of_actors = name in ("hues", "sizes")
        value = rng.uniform(low, high, num_actors if is_of_actors else None)
        values[name] = tuple(float(one) for one in value) if is_of_actors else float(value)
    return Identity(**values)


def _blend(shared: Identity, own: Identity, share_of_own: float) -> Identity:
    def blend(a, b):
        if isinstance(a, tuple):
            return tuple(map(blend, a, b))
        return (1 - share_of_own) * a + share_of_own * b

    names = [field.name for field in fields(Identity)]
    return Identity(**{name: blend(getattr(shared, name), getattr(own, name)) for name in names})


# Captions


def describe(story: Story, k: int) -> Description:
    """Returns the content of the caption of scene `k`, counted from 0. Raises `IndexError` if there is no such scene."""
    scene = story.scenes[k]
    actors = tuple(
        DescribedActor(
            number=index + 1,
            shape=story.actors[index].shape,
            colour=story.actors[index].colour,
            accessory=story.actors[index].accessory,
            action=action,
        )
        for index, action in zip(scene.present, scene.actions)
    )
    return Description(actors=actors, setting=story.setting)


def caption(story: Story, k: int) -> str:
    """Returns the caption of scene `k`, counted from 0, such as "Actor1 (red circle, wearing a hat) jumps in the snow."."""
    return write_caption(describe(story, k))


def write_caption(description: Description) -> str:
    """Writes a description as a sentence, which `parse_caption` parses unless it leaves something out."""
    clauses, waiting = [], ""
    for actor in description.actors:
        colour = UNNAMED if actor.colour is None else f"({actor.colour}"
        look = ", ".join(filter(None, [f"{colour} {actor.shape}", ACCESSORIES[actor.accessory]]))
        mention = f"{waiting}Actor{actor.number} {look})"
        if actor.action in JOINT_ACTIONS and not waiting:
            waiting = f"{mention} and "
        else:
            clauses.append(f"{mention} {actor.action}")
            waiting = ""
    text = " and ".join(filter(None, [", ".join(clauses[:-1]), clauses[-1]]))
    if description.setting is None:
        return f"{text} {UNNAMED} the {UNNAMED}"
    goes_somewhere = description.actors[-1].action not in ("jumps", "stands still")
    return f"{text} {SETTINGS[description.setting][0 if goes_somewhere else 1]}."


def parse_caption(text: str) -> Description:
    """Parses a caption of this world.

    Raises:
        ValueError: for a caption outside this world; the message names the error and what is possible.
    """

    def fail(message: str):
        raise ValueError(f"the caption {text!r} is outside the story world: {message}")

    sentence = " ".join(text.split()).removesuffix(".")
    phrases = {phrase: setting for setting, both in SETTINGS.items() for phrase in both}
    phrase = next((phrase for phrase in phrases if sentence.endswith(f" {phrase}")), None)
    if phrase is None:
        fail(f"it has to end with a setting, which is one of {_listed(phrases)}")
    sentence = sentence.removesuffix(f" {phrase}")

    # ["", number, look, rest, number, look, rest, …]
    parts = re.split(r"Actor(\d+) \(([^()]*)\)", sentence)
    mentions = list(zip(parts[1::3], parts[2::3], parts[3::3]))
    if parts[0] or not mentions:
        fail('it has to begin with an actor, such as "Actor1 (red circle, wearing a hat)"')
    if len(mentions) > MAX_ACTORS:
        fail(f"it has {len(mentions)} actors, but a scene shows at most {MAX_ACTORS}")
    actors: list[DescribedActor] = []
    partner = None
    for position, (number, look, rest) in enumerate(mentions):
        if not 1 <= int(number) <= MAX_ACTORS:
            fail(f"there is no Actor{number}; a story has Actor1 to Actor{MAX_ACTORS}")
        colour_and_shape, _, accessory_phrase = look.partition(", ")
        colour, _, shape = colour_and_shape.partition(" ")
        accessory = next((name for name, words in ACCESSORIES.items() if words == accessory_phrase), None)
        for kind, word, known in (
            ("colour", colour, COLOURS),
            ("shape", shape, SHAPES),
            ("accessory", accessory_phrase, [words for words in ACCESSORIES.values() if words]),
        ):
            if word not in known and (kind != "accessory" or accessory is None):
                fail(f"{word!r} is no {kind} of Actor{number}; there are {_listed(known)}")
        is_last = position == len(mentions) - 1
        action = rest.strip() if is_last else re.sub(r"(,| and) $", "", rest).strip()
        if not is_last and rest == " and " and partner is None:
            partner = number
            action = ""  # the next actor's
        elif not is_last and not rest.endswith((", ", " and ")):
            fail('actors are joined by ", " or " and "')
        elif partner is not None and action not in JOINT_ACTIONS:
            fail(f"Actor{partner} and Actor{number} can do together {_listed(JOINT_ACTIONS)}, but not {action!r}")
        elif partner is None and action not in ACTIONS:
            hint = "that takes two actors" if action in JOINT_ACTIONS else f"it can do {_listed(ACTIONS)}"
            fail(f"{action!r} is no action of Actor{number} alone; {hint}")
        actors.append(
            DescribedActor(number=int(number), shape=shape, colour=colour, accessory=accessory, action=action)
        )
        if action and partner is not None:
            actors[-2] = replace(actors[-2], action=action)
            partner = None
    numbers = [actor.number for actor in actors]
    if numbers != sorted(set(numbers)):
        fail("each actor is named once, in the order of the numbers, which is theirs from left to right")
    if len({actor.colour for actor in actors}) < len(actors):
        fail("each actor needs a colour of its own")
    return Description(actors=tuple(actors), setting=phrases[phrase])


def _listed(words) -> str:
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
