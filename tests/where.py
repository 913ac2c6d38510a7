"""Which tests hold a module: python -m tests.where nemotron_jax/layers/latent_moe.py

The file of its own name comes first, then the files that import it; where there are none, those
that import the modules which import it. What `tests/test_layering.py` knows of files is here, too.
"""

import ast
import pathlib
import re
import sys
from collections.abc import Iterator, Sequence

ROOT = pathlib.Path(__file__).parents[1]
PACKAGES = ("nemotron_jax", "pallas_kernels", "configs", "experiments")
SCRIPTS = ("train.py", "eval.py")
_FURTHEST = 2  # imports between a module and its tests


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the test files of each module that is named, by its path or with dots."""
    for given in sys.argv[1:] if arguments is None else arguments:
        name = given.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if name not in FILES:
            raise SystemExit(f"where: {given!r}: no module has this path; give one from {ROOT}")
        print("\n".join(tests_of(name)))
    return 0


def tests_of(module: str) -> list[str]:
    """Test files of a module, from the root, the nearest first; empty where none is near."""
    near = {module}
    for _ in range(_FURTHEST + 1):
        found = [file for file, used in _USED.items() if used & near or file == _mirror(module)]
        tests = [file for file in found if file.rpartition("/")[2].startswith("test_")]
        if tests:
            return sorted(tests, key=lambda file: (file != _mirror(module), file))
        near |= {name for name, tree in _IMPORTS.items() if tree & near}
    return []


def module_name(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def source_files() -> dict[str, pathlib.Path]:
    files = [file for package in PACKAGES for file in (ROOT / package).rglob("*.py")]
    files += [ROOT / script for script in SCRIPTS if (ROOT / script).exists()]
    return {module_name(file): file for file in files}


FILES = source_files()
TREES = {name: ast.parse(file.read_text(encoding="utf-8")) for name, file in FILES.items()}
TEST_FILES = {str(file.relative_to(ROOT)): file for file in sorted((ROOT / "tests").rglob("*.py"))}


def imports(tree: ast.Module) -> Iterator[str]:
    """Modules named by import statements, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute"
            for alias in node.names:
                # `from a import b` names module a.b when there is one, else something in a.
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in FILES else node.module


def _mirror(module: str) -> str:
    """The test file of a module's own name; an op of pallas_kernels, a folder, has one."""
    package, *folders, name = module.split(".")
    if package == "pallas_kernels":
        folders, name = [package], (folders or [name])[0]
    return "/".join(["tests", *folders, f"test_{name}.py"])


def _used(tree: ast.Module, package: str) -> set[str]:
    """Modules that a file imports, or names in a text: for another process, or for importlib."""
    found = set(imports(tree))
    below = {name.rpartition(".")[2]: name for name in FILES if name.startswith(f"{package}.")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.update(name for name in re.findall(r"\w+(?:\.\w+)+", node.value) if name in FILES)
            stem = node.value.rpartition("/")[2]
            if stem.endswith(".py") or "importlib" in found:
                found |= {below[known] for known in [stem.removesuffix(".py")] if known in below}
    return found


_IMPORTS = {name: _used(tree, name.rpartition(".")[0]) for name, tree in TREES.items()}
_USED = {
    name: _used(ast.parse(file.read_text("utf-8")), "tests") for name, file in TEST_FILES.items()
}

if __name__ == "__main__":
    sys.exit(main())
