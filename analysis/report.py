"""Writes a self-contained HTML report: verdicts, figures, tables, configurations and incomplete replicates.

python -m analysis.report --tracking-uri sqlite:///mlflow.db --experiment digits -o report.html
python -m analysis.report --published -o published.html

A running sweep can be reported too. Images are embedded, and the page's content security policy blocks all requests.
"""

import argparse
import base64
import dataclasses
import hashlib
import io
import json
import math
import os
import re
import shlex
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
import pandas as pd
import yaml
from matplotlib.figure import Figure
from mlflow import MlflowClient
from mlflow.entities import Run

from lth_diet.config.run_ids import DEFAULTS
from lth_diet.data import subsets
from lth_diet.errors import Parser, UserError
from lth_diet.files import write_atomically
from lth_diet.launch import results
from lth_diet.program import run_program
from lth_diet.runs import environment, run_directory
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.tracking.mlflow_store import failure_reason
from lth_diet.tracking.mlflow_store import tracking_uri as default_tracking_uri

from . import arms, claims, collect, dominance, figures, identities, instability, matching, paper
from .arms import Arm, Curve, Results
from .claims import Claim, Finding
from .figures import Panel

_MAX_MATRIX_ARMS = 10  # a larger matrix does not fit on a phone
_MAX_VERDICT_ARMS = 6  # with more arms in a family, only the claims of the paper and matching arms get a verdict each
_MAX_PICTURE_BYTES = 2_000_000
_MAX_FILE_NAME = 60  # characters, of up to four bytes each
_EXAMPLES = {
    "subset.png": "scores and classes of the subset",
    "images.png": "images of the subset",
    "examples/histogram.png": "EL2N scores",
    "examples/easiest.png": "the easiest examples by EL2N score",
    "examples/hardest.png": "the hardest examples by EL2N score",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """A report that was written.

    Args:
        path: The HTML file.
        verdicts: The headline of each family and one line per claim, as at the top of the page, then remarks.
        findings: The tested claims.
    """

    path: Path
    verdicts: list[str]
    findings: list[Finding]


@dataclasses.dataclass(frozen=True)
class Picture:
    """An image as a data URI, with its caption."""

    source: str
    caption: str


def write(
    tracking_uri: str,
    experiment: str | None,
    output: Path,
    *settings: Any,
    dataset: str | None = None,
    model: str | None = None,
) -> Report:
    """Writes the report of an experiment.

    Args:
        tracking_uri: URI of the MLflow store.
        experiment: Name of the experiment; None for all experiments of the store.
        output: The HTML file to write.
        settings: Margin, range of levels and confidence, as in `claims.evaluate`.
        dataset: Only this data set; None for all.
        model: Only this model; None for all.

    Raises:
        UserError: If there is nothing to report, or the file cannot be written.
    """
    frame = collect.select(collect.collect(tracking_uri, experiment), dataset, model)
    client, experiments = collect.open_store(tracking_uri, experiment)
    run_ids = set(frame.run_id)
    parents = collect.search_runs(client, experiments, "tags.phase = 'all'")
    parents = [run for run in parents if run.data.tags.get("run_id") in run_ids]
    pretrained: dict[str, Run] = {}  # of one replicate per run
    for run in collect.search_runs(client, experiments, "tags.phase = 'pretrain'"):
        pretrained.setdefault(run.data.tags.get("run_id", run.info.run_id), run)
    scored = collect.search_runs(client, experiments, "tags.phase = 'scores'")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    frame.attrs["analyses"] = instability.collect_analyses(client, experiments)
    option = f" --experiment {shlex.quote(experiment)}" if experiment else ""
    frame.attrs["remarks"] = [
        *_mixtures(client, experiments, run_ids),
        *_imbalances(client, {run_id: run for run_id, run in pretrained.items() if run_id in run_ids}),
    ]
    about = {
        "title": f"Lottery tickets on a data diet: {experiment or 'all experiments'}",
        "examples": _examples(client, [*scored, *pretrained.values()]),
        "versions": _versions(parents),
        "runs": _runs(parents),
        "commands": [
            f"python -m analysis.report{option} -o report.html",
            f"python -m analysis.collect{option} -o results.csv",
            "python -m analysis.dominance results.csv --challenger ARM --reference ARM",
            "python -m analysis.figures results.csv --published -o figures",
        ],
    }
    return _write(frame, output, about, *settings)


def write_run_reports(runs: Sequence[run_directory.RunDirectory], command: str, ranks: int) -> None:
    """Writes one report for each experiment of some runs, next to their directories, and prints verdicts and paths.

    Below the verdicts it prints the command that would decide more of the claims, and about how long it takes. An
    error is printed but not raised: training has finished, and the report can be written later.

    Args:
        runs: The runs of a launch.
        command: The command of the launch, without a number of replicates.
        ranks: Number of ranks of the launch.
    """
    noises = {run.config.label_noise for run in runs if run.config.arm != "init"}
    for folder, experiment in dict.fromkeys((run.path.parent, read_config(run.path)["experiment"]) for run in runs):
        if report := _write_run_report(folder, experiment):
            print("\n".join(report.verdicts))
            mine = [finding for finding in report.findings if finding.family.label_noise in noises]
            if found := claims.affordable_replicates(mine):
                print(f"  {describe_more(runs, *found, command, ranks)}")
            print(f"report: {report.path.resolve()}", flush=True)


def update_run_reports(analyses: Sequence[InstabilityDirectory]) -> None:
    """Writes the reports of the experiments of instability analyses again, if they exist, and prints their paths."""
    for folder, experiment in dict.fromkeys(
        (each.path.parents[1], read_config(each.path)["experiment"]) for each in analyses
    ):
        path = folder / file_name(experiment)
        if path.exists() and _write_run_report(folder, experiment):
            print(f"report: {path.resolve()}", flush=True)


def _write_run_report(folder: Path, experiment: str) -> Report | None:
    try:
        return write(default_tracking_uri(), experiment, folder / file_name(experiment))
    except Exception as error:  # from MLflow, SQLAlchemy, requests or the file system
        print(f"no report: {error if isinstance(error, UserError) else failure_reason(error)}")
        return None


def describe_more(runs: Sequence[run_directory.RunDirectory], number: int, count: int, command: str, ranks: int) -> str:
    """Says how many replicates would decide some undecided claims, in about how many minutes, and by which command."""
    stack = math.lcm(*(run.config.stack for run in runs))
    number = math.ceil(number / stack) * stack
    more = [max(0, number - len(run.replicates())) * results.seconds_per_replicate(run) for run in runs]
    minutes = math.ceil(sum(more) / ranks / 60)
    would = f"{count} undecided claim{'s' * (count > 1)} if the differences stay as they are"
    return f"replicates={number} would decide {would}, in about {minutes} min: {command} replicates={number}"


def file_name(experiment: str) -> str:
    """Name of the report of an experiment; two experiments never have the same."""
    name = re.sub(r"[^\w.-]", "_", experiment)[:_MAX_FILE_NAME]
    if name != experiment:
        name += "-" + hashlib.sha256(experiment.encode(errors="surrogateescape")).hexdigest()[:8]
    return f"{name}.html"


def write_published(output: Path, *settings: Any) -> Report:
    """Writes the report of the published curves; see `write` for arguments and errors."""
    about = {
        "title": "Lottery tickets on a data diet: the published curves",
        "examples": [],
        "versions": [("source", "arXiv 2206.01278, digitized: analysis/reference/README.md")],
        "runs": [],
        "commands": ["python -m analysis.report --published -o published.html"],
    }
    return _write(collect.published(), output, about, *settings)


def _write(
    frame: pd.DataFrame,
    output: Path,
    about: dict[str, Any],
    margin: float | None = None,
    levels: tuple[int, int] | None = None,
    confidence: float = dominance.CONFIDENCE,
) -> Report:
    results = collect.results_by_dataset(frame)
    settings = margin, levels, confidence
    families = paper.families_of_all(results)
    findings = [finding for family, curves in families for finding in claims.evaluate(family, curves, *settings)]
    matches = matching.match_all(results, *settings)
    findings += _other_arms(findings, matches)
    about_matching = [f"{matching.describe(match)}." for match in matches]
    about_dense = [_describe_dense(family, curves, *settings) for family, curves in families]
    published = {} if "mean" in frame else collect.results_by_dataset(collect.published())
    remarks = [*frame.attrs.get("left_out", ()), *frame.attrs.get("remarks", ()), *paper.describe_settings_of(results)]
    remarks += figures.describe_unpublished(results) if published else []
    page = _template().render(
        **about,
        summary=_summary(frame, findings),
        remarks=remarks,
        answers=_answers(families, findings),
        findings=[finding for finding in findings if finding.comparison],
        untested=[finding for finding in findings if not finding.comparison],
        stability=_stability(frame.attrs.get("analyses", []), results, matches),
        matching=about_matching,
        dense=about_dense,
        ranges=[(str(family), *family.test_range(margin, levels)) for family, _ in families],
        confidence=confidence,
        assumptions=dominance.ASSUMPTIONS,
        incomplete=collect.describe_incomplete(frame),
        figures=_figures(results, published, matches),
        matrices=[
            {
                "title": paper.title(name, setup),
                "cells": dominance.matrix(mine, *paper.test_range(name, mine, None, margin, levels), confidence),
            }
            for name, curves in results.items()
            for setup, mine in arms.by_setup(curves).items()
            if 1 < len(mine) <= _MAX_MATRIX_ARMS
        ],
        tables=[
            {"title": f"{paper.NAMES.get(name, name)}: {arm}", "rows": list(curve.summary.itertuples())}
            for name, curves in results.items()
            for arm, curve in curves.items()
        ],
        deviations=_deviations(results, published, *settings),
        pairs=_pairs,
        interval=dominance.interval,
        symbols=dominance.SYMBOLS,
    )
    collect.write(output, lambda path: write_atomically(path.resolve(), page))
    verdicts = [line for family, _ in families for line in claims.summarize(family, findings)]
    nothing = "no verdict: these results have no arm with pre-training"
    return Report(output, [*(verdicts or [nothing]), *(f"note: {remark}" for remark in remarks)], findings)


def _template() -> jinja2.Template:
    folder = jinja2.FileSystemLoader(Path(__file__).parent)
    # names come from MLflow, where anyone may have written them, so all of them are escaped
    return jinja2.Environment(loader=folder, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html"
    )


def _pairs(statements: dict[str, dominance.Statement]) -> list[tuple]:
    own, pooled = (statements[name].levels.itertuples() for name in ("per_level", "pooled"))
    return list(zip(own, pooled, strict=True))


def _summary(frame: pd.DataFrame, findings: list[Finding]) -> str:
    outcomes = [finding.outcome for finding in findings]
    order = ("holds", "contradicted", "undecided", "not tested")
    counts = ", ".join(f"{outcomes.count(name)} {name}" for name in order if name in outcomes) or "none"
    if "mean" in frame:
        size = f"{frame.groupby(list(collect.SUMMARY)[:6], dropna=False).ngroups} arms"
    else:
        runs = frame.groupby(["run_id", "seed", "replicate"], dropna=False).ngroups
        size = f"{runs} replicates, {len(frame)} levels"
    pairs = sorted(set(zip(collect.dataset_names(frame), frame.model, strict=True)))
    names = ", ".join(f"{paper.NAMES.get(dataset, dataset)} ({model})" for dataset, model in pairs)
    return f"{names}: {size}. Claims: {counts}."


def _other_arms(findings: list[Finding], matches: list[matching.Match]) -> list[Finding]:
    """Other arms that match all examples at t*; those of families with few arms whether or not they do."""
    tested = [{f.comparison.challenger, f.comparison.reference} for f in findings if f.comparison]
    return [
        Finding(Claim(f"{entry.arm} matches all at t*", entry.arm.name, "full", False), match.family, entry.comparison)
        for match in matches
        for entry in match.entries
        if entry.matching or len(match.entries) <= _MAX_VERDICT_ARMS
        if entry.arm.name != "init" and {entry.arm, entry.comparison.reference} not in tested
    ]


def _describe_dense(
    family: paper.Family, curves: dict[Arm, Curve], margin: float | None, levels: Any, confidence: float
) -> str:
    margin, levels = family.test_range(margin, levels)
    try:
        found = claims.dense_accuracy_kept(family, curves, margin, levels, confidence)
    except UserError as error:
        return f"{family}: dense accuracy not tested: {error}."
    by_test, by_means = (
        "at no level" if weights is None else f"down to {weights:.1f} % of weights" for weights in found
    )
    return (
        f"{family}: all at t* = {family.t_star} stays within {margin:g} points of the dense accuracy {by_test} by the "
        f"test, and {by_means} by the means alone."
    )


def _answers(families: list[tuple[paper.Family, dict[Arm, Curve]]], findings: list[Finding]) -> list[dict[str, Any]]:
    """Headline, large figure and tested claims of each family."""
    answers = []
    for family, curves in families:
        mine = [finding for finding in findings if finding.family == family]
        text = claims.headline(family, mine)
        drawn = figures.headline_figure(Panel(family, family.size), curves)
        tested = [finding for finding in mine if finding.comparison]
        answers.append({"headline": text, "figure": _svg(drawn), "tested": tested, "untested": len(mine) - len(tested)})
    return answers


def _stability(
    analyses: list[instability.Analysis], results: Results, matches: list[matching.Match]
) -> dict[str, Any] | None:
    """Barriers against steps, and how well they predict accuracy; None if no barrier is measured."""
    if not analyses:
        return None
    predictions = [each for each in instability.predict_all(matches, results, analyses) if each.barriers]
    pictures = [Picture(_svg(instability.barrier_figure(analyses)), "error barrier against the step of pre-training")]
    pictures += [Picture(_svg(instability.figure(each)), "error barrier and accuracy") for each in predictions]
    return {"pictures": pictures, "lines": list(map(str, predictions))}


def _figures(results: Results, published: Results, matches: list[matching.Match]) -> list[Picture]:
    """Each panel of Figures 2 to 7 as a separate picture that fits on a phone, with the published curves."""
    chosen: dict[Panel, int] = {}
    for number in figures.NUMBERS:
        for panel in (panel for row in figures.panels(number, results) for panel in row):
            chosen.setdefault(panel, number)
    pictures = []
    for panel, number in chosen.items():
        name = panel.family.dataset
        drawn = Figure(figsize=(4.4, 4.1), layout="constrained")
        figures.draw(drawn.subplots(), panel, results[name], published.get(name))
        handles, labels = figures.legend([panel], results)
        columns = 1 if panel.others else 2  # names of other arms are long
        drawn.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=7.5, handlelength=3)
        shown = name in published and not panel.others and not figures.differs_from_published(panel, results[name])
        thin = "; thin: published" if shown else ""
        pictures.append(
            Picture(_svg(drawn), f"As in Figure {number}: {panel.title}; band: ± 1 sd over n replicates{thin}")
        )
    for match in matches:
        if any(entry.arm.name != "init" for entry in match.entries):
            caption = f"{match.family}: difference to all at t* at the worst level, in points; frame: matching"
            pictures.append(Picture(_svg(matching.figure([match])), caption))
    return pictures


