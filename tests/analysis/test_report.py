import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import yaml
from chromium import PROGRAM, Page
from helpers import MEASURED
from hypothesis import example, given
from hypothesis import strategies as st
from mlflow import MlflowClient
from PIL import Image

from analysis import report
from lth_diet.config import loading
from lth_diet.config.instability import load_instability
from lth_diet.config.run_ids import run_id
from lth_diet.runs.instability_directory import InstabilityDirectory
from lth_diet.runs.run_directory import ReplicateDirectory, RunDirectory
from lth_diet.tracking import mlflow_store, sync


def accuracies(replicates, start, levels=5, seed=0):
    noise = np.random.default_rng(seed).standard_normal((replicates, levels))
    return {index: [round(float(value), 4) for value in start + 0.1 * line] for index, line in enumerate(noise)}


@pytest.fixture
def experiment(record):
    """Three arms of three replicates, one of them incomplete; the name contains HTML."""
    record("all", accuracies(3, 95.0, seed=1), "pretrain.steps=8", experiment="<b>tiny</b>")
    run = record("random", accuracies(3, 97.0, seed=2) | {2: [97.0]}, experiment="<b>tiny</b>")
    record("init", accuracies(3, 90.0, seed=3), experiment="<b>tiny</b>")
    return run


def picture():
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "png")
    return buffer.getvalue()


def write(output="report.html"):
    return report.write(mlflow_store.tracking_uri(), "<b>tiny</b>", report.Path(output))


def test_page_has_verdicts_untested_claims_and_incomplete_replicates(experiment, place, capsys):
    client = MlflowClient(mlflow_store.tracking_uri())
    where = client.get_experiment_by_name("<b>tiny</b>").experiment_id
    failed = client.create_run(where, tags={"phase": "all"}, run_name="digits_hard-1/replicate_0")
    client.set_terminated(failed.info.run_id, "FAILED")
    written = write()
    headline, *lines = written.verdicts
    assert re.fullmatch(
        r"digits: pre-training for 8 steps before pruning makes networks with 41 % of their weights 5\.\d points better "
        r"than none \(95 % interval [\d.]+ to [\d.]+, n = 3\)\.",
        headline,
    )
    claim = "holds: all at t* dominates init: +5.0 points at worst, at 41 % of weights; better in 100 % (44 to 100) of"
    assert f"  {claim} replicates; n = 3; tested at levels 3, 4 of 3 to 12 only" in lines
    assert any("not tested: 6 claims (missing all, t_r = 4" in line for line in lines)
    page = written.path.read_text()
    assert page.index(headline) < page.index("<img") < page.index("all at t* dominates init") < page.index("<details")
    assert page.index("<details") < page.index("Details of the tests") < page.index("Test accuracy by level")
    assert "digits, random 128, t_r = 4, replicate 2: levels 1 to 4 of 4 not finished" in page
    assert "digits_hard-1/replicate_0: no level is finished; it failed" in page
    assert re.search(r"1 of 3 replicates of [\w, =]+ excluded because they lack some levels", page)
    assert re.search(r"version|torch</td><td>\d", page) and "composer -n 3 recipes/imp.py" in page
    assert report.main(["--experiment", "<b>tiny</b>", "-o", "page.html"]) == 0
    assert capsys.readouterr().out == "\n".join(written.verdicts) + f"\nreport: {place}/page.html\n"
    assert (place / "page.html").read_text() == page


def test_names_are_escaped_nothing_is_requested_and_invalid_input_is_one_sentence(experiment, place, capsys):
    client = MlflowClient(mlflow_store.tracking_uri())
    for run in client.search_runs([client.get_experiment_by_name("<b>tiny</b>").experiment_id], "tags.phase = 'all'"):
        client.set_tag(run.info.run_id, "version.torch", "<script>alert(1)</script>")
    page = write().path.read_text()
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page and "&lt;b&gt;tiny&lt;/b&gt;" in page
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) > 2 and all(source.startswith("data:") for source in sources)
    assert "default-src 'none'" in page
    for arguments, sentence in (
        (["--experiment", "other"], "no experiment 'other'"),
        (["--published", "--dataset", "digits"], "--published reports all published curves"),
        (["--margin", "-1"], "--margin = -1.0: must be 0 or more percentage points"),
        (["--tracking-uri", "sqlite:///nowhere.db"], "no MLflow store at nowhere.db"),
    ):
        assert report.main([*arguments, "-o", "page.html"]) == 2
        assert capsys.readouterr().err.startswith(f"error: {sentence}")
    assert not (place / "page.html").exists()


def test_configuration_on_the_page_reproduces_the_run_id(experiment, place):
    page = write().path.read_text()
    block = next(text for text in re.findall(r"<pre># .*?\n(.*?)</pre>", page, flags=re.S) if "arm: random" in text)
    (place / "again.yaml").write_text(block.replace("&#39;", "'"))
    assert run_id(loading.load_config("again.yaml")) == run_id(experiment.config)
    assert yaml.safe_load(block)["train"]["steps"] == 12


