"""The README's program and the documentation's examples run as they stand."""

import re
from pathlib import Path

import pytest
import torch

from workflow import main

ROOT = Path(__file__).resolve().parents[1]


def examples(name):
    return re.findall(r"```python\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_readme_program_runs_and_is_short(capsys):
    (program,) = examples("README.md")
    assert len([line for line in program.splitlines() if line.strip()]) <= 25
    quick = re.sub(r"steps=\d+", "steps=3", program).replace("warmup=50", "warmup=1").replace("[:100]", "[:4]")
    assert quick != program
    exec(compile(quick, "README.md", "exec"), {})
    assert "bits/dim" in capsys.readouterr().out


@pytest.mark.parametrize("file", sorted(str(p.relative_to(ROOT / "docs")) for p in (ROOT / "docs").rglob("*.md")))
def test_the_examples_of_the_documentation_run(file):
    torch.manual_seed(0)
    names = {}
    for example in examples(f"docs/{file}"):
        exec(compile(example, file, "exec"), names)


def test_the_readme_names_files_that_exist():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\(((?!http)[^)]+)\)|`((?:[a-z_]+/)+[a-z_]+\.(?:py|md))`", text):
        name = path[0] or path[1]
        assert (ROOT / name).exists(), name


def test_no_number_is_left_to_fill_in():
    for file in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        assert not re.search(r"@[A-Z]+@", file.read_text()), file


def documented_commands():
    """Every `python experiments/NAME.py …` or `score-sde NAME …` of the documentation, as (name, arguments)."""
    for file in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name, rest in re.findall(
            r"(?:experiments/|score-sde )([a-z_]+)(?:\.py)?((?: +[^\s`|#…]+)*)", file.read_text()
        ):
            yield file.name, name, rest.split()


def test_the_documented_commands_have_the_flags_that_are_named(capsys):
    missing = []
    for file, name, arguments in sorted({(f, n, tuple(a)) for f, n, a in documented_commands()}):
        named = [a.partition("=")[0] for a in arguments if a.startswith("--")]
        chosen = [a for a in arguments if re.match(r"--preset=|--config\.[\w.]*name=", a)]  # which decide what there is
        with pytest.raises(SystemExit):
            main.main([name, *chosen, "--help"])
        shown = capsys.readouterr().out
        missing += [f"{file}: {name} {flag}" for flag in named if flag not in shown]
    assert not missing