def _svg(drawn: Figure) -> str:
    """Renders a figure as a data URI; equal figures give equal bytes."""
    content = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "lth_diet"}):
        drawn.savefig(content, format="svg", metadata={"Date": None})
    return "data:image/svg+xml;base64," + base64.b64encode(content.getvalue()).decode()


def _deviations(
    results: Results, published: Results, margin: float | None, levels: tuple[int, int] | None, confidence: float
) -> list[tuple[str, str, str]]:
    """Differences from the published curves: arm, mean difference, and difference at the worst level."""
    rows = []
    for name, curves in results.items():
        theirs = published.get(name, {})
        for arm, curve in curves.items():
            same = theirs.get(dataclasses.replace(arm, setup=()))
            if same is None or paper.differences_from_published(name, curve.identity):
                continue
            known = identities.UNKNOWN not in curve.identity  # then the identity agrees, without being recorded there
            other = dataclasses.replace(arm, run_id="published")
            curves_of = {arm: curve, other: dataclasses.replace(same, identity={}) if known else same}
            try:
                tested = paper.test_range(name, curves, arm, margin, levels)
                comparison = dominance.compare(curves_of, arm, other, *tested, confidence)
            except UserError:  # no common level yet, or another model
                continue
            (mean,) = comparison.statements["mean"].levels.itertuples()
            worst = comparison.statements["pooled"].worst
            rows.append(
                (
                    f"{paper.NAMES[name]}: {arm}",
                    f"{mean.difference:+.2f} {dominance.interval(mean.lower, mean.upper)}",
                    f"{worst['difference']:+.2f} {dominance.interval(worst['lower'], worst['upper'])} "
                    f"at {worst['weights_remaining_percent']:.1f} %",
                )
            )
    return rows


