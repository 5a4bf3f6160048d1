"""The settings of `python -m mask2dit.curation`. Imports nothing heavy, so that errors in them show at once."""

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from mask2dit.config import DTYPES, check_at_least, check_between, check_choice, check_finite, check_positive
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.engine.config import EngineConfig

STAGES = ("probe", "split", "write", "score", "filter", "embed", "group", "single", "caption", "verify", "export")
DETECTORS = ("transnet", "content", "adaptive", "fades")
ON_WORKERS = (
    "probe",
    "split",
    "write",
    "score",
    "embed",
    "group",
    "verify",
)  # the others take this process moments, or requests
BACKENDS = ("openai", "transformers", "stand_in")


@dataclass(kw_only=True)
class SplitConfig:
    """Detection of cuts in films."""

    detectors: list[str] = field(default_factory=lambda: ["transnet"])
    """Detectors whose cuts are combined: transnet (TransNet V2: hard cuts, dissolves and fades); PySceneDetect's content
    (hard cuts), adaptive (hard cuts, more robust to camera motion) and fades (to and from black). Your own:
    module:function, which takes a `VideoReader` and returns the first frame of every scene but the first."""
    transnet_threshold: float = 0.5
    """Probability at which transnet's transitions count."""
    doubt_above: float = 0.2
    """Probability above which transnet's other transitions are listed on the review page."""
    content_threshold: float = 27.0
    """Threshold of the detector content."""
    adaptive_threshold: float = 3.0
    """Threshold of the detector adaptive."""
    fade_threshold: float = 12.0
    """Mean brightness, 0 to 255, below which a frame counts as black."""
    force_cut_above: float | None = None
    """Length in seconds above which a scene is cut into parts (Panda-70M: 7); null: never."""
    force_cut_length: float = 5.0
    """Length of the parts in seconds (Panda-70M: 5)."""

    def __post_init__(self):
        if not self.detectors:
            raise ValueError("split.detectors is empty: name at least one, such as content")
        for name in self.detectors:
            if name not in DETECTORS and ":" not in name:
                raise ValueError(
                    f"split.detectors has to hold {', '.join(DETECTORS)} or module:function, not {name!r}"
                )
        check_between("split.transnet_threshold", self.transnet_threshold, 0, 1)
        check_between("split.doubt_above", self.doubt_above, 0, 1)
        for name in ("content_threshold", "adaptive_threshold"):
            check_positive(f"split.{name}", getattr(self, name))
        check_between("split.fade_threshold", self.fade_threshold, 0, 255)
        if self.force_cut_above is not None and not 0 < self.force_cut_length <= self.force_cut_above:
            raise ValueError(
                f"split.force_cut_length={self.force_cut_length} has to be between 0 and "
                f"split.force_cut_above={self.force_cut_above}"
            )


@dataclass(kw_only=True)
class WriteConfig:
    """Clips made from scenes."""

    encode: bool = True
    """Encode each clip as a file. false: clips are frame ranges of the films, which the manifests name; nothing is encoded
    again, and the films have to stay where they are."""
    trim_frames: int = 2
    """Frames trimmed from both ends of a scene, where the neighbouring scene often still shows."""
    remove_borders: bool = True
    """Crop black borders."""
    max_short_side: int | None = None
    """Length of the shorter side in pixels above which clips are scaled down; null: never."""

    def __post_init__(self):
        check_at_least("write.trim_frames", self.trim_frames, 0)
        if self.max_short_side is not None:
            check_at_least("write.max_short_side", self.max_short_side, 16)
            if not self.encode:
                raise ValueError(
                    "write.max_short_side needs write.encode=true: frame ranges keep the size of the film"
                )


@dataclass(kw_only=True)
class ScoreConfig:
    """Scores of clips, for the filters."""

    motion: bool = False
    """Measure motion and shake by optical flow."""
    clip: str | None = None
    """Folder of CLIP L/14 as transformers saves it, for the aesthetic score; null: not measured."""
    aesthetic_head: str | None = None
    """LAION's aesthetic head on CLIP; null: not measured."""
    text: bool = False
    """Measure text on screen and subtitles by rapidocr's detector, whose weights come with the package."""

    def __post_init__(self):
        if (self.clip is None) != (self.aesthetic_head is None):
            raise ValueError("score.clip and score.aesthetic_head belong together: set both, or neither")


@dataclass(kw_only=True)
class FilterConfig:
    """Limits that clips must meet; null: no limit."""

    min_short_side: int | None = None
    """Minimum length of a clip's shorter side in pixels, without borders."""
    min_motion: float | None = None
    """Minimum mean optical flow, in percent of the width per second."""
    max_shake: float | None = None
    """Maximum change of camera motion between frames, in percent of the width per second."""
    max_text: float | None = None
    """Maximum share of the picture covered by text, 0 to 1."""
    max_subtitles: float | None = None
    """Maximum share of frames with subtitles, 0 to 1."""
    min_aesthetic: float | None = None
    """Minimum LAION aesthetic score, about 1 to 10."""

    def __post_init__(self):
        for name in ("min_short_side", "min_motion", "max_shake"):
            if getattr(self, name) is not None:
                check_at_least(f"filter.{name}", getattr(self, name), 0)
        for name in ("max_text", "max_subtitles"):
            if getattr(self, name) is not None:
                check_between(f"filter.{name}", getattr(self, name), 0, 1)
        if self.min_aesthetic is not None:
            check_finite("filter.min_aesthetic", self.min_aesthetic)


