"""Stories: their vocabulary, how they are drawn at random, and captions written and read. Nothing here knows of pixels."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

import numpy as np

# What captions can say.
SHAPES = ("circle", "square", "triangle")
COLOURS = ("red", "yellow", "green", "blue", "purple")
ACCESSORIES = {"none": "", "hat": "wearing a hat", "scarf": "wearing a scarf", "boots": "wearing boots"}
ACTIONS = ("moves right", "moves left", "jumps", "stands still")
# What two neighbours do together, and the motions of the left and of the right one.
JOINT_ACTIONS = {"move towards each other": ("moves right", "moves left"), "move apart": ("moves left", "moves right")}
# A setting after an action that goes somewhere, and after one that does not.
SETTINGS = {
    "desert": ("across the desert", "in the desert"),
    "meadow": ("across the meadow", "in the meadow"),
    "snow": ("across the snow", "in the snow"),
    "night": ("through the night", "in the night"),
    "beach": ("along the beach", "on the beach"),
}
MAX_ACTORS = 3
# In place of a word, with the punctuation at it, that a caption leaves out: the mask of the text encoder's own training.
UNNAMED = "<extra_id_0>"

# What colours look like: hues in degrees, and how far off one still has its name. They are at least twice as far apart.
HUES = {"red": -4.0, "yellow": 54.0, "green": 130.0, "blue": 214.0, "purple": 284.0}
MAX_HUE_ERROR = 29.0

Colour = tuple[float, float, float]  # in [0, 1]
Palette = tuple[Colour, Colour, Colour]  # sky above, sky at the horizon, ground, before an identity tints them

SPLITS = ("train", "held_out")
# Never together in a training story; a held-out story has at least one of them. Each word occurs in training with others.
HELD_OUT_LOOKS = frozenset({("circle", "purple"), ("square", "yellow"), ("triangle", "blue")})
HELD_OUT_ACTIONS = frozenset({("moves left", "desert"), ("jumps", "snow"), ("moves right", "night")})

# How often stories have 1, 2 and 3 actors; how often a scene shows them all, and two that do something together.
CAST_SHARES = (0.6, 0.3, 0.1)
ALL_PRESENT_SHARE = 0.6
JOINT_SHARE = 0.3


@dataclass(frozen=True, kw_only=True)
class Actor:
    """What captions say of an actor, in every scene with the same words."""

    shape: str
    colour: str | None
    """None: captions leave it out, and `hue` says what it looks like."""
    accessory: str
    """A key of `ACCESSORIES`."""
    hue: float | None = None
    """Degrees; None for a colour with a name, which has its own in `HUES`."""

    @property
    def usual_hue(self) -> float:
        """From which an identity's hue is off."""
        return HUES[self.colour] if self.hue is None else self.hue


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One scene of a story; its numbers may differ from scene to scene and are no identity."""

    present: tuple[int, ...]
    """Indices of the actors that are seen, from left to right, which is always their order in the cast."""
    actions: tuple[str, ...]
    """Of each of them: one of `ACTIONS`, or one of `JOINT_ACTIONS` for two neighbours."""
    starts: tuple[float, ...]
    """Where in the room that its motion leaves an actor begins, 0 (left) to 1 (right)."""
    camera: float
    """Where the camera stands along the horizon, 0 to 1, which is 0 again: decorations and ground texture shift with it."""


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What stays the same through a story and no caption mentions."""

    hues: tuple[float, ...]
    """Of each actor: degrees off the hue of its colour."""
    sizes: tuple[float, ...]
    """Of each actor, as the logarithm of the ratio to the usual size."""
    horizon: float
    """Where it lies, as a share of the height from above."""
    sky_warmth: float
    """Added to red and taken from blue, as a share of full intensity."""
    sky_brightness: float
    """Added to all three."""
    ground_warmth: float
    ground_brightness: float
    stripe_angle: float
    """The ground's stripes: degrees between the direction in which they alternate and the horizon."""
    stripe_wavelength: float
    """From stripe to stripe, as the logarithm of the ratio to the usual one."""