def _examples(client: MlflowClient, runs: list[Run]) -> list[Picture]:
    """Logged pictures of the scores and subsets of some runs."""
    pictures = []
    for run in runs:
        paths = {entry.path for entry in client.list_artifacts(run.info.run_id)}
        if "examples" in paths:
            paths |= {entry.path for entry in client.list_artifacts(run.info.run_id, "examples")}
        for name, caption in _EXAMPLES.items():
            if name in paths:
                content = _download(client, run, name)
                if content.startswith(b"\x89PNG") and len(content) <= _MAX_PICTURE_BYTES:
                    source = "data:image/png;base64," + base64.b64encode(content).decode()
                    pictures.append(Picture(source, f"{run.info.run_name}: {caption}"))
    return pictures


def _versions(parents: list[Run]) -> list[tuple[str, str]]:
    """Versions and devices recorded by the runs; several where runs differ."""
    found: dict[str, set[str]] = {}
    for run in parents:
        for tag, value in run.data.tags.items():
            if tag.startswith("version.") or tag in environment.KEYS:
                found.setdefault(tag.removeprefix("version."), set()).add(value)
    return [(name, ", ".join(sorted(values))) for name, values in sorted(found.items())]


def _mixtures(client: MlflowClient, experiments: list[str], run_ids: set[str]) -> list[str]:
    """A sentence for each run whose trainings differ in device, precision, version or code."""
    trained: dict[str, list[tuple[str, environment.Environment]]] = {}
    for phase in ("pretrain", "level_%"):
        for run in collect.search_runs(client, experiments, f"tags.phase LIKE '{phase}'"):
            tags = run.data.tags
            if tags.get("run_id") in run_ids:
                name = f"{tags.get('dataset')}_{tags.get('arm')}-{tags.get('run_id')}"
                found = {key: tags.get(key) or tags.get(f"version.{key}") for key in environment.KEYS}
                known = {key: value for key, value in found.items() if value}
                trained.setdefault(name, []).append((f"replicate_{tags.get('replicate')}/{tags.get('phase')}", known))
    sentences = []
    for name, phases in sorted(trained.items()):
        if found := environment.differences(sorted(phases, key=lambda phase: _natural(phase[0]))):
            sentences.append(f"{name}: its trainings were run in different environments: {environment.describe(found)}")
    return sentences


