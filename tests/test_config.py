import dataclasses
import json
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mask2dit.config import check_at_least, check_positive, load_config, parse_shard
from mask2dit.curation.config import CurationConfig
from mask2dit.evaluation.config import EvaluationConfig
from mask2dit.inference.config import InferenceConfig
from mask2dit.storyworld.films import FilmsConfig
from mask2dit.training.config import TrainConfig

CONFIGS = sorted((Path(__file__).parents[1] / "configs/inference").glob("*.yaml"))


def write(tmp_path, text):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_configuration_is_valid(path):
    assert load_config(InferenceConfig, path).prompts


@pytest.mark.parametrize("name", ["fixed_scene.yaml", "extension.yaml"])
def test_the_default_configurations_have_the_published_settings(name):
    config = load_config(InferenceConfig, next(path for path in CONFIGS if path.name == name))
    assert (config.height, config.width, config.num_frames, len(config.prompts)) == (480, 720, 49, 3)
    assert (config.num_inference_steps, config.guidance_scale, config.sampler, config.fps) == (50, 6.0, "ddim", 8)
    assert config.model == "models/Mask2DiT"


@pytest.mark.parametrize(
    "small, full", [("fixed_scene_small.yaml", "fixed_scene.yaml"), ("extension_small.yaml", "extension.yaml")]
)
def test_what_a_small_configuration_leaves_out_is_as_in_the_full_one(small, full):
    small_path, full_path = (next(path for path in CONFIGS if path.name == name) for name in (small, full))
    small_config, full_config = (
        dataclasses.asdict(load_config(InferenceConfig, path)) for path in (small_path, full_path)
    )
    for key in small_config.keys() - OmegaConf.load(small_path).keys() - {"negative_prompt"}:
        assert small_config[key] == full_config[key], key


def test_overrides_win_and_take_their_keys_type(tmp_path):
    path = write(tmp_path, "prompts: [a]\nseed: 1\nlora: {scale: 0.5}\n")
    config = load_config(InferenceConfig, path, ["seed=7", "prompts=[b, c]", "lora.path=x", "num_frames=[9, 13]"])
    assert (config.seed, config.prompts, config.lora.path, config.lora.scale) == (7, ["b", "c"], "x", 0.5)
    assert config.num_frames == [9, 13]


@pytest.mark.parametrize(
    "text, overrides, message",
    [
        ("prompts: [a]\nsede: 1", [], "config.yaml: there is no key 'sede'; did you mean 'seed'?"),
        ("prompts: [a]\nqqq: 1", [], "known keys are model, build_untrained"),
        ("prompts: [a]\nlora: {size: 1}", [], "there is no key 'lora.size'"),
        ("prompts: [a]\nseed: many", [], "seed: Value 'many' of type 'str' could not be converted to Integer"),
        ("prompts: [a", [], "config.yaml: "),
        ("just text", [], "config.yaml: "),
        ("prompts: [a]", ["seed"], "key=value, after the configuration file"),
        ("prompts: a", [], "config.yaml: prompts has to be a list, such as prompts=[…]"),
        ("prompts: [a]", ["lora=x"], "lora=x: this is a group of keys"),
        ("prompts: [a]", ["seed="], "seed=: seed needs a value"),
        ("- a", [], "config.yaml: it has to hold keys and values"),
        ("prompts: [a]", ["lora.pth=x"], "there is no key 'lora.pth'; did you mean 'lora.path'?"),
        ("prompts: ['a: b', {then: c}]", [], "prompts has to hold texts, but one is {'then': 'c'}"),
        ("prompts: [a]", ["sede=1"], "sede=1: there is no key 'sede'; did you mean 'seed'?"),
        ("prompts: []", [], "prompts has to hold one text"),
        ("prompts: [a, '  ']", [], "prompts has to hold one text"),
        ("prompts: [a]\nsampler: euler", [], "sampler has to be one of ddim, dpm, but is 'euler'"),
        ("prompts: [a]\ndtype: int8", [], "dtype has to be one of float32, bfloat16, float16, but is 'int8'"),
        ("prompts: [a]\ncontext_start: end", [], "context_start has to be one of center, random"),
        ("prompts: [a]\nnum_frames: many", [], "num_frames has to be a number or a list of numbers, but is 'many'"),
        ("prompts: [a]\nnegative_prompt: 3", [], "negative_prompt has to be a text"),
        ("prompts: [a]\nnegative_prompt: [b, c]", [], "negative_prompt has 2 entries for 1 prompts"),
        ("prompts: [a]\ncompile: true\nmemory: fp8", [], "compile=true cannot be used with memory=fp8"),
        ("prompts: [a]\nnum_inference_steps: 0", [], "num_inference_steps=0"),
        ("prompts: [a]\nname: a/b", [], "put a folder into save_path"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_it(tmp_path, text, overrides, message):
    with pytest.raises(ValueError) as error:
        load_config(InferenceConfig, write(tmp_path, text), overrides)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_the_record_of_a_run_is_a_configuration(tmp_path):
    path = tmp_path / "00001.json"
    path.write_text('{"config": {"prompts": ["a"], "seed": 7}, "seconds": 3}')
    assert load_config(InferenceConfig, path, ["fps=4"]) == InferenceConfig(prompts=["a"], seed=7, fps=4)


def test_a_record_is_read_as_json(tmp_path):
    path = tmp_path / "00001.JSON"
    path.write_text(json.dumps({"config": {"prompts": ["a cake 🎂"]}}))
    assert load_config(InferenceConfig, path).prompts == ["a cake 🎂"]
    for text in ('{"config": ', "[" * 100_000):
        path.write_text(text)
        with pytest.raises(ValueError, match="00001"):
            load_config(InferenceConfig, path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.yaml"):
        load_config(InferenceConfig, tmp_path / "nowhere.yaml")


def test_a_part_of_the_work_is_two_numbers():
    assert parse_shard("3/5") == (3, 5)
    for shard in ("5/3", "1", "a/b", "-1/2", "1/2/3", ""):
        with pytest.raises(ValueError, match=r"shard has to be i/n with i from 0 to n - 1"):
            parse_shard(shard)


def test_no_number_passes_no_limit():
    for check in (lambda value: check_at_least("limit", value, 1), lambda value: check_positive("limit", value)):
        check(1)
        for value in (0, float("nan"), float("inf")):
            with pytest.raises(ValueError, match=f"limit={value} has to be"):
                check(value)


def test_a_number_that_is_not_finite_is_refused_wherever_it_stands(tmp_path):
    for schema, key in (
        (InferenceConfig, "guidance_scale"),
        (InferenceConfig, "lora.scale"),
        (TrainConfig, "validation.guidance_scale"),
        (TrainConfig, "adam_beta1"),
        (TrainConfig, "weight_decay"),
        (CurationConfig, "split.content_threshold"),
        (EvaluationConfig, "cuts.threshold"),
        (FilmsConfig, "thresholds"),
    ):
        for value in (".nan", ".inf", "-.inf"):
            given = f"[{value}]" if key == "thresholds" else value
            with pytest.raises(ValueError, match=key):
                load_config(schema, None, ["prompts=[a]"] * (schema is InferenceConfig) + [f"{key}={given}"])


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", ".hidden", "a/b", "/a", "a\\b", "a\0b", "a\nb", "\ud800", "x" * 251, "é" * 126]
)
def test_what_is_no_file_name_is_refused(name):
    with pytest.raises(ValueError, match="name="):
        InferenceConfig(prompts=["a"], name=name)
    for good in ("a", "take 2", "v1.2", "é", "x" * 250):
        assert InferenceConfig(prompts=["a"], name=good).name == good
