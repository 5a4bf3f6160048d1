import subprocess
import sys
from pathlib import Path

import pytest

from mask2dit.config import load_config
from mask2dit.data.config import CacheConfig, DataConfig

CONFIG = Path(__file__).parents[2] / "configs/data/cache.yaml"


def test_the_defaults_are_the_published_pre_training():
    config = DataConfig()
    assert (config.kind, config.num_scenes, config.num_frames, config.height, config.width) == (
        "pretrain",
        3,
        49,
        480,
        720,
    )
    assert config.max_stride == 3


def test_the_shipped_configuration_is_valid():
    assert load_config(CacheConfig, CONFIG).data.cache == "datasets/cache"


def test_reading_the_settings_imports_nothing_heavy():
    code = "import sys, mask2dit.data.config; sys.exit(bool({'torch', 'av', 'diffusers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"kind": "sft"}, "kind has to be one of pretrain, finetune, but is 'sft'"),
        ({"manifest": ""}, "manifest is empty: name the .csv or .json file"),
        ({"num_scenes": 0}, "num_scenes=0 has to be at least 1"),
        ({"max_stride": 0}, "max_stride=0 has to be at least 1"),
        ({"num_windows": 0}, "num_windows=0 has to be at least 1, or null"),
        ({"max_retries": -1}, "max_retries=-1 has to be 0 or more"),
        ({"max_quarantined_share": 1.5}, "max_quarantined_share=1.5 has to be between 0 and 1"),
        ({"cache": "folder"}, "set num_windows=1 or more, or cache=null"),
    ],
)
def test_a_bad_setting_is_told_in_one_sentence(changes, message):
    with pytest.raises(ValueError) as error:
        DataConfig(**changes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    "override, message",
    [
        ("dtype=int8", "dtype has to be one of float32"),
        ("data.cache=null", "data.cache has to name the folder to write"),
        ("shard=2/2", "shard has to be i/n with i from 0 to n - 1, such as 0/1, but is '2/2'"),
        ("shard=half", "but is 'half'"),
        ("data.kind=sft", "kind has to be one of pretrain, finetune"),
        ("data.knd=pretrain", "there is no key 'data.knd'"),
    ],
)
def test_a_bad_setting_of_the_cache_is_told_in_one_sentence(override, message):
    with pytest.raises(ValueError) as error:
        load_config(CacheConfig, CONFIG, [override])
    assert message in str(error.value)
