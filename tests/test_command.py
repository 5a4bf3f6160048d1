from dataclasses import dataclass

import pytest
import torch

from mask2dit.command import run_command, split_arguments

told = []


@dataclass
class Settings:
    steps: int = 1
    text: str = ""

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} has to be at least 1")


def note(settings: Settings) -> None:
    told.append(settings)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a command in an empty directory with two configurations, and gives its status and what it says of errors."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("steps: 5")
    (tmp_path / "default.yaml").write_text("steps: 3")
    told.clear()

    def run(*arguments):
        status = run_command(Settings, f"{__name__}:note", "default.yaml", arguments)
        return status, capsys.readouterr().err

    return run


@pytest.mark.parametrize(
    "arguments, settings",
    [
        ([], Settings(3)),
        (["my.yaml"], Settings(5)),
        (["my.yaml", "text=a"], Settings(5, "a")),
        (["text=a", "my.yaml"], Settings(5, "a")),
        (["text=a=b", "my.yaml", "steps=7"], Settings(7, "a=b")),
    ],
)
def test_file_and_settings_come_in_any_order(run, arguments, settings):
    assert run(*arguments) == (0, "")
    assert told == [settings]


@pytest.mark.parametrize(
    "arguments, culprit",
    [
        (["steps=0", "my.yaml"], "error: steps=0 "),
        (["my.yaml", "steps=0"], "error: steps=0 "),
        (["my.yaml", "stesp=0"], "error: stesp=0: there is no key 'stesp'"),
        (["--steps=2"], "'--steps=2': settings are written steps=value"),
        (["--steps", "2"], "'--steps': settings are written steps=value"),
        (["steps", "2"], "'steps', '2'"),
        (["steps", "=", "2"], "key=value without spaces"),
        (["my.yaml", "default.yaml"], "'my.yaml', 'default.yaml'"),
        (["steps"], "'steps' does not exist"),
        (["."], "'.' is a folder"),
    ],
)
def test_the_argument_that_is_wrong_is_the_one_that_is_named(run, arguments, culprit):
    status, error = run(*arguments)
    assert status == 1 and culprit in error and error.count("\n") == 1
    assert not told


def test_a_file_may_have_an_equals_sign_in_its_path(tmp_path):
    assert split_arguments(["./a=b.yaml", "c=d"]) == ("./a=b.yaml", ["c=d"])


def test_without_a_configuration_file_the_defaults_of_the_dataclass_apply():
    told.clear()
    assert run_command(Settings, f"{__name__}:note", None, ["text=a"]) == 0
    assert told == [Settings(1, "a")]


@pytest.mark.parametrize(
    "arguments, settings",
    [
        (["a.csv", "steps=2"], Settings(2, "a.csv")),
        (["steps=2", "a.csv"], Settings(2, "a.csv")),
        (["my.yaml"], Settings(5)),
        (["my.yaml", "text=a"], Settings(5, "a")),
    ],
)
def test_a_file_that_is_no_configuration_sets_the_positional_key(run, arguments, settings):
    assert run_command(Settings, f"{__name__}:note", None, arguments, positional="text") == 0
    assert told == [settings]


def take_memory(settings: Settings) -> None:
    if settings.text == "python":
        raise MemoryError
    if settings.text == "torch":
        torch.empty(10**15)
    raise RuntimeError("a defect")


@pytest.mark.parametrize("by", ["python", "torch"])
def test_too_little_memory_is_told_in_one_sentence(tmp_path, capsys, by):
    assert run_command(Settings, f"{__name__}:take_memory", None, [f"text={by}"]) == 1
    error = capsys.readouterr().err
    assert "memory does not suffice" in error and error.count("\n") == 1


def test_another_runtime_error_keeps_its_trace():
    with pytest.raises(RuntimeError, match="a defect"):
        run_command(Settings, f"{__name__}:take_memory", None, [])
