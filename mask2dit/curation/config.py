"""The settings of `python -m mask2dit.curation`. Imports nothing heavy, so that a mistake in them shows at once."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mask2dit.config import DTYPES, check_at_least, check_choice, check_positive, parse_shard
from mask2dit.encoders.config import ViCLIPConfig

STAGES = ("probe", "split", "write", "score", "filter", "embed", "group", "single", "caption", "verify", "export")
BACKENDS = ("openai", "transformers", "stand_in")


@dataclass(kw_only=True)
class SplitConfig:
    detectors: list[str] = field(default_factory=lambda: ["content"])
    """Whose cuts are taken together: content (hard cuts), adaptive (the same, less easily fooled by a fast camera), fades (to
    and from black), each by PySceneDetect; or module:function of your own, such as a learned one, which takes a `VideoReader`
    and returns the first frame of every scene but the first."""
    content_threshold: float = 27.0
    adaptive_threshold: float = 3.0
    fade_threshold: float = 12.0
    """Mean brightness, in 0 … 255, below which a picture counts as black."""
    force_cut_above: float | None = None
    """Seconds above which a scene is cut into parts, as Panda-70M does (above 7 s, into parts of 5 s); null: never."""
    force_cut_length: float = 5.0
    """Seconds of such a part."""

    def __post_init__(self):
        if not self.detectors:
            raise ValueError("split.detectors is empty: name at least one, such as content")
        for name in self.detectors:
            if name not in ("content", "adaptive", "fades") and ":" not in name:
                raise ValueError(
                    f"split.detectors has to hold content, adaptive, fades or module:function, not {name!r}"
                )
        if self.force_cut_above is not None and not 0 < self.force_cut_length <= self.force_cut_above:
            raise ValueError(
                f"split.force_cut_length={self.force_cut_length} has to lie between 0 and "
                f"split.force_cut_above={self.force_cut_above}"
            )


@dataclass(kw_only=True)
class WriteConfig:
    trim_frames: int = 2
    """Frames left out at both ends of a scene, where cuts often still show the scene beside it."""
    remove_borders: bool = True
    max_short_side: int | None = None
    """Pixels of the shorter side from which on clips are scaled down; null: never."""

    def __post_init__(self):
        check_at_least("write.trim_frames", self.trim_frames, 0)
        if self.max_short_side is not None:
            check_at_least("write.max_short_side", self.max_short_side, 16)


@dataclass(kw_only=True)
class ScoreConfig:
    """What is measured of every clip, for the filters."""

    motion: bool = False
    """Motion and shake, by optical flow."""
    clip: str | None = None
    """A folder of CLIP L/14 as transformers saves it, for the aesthetic score."""
    aesthetic_head: str | None = None
    """LAION's head on it."""
    text_detector: str | None = None
    """A text detector of the kind DB in ONNX, such as PP-OCR's in OpenCV's model zoo, for text on screen."""

    def __post_init__(self):
        if (self.clip is None) != (self.aesthetic_head is None):
            raise ValueError("score.clip and score.aesthetic_head belong together: set both, or neither")


@dataclass(kw_only=True)
class FilterConfig:
    """Limits; null: none."""

    min_short_side: int | None = None
    """Pixels of a clip's shorter side, without borders."""
    min_motion: float | None = None
    """Mean optical flow in percent of the width a second, below which a clip is too still."""
    max_shake: float | None = None
    """Change of the camera's movement from frame to frame, in the same unit, above which it is too shaky."""
    max_text: float | None = None
    """Share of the picture, 0 … 1, that text may cover."""
    min_aesthetic: float | None = None
    """LAION's score, about 1 … 10."""


@dataclass(kw_only=True)
class EmbedConfig:
    viclip: ViCLIPConfig = field(default_factory=ViCLIPConfig)
    """The evaluation's, which measures the same similarity."""
    batch_size: int = 16
    """Clips at once, whose features are one file."""

    def __post_init__(self):
        check_at_least("embed.batch_size", self.batch_size, 1)
        if not self.viclip.weights:
            raise ValueError("embed.viclip.weights has to name ViCLIP's weights, but is null")


@dataclass(kw_only=True)
class GroupConfig:
    num_scenes: int = 3
    max_gap: float = 1.0
    """Seconds of the film between the end of a clip and the start of the next."""
    threshold: float = 0.8
    """What the cosines of neighbouring clips have to reach. The paper's ablation: 0.0, 0.6, 0.7, 0.8, of which 0.8 gave the
    most consistent videos."""
    ceiling: float = 0.98
    """Above this cosine two clips are taken for one scene that was cut in error."""

    def __post_init__(self):
        check_at_least("group.num_scenes", self.num_scenes, 2)
        check_at_least("group.max_gap", self.max_gap, 0)
        if not -1 <= self.threshold < self.ceiling <= 1:
            raise ValueError(
                f"group.threshold={self.threshold} has to lie between -1 and group.ceiling={self.ceiling}, and that at 1 or "
                "below: both are cosines"
            )


