"""Work in chunks: folders that are named after what was asked for."""

from __future__ import annotations

import re

import pytest
import torch

from numerics import UserError
from sde_lib import TableVPSDE, linear_betas
from workflow.chunks import Chunks


def test_parts_of_another_writing_of_the_sde_are_named(tmp_path, capsys):
    """As before long tables were named shortly; what differs in anything else, or cannot be read, is no concern."""
    sde = TableVPSDE(betas=linear_betas())
    stated = {"split": "test", "seed": 0, "knots": (1.0, 2.0), "sde": repr(sde)}
    old = Chunks(tmp_path, "test", {**stated, "sde": f"TableVPSDE(betas={sde.betas})"}, 4, 2)
    Chunks(tmp_path, "test", {**stated, "sde": "other", "seed": 1}, 4, 2)
    damaged = Chunks(tmp_path, "test", {**stated, "seed": 2}, 4, 2)
    (damaged.folder / "index.json").write_text("{")
    capsys.readouterr()
    made = Chunks(tmp_path, "test", stated, 4, 2)
    (line,) = capsys.readouterr().out.splitlines()
    assert str(old.folder) in line and "made anew" in line and len(line) < 300
    assert made.folder != old.folder and not made.complete
    Chunks(tmp_path, "test", stated, 4, 2)
    assert not capsys.readouterr().out  # said once


def test_parts_of_something_else_are_named(tmp_path):
    """Whatever they lack: an array, rows, or the samples themselves; parts without ids are taken at their word."""
    chunks, ids = Chunks(tmp_path, "test", {}, 5, 3), torch.arange(10, 15)
    chunks.save(0, bits=[0.0, 1.0, 2.0], ids=ids[:3])
    chunks.save(1, bits=[3.0, 4.0], ids=ids[3:], nfe=2)
    assert [len(part["bits"]) for part in chunks.load("bits", ids=ids)] == [3, 2]
    with pytest.raises(UserError, match=re.escape(f"{chunks.file(0)}, which has no nfe, but bits, ids; expected")):
        chunks.load("bits", also=("nfe",))
    for wrong in ({"bits": [3.0, 4.0, 5.0]}, {"bits": 1.0}, {"bits": [3.0, 4.0], "ids": ids[:2]}):
        chunks.save(1, **wrong)
        with pytest.raises(
            UserError, match=re.escape(f"{chunks.file(1)}, which is not of the 2 samples that belong there")
        ):
            chunks.load("bits", ids=ids)
    chunks.save(1, bits=[3.0, 4.0])
    assert len(chunks.load("bits", ids=ids)) == 2
