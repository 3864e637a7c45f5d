"""One table of all systems: each trained on the digits for the same processor time, and measured alike.

    score-sde systems_table --systems vp,edm --seeds 0,1,2 --page docs/systems/index.md
    score-sde systems_table --parameters 350000 --seeds 0 --page docs/systems/index.md

A cell is a run folder below --workdir, one for each system and seed (`workflow.table_cell`). A cell that is done is not made
again, one that was interrupted goes on. After each, the table of all finished cells of the systems and seeds is put into the
page, between its marks (`<!-- systems table -->`, `<!-- end of systems table -->`; with --parameters `equal parameters` in
place of `systems table`), and their numbers as JSON beside it. Without --page the table is printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from data import DataError, digits
from evaluation import default_features
from numerics import UserError
from training import NonFiniteError
from workflow import progress
from workflow.command_line import Parser
from workflow.run_folder import RunFolder
from workflow.table_cell import Cell, cells, make
from workflow.table_page import Numbers, lines, numbers, plain, put, require_marks
from workflow.table_rows import ROWS, Row, Terms, chosen
from workflow.tools import arguments as shared


def main(arguments: list[str]) -> int:
    """Makes the cells that are missing, and the table; 1 where a cell could not be made."""
    parser = Parser(description="Train all systems for the same processor time, and tabulate them.")
    parser.add_argument(
        "--systems", default="all", help="all, or names separated by commas: " + ", ".join(r.system for r in ROWS)
    )
    parser.add_argument("--seeds", default="0,1,2", type=shared.integers(0), help="seeds separated by commas")
    parser.add_argument(
        "--seconds", default=Terms.cpu_seconds, type=float, help="processor seconds of training for each cell"
    )
    parser.add_argument("--images", default=Terms.images, type=shared.integer(2), help="test images for bits/dim")
    parser.add_argument("--samples", default=Terms.samples, type=shared.integer(10), help="samples to measure")
    parser.add_argument("--parameters", default=None, type=shared.whole_or_none, help="of every network; None: its own")
    parser.add_argument("--workdir", default=Path("runs/systems_table"), type=Path, help="folder of the cells")
    parser.add_argument(
        "--page", default=None, type=Path, help="page of Markdown with the marks; None: print the table"
    )
    parser.add_argument("--read_only", action="store_true", help="make no cell: tabulate those that are done")
    shared.add_quiet(parser)
    args = shared.parsed(parser, arguments)
    terms = Terms(cpu_seconds=args.seconds, images=args.images, samples=args.samples, parameters=args.parameters)
    RunFolder(args.workdir).require_place()
    if args.page is not None:
        require_marks(args.page, _name(terms))  # before the first cell is made
    asked = tuple(cells(chosen(args.systems), args.seeds, terms, args.workdir))
    failed = [] if args.read_only else _make(asked, args.page)
    _write(asked, args.page)
    if args.page is None:
        print("\n".join(_lines(asked)))
    return 1 if failed else 0


def _make(asked: tuple[Cell, ...], page: Path | None) -> list[Cell]:
    """Makes the cells that are not there; returns those that could not be made."""
    todo, failed = [cell for cell in asked if cell.done is None], []
    if not todo:
        return []
    torch.set_num_threads(1)
    features = default_features(digits())
    with progress.bar(total=len(asked), initial=len(asked) - len(todo), name="cells", unit="cell") as bar:
        for cell in todo:
            try:
                make(cell, features)
            except (UserError, NonFiniteError, DataError) as error:
                print(f"systems_table.py: {cell} is left out: {error}", file=sys.stderr)
                failed.append(cell)
            bar.update(1)
            _write(asked, page)
    return failed


def _found(asked: tuple[Cell, ...]) -> dict[Row, dict[int, Numbers]]:
    """The numbers of the cells that are done, in the order of `ROWS`."""
    found: dict[str, dict[int, Numbers]] = {cell.row.system: {} for cell in asked}
    for cell in asked:
        results = cell.results()
        if results is not None:
            found[cell.row.system][cell.seed] = numbers(results)
    return {row: found[row.system] for row in ROWS if row.system in found}


def _lines(asked: tuple[Cell, ...]) -> list[str]:
    return lines(_found(asked), asked[0].terms, list(dict.fromkeys(cell.seed for cell in asked)))


def _name(terms: Terms) -> str:
    """The name of the table, and of its marks."""
    return "systems table" if terms.parameters is None else "equal parameters"


def _write(asked: tuple[Cell, ...], page: Path | None) -> None:
    if page is None:
        return
    terms = asked[0].terms
    name = _name(terms)
    put(page, name, _lines(asked))
    RunFolder(page.parent).write_json(f"{name.replace(' ', '_')}.json", plain(_found(asked), terms))
