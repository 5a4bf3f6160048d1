import json
import os
import subprocess
import sys
import zipfile
from importlib.metadata import distributions
from pathlib import Path
from shutil import copytree, ignore_patterns

import pytest
import yaml

from mask2dit import cli
from mask2dit.command import load
from mask2dit.usage import describe_keys

ROOT = Path(__file__).parents[1]
WORDS = {"generate", "train", "cache", "check", "evaluate", "study", "curate", "write", "studio"}


def test_help_lists_every_command(capsys):
    assert cli.main(["--help"]) == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")}
    assert words >= WORDS == set(cli.COMMANDS)


def test_without_arguments_the_help_is_printed_and_the_status_is_2(capsys):
    assert cli.main([]) == 2
    printed = capsys.readouterr().out
    assert cli.main(["-h"]) == 0
    assert capsys.readouterr().out == printed


@pytest.mark.parametrize(
    "given, hint", [("trian", "'train'"), ("evalute", "'evaluate'"), ("x.yaml", "generate, train")]
)
def test_an_unknown_command_is_told_with_the_nearest(capsys, given, hint):
    assert cli.main([given]) == 2
    error = capsys.readouterr().err
    assert repr(given) in error and hint in error and error.count("\n") == 1


@pytest.mark.parametrize("name", sorted(WORDS))
def test_help_of_a_command_names_every_key_with_its_default(capsys, name):
    command = cli.COMMANDS[name]
    assert cli.main([name, "--help"]) == 0
    printed = capsys.readouterr().out
    assert command.summary.split()[0] in printed
    for key in describe_keys(load(command.schema)):
        assert f"\n  {key.name}{'' if key.default is None else '='}" in printed
    load(command.task)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; from mask2dit.cli import COMMANDS, main; assert main(['--help']) == 0\n"
        "for name in COMMANDS: assert main([name, '--help']) == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'av', 'PIL'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_module_forms_read_their_arguments_before_diffusers_is_imported():
    forms = ("data.cache", "data.check", "pipelines.untrained", "storyworld.trial", "training", "evaluation.study")
    code = (
        "import sys; from importlib import import_module\n"
        f"for form in {forms}: import_module('mask2dit.' + form)\n"
        "heavy = {'diffusers', 'transformers', 'torchao', 'deepspeed'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("form", ["mask2dit", "mask2dit.training"])
def test_a_module_form_tells_how_it_is_called(form):
    arguments = ["train"] if form == "mask2dit" else []
    result = subprocess.run([sys.executable, "-m", form, *arguments, "-h"], capture_output=True, text=True, check=True)
    usage = result.stdout.splitlines()[0]
    assert usage == f"usage: python -m {' '.join([form, *arguments])} [CONFIG.yaml] [key=value ...]"


def test_a_command_runs_without_a_configuration_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["generate", "model=nowhere", "prompts=[a, b]"]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert cli.main(["check", "nowhere.csv"]) == 1
    assert "'nowhere.csv'" in capsys.readouterr().err


INFERENCE = {"prompts", "negative_prompt", "height", "width", "num_frames", "save_path"}
# The keys for which a configuration file has another value than the dataclass; all others only repeat it.
RECIPES = {
    "inference/fixed_scene": ("mask2dit.inference.config:InferenceConfig", INFERENCE),
    "inference/extension": ("mask2dit.inference.config:InferenceConfig", INFERENCE | {"context_videos", "window"}),
    "train/pretrain": ("mask2dit.training.config:TrainConfig", {"deepspeed"}),
    "train/sft": (
        "mask2dit.training.config:TrainConfig",
        {"deepspeed", "model", "output_dir", "data.kind", "data.manifest", "conditional_probability"},
    ),
    "data/cache": ("mask2dit.data.config:CacheConfig", set()),
    "evaluation/mask2dit": ("mask2dit.evaluation.config:EvaluationConfig", {"generation.negative_prompt"}),
    "evaluation/study": ("mask2dit.evaluation.config:StudyConfig", set()),
    "evaluation/write_prompts": ("mask2dit.inference.write:WriteConfig", {"output"}),
    "curation/films": ("mask2dit.curation.config:CurationConfig", {"filter.min_short_side"}),
    "storyworld/films": ("mask2dit.storyworld.films:FilmsConfig", set()),
    "storyworld/model": ("mask2dit.storyworld.build:BuildConfig", set()),
    "storyworld/text": ("mask2dit.storyworld.text:TextConfig", set()),
    "storyworld/vae": ("mask2dit.storyworld.vae:VAEConfig", set()),
    "storyworld/trial": ("mask2dit.storyworld.trial:TrialConfig", set()),
    "storyworld/validate": ("mask2dit.storyworld.validate:ValidateConfig", set()),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_differs_from_the_defaults_only_where_it_is_meant_to(name):
    schema, differing = RECIPES[name]

    def leaves(group: dict, prefix: str = ""):
        for key, value in group.items():
            yield from leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    recipe = dict(leaves(yaml.safe_load((ROOT / f"configs/{name}.yaml").read_text(encoding="utf-8"))))
    defaults = {key.name: key.default for key in describe_keys(load(schema))}
    assert {key for key, value in recipe.items() if yaml.safe_load(defaults[key]) != value} == differing


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel that a copy of the repository gives."""
    # Importing setuptools would fail in a process that has imported distutils.
    installed = {distribution.name: distribution.version for distribution in distributions()}
    if "pip" not in installed or int(installed.get("setuptools", "0").partition(".")[0]) < 77:
        pytest.skip("building a wheel without network needs pip and setuptools 77 or later in this environment")
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        (folder / name).write_bytes((ROOT / name).read_bytes())
    copytree(ROOT / "mask2dit", folder / "mask2dit", ignore=ignore_patterns("__pycache__"))
    pip(["wheel", "--no-build-isolation", "--wheel-dir", folder / "dist", folder])
    (built,) = (folder / "dist").glob("*.whl")
    return built


def pip(arguments: list) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "--no-deps", "--no-index", "--disable-pip-version-check"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_a_wheel_holds_every_file_of_the_package(wheel):
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mask2dit").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"mask2dit/reporting/templates/review.html", "mask2dit/reporting/templates/base.css"} <= set(files)
    assert files <= set(zipfile.ZipFile(wheel).namelist())


@pytest.mark.slow
def test_a_wheel_generates_a_video_outside_the_repository(wheel, tmp_path):
    pip(["install", "--target", tmp_path / "site", wheel])
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, str(tmp_path / "site/bin/mask2dit"), *arguments]
        return subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)

    result = run("generate", "--help")
    assert result.stdout.startswith("usage: mask2dit generate"), result.stderr
    settings = ["dtype=float32", "device=cpu", "num_inference_steps=1", "save_path=made", "name=video"]
    prompts = "prompts=[Actor1 (red circle) jumps in the desert., Actor1 (red circle) stands still in the desert.]"
    result = run("generate", f"model={ROOT / 'models/storyworld'}", prompts, *settings)
    assert result.returncode == 0, result.stderr
    assert "torchao" not in result.stderr  # whose warnings are about other machines
    assert (elsewhere / "made/video.mp4").stat().st_size
    assert json.loads((elsewhere / "made/video.json").read_text())["config"]["prompts"] == yaml.safe_load(
        prompts.partition("=")[2]
    )
