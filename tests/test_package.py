import subprocess
import sys

import pytest

import mask2dit


def test_importing_the_package_imports_nothing_heavy():
    code = (
        "import sys, mask2dit; heavy = {'torch', 'diffusers', 'transformers', 'deepspeed', 'av'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_pipeline_imports_no_training_or_video_libraries():
    code = (
        "import sys; from mask2dit import Mask2DiTPipeline; heavy = {'deepspeed', 'av', 'imageio'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_measuring_the_story_world_needs_no_torch():
    code = "import sys, mask2dit.storyworld.measure; sys.exit('imported torch' if 'torch' in sys.modules else 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_every_public_name_can_be_imported():
    for name in mask2dit.__all__:
        assert getattr(mask2dit, name) is not None


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Mask3DiT"):
        mask2dit.Mask3DiT  # noqa: B018
