import ast
import subprocess
import sys
from pathlib import Path

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


def test_no_function_has_more_than_70_lines_without_its_docstring():
    too_long = []
    for path in Path(mask2dit.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0].end_lineno - node.body[0].lineno + 1 if ast.get_docstring(node) else 0
                lines = node.end_lineno - node.lineno + 1 - docstring
                if lines > 70:
                    too_long.append(f"{path.name}:{node.lineno} {node.name}: {lines} lines")
    assert not too_long


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="Mask3DiT"):
        mask2dit.Mask3DiT  # noqa: B018
