"""What can be measured of a story's video, one class a measure, and which of them can run with the weights at hand."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from mask2dit.encoders.clip_tokenizer import ViCLIPTokenizer, load_clip_tokenizer
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.encoders.untrained import UNTRAINED, build_untrained_viclip
from mask2dit.encoders.viclip import load_viclip, preprocess
from mask2dit.evaluation import consistency
from mask2dit.evaluation.config import CutConfig, EvaluationConfig
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.hashing import fingerprint
from mask2dit.stories import Story
from mask2dit.video.cuts import compare_cuts, detect_cuts
from mask2dit.video.frames import middle_frames


@dataclass(frozen=True)
class Column:
    """One number of a story in the report."""

    key: str
    title: str
    better: str | None = "higher"
    """higher, lower, or None for what is neither good nor bad."""
    is_percentage: bool = True
    """Whether it shares an axis with cosines and shares times 100."""
    truth_of: str | None = None
    """For what is known and not learned: the column that is meant to measure the same. The report correlates them."""


@dataclass(frozen=True)
class Scores:
    """What a measure says of one story."""

    values: dict[str, float | None]
    """By the keys of the measure's columns; None where there is no value."""
    details: dict = field(default_factory=dict)
    """Anything more, as JSON has it."""


class Measure:
    """Base of all measures."""

    name: str
    columns: Sequence[Column]
    identity: str
    """What scores depend on besides the video: weights and settings. Scores with another identity are computed again."""

    def reason_against(self, story: Story) -> str | None:
        """Why this measure has nothing to say of a story, which is no fault; None if it has."""
        return None

    def prepare(self, videos: Sequence[StoryVideo]) -> None:
        """Called once with all videos that are going to be scored, for what is cheaper at once."""

    def score(self, video: StoryVideo) -> Scores:
        raise NotImplementedError