def _imbalances(client: MlflowClient, pretrained: dict[str, Run]) -> list[str]:
    """A sentence for each run, by run id, whose subset lacks classes or has very few examples of them."""
    sentences = []
    for run_id, run in sorted(pretrained.items()):
        tags, counts = run.data.tags, _subset_classes(client, run)
        if counts and (found := subsets.describe_imbalance(counts, tags["arm"])):
            sentences.append(f"{tags.get('dataset')}_{tags['arm']}-{run_id}: {found}")
    return sentences


def _subset_classes(client: MlflowClient, run: Run) -> dict[str, int]:
    """Number of examples of the subset by class; empty if MLflow has no valid subset.json."""
    if "subset.json" not in {entry.path for entry in client.list_artifacts(run.info.run_id)}:
        return {}
    try:
        content = json.loads(_download(client, run, "subset.json"))
    except (ValueError, RecursionError):
        return {}
    counts = content.get("classes") if isinstance(content, dict) else None
    is_valid = isinstance(counts, dict) and all(isinstance(count, int) and count >= 0 for count in counts.values())
    return counts if is_valid else {}


def _download(client: MlflowClient, run: Run, name: str) -> bytes:
    """Content of an artifact."""
    with tempfile.TemporaryDirectory() as folder:  # MLflow does not delete its own download folder
        return Path(client.download_artifacts(run.info.run_id, name, folder)).read_bytes()


