"""The floors of the house, its sizes and its annotations hold in every file."""

import ast
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests import where
from tests.where import FILES, ROOT, TEST_FILES, TREES, imports, source_files

# A part imports itself and parts of lower floors only.
FLOORS = {
    "nemotron_jax.config": 1,
    "nemotron_jax.environments": 1,
    "nemotron_jax.host": 1,
    "nemotron_jax.peers": 1,
    "nemotron_jax.files": 1,
    "pallas_kernels": 1,
    "nemotron_jax.types": 2,  # what a layer is given holds an Execution
    "nemotron_jax.manifest": 2,
    "nemotron_jax.distributed": 2,
    "nemotron_jax.run_directory": 3,
    "nemotron_jax.sharding": 3,
    "nemotron_jax.quant": 4,  # quantisers take maxima over devices
    "nemotron_jax.layers": 5,
    "nemotron_jax.data": 5,
    "nemotron_jax.model": 6,
    "nemotron_jax.planning": 7,
    "nemotron_jax.training": 7,
    "nemotron_jax.decoding": 7,
    "nemotron_jax.interop": 7,
    "nemotron_jax.playing": 8,
    "nemotron_jax.posttraining": 9,
    "nemotron_jax.evaluation": 9,
    "nemotron_jax.serving": 9,
    # The facade and its commands are one part; stages and scripts may use the facade.
    "nemotron_jax": 10,
    "nemotron_jax.stages": 11,
    "nemotron_jax.commands": 12,
    "train": 13,
    "eval": 13,
    "experiments": 13,
}
FORBIDDEN = {
    "nemotron_jax.config": {"jax", "flax", "jaxlib", "optax", "numpy"},
    "nemotron_jax.environments": {"jax", "flax", "jaxlib", "optax"},
    "pallas_kernels": {"nemotron_jax", "flax", "ml_collections", "configs"},
    "configs": {"jax", "flax", "jaxlib", "optax", "pallas_kernels"},
}
MAX_FILE, MAX_BODY, MAX_KERNEL_BODY, MAX_POSITIONAL = 400, 50, 120, 6


def part_of(module: str) -> str | None:
    """The row of the table that a module belongs to; None for a foreign module."""
    for depth in (2, 1):
        name = ".".join(module.split(".")[:depth])
        if name in FLOORS:
            return name
    return None


def layering_faults(module: str, tree: ast.Module) -> list[str]:
    faults = []
    here = "configs" if module.startswith("configs") else part_of(module)
    assert here is not None, f"{module} is in no row of FLOORS: add its folder"
    for target in imports(tree):
        there = part_of(target)
        if target.split(".")[0] in FORBIDDEN.get(here, ()):
            faults.append(f"{module} imports {target}, which {here} never does")
        elif here == "configs":
            if there not in (None, "nemotron_jax.config"):
                faults.append(f"{module} imports {target}; configs/ uses nemotron_jax.config alone")
        elif there is not None and there != here and FLOORS[there] >= FLOORS[here]:
            faults.append(
                f"{module} (floor {FLOORS[here]}) imports {target} (floor {FLOORS[there]})"
            )
        elif target.split(".")[0] in ("configs", "tests") and here != "experiments":
            faults.append(f"{module} imports {target}")
    return faults


def cycle_in(graph: dict[str, set[str]]) -> list[str] | None:
    """Some cycle as a path that ends where it began, or None."""
    done: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str] | None:
        if node in path:
            return path[path.index(node) :] + [node]
        if node in done:
            return None
        for target in sorted(graph.get(node, ())):
            if found := visit(target, [*path, node]):
                return found
        done.add(node)
        return None

    return next((found for node in sorted(graph) if (found := visit(node, []))), None)