# From where to where each of an identity's values is drawn, evenly.
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
    """None: captions leave it out, and `palette` says what it looks like."""
    scenes: tuple[Scene, ...]
    identities: tuple[Identity, ...]
    """Of each scene: equal in all of them, but for a story that drifts."""
    palette: Palette | None = None
    """Of the background; None for a setting with a name, which has its own in `render.PALETTES`."""

    def __post_init__(self):
        if len(self.identities) != len(self.scenes):
            raise ValueError(
                f"a story needs an identity a scene, but has {len(self.identities)} for {len(self.scenes)}"
            )


@dataclass(frozen=True, kw_only=True)
class DescribedActor:
    """All that a caption says of an actor."""

    number: int
    """From 1, as in "Actor1"."""
    shape: str
    colour: str | None
    """None: it says nothing of it."""
    accessory: str
    action: str


@dataclass(frozen=True, kw_only=True)
class Description:
    """All that a caption says."""

    actors: tuple[DescribedActor, ...]
    """From left to right."""
    setting: str | None
    """None: it says nothing of it."""


def sample_story(
    seed: int,
    num_scenes: int = 3,
    split: Literal["train", "held_out"] = "train",
    drift: float = 0.0,
    unnamed: float = 0.0,
    cast_shares: Sequence[float] = CAST_SHARES,
) -> Story:
    """A random story that depends on the arguments alone.

    Args:
        seed: at least 0; the same seed gives unrelated stories in the two splits.
        num_scenes: scenes of the story.
        split: "train" stories have none of the combinations in `HELD_OUT_LOOKS` and `HELD_OUT_ACTIONS`, "held_out" ones at
            least one.
        drift: how far identity changes from scene to scene: 0 not at all, 1 as between unrelated stories.
        unnamed: the share of actors whose colour captions leave out. It is any, but for those that would read as a
            held-out look. Such training stories break the inference of an actor's shape from its colour.
        cast_shares: probabilities of 1, 2 and 3 actors. A story whose scenes do not show all actors, or of the other split,
            is drawn again.

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
    """Whether a story has a combination that no training story has."""
    looks = {(actor.shape, actor.colour) for actor in story.actors}
    actions = {(action, story.setting) for scene in story.scenes for action in scene.actions}
    return bool(looks & HELD_OUT_LOOKS or actions & HELD_OUT_ACTIONS)


def with_new_identity(story: Story, seed: int) -> Story:
    """The same story as its captions tell it, with an unrelated identity: what visual consistency is measured against."""
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
    """The colour whose name a hue has; None if it has none."""
    nearest = min(HUES, key=lambda colour: hue_distance(hue, HUES[colour]))
    return nearest if hue_distance(hue, HUES[nearest]) <= MAX_HUE_ERROR else None


def hue_distance(a: float, b: float) -> float:
    """Degrees between two hues, 0 to 180."""
    return abs((a - b + 180) % 360 - 180)


def _leave_out_colours(rng: np.random.Generator, story: Story, share: float) -> tuple[Actor, ...]:
    """The actors, this share of them with any hue that is not another's and never shows a held-out look."""
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
    # A new place at each cut, at least a quarter away, so that every cut can be seen.
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
    """What the caption of scene `k`, counted from 0, says.

    Raises:
        IndexError: if the story has no such scene.
    """
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
    """The caption of scene `k`, counted from 0, such as "Actor1 (red circle, wearing a hat) jumps in the snow."."""
    return write_caption(describe(story, k))


def write_caption(description: Description) -> str:
    """The sentence that says `description`; `parse_caption` reads it back unless it leaves something out."""
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
    """What a caption says, if it is one that this world can show.

    Raises:
        ValueError: if it is not; the message names what is wrong and what is possible.
    """

    def fail(message: str):
        raise ValueError(f"the caption {text!r} is outside the story world: {message}")

    sentence = " ".join(text.split()).removesuffix(".")
    phrases = {phrase: setting for setting, both in SETTINGS.items() for phrase in both}
    phrase = next((phrase for phrase in phrases if sentence.endswith(f" {phrase}")), None)
    if phrase is None:
        fail(f"it has to end with a setting, which is one of {_listed(phrases)}")
    sentence = sentence.removesuffix(f" {phrase}")

    # ["", number, look, what follows, number, look, what follows, …]
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
