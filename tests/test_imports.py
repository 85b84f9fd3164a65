"""Who may know whom (docs/architecture.md), read from the sources without importing them.

Every import counts: at the top, inside a function, under TYPE_CHECKING.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from quantlab.errors import RecipeError

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "quantlab": ROOT / "quantlab",
    "quantlab_kernels": ROOT / "kernels" / "quantlab_kernels",
    "quantlab_evals": ROOT / "evals" / "quantlab_evals",
}

# From the ground up: a part may know the parts that its line names, and itself; nothing else of ours.
GROUND = {"quantlab_kernels", "quantlab_evals", "quantlab.errors"}
NUMERICS = {"quantlab.errors", "quantlab_kernels"}
METHODS = {"quantlab.errors", "quantlab.numerics", "quantlab.recipe", "quantlab.registry", "quantlab.problem"}
STORED = {"quantlab.errors", "quantlab.numerics", "quantlab_kernels", "quantlab.storage"}
MODEL = {*STORED, "quantlab.nn", "quantlab.experts"}
PARTS = {"quantizers", "transforms", "compensation"}
ENGINE = {*MODEL, *METHODS, "quantlab.checkpoint", *(f"quantlab.{part}" for part in PARTS), "quantlab_evals"}
TOP = {*ENGINE, "quantlab.engine", "quantlab.allocation"}
SPEED = {f"quantlab.{part}" for part in ("benchmark", "devices", "latency", "layer_speed", "model_shape", "prediction")}
API = SPEED | {
    f"quantlab.{part}"
    for part in (
        *("export", "verification", "formats", "inspection", "evaluation", "variants", "comparison", "sweep"),
        *("planning", "plan_check", "plan_problem"),
    )
}
MAY_KNOW: dict[str, set[str]] = {
    "quantlab_kernels": set(),
    "quantlab_evals": set(),
    "quantlab.errors": set(),
    "quantlab.numerics": NUMERICS,
    "quantlab.recipe": {"quantlab.errors", "quantlab.numerics"},
    "quantlab.registry": {"quantlab.errors"},
    "quantlab.problem": {"quantlab.errors", "quantlab.numerics", "quantlab.recipe"},
    "quantlab.quantizers": METHODS,
    "quantlab.transforms": METHODS,
    "quantlab.compensation": METHODS,
    "quantlab.experts": {"quantlab.errors"},
    "quantlab.storage": STORED - {"quantlab.storage"},
    "quantlab.nn": STORED,
    "quantlab.checkpoint": MODEL,
    "quantlab.engine": ENGINE,
    "quantlab.allocation": ENGINE | {"quantlab.engine", "quantlab.variants"},
    "quantlab.export": TOP,
    "quantlab.verification": TOP | {"quantlab.export"},
    "quantlab.formats": {"quantlab.errors", "quantlab.numerics"},
    "quantlab.inspection": TOP,
    "quantlab.evaluation": TOP,
    "quantlab.variants": {*METHODS, "quantlab.quantizers", "quantlab.compensation"},
    "quantlab.comparison": TOP | {"quantlab.variants"},
    "quantlab.latency": TOP | {"quantlab.devices", "quantlab.model_shape"},
    "quantlab.plan_problem": TOP | {"quantlab.latency", "quantlab.variants"},
    "quantlab.planning": TOP | {f"quantlab.{part}" for part in ("devices", "latency", "plan_problem", "variants")},
    "quantlab.plan_check": TOP | {"quantlab.evaluation", "quantlab.plan_problem", "quantlab.planning"},
    "quantlab.benchmark": TOP | {"quantlab.layer_speed", "quantlab.evaluation"},
    "quantlab.devices": {"quantlab.errors", "quantlab_evals"},
    "quantlab.layer_speed": TOP,
    "quantlab.model_shape": TOP,
    "quantlab.prediction": TOP | {"quantlab.devices", "quantlab.model_shape"},
    "quantlab.sweep": TOP | SPEED | {f"quantlab.{part}" for part in ("evaluation", "inspection", "variants")},
    "quantlab.cli": TOP | API | {"quantlab"},
    "quantlab": TOP | API,  # its __init__, the public names
}


def sources() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package by its own."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported(text: str, module: str, is_package: bool, modules: set[str]) -> set[str]:
    """The modules of ours that the source ``text`` of ``module`` imports."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".") if is_package else module.split(".")[:-1]
            here = parents[: len(parents) - node.level + 1] if node.level else []
            base = ".".join([*here, *(node.module or "").split(".")]).strip(".")
            for alias in node.names:  # from package import module, or from module import name
                names.add(f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules else base)
    ours = set()
    for name in names:
        if name.split(".")[0] in PACKAGES:
            while name not in modules and "." in name:
                name = name.rpartition(".")[0]
            ours.add(name)
    return ours - {module}


