"""The table of all systems: its cells, what it takes from their results.json, and how that reads."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from experiments import systems_table
from numerics import UserError
from workflow import systems, table_page
from workflow.configuration import config_for
from workflow.run_folder import RunFolder
from workflow.sections import leaves
from workflow.table_cell import Cell, cells
from workflow.table_rows import ROWS, Terms, chosen, configuration, parameters, sized

TERMS = Terms(cpu_seconds=100.0, images=50, samples=60)


def estimate(value: float, stderr: float | None) -> dict:
    return {"value": value, "stderr": stderr}


def results(bits: float | None = 1.8, fd: float = 0.9, *, kind: str = "exact", unit: str = "bits/dim") -> dict:
    """What a cell's results.json holds, with numbers that can be told apart."""
    return {
        "bits_per_dim": {
            "mean": bits,
            "stderr": None if bits is None else 0.021,
            "kind": kind,
            "unit": unit,
            "reason": "",
            **({"solver_error": 0.004 * bits} if kind == "exact" and bits else {}),
        },
        "training": {"steps": 1234, "seconds": 300.0, "cpu_seconds": 100.2, "parameters": 350_000},
        "sampling": {"sampler": "DDIM()", "nfe": 1050, "seconds": 90.0, "cpu_seconds": 31.4, "samples": 60},
        "evaluation": {
            "DDIM() in clf": {
                "measures": {"FD[clf-digits-1a2b]": {"score": estimate(fd, 0.072), "floor": estimate(0.82, 0.11)}},
                "nearest": {"share": estimate(0.061, 0.014)},
            }
        },
    }


def write(folder: Path, name: str, seed: int, content: dict) -> None:
    stamp = {**TERMS.stamp, **chosen(name.split("-")[0])[0].changes}
    RunFolder(folder / f"{name}-seed{seed}").write_json("results.json", {"cell": stamp, **content})


def row_of(text: str, name: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith((f"| {name} ", f"| [{name}]")))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_cell_reads_as_it_was_measured(tmp_path: Path) -> None:
    page = tmp_path / "index.md"
    page.write_text("before\n<!-- systems table -->\nold\n<!-- end of systems table -->\nafter\n")
    write(tmp_path / "cells", "vp", 0, results(1.80, 0.90))
    second = results(1.90, 1.10)
    write(tmp_path / "cells", "vp", 2, {**second, "sampling": {**second["sampling"], "not_finite": 3}})
    write(tmp_path / "cells", "latent", 0, results(2.25, kind="bound"))
    write(tmp_path / "cells", "ddgm", 0, results(None, kind="none"))
    write(tmp_path / "cells", "edm", 0, results(70.0, kind="bound", unit="nats"))
    write(tmp_path / "cells", "ve", 0, {**results(), "cell": {**TERMS.stamp, "images": 51}})  # of other terms
    write(
        tmp_path / "cells", "ddpm", 0, {**results(), "cell": TERMS.stamp}
    )  # scored before the row had steps of its own
    asked = [
        "--images",
        "50",
        "--samples",
        "60",
        "--workdir",
        str(tmp_path / "cells"),
        "--page",
        str(page),
        "--read_only",
    ]
    assert systems_table.main([*asked, "--quiet"]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- systems table -->\n") and text.endswith(
        "<!-- end of systems table -->\nafter\n"
    )
    assert "old" not in text and "held-out digits: 0.82 ± 0.11" in text and "FD[clf-digits-1a2b]" in text
    assert row_of(text, "vp") == [
        *("vp", "1.850 ± 0.021, sd 0.071", "0.0076", "exact", "1.000 ± 0.072, sd 0.14", "6.1 ± 1.4, sd 0 %"),
        *("1,050", "31", "350,000", "1,234", "100", "2"),
    ]
    assert row_of(text, "latent")[:4] == ["[latent](latent.md)", "2.250 ± 0.021", "", "bound"]
    assert row_of(text, "ddgm")[1:4] == ["none", "", "none"] and row_of(text, "edm")[1] == "70.000 ± 0.021 nats"
    assert (
        "| ve |" not in text
        and "ve (all)" in text
        and "ddpm (all)" in text
        and "vp (1)" in text
        and "latent (1, 2)" in text
    )
    assert "- vp: 3 samples have values that are not finite" in text and "latent: 0" not in text
    stored = json.loads((tmp_path / "systems_table.json").read_text())
    assert stored["systems"]["vp"]["2"]["distance"] == {"name": "FD[clf-digits-1a2b]", "value": 1.1, "stderr": 0.072}
    assert stored["systems"]["vp"]["0"]["updates"] == 1234 and stored["cpu_seconds"] == 100.0


def test_equal_parameters_take_the_cells_that_have_them(tmp_path: Path) -> None:
    """A system's own cell where it is of that size, else the one that was made for it."""
    cell = Cell(row=chosen("vp")[0], seed=0, terms=replace(TERMS, parameters=350_000), folder=tmp_path)
    assert cell.done is None
    write(tmp_path, "vp", 0, results())
    assert cell.done == tmp_path / "vp-seed0"
    larger = results()
    larger["training"]["parameters"] = 380_000
    write(tmp_path, "vp", 0, larger)
    assert cell.done is None and replace(cell, terms=TERMS).done == tmp_path / "vp-seed0"
    write(tmp_path, "vp-350000", 0, results())
    assert cell.done == tmp_path / "vp-350000-seed0" and replace(cell, terms=TERMS).done == tmp_path / "vp-seed0"


