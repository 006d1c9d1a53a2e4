"""Pictures of scores and of subsets: histograms, and the easiest and hardest images of each class."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lth_diet.files import write_atomically, write_json
from lth_diet.scores.fonts import drawable_names
from lth_diet.scores.summary import ScoredExamples, SubsetRule, describe_scores, describe_subset, percent

CORRECT, MISLABELED, OTHER = "#0072B2", "#D55E00", "#BBBBBB"  # distinct to color-blind readers
_BINS = 60
_MAX_COLUMNS, _MAX_CLASSES, _MAX_PIXELS = 10, 100, 64  # images per row, rows, and height or width of an image


def histogram(examples: ScoredExamples) -> Figure:
    """Histogram of all scores, with mislabeled examples in a separate color."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    _draw_histogram(axes, examples, np.arange(len(examples.labels)))
    axes.set_title(f"{examples.data.name}: scores of {len(examples.labels):,} training examples")
    return figure


def _draw_histogram(axes: Any, examples: ScoredExamples, indices: np.ndarray) -> None:
    mean, mislabeled = examples.scores.mean, examples.mislabeled
    low, high = float(mean.min()), float(mean.max())
    edges = np.linspace(low, max(high, low + 1e-3), _BINS + 1)
    if len(indices) < len(mean):
        axes.hist(mean, edges, color=OTHER, label=f"all examples ({len(mean):,})")
    groups = [("correct label", CORRECT, indices[~mislabeled[indices]])]
    if mislabeled[indices].any():
        groups.append(("mislabeled", MISLABELED, indices[mislabeled[indices]]))
    axes.hist(
        [mean[group] for _, _, group in groups],
        edges,
        stacked=True,
        color=[color for _, color, _ in groups],
        label=[f"{name} ({len(group):,})" for name, _, group in groups],
    )
    networks = len(examples.scores.el2n)
    axes.set(xlabel=f"{examples.scores.name} (mean of {networks} networks)", ylabel="Examples")
    axes.legend()


def subset_figure(examples: ScoredExamples, indices: np.ndarray) -> Figure:
    """Scores of a subset among all scores, if there are any, and its number of examples per class."""
    names, families = drawable_names(examples.class_names)
    show_names = len(names) <= 30
    has_scores = examples.scores is not None
    figure = Figure(figsize=(11 if has_scores else 6, max(4, 0.26 * len(names) if show_names else 4)), dpi=120)
    figure.set_layout_engine("constrained")
    *score_axes, class_axes = figure.subplots(1, 2 if has_scores else 1, squeeze=False)[0]
    if has_scores:
        _draw_histogram(score_axes[0], examples, indices)
    mislabeled = examples.mislabeled[indices]
    start = np.zeros(len(names))
    for group, color, name in ((~mislabeled, CORRECT, "correct label"), (mislabeled, MISLABELED, "mislabeled")):
        counts = np.bincount(examples.labels[indices[group]], minlength=len(names))
        if group.any() or name == "correct label":
            class_axes.barh(range(len(names)), counts, left=start, color=color, label=f"{name} ({group.sum():,})")
        start += counts
    class_axes.axvline(len(indices) / len(names), color="black", linestyle="--", label="class balance")
    if show_names:
        class_axes.set_yticks(range(len(names)), names, family=families)
    else:
        class_axes.set_ylabel(f"Class (0 to {len(names) - 1})")
    class_axes.invert_yaxis()
    class_axes.set_xlabel("Examples of the subset, by given label" + _describe_numbered(examples, names))
    class_axes.legend()
    title = f"{examples.data.name}: subset of {len(indices):,} of {len(examples.labels):,} training examples"
    if examples.mislabeled.any():
        in_subset, in_data = percent(mislabeled), percent(examples.mislabeled)
        title += f"\nmislabeled: {in_subset:.2f} % of the subset, {in_data:.2f} % of the data"
    figure.suptitle(title)
    return figure


def _describe_numbered(examples: ScoredExamples, names: list[str]) -> str:
    return "" if names == examples.class_names else "\n(class <label>: no font on this machine has its name)"


