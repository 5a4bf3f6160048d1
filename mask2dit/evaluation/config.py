"""The settings of `python -m mask2dit.evaluation`. Imports nothing heavy, so that a mistake in them shows at once."""

from dataclasses import dataclass, field, fields

from mask2dit.config import check_at_least, check_choice, parse_shard
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.inference.config import InferenceConfig, SamplingConfig

MODES = ("fixed", "extension", "separate", "merged")
BOUNDARIES = ("given", "equal", "detected")
VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)


@dataclass(kw_only=True)
class GenerationConfig(SamplingConfig):
    """How stories are generated."""

    mode: str = "fixed"
    """fixed (the scenes of a window together), extension (the first scenes together, each later one from those before it),
    separate (every scene by itself, which any CogVideoX can do) or merged (all prompts in one, for a single clip)."""
    initial_scenes: int = 2
    """Scenes that an extension starts from."""

    negative_prompt: str = ""
    """One text for all scenes."""
    height: int = 480
    """In pixels, as the width."""
    width: int = 720
    num_frames: int = 49
    """Frames per scene, unless the story names a duration."""

    def __post_init__(self):
        super().__post_init__()
        check_choice("generation.mode", self.mode, MODES)
        for name in ("initial_scenes", "num_frames"):
            check_at_least(f"generation.{name}", getattr(self, name), 1)

    def inference(
        self, prompts: list[str], num_frames: list[int], device: str, seed: int, save_path: str
    ) -> InferenceConfig:
        """The configuration that generates these prompts."""
        shared = {field.name: getattr(self, field.name) for field in fields(SamplingConfig)}
        return InferenceConfig(
            **{**shared, "num_frames": num_frames}, prompts=prompts, device=device, seed=seed, save_path=save_path
        )


@dataclass(kw_only=True)
class CutConfig:
    threshold: float = 27.0
    """Of PySceneDetect's content detector."""
    min_scene_frames: int = 5
    tolerance: int = 2
    """Frames by which a cut may miss the boundary that it is meant to be at."""


@dataclass(kw_only=True)
class FrechetConfig:
    reference: str | None = None
    """A folder of real videos to compare with, one clip a file; null: no distance."""
    videomae: str | None = "models/FVD/vit_g_hybrid_pt_1200e_ssv2_ft.pth"
    """VideoMAE-v2's weights: the content-debiased distance."""
    i3d: str | None = "models/FVD/i3d_pretrained_400.pt"
    """I3D's weights: the usual distance."""
    allow_different_sizes: bool = False


@dataclass(kw_only=True)
class QualityConfig:
    clip: str | None = "models/clip-vit-large-patch14"
    """A folder of CLIP L/14 as transformers saves it, for the aesthetic score."""
    aesthetic_head: str | None = "models/sa_0_4_vit_l_14_linear.pth"
    """LAION's head on it: the linear one, or the perceptron of the improved predictor."""
    dino: str | None = "models/dino-vitb16"
    """A folder of DINO B/16, for subject consistency."""
    background_clip: str | None = "models/clip-vit-base-patch32"
    """A folder of CLIP B/32, for background consistency."""
    num_frames: int = 16
    """Frames of a scene that are looked at."""


@dataclass(kw_only=True)
class VBenchConfig:
    command: str | None = None
    """The `vbench` program of the environment that VBench is installed in; null: VBench is not run."""
    dimensions: list[str] = field(default_factory=lambda: ["imaging_quality", "motion_smoothness", "dynamic_degree"])

    def __post_init__(self):
        for dimension in self.dimensions:
            check_choice("vbench.dimensions", dimension, VBENCH_DIMENSIONS)


@dataclass(kw_only=True)
class JudgeConfig:
    """A vision-language model that answers the rubric in docs/evaluation.md."""

    base_url: str | None = None
    """Of an OpenAI-compatible endpoint; null: no judge."""
    model: str = ""
    api_key_env: str = "OPENAI_API_KEY"
    """The environment variable that holds the key."""
    frames_per_scene: int = 3
    max_attempts: int = 3
    """How often a story is judged while answers are not valid."""

    def __post_init__(self):
        for name in ("frames_per_scene", "max_attempts"):
            check_at_least(f"judge.{name}", getattr(self, name), 1)


@dataclass(kw_only=True)
class EvaluationConfig:
    """What is evaluated and with what. `configs/evaluation/*.yaml` hold values."""

    name: str = "Mask2DiT"
    """Of this run, in reports."""
    output: str = "outputs/evaluation/mask2dit"
    """The folder for videos, scores and the report. A run goes on from what it holds."""
    stories: str = "datasets/evaluation/stories.yaml"
    limit: int | None = None
    """The first so many stories; null: all."""
    shard: str = "0/1"
    """i/n: the i-th of n parts, so that n processes share the work. Run 0/1 at the end, which finds everything done and
    writes the report."""

    videos: str | None = None
    """A folder of videos that exist, one a story: NAME.mp4, its boundaries in NAME.json; null: generate them."""
    boundaries: str = "given"
    """Where scenes begin in such videos: given, equal (parts) or detected."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    viclip: ViCLIPConfig = field(default_factory=ViCLIPConfig)
    cuts: CutConfig = field(default_factory=CutConfig)
    frechet: FrechetConfig = field(default_factory=FrechetConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    vbench: VBenchConfig = field(default_factory=VBenchConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    storyworld: bool = False
    """Read what stories of the small world show from their pixels, and correlate learned scores with that."""

    compare: list[str] = field(default_factory=list)
    """Output folders of other runs of the same stories, which the report compares with this one."""
    device: str = "auto"
    seed: int = 42

    def __post_init__(self):
        check_choice("boundaries", self.boundaries, BOUNDARIES)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} has to be at least 1, or null for all stories")
        parse_shard(self.shard)
