"""Configuration files: one YAML per task, read into a dataclass that defines the type and meaning of every key."""

import difflib
import io
import math
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from numbers import Integral, Real
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

from mask2dit.texts import parse_json, read_text

T = TypeVar("T")
DTYPES = ("float32", "bfloat16", "float16")
CONTEXTS = ("last", "anchor", "cast")  # choices of earlier scenes, see mask2dit.pipelines.story.ContextRule
QUANTIZATIONS = ("int8", "fp8", "bnb_int8", "nf4")
SAMPLERS = {"ddim": "CogVideoXDDIMScheduler", "dpm": "CogVideoXDPMScheduler"}  # by name, diffusers' classes
CONTEXT_CACHE_DEVICES = ("model", "cpu")
CONTEXT_CACHE_DTYPES = ("auto", "fp8")
CACHES = ("pyramid_attention", "faster_cache", "first_block", "taylorseer", "taylorseer_lite", "mag_cache")
REFUSED_CACHES = {
    "sea_cache": "it follows the noise levels of flow matching, and has no adapter for this transformer",
    "text_kv": "it hooks the blocks of another model, so that it would change nothing",
}
REPOSITORY = Path(__file__).parents[1]  # if the package runs from a checkout
NULL, STRING = "tag:yaml.org,2002:null", "tag:yaml.org,2002:str"  # YAML's tags


def load_config(schema: type[T], path: str | Path | None, overrides: Sequence[str] = ()) -> T:
    """Reads a YAML file and `key=value` overrides into a dataclass.

    If a JSON record is read, the metadata of fields act: one with {"record_for": key} is set to the record's path if the key
    is overridden, and one with {"of_one_run": key} does not take the record's value then; with {"of_one_run": None}, never.

    Texts are taken literally: `${x}` is not interpolated, and a key that holds a text takes `007` or `yes` as it is
    written. An override is also a text, unless it begins with a bracket, or its key does not hold a text and it is a
    number, a boolean or null. Quotes around the whole value are removed.

    Args:
        schema: the dataclass. Its fields are the known keys, and values are converted to their types.
        path: the YAML file, or the JSON record of a run, whose "config" is used. None: the defaults and the overrides.
        overrides: for instance ["seed=1", "prompts=[one, two]"]; they take precedence over the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: for an unknown key, a value of the wrong type, or anything that is not a YAML mapping. The message begins
            with the file, key or override at fault.
    """
    config = OmegaConf.structured(schema)
    source = path
    if path is not None and not Path(path).is_file():
        kind = "is a folder" if Path(path).is_dir() else "does not exist"
        raise FileNotFoundError(
            f"the configuration file {str(path)!r} {kind}: name a .yaml, or the .json record of a run; settings are "
            "written key=value"
        )
    if path is not None and Path(path).suffix.lower() == ".json":
        overridden = {override.partition("=")[0] for override in overrides}
        records = [entry.name for entry in fields(schema) if entry.metadata.get("record_for") in overridden]
        overrides = [*(f"{name}={path}" for name in records), *overrides]
    try:
        if path is not None:
            config = OmegaConf.merge(config, _read(schema, Path(path), overrides))
        from_file = config = _without_replaced(schema, config, overrides)
        for override in overrides:
            if "=" not in override:
                raise ValueError(f"{override!r} has to be of the form key=value")
            source = override
            config = OmegaConf.merge(config, _parse_override(schema, override))
        source = path
        try:
            return _build(config)
        except ValueError as error:
            source = _culprit(schema, from_file, overrides, str(error)) or path
            raise
    except (OmegaConfBaseException, yaml.YAMLError, TypeError, ValueError, RecursionError) as error:
        message = _explain(error, config)
        where = "" if source is None or message.startswith(str(source)) else f"{source}: "
        raise ValueError(f"{where}{message}") from error


def missing_model(model: str, small_config: str | None = None) -> str:
    """Writes the error message for a missing model folder, with a remedy that works from the current directory.

    Args:
        model: the folder as given.
        small_config: the repository's configuration for the same task with the small world's model, if there is one.
    """
    here = f"there is no model in {str(Path(model).resolve())!r}"
    if (REPOSITORY / model / "transformer").is_dir() and not Path(model).is_absolute():
        return f"{here}: relative paths resolve against the current directory; change to {str(REPOSITORY)!r}, which has it"
    if not (REPOSITORY / "models/README.md").is_file():  # an installed package
        return f"{here}: name the folder that holds one"
    is_here = Path.cwd() == REPOSITORY
    readme = "models/README.md" if is_here else REPOSITORY / "models/README.md"
    remedy = f"{here}: put the weights there ({readme} says which)"
    if small_config is None:
        return remedy
    return f"{remedy}, or run {small_config} in {'this directory' if is_here else repr(str(REPOSITORY))} as it is"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises `ValueError`, naming the key, unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f"{name} has to be one of {', '.join(choices)}, but is {value!r}")


