import ast
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import pytest

import mask2dit
from mask2dit.usage import describe_keys, help_text

PACKAGE = Path(mask2dit.__file__).parent


def schemas() -> list[type]:
    """The dataclasses of the package whose names end in Config."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith("Config") and node.decorator_list:
                found.append(getattr(import_module(module), node.name))
    return found


@dataclass(kw_only=True)
class Inner:
    """A group."""

    path: str | None = None
    """Where from,
    and where to."""
    size: int = 3
    """How much."""


@dataclass(kw_only=True)
class Base:
    # First
    name: str = "a b"
    """A name."""
    steps: int
    """Of the base."""

    # Second
    undocumented: float = 1e-5


@dataclass(kw_only=True)
class Outer(Base):
    steps: int = 7
    inner: Inner = field(default_factory=lambda: Inner(size=4))
    values: list[str] = field(default_factory=lambda: ["x", "y"])
    """Values."""


def test_keys_come_with_default_description_section_and_group():
    assert [(key.name, key.default, key.description, key.section, key.group) for key in describe_keys(Outer)] == [
        ("name", "a b", "A name.", "First", ""),
        ("steps", "7", "Of the base.", "First", ""),
        ("undocumented", "1.0e-05", None, "Second", ""),
        ("inner", None, "A group.", None, "inner"),
        ("inner.path", "null", "Where from,\nand where to.", None, "inner"),
        ("inner.size", "4", "How much.", None, "inner"),
        ("values", "[x, y]", "Values.", None, ""),
    ]


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_every_key_of_every_configuration_is_described(schema):
    keys = describe_keys(schema)
    assert keys
    assert [key.name for key in keys if not key.description] == []


@pytest.mark.parametrize("schema", schemas(), ids=lambda schema: schema.__name__)
def test_descriptions_name_every_choice_that_a_check_allows(schema, monkeypatch):
    checked = {}
    for module in {import_module(other.__module__) for other in schemas()}:
        monkeypatch.setattr(module, "check_choice", lambda name, _, choices: checked.update({name: choices}), False)
    required = {"prompts": ["a"], "manifest": "a.csv", "base_url": "a", "model": "a", "output_dir": "a"}
    required |= {"max_steps": 1, "batch_size": 1, "runs": ["a", "b"]}
    schema(**{name: value for name, value in required.items() if name in schema.__dataclass_fields__})
    for name, choices in checked.items():
        described = [key.description for key in describe_keys(schema) if _is_key(key.name, name)]
        assert described, name
        assert [choice for choice in choices if any(choice not in description for description in described)] == []


def _is_key(key: str, checked: str) -> bool:
    """Whether a check means a key, though one of them is named with the group that it is in."""
    return key == checked or key.endswith(f".{checked}") or checked.endswith(f".{key}")


@pytest.mark.parametrize("width", [40, 80, 200])
def test_help_is_as_wide_as_the_terminal(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    longest = {len(line) for schema in schemas() for line in help_text("x", "y", schema).splitlines()}
    assert width - 15 < max(longest) <= max(width, 66)  # 66: a path that is not broken
