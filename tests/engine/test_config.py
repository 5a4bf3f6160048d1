import subprocess
import sys

import pytest

from mask2dit.config import load_config
from mask2dit.engine.config import EngineConfig, Resources, resolve_shard

ARRAY = {"SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_MAX": "8", "SLURM_ARRAY_TASK_COUNT": "8"}
TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    "environment, part",
    [
        ({}, "0/1"),
        (TORCHRUN, "1/2"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "0/1"),  # of another launcher, for another purpose
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, "3/4"),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4"}, "0/1"),  # in a batch script, which runs once
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "3"}, "2/8"),
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_COUNT": "4", "SLURM_ARRAY_TASK_STEP": "2"}, "2/4"),
        ({**TORCHRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "1/2"),  # srun starts torchrun on each node
    ],
)
def test_an_unset_shard_is_the_part_that_the_launcher_gives(environment, part):
    assert resolve_shard(EngineConfig(), environment) == part
    assert resolve_shard(EngineConfig(shard="1/3"), environment) == "1/3"
    assert resolve_shard(EngineConfig(engine="ray"), environment) == "0/1"


@pytest.mark.parametrize(
    "environment, message",
    [
        ({**ARRAY, "SLURM_ARRAY_TASK_ID": "8", "SLURM_ARRAY_TASK_COUNT": "3"}, "3 tasks from 1 to 8 have gaps"),
        ({**ARRAY, **TORCHRUN, "SLURM_ARRAY_TASK_ID": "3"}, "both torchrun's RANK and SLURM_ARRAY_TASK_ID"),
    ],
)
def test_an_ambiguous_part_is_refused(environment, message):
    with pytest.raises(ValueError, match=message):
        resolve_shard(EngineConfig(), environment)


def test_resources_are_set_by_stage():
    overrides = ["engine=ray", "resources.embed.num_gpus=0.5", "resources.write.batch=4"]
    config = load_config(EngineConfig, None, overrides)
    assert config.resources == {"embed": Resources(num_gpus=0.5), "write": Resources(batch=4)}
    with pytest.raises(ValueError, match="a key of resources has to be one of write, but is 'embed'"):
        config.check_resources(["write"])


@pytest.mark.parametrize(
    "override, message",
    [
        ("engine=spark", "engine has to be one of local, ray, but is 'spark'"),
        ("num_workers=0", "num_workers=0 has to be at least 1"),
        ("ray.address=auto", "ray.address=auto needs engine=ray"),
        ("resources.embed.batch=0", "batch=0 has to be at least 1"),
        ("resources.embed.num_gpus=1.5", "num_gpus=1.5 has to be a whole number"),
        ("resources.embed.num_gpus=1", "resources.embed.num_gpus=1 .* set num_workers, or engine=ray"),
        ("resources.embed.batch=4", "resources.embed.batch=4 .* set num_workers, or engine=ray"),
        (("num_workers=2", "resources.embed.num_cpus=4"), "resources.embed.num_cpus=4 .* engine=ray"),
        ("resources.embed.gpus=1", "there is no key 'resources.embed.gpus'"),
        ("shard=2/2", "shard has to be i/n"),
    ],
)
def test_a_mistake_is_told_by_its_key(override, message):
    with pytest.raises(ValueError, match=message):
        load_config(EngineConfig, None, [override] if isinstance(override, str) else list(override))


def test_reading_the_settings_imports_nothing_heavy():
    code = "import sys, mask2dit.engine.config; sys.exit(bool({'torch', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