def check_finite(name: str, value: float) -> None:
    """Raises `ValueError`, naming the key, for an infinity, NaN, or anything else that is not a number."""
    if not isinstance(value, Real) or not math.isfinite(value):
        raise ValueError(f"{name}={value} has to be a finite number")


def check_at_least(name: str, value: float, least: float) -> None:
    """Raises `ValueError`, naming the key, for a value that is below `least` or not finite."""
    check_finite(name, value)
    if value < least:
        raise ValueError(f"{name}={value} has to be at least {least}")


def check_positive(name: str, value: float) -> None:
    """Raises `ValueError`, naming the key, for a value that is not positive or not finite."""
    check_finite(name, value)
    if value <= 0:
        raise ValueError(f"{name}={value} has to be more than 0")


def check_between(name: str, value: float, least: float, most: float) -> None:
    """Raises `ValueError`, naming the key, for a value that is outside [least, most] or not finite."""
    check_finite(name, value)
    if not least <= value <= most:
        raise ValueError(f"{name}={value} has to be between {least} and {most}")


def check_context_cache(refresh: int, device: str, dtype: str) -> None:
    """Raises `ValueError` for invalid values of `context_refresh`, `context_cache_device` and `context_cache_dtype`."""
    if not isinstance(refresh, Integral) or refresh < 1:
        raise ValueError(f"context_refresh={refresh} has to be a number of steps, at least 1")
    check_choice("context_cache_device", device, CONTEXT_CACHE_DEVICES)
    check_choice("context_cache_dtype", dtype, CONTEXT_CACHE_DTYPES)


def check_cache(name: str | None) -> None:
    """Raises `ValueError` for an unknown step cache of diffusers, and for one that does not work on this transformer."""
    if name in REFUSED_CACHES:
        raise ValueError(f"cache={name} cannot be used: {REFUSED_CACHES[name]}; use {', '.join(CACHES)} or null")
    if name is not None:
        check_choice("cache", name, CACHES)


def check_guidance_interval(interval: Sequence[float] | None) -> None:
    """Raises `ValueError` unless `guidance_interval` is None or two timesteps in ascending order."""
    if interval is None:
        return
    if len(interval) != 2:
        raise ValueError(f"guidance_interval={interval} has to be two timesteps, the lowest and the highest")
    for timestep in interval:
        check_between("guidance_interval", timestep, 0, 1000)
    if interval[0] > interval[1]:
        raise ValueError(f"guidance_interval={interval} has to begin with the lower timestep")


def check_file_name(name: str, value: str, suffix: str) -> None:
    """Raises `ValueError`, naming the key, unless `value + suffix` is a plain file name."""
    is_control = [unicodedata.category(character) in ("Cc", "Cs") for character in value]
    if not value.strip() or value.startswith(".") or {"/", "\\"} & set(value) or any(is_control):
        raise ValueError(
            f"{name}={value!r} has to be a file name without suffix, which does not begin with a dot and has no slash or "
            "control character: put a folder into save_path"
        )
    if len(f"{value}{suffix}".encode()) > 255:
        raise ValueError(f"{name}={value[:20]}… has {len(value)} characters, too many for a file name")


def parse_shard(shard: str) -> tuple[int, int]:
    """Parses "i/n", the i-th of n parts of the work, counted from 0.

    Raises:
        ValueError: for anything else.
    """
    index, slash, count = shard.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise ValueError(f"shard has to be i/n with i from 0 to n - 1, such as 0/1, but is {shard!r}")
    return int(index), int(count)


def _without_replaced(schema: type, config, overrides: Sequence[str]):
    """Resets the keys of a file that an override replaces by another form of the same input.

    `schema.ALTERNATIVES` holds groups of keys of which only one may be set.
    """
    groups = getattr(schema, "ALTERNATIVES", ())
    overridden = {re.split(r"[.\[=]", override)[0] for override in overrides}
    replaced = {
        key for group in groups for other in groups if other != group and overridden & set(other) for key in group
    }
    defaults = OmegaConf.structured(schema)
    return OmegaConf.merge(config, {key: defaults[key] for key in replaced - overridden})


def _read(schema: type, path: Path, overrides: Sequence[str]):
    """Reads the keys and values of a YAML file, or of the configuration in a JSON record."""
    if path.suffix.lower() == ".json":  # a YAML parser would read an escaped emoji as two characters
        given = parse_json(read_text(path, "configuration file"))
        if isinstance(given, dict) and "config" in given:
            given = given["config"]
            overridden = {None, *(override.partition("=")[0] for override in overrides)}
            for entry in fields(schema) if isinstance(given, dict) else ():
                if entry.metadata.get("of_one_run", "") in overridden:
                    given.pop(entry.name, None)
        node = yaml.compose(yaml.safe_dump(given), yaml.SafeLoader)
    else:
        with path.open(encoding="utf-8-sig") as file:
            node = yaml.compose(file, yaml.SafeLoader)
    if not isinstance(node, yaml.MappingNode | None):
        raise ValueError("it has to hold keys and values")
    return OmegaConf.load(io.StringIO(_literal(node, schema)))


