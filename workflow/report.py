"""report.md: what a run did and found, to read. All of it comes from the run folder, so a resumed run's is whole."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workflow.curves import save_curves
from workflow.run_folder import REPORT, RunFolder
from workflow.setup import Setup

_EVOLUTION = 6


def write(folder: RunFolder, setup: Setup, *, keep: bool) -> None:
    """Writes report.md and curves.png from what results.json holds.

    Args:
        keep: the sections that other tools have added, which are about these weights.
    """
    results, curves = folder.results(), save_curves(folder.path)
    title = [f"# {setup.name} on {setup.dataset.name}", "", *_scores(setup, results)]
    sections = {
        "Samples": _samples(folder.path, results["sampling"]["all"]),
        "Training": _training(results, curves),
        "This run": _protocol(results),
    }
    folder.write_report(title, sections, keep=keep)


def show(folder: RunFolder, setup: Setup) -> None:
    """The same in a few lines, for the terminal."""
    results = folder.results()
    rows = _densities(setup, results)
    width = max(len(name) for name, _ in rows)
    print(f"\n{_heading(setup, results)}")
    for name, value in rows:
        print(f"  {name:<{width}}  {value}")
    print(f"  {results['bits_per_dim']['text']}")
    for s in results["sampling"]["all"].values():
        print(f"  {folder.path / s['picture']}: {s['samples']:,} samples, {s['nfe']} evaluations, {s['seconds']:.1f} s")


def end(folder: RunFolder) -> None:
    """Adds how long the session took, system's own part and all, and says so."""
    results = folder.results()
    folder.add_section("This run", _protocol(results))
    session, trained = results["seconds"], results["training"]["seconds"]
    # a run that was taken up again: its training is that of all sessions
    parts = (
        f"{trained:.0f} s of them training" if trained <= session else f"the training of all sessions {trained:.0f} s"
    )
    print(f"\n{session:.0f} s in all, {parts}; {folder.path / REPORT}")


def number(value: float | None) -> str:
    """Three decimals, or "unknown"."""
    return "unknown" if value is None or value != value else f"{value:.3f}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table, and an empty one."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return [lines[0], "|" + "---|" * len(head), *lines[1:], ""]


def _heading(setup: Setup, results: dict[str, Any]) -> str:
    split, unit = results["bits_per_dim"]["split"], results["bits_per_dim"].get("unit", "bits/dim")
    if unit != "bits/dim":
        return f"{unit} of the {split} set, per {setup.noun}"
    if setup.dataset.levels is not None:
        return f"bits/dim of the {split} set"
    return f"negative log-density of the {split} points, in bits per dimension of the data's own units"


def _densities(setup: Setup, results: dict[str, Any]) -> list[tuple[str, str]]:
    scored = results["bits_per_dim"]
    # theirs are bits/dim of grey values: beside nats of a density they would be another thing's numbers
    given = results.get("baselines", {}) if scored.get("unit", "bits/dim") == "bits/dim" else {}
    baselines = sorted(given.items(), key=lambda item: item[1])
    kind = ", a bound" if scored.get("kind") == "bound" else ""
    said = "none" if scored.get("kind") == "none" else f"{number(scored['mean'])} ± {number(scored['stderr'])}"
    return [
        (f"this run ({setup.name}{kind})", said),
        *((name, number(value)) for name, value in baselines),
    ]


def _scores(setup: Setup, results: dict[str, Any]) -> list[str]:
    scored = results["bits_per_dim"]
    parts = [
        (f"the choice of {setup.noun}s", "data_stderr"),
        ("dequantisation noise", "dequantization_stderr"),
        ("trace estimates", "probe_stderr"),
    ]
    rows = [(name, number(scored[key])) for name, key in parts if key in scored]
    if rows:
        rows.append(("**in all**, in quadrature", f"**{number(scored['stderr'])}**"))
    if "solver_error" in scored:
        rows.append(("the solver's error, a bias beside it", number(scored["solver_error"])))
    return [
        *table(("density", _heading(setup, results)), _densities(setup, results)),
        scored["text"],
        "",
        *(table(("standard error", ""), rows) if rows else []),
    ]


def _samples(folder: Path, samplers: dict[str, Any]) -> list[str]:
    lines = []
    for name, s in samplers.items():
        lines += [
            f"{s['samples']:,} by `{s['sampler']}`: {s['nfe']} evaluations, {s['seconds']:.1f} s",
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
            *table(
                [f"step {int(f.stem.removeprefix('step_')):,}" for f in shown],
                [[f"![{f.stem}]({f.relative_to(folder).as_posix()})" for f in shown]],
            ),
        ]
    return lines


def _training(results: dict[str, Any], curves: Path | None) -> list[str]:
    t = results["training"]
    lines = [
        f"{t['steps']:,} steps of {t['batch_size']} in {t['seconds'] / 60:.1f} minutes, over all sessions; "
        f"{t['parameters']:,} parameters; last loss {t['loss']:.4g}.",
        "",
    ]
    validation = results.get("validation")
    if validation:
        seen = " (they are trained on too; `--config.training.split=fit` leaves them out)" if validation["seen"] else ""
        lines += [f"Validation: {validation['images']} samples{seen}; the same noise at every step.", ""]
    return lines + ([f"![curves]({curves.name})", ""] if curves is not None else [])


def _protocol(results: dict[str, Any]) -> list[str]:
    environment = results["environment"]
    origin = results.get("init_from")
    rows = [
        *(("command", f"`{command}`") for command in results.get("commands", [])),
        ("seed", str(results["seed"])),
        ("versions", f"python {environment['python']}, torch {environment['torch']}, toolkit {environment['toolkit']}"),
        ("device", f"{environment['device']}, {environment['threads']} threads"),
        *_minutes(results),
        ("weights", f"{results['weights']}, averaged"),
    ]
    rows += [("data", note) for note in results.get("data", {}).get("notes", [])]
    if origin:
        step = "" if origin["step"] is None else f", step {origin['step']:,}"
        rows.append(("began with", f"`{origin['path']}`{step}"))
    return table(("", ""), rows)


def _minutes(results: dict[str, Any]) -> list[tuple[str, str]]:
    if "seconds" not in results:  # the system's own part is under way
        return []
    cpu = results.get("cpu_seconds")
    of_processor = "" if cpu is None else f"; {cpu / 60:.1f} of processor time"
    return [("minutes", f"{results['seconds'] / 60:.1f} in all in the last session{of_processor}")]
