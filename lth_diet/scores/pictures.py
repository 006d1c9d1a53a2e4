"""Pictures of training examples by score, and of the subset that pre-training sees."""

import dataclasses
import io
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from lth_diet.files import write_atomically, write_json
from lth_diet.scores.summary import ScoredExamples, SubsetRule, describe_scores, describe_subset, percent

RIGHT, WRONG, REST = "#0072B2", "#D55E00", "#BBBBBB"  # apart for the colour-blind
_BINS = 60
_COLUMNS, _ROWS, _PIXELS = 10, 100, 64  # of a contact sheet: images a row, classes, pixels of an image either way


def histogram(examples: ScoredExamples) -> Figure:
    """Scores of all examples, those with wrong labels in another colour."""
    figure = Figure(figsize=(7, 4), layout="constrained", dpi=120)
    axes = figure.subplots()
    _histogram(axes, examples, np.arange(len(examples.labels)))
    axes.set_title(f"{examples.data.name}: scores of {len(examples.labels):,} training examples")
    return figure


def _histogram(axes: Any, examples: ScoredExamples, indices: np.ndarray) -> None:
    mean, wrong = examples.scores.mean, examples.wrong
    low, high = float(mean.min()), float(mean.max())
    edges = np.linspace(low, max(high, low + 1e-3), _BINS + 1)
    if len(indices) < len(mean):
        axes.hist(mean, edges, color=REST, label=f"all examples ({len(mean):,})")
    parts = {"true label": indices[~wrong[indices]], "wrong label": indices[wrong[indices]]}
    parts = {name: part for name, part in parts.items() if len(part) or name == "true label"}
    axes.hist(
        [mean[part] for part in parts.values()],
        edges,
        stacked=True,
        color=[RIGHT, WRONG][: len(parts)],
        label=[f"{name} ({len(part):,})" for name, part in parts.items()],
    )
    networks = len(examples.scores.el2n)
    axes.set(xlabel=f"{examples.scores.name} (mean of {networks} networks)", ylabel="Examples")
    axes.legend()


def subset_figure(examples: ScoredExamples, indices: np.ndarray) -> Figure:
    """Where a subset lies among the scores, if there are any, and its classes."""
    names = examples.class_names
    named = len(names) <= 30
    scored = examples.scores is not None
    figure = Figure(figsize=(11 if scored else 6, max(4, 0.26 * len(names) if named else 4)), dpi=120)
    figure.set_layout_engine("constrained")
    *left, right = figure.subplots(1, 2 if scored else 1, squeeze=False)[0]
    if scored:
        _histogram(left[0], examples, indices)
    wrong = examples.wrong[indices]
    start = np.zeros(len(names))
    for part, colour, label in ((~wrong, RIGHT, "true label"), (wrong, WRONG, "wrong label")):
        counts = np.bincount(examples.labels[indices[part]], minlength=len(names))
        if part.any() or label == "true label":
            right.barh(range(len(names)), counts, left=start, color=colour, label=f"{label} ({part.sum():,})")
        start += counts
    right.axvline(len(indices) / len(names), color="black", linestyle="--", label="equal share")
    right.set_yticks(range(len(names)), names) if named else right.set_ylabel(f"Class (0 to {len(names) - 1})")
    right.invert_yaxis()
    right.set_xlabel("Examples of the subset, by the label given")
    right.legend()
    title = f"{examples.data.name}: subset of {len(indices):,} of {len(examples.labels):,} training examples"
    if examples.wrong.any():
        share, of_all = percent(wrong), percent(examples.wrong)
        title += f"\nwrong labels: {share:.2f} % of the subset, {of_all:.2f} % of the data"
    figure.suptitle(title)
    return figure


