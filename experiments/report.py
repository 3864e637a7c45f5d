"""report.md: what a run did and found, to read. All of it comes from the run folder, so a resumed run's is whole.

Other tools add sections below; they stay for as long as the weights that they are about.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from experiments.curves import save_curves
from training.checkpoint import write_atomically

FILE = "report.md"
_BELOW = "\n<!-- below: added by other tools -->\n"  # after an empty line, or it would be part of a table
_EVOLUTION = 6


def version() -> str:
    """Of the project, where it is installed."""
    try:
        return metadata.version("score-sde-toolkit")
    except metadata.PackageNotFoundError:
        return "not installed"


def write(folder: Path, config: ConfigDict, results: dict[str, Any], *, keep: bool) -> None:
    """Writes report.md and curves.png from `results`, what results.json holds.

    Args:
        keep: what other tools have added to an earlier report.
    """
    curves = save_curves(folder)
    text = "\n".join(
        [
            f"# {config.name} on {config.data.name}",
            "",
            *_scores(config, results),
            *_samples(folder, results["sampling"]["all"]),
            *_training(results, curves),
            *_protocol(config, results),
        ]
    )
    file = folder / FILE
    below = file.read_text().partition(_BELOW)[2] if keep and file.is_file() else ""
    write_atomically(file, (text + _BELOW + below).encode())


def tidy(folder: Path) -> None:
    """Of sections below with the same heading, keeps the last."""
    file = folder / FILE
    text, mark, below = file.read_text().partition(_BELOW)
    first, *sections = re.split(r"(?m)^(?=## )", below)
    newest = {section.partition("\n")[0]: section for section in sections}
    tidied = text + mark + first + "".join(s for s in sections if s is newest[s.partition("\n")[0]])
    if tidied != text + mark + below:
        write_atomically(file, tidied.encode())


def show(folder: Path, config: ConfigDict, results: dict[str, Any]) -> None:
    """The same in a few lines, for the terminal."""
    rows = _densities(config, results)
    width = max(len(name) for name, _ in rows)
    print(f"\n{_unit(results)}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(f"  {results['bits_per_dim']['text']}")
    for s in results["sampling"]["all"].values():
        print(f"  {folder / s['picture']}: {s['samples']} samples, {s['nfe']} evaluations, {s['seconds']:.1f} s")
    print(
        f"  {results['seconds']:.0f} s in all, {results['training']['seconds']:.0f} s of them training; {folder / FILE}"
    )


def _unit(results: dict[str, Any]) -> str:
    protocol = results["bits_per_dim"]["protocol"]
    return f"bits/dim of the {protocol['split']} set" if protocol["levels"] else "-log2 density per dimension"


def _densities(config: ConfigDict, results: dict[str, Any]) -> list[tuple[str, str]]:
    found = results["bits_per_dim"]
    baselines = sorted(results.get("baselines", {}).items(), key=lambda item: item[1])
    return [
        (f"this run ({config.name})", f"{_number(found['mean'])} ± {_number(found['stderr'])}"),
        *((name, _number(value)) for name, value in baselines),
    ]


def _number(value: float | None) -> str:
    return "unknown" if value is None or value != value else f"{value:.3f}"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _scores(config: ConfigDict, results: dict[str, Any]) -> list[str]:
    found = results["bits_per_dim"]
    parts = [
        ("the choice of images", "data_stderr"),
        ("dequantisation noise", "dequantization_stderr"),
        ("trace estimates", "probe_stderr"),
    ]
    return [
        *_table(("density", _unit(results)), _densities(config, results)),
        found["text"],
        "",
        *_table(
            ("standard error", ""),
            [
                *((name, _number(found[key])) for name, key in parts),
                ("**in all**, in quadrature", f"**{_number(found['stderr'])}**"),
                ("the solver's error, a bias beside it", _number(found["solver_error"])),
            ],
        ),
    ]


def _samples(folder: Path, samplers: dict[str, Any]) -> list[str]:
    lines = ["## Samples", ""]
    for name, s in samplers.items():
        lines += [
            f"{s['samples']} by `{s['sampler']}`: {s['nfe']} evaluations, {s['seconds']:.1f} s",
            "",
            f"![{name}]({s['picture']})",
            "",
        ]
    steps = sorted(folder.glob("samples/step_*.png"))
    if len(steps) > 1:
        chosen = sorted({round(i * (len(steps) - 1) / (_EVOLUTION - 1)) for i in range(_EVOLUTION)})
        shown = [steps[i] for i in chosen]
        lines += [
            "The same noise in the course of training, averaged weights:",
            "",
            *_table(
                [f"step {int(f.stem.removeprefix('step_')):,}" for f in shown],
                [[f"![{f.stem}]({f.relative_to(folder)})" for f in shown]],
            ),
        ]
    return lines


def _training(results: dict[str, Any], curves: Path | None) -> list[str]:
    t = results["training"]
    lines = [
        "## Training",
        "",
        f"{t['steps']:,} steps of {t['batch_size']} in {t['seconds'] / 60:.1f} minutes, over all sessions; "
        f"{t['parameters']:,} parameters; last loss {t['loss']:.4g}.",
        "",
    ]
    validation = results.get("validation")
    if validation:
        seen = " (images that are trained on too; `--config.training.split=fit` leaves them out)"
        lines += [
            f"Validation: {validation['images']} images{seen if validation['seen'] else ''}; "
            "the same noise at every step.",
            "",
        ]
    return lines + ([f"![curves]({curves.name})", ""] if curves is not None else [])


def _protocol(config: ConfigDict, results: dict[str, Any]) -> list[str]:
    environment = results["environment"]
    origin = results.get("init_from")
    rows = [
        *(("command", f"`{command}`") for command in results.get("commands", [])),
        ("seed", str(results["seed"])),
        ("versions", f"python {environment['python']}, torch {environment['torch']}, toolkit {environment['toolkit']}"),
        ("device", f"{environment['device']}, {environment['threads']} threads"),
        ("minutes", f"{results['seconds'] / 60:.1f} in all in the last session"),
        ("weights", f"{results['bits_per_dim']['protocol']['model']}, averaged"),
    ]
    if origin:
        step = "" if origin["step"] is None else f", step {origin['step']:,}"
        rows.append(("began with", f"`{origin['path']}`{step}"))
    return ["## This run", "", *_table(("", ""), rows)]
