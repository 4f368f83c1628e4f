"""The layout of the library: which module may import which, and what only scripts may do.

    core <- cli, study, report, judge, export, serve, playground <- scripts

Every import statement counts: at module level, inside functions and under TYPE_CHECKING.
"""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src"
# Words that say nothing of what they name.
NO_NAMES = {*["one", "other", "here", "there", "found", "told", "absent", "moved", "tell", "once"]}
# Packages around the core. The core imports none of them, and none of them imports another.
OUTER = ("cli", "study", "report", "judge", "export", "serve", "playground")


def modules(sources):
    """Dotted name -> syntax tree of every module of the package `grains`."""
    trees = {}
    for path in sorted(sources.glob("grains/**/*.py")):
        name = ".".join(path.relative_to(sources).with_suffix("").parts)
        trees[name.removesuffix(".__init__")] = ast.parse(path.read_text(), str(path))
    return trees


def imports(name, trees, packages):
    """The full names of the modules that a module imports, those of other libraries included.

    `from grains import x` imports the module grains.x if there is one, and the package otherwise.
    """
    names = set()
    for node in ast.walk(trees[name]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module
            if node.level:  # relative to the package that holds the module
                parents = name.split(".")
                parents = parents[: len(parents) - node.level + (name in packages)]
                base = ".".join(filter(None, [*parents, node.module]))
            for alias in node.names:
                submodule = f"{base}.{alias.name}"
                names.add(submodule if submodule in trees else base)
    return names


def area(name):
    """The outer package that a module of the library belongs to, or 'core'."""
    _, *inner = name.split(".")
    return inner[0] if inner and inner[0] in OUTER else "core"


def complaints(sources):
    """What is wrong with the layout of the library in a folder of sources, a line each."""
    trees = modules(sources)
    packages = {".".join(p.parent.relative_to(sources).parts) for p in sources.rglob("__init__.py")}
    imported = {name: imports(name, trees, packages) for name in trees}
    outside = {path.stem for path in sources.glob("*.py")} | {"scripts", "demo"}
    lines = []
    for name in trees:
        for target in sorted(imported[name]):
            if target.split(".")[0] in outside:
                lines.append(f"{name} imports {target}, which is not in the library")
            if target == "argparse" and area(name) != "cli":
                lines.append(f"{name} imports argparse")
            if target.split(".")[0] == "grains" and area(target) not in ("core", area(name)):
                lines.append(f"{name} imports {target}")
        for node in ast.walk(trees[name]):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            if is_print and area(name) == "core":
                lines.append(f"{name} prints in line {node.lineno}")
    try:
        graph = {name: imported[name] & set(trees) for name in trees}
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        lines.append("a circle: " + " <- ".join(error.args[1]))
    return lines


def test_the_library_imports_one_way():
    assert not complaints(SOURCES)


def names(tree):
    """Every name that a module gives, and its line: of functions, arguments, values and imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id, node.lineno
        elif isinstance(node, ast.arg):
            yield node.arg, node.lineno
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield node.name, node.lineno
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from ((alias.asname or alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr, node.lineno


def meaningless(root):
    """path:line: name for each name in a folder that NO_NAMES holds."""
    return [
        f"{path.relative_to(root)}:{line}: {name}"
        for path in sorted(root.rglob("*.py"))
        for name, line in names(ast.parse(path.read_text(), str(path)))
        if name in NO_NAMES
    ]


@pytest.mark.parametrize("folder", ["src", "benchmarks"])
def test_names_say_what_they_name(folder):
    assert not meaningless(ROOT / folder)


@pytest.mark.parametrize(
    "text",
    [
        "one = 1",
        "for one in (): pass",
        "[one for one in ()]",
        "def one(): pass",
        "def f(*, one=1): pass",
        "lambda one: 1",
        "class one: pass",
        "one: int = 1",
        "import json as one",
        "self.one = 1",
        "with open(x) as one: pass",
        "(one := 1)",
    ],
)
def test_a_meaningless_name_is_seen(tmp_path, text):
    (tmp_path / "module.py").write_text(f"\n{text}\n")
    assert meaningless(tmp_path) == ["module.py:2: one"]


CLEAN = {
    "grains/__init__.py": """
from typing import TYPE_CHECKING
from grains.version import __version__
if TYPE_CHECKING:
    from grains.api import load
""",
    "grains/version.py": "__version__ = '1'",
    "grains/errors.py": "",
    "grains/lm.py": "from grains import errors\nfrom grains.version import __version__",
    "grains/api.py": "import torch\nfrom grains import lm\nload = print",
    "grains/cli/__init__.py": "",
    "grains/cli/flags.py": "import argparse\nfrom grains import lm\nprint('flags')",
    "grains/cli/entry.py": "from grains.cli import flags\nfrom . import flags as same",
    "grains/judge.py": "",
    "grains/study.py": "",
    "grains/report/__init__.py": "from grains.report.text import words",
    "grains/report/text.py": "words = ''",
    "experiment.py": "import argparse\nfrom grains.cli import flags\nimport demo.shapes",
}


@pytest.fixture
def write(tmp_path):
    """Writes a clean package with some of its files changed; returns its folder."""

    def write(changes):
        for path, text in (CLEAN | changes).items():
            file = tmp_path / path
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        return tmp_path

    return write


def test_a_clean_package_passes(write):
    assert not complaints(write({}))


@pytest.mark.parametrize(
    "path, text, complaint",
    [
        ("grains/errors.py", "from grains.api import load", "a circle: "),
        ("grains/errors.py", "def late():\n    import grains.api", "a circle: "),
        ("grains/errors.py", "if TYPE_CHECKING:\n    from grains import api", "a circle: "),
        ("grains/errors.py", "from .lm import __version__", "a circle: "),
        ("grains/errors.py", "from grains import load", "a circle: "),
        ("grains/cli/flags.py", "def late():\n    from . import entry", "a circle: "),
        ("grains/report/text.py", "from .. import report", "a circle: "),
        ("grains/lm.py", "from grains.cli import flags", "grains.lm imports grains.cli.flags"),
        ("grains/lm.py", "from grains import study", "grains.lm imports grains.study"),
        ("grains/study.py", "from grains import report", "grains.study imports grains.report"),
        (
            "grains/report/text.py",
            "def late():\n    from grains.judge import x",
            "grains.report.text imports grains.judge",
        ),
        (
            "grains/cli/flags.py",
            "from grains.report.text import words",
            "grains.cli.flags imports grains.report.text",
        ),
        ("grains/lm.py", "from argparse import Namespace", "grains.lm imports argparse"),
        ("grains/report/text.py", "import argparse", "grains.report.text imports argparse"),
        ("grains/lm.py", "def show(x):\n    print(x)", "grains.lm prints in line 2"),
        ("grains/lm.py", "import experiment", "grains.lm imports experiment, which is not"),
        ("grains/cli/flags.py", "import scripts.llm", "grains.cli.flags imports scripts.llm"),
        ("grains/lm.py", "from demo import shapes", "grains.lm imports demo, which is not"),
        ("grains/report/text.py", "import demo.shapes", "grains.report.text imports demo.shapes"),
    ],
)
def test_an_offence_is_found(write, path, text, complaint):
    assert any(line.startswith(complaint) for line in complaints(write({path: text})))


def test_no_merge_was_left_unfinished():
    marks = tuple(mark * 7 + " " for mark in "<>")
    left = [
        path.relative_to(ROOT)
        for folder in ("src", "tests", "docs", "benchmarks", "findings")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".sh", ".md", ".j2") and "results" not in path.parts
        if any(line.startswith(marks) for line in path.read_text("utf-8").splitlines())
    ]
    assert not left