def test_page_shows_logged_pictures(experiment, place):
    assert "<h2>Examples" not in write().path.read_text()
    (place / "subset.png").write_bytes(picture())
    client = MlflowClient(mlflow_store.tracking_uri())
    where = client.get_experiment_by_name("<b>tiny</b>").experiment_id
    child = client.create_run(where, tags={"phase": "pretrain", "run_id": "x"}, run_name="random/pretrain")
    client.log_artifact(child.info.run_id, "subset.png")
    scores = client.create_run(where, tags={"phase": "scores"}, run_name="scores")
    for name in ("histogram.png", "easiest.png", "notes.txt"):
        (place / name).write_bytes(picture())
        client.log_artifact(scores.info.run_id, name, "examples")
    page = write().path.read_text()
    for caption in (
        "random/pretrain: scores and classes of the subset",
        "scores: EL2N scores",
        "scores: the easiest examples",
    ):
        assert f"<figcaption>{caption}" in page
    assert page.count("data:image/png;base64,") == 3


def test_results_are_compared_with_the_published_curves(place):
    frame = report.collect.published()
    rows = frame[(frame.dataset == "cifar10") & (frame.label_noise == 0) & frame.arm.isin(["init", "all"])]
    random = np.random.default_rng(0)
    rows = rows.loc[rows.index.repeat(4)].assign(replicate=np.tile(range(4), len(rows)), run_id="a")
    rows["test_accuracy_percent"] = rows["mean"] - 1 + rows.sd * random.standard_normal(len(rows))
    rows.drop(columns=["mean", "sd", "n"]).to_csv("rows.csv", index=False)
    mine = report.collect.load("rows.csv")
    published = report.collect.results_by_dataset(report.collect.published())
    results = report.collect.results_by_dataset(mine)
    deviations = report._deviations(results, published, 0.3, (3, 12), 0.95)
    assert [row[0] for row in deviations] == ["CIFAR-10: init", "CIFAR-10: all, t_r = 200", "CIFAR-10: all, t_r = 400"]
    assert all(-1.4 < float(row[1].partition(" ")[0]) < -0.6 for row in deviations)
    other = report.collect.results_by_dataset(mine.assign(model="another"))
    assert report._deviations(other, published, 0.3, (3, 12), 0.95) == []


def test_experiments_with_other_settings_are_neither_pooled_nor_compared_and_the_rest_is_reported(record, place):
    record("all", accuracies(2, 95.0), "pretrain.steps=8")
    record("init", accuracies(2, 90.0))
    record("all", accuracies(2, 60.0), "pretrain.steps=8", "prune.fraction=0.5", "seed=1")
    record("init", accuracies(2, 50.0), "train.steps=40")
    record("all", accuracies(2, 94.0), "pretrain.steps=8", "model.width=4")
    verdicts = "\n".join(write_all().verdicts)
    setups = "model.width = 2, prune.fraction = 0.2, train.steps = 12"
    assert f"digits, {setups}: pre-training for 8 steps before pruning makes networks" in verdicts
    assert verdicts.count("holds: all at t* dominates init") == verdicts.count("  holds: ") == 1
    other = setups.replace("0.2", "0.5")
    assert (
        f"digits, {other}: pre-training for 8 steps before pruning was not compared with none" in verdicts
        and f"missing init, {other} (not compared: init," in verdicts
    )
    assert "\nnote: digits: several setups, whose arms are not compared with each other:" in verdicts
    page = Path("report.html").read_text()
    assert "missing all, t_r = 8" not in verdicts and "all at t* = 8 stays within" in page


def test_numerical_settings_are_not_pooled_but_compared_with_a_note(record, place):
    record("all", accuracies(2, 95.0), "pretrain.steps=8", "threads=2")
    record("init", accuracies(2, 90.0), "seed=42")
    verdicts = "\n".join(write_all().verdicts)
    assert "holds: all at t* dominates init" in verdicts and "the arms also differ in threads = 2 and 1" in verdicts
    record("all", accuracies(2, 95.0), "pretrain.steps=8", "seed=7")
    verdicts = "\n".join(write_all().verdicts)
    several = "several configurations of all, t_r = 8: threads = 1 or 2"
    assert f"dense accuracy not tested: {several}." in Path("report.html").read_text()
    assert "not tested: " in verdicts and several in verdicts


def write_all():
    return report.write(mlflow_store.tracking_uri(), None, report.Path("report.html"), 0.3, (0, 4), 0.95)


@given(st.text(min_size=1), st.text(min_size=1))
@example("a/b", "a\\b")
@example("a/b", "a_b")
@example("x" * 300, "x" * 299)
def test_experiments_with_different_names_have_different_reports(first, second):
    names = [report.file_name(name) for name in (first, second)]
    assert (names[0] == names[1]) == (first == second)
    assert all("/" not in name and len(os.fsencode(name)) < 256 for name in names)


