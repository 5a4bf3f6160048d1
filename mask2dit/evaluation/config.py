"""The settings of `python -m mask2dit.evaluation`. Imports nothing heavy, so that errors in them show at once."""

from dataclasses import dataclass, field, fields

from mask2dit.config import check_at_least, check_between, check_choice
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.engine.config import EngineConfig
from mask2dit.inference.config import InferenceConfig, SamplingConfig

MODES = ("fixed", "extension", "separate", "merged")
CUT_DETECTORS = ("content", "transnet")
BOUNDARIES = ("given", "equal", "detected")
VBENCH_DIMENSIONS = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
)
INSTALL = "pip install -e .[evaluation]"  # the remedy for a missing optional package
LETTERS = "ABCDEFGHIJ"  # names of the runs in a user study


@dataclass(kw_only=True)
class GenerationConfig(SamplingConfig):
    """Generation of stories."""

    mode: str = "fixed"
    """Mode of generation: fixed (the scenes of a window together), extension (the first scenes together, each later one
    from those before it), separate (each scene alone, with any CogVideoX) or merged (all prompts in one, for a single
    clip)."""
    initial_scenes: int = 2
    """Number of scenes that an extension starts from."""

    negative_prompt: str = ""
    """Negative prompt for all scenes."""
    height: int = 480
    """Height in pixels."""
    width: int = 720
    """Width in pixels."""
    num_frames: int = 49
    """Frames per scene, unless the story gives a duration."""

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
    """Detection of cuts, for comparison with scene boundaries."""

    detector: str = "content"
    """Detector: content (PySceneDetect: hard cuts) or transnet (TransNet V2: also dissolves, whose middle counts, and cuts
    between like colours)."""
    threshold: float = 27.0
    """Threshold of the detector content, 0 to 255."""
    min_scene_frames: int = 5
    """Minimum number of frames between two cuts of the detector content."""
    transnet_threshold: float = 0.5
    """Probability above which transitions of the detector transnet count, between 0 and 1."""
    tolerance: int = 2
    """Maximum distance in frames between a cut and the boundary that it matches."""

    def __post_init__(self):
        check_choice("cuts.detector", self.detector, CUT_DETECTORS)
        check_between("cuts.threshold", self.threshold, 0, 255)
        # TransNet V2 finds no transition at either end: no probability is above 1, and above 0 every frame is in one.
        if not 0 < self.transnet_threshold < 1:
            raise ValueError(
                f"cuts.transnet_threshold={self.transnet_threshold} has to be more than 0 and less than 1"
            )
        for name in ("min_scene_frames", "tolerance"):
            check_at_least(f"cuts.{name}", getattr(self, name), 0)


@dataclass(kw_only=True)
class FrechetConfig:
    """Fréchet video distance to real videos."""

    reference: str | None = None
    """Folder of real videos to compare with, one clip per file; null: no distance."""
    videomae: str | None = "models/FVD/vit_g_hybrid_pt_1200e_ssv2_ft.pth"
    """VideoMAE-v2's weights, for the content-debiased distance; null: not measured."""
    i3d: str | None = "models/FVD/i3d_pretrained_400.pt"
    """I3D's weights, for the standard distance; null: not measured."""
    allow_different_sizes: bool = False
    """Allow different numbers of real and generated clips, although the distance depends on the number."""


@dataclass(kw_only=True)
class QualityConfig:
    """Weights of the quality measures."""

    clip: str | None = "models/clip-vit-large-patch14"
    """Folder of CLIP L/14 as transformers saves it, for the aesthetic score; null: not measured."""
    aesthetic_head: str | None = "models/sa_0_4_vit_l_14_linear.pth"
    """LAION's aesthetic head on CLIP: the linear one, or the perceptron of the improved predictor."""
    dino: str | None = "models/dino-vitb16"
    """Folder of DINO B/16, for subject consistency; null: not measured."""
    background_clip: str | None = "models/clip-vit-base-patch32"
    """Folder of CLIP B/32, for background consistency; null: not measured."""
    num_frames: int = 16
    """Frames measured per scene."""

    def __post_init__(self):
        check_at_least("quality.num_frames", self.num_frames, 2)  # consistency compares frames