def functions(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef, bool, bool]]:
    """Each function with whether it is a method and whether it is public."""

    def walk(node: ast.AST, in_class: bool, public: bool) -> Iterator:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                is_dunder = child.name.startswith("__")
                yield child, in_class, public and (is_dunder or not child.name.startswith("_"))
                yield from walk(child, False, False)
            elif isinstance(child, ast.ClassDef):
                yield from walk(child, True, public and not child.name.startswith("_"))
            else:
                yield from walk(child, in_class, public)

    return walk(tree, False, True)


def body_lines(function: ast.FunctionDef) -> int:
    body = function.body[1:] if ast.get_docstring(function) is not None else function.body
    return body[-1].end_lineno - body[0].lineno + 1 if body else 0


def positional(function: ast.FunctionDef, is_method: bool) -> list[ast.arg]:
    arguments = function.args.posonlyargs + function.args.args
    is_static = any(getattr(d, "id", "") == "staticmethod" for d in function.decorator_list)
    return arguments[1:] if is_method and not is_static else arguments


def size_faults(name: str, source: str) -> list[str]:
    lines = source.count("\n")
    faults = [f"{name} has {lines} lines"] if lines > MAX_FILE else []
    is_kernel = pathlib.Path(name).name.startswith("pallas_")
    limit = MAX_KERNEL_BODY if is_kernel else MAX_BODY
    for function, is_method, _ in functions(ast.parse(source)):
        where = f"{name}:{function.lineno} {function.name}"
        if body_lines(function) > limit:
            faults.append(f"{where} has a body of {body_lines(function)} lines")
        # An op and its kernels take all the operands of their equation in order; options never.
        arguments = positional(function, is_method)
        is_equation = name.startswith("pallas_kernels/") and not function.args.defaults
        if len(arguments) > MAX_POSITIONAL and not is_equation:
            faults.append(f"{where} takes {len(arguments)} positional arguments")
    return faults


def annotation_faults(name: str, tree: ast.Module) -> list[str]:
    faults = []
    for function, is_method, public in functions(tree):
        arguments = positional(function, is_method) + function.args.kwonlyargs
        missing = [argument.arg for argument in arguments if argument.annotation is None]
        if function.returns is None:
            missing.append("return")
        if public and missing:
            faults.append(f"{name}:{function.lineno} {function.name} lacks {', '.join(missing)}")
    return faults


def undocumented(tree: ast.Module, documented: set[str]) -> tuple[list[str], int, list[str]]:
    """Public functions without a docstring, how many there are, and docstrings that lean on their
    neighbour. A method that overrides one which has a docstring is not counted."""
    missing, count, leaning = [], 0, []

    def walk(node: ast.AST, bases: tuple[str, ...], public: bool) -> None:
        nonlocal count
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef):
                public_class = public and not child.name.startswith("_")
                walk(child, (child.name, *map(base_name, child.bases)), public_class)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                said = ast.get_docstring(child) or ""
                if said.startswith("The same"):
                    leaning.append(child.name)
                inherited = any(f"{base}.{child.name}" in documented for base in bases[1:])
                if public and not child.name.startswith("_") and (said or not inherited):
                    count += 1
                    missing.extend([] if said else [".".join((*bases[:1], child.name))])
            else:
                walk(child, bases, public)

    walk(tree, (), True)
    return missing, count, leaning


def base_name(node: ast.expr) -> str:
    node = node.value if isinstance(node, ast.Subscript) else node
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def documented_methods() -> set[str]:
    """CLASS.METHOD of each method with a docstring, with those of the classes below it."""
    classes = [n for tree in TREES.values() for n in ast.walk(tree) if isinstance(n, ast.ClassDef)]
    found = {
        f"{one.name}.{f.name}"
        for one in classes
        for f in one.body
        if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(f)
    }
    for _ in range(3):  # as deep as classes stand below one another
        for one in classes:
            bases = tuple(f"{base_name(base)}." for base in one.bases)
            if bases:
                below = (name for name in found if name.startswith(bases))
                found |= {f"{one.name}.{name.partition('.')[2]}" for name in list(below)}
    return found


