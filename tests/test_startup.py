"""A script says what its flags are, and that one is wrong, without loading what takes seconds."""

import inspect
import json
import subprocess
import sys
import zlib

import pytest
import torch
from helpers import families, tiny, vlm_models
from helpers.command_line import SRC, child_environment
from torch.fx.experimental import symbolic_shapes
from transformers import models

import grains
from grains.cli import libraries

pytestmark = pytest.mark.slow

SCRIPTS = sorted(path.name for path in SRC.glob("*.py"))
HEAVY = ("numpy", "torch", "transformers", "datasets", "pandas", "sklearn", "scipy", "matplotlib")
AND_OR = ("sym_and", "sym_or")


FLAGS = {"--help": 0, "--no_such_flag": 2}
# Runs every script with every flag, each in a process of its own that has only Python's own
# modules, and prints what came of it.
START = """
import json, os, runpy, sys, tempfile
def started(script, flag):
    out, err, names = (tempfile.TemporaryFile("w+") for _ in range(3))
    pid = os.fork()
    if not pid:
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        sys.argv = [script, flag]
        code = 1
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            code = end.code or 0
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            print(*{name.partition(".")[0] for name in sys.modules}, file=names, flush=True)
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return [code, *(file.seek(0) or file.read() for file in (out, err, names))]
sys.path.insert(0, os.getcwd())
scripts, flags = json.loads(sys.argv[1])
print(json.dumps({script: {flag: started(script, flag) for flag in flags} for script in scripts}))
"""


@pytest.fixture(scope="module")
def started():
    """script -> flag -> exit status, output, errors, names of imported packages."""
    asked = json.dumps([SCRIPTS, [*FLAGS]])
    command = [sys.executable, "-c", START, asked]
    return json.loads(subprocess.run(command, cwd=SRC, capture_output=True, check=True).stdout)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_are_checked_without_the_libraries(started, script, flag):
    code, out, err, imported = started[script][flag]
    assert code == FLAGS[flag], err
    assert "grains" in imported.split() and not {*imported.split()}.intersection(HEAVY)
    assert "usage: " in (out if flag == "--help" else err)


def as_scripts_do(*lines: str) -> subprocess.CompletedProcess:
    """A process that imports the libraries as scripts do, and then runs some lines."""
    start = "import gc, sys, torch; from grains.cli import entry, libraries"
    program = "\n".join([start, *lines])
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=SRC,
        env=child_environment(),
        capture_output=True,
        text=True,
    )


def names_and_files(module) -> int:
    """A number for what transformers exports and from where."""
    return zlib.crc32(repr(sorted(module._class_to_module.items())).encode())


