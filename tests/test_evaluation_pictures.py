"""Pictures: pixels are where they should be, read back from the files."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluation
from data import DataError


def test_grid_puts_images_row_by_row() -> None:
    images = torch.arange(5.0).reshape(5, 1, 1, 1).expand(5, 3, 2, 4) / 10
    grid = evaluation.make_grid(images, columns=2, padding=1)
    assert grid.shape == (3, 3 * 3 + 1, 2 * 5 + 1)
    assert torch.equal(grid[:, 4:6, 1:5], torch.full((3, 2, 4), 0.2))
    assert torch.equal(grid[:, 1:3, 6:10], torch.full((3, 2, 4), 0.1))
    assert (grid[:, 0] == 1).all()
    assert (grid[:, 7:9, 6:10] == 1).all()  # the empty place
    assert evaluation.make_grid(torch.rand(10, 1, 2, 2)).shape == (1, 3 * 3 + 1, 4 * 3 + 1)


def test_saved_grid_is_the_grid(tmp_path: Path) -> None:
    images = torch.tensor([-1.0, 0.0, 0.5, 2.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)
    evaluation.save_grid(tmp_path / "new" / "grid.png", images, 2, padding=0, scale=3)
    pixels = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert pixels.shape == (12, 12)
    assert (pixels[:6] == 0).all()
    assert (pixels[6:, :6] == 128).all()
    assert (pixels[6:, 6:] == 255).all()
    evaluation.save_grid(tmp_path / "c.png", torch.rand(2, 3, 4, 4))
    assert Image.open(tmp_path / "c.png").mode == "RGB"


def test_a_grid_with_texts_is_the_grid_beside_them(tmp_path: Path) -> None:
    images = torch.rand(6, 1, 8, 8)
    evaluation.save_grid(tmp_path / "plain.png", images, 2, scale=3)
    evaluation.save_grid(tmp_path / "named.png", images, 2, scale=3, rows=("first", "", "a long third"))
    plain, named = (np.asarray(Image.open(tmp_path / f"{name}.png")) for name in ("plain", "named"))
    margin = named.shape[1] - plain.shape[1]
    assert named.shape[0] == plain.shape[0] and (named[:, margin:] == plain).all()
    dark = (named[:, :margin] < 128).sum(axis=1)
    first, second, third = (dark[3 + 27 * i : 3 + 27 * (i + 1)].sum() for i in range(3))
    assert first > 0 and second == 0 and third > first


def test_gif_has_its_frames(tmp_path: Path) -> None:
    frames = [torch.full((4, 1, 3, 3), i / 4) for i in range(4)]
    evaluation.save_gif(tmp_path / "a.gif", frames, seconds=2.0)
    with Image.open(tmp_path / "a.gif") as picture:
        assert picture.n_frames == 4
        assert picture.info["loop"] == 0
        levels = []
        for i in range(4):
            picture.seek(i)
            levels.append(int(np.asarray(picture.convert("L"))[1, 1]))
    assert np.allclose(levels, [0, 64, 128, 191], atol=2)


def test_scatter_shows_points_where_they_are(tmp_path: Path) -> None:
    points = torch.rand(400, 2, generator=torch.Generator().manual_seed(0))
    evaluation.save_scatter(tmp_path / "one.png", points)
    evaluation.save_scatter(tmp_path / "two.png", torch.cat([points, torch.full((1, 2), math.nan)]), points)
    one, two = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("one", "two"))
    assert two.shape[1] > 1.8 * one.shape[1]
    # Upper half only: ink moves there.
    evaluation.save_scatter(tmp_path / "up.png", points * torch.tensor([1.0, 0.5]) + torch.tensor([0.0, 0.5]), points)
    up = np.asarray(Image.open(tmp_path / "up.png").convert("RGB")).astype(int)
    blue = (up[:, up.shape[1] // 2 :, 2] - up[:, up.shape[1] // 2 :, 0]) > 30
    rows = np.nonzero(blue)[0]
    assert rows.mean() < 0.5 * up.shape[0]


def test_lines_and_histograms_are_where_their_numbers_are(tmp_path: Path) -> None:
    """Numbers twice as high stand twice as high; a histogram's mass lies where the numbers do."""
    low, high = torch.zeros(3, 1, 20), torch.ones(3, 1, 20)
    evaluation.save_lines(tmp_path / "lines.png", high, torch.cat([low, high]))
    pixels = np.asarray(Image.open(tmp_path / "lines.png").convert("RGB")).astype(int)
    blue = pixels[:, :, 2] - pixels[:, :, 0] > 30
    left, right = np.nonzero(blue[:, : blue.shape[1] // 2])[0], np.nonzero(blue[:, blue.shape[1] // 2 :])[0]
    assert left.max() - left.min() > 0.5 * blue.shape[0]  # the data, at 0 and at 1
    assert right.max() - right.min() < 10 and abs(right.mean() - left.min()) < 10  # the samples, at 1
    evaluation.save_histogram(tmp_path / "h.png", torch.full((9, 1), 0.9), torch.linspace(0, 1, 100).reshape(100, 1))
    pixels = np.asarray(Image.open(tmp_path / "h.png").convert("RGB")).astype(int)
    orange = pixels[:, :, 0] - pixels[:, :, 2] > 100
    columns = np.nonzero(orange[pixels.shape[0] // 3 :].any(axis=0))[0]
    assert columns.max() > 0.8 * pixels.shape[1]


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda p: evaluation.save_grid(p, torch.zeros(2, 2, 3, 3)), "1 or 3 channels"),
        (lambda p: evaluation.save_grid(p, torch.zeros(0, 1, 3, 3)), "expected floating-point"),
        (lambda p: evaluation.save_grid(p, torch.zeros(2, 1, 3, 3, dtype=torch.uint8)), "uint8"),
        (lambda p: evaluation.save_grid(p, torch.full((2, 1, 3, 3), math.nan)), "NaN"),
        (lambda p: evaluation.save_grid(p, torch.zeros(2, 1, 3, 3), 0), "columns=0"),
        (lambda p: evaluation.save_grid(p, torch.zeros(2, 1, 3, 3), scale=0), "scale=0"),
        (lambda p: evaluation.save_grid(p, torch.zeros(3, 1, 3, 3), 2, rows=("one",)), "1 texts for 2 rows"),
        (lambda p: evaluation.save_grid(p.with_suffix(".xyz"), torch.zeros(2, 1, 3, 3)), "cannot be written"),
        (lambda p: evaluation.save_gif(p, []), "at least one frame"),
        (lambda p: evaluation.save_gif(p, [torch.zeros(1, 3, 3), torch.zeros(1, 3, 4)]), "one shape"),
        (lambda p: evaluation.save_scatter(p, torch.zeros(3, 1)), r"\(3, 1\)"),
        (lambda p: evaluation.save_scatter(p, torch.full((3, 2), math.nan)), "without finite"),
        (lambda p: evaluation.save_lines(p, torch.zeros(3, 2)), r"sequences \(N, C, L\)"),
        (lambda p: evaluation.save_histogram(p, torch.full((3, 1), math.nan)), "without finite"),
    ],
)
def test_bad_pictures_are_refused(tmp_path: Path, call, match: str) -> None:
    with pytest.raises(DataError, match=match):
        call(tmp_path / "x.png")