def test_public_functions_say_what_they_give() -> None:
    documented, missing, count, leaning = documented_methods(), [], 0, []
    for name, tree in TREES.items():
        if name.startswith(("nemotron_jax", "pallas_kernels")):
            without, all_of_it, same = undocumented(tree, documented)
            missing += [f"{name}: {function}" for function in without]
            count += all_of_it
            leaning += [f"{name}: {function}" for function in same]
    assert count > 1500 and len(missing) < 0.05 * count, missing
    assert not leaning, "say it in full: an editor shows one docstring alone"
    bad = 'class A:\n    def f(self): ...\ndef g():\n    """The same."""\ndef _h(): ...\n'
    assert undocumented(ast.parse(bad), set()) == (["A.f"], 2, ["g"])
    assert not undocumented(ast.parse(bad.replace("A:", "A(B):")), {"B.f"})[0]


def test_imports_go_down() -> None:
    faults = [fault for module, tree in TREES.items() for fault in layering_faults(module, tree)]
    assert not faults


def shown(part: str) -> str:
    """A part as docs/architecture.md names it."""
    path = part.replace(".", "/")
    if part == "nemotron_jax":
        return f"{part}/*.py"
    return f"{path}/" if (ROOT / path).is_dir() else f"{path}.py"


def test_the_page_shows_these_floors() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    table = page.split("```")[1].strip().splitlines()
    rows = [re.fullmatch(r"(\d+)  (.+?)(?:   +.*)?", line) for line in table]
    found = [(name, int(row[1])) for row in rows for name in row[2].split()]
    there = {part for module in TREES if (part := part_of(module)) is not None}
    assert sorted(found) == sorted((shown(part), FLOORS[part]) for part in there)
    assert [floor for _, floor in found] == sorted((f for _, f in found), reverse=True)


def test_no_file_imports_itself_through_others() -> None:
    """Not by an import inside a function either."""
    graph = {
        name: {target for target in imports(tree) if target in FILES}
        for name, tree in TREES.items()
    }
    assert cycle_in(graph) is None


def test_every_module_s_tests_are_found() -> None:
    """By `python -m tests.where`: at most two imports lie between a module and its tests."""
    parts = ("nemotron_jax.", "pallas_kernels.")
    modules = [name for name in FILES if FILES[name].stem != "__init__" and name.startswith(parts)]
    modules.remove("nemotron_jax.evaluation.lm_eval.tasks.local_data")  # read by lm_eval
    found = {name: where.tests_of(name) for name in modules}
    assert not [name for name, tests in found.items() if not tests]
    assert found["nemotron_jax.training.losses"][0] == "tests/training/test_losses.py"
    assert "tests/layers/test_expert_axis.py" in found["nemotron_jax.layers.latent_moe"]
    with pytest.raises(SystemExit, match="no module"):
        where.main(["nemotron_jax/layers/no_such.py"])


def test_files_and_functions_are_small_and_annotated() -> None:
    faults = []
    for module, file in FILES.items():
        name = str(file.relative_to(ROOT))
        faults += size_faults(name, file.read_text(encoding="utf-8"))
        faults += annotation_faults(name, TREES[module])
    assert not faults


def whole_configs(tree: ast.Module) -> Iterator[tuple[str, set[str]]]:
    """Functions that are given a RunConfig and hand it to nobody, with the parts that they read."""
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        arguments = (*function.args.args, *function.args.kwonlyargs)
        typed = [
            a.arg for a in arguments if a.annotation and ast.unparse(a.annotation) == "RunConfig"
        ]
        for name in typed:
            inside = list(ast.walk(function))
            named = [n for n in inside if isinstance(n, ast.Name) and n.id == name]
            reads = [n for n in inside if isinstance(n, ast.Attribute) and n.value in named]
            if len(reads) == len(named):
                yield function.name, {read.attr for read in reads}


