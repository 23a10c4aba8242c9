"""Imports of the package only go down; heavy ones are made inside functions; `import llama_jax` is light."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_jax

ROOT = Path(llama_jax.__file__).parent

# Where each module stands; the longest prefix decides, and every module must be covered.
LEVELS = {
    "config": 0, "costs": 0, "presets": 0, "files": 0, "libc": 0, "progress": 0, "typing": 0,
    "_jax_internals": 0.9, "compilation_cache": 0.9,
    "text": 1.0, "distributed": 1.0, "sharding": 1.1, "costs.candidates": 1.2, "costs.choose": 1.2, "ops": 1.2,
    "caches": 1.3,
    "model": 2,
    "checkpoint": 2.9, "weights": 3.0, "loaded": 3.0, "data": 3.1, "infer": 3.2, "train": 3.2, "checkpoint.run": 3.2,
    "infer.server": 4, "train.loop": 4, "train.samples": 4, "train.answers": 4, "train.measure": 4,
    "evaluate": 4, "plan": 4,
    "cli": 5, "commands": 5, "doctor": 5, "": 5,
}  # fmt: skip
# Same level, and still not allowed: importer -> imported.
NEVER = {
    "infer": ("train",),
    "train": ("infer",),
    "text": ("distributed",),  # which imports jax
}
EXCEPT = {("train.samples", "infer.generate"), ("train.answers", "infer.generate")}  # samples during a run
ONLY_IN = {"flax": ("model", "ops.weights"), "orbax": ("checkpoint",)}
FUNCTIONS_ONLY = ("rich", "filelock")  # level 0 may import these inside functions
LAZY = ("torch", "transformers", "grain", "fastapi")  # no core dependencies: imported inside functions


@dataclasses.dataclass(frozen=True)
class Import:
    """One import: of which name, and whether it runs with the module or only for type checkers."""

    name: str
    line: int
    at_module_level: bool
    for_types: bool


def imports(source: str, module: str, *, is_package: bool = False) -> Iterator[Import]:
    def walk(node: ast.AST, top: bool, types: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                names = [alias.name for alias in child.names]
            elif isinstance(child, ast.ImportFrom):
                package = module if is_package else module.rpartition(".")[0]
                for _ in range(child.level - 1):
                    package = package.rpartition(".")[0]
                base = ".".join(filter(None, (package if child.level else "", child.module)))
                # `from llama_jax.caches import full` imports a module, `from llama_jax.config import X` a name.
                names = [f"{base}.{alias.name}" for alias in child.names]
            else:
                names = []
            for name in names:
                yield Import(name, child.lineno, top, types)
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                for statement in child.body:
                    yield from walk(ast.Module([statement], []), top, True)
                for statement in child.orelse:
                    yield from walk(ast.Module([statement], []), top, types)
            else:
                yield from walk(child, top and not inside, types)

    return walk(ast.parse(source), True, False)


def _prefixes(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(len(parts), 0, -1)] + [""]


def _level(module: str) -> float:
    return LEVELS[next(prefix for prefix in _prefixes(module) if prefix in LEVELS)]


def _is_in(module: str, places: tuple[str, ...]) -> bool:
    return any(prefix in places for prefix in _prefixes(module))


def violations(source: str, module: str, *, is_package: bool = False) -> list[str]:
    """What a module of llama_jax (named without `llama_jax.`) imports against the rules."""
    found = []
    for item in imports(source, f"llama_jax.{module}".rstrip("."), is_package=is_package):
        package, _, rest = item.name.partition(".")
        rules = []
        if package == "llama_jax" and not item.for_types:
            if _level(rest) > _level(module):
                rules.append("goes up")
            banned = next((NEVER[prefix] for prefix in _prefixes(module) if prefix in NEVER), ())
            excepted = any(module == a and _is_in(rest, (b,)) for a, b in EXCEPT)
            if _is_in(rest, banned) and not excepted:
                rules.append("is never imported here")
        if package in ("jax", "jaxlib", "flax") and _is_in(module, ("text",)):
            rules.append("text knows no JAX")
        if not item.for_types:
            if package in ONLY_IN and not _is_in(module, ONLY_IN[package]):
                rules.append(f"only in {', '.join(ONLY_IN[package])}")
            if package in LAZY and item.at_module_level:
                rules.append("must be imported inside a function")
            third_party = package not in sys.stdlib_module_names and package not in ("llama_jax", "__future__")
            lazily = package in FUNCTIONS_ONLY and not item.at_module_level
            if third_party and _level(module) == 0 and not lazily:
                rules.append("level 0 needs the standard library only")
        found += [f"llama_jax.{module}:{item.line}: {item.name} {rule}" for rule in rules]
    return found


def modules() -> list[str]:
    files = sorted(ROOT.rglob("*.py"))
    return [".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files]


@pytest.mark.parametrize("path", modules())
def test_imports_only_go_down(path):
    source = (ROOT / f"{path.replace('.', '/')}.py").read_text()
    is_package = path.rpartition(".")[2] == "__init__"
    module = path.rpartition(".")[0] if is_package else path
    if path != "__init__":
        assert any(prefix in LEVELS for prefix in _prefixes(module)[:-1]), f"give {module} a level"
    assert not violations(source, module, is_package=is_package)


@pytest.mark.parametrize(
    ("module", "source", "words"),
    [
        ("config.model", "from llama_jax.config.presets import PRESETS\nimport numpy", "numpy level 0"),
        ("files", "import filelock", "filelock level 0"),
        ("sharding", "from llama_jax import model", "llama_jax.model goes up"),
        ("sharding", "from llama_jax.ops import linear", "llama_jax.ops.linear goes up"),
        ("ops.rope", "from llama_jax.caches.full import write", "llama_jax.caches.full.write goes up"),
        ("ops.attention.cpu", "from ...caches.full import write", "llama_jax.caches.full.write goes up"),
        ("model", "def f():\n    import llama_jax.infer.generate", ":2: llama_jax.infer.generate goes up"),
        ("model", "class A:\n  import llama_jax.cli", "llama_jax.cli goes up"),
        ("infer.generate", "try:\n    from . import server\nfinally: pass", "llama_jax.infer.server goes up"),
        ("infer.generate", "import llama_jax", "llama_jax goes up"),
        ("infer.generate", "from llama_jax.train.losses import x", "never imported here"),
        ("infer.engine", "from llama_jax.train.losses import x", "never imported here"),
        ("train.step", "from llama_jax.infer.generate import generate", "never imported here"),
        ("train.samples", "from llama_jax.infer.sampling import Sampling", "never imported here"),
        ("weights.load", "from llama_jax.infer import generate", "llama_jax.infer.generate goes up"),
        ("weights.save", "from llama_jax.train import state", "llama_jax.train.state goes up"),
        ("text.bpe", "def f():\n    import jax.numpy as jnp", "text knows no JAX"),
        ("text.bpe", "if TYPE_CHECKING:\n    import jax", "text knows no JAX"),
        ("text.bpe", "from llama_jax.sharding import make_mesh", "llama_jax.sharding.make_mesh goes up"),
        ("text.bpe", "from llama_jax.distributed import x", "never imported here"),
        ("infer.decode", "from flax import nnx", "flax.nnx only in model, ops.weights"),
        ("weights.save", "def f():\n    import orbax.checkpoint", "orbax.checkpoint only in checkpoint"),
        ("weights.hf", "import torch", "torch must be imported inside a function"),
        ("evaluate.lm", "if True:\n    from transformers import x", "transformers.x must be imported inside"),
        ("data.rows.loader", "class A:\n    import grain", "grain must be imported inside a function"),
    ],
)
def test_planted_violations_are_caught(module, source, words):
    (found,) = violations(source, module)
    assert words in found


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("infer.generate", "if TYPE_CHECKING:\n    from llama_jax.loaded import LoadedLlama\n    import torch"),
        ("weights.load", "def f():\n    from llama_jax.model import Llama\n    import torch"),
        ("train.samples", "from llama_jax.infer.generate import generate"),
        ("caches.full", "from llama_jax.sharding import ShardingRules\nfrom llama_jax.ops.norm import rms_norm"),
        ("ops.weights", "from flax import nnx"),
        ("progress", "def f():\n    from rich.progress import Progress"),
        ("checkpoint", "import orbax.checkpoint as ocp"),
        ("config.presets", "from __future__ import annotations\nimport math\nfrom llama_jax.config import ConfigError"),
    ],
)
def test_what_is_allowed(module, source):
    assert not violations(source, module)


def test_scripts_and_configs_are_not_imported():
    """Nor the oracles: torch and transformers are for tests and benchmarks."""
    for path in modules():
        source = (ROOT / f"{path.replace('.', '/')}.py").read_text()
        packages = {item.name.partition(".")[0] for item in imports(source, "llama_jax.x")}
        assert not packages & {"scripts", "configs", "tests", "torch", "transformers"}, path


def test_import_is_light():
    """Naming a function imports neither JAX nor any of the large packages: JAX comes with the first call."""
    code = "import json, sys, llama_jax; llama_jax.load; dir(llama_jax); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    packages = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert "llama_jax" in packages
    assert not packages & {"jax", "jaxlib", "flax", "orbax", "huggingface_hub", "gguf", *LAZY}


def test_running_needs_core_dependencies_only():
    code = (
        "import json, sys, llama_jax; [getattr(llama_jax, name) for name in llama_jax.__all__];"
        "print(json.dumps(sorted(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    packages = {name.partition(".")[0] for name in json.loads(done.stdout)}
    assert {"jax", "flax"} <= packages
    assert not packages & {"orbax", "huggingface_hub", "gguf", "tokenizers", *LAZY}


def test_public_names():
    for name in llama_jax.__all__:
        assert getattr(llama_jax, name) is not None
    assert set(llama_jax.__all__) <= set(dir(llama_jax))
    assert llama_jax.load is importlib.import_module("llama_jax.weights.load").load
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        llama_jax.nonsense  # noqa: B018
