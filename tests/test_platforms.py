"""Where Unix's own modules are missing, and paths are not joined by a slash: import, train, lock, save, go on."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_imports import PACKAGES, ROOT, modules

import sde_lib
from likelihood import elbo, log_likelihood
from models import Preconditioned, ScoreModel
from numerics import UserError
from samplers import AdaptiveSDE
from sde_lib import VPSDE
from training import LockedError, RunLock
from training import checkpoint as checkpoints
from workflow import run_folder

UNIX = (
    "fcntl",
    "resource",
    "pwd",
    "grp",
    "termios",
    "tty",
    "pty",
    "syslog",
    "crypt",
    "nis",
    "spwd",
    "readline",
    "curses",
)
ELSEWHERE = f"""
import os, signal, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {UNIX!r}:
            raise ImportError('blocked: ' + name)
for name in {UNIX!r}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Block())
for name in ('pwrite', 'pread', 'getuid', 'geteuid', 'getgid', 'fchmod'):
    delattr(os, name)
for name in ('SIGUSR1', 'SIGUSR2', 'SIGHUP', 'SIGALRM'):
    delattr(signal, name)
plain_open = os.open
def no_folders(path, *more, **named):
    if os.path.isdir(path):
        raise PermissionError(13, 'Permission denied', path)
    return plain_open(path, *more, **named)
os.open = no_folders
"""


def elsewhere(program, *arguments, code=0):
    """The program's output, in a process without what only Unix has."""
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE + program, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=200,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "USERNAME": "someone",
            "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        },
    )
    assert done.returncode == code, done.stderr[-2000:]
    return done.stdout


NAMES = [
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for package in PACKAGES
    for file in modules(package)
]
IMPORT = f"import importlib\nfor name in {NAMES!r}: importlib.import_module(name)\nprint('all')\n"
TRAIN = """
from pathlib import Path
from training_cases import options, points, tiny_model
from training import LockedError, RunLock, load_weights, train
folder = Path(sys.argv[1])
train(tiny_model(), points(), None, options(steps=2, checkpoint_every=1), folder=folder)
result = train(tiny_model(), points(), None, options(steps=4, checkpoint_every=1), folder=folder, resume=True)
print(result.steps, load_weights(tiny_model(), folder))
with RunLock(folder):
    try:
        train(tiny_model(), points(), None, options(steps=5), folder=folder, resume=True)
    except LockedError as error:
        print(error)
print(sorted(p.name for p in folder.iterdir() if not p.name.startswith('events')))
"""


def test_every_module_is_imported_and_a_run_is_trained_locked_saved_and_gone_on_with(tmp_path):
    lines = elsewhere(IMPORT + TRAIN, tmp_path / "run").splitlines()
    assert lines[0] == "all"
    assert lines[1] == "4 4"
    assert "works in this run folder" in lines[2] and "process " in lines[2]
    assert lines[3] == "['checkpoints', 'metrics.jsonl']"


def test_a_dead_process_lock_is_free_and_another_process_is_kept_out(tmp_path):
    """With filelock, between processes: one dies with the lock, the second takes it, the third is told of the second."""
    dies = "from training import RunLock\nRunLock(sys.argv[1]).__enter__()\nos._exit(7)"
    elsewhere(dies, tmp_path, code=7)
    assert (tmp_path / "run.lock").exists()
    waits = ELSEWHERE + "from training import RunLock\nwith RunLock(sys.argv[1]): print('held', flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", waits, str(tmp_path)],
        stdin=-1,
        stdout=-1,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
        tries = "from training import LockedError, RunLock\ntry: RunLock(sys.argv[1]).__enter__()\n"
        tries += "except LockedError as error: print(error)"
        assert f"process {holder.pid} on" in elsewhere(tries, tmp_path)
    finally:
        holder.communicate("\n", timeout=60)
    assert not (tmp_path / "run.lock").exists()
    with RunLock(tmp_path), pytest.raises(LockedError), RunLock(tmp_path):
        pass


TOOLS = """
from workflow import command_line
from workflow.main import main
from test_experiments import QUICK
folder = sys.argv[1]
flags = [*QUICK, '--config.data.name=swiss_roll', '--config.model.depth=1', '--quiet']
try:
    main(['vp', f'--workdir={folder}', *flags])
    main(['sample', '--run', folder, '--n', '3', '--steps', '2', '--quiet'])
    main(['nll', '--run', folder, '--limit', '3', '--steps', '2', '--quiet'])
finally:
    print(sorted(os.listdir(folder)))
"""


