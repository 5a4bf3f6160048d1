import pytest

from mask2dit.encoders.config import ViCLIPConfig
from mask2dit.evaluation.config import (
    CutConfig,
    EvaluationConfig,
    GenerationConfig,
    QualityConfig,
    VBenchConfig,
)


@pytest.mark.parametrize(
    "make, message",
    [
        (
            lambda: EvaluationConfig(boundaries="some"),
            "boundaries has to be one of given, equal, detected, but is 'some'",
        ),
        (lambda: EvaluationConfig(shard="2/2"), "shard has to be i/n"),
        (lambda: EvaluationConfig(limit=0), "limit=0 has to be at least 1"),
        (
            lambda: GenerationConfig(mode="both"),
            r"generation\.mode has to be one of fixed, extension, separate, merged",
        ),
        (lambda: GenerationConfig(initial_scenes=0), "initial_scenes=0"),
        (lambda: QualityConfig(num_frames=1), r"quality\.num_frames=1 has to be at least 2"),
        (lambda: CutConfig(threshold=-1), r"cuts\.threshold=-1"),
        (lambda: CutConfig(threshold=256), r"cuts\.threshold=256"),
        (lambda: CutConfig(transnet_threshold=0), r"cuts\.transnet_threshold=0"),
        (lambda: CutConfig(transnet_threshold=1), r"cuts\.transnet_threshold=1"),
        (lambda: CutConfig(tolerance=-1), r"cuts\.tolerance=-1"),
        (lambda: CutConfig(min_scene_frames=-1), r"cuts\.min_scene_frames=-1"),
        (lambda: VBenchConfig(dimensions=[]), r"vbench\.dimensions is empty"),
        (lambda: VBenchConfig(dimensions=["imaging_quality"] * 2), r"vbench\.dimensions names one twice"),
        (lambda: ViCLIPConfig(preprocessing="clip"), "one of published, vbench"),
    ],
)
def test_bad_settings_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_generation_settings_reach_the_pipelines_configuration():
    settings = GenerationConfig(model="m", guidance_scale=3.0, window=2, memory="fp8")
    config = settings.inference(["a", "b"], [9, 13], "cpu", 7, "out")
    assert (config.model, config.guidance_scale, config.window, config.memory) == ("m", 3.0, 2, "fp8")
    assert (config.prompts, config.num_frames, config.seed, config.save_path) == (["a", "b"], [9, 13], 7, "out")
