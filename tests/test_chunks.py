"""Work in chunks: folders that are named after what was asked for."""

from __future__ import annotations

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
