"""Pictures of samples: a grid of images, a scatter of points, lines, a histogram, surfaces, plots, a moving picture. Written
with Pillow and matplotlib, which are imported when a picture is written."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from data import DataError, Rescale

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = [
    "Panel",
    "make_grid",
    "require_picture",
    "save_captioned",
    "save_gif",
    "save_grid",
    "save_histogram",
    "save_lines",
    "save_pictures",
    "save_plot",
    "save_scatter",
    "save_surfaces",
]


def shown_channels(images: Tensor) -> Tensor:
    """Of images `(n, C, H, W)` what a picture can show: the first three channels, or the first alone where there are fewer."""
    return images[:, : 3 if images.shape[1] >= 3 else 1]


def make_grid(images: Tensor, columns: int | None = None, padding: int = 1) -> Tensor:
    """One picture (C, H', W') of images (N, C, H, W) in [0, 1], row by row.

    Args:
        images: values outside [0, 1] are clamped.
        columns: of the grid; as near to a square as can be where None.
        padding: white pixels between and around.

    Raises:
        DataError: not (N, C, H, W) with 1 or 3 channels, NaN, or no images.
    """
    if images.ndim != 4 or images.shape[1] not in (1, 3) or images.numel() == 0 or not images.is_floating_point():
        raise DataError(
            f"got images of {images.dtype} {tuple(images.shape)}; expected floating-point (N, C, H, W) in [0, 1] "
            "with 1 or 3 channels"
        )
    if bool(torch.isnan(images).any()):
        raise DataError("got images with NaN; expected numbers in [0, 1]")
    columns = math.ceil(math.sqrt(len(images))) if columns is None else columns
    if columns < 1 or padding < 0:
        raise DataError(f"got columns={columns}, padding={padding}; expected at least 1 and 0")
    count, channels, height, width = images.shape
    rows = -(-count // columns)
    grid = torch.ones((channels, rows * (height + padding) + padding, columns * (width + padding) + padding))
    for i, image in enumerate(images.detach().cpu().float().clamp(0, 1)):
        top = (i // columns) * (height + padding) + padding
        left = (i % columns) * (width + padding) + padding
        grid[:, top : top + height, left : left + width] = image
    return grid


def require_picture(path: str | os.PathLike[str], *, plot: bool = False) -> None:
    """Refuses a file that a picture could not be written to, before it is made; makes nothing.

    Args:
        plot: whether matplotlib writes it (a scatter, lines, a histogram), or Pillow (images).

    Raises:
        DataError: an ending that names no format, a folder, or a place below what is no folder.
    """
    target = Path(path)
    if plot:
        from matplotlib.backend_bases import FigureCanvasBase

        endings = {f".{name}" for name in FigureCanvasBase.get_supported_filetypes()}
    else:
        from PIL import Image

        Image.init()
        endings = {ending for ending, name in Image.registered_extensions().items() if name in Image.SAVE}
    if target.suffix.lower() not in endings:
        raise DataError(
            f"got the picture {target}, whose ending names no format that can be written; expected such as .png"
        )
    above = next(folder for folder in target.absolute().parents if folder.exists())
    if target.is_dir() or not above.is_dir():
        raise DataError(f"got the picture {target}, where a file cannot be; expected a file in a folder")


def _pixels(picture: Tensor) -> np.ndarray:
    """uint8 (H, W) or (H, W, 3) of (C, H, W) in [0, 1]."""
    array = (picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return array[:, :, 0] if array.shape[2] == 1 else array


def _target(path: str | os.PathLike[str]) -> Path:
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{target.parent} cannot be made: {error.strerror or error}") from error
    return target


def _enlarged(picture: Tensor, scale: int) -> Tensor:
    if scale < 1:
        raise DataError(f"got scale={scale}; expected at least 1")
    return picture.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)


def save_grid(
    path: str | os.PathLike[str],
    images: Tensor,
    columns: int | None = None,
    *,
    padding: int = 1,
    scale: int = 1,
    rows: Sequence[str] = (),
) -> None:
    """Write `make_grid(images, columns, padding)` as a picture, every pixel `scale` times as large.

    Args:
        rows: a text to the left of each row; none unless given.

    Raises:
        DataError: as `make_grid`; another number of texts than of rows; or the file cannot be written.
    """
    from PIL import Image

    target = _target(path)
    grid = make_grid(images, columns, padding)
    there = (grid.shape[1] - padding) // (images.shape[2] + padding)
    if rows and len(rows) != there:
        raise DataError(f"got {len(rows)} texts for {there} rows; expected one for each")
    picture = Image.fromarray(_pixels(_enlarged(grid, scale)))
    if rows:
        picture = _beside_texts(picture, rows, first=padding * scale, each=(images.shape[2] + padding) * scale)
    try:
        picture.save(target)
    except (OSError, ValueError) as error:
        raise DataError(f"{target} cannot be written: {error}") from error


def _beside_texts(picture: Image.Image, texts: Sequence[str], *, first: int, each: int) -> Image.Image:
    """The picture with a margin to its left, in which text i stands in the middle of the rows of pixels from
    `first + i * each` on."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(size=min(14, max(9, each // 2)))
    widths = [font.getlength(text) for text in texts]
    margin = math.ceil(max(widths)) + 12
    whole = Image.new(picture.mode, (margin + picture.width, picture.height), "white")
    whole.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(whole)
    for i, text in enumerate(texts):
        draw.text((margin - 6, first + i * each + each // 2), text, fill="black", font=font, anchor="rm")
    return whole


def save_captioned(
    path: str | os.PathLike[str], images: Tensor, captions: Sequence[str], *, columns: int = 4, scale: int = 2
) -> None:
    """Write strips of images, each with its caption above.

    Args:
        images: `(K, S, C, H, W)` in [0, 1]: S images of each caption.
        captions: K texts.
        columns: strips side by side.
        scale: of every pixel.

    Raises:
        DataError: other shapes, another number of captions, or the file cannot be written.
    """
    from PIL import Image, ImageDraw, ImageFont

    if images.ndim != 5 or len(images) != len(captions) or len(images) == 0 or columns < 1:
        raise DataError(
            f"got images of shape {tuple(images.shape)}, {len(captions)} captions, columns={columns}; expected (K, S, C, H, W) "
            "and K captions, at least one, in at least one column"
        )
    strips = [Image.fromarray(_pixels(_enlarged(make_grid(strip, len(strip)), scale))) for strip in images]
    font, line, gap = ImageFont.load_default(size=11), 15, 8
    # a caption may be longer than its strip
    width = max(strips[0].width, *(math.ceil(font.getlength(caption)) for caption in captions)) + gap
    height, rows = strips[0].height + line + gap, -(-len(strips) // columns)
    sheet = Image.new(strips[0].mode, (min(columns, len(strips)) * width + gap, rows * height + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (strip, caption) in enumerate(zip(strips, captions, strict=True)):
        left, top = gap + (i % columns) * width, gap + (i // columns) * height
        draw.text((left, top), caption, fill="black", font=font)
        sheet.paste(strip, (left, top + line))
    target = _target(path)
    try:
        sheet.save(target)
    except (OSError, ValueError) as error:
        raise DataError(f"{target} cannot be written: {error}") from error


def save_pictures(folder: str | os.PathLike[str], images: Tensor, levels: int) -> list[Path]:
    """Write every image as a PNG of its own, `000000.png` and so on, which `data.image_folder` reads back.

    Args:
        folder: is made.
        images: integer grey values (N, C, H, W), as `Transform.to_data` gives them, with 1 to 4 channels.
        levels: up to 256 are spread over the 8 bits of a file; more are written as they are, with 16 bits.

    Raises:
        DataError: other numbers; more than 256 levels in colour, which Pillow does not write; or a file cannot be written.
    """
    from PIL import Image

    Rescale(levels=levels).check(images)
    if images.ndim != 4 or not 1 <= images.shape[1] <= 4:
        raise DataError(f"got images of shape {tuple(images.shape)}; expected (N, C, H, W) with 1 to 4 channels")
    if levels > 256 and images.shape[1] != 1:
        raise DataError(
            f"got {images.shape[1]} channels of {levels} levels; expected 1: PNG files of 16 bits are written in grey only; "
            "save the array (numpy.save)"
        )
    target = _target(Path(folder) / "000000.png").parent
    values = images.detach().cpu().numpy().transpose(0, 2, 3, 1)
    if levels <= 256:
        values = np.rint(values * (255 / (levels - 1))).astype(np.uint8)
    else:
        values = values.astype(np.uint16)
    written = []
    for i, pixels in enumerate(values):
        file = target / f"{i:06}.png"
        try:
            Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(file)
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error.strerror or error}") from error
        written.append(file)
    return written


def save_gif(
    path: str | os.PathLike[str],
    frames: Sequence[Tensor],
    *,
    columns: int | None = None,
    scale: int = 1,
    seconds: float = 4.0,
) -> None:
    """Write a moving picture that repeats.

    Args:
        path: ends in .gif.
        frames: each a picture (C, H, W), or images (N, C, H, W) that become a grid, in [0, 1]; all of one
            shape.
        columns, scale: of the grids.
        seconds: of one round; the last frame is held for a quarter of it.

    Raises:
        DataError: no frames, shapes that differ, or the file cannot be written.
    """
    from PIL import Image

    if len(frames) == 0 or any(frame.shape != frames[0].shape for frame in frames):
        shapes = sorted({tuple(frame.shape) for frame in frames})
        raise DataError(f"got frames of shapes {shapes}; expected at least one frame, all of one shape")
    if seconds <= 0:
        raise DataError(f"got seconds={seconds}; expected a positive time")
    target = _target(path)
    pictures = []
    for frame in frames:
        grid = make_grid(frame if frame.ndim == 4 else frame.unsqueeze(0), columns, 1 if frame.ndim == 4 else 0)
        pictures.append(Image.fromarray(_pixels(_enlarged(grid, scale))))
    # A GIF's clock has steps of 10 ms.
    durations = [max(20, round(750 * seconds / len(frames)))] * (len(frames) - 1) + [round(250 * seconds)]
    try:
        pictures[0].save(target, format="GIF", save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    except (OSError, ValueError) as error:
        raise DataError(f"{target} cannot be written: {error}") from error


def save_scatter(
    path: str | os.PathLike[str],
    points: Tensor,
    reference: Tensor | None = None,
    *,
    title: str | None = None,
    size: float = 2.0,
) -> None:
    """Write points (N, 2), beside a reference (M, 2) on the same axes where one is given. Of more coordinates
    the first two are shown.

    Args:
        path: the ending decides the format.
        points: finite.
        reference: data to compare with.
        title: over the points.
        size: of a dot.

    Raises:
        DataError: not (N, D) with D at least 2, no finite points, or the file cannot be written.
    """
    shown = []
    for name, cloud in _beside(points, reference, title):
        if cloud.ndim != 2 or cloud.shape[1] < 2 or len(cloud) == 0:
            raise DataError(f"got {name} of shape {tuple(cloud.shape)}; expected points (N, 2)")
        xy = cloud[:, :2].detach().cpu().double()
        shown.append((name, xy[torch.isfinite(xy).all(dim=1)]))
    frame = shown[0][1]
    if len(frame) == 0:
        raise DataError(f"got {shown[0][0]} without finite points; expected numbers")
    # The data decide the axes, so that a few samples far away do not hide the rest.
    low, high = frame.min(dim=0).values, frame.max(dim=0).values
    centre, reach = (low + high) / 2, 0.55 * float((high - low).max()) or 1.0
    figure = _figure(4 * len(shown), 4.2)
    for axes, (name, xy) in zip(np.atleast_1d(figure.subplots(1, len(shown))), shown, strict=True):
        axes.scatter(xy[:, 0].numpy(), xy[:, 1].numpy(), s=size, linewidths=0, alpha=0.6)
        axes.set(
            xlim=(float(centre[0]) - reach, float(centre[0]) + reach),
            ylim=(float(centre[1]) - reach, float(centre[1]) + reach),
            aspect="equal",
            title=name,
        )
    _write(figure, path)


_MOST_LINES = 32
_MOST_ROWS = 4


def save_lines(
    path: str | os.PathLike[str], lines: Tensor, reference: Tensor | None = None, *, title: str | None = None
) -> None:
    """Write sequences (N, C, L) as lines, beside a reference (M, C, L) on the same axes where one is given: the first 32 of
    each, and the first four channels, one under the other.

    Args:
        path: the ending decides the format.
        lines: finite.
        reference: data to compare with.
        title: over the lines.

    Raises:
        DataError: not (N, C, L), or the file cannot be written.
    """
    shown = _beside(lines, reference, title)
    for name, curves in shown:
        if curves.ndim != 3 or curves.numel() == 0:
            raise DataError(f"got {name} of shape {tuple(curves.shape)}; expected sequences (N, C, L)")
    rows = min(_MOST_ROWS, lines.shape[1])
    figure = _figure(4 * len(shown), 2 * rows + 0.6)
    grid = figure.subplots(rows, len(shown), sharex=True, sharey="row", squeeze=False)
    for column, (name, curves) in zip(grid.T, shown, strict=True):
        column[0].set_title(name)
        for axes, channel in zip(column, curves[:_MOST_LINES].detach().cpu().unbind(dim=1), strict=False):
            axes.plot(channel.T.numpy(), color="C0", linewidth=0.7, alpha=0.5)
    _write(figure, path)


def save_histogram(
    path: str | os.PathLike[str], values: Tensor, reference: Tensor | None = None, *, title: str | None = None
) -> None:
    """Write the histogram of all numbers in (N, *), over that of a reference (M, *) where one is given.

    Args:
        path: the ending decides the format.
        values, reference: those that are finite count.
        title: in the legend.

    Raises:
        DataError: no finite numbers, or the file cannot be written.
    """
    shown = []
    for name, x in _beside(values, reference, title):
        flat = x.detach().cpu().double().flatten()
        shown.append((name, flat[torch.isfinite(flat)].numpy()))
        if len(shown[-1][1]) == 0:
            raise DataError(f"got {name} without finite numbers; expected some")
    figure = _figure(5, 3.5)
    axes = figure.subplots()
    # The data decide the bins, as they do in a scatter.
    edges = np.histogram_bin_edges(shown[0][1], bins=60)
    for name, numbers in shown:
        share = np.histogram(numbers, edges)[0] / (len(numbers) * np.diff(edges))
        axes.stairs(share, edges, label=name, fill=name == "data", alpha=0.4 if name == "data" else 1.0)
    axes.set(ylabel="density")
    axes.legend()
    _write(figure, path)


def save_surfaces(
    path: str | os.PathLike[str],
    surfaces: Mapping[str, Tensor],
    half: float,
    *,
    points: Mapping[str, Tensor] | None = None,
    span: float | None = None,
    unit: str = "",
) -> None:
    """Write functions on a square grid beside each other, on one scale of colours, each under its name.

    Args:
        path: the ending decides the format.
        surfaces: `(n, n)` values at the points of [-half, half]^2, the first coordinate changing along the first axis.
        half: half the side.
        points: `(N, 2)` that are drawn over the surface of that name.
        span: how far below each surface's largest value colours reach, for log-densities; None for all values. What is beyond
            that everywhere, and has no points, is cut off.
        unit: beside the colours' scale, which counts from each surface's largest value where `span` is given; no scale
            without it.

    Raises:
        DataError: surfaces that are not `(n, n)`, none, or the file cannot be written.
    """
    if not surfaces or any(s.ndim != 2 or s.shape[0] != s.shape[1] for s in surfaces.values()):
        raise DataError(f"got surfaces {[tuple(s.shape) for s in surfaces.values()]}; expected one or more of (n, n)")
    values = {name: surface.detach().cpu().double() for name, surface in surfaces.items()}
    clouds = {name: cloud.detach().cpu().double() for name, cloud in (points or {}).items()}
    if span is not None:
        values = {name: (v - v[v.isfinite()].max()).clamp(min=-span) for name, v in values.items()}
    low = -span if span is not None else min(float(v[v.isfinite()].min()) for v in values.values())
    high = max(float(v[v.isfinite()].max()) for v in values.values())
    shown = half if span is None else _reach(values, clouds, half, above=low)
    rows = 1 if len(values) <= 4 else 2
    columns = math.ceil(len(values) / rows)
    figure = _figure(3.4 * columns + 0.6 * bool(unit), 3.6 * rows)
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(values) :]:
        axes.set_axis_off()
    image = None
    for i, (axes, (name, surface)) in enumerate(zip(grid.flat, values.items(), strict=False)):
        image = axes.imshow(
            surface.clamp(low, high).T.numpy(),
            origin="lower",
            extent=(-half, half, -half, half),
            vmin=low,
            vmax=high,
            cmap="viridis",
            interpolation="bilinear",
        )
        if name in clouds:
            xy = clouds[name].numpy()
            axes.scatter(xy[:, 0], xy[:, 1], s=1.5, linewidths=0, alpha=0.5, color="white")
        axes.set(xlim=(-shown, shown), ylim=(-shown, shown), aspect="equal")
        axes.set_title(name, fontsize=9)
        axes.tick_params(labelsize=7)
        if i + columns >= len(values):
            axes.set_xlabel("x_1", fontsize=8)
        if i % columns == 0:
            axes.set_ylabel("x_2", fontsize=8)
    if unit and image is not None:
        scale = figure.colorbar(image, ax=grid, shrink=0.8, pad=0.01)
        scale.set_label(unit if span is None else f"{unit}, from each panel's highest", fontsize=8)
        scale.ax.tick_params(labelsize=7)
    _write(figure, path)


def _reach(values: Mapping[str, Tensor], clouds: Mapping[str, Tensor], half: float, *, above: float) -> float:
    """Half the side of the square, at most `half`, that holds all points and all values above `above`, with a margin."""
    reach = 0.0
    for surface in values.values():
        seen = (surface > above) & surface.isfinite()
        axis = torch.linspace(-half, half, len(surface), dtype=torch.float64).abs()
        reach = max(reach, float(axis[seen.any(dim=0) | seen.any(dim=1)].max()))
    for cloud in clouds.values():
        reach = max([reach, *cloud[cloud.isfinite().all(dim=1)].abs().flatten().tolist()])
    return min(half, 1.1 * reach)


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One panel of `save_plot`.

    Args:
        title, x, y: over it, and along its axes.
        lines: x and y of each line, by name.
        marks: x and y of points with no line, by name.
        log: axes with a logarithmic scale: "", "x", "y" or "xy".
    """

    title: str
    x: str
    y: str
    lines: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    marks: Mapping[str, tuple[Sequence[float], Sequence[float]]] = field(default_factory=dict)
    log: str = ""


def save_plot(path: str | os.PathLike[str], panels: Sequence[Panel]) -> None:
    """Write panels of lines and marks beside each other; one name has one colour in all of them.

    Raises:
        DataError: no panels, or the file cannot be written.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if not panels:
        raise DataError("got no panels; expected at least one")
    figure = _figure(4.6 * len(panels), 3.6)
    names = dict.fromkeys(name for panel in panels for name in (*panel.lines, *panel.marks))
    colours = {name: f"C{i % 10}" for i, name in enumerate(names)}
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        for name, (x, y) in panel.lines.items():
            axes.plot(x, y, label=name, linewidth=1.2, color=colours[name])
        for name, (x, y) in panel.marks.items():
            axes.plot(x, y, "o", label=name, markersize=4, color=colours[name])
        for name, axis in (("x", axes.xaxis), ("y", axes.yaxis)):
            if name in panel.log:
                axes.set(**{f"{name}scale": "log"})
                axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
                axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
                axis.set_minor_formatter(NullFormatter())
        axes.set_title(panel.title, fontsize=10)
        axes.set_xlabel(panel.x, fontsize=8)
        axes.set_ylabel(panel.y, fontsize=8)
        axes.grid(alpha=0.25)
        axes.tick_params(labelsize=7)
        axes.legend(fontsize=7)
    _write(figure, path)


def _beside(samples: Tensor, reference: Tensor | None, title: str | None) -> list[tuple[str, Tensor]]:
    """What a picture shows, named: the data first, where they are given."""
    own = ("samples" if title is None else title, samples)
    return [own] if reference is None else [("data", reference), own]


def _figure(width: float, height: float) -> Figure:
    # A figure of its own on the Agg canvas: no global state and no display, whatever the user's backend.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Figure, path: str | os.PathLike[str]) -> None:
    target = _target(path)
    try:
        figure.savefig(target, dpi=110)
    except (OSError, ValueError) as error:
        raise DataError(f"{target} cannot be written: {error}") from error