def contact_sheet(examples: ScoredExamples, groups: dict[str, list[np.ndarray]], title: str) -> Figure:
    """Images in one row per class, by given label; mislabeled images have a frame and the name of the true class.

    Shows the first 100 classes. Images above 64 pixels in height or width are subsampled.

    Args:
        examples: All training examples.
        groups: Groups of images, side by side: the heading of each and the indices to show, one array per class.
        title: Title of the figure.
    """
    all_names, families = drawable_names(examples.class_names)
    names = all_names[:_MAX_CLASSES]
    groups = {heading: rows[:_MAX_CLASSES] for heading, rows in groups.items()}
    stride = -(-max(examples.data.train.images.shape[1:3]) // _MAX_PIXELS)
    images = examples.data.train.images[:, ::stride, ::stride]
    mislabeled = examples.mislabeled
    height, width = images.shape[1:3]
    gap = max(1, height // 12)
    columns_of = {heading: max(1, *(len(row) for row in rows)) for heading, rows in groups.items()}
    columns = sum(columns_of.values()) + len(groups) - 1
    canvas = np.full((len(names) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    frames, headings, ranges, first = [], [], [[] for _ in names], 0
    for heading, rows in groups.items():
        headings.append(((first + columns_of[heading] / 2) * (width + gap) - gap / 2, heading))
        for row, indices in enumerate(rows):
            for column, index in enumerate(indices, first):
                top, left = row * (height + gap), column * (width + gap)
                canvas[top : top + height, left : left + width] = images[index]
                if mislabeled[index]:
                    frames.append((top, left, all_names[examples.data.train.labels[index]]))
            if examples.scores is not None and len(indices):
                values = examples.scores.mean[indices]
                ranges[row].append(f"{values.min():.3g} to {values.max():.3g}")
        first += columns_of[heading] + 1
    cell = 0.62 if len(names) <= 30 else 0.45
    size = (cell * columns * width / height + 2.6, cell * len(names) + 1)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set(
        xlim=(-0.5 - gap / 2, canvas.shape[1] - 0.5 + gap / 2), ylim=(canvas.shape[0] - 0.5 + gap / 2, -0.5 - gap / 2)
    )
    for top, left, name in frames:
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=MISLABELED, linewidth=2))
        style = {"boxstyle": "square,pad=0.1", "facecolor": MISLABELED, "linewidth": 0}
        font = {"family": families, "fontsize": 5, "color": "white"}
        axes.text(left, top + height - 1, name, **font, va="bottom", bbox=style, clip_on=True)
    centers = [row * (height + gap) + height / 2 for row in range(len(names))]
    has_images = [any(len(rows[row]) for rows in groups.values()) for row in range(len(names))]
    labels = [
        "\n".join([name, *(lines if nonempty else ["none"])])
        for name, lines, nonempty in zip(names, ranges, has_images, strict=True)
    ]
    axes.set_yticks(centers, labels, family=families)
    axes.set_xticks([center for center, _ in headings], [heading for _, heading in headings])
    axes.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    rows_show = "given label" if examples.scores is None else "given label, and scores of the images shown"
    frame = "; framed: mislabeled, with the true class" if frames else ""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(f"rows: {rows_show}{frame}{_describe_numbered(examples, all_names)}", fontsize=7)
    return figure


def _ends(examples: ScoredExamples, indices: np.ndarray, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The first `count` indices of each class, and the last `count` in reverse order."""
    rows = [examples.of_class(label, indices) for label in range(len(examples.data.class_names))]
    return [row[:count] for row in rows], [row[::-1][:count] for row in rows]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_scores_pictures(folder: Path, examples: ScoredExamples) -> dict[str, Any]:
    """Write histogram.png, easiest.png, hardest.png and summary.json to a folder; return the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = describe_scores(examples)
    easiest, hardest = _ends(examples, examples.order, _MAX_COLUMNS)
    write_atomically(folder / "histogram.png", _png(histogram(examples)))
    for name, rows in (("easiest", easiest), ("hardest", hardest)):
        title = f"{examples.data.name}: the {name} training images of each class, {name} first"
        write_atomically(folder / f"{name}.png", _png(contact_sheet(examples, {name: rows}, title)))
    write_json(folder / "summary.json", summary)
    return summary


def save_subset_pictures(
    folder: Path, examples: ScoredExamples, indices: np.ndarray, rule: SubsetRule | None
) -> dict[str, Any]:
    """Write the statistics and pictures of a subset: subset.json, subset.png and images.png.

    Args:
        folder: Folder to write to; created if it is missing.
        examples: All training examples.
        indices: Indices of the subset.
        rule: How scores select the subset; None for a random subset.

    Returns:
        The content of subset.json.
    """
    summary = describe_subset(examples, indices, rule)
    if rule:
        order = examples.order[np.isin(examples.order, indices)]
        easiest, hardest = _ends(examples, order, _MAX_COLUMNS // 2)
        groups = {"easiest of the subset": easiest, "hardest of the subset": hardest}
    else:
        groups = {"examples of the subset": _ends(examples, indices, _MAX_COLUMNS)[0]}
    shown = examples if rule else dataclasses.replace(examples, scores=None)
    title = f"{examples.data.name}: images of the subset of {len(indices):,}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "subset.json", summary)
    write_atomically(folder / "subset.png", _png(subset_figure(shown, indices)))
    write_atomically(folder / "images.png", _png(contact_sheet(shown, groups, title)))
    return summary