@dataclass(kw_only=True)
class CaptionConfig:
    backend: str = "openai"
    """openai (an OpenAI-compatible endpoint), transformers (a model in this process), or stand_in (a server on loopback that
    never looks at the pictures: to try everything else)."""
    base_url: str = ""
    """Of the endpoint, such as http://localhost:8000/v1."""
    model: str = ""
    """Its name at the endpoint, or its folder for transformers."""
    api_key_env: str = "OPENAI_API_KEY"
    """The name of the environment variable that holds the key; a server of one's own needs none."""
    json_schema: bool = True
    """Ask the endpoint to hold answers to a JSON schema. Not every one can."""
    singles: bool = True
    """Caption the clips outside groups too, one by one, where they are long enough for pre-training."""
    frames_per_scene: int = 4
    longest_side: int = 512
    """Pixels to which frames are scaled down."""
    max_words: int = 150
    """Of one caption. The transformer's window of 226 tokens holds about so many."""
    max_attempts: int = 3
    """How often a group is asked for while answers are not valid."""
    temperature: float = 0.2
    concurrency: int = 4
    """Requests at once."""
    requests_per_minute: float | None = None
    timeout: float = 120.0
    """Seconds for one answer."""
    max_retries: int = 4
    """Of a request that met a rate limit, a server error or the timeout, ever later."""

    price_input: float | None = None
    """Of a million tokens, in any currency; null: tokens are counted without a price."""
    price_output: float | None = None
    tokens_per_image: int = 400
    """For the estimate before the run; the endpoint's own count replaces it."""
    max_cost: float | None = None
    """Of this run, or of this part of a shared one: it does not start if its estimate is more, and stops when it has cost
    more."""

    device: str = "auto"
    """For transformers."""
    dtype: str = "bfloat16"
    max_new_tokens: int = 1024

    def __post_init__(self):
        check_choice("caption.backend", self.backend, BACKENDS)
        for name in ("frames_per_scene", "longest_side", "max_words", "max_attempts", "concurrency"):
            check_at_least(f"caption.{name}", getattr(self, name), 1)
        for name in ("max_retries", "temperature"):
            check_at_least(f"caption.{name}", getattr(self, name), 0)
        # The configuration is written into the card, so that no key may stand in it; nor is it shown here.
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            raise ValueError("caption.api_key_env has to be the name of an environment variable, not the key itself")
        if "@" in urlsplit(self.base_url).netloc:
            raise ValueError(
                "caption.base_url holds a user or a password: put the key into caption.api_key_env's variable"
            )
        for name in ("timeout", "requests_per_minute"):
            if getattr(self, name) is not None:
                check_positive(f"caption.{name}", getattr(self, name))
        check_choice("caption.dtype", self.dtype, DTYPES)
        if self.max_cost is not None and None in (self.price_input, self.price_output):
            raise ValueError("caption.max_cost needs caption.price_input and caption.price_output")

    @property
    def missing(self) -> str | None:
        """What has to be set before anything can be captioned, if something has."""
        needed = {"openai": ("base_url", "model"), "transformers": ("model",), "stand_in": ()}[self.backend]
        names = [f"caption.{name}" for name in needed if not getattr(self, name)]
        return " and ".join(names) or None


@dataclass(kw_only=True)
class VerifyConfig:
    flag_below: float = 0.15
    """The cosine of a caption and its clip below which the review page flags it. It flags; only a person drops."""


@dataclass(kw_only=True)
class ExportConfig:
    folder: str = "datasets"
    """Where sft.json, pretrain.csv, their validation parts and the card are written, over those of an earlier run."""
    validation_share: float = 0.05
    """Of the films, by a hash of their names, so that a film stays where it is when others are added."""

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"export.validation_share={self.validation_share} has to be at least 0 and less than 1")


@dataclass(kw_only=True)
class CurationConfig:
    """From a folder of films to the trainer's manifests. `configs/curation/*.yaml` hold values."""

    films: str = "films"
    """A folder; films in folders within it are found too."""
    output: str = "outputs/curation"
    """The folder for what stages find, for clips, features and the review page. A run goes on from what it holds."""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Which to run; the results of others are taken as they are."""
    shard: str = "0/1"
    """i/n: the films of the i-th of n parts, so that n processes share the work. Run 0/1 at the end, which finds everything
    done and exports."""
    num_frames: int = 49
    """Frames of a scene in training; shorter clips are dropped."""
    max_stride: int = 3
    """As in training: pre-training needs longer clips, of num_frames at this stride."""
    device: str = "auto"

    split: SplitConfig = field(default_factory=SplitConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self):
        if not self.stages:
            raise ValueError(f"stages is empty: name some of {', '.join(STAGES)}")
        for name in self.stages:
            if name not in STAGES:
                raise ValueError(f"stages has to hold {', '.join(STAGES)}, but holds {name!r}")
        for name in ("num_frames", "max_stride"):
            check_at_least(name, getattr(self, name), 1)
        parse_shard(self.shard)
        limits = self.filter
        for name, measured, remedy in (
            ("min_motion", self.score.motion, "score.motion=true"),
            ("max_shake", self.score.motion, "score.motion=true"),
            ("max_text", self.score.text_detector, "score.text_detector"),
            ("min_aesthetic", self.score.aesthetic_head, "score.clip and score.aesthetic_head"),
        ):
            if getattr(limits, name) is not None and not measured:
                raise ValueError(f"filter.{name} needs {remedy}")
