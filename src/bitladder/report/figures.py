"""The main plots as static files for papers: `write_figures(report, directory)`, SVG and PNG."""

import importlib.util
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bitladder.errors import OutputError, RecordError
from bitladder.records import BF16
from bitladder.report.plots import plot_data
from bitladder.report.types import Report
from bitladder.storage import atomic_write

_STYLE: dict[Any, Any] = {
    "svg.hashsalt": "bitladder",  # else every file has other ids
    "text.parse_math": False,  # a name with two dollars is a name
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.constrained_layout.use": True,
}
_COLUMN_INCHES = 6.0  # a page's width in most papers
_DOTS_PER_INCH = 200
_SCHEMES, _CONTROLS = "#0072B2", "#D55E00"  # Okabe and Ito's palette for the colour-blind
_MIB = 1 << 20


def check_figures() -> None:
    """Check that figures can be drawn.

    Raises:
        OutputError: matplotlib isn't installed, which nothing else needs.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise OutputError("figures need matplotlib: pip install 'bitladder[figures]'; report.html has the plots anyway")


def write_figures(report: Report, directory: Path) -> tuple[Path, ...]:
    """Write frontier, heat map and predicted-against-measured as `<name>.svg` and `<name>.png`; return their paths.

    What wasn't measured has no figure.

    Raises:
        RecordError: nothing can be drawn. OutputError: no space, no permission, no matplotlib.
    """
    check_figures()
    import matplotlib
    from matplotlib.figure import Figure

    draw: dict[str, Callable[[Report, Any], bool]] = {
        "frontier": _frontier,
        "sensitivity": _sensitivity,
        "predicted": _predicted,
    }
    written = []
    directory.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(_STYLE):
        for name, function in draw.items():
            figure = Figure(figsize=(_COLUMN_INCHES, _COLUMN_INCHES * 0.6))
            if function(report, figure.subplots()):
                written += list(_saved(figure, directory / name))
    if not written:
        raise RecordError("the report holds no group with a sensitivity and no evaluation: there is nothing to draw")
    return tuple(written)


def _saved(figure: Any, stem: Path) -> Iterator[Path]:
    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        content = io.BytesIO()
        figure.savefig(content, format=suffix[1:], dpi=_DOTS_PER_INCH, metadata=metadata)
        path = stem.with_suffix(suffix)
        atomic_write(path, content.getvalue())
        yield path


def _frontier(report: Report, axes: Any) -> bool:
    """Draw held-out KL on the first set against the bytes of the searched weights."""
    if not report.splits:
        return False
    data, split = plot_data(report), report.splits[0]
    for entries, label, style in (
        (data["arms"], "control arms", {"fmt": "x", "color": _CONTROLS}),
        (data["schemes"], "schemes", {"fmt": "o:", "color": _SCHEMES}),
    ):
        shown = [entry for entry in entries if split in entry["kl"]]
        if shown:
            kls = [entry["kl"][split] for entry in shown]
            sizes = [entry["bytes"] / _MIB for entry in shown]
            axes.errorbar(sizes, [kl for kl, _ in kls], [2 * (se or 0.0) for _, se in kls], label=label, **style)
    if data["floors"][split]:
        axes.axhline(data["floors"][split], color="grey", linestyle=":", label="noise floor (BF16)")
    axes.set(yscale="log", xlabel="searched weights, MiB", ylabel="held-out KL, nats per token")
    axes.legend(frameon=False)
    return True


def _sensitivity(report: Report, axes: Any) -> bool:
    """Draw the sensitivity of every group in the first format; dots: quantised in the middle scheme of the ladder."""
    import numpy as np

    groups = [group for group in plot_data(report)["groups"] if group["layer"] is not None]
    if not groups:
        return False
    kinds = list(dict.fromkeys(group["kind"] for group in groups))
    layers = sorted({group["layer"] for group in groups})
    scheme = report.schemes[(len(report.schemes) - 1) // 2].name
    values = np.full((len(kinds), len(layers)), np.nan)
    marks = []
    for group in groups:
        place = kinds.index(group["kind"]), layers.index(group["layer"])
        score = group["scores"].get(report.formats[0], {"score": 0})["score"]
        values[place] = np.log10(score) if score > 0 else np.nan
        if group["formats"][scheme] != BF16:
            marks.append(place)
    image = axes.imshow(values, cmap="cividis", aspect="auto")
    axes.scatter([x for _, x in marks], [y for y, _ in marks], s=8, color="white", edgecolor="black", linewidth=0.5)
    axes.set(xlabel="layer", yticks=range(len(kinds)), yticklabels=kinds, title=f"dots: quantised in {scheme}")
    step = max(1, len(layers) // 10)
    axes.set(xticks=range(0, len(layers), step), xticklabels=layers[::step])
    axes.figure.colorbar(image, label=f"log₁₀ sensitivity, {report.score_unit}")
    return True


def _predicted(report: Report, axes: Any) -> bool:
    """Draw the KL that all the other points predict against the measured one."""
    points = [point for point in report.prediction.points if point.predicted] if report.prediction else []
    if not points:
        return False
    for control, label, colour in ((True, "control arms", _CONTROLS), (False, "schemes", _SCHEMES)):
        shown = [point for point in points if point.is_control == control]
        predicted = [point.predicted or 0.0 for point in shown]
        reach = [
            [value - (point.low or value) for point, value in zip(shown, predicted, strict=True)],
            [(point.high or value) - value for point, value in zip(shown, predicted, strict=True)],
        ]
        measured = [point.measured for point in shown]
        axes.errorbar(predicted, measured, xerr=reach, fmt="x" if control else "o", color=colour, label=label)
    ends = [min(point.measured for point in points), max(point.measured for point in points)]
    axes.plot(ends, ends, color="grey", linestyle=":")
    axes.set(xscale="log", yscale="log")
    axes.set(xlabel="predicted KL, nats per token", ylabel="measured KL, nats per token")
    axes.legend(frameon=False)
    return True