def _parse_override(schema: type, override: str):
    """Reads an override into a configuration with its one key."""
    key, _, text = override.partition("=")
    hint = schema
    for name in key.split("."):
        hint = next((_fields(group).get(name) for group in _alternatives(hint)), None)
    is_text, is_list = str in _alternatives(hint), text[:1] in ("[", "{")
    literal = yaml.ScalarNode(STRING, text)
    try:
        node = yaml.compose(text, yaml.SafeLoader) or yaml.ScalarNode(NULL, "null")
    except yaml.YAMLError:
        if is_list and not is_text:
            raise
        node = literal
    is_scalar = isinstance(node, yaml.ScalarNode)
    # A comment, a colon or an anchor is part of a text.
    is_literal = node.tag != NULL if is_text else not is_list and (node.tag == STRING or not is_scalar)
    if is_literal and not (is_scalar and node.style in ("'", '"')):
        node = literal
    return OmegaConf.from_dotlist([f"{key}={_literal(node, hint)}"])


def _literal(node: yaml.Node | None, hint: Any) -> str:
    """Rewrites YAML so that OmegaConf also reads a text wherever the type asks for one."""
    seen = set()

    def visit(node: yaml.Node, hint: Any) -> None:
        if id(node) in seen:  # an alias
            return
        seen.add(id(node))
        types = _alternatives(hint)
        if isinstance(node, yaml.MappingNode):
            fields = {name: kind for group in types for name, kind in _fields(group).items()}
            for key, value in node.value:
                visit(value, fields.get(key.value))
        elif isinstance(node, yaml.SequenceNode):
            items = [kind for group in types if get_origin(group) is list for kind in get_args(group)]
            for item in node.value:
                visit(item, items[0] if items else None)
        else:
            if str in types and node.tag != NULL:
                node.tag = STRING
            if node.value == "???":
                raise ValueError("??? stands for a value that is still missing: write it")
            if node.tag == STRING:  # only before an interpolation does OmegaConf read backslashes as escapes
                node.value = re.sub(r"(\\*)\$\{", r"\1\1\\${", node.value)

    if node is None:
        return "{}"
    visit(node, hint)
    return yaml.serialize(node, Dumper=yaml.SafeDumper, allow_unicode=True)


def _alternatives(hint: Any) -> tuple:
    return get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)


def _fields(group: Any) -> dict[str, Any]:
    return get_type_hints(group) if is_dataclass(group) else {}


def _culprit(schema: type, from_file, overrides: Sequence[str], message: str) -> str | None:
    """Returns the key of the override that causes this message, preferably one that the message names. Its value may be a
    secret, and stays out of messages."""
    culprits = []
    for index, override in enumerate(overrides):
        others = [*overrides[:index], *overrides[index + 1 :]]
        try:
            _build(OmegaConf.merge(from_file, *(_parse_override(schema, other) for other in others)))
        except ValueError as error:
            if str(error) == message:
                continue
        culprits.append(override.partition("=")[0])
    words = re.findall(r"\w+", message)
    named = [key for word in words for key in culprits if key.split(".")[-1] == word]
    return next(iter(named + culprits), None)


def _build(config) -> Any:
    """Converts a configuration to its dataclass, which checks itself."""
    built = OmegaConf.to_object(config)
    _check_all_finite(built)
    return built


def _check_all_finite(value: Any, key: str = "") -> None:
    """Raises `ValueError`, naming the key, for an infinity or NaN anywhere in a configuration."""
    if is_dataclass(value):
        for field in fields(value):
            _check_all_finite(getattr(value, field.name), f"{key}.{field.name}".removeprefix("."))
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            _check_all_finite(item, key)
    elif isinstance(value, float):
        check_finite(key, value)


def _explain(error: Exception, config) -> str:
    """Explains an error in one line without OmegaConf's wording, and suggests the intended key for an unknown one."""
    message = " ".join(str(error).split("\n    full_key")[0].split())
    message = re.sub(r"^While dereferencing interpolation '.*?': ", "", message)  # also added for an escaped ${
    key = getattr(error, "full_key", None)
    if isinstance(error, ConfigKeyError):
        key = key or str(error.key)
        group = OmegaConf.select(config, key.rpartition(".")[0]) if "." in key else config
        if group is None:  # a group that the configuration would add, such as that of a stage
            group = [field.name for field in fields(error.object_type)]
        known = [f"{key.rpartition('.')[0]}.{name}".removeprefix(".") for name in group]
        close = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known keys are {', '.join(known)}"
        return f"there is no key {key!r}; {hint}"
    if "is not a ListConfig" in message:
        return f"{key} has to be a list, such as {key}=[…]"
    if "NoneType is not a subclass of" in message:
        return f"{key} needs a value"
    if "is not a subclass of" in message:
        return "this is a group of keys, each of which is set by itself, as in lora.path=…"
    if "Incompatible value 'None'" in message or "is not Optional" in message:
        return f"{key} needs a value"
    if "incompatible container types" in message or isinstance(error, TypeError):
        return "a list is written [one, two], and each key of a group is set by itself, as in lora.path=…"
    return f"{key}: {message}" if key else message