def test_every_row_is_the_systems_own_but_for_what_all_share() -> None:
    """The trainings are equal in processor time and data; nothing else of a system is touched."""
    for row in ROWS:
        own, cell = (dict(leaves(c)) for c in (config_for(row.system), configuration(row, 3, TERMS)))
        common = {
            k
            for k in own
            if k.startswith(("training.", "likelihood.")) or k in ("seed", "threads", "baselines", *row.changes)
        }
        changed = {k for k in cell if cell[k] != own.get(k)}
        assert changed <= common and not any(k.startswith("training.objective") for k in changed)
        assert {
            k: cell[k] for k in ("training.cpu_seconds", "training.split", "likelihood.limit", "seed", "threads")
        } == {
            "training.cpu_seconds": 100.0,
            "training.split": "train",
            "likelihood.limit": 50,
            "seed": 3,
            "threads": 1,
        }
    assert {row.system for row in ROWS} | {"energy", "score_matching", "cnf", "inverse"} <= set(systems.available())


@pytest.mark.parametrize("name", ["ddgm", "latent"])
def test_networks_are_made_equal_in_parameters(name: str) -> None:
    (row,) = chosen(name)
    setup, own = sized(row, 0, replace(TERMS, parameters=350_000))
    assert not own and abs(parameters(setup) / 350_000 - 1) < 0.05
    assert setup.config["model"]["width"] != config_for(name)["model"]["width"]
    assert sized(row, 0, TERMS)[1] and sized(row, 0, replace(TERMS, parameters=parameters(setup)))[1] is False
    with pytest.raises(UserError, match="expected a number that the network reaches"):
        sized(row, 0, replace(TERMS, parameters=1000))


def test_the_first_seed_of_all_comes_first_and_an_owner_before_who_shares() -> None:
    order = [(c.row.system, c.seed) for c in cells(chosen("ddim,ddpm,vp"), (0, 1), TERMS, Path())]
    assert order == [("ddpm", 0), ("vp", 0), ("ddim", 0), ("ddpm", 1), ("vp", 1), ("ddim", 1)]


def test_a_page_without_marks_is_refused_before_a_cell_is_made(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("workflow.tools.systems_table._make", lambda asked, page: pytest.fail("cells were made"))
    page = tmp_path / "page.md"
    page.write_text("<!-- systems table -->")
    with pytest.raises(UserError, match="expected both"):
        systems_table.main(["--workdir", str(tmp_path / "cells"), "--page", str(page), "--quiet"])
    with pytest.raises(UserError, match="page.md is a file"):
        systems_table.main(["--workdir", str(page), "--quiet"])


def test_a_page_keeps_what_is_outside_the_marks_and_needs_both(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a <!-- end of t --> <!-- t -->")
    with pytest.raises(UserError, match="expected both"):
        table_page.put(page, "t", ["x"])
    assert page.read_text() == "a <!-- end of t --> <!-- t -->"
    with pytest.raises(UserError, match="cannot be read"):
        table_page.put(tmp_path / "none.md", "t", ["x"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--systems", "cnf"], "expected one of"),
        (["--seeds", "0,0"], "expected different integers"),
        (["--seeds", "one"], "expected different integers >= 0 separated by commas"),
        (["--seconds", "0"], "seconds"),
        (["--images", "1"], "images"),
        (["--parameters", "10"], "parameters"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        systems_table.main([*arguments, "--workdir", str(tmp_path), "--read_only"])
    assert not any(tmp_path.iterdir())


def test_results_that_lack_an_entry_name_it() -> None:
    for entry in ("bits_per_dim", "sampling", "evaluation"):
        odd = results()
        del odd[entry]
        with pytest.raises(UserError, match=entry):
            table_page.numbers(odd)


@pytest.mark.slow
def test_cells_are_made_once_go_on_and_share(tmp_path: Path, capsys) -> None:
    page = tmp_path / "index.md"
    page.write_text("<!-- systems table -->\n<!-- end of systems table -->\n")
    few = ["--seconds", "1", "--images", "2", "--samples", "10", "--seeds", "0", "--quiet"]
    asked = [*few, "--systems", "ddim,latent,ddpm,jem", "--workdir", str(tmp_path), "--page", str(page)]
    assert systems_table.main(asked) == 0
    found = {name: RunFolder(tmp_path / f"{name}-seed0") for name in ("ddpm", "ddim", "latent", "jem")}
    first = {name: folder.results() for name, folder in found.items()}
    assert first["ddim"]["weights"] == first["ddpm"]["weights"] != first["latent"]["weights"]
    assert first["ddim"]["sampling"]["nfe"] == 50 and first["ddpm"]["sampling"]["nfe"] == 1000
    assert first["ddim"]["bits_per_dim"] == first["ddpm"]["bits_per_dim"]
    for name in ("ddpm", "latent"):
        assert 1.0 <= first[name]["training"]["cpu_seconds"] < 3 and first[name]["bits_per_dim"]["kind"] in (
            "exact",
            "bound",
        )
    assert first["jem"]["bits_per_dim"]["kind"] == "none" and first["jem"]["sampling"]["nfe"] == 500
    assert [row_of(page.read_text(), name)[-1] for name in found] == ["1", "1", "1", "1"]
    # interrupted before the samples: the training and the bits/dim stay
    left = {k: v for k, v in first["latent"].items() if k not in ("cell", "evaluation", "sampling")}
    found["latent"].write_json("results.json", left)
    assert systems_table.main(asked) == 0
    again = {name: folder.results() for name, folder in found.items()}
    assert {k: again["latent"][k] for k in left} == left and again["ddpm"] == first["ddpm"]
    measured = [r["latent"]["evaluation"] for r in (first, again)]
    assert [next(iter(m.values()))["measures"] for m in measured][0] == next(iter(measured[1].values()))["measures"]
    # other terms would mix two experiments in one folder
    assert systems_table.main([*asked, "--samples", "11"]) == 1
    assert "give another --workdir" in capsys.readouterr().err
