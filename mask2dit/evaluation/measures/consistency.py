"""Consistency of a story by ViCLIP."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mask2dit.encoders.clip_tokenizer import ViCLIPTokenizer, load_clip_tokenizer
from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.encoders.untrained import UNTRAINED
from mask2dit.encoders.viclip import load_viclip, preprocess
from mask2dit.evaluation import consistency
from mask2dit.evaluation.measures.base import Column, Measure, Scores
from mask2dit.evaluation.videos import StoryVideo
from mask2dit.hashing import fingerprint
from mask2dit.video.frames import middle_frames


class ConsistencyMeasure(Measure):
    """Visual, semantic and sequence consistency by ViCLIP, as in the paper's tables, and variants."""

    name = "consistency"
    uses_gpu = True
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
        self.is_untrained = weights.name.startswith(UNTRAINED)
        self.identity = f"viclip {fingerprint(weights)} {config.preprocessing}"

    @torch.inference_mode()
    def score(self, video: StoryVideo) -> Scores:
        prompts = video.story.prompts
        # Eight frames for each scene and for each of its halves; one story is one batch.
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
