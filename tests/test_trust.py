"""What comes from others is data: nothing here unpickles, evaluates or imports what a file says."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted(
    path for place in ("phi3v", "launch", "benchmarks") for path in (ROOT / place).rglob("*.py")
)
# What runs what it is given: modules that unpickle, and names of functions that do or evaluate.
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy"}
BUILTINS = {"eval", "exec", "compile", "__import__"}
OF_OBJECTS = {
    *("all_gather_object", "gather_object", "scatter_object_list", "broadcast_object_list"),
    *("send_object_list", "recv_object_list"),
}
ALLOWED = {
    # `pickle.UnpicklingError`, which torch raises.
    ("phi3v/training/checkpoints/loading.py", "import pickle"),
    # Between a process and its own child, which can do by itself whatever it could make it do.
    ("phi3v/processing/bounded.py", "import pickle"),
    # What torch offers is measured: values of a benchmark's own ranks.
    ("benchmarks/gpu_ranks.py", "broadcast_object_list"),
}


def name_of(node: ast.expr) -> str:
    """torch.load of `torch.load`, load of `load`."""
    if isinstance(node, ast.Attribute):
        return f"{name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def faults(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {a.name}" for a in node.names if a.name.split(".")[0] in MODULES)
        elif isinstance(node, ast.ImportFrom):
            module = (node.module or "").split(".")[0]
            names = {alias.name for alias in node.names}
            if module in MODULES or (module in ("torch", "numpy", "yaml") and "load" in names):
                yield f"import {node.module}"
        elif isinstance(node, ast.Call):
            yield from call_faults(node)


def call_faults(node: ast.Call) -> Iterator[str]:
    name = name_of(node.func)
    given = {key.arg: key.value for key in node.keywords}
    last = name.rpartition(".")[2]
    if name in BUILTINS or last in OF_OBJECTS:
        yield last
    is_only = isinstance(only := given.get("weights_only"), ast.Constant) and only.value is True
    if name in ("torch.load", "torch.hub.load") and not is_only:
        yield f"{name} without weights_only=True"
    if name in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pandas.read_pickle"):
        yield name
    for key in ("allow_pickle", "trust_remote_code"):
        if key in given and not (isinstance(v := given[key], ast.Constant) and v.value is False):
            yield f"{name} with {key}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_runs_what_a_file_or_another_rank_says(path: Path) -> None:
    own = path.relative_to(ROOT).as_posix()
    found = set(faults(ast.parse(path.read_text(encoding="utf-8"))))
    assert {fault for fault in found if (own, fault) not in ALLOWED} == set()


@pytest.mark.parametrize(
    "code",
    [
        *("torch.load(path)", "torch.load(path, weights_only=False)", "import pickle"),
        *("torch.load(path, weights_only=x)", "from pickle import load", "from torch import load"),
        *("numpy.load(path, allow_pickle=True)", "yaml.load(text)", "eval(text)"),
        *("AutoModel.from_pretrained(path, trust_remote_code=x)", "import dill.source"),
        "torch.distributed.all_gather_object(shares, value)",
    ],
)
def test_each_way_to_do_so_is_found(code: str) -> None:
    assert list(faults(ast.parse(code)))
