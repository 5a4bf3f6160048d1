"""The `mask2dit` command: `mask2dit COMMAND [CONFIG.yaml] [key=value …]`.

The module forms, such as `python -m mask2dit.training`, run the same commands. Task packages are named as text and imported
only when their command runs.
"""

import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields

from mask2dit.command import load, program, run_command
from mask2dit.usage import table


@dataclass(frozen=True, kw_only=True)
class Command:
    """A task and its configuration."""

    schema: str
    """The configuration's dataclass, as "module:name"; its module imports nothing heavy."""
    task: str
    """The function that takes the configuration, as "module:name"."""
    summary: str
    """One sentence for `--help`."""
    positionals: tuple[str, ...] = ()
    """The keys that arguments without "=" set, in order; none: such an argument is the configuration file."""


COMMANDS = {
    "generate": Command(
        schema="mask2dit.inference.config:InferenceConfig",
        task="mask2dit.inference.run:generate",
        summary="Generate a multi-scene video from one prompt per scene, or extend given scenes.",
    ),
    "train": Command(
        schema="mask2dit.training.config:TrainConfig",
        task="mask2dit.training.run:train",
        summary="Pre-train or fine-tune a model. scripts/train.sh runs it on several processes.",
    ),
    "cache": Command(
        schema="mask2dit.data.config:CacheConfig",
        task="mask2dit.data.cache:build_cache",
        summary="Compute the latents and text embeddings of a manifest before training.",
    ),
    "check": Command(
        schema="mask2dit.data.config:CheckConfig",
        task="mask2dit.data.check:report_problems",
        summary="Check a story file, or every row of a manifest and every frame that training may read.",
        positionals=("manifest",),
    ),
    "evaluate": Command(
        schema="mask2dit.evaluation.config:EvaluationConfig",
        task="mask2dit.evaluation.run:evaluate",
        summary="Generate videos of stories, or take existing ones, and measure them.",
    ),
    "study": Command(
        schema="mask2dit.evaluation.config:StudyConfig",
        task="mask2dit.evaluation.study:study",
        summary="Write the page of a blind user study, or tally its answers.",
    ),
    "curate": Command(
        schema="mask2dit.curation.config:CurationConfig",
        task="mask2dit.curation.run:curate",
        summary="Turn a folder of films into training manifests.",
    ),
    "write": Command(
        schema="mask2dit.inference.write:WriteConfig",
        task="mask2dit.inference.write:write_stories",
        summary="Write a story from an idea, or a set of stories, with a language model.",
        positionals=("idea", "output"),
    ),
    "studio": Command(
        schema="mask2dit.studio.config:StudioConfig",
        task="mask2dit.studio.run:studio",
        summary="Open a page on which stories are written, generated and mended scene by scene.",
    ),
}


# `mask2dit check` with a story file in place of a manifest.
CHECK_STORY = Command(
    schema="mask2dit.inference.config:CheckStoryConfig",
    task="mask2dit.inference.check:report_faults",
    summary="Report every fault of a story file, with its line.",
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Args:
        arguments: command-line arguments. None: those of this process.

    Returns:
        The exit status: the command's, or 2 if there is no such command.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {program()} COMMAND [CONFIG.yaml] [key=value ...]\n\ncommands:")
        print(table({name: command.summary for name, command in COMMANDS.items()}))
        print(f"\n{program()} COMMAND --help describes every key of a command.")
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in COMMANDS:
        close = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"commands are {', '.join(COMMANDS)}"
        print(f"error: there is no command {name!r}; {hint}", file=sys.stderr)
        return 2
    return run(name, rest, f"{program()} {name}")


def run(name: str, arguments: Sequence[str], called: str | None = None) -> int:
    """Runs a command.

    Args:
        name: a key of `COMMANDS`.
        arguments: the arguments after the command's name.
        called: how the command is called, for `--help`. None: as this process was called.

    Returns:
        The exit status, see `run_command`.
    """
    command = COMMANDS[name]
    if name == "check" and (with_story := _with_story(arguments)):
        command, arguments = CHECK_STORY, with_story
    return run_command(
        load(command.schema),
        command.task,
        None,
        arguments,
        name=called,
        summary=command.summary,
        positionals=command.positionals,
    )


def _with_story(arguments: Sequence[str]) -> list[str] | None:
    """Names the story file among the arguments of `check` as story=FILE. None if there is no such file among them."""
    if any(argument.startswith("story=") for argument in arguments):
        return list(arguments)
    config_keys = [field.name for field in fields(load(COMMANDS["check"].schema))]
    files = [argument for argument in arguments if "=" not in argument and not argument.startswith("-")]
    is_story_file = load("mask2dit.stories.files:is_story_file")
    stories = [file for file in files if is_story_file(file, config_keys)]
    if not stories:
        return None
    return [f"story={argument}" if argument in stories else argument for argument in arguments]
