"""The house: who may import whom, and that importing is cheap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "numerics",
    "data",
    "sde_lib",
    "samplers",
    "likelihood",
    "models",
    "guidance",
    "training",
    "evaluation",
    "workflow",
    "experiments",
)
RANK = {
    "numerics": 0,
    "data": 1,  # knows of numerics what a user's mistake is
    "sde_lib": 1,
    "samplers": 2,
    "likelihood": 2,
    "models": 2,
    "guidance": 2,
    "training": 3,
    "evaluation": 3,
    "workflow": 4,
    "experiments": 5,
}
OPTIONAL = ("torchsde", "torchdiffeq", "scipy", "sklearn", "matplotlib", "PIL", "tensorboard")
OPTIONAL += ("diffusers", "torchvision", "datasets")


def modules(package):
    return sorted((ROOT / package).rglob("*.py"))


def imported(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name.split(".")[0], node) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield node.module.split(".")[0], node


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_down_the_house(package):
    assert modules(package), package
    for file in modules(package):
        for name, node in imported(ast.parse(file.read_text())):
            if name in RANK and name != package:
                assert RANK[name] < RANK[package], f"{file.relative_to(ROOT)}:{node.lineno} imports {name}"


IMPORTED = [p for p in PACKAGES if p != "experiments"]
ONE_BY_ONE = f"""
import json, sys, torch, traceback

def fresh(program):  # as in a new interpreter: of ours nothing is imported yet, of torch all that a program begins with
    for name in [name for name in sys.modules if name.split('.')[0] in {PACKAGES!r}]:
        del sys.modules[name]
    try:
        exec(program, {{}})
    except BaseException:
        return dict(error=traceback.format_exc()[-600:])
    return dict(error='', brought=sorted(sys.modules))

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {OPTIONAL!r}:
            raise ImportError('blocked: ' + name)

found = {{p: fresh(p) for p in ('import models', 'import data, evaluation', 'from workflow import load_run')}}
for name in [name for name in sys.modules if name.split('.')[0] in {OPTIONAL!r}]:
    del sys.modules[name]
sys.meta_path.insert(0, Block())
found |= {{'blocked ' + p: fresh('import ' + p) for p in {IMPORTED!r}}}
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def imports():
    """What imports in a fresh interpreter bring: one after the other in a single one, as torch itself takes long."""
    done = subprocess.run([sys.executable, "-c", ONE_BY_ONE], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-600:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("package", IMPORTED)
def test_importing_needs_no_optional_package(imports, package):
    """Imports with everything optional blocked."""
    error = imports[f"blocked {package}"]["error"]
    assert not error, error


def test_importing_models_brings_nothing_optional(imports):
    found = imports["import models"]
    assert not found["error"], found["error"]
    assert not {"diffusers", "safetensors", "transformers", "torchsde", "torch._inductor"} & set(found["brought"])


def test_importing_evaluation_brings_nothing_optional(imports):
    found = imports["import data, evaluation"]
    assert not found["error"], found["error"]
    assert not {"matplotlib", "PIL", "sklearn", "safetensors", "scipy", "datasets"} & set(found["brought"])


def test_a_run_is_loaded_first_in_a_fresh_interpreter(imports):
    """The systems import what restores, which must not import the runs back."""
    error = imports["from workflow import load_run"]["error"]
    assert not error, error


def test_sde_classes_are_asked_for_only_in_sde_lib():
    for package in PACKAGES:
        for file in modules(package):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance" and package != "sde_lib":
                    assert "SDE" not in ast.unparse(node), f"{file.relative_to(ROOT)}:{node.lineno}"


def test_broadcasting_goes_through_expand_as():
    for package in PACKAGES:
        for file in modules(package):
            assert "None, None]" not in file.read_text(), file.relative_to(ROOT)


def test_the_top_level_names_are_ours():
    """The names are generic and some exist on the package index: say so rather than run someone else's code."""
    from importlib.metadata import packages_distributions

    distributions = packages_distributions()
    for package in PACKAGES:
        owners = set(distributions.get(package, ()))
        assert owners <= {"score-sde-toolkit"}, f"{package} also comes from {owners}: use an environment of its own"