@pytest.mark.integration
@pytest.mark.skipif(PROGRAM is None, reason="Chromium is not installed")
def test_chromium_renders_verdicts_and_figures_without_requests(experiment, place):
    pages = [
        (write(), "ALL AT T* DOMINATES INIT", 1),
        (report.write_published(place / "published.html"), "CINIC-10", 40),
    ]
    with Page(place) as page:
        for written, verdict, figures in pages:
            address = written.path.resolve().as_uri()
            for width in (375, 1200):
                page.open(address, width)
                page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
                assert page.evaluate("document.documentElement.scrollWidth") <= width
                answers = "[...document.querySelectorAll('.headline, .verdicts')].map(e => e.innerText).join()"
                assert verdict in page.evaluate(answers).upper()
                shown = page.evaluate(
                    "[...document.images].map(i => [i.complete && i.naturalWidth > 0, i.getBoundingClientRect().width])"
                )
                assert len(shown) >= figures and all(loaded and 200 < drawn <= width for loaded, drawn in shown)
                assert [url for url in page.requests if not url.startswith("data:")] == [address]
            page.pdf(place / "page.pdf")
            assert (place / "page.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.integration
def test_page_from_a_server_equals_page_from_a_local_store(place, record, monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = ["-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", "sqlite:///server.db", "--artifacts-destination", str(place / "artifacts")]
    server = subprocess.Popen(
        [sys.executable, *command, *stores],
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health").read()
                break
            except OSError:
                assert server.poll() is None
                time.sleep(0.5)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{port}")
        run = record("random", accuracies(2, 97.0))
        record("all", accuracies(2, 95.0), "pretrain.steps=8")
        there = report.write(f"http://127.0.0.1:{port}", "tiny", report.Path("there.html"))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{place}/local.db")
        for folder in sorted(run.path.parent.iterdir()):
            for replicate in sorted(folder.glob("replicate_*")):
                sync.sync_replicate(ReplicateDirectory(replicate))
        here = report.write(f"sqlite:///{place}/local.db", "tiny", report.Path("here.html"))
        assert there.verdicts == here.verdicts and there.path.read_text() == here.path.read_text()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


@pytest.mark.parametrize(
    ("content", "reported"),
    [('{"classes": {"3": 0, "4": 9}}', True), ('{"classes": {"3": 5, "4": 9}}', False), ("[", False), ("[1]", False)],
)
def test_a_subset_that_lacks_classes_is_a_line_of_the_report(record, content, reported):
    run = record("easy", {0: [90.0, 89.0]})
    pretrain = run.replicate(0).pretrain
    pretrain.write("subset.json", content.encode())
    pretrain.finish({"steps": 4, "timestamp": 1})
    sync.sync_replicate(run.replicate(0))
    line = f"note: {run.path.name}: no example of 3 among the 9 easiest examples; see pretrain.subset.class_balanced"
    assert (line in report.write(mlflow_store.tracking_uri(), "tiny", report.Path("report.html")).verdicts) == reported


def test_a_report_that_exists_is_updated_after_an_instability_analysis(record, tiny, capsys):
    record("init", {0: [89.0, 88.0], 1: [90.0, 89.0]})
    analysis = InstabilityDirectory(load_instability(tiny("all"), ["steps=[0]", "experiment=tiny"]))
    analysis.create()
    path = Path("runs/tiny.html")
    report.update_run_reports([analysis])
    assert not path.exists() and capsys.readouterr().out == ""
    path.write_text("old")
    report.update_run_reports([analysis, analysis])
    assert path.read_text().startswith("<!doctype html>") and capsys.readouterr().out == f"report: {path.resolve()}\n"


@pytest.mark.parametrize(("asked", "stacked"), [(5, 5), (8, 8), (9, 12)])
def test_the_next_command_has_whole_blocks_and_the_time_of_the_replicates_that_it_adds(tiny, asked, stacked):
    run = RunDirectory(
        loading.load_config(tiny("init"), ["replicates=4", "stack=4" if stacked % 4 == 0 else "stack=1"])
    )
    for phase in (run.replicate(index).level(level) for index in (0, 1) for level in range(3)):
        phase.write("curve.jsonl", b"")
        measured = {"weights_remaining_percent": 100.0, "test_accuracy_percent": 50.0}
        phase.finish(MEASURED | measured | {"seconds": 100.0})
    for index in (0, 1):
        run.replicate(index).pretrain.write("weights.safetensors", b"")
        run.replicate(index).pretrain.finish({"steps": 0})  # as of arm init, without a time
    line = report.describe_more([run, run], asked, 2, "composer -n 2 a.py", 2)
    minutes = 5 * (stacked - 4)
    assert line == (
        f"replicates={stacked} would decide 2 undecided claims if the differences stay as they are, in about {minutes} min: "
        f"composer -n 2 a.py replicates={stacked}"
    )