@dataclass(kw_only=True)
class EmbedConfig:
    """Embeddings of clips, for grouping."""

    viclip: ViCLIPConfig = field(default_factory=ViCLIPConfig)
    """ViCLIP, the same model as in the evaluation."""
    batch_size: int = 16
    """Clips embedded together; their features go into one file."""

    def __post_init__(self):
        check_at_least("embed.batch_size", self.batch_size, 1)
        if not self.viclip.weights:
            raise ValueError("embed.viclip.weights has to name ViCLIP's weights, but is null")


@dataclass(kw_only=True)
class DuplicatesConfig:
    """Removal of near-identical clips of different films."""

    remove: bool = True
    """Keep one of several near-identical clips: the one with the largest picture, then the longest."""
    threshold: float = 0.97
    """Minimum cosine of the prints of two frames, tiny pictures without brightness and contrast, that count as the same."""
    min_share: float = 0.75
    """Minimum share of the shorter clip's frames, 0 to 1, that the other clip shows too."""
    min_cosine: float = 0.8
    """Minimum cosine of the ViCLIP features of two duplicates."""

    def __post_init__(self):
        check_between("duplicates.threshold", self.threshold, -1, 1)
        check_between("duplicates.min_share", self.min_share, 0, 1)
        check_between("duplicates.min_cosine", self.min_cosine, -1, 1)


@dataclass(kw_only=True)
class GroupConfig:
    """Groups of consecutive clips with similar content."""

    num_scenes: int = 3
    """Scenes per group."""
    max_gap: float = 1.0
    """Maximum gap between consecutive clips, in seconds of the film, without the transition between them."""
    threshold: float = 0.8
    """Minimum cosine of consecutive clips. The paper's ablation compares 0.0, 0.6, 0.7 and 0.8; 0.8 gave the most
    consistent videos."""
    ceiling: float = 0.98
    """Maximum cosine of any two clips of a group; above it, they count as one scene that was cut in error."""

    def __post_init__(self):
        check_at_least("group.num_scenes", self.num_scenes, 2)
        check_at_least("group.max_gap", self.max_gap, 0)
        if not -1 <= self.threshold < self.ceiling <= 1:
            raise ValueError(
                f"group.threshold={self.threshold} has to be between -1 and group.ceiling={self.ceiling}, and that at 1 or "
                "below: both are cosines"
            )