def _natural(name: str) -> list[int | str]:
    """Sort key that orders level_2 before level_10, and pre-training before both."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.removesuffix("pretrain"))]


def _runs(parents: list[Run]) -> list[dict[str, str]]:
    """Configuration of each arm as YAML, with the command that trains it."""
    replicates: dict[str, list[Run]] = {}
    for run in parents:
        replicates.setdefault(run.data.tags.get("run_id", run.info.run_id), []).append(run)
    shown = []
    for run_id, runs in sorted(replicates.items(), key=lambda item: item[1][0].info.run_name):
        tags = runs[0].data.tags
        name = f"{tags.get('dataset')}_{tags.get('arm')}-{run_id}"
        indices = sorted({int(run.data.tags.get("replicate", 0)) for run in runs})
        tree: dict[str, Any] = {}
        for key, text in runs[0].data.params.items():
            if key in DEFAULTS and text != "None":  # skips parameters that are not keys of a configuration
                *sections, last = key.split(".")
                node = tree
                for section in sections:
                    node = node.setdefault(section, {})
                node[last] = identities.parse(text)
        command = (
            f"composer -n {len(indices)} recipes/imp.py -f {name}.yaml "
            f"replicates={shlex.quote(str(indices).replace(' ', ''))} prune.levels={tags.get('planned_levels')}"
        )
        text = yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, width=80)
        shown.append({"title": name, "command": command, "yaml": text})
    return shown


@collect.catch_user_errors
def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(
        prog="python -m analysis.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    collect.add_store_arguments(parser)
    parser.add_argument("--dataset", help="only this data set")
    parser.add_argument("--model", help="only this model")
    parser.add_argument("--published", action="store_true", help="report the published curves of the paper instead")
    dominance.add_test_arguments(parser)
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), help="default %(default)s")
    arguments = parser.parse_args(argv)
    dominance.check_test_arguments(arguments)
    settings = arguments.margin, arguments.levels, arguments.confidence
    if arguments.published and (arguments.experiment or arguments.dataset or arguments.model):
        raise UserError("--published reports all published curves; leave out --experiment, --dataset and --model")
    if arguments.published:
        report = write_published(arguments.output, *settings)
    else:
        selection = {"dataset": arguments.dataset, "model": arguments.model}
        report = write(arguments.tracking_uri, arguments.experiment, arguments.output, *settings, **selection)
        collect.print_moves(arguments.tracking_uri, arguments.experiment)
    print("\n".join(report.verdicts))
    print(f"report: {report.path.resolve()}")
    return 0


if __name__ == "__main__":
    run_program(main)
