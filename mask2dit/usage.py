"""The text of `--help`: every key of a configuration with its default and its description."""

import ast
import inspect
import shutil
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from itertools import groupby
from typing import Any

import yaml


@dataclass(frozen=True, kw_only=True)
class Key:
    """A key of a configuration, or a group of keys."""

    name: str
    """Dotted name, such as lora.path."""
    default: str | None
    """Default as written on the command line; None: the key is a group, or is required."""
    description: str | None
    """String literal below the field, or below the same field of a base class; for a group, otherwise the docstring of its
    dataclass."""
    section: str | None
    """Comment above the fields that belong together."""
    group: str
    """Name of the group that the key belongs to, or that it is; empty: none."""


def describe_keys(schema: type[Any]) -> list[Key]:
    """Reads the keys of a configuration from the source of its dataclass, groups followed by their own keys."""
    return list(_keys(schema, {field.name: _default(field) for field in fields(schema)}))


def help_text(usage: str, summary: str, schema: type[Any], default_config: object = None) -> str:
    """Formats the help of a command for the width of the terminal.

    Args:
        usage: how the command is called.
        summary: what it does.
        schema: the dataclass of its configuration.
        default_config: the YAML file that is read unless another is named; None: the defaults of the dataclass apply.
    """
    source = f"values of {default_config}" if default_config else "defaults below"
    paragraphs = [
        f"usage: {usage}",
        _fill(summary),
        _fill(f"Without CONFIG.yaml, the {source} apply. key=value overrides a key; quote a value that has spaces."),
    ]
    for section, keys in groupby(describe_keys(schema), key=lambda key: key.section):
        heading = f"{section}:\n" if section else ""
        paragraphs.append(heading + "\n\n".join("\n".join(map(_entry, block)) for _, block in groupby(keys, _group)))
    return "\n\n".join(paragraphs)


def table(rows: Mapping[str, str]) -> str:
    """Formats names and their descriptions in two columns, for the width of the terminal."""
    column = max(map(len, rows)) + 4
    return "\n".join(_fill(f"{name:<{column - 2}}{text}", 2, column) for name, text in rows.items())


def _group(key: Key) -> str:
    return key.group


def _entry(key: Key) -> str:
    name = key.name if key.default is None else f"{key.name}={key.default}"
    return f"{_fill(name, 2, 6)}\n{_fill(key.description or '', 6)}"


def _keys(schema: type[Any], values: Mapping[str, Any], prefix: str = "", section: str | None = None) -> Iterator[Key]:
    documented = _documentation(schema)
    for field in fields(schema):
        description, heading = documented[field.name]
        name, value = prefix + field.name, values[field.name]
        above = section if prefix else heading  # groups are told apart by the prefix of their keys
        if is_dataclass(value):
            group = type(value)
            description = description or _own_docstring(group)
            yield Key(name=name, default=None, description=description, section=above, group=name)
            yield from _keys(group, vars(value), f"{name}.", above)
        else:
            default = None if value is MISSING else _as_written(value)
            yield Key(name=name, default=default, description=description, section=above, group=prefix[:-1])


def _documentation(schema: type) -> dict[str, tuple[str | None, str | None]]:
    """The description and the section of each field."""
    found: dict[str, tuple[str | None, str | None]] = {}
    for base in reversed(schema.__mro__):
        if "__dataclass_fields__" not in vars(base):
            continue
        source = textwrap.dedent(inspect.getsource(base))
        lines, definition = source.splitlines(), ast.parse(source).body[0]
        assert isinstance(definition, ast.ClassDef)
        section = None
        for node, following in zip(definition.body, [*definition.body[1:], None]):
            if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name):
                continue
            above = lines[node.lineno - 2].strip()
            section = above.removeprefix("# ") if above.startswith("# ") else section
            description, inherited_section = found.get(node.target.id, (None, None))
            if isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant):
                description = inspect.cleandoc(str(following.value.value))
            found[node.target.id] = (description, section or inherited_section)
    return found


def _own_docstring(schema: type) -> str | None:
    """The docstring of a dataclass, unless it is the signature that Python puts in place of one."""
    text = inspect.getdoc(schema)
    return None if text is None or text.startswith(f"{schema.__name__}(") else text


def _default(field) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def _as_written(value: Any) -> str:
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("...\n").strip()


def _fill(text: str, indent: int = 0, hanging: int | None = None) -> str:
    """Wraps a text. `hanging` is the indent of all lines but the first, if it is another."""
    return textwrap.fill(
        text,
        width=max(shutil.get_terminal_size().columns, 40),
        initial_indent=" " * indent,
        subsequent_indent=" " * (indent if hanging is None else hanging),
        break_long_words=False,
        break_on_hyphens=False,
    )