def test_stages_do_without_what_transformers_imports_in_vain(tmp_path):
    """In one process: SciPy, scikit-learn, SymPy and torch's compiler are not imported with it, nor
    to load a model, and are as installed as before; transformers exports what it always does, and
    reads once what its model files export.

    Weights and buffers of models of several kinds, also in shards, are bit for bit those that are
    loaded without stand-ins. SymPy is needed for none but the last, whose masks need the compiler's
    own context."""
    for family in families.FAMILIES:
        model, tokenizer = families.tiny_model(family, vocab_size=300), tiny.byte_tokenizer()
        model.save_pretrained(tmp_path / family, max_shard_size="50KB")
        tokenizer.save_pretrained(tmp_path / family)
    for family in vlm_models.FAMILIES:
        model, processor = vlm_models.parts(family)
        model.save_pretrained(tmp_path / family)
        processor.save_pretrained(tmp_path / family)
    names = [*families.FAMILIES, *vlm_models.FAMILIES]
    assert len([*(tmp_path / "llama").glob("*.safetensors")]) > 1
    ended = as_scripts_do(
        "opened = []",
        "sys.addaudithook(lambda event, args: event == 'open' and opened.append(args[0]))",
        "entry.import_libraries()",
        "import grains.generation, grains.stage1, grains.cli.stages, grains.tables",
        "from transformers import AutoModelForCausalLM",
        "with libraries.without_compiler():",
        f"    AutoModelForCausalLM.from_pretrained({str(tiny.save_model(tmp_path / 'own'))!r})",
        "print(*{name.partition('.')[0] for name in sys.modules}, gc.isenabled())",
        "print(*sys.modules)",
        "print(sum(str(name).endswith('modeling_bert.py') for name in opened))",
        "from grains import models",
        f"for name in {names}:",
        f"    folder = {str(tmp_path)!r} + '/' + name",
        "    with libraries.without_compiler():",
        "        model = models.load(folder).model",
        "    values = dict([*model.named_parameters(), *model.named_buffers()])",
        "    torch.save(values, folder + '/values.pt')",
        "    print(name, 'sympy' in sys.modules)",
        "import zlib",
        "from transformers import models",
        inspect.getsource(names_and_files),
        "print(names_and_files(models), models.LlamaForCausalLM.__name__)",
        "from transformers.masking_utils import TransformGetItemToIndex",
        "with TransformGetItemToIndex():",
        "    pick = torch.vmap(lambda i: torch.arange(3, 5)[i])",
        "    print(pick(torch.tensor([1, 0])).tolist())",
        "print(torch.compile(lambda x: x + 1, backend='eager')(torch.ones(1)).item())",
        "import scipy.optimize, sklearn.metrics, sympy.core.add",
        "from transformers.utils import is_scipy_available, is_sklearn_available",
        "print(is_scipy_available(), is_sklearn_available(), scipy.optimize.milp.__name__)",
        "print(sympy.simplify('x + x'))",
    )
    assert ended.returncode == 0, ended.stderr
    loaded, modules, read, *kinds, exports, picked, compiled, found, sum_ = (
        ended.stdout.splitlines()
    )
    assert {"torch", "transformers", "True"} <= {*loaded.split()}
    assert not {"sklearn", "pandas", "datasets", "pyarrow", "matplotlib"} & {*loaded.split()}
    assert not {"sympy", "torch._dynamo", "torch.distributed.tensor"} & {*modules.split()}
    assert read == "1"
    assert kinds == [f"{name} {name == 'gemma-3'}" for name in names]
    assert exports == f"{names_and_files(models)} LlamaForCausalLM"
    assert (picked, compiled) == ("[4, 3]", "2.0")
    assert (found, sum_) == ("True True milp", "2*x")
    for name in names:
        model = grains.load(str(tmp_path / name)).model
        values = dict([*model.named_parameters(), *model.named_buffers()])
        loaded = torch.load(tmp_path / name / "values.pt")
        assert loaded.keys() == values.keys() and any("inv_freq" in key for key in loaded)
        assert all(torch.equal(loaded[key], value) for key, value in values.items())


@pytest.mark.filterwarnings("ignore:guard_size_oblivious:FutureWarning")
def test_the_compilers_questions_about_sizes_are_answered_as_it_does():
    """Numbers without it, and symbols, which it knows more about, by it."""
    pairs = [(1, 1), (1, 2), ((2, 3), [2, 3]), ((2, 3), (2, 3, 4)), ([], torch.Size([]))]
    cases = {"sym_eq": pairs, "is_nested_int": [(0,), (3,)], "has_guarding_hint": [(0,), (True,)]}
    cases |= {name: [(x, y) for x in (False, True) for y in (False, True)] for name in AND_OR}
    for name in libraries.ANSWERS:
        own, ask = getattr(symbolic_shapes, name), libraries._answer(name)
        for sizes in cases.get(name, [(False,), (True,)]):
            assert ask(*sizes) is own(*sizes), (name, sizes)
    unknown = symbolic_shapes.ShapeEnv().create_unbacked_symint() > 7
    assert libraries._answer("guard_or_false")(unknown) is False
    assert libraries._answer("guard_or_true")(unknown) is True
    assert libraries._answer("has_guarding_hint")(unknown) is False
    assert isinstance(libraries._answer("sym_and")(True, unknown), torch.SymBool)