@dataclass(kw_only=True)
class CaptionConfig:
    """Captions by a vision-language model."""

    backend: str = "openai"
    """Captioner: openai (an OpenAI-compatible endpoint), transformers (a model in this process) or stand_in (a local
    server that ignores the pictures, for trying the rest of the pipeline)."""
    base_url: str = ""
    """Address of the endpoint, such as http://localhost:8000/v1."""
    model: str = ""
    """Name of the model at the endpoint, or its folder for transformers."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key; a local server needs none."""
    json_schema: bool = True
    """Ask the endpoint to constrain answers to a JSON schema. Not every endpoint supports this."""
    singles: bool = True
    """Also caption clips outside groups, one by one, if they are long enough for pre-training."""
    frames_per_scene: int = 4
    """Frames per scene shown to the model."""
    longest_side: int = 512
    """Maximum longer side of frames in pixels; larger frames are scaled down."""
    max_words: int = 150
    """Maximum words per caption. The transformer's 226 text tokens hold about 150."""
    max_attempts: int = 3
    """Attempts per group until an answer is valid."""
    temperature: float = 0.2
    """Sampling temperature of the model."""
    concurrency: int = 4
    """Simultaneous requests."""
    requests_per_minute: float | None = None
    """Maximum number of requests per minute; null: no limit."""
    timeout: float = 120.0
    """Time limit per request in seconds."""
    max_retries: int = 4
    """Retries of a request after a rate limit, a server error or a timeout, with growing delays."""

    price_input: float | None = None
    """Price per million input tokens, in any currency; null: tokens are counted without a price."""
    price_output: float | None = None
    """Price per million output tokens, in the same currency."""
    tokens_per_image: int = 400
    """Tokens per image in the estimate before the run; the endpoint's own count replaces it."""
    max_cost: float | None = None
    """Maximum cost of this run, or of this part of a shared one. The run does not start if the estimate exceeds it, and
    stops once the cost does."""

    device: str = "auto"
    """Device for transformers: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    dtype: str = "bfloat16"
    """Data type for transformers: float32, bfloat16 or float16."""
    max_new_tokens: int = 1024
    """Maximum length of an answer for transformers, in tokens."""

    def __post_init__(self):
        check_choice("caption.backend", self.backend, BACKENDS)
        for name in ("frames_per_scene", "longest_side", "max_words", "max_attempts", "concurrency", "max_new_tokens"):
            check_at_least(f"caption.{name}", getattr(self, name), 1)
        for name in ("max_retries", "temperature", "tokens_per_image"):
            check_at_least(f"caption.{name}", getattr(self, name), 0)
        for name in ("price_input", "price_output", "max_cost"):
            if getattr(self, name) is not None:
                check_at_least(f"caption.{name}", getattr(self, name), 0)
        # The configuration is written into the card, so it must not hold the key. Nor may the error message show it.
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
        """The settings that captioning still needs; None if all are set."""
        needed = {"openai": ("base_url", "model"), "transformers": ("model",), "stand_in": ()}[self.backend]
        names = [f"caption.{name}" for name in needed if not getattr(self, name)]
        return " and ".join(names) or None


@dataclass(kw_only=True)
class VerifyConfig:
    """Check of captions against their clips."""

    flag_below: float = 0.15
    """Cosine of a caption and its clip below which the review page flags them. Flagged clips are kept unless a person
    drops them."""

    def __post_init__(self):
        check_between("verify.flag_below", self.flag_below, -1, 1)


@dataclass(kw_only=True)
class ExportConfig:
    """Manifests for training."""

    folder: str = "datasets"
    """Folder for sft.json, pretrain.csv, their validation parts and the card, which replace those of an earlier run."""
    validation_share: float = 0.05
    """Share of films for validation, 0 to 1, chosen by a hash of their names, so that a film stays in its part when
    others are added."""

    def __post_init__(self):
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"export.validation_share={self.validation_share} has to be at least 0 and less than 1")


@dataclass(kw_only=True)
class CurationConfig(EngineConfig):
    """Curation from a folder of films to training manifests. `configs/curation/*.yaml` hold values."""

    films: str = "films"
    """Folder of films, searched with its subfolders."""
    shots: str | None = None
    """What the files are. null: films, which are cut. folder: shots, which are not cut; the shots of a folder, in the order
    of their names, make up a film. FILE.csv: shots, listed in order with the columns film and path, which is relative to
    `films`."""
    output: str = "outputs/curation"
    """Folder for the results of stages, the clips, their features and the review page. A run continues from existing
    results."""
    stages: list[str] = field(default_factory=lambda: list(STAGES))
    """Stages to run; the results of the others are reused."""
    num_frames: int = 49
    """Frames per scene in training; shorter clips are dropped."""
    max_stride: int = 3
    """Maximum frame stride in training: pre-training needs clips of num_frames at this stride."""
    device: str = "auto"
    """Device of the encoders: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""

    split: SplitConfig = field(default_factory=SplitConfig)
    write: WriteConfig = field(default_factory=WriteConfig)
    score: ScoreConfig = field(default_factory=ScoreConfig)
    filter: FilterConfig = field(default_factory=FilterConfig)
    embed: EmbedConfig = field(default_factory=EmbedConfig)
    duplicates: DuplicatesConfig = field(default_factory=DuplicatesConfig)
    group: GroupConfig = field(default_factory=GroupConfig)
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    verify: VerifyConfig = field(default_factory=VerifyConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

    def __post_init__(self):
        super().__post_init__()
        self.check_resources(ON_WORKERS)
        batch = self.resources["embed"].batch if "embed" in self.resources else None
        if batch is not None and batch % self.embed.batch_size:
            raise ValueError(
                f"resources.embed.batch={batch} has to be a multiple of embed.batch_size={self.embed.batch_size}: features "
                "depend on the clips that are embedded together"
            )
        if not self.stages:
            raise ValueError(f"stages is empty: name some of {', '.join(STAGES)}")
        for name in self.stages:
            if name not in STAGES:
                raise ValueError(f"stages has to hold {', '.join(STAGES)}, but holds {name!r}")
        for name in ("num_frames", "max_stride"):
            check_at_least(name, getattr(self, name), 1)
        if self.shots is not None:
            if self.shots != "folder" and not self.shots.endswith(".csv"):
                raise ValueError(f"shots={self.shots!r} has to be null, folder or a .csv file")
            if self.write.remove_borders:
                raise ValueError(
                    f"shots={self.shots} needs write.remove_borders=false: within one shot, a plain sky looks like a border"
                )
        limits = self.filter
        for name, measured, remedy in (
            ("min_motion", self.score.motion, "score.motion=true"),
            ("max_shake", self.score.motion, "score.motion=true"),
            ("max_text", self.score.text, "score.text=true"),
            ("max_subtitles", self.score.text, "score.text=true"),
            ("min_aesthetic", self.score.aesthetic_head, "score.clip and score.aesthetic_head"),
        ):
            if getattr(limits, name) is not None and not measured:
                raise ValueError(f"filter.{name} needs {remedy}")