def test_who_needs_three_parts_of_a_run_s_config_takes_three() -> None:
    """Stages and experiments hand parts down; config and planning are about the whole."""
    whole = ("nemotron_jax.stages", "nemotron_jax.config", "nemotron_jax.plan", "experiments")
    found = {
        f"{module}.{name}": parts
        for module, path in source_files().items()
        if not module.startswith(whole)
        for name, parts in whole_configs(ast.parse(path.read_text()))
    }
    assert len(found) >= 4 and not {name for name, parts in found.items() if len(parts) <= 3}
    three = "def f(config: RunConfig, x: int) -> int: return config.a.b + config.c + config.d\n"
    assert list(whole_configs(ast.parse(three))) == [("f", {"a", "c", "d"})]
    handed = "def f(config: RunConfig) -> int: return g(config) + config.a\n"
    assert not list(whole_configs(ast.parse(handed)))


def test_tests_are_small_too() -> None:
    faults = [
        fault
        for name, file in TEST_FILES.items()
        for fault in size_faults(name, file.read_text(encoding="utf-8"))
    ]
    assert not faults


@pytest.mark.parametrize("module", ["nemotron_jax.config.convert", "nemotron_jax.model.accounting"])
def test_configuration_needs_no_jax(module: str) -> None:
    code = f"import sys, {module}; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("module", "source", "fault"),
    [
        ("nemotron_jax.layers.norm", "from nemotron_jax.model import stack", "floor 6"),
        ("nemotron_jax.training.step", "import nemotron_jax.interop.hf_names", "floor 7"),
        ("nemotron_jax.model.stack", "def f():\n    import nemotron_jax.training", "floor 7"),
        ("nemotron_jax.config.model", "import jax.numpy as jnp", "never"),
        ("nemotron_jax.environments.base", "from jax import numpy", "never"),
        ("pallas_kernels.ssd.op", "from nemotron_jax.types import Array", "never"),
        ("pallas_kernels.ssd.op", "from flax import nnx", "never"),
        ("configs.nano", "from nemotron_jax.types import Batch", "alone"),
        ("nemotron_jax.model.stack", "from configs import models", "configs"),
        ("nemotron_jax.data.loader", "import nemotron_jax", "floor 10"),
    ],
)
def test_a_wrong_import_is_found(module: str, source: str, fault: str) -> None:
    assert fault in " ".join(layering_faults(module, ast.parse(source)))


def test_right_imports_are_let_through() -> None:
    source = "import jax\nfrom nemotron_jax.layers import norm\nimport nemotron_jax.model.block"
    assert not layering_faults("nemotron_jax.model.stack", ast.parse(source))


def test_a_cycle_is_found() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_wrong_sizes_and_missing_annotations_are_found() -> None:
    long_body = "def f():\n" + "    x = 1\n" * 51
    assert "body of 51" in size_faults("a.py", long_body)[0]
    assert not size_faults("pallas_kernels/ssd/pallas_tpu.py", long_body)
    documented = 'def f():\n    """One.\n' + "\n" * 60 + '    """\n    return 1\n'
    assert not size_faults("a.py", documented)
    assert "401 lines" in size_faults("a.py", "x = 1\n" * 401)[0]
    assert "7 positional" in size_faults("a.py", "def f(a, b, c, d, e, f, g): return 1\n")[0]
    equation = "def f(a, b, c, d, e, f, g): return 1\n"
    assert not size_faults("pallas_kernels/ssd/op.py", equation)
    with_option = equation.replace("g)", "g=3)")
    assert "7 positional" in size_faults("pallas_kernels/ssd/op.py", with_option)[0]
    method = "class C:\n    def f(self, a, b, c, d, e, f): return 1\n"
    assert not size_faults("a.py", method + "def g(a, *, b, c, d, e, f, h): return 1\n")
    unannotated = "def f(a: int, *, b) -> int: return 1\nclass C:\n    def g(self): return 1\n"
    faults = annotation_faults("a.py", ast.parse(unannotated))
    assert "lacks b" in faults[0] and "lacks return" in faults[1]
    assert not annotation_faults("a.py", ast.parse("def _f(a): return 1\n"))
