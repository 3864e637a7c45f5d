"""What a run leaves behind, and the one writer of it.

    config.json                     the configuration, with the system's name
    checkpoints/step_XXXXXXXX.pt    with manifests, readable with torch.load(weights_only=True)
    samples/*.png                   pictures
    events.*, metrics.jsonl         what happened
    nll/SPLIT-.../                  values per image
    results.json                    bits_per_dim, training, sampling, and what tools have added
    report.md, curves.png           the same to read

Every file is written whole to a temporary one, which is then renamed: who reads it finds the old or the new, never a part.
results.json is changed entry by entry, and report.md section by section: a section replaces the one of its heading.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numerics import UserError
from training import CheckpointFolder
from training.checkpoint import write_atomically

CONFIG, RESULTS, REPORT, CARD = "config.json", "results.json", "report.md", "card.json"
_OLD_MARK = "\n<!-- below: added by other tools -->\n"


class RunFolder:
    """A run's folder, or one that is to become it.

    Args:
        path: the folder; it need not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def __str__(self) -> str:
        return str(self.path)

    # -- what is there ------------------------------------------------------------------------------------------------

    @property
    def has_checkpoint(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return CheckpointFolder(self.path / "checkpoints").exists()

    @property
    def has_work(self) -> bool:
        """Whether there is anything to lose: a checkpoint, or results of a training."""
        return self.has_checkpoint or "training" in self.results()

    @property
    def free_bytes(self) -> int:
        """What the disk has left where the folder is, or would be."""
        return shutil.disk_usage(self._there).free

    @property
    def _there(self) -> Path:
        """The folder, or the nearest above it that exists."""
        there = self.path.absolute()
        while not there.exists():
            there = there.parent
        return there

    def require_place(self) -> None:
        """Refuses a place where no folder can be, before what takes long; makes nothing.

        Raises:
            UserError: a file, or below one.
        """
        if not self._there.is_dir():
            raise UserError(
                f"got the folder {self.path}, and {self._there} is a file; expected a folder, there or to be made"
            )

    def results(self) -> dict[str, Any]:
        """What results.json holds; nothing where there is none.

        Raises:
            UserError: a file that holds no results.
        """
        file = self.path / RESULTS
        return read_json(file) if file.exists() else {}

    # -- writing ------------------------------------------------------------------------------------------------------

    def update_results(self, new: Mapping[str, Any]) -> dict[str, Any]:
        """Puts the entries `new` into results.json, others stay; returns the whole."""
        results = {**self.results(), **finite(dict(new))}
        self.write_json(RESULTS, results)
        return results

    def write_json(self, name: str, value: Any) -> Path:
        """Writes a JSON file of that name; numbers that are not finite become null."""
        return self.write_text(name, json.dumps(finite(value), indent=1) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Writes a text file of that name."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, text.encode())
        return file

    def write_report(self, title: Sequence[str], sections: Mapping[str, Sequence[str]], *, keep: bool) -> None:
        """Begins report.md anew: the lines of the title, and sections by heading.

        Args:
            keep: keep the sections of other headings that are there, after these.
        """
        others = self._sections() if keep else {}
        found = {**sections, **{h: lines for h, lines in others.items() if h not in sections}}
        self._write_sections(title, found)

    def add_section(self, heading: str, lines: Sequence[str]) -> None:
        """Puts a section into report.md, in the place of the one with that heading, or at the end."""
        title = self._title()
        self._write_sections(title, {**self._sections(), heading: lines})

    def _text(self) -> str:
        file = self.path / REPORT
        return file.read_text(encoding="utf-8").replace(_OLD_MARK, "\n") if file.is_file() else ""

    def _title(self) -> list[str]:
        return re.split(r"(?m)^(?=## )", self._text())[0].rstrip("\n").split("\n")

    def _sections(self) -> dict[str, list[str]]:
        found = {}
        for part in re.split(r"(?m)^(?=## )", self._text()):
            heading, _, body = part.partition("\n")
            if heading.startswith("## "):
                found[heading.removeprefix("## ")] = body.strip("\n").split("\n")
        return found

    def _write_sections(self, title: Sequence[str], sections: Mapping[str, Sequence[str]]) -> None:
        parts = ["\n".join(title).strip("\n")] if any(title) else []
        parts += [f"## {heading}\n\n" + "\n".join(lines).strip("\n") for heading, lines in sections.items()]
        self.write_text(REPORT, "\n\n".join(parts) + "\n")


def write_once(file: Path, text: str) -> None:
    """Writes `file` unless it is there: of several processes the first one's text holds."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    write_atomically(temporary, text.encode())
    try:
        os.link(temporary, file)  # fails where another process was first
    except FileExistsError:
        pass
    except OSError:  # a file system without links
        with contextlib.suppress(FileExistsError), file.open("x", encoding="utf-8") as written:
            written.write(text)
    finally:
        temporary.unlink()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        UserError: it is not there, or holds something else.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"got {file}, which does not exist; expected a file that an experiment wrote") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"got {file}, which is not JSON ({error}); expected a file that an experiment wrote") from error
    if not isinstance(value, dict):
        raise UserError(f"got {file}, which holds a {type(value).__name__}; expected a file that an experiment wrote")
    return value


def finite(value: Any) -> Any:
    """`value` with None for numbers that are not finite, which JSON does not have."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