@pytest.mark.slow
def test_a_whole_run_and_its_tools(tmp_path):
    assert "report.md" in elsewhere(TOOLS, tmp_path / "run")
    assert "±" in (tmp_path / "run" / "report.md").read_text(encoding="utf-8")


def test_a_file_system_without_links_keeps_the_first_text(tmp_path, monkeypatch):
    def refuse(*more):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for text in ("first", "second"):
        run_folder.write_once(tmp_path / "grid.json", text)
    assert (tmp_path / "grid.json").read_text() == "first" and len(list(tmp_path.iterdir())) == 1


def test_text_is_utf_8_whatever_the_system_prefers():
    """Files that are read or written as text say their encoding."""
    for package in PACKAGES:
        for file in modules(package):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if not isinstance(node, ast.Call):
                    continue
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                named = {k.arg for k in node.keywords}
                if name == "read_text" or (name == "write_text" and len(node.args) == 1):
                    assert "encoding" in named, f"{file.relative_to(ROOT)}:{node.lineno}"


def test_a_path_is_never_cut_or_joined_at_a_slash():
    """A slash in a text is one of an archive's names, of a key, or of Markdown: listed here with the file."""
    allowed = {
        "dataset.py": "the text of a digest",
        "trained_run.py": "a fingerprint",
        "tarball.py": "names in a tar archive",
        "third_party.py": "names of repositories",
        "numpy_files.py": "names in an npz archive",
        "reporting.py": "names of quantities",
        "streams.py": "keys of random streams",
    }
    for package in PACKAGES:
        for file in modules(package):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                cut = isinstance(node, ast.Constant) and node.value == "/"
                assert not cut or file.name in allowed, f"{file.relative_to(ROOT)}:{node.lineno}"
    assert Path(checkpoints.CHECKPOINTS).name == checkpoints.CHECKPOINTS


# -- devices without float64 (Apple's), as far as can be told without one ---------------------------------------------------


@pytest.fixture
def apples():
    """Tensors that pretend to be on such a device: shape and dtype, no values; whatever became float64 there is noted."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils._python_dispatch import TorchDispatchMode

    class Doubles(TorchDispatchMode):
        found: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else (out,):
                if isinstance(value, torch.Tensor) and value.device.type == "mps" and value.dtype == torch.float64:
                    self.found.append(str(func))
            return out

    with FakeTensorMode(allow_non_fake_inputs=True), Doubles() as doubles:
        doubles.found.clear()
        yield doubles


class Weightless(torch.nn.Module):
    def forward(self, x, label, class_label=None):
        return x * label.unsqueeze(1)


def there(sde):
    """A model for that device: it has no weights that would have to be brought there."""
    return ScoreModel(Weightless(), sde, Preconditioned(data_std=0.5))


PROCESSES = {
    "vp": VPSDE(),
    "ve": sde_lib.VESDE(),
    "sub_vp": sde_lib.SubVPSDE(),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_a_models_call_makes_no_float64_there(apples, name):
    score = there(PROCESSES[name])
    x, t = torch.zeros(3, 2, device="mps"), torch.full((3,), 0.5, device="mps")
    assert score(x, t).device.type == "mps" and score.denoised(x, 0.5 * t).dtype == torch.float32
    assert not apples.found


@pytest.mark.parametrize(
    "use",
    [
        lambda s, x: log_likelihood(s.sde, s, x),
        lambda s, x: elbo(s.sde, s, x),
    ],
    ids=["likelihood", "bound"],
)
def test_what_needs_float64_says_so_there(apples, use):
    score = there(VPSDE())
    with pytest.raises(UserError, match="on the device mps, which has no float64"):
        use(score, torch.zeros(3, 2, device="mps"))


def test_the_adaptive_sde_keeps_its_times_in_float32_there(apples):
    score = there(VPSDE())
    x = torch.zeros(3, 2, device="mps")
    with pytest.raises(
        Exception, match=r"_local_scalar_dense|not linked"
    ):  # its look at the errors, in the first attempt
        AdaptiveSDE()(score.sde, score, x.shape, x_T=x)
    assert not apples.found
