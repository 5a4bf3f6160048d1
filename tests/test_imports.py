"""The package is a tower: modules import downward only, and none imports what imports it back."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import mask2dit

# From the ground up. A name is a package or a module at the root; those on one floor may import each other.
FLOORS = (
    ("scenes",),
    (
        "config",
        "usage",
        "command",
        "cli",
        "device",
        "files",
        "hashing",
        "provenance",
        "randomness",
        "endpoint",
        "optional",
        "texts",
    ),
    ("engine",),
    ("reporting",),
    ("video",),
    ("stories",),
    ("models",),
    ("pipelines",),
    ("encoders",),
    ("data",),
    ("training",),
    ("storyworld",),
    ("inference",),
    ("evaluation",),
    ("curation",),
    ("studio",),
    ("__main__",),
    ("",),  # the root's own names, which are for users of the package
)
FLOOR_OF = {name: number for number, floor in enumerate(FLOORS) for name in floor}


def imports(package: Path) -> dict[str, set[str]]:
    """Which modules each module of a package imports, within functions too; what is for type checkers only is left out."""
    modules = {_name(path, package): path for path in package.rglob("*.py")}
    return {
        module: {
            found
            for name in _imported(path, module)
            if (found := next((known for known in (name, name.rpartition(".")[0]) if known in modules), None))
        }
        - {module}
        for module, path in modules.items()
    }


def upward_imports(graph: dict[str, set[str]]) -> list[str]:
    """Imports of a higher floor, and modules that are on none."""
    lost = [module for module in graph if _part(module) not in FLOOR_OF]
    return [f"{module} is on no floor" for module in lost] + [
        f"{module} imports {imported}, which is above it"
        for module, of_module in graph.items()
        for imported in sorted(of_module)
        if not {module, imported} & set(lost) and FLOOR_OF[_part(imported)] > FLOOR_OF[_part(module)]
    ]


def circle(graph: dict[str, set[str]]) -> list[str] | None:
    """Names that import each other in a circle; None if there are none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


def by_part(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The graph of the packages and modules at the root."""
    parts: dict[str, set[str]] = {}
    for module, of_module in graph.items():
        parts.setdefault(_part(module), set()).update({_part(name) for name in of_module} - {_part(module)})
    return parts


def _name(path: Path, package: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def _part(module: str) -> str:
    """The package or module at the root that a module belongs to; nothing for the root itself."""
    return ".".join(module.split(".")[1:2])


def _imported(path: Path, module: str) -> Iterator[str]:
    stack: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    while stack:
        node = stack.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            stack += node.orelse
            continue
        stack += ast.iter_child_nodes(node)
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)


def test_modules_import_downward_only():
    graph = imports(Path(mask2dit.__file__).parent)
    assert graph["mask2dit.pipelines.story"] >= {"mask2dit.pipelines.mask2dit"}
    assert upward_imports(graph) == []


def test_no_module_and_no_package_imports_what_imports_it_back():
    graph = imports(Path(mask2dit.__file__).parent)
    assert circle(graph) is None
    assert circle(by_part(graph)) is None


SOUND = {
    "__init__.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from mask2dit.models import masks\n",
    "scenes.py": "import os\n",
    "models/__init__.py": "",
    "models/masks.py": "from mask2dit import scenes\n",
    "pipelines/__init__.py": "",
    "pipelines/mask2dit.py": "def load():\n    from mask2dit.models.masks import dense_mask\n",
}


@pytest.fixture
def package(tmp_path):
    """The graph of a package with the given files, which come on top of a sound one."""

    def make(**files: str) -> dict[str, set[str]]:
        for name, text in {**SOUND, **files}.items():
            path = tmp_path / "mask2dit" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return imports(tmp_path / "mask2dit")

    return make


def test_a_sound_package_passes(package):
    graph = package()
    assert graph["mask2dit.pipelines.mask2dit"] == {"mask2dit.models.masks"}
    assert graph["mask2dit.models.masks"] == {"mask2dit.scenes"}
    assert upward_imports(graph) == []
    assert circle(graph) is circle(by_part(graph)) is None


@pytest.mark.parametrize(
    "text",
    [
        "import mask2dit.pipelines.mask2dit\n",
        "from mask2dit.pipelines import mask2dit\n",
        "from mask2dit.pipelines.mask2dit import load\n",
        "from ..pipelines.mask2dit import load\n",
        "def lazily():\n    from mask2dit.pipelines.mask2dit import load\n",
        "try:\n    from mask2dit.pipelines.mask2dit import load\nexcept ImportError:\n    pass\n",
    ],
)
def test_an_upward_import_is_found_and_its_circle_too(text, package):
    graph = package(**{"models/masks.py": text})
    assert upward_imports(graph) == ["mask2dit.models.masks imports mask2dit.pipelines.mask2dit, which is above it"]
    assert set(circle(graph)) == {"mask2dit.models.masks", "mask2dit.pipelines.mask2dit"}


def test_a_circle_of_packages_is_found_where_no_modules_make_one(package):
    files = {"models/loading.py": "", "pipelines/saving.py": "import mask2dit.models.loading\n"}
    graph = package(**files, **{"models/masks.py": "from mask2dit.pipelines import saving\n"})
    graph["mask2dit.pipelines.mask2dit"] = set()
    assert circle(graph) is None
    assert set(circle(by_part(graph))) == {"models", "pipelines"}


def test_a_circle_within_a_package_is_found(package):
    graph = package(**{"models/a.py": "from . import b\n", "models/b.py": "def f():\n    from .a import g\n"})
    assert upward_imports(graph) == []
    assert set(circle(graph)) == {"mask2dit.models.a", "mask2dit.models.b"}


def test_the_public_names_of_the_root_are_no_way_around(package):
    graph = package(**{"models/masks.py": "from mask2dit import Mask2DiTPipeline\n"})
    assert upward_imports(graph) == ["mask2dit.models.masks imports mask2dit, which is above it"]


def test_a_module_without_a_floor_is_found(package):
    assert upward_imports(package(**{"utils.py": ""})) == ["mask2dit.utils is on no floor"]