@dataclass(kw_only=True)
class VBenchConfig:
    """VBench's own measures."""

    command: str | None = None
    """Path of the `vbench` program in VBench's own environment; null: VBench is not run."""
    dimensions: list[str] = field(default_factory=lambda: ["imaging_quality", "motion_smoothness", "dynamic_degree"])
    """Dimensions to measure, out of subject_consistency, background_consistency, motion_smoothness, dynamic_degree,
    aesthetic_quality and imaging_quality."""

    def __post_init__(self):
        if not self.dimensions:
            raise ValueError("vbench.dimensions is empty: name at least one, such as imaging_quality")
        for dimension in self.dimensions:
            check_choice("vbench.dimensions", dimension, VBENCH_DIMENSIONS)
        if len(set(self.dimensions)) < len(self.dimensions):
            raise ValueError(f"vbench.dimensions names one twice: {', '.join(self.dimensions)}")


@dataclass(kw_only=True)
class JudgeConfig:
    """A vision-language model that answers the rubric in docs/evaluation.md."""

    base_url: str | None = None
    """Address of an OpenAI-compatible endpoint; null: no judge."""
    model: str = ""
    """Name of the model at the endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Environment variable that holds the key."""
    frames_per_scene: int = 3
    """Frames per scene shown to the model."""
    max_attempts: int = 3
    """Attempts per story until an answer is valid."""

    def __post_init__(self):
        for name in ("frames_per_scene", "max_attempts"):
            check_at_least(f"judge.{name}", getattr(self, name), 1)


@dataclass(kw_only=True)
class EvaluationConfig(EngineConfig):
    """Evaluation of a model or of existing videos. `configs/evaluation/*.yaml` hold values."""

    name: str = "Mask2DiT"
    """Name of the run in reports."""
    output: str = "outputs/evaluation/mask2dit"
    """Folder for videos, scores and the report. A run continues from existing results."""
    stories: str = "datasets/evaluation/stories.yaml"
    """File with the stories to evaluate."""
    limit: int | None = None
    """Number of stories to evaluate, from the first; null: all."""

    videos: str | None = None
    """Folder of existing videos, one per story: NAME.mp4, with its boundaries in NAME.json; null: generate them."""
    boundaries: str = "given"
    """Scene boundaries of existing videos: given (in NAME.json), equal (scenes of equal length) or detected (cuts)."""
    generation: GenerationConfig = field(default_factory=GenerationConfig)

    viclip: ViCLIPConfig = field(default_factory=ViCLIPConfig)
    cuts: CutConfig = field(default_factory=CutConfig)
    frechet: FrechetConfig = field(default_factory=FrechetConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    vbench: VBenchConfig = field(default_factory=VBenchConfig)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    storyworld: bool = False
    """Measure stories of the small world from their pixels, and correlate learned scores with this ground truth."""

    compare: list[str] = field(default_factory=list)
    """Output folders of other runs of the same stories, which the report compares with this one."""
    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda, cuda:1, …"""
    seed: int = 42
    """Seed of the noise, combined with the story's name."""

    def __post_init__(self):
        super().__post_init__()
        self.check_resources(["videos", "score", "features"])
        check_choice("boundaries", self.boundaries, BOUNDARIES)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit={self.limit} has to be at least 1, or null for all stories")

    @property
    def detects_boundaries(self) -> bool:
        """True if the cuts of existing videos are taken as their scene boundaries."""
        return self.videos is not None and self.boundaries == "detected"


@dataclass(kw_only=True)
class StudyConfig:
    """A blind user study of several evaluations."""

    runs: list[str] = field(default_factory=list)
    """Output folders of two or more evaluations of the same stories."""
    output: str = "outputs/evaluation/study"
    """Folder of the study; send it out without key.json."""
    num_stories: int = 20
    """Number of stories to compare."""
    seed: int = 0
    """Seed for the choice of stories and the order of videos."""
    answers: list[str] = field(default_factory=list)
    """Answer files of participants. If given, the tally is written instead of the page."""

    def __post_init__(self):
        if not self.answers and not 2 <= len(self.runs) <= len(LETTERS):
            raise ValueError(
                f"runs has to name the output folders of 2 to {len(LETTERS)} runs, such as runs=[one, another]"
            )
        if self.num_stories < 1:
            raise ValueError(f"num_stories={self.num_stories} has to be at least 1")