class ConsistencyMeasure(Measure):
    """Visual, semantic and sequence consistency by ViCLIP, as the paper's tables have them, and variants."""

    name = "consistency"
    columns = (
        Column("visual", "Visual"),
        Column("semantic", "Semantic"),
        Column("sequence", "Sequence"),
        Column("visual_adjacent", "Visual, adjacent scenes"),
        Column("visual_minimum", "Visual, least similar pair"),
        Column("visual_first_last", "Visual, first and last"),
        Column("visual_shared_actor", "Visual, scenes that share an actor"),
        Column("within_scene", "Within scenes"),
        Column("semantic_chunks", "Semantic, whole text"),
        Column("cut_prompts", "Prompts cut to the text window", None, is_percentage=False),
    )

    def __init__(self, config: ViCLIPConfig, device: torch.device):
        weights = Path(config.weights)
        self.model = load_viclip(weights).to(device)
        self.tokenizer = ViCLIPTokenizer(load_clip_tokenizer(weights.parent), self.model.context_length)
        if len(self.tokenizer.tokenizer) > self.model.text_encoder.token_embedding.num_embeddings:
            raise ValueError(
                f"the vocabulary beside {str(weights)!r} has {len(self.tokenizer.tokenizer)} entries, more than the model's"
            )
        self.preprocessing = config.preprocessing
        self.device = device
        self.identity = f"viclip {fingerprint(weights)} {config.preprocessing}"

    @torch.inference_mode()
    def score(self, video: StoryVideo) -> Scores:
        prompts = video.story.prompts
        # A scene by its own eight frames, and each of its halves, so that a batch is one story.
        whole = self._video_features(video, video.scenes)
        middles = [(start, (start + stop + 1) // 2, stop) for start, stop in video.scenes]
        first = self._video_features(video, [(start, middle) for start, middle, _ in middles])
        second = self._video_features(video, [(min(middle, stop - 1), stop) for _, middle, stop in middles])
        text = self._text_features(torch.stack([self.tokenizer.window(prompt) for prompt in prompts]))
        chunks = [self._text_features(self.tokenizer.chunks(prompt)) for prompt in prompts]

        similarity = consistency.similarity_matrix(whole)
        values = consistency.visual_scores(similarity, video.story.actors)
        values["semantic"] = consistency.semantic_score(whole, text)
        values["sequence"] = consistency.sequence_score(values["visual"], values["semantic"])
        values["within_scene"] = consistency.within_scene_score(first, second)
        values["semantic_chunks"] = consistency.chunked_semantic_score(whole, chunks)
        values["cut_prompts"] = float(sum(map(self.tokenizer.is_cut, prompts)))
        return Scores(values, {"similarity": similarity.round(2).tolist()})

    def _video_features(self, video: StoryVideo, parts: Sequence[tuple[int, int]]):
        clips = [
            preprocess(
                video.frames(middle_frames(*part, self.model.num_frames)),
                self.model.input_resolution,
                self.preprocessing,
            )
            for part in parts
        ]
        return self.model.encode_video(torch.stack(clips).to(self.device)).float().cpu().numpy()

    def _text_features(self, tokens: torch.Tensor):
        return self.model.encode_text(tokens.to(self.device)).float().cpu().numpy()


class CutMeasure(Measure):
    """Whether the video cuts where its scenes begin, and nowhere else."""

    name = "cuts"
    columns = (
        Column("shot_cut_accuracy", "Shot-cut accuracy"),
        Column("cut_deviation", "Deviation of cuts (frames)", "lower", is_percentage=False),
    )

    def __init__(self, config: CutConfig):
        import scenedetect  # an optional extra, missed here rather than at the first story

        self.config = config
        self.identity = f"scenedetect {scenedetect.__version__} {config}"

    def score(self, video: StoryVideo) -> Scores:
        detected = detect_cuts(video.reader, self.config.threshold, self.config.min_scene_frames)
        result = compare_cuts(detected, video.boundaries, self.config.tolerance)
        values = {"shot_cut_accuracy": result.accuracy, "cut_deviation": result.deviation}
        return Scores(values, {"detected": detected, "intended": list(video.boundaries)})


def build_measures(config: EvaluationConfig, device: torch.device) -> tuple[list[Measure], dict[str, str]]:
    """The measures that can run, and why the others cannot.

    Raises:
        ValueError: for weights that are there but damaged.
    """
    # Here and not above: they build on this module.
    from mask2dit.evaluation.judge import JudgeMeasure
    from mask2dit.evaluation.quality import AestheticMeasure, FrameConsistencyMeasure
    from mask2dit.evaluation.storyworld import StoryWorldMeasure
    from mask2dit.evaluation.vbench import VBenchMeasure

    viclip, quality = config.viclip, config.quality
    if viclip.build_untrained and viclip.weights and Path(viclip.weights).name.startswith(UNTRAINED):
        build_untrained_viclip(viclip.weights)
    measures: list[Measure] = []
    off: dict[str, str] = {}

    def add(name: str, build: Callable[[], Measure], *needed: str | None) -> None:
        missing = [path for path in needed if path is None or not Path(path).exists()]
        if missing:
            off[name] = "not asked for" if missing[0] is None else f"put its weights at {missing[0]}"
            return
        try:
            measures.append(build())
        except FileNotFoundError as error:
            off[name] = str(error)
        except ModuleNotFoundError as error:
            off[name] = f"{error}: pip install -e .[evaluation]"

    add("consistency", lambda: ConsistencyMeasure(viclip, device), viclip.weights)
    if config.videos is not None and config.boundaries == "detected":
        off["cuts"] = "boundaries=detected takes the boundaries from the cuts themselves"
    else:
        add("cuts", lambda: CutMeasure(config.cuts))
    add("aesthetic", lambda: AestheticMeasure(quality, device), quality.clip, quality.aesthetic_head)
    for name, folder in (("subject_consistency", quality.dino), ("background_consistency", quality.background_clip)):
        add(name, lambda n=name, f=folder: FrameConsistencyMeasure(n, f, quality.num_frames, device), folder)
    work = Path(config.output) / "vbench"
    add("vbench", lambda: VBenchMeasure(config.vbench, work), config.vbench.command)
    add("judge", lambda: JudgeMeasure(config.judge), *([None] if config.judge.base_url is None else []))
    add("storyworld", StoryWorldMeasure, *([] if config.storyworld else [None]))
    return measures, off