def graph() -> dict[str, set[str]]:
    found = sources()
    return {
        module: imported(path.read_text(encoding="utf-8"), module, path.name == "__init__.py", set(found))
        for module, path in found.items()
    }


def part(module: str) -> str:
    """The line of MAY_KNOW that a module falls under: ``quantlab.engine.loop`` under ``quantlab.engine``."""
    first, *rest = module.split(".")
    return f"{first}.{rest[0]}" if first == "quantlab" and rest else first


def violations(edges: dict[str, set[str]]) -> list[str]:
    """Imports that the rules do not allow."""
    return [
        f"{module} imports {other}"
        for module, others in edges.items()
        for other in sorted(others)
        if part(other) != part(module) and part(other) not in MAY_KNOW[part(module)]
    ]


def cycle(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import each other in a ring, if any do."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def test_the_sources_are_read():
    edges = graph()
    assert {"quantlab.numerics.grid", "quantlab_kernels.packing", "quantlab_evals.perplexity"} <= set(edges)
    assert "quantlab_kernels" in edges["quantlab.numerics.qtensor"]
    assert "quantlab_evals.errors" in edges["quantlab_evals.perplexity"], "relative imports count"
    assert sum(map(len, edges.values())) > 100


def test_every_part_has_a_rule():
    unruled = {part(module) for module in sources()} - set(MAY_KNOW)
    assert not unruled, "say in MAY_KNOW what the new part may know"


@pytest.mark.parametrize("name", sorted(MAY_KNOW))
def test_no_arrow_goes_up(name):
    edges = {module: others for module, others in graph().items() if part(module) == name}
    assert violations(edges) == []


def test_the_rules_themselves_have_no_ring():
    assert cycle(MAY_KNOW) == []
    assert set().union(*MAY_KNOW.values()) <= set(MAY_KNOW)


def test_no_modules_import_each_other():
    assert cycle(graph()) == []


def test_cli_starts_without_torch():
    """Each command imports what it needs when it runs: `quantlab --help` takes no seconds."""
    heavy = {"torch", "transformers", "datasets", "safetensors", "scipy", "numpy"}
    found = sources()
    reached, waiting = set(), ["quantlab", "quantlab.cli"]
    while waiting:
        module = waiting.pop()
        reached.add(module)
        tree = ast.parse(found[module].read_text(encoding="utf-8"))
        at_import = [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]
        text = "\n".join(map(ast.unparse, at_import))
        roots = {name.split(".")[0] for node in at_import for name in _targets(node)}
        assert not roots & heavy, f"{module} imports {roots & heavy} when the command starts"
        is_package = found[module].name == "__init__.py"
        waiting += imported(text, module, is_package, set(found)) - reached
    assert "quantlab.cli.app" in reached


def _targets(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]


def test_public_names_stay_what_they_are_when_modules_of_their_name_are_imported():
    """`quantlab.export` is a function and a package; so is whatever else has two meanings."""
    code = """
from importlib import import_module
from types import ModuleType
import quantlab
for name, home in quantlab._HOMES.items():
    import_module(f"quantlab.{home}")
print([name for name in quantlab.__all__ if isinstance(getattr(quantlab, name), ModuleType)])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_file_is_named_after_nothing():
    empty = {"utils", "util", "helpers", "helper", "common", "misc"}
    files = [path for folder in (*PACKAGES.values(), ROOT / "tests") for path in folder.rglob("*.py")]
    assert [path for path in files if path.stem.lower() in empty] == []


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_every_package_is_installed():
    """A folder that pyproject.toml forgets works in this tree and is missing from the wheel."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    assert {name for name, path in sources().items() if path.name == "__init__.py"} <= listed


# --- the checks themselves ---


@pytest.mark.parametrize(
    ("text", "module", "expected"),
    [
        ("import quantlab.a.b", "quantlab.c", {"quantlab.a.b"}),
        ("import quantlab.a.b as x, torch", "quantlab.c", {"quantlab.a.b"}),
        ("from quantlab.a import b, Name", "quantlab.c", {"quantlab.a.b", "quantlab.a"}),
        ("from quantlab import a", "quantlab.c", {"quantlab.a"}),
        ("from .a import Name", "quantlab.c", {"quantlab.a"}),
        ("from . import a", "quantlab.c", {"quantlab.a"}),
        ("from ..c import x", "quantlab.a.b", {"quantlab.c"}),
        ("def f():\n    from quantlab.a import b", "quantlab.c", {"quantlab.a.b"}),
        ("if TYPE_CHECKING:\n    import quantlab_evals", "quantlab.c", {"quantlab_evals"}),
        ("import torch\nfrom transformers import x", "quantlab.c", set()),
    ],
)
def test_imports_are_found(text, module, expected):
    modules = {"quantlab", "quantlab.a", "quantlab.a.b", "quantlab.c", "quantlab_evals"}
    assert imported(text, module, False, modules) == expected


@pytest.mark.parametrize(
    ("module", "other"),
    [
        ("quantlab_kernels.packing", "quantlab.errors"),
        ("quantlab_evals.text", "quantlab.errors"),
        ("quantlab.numerics.grid", "quantlab.recipe"),
        ("quantlab.numerics.grid", "quantlab_evals"),
        ("quantlab.recipe", "quantlab.quantizers.base"),
        ("quantlab.quantizers.gptq", "quantlab.engine.solve"),
        ("quantlab.quantizers.gptq", "quantlab_kernels"),
        ("quantlab.nn", "quantlab.checkpoint.native"),
        ("quantlab.checkpoint.native", "quantlab.engine.journal"),
        ("quantlab.checkpoint.native", "quantlab.quantizers"),
        ("quantlab.engine.loop", "quantlab.cli.app"),
        ("quantlab.engine.loop", "quantlab"),
        ("quantlab.evaluation", "quantlab.cli.app"),
    ],
)
def test_what_goes_up_is_seen(module, other):
    assert violations({module: {other}}) == [f"{module} imports {other}"]


def test_rings_are_seen():
    assert set(cycle({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": set()})) == {"a", "b", "c"}
    assert cycle({"a": {"b", "c"}, "b": {"c"}}) == []


def test_no_method_and_nothing_of_the_engine_names_a_format_and_no_format_a_method():
    """The axes are independent: no string that is just such a name stands in the other's sources."""
    from quantlab.compensation import compensation_names
    from quantlab.numerics import format_called
    from quantlab.quantizers import quantizer_names
    from quantlab.transforms import transform_names

    def is_format(text: str) -> bool:
        try:
            format_called(text)
        except RecipeError:
            return False
        return True

    methods = {*quantizer_names(), *compensation_names(), *transform_names()}
    for module, path in sources().items():
        part = ".".join(module.split(".")[:2])
        words = {n.value for n in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(n, ast.Constant)}
        texts = {word for word in words if isinstance(word, str)}
        if part in {"quantlab.engine", *(f"quantlab.{axis}" for axis in PARTS)}:
            named = {text for text in texts if is_format(text)} - {"int8"}  # which is a dtype, too
            assert not named, module
        if part == "quantlab.numerics":
            assert not texts & methods, module