def contact_sheet(examples: ScoredExamples, groups: dict[str, list[np.ndarray]], title: str) -> Figure:
    """Images by class: a row a class, named by the label given; a wrong label is framed, with the true class on it.

    At most the first hundred classes, and at most 64 pixels of an image either way: large images are thinned out.

    Args:
        examples: All of them.
        groups: Heading to the positions of images to show side by side, a list a class; as many at most of each
            class as of the others.
        title: Of the figure.
    """
    names = examples.class_names[:_ROWS]
    groups = {heading: rows[:_ROWS] for heading, rows in groups.items()}
    coarser = -(-max(examples.data.train.images.shape[1:3]) // _PIXELS)
    images = examples.data.train.images[:, ::coarser, ::coarser]
    height, width = images.shape[1:3]
    gap = max(1, height // 12)
    widest = {heading: max(1, *(len(row) for row in rows)) for heading, rows in groups.items()}
    columns = sum(widest.values()) + len(groups) - 1
    canvas = np.full((len(names) * (height + gap) - gap, columns * (width + gap) - gap, 3), 255, np.uint8)
    frames, headings, ranges, first = [], [], [[] for _ in names], 0
    for heading, rows in groups.items():
        headings.append(((first + widest[heading] / 2) * (width + gap) - gap / 2, heading))
        for row, positions in enumerate(rows):
            for column, position in enumerate(positions, first):
                top, left = row * (height + gap), column * (width + gap)
                canvas[top : top + height, left : left + width] = images[position]
                if examples.wrong[position]:
                    true = examples.data.train.labels[position]
                    frames.append((top, left, examples.class_names[true]))
            if examples.scores is not None and len(positions):
                values = examples.scores.mean[positions]
                ranges[row].append(f"{values.min():.3g} to {values.max():.3g}")
        first += widest[heading] + 1
    cell = 0.62 if len(names) <= 30 else 0.45
    size = (cell * columns * width / height + 2.6, cell * len(names) + 1)
    figure = Figure(figsize=size, layout="constrained", dpi=120)
    axes = figure.subplots()
    axes.imshow(canvas, interpolation="nearest")
    axes.set(
        xlim=(-0.5 - gap / 2, canvas.shape[1] - 0.5 + gap / 2), ylim=(canvas.shape[0] - 0.5 + gap / 2, -0.5 - gap / 2)
    )
    for top, left, name in frames:
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), width, height, fill=False, edgecolor=WRONG, linewidth=2))
        style = {"boxstyle": "square,pad=0.1", "facecolor": WRONG, "linewidth": 0}
        axes.text(left, top + height - 1, name, fontsize=5, color="white", va="bottom", bbox=style, clip_on=True)
    middles = [row * (height + gap) + height / 2 for row in range(len(names))]
    shown = [any(len(rows[row]) for rows in groups.values()) for row in range(len(names))]
    labels = [
        "\n".join([name, *(texts if any_shown else ["none"])])
        for name, texts, any_shown in zip(names, ranges, shown, strict=True)
    ]
    axes.set_yticks(middles, labels)
    axes.set_xticks([place for place, _ in headings], [heading for _, heading in headings])
    axes.tick_params(length=0, labelsize=7, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    below = "label given, and scores of the images shown" if examples.scores is not None else "label given"
    frame = "; framed: a wrong label, with the true class" if frames else ""
    axes.set_title(title, fontsize=9)
    axes.set_xlabel(f"rows: {below}{frame}", fontsize=7)
    return figure


def _ends(examples: ScoredExamples, order: np.ndarray, count: int) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Of each class the first `count` of an order, and the last, the last one first."""
    rows = [examples.of_class(label, order) for label in range(len(examples.data.class_names))]
    return [row[:count] for row in rows], [row[::-1][:count] for row in rows]


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def save_scores_pictures(folder: Path, examples: ScoredExamples) -> dict[str, Any]:
    """Write summary.json, histogram.png, easiest.png and hardest.png; returns the summary."""
    folder.mkdir(parents=True, exist_ok=True)
    summary = describe_scores(examples)
    easiest, hardest = _ends(examples, examples.order, _COLUMNS)
    write_atomically(folder / "histogram.png", _png(histogram(examples)))
    for name, rows in (("easiest", easiest), ("hardest", hardest)):
        title = f"{examples.data.name}: the {name} training images of each class, {name} first"
        write_atomically(folder / f"{name}.png", _png(contact_sheet(examples, {name: rows}, title)))
    write_json(folder / "summary.json", summary)
    return summary


def save_subset_pictures(
    folder: Path, examples: ScoredExamples, indices: np.ndarray, choose: SubsetRule | None
) -> dict[str, Any]:
    """Write subset.json, subset.png and images.png; returns the first.

    Args:
        folder: Where to.
        examples: All of them.
        indices: The subset.
        choose: As for `describe_subset`.
    """
    summary = describe_subset(examples, indices, choose)
    if choose:
        order = examples.order[np.isin(examples.order, indices)]
        easiest, hardest = _ends(examples, order, _COLUMNS // 2)
        groups = {"easiest of the subset": easiest, "hardest of the subset": hardest}
    else:
        groups = {"some of the subset": _ends(examples, indices, _COLUMNS)[0]}
    shown = examples if choose else dataclasses.replace(examples, scores=None)
    title = f"{examples.data.name}: images of the subset of {len(indices):,}"
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "subset.json", summary)
    write_atomically(folder / "subset.png", _png(subset_figure(shown, indices)))
    write_atomically(folder / "images.png", _png(contact_sheet(shown, groups, title)))
    return summary
