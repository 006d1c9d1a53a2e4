import gzip
import io
import json
import re
import shutil

import numpy as np
import pandas as pd
import pytest
from helpers import ROOT
from mlflow import MlflowClient

from analysis import collect
from lth_diet.errors import UserError
from lth_diet.tracking.mlflow_store import tracking_uri

HEADER = "dataset,model,arm,subset_size,rewind_steps,label_noise,replicate,level,weights_remaining_percent,test_accuracy_percent,run_id"


def csv(place, *rows):
    (place / "results.csv").write_text("\n".join([HEADER, *rows]) + "\n")
    return "results.csv"


def test_collect_returns_one_row_per_replicate_and_level(store):
    results = collect.collect(store, "tiny")
    assert list(results.columns) == list(collect.COLUMNS)
    assert len(results) == 7
    first = results.iloc[0]
    assert (first.arm, first.replicate, first.level, first.test_accuracy_percent) == ("init", 0, 0, 89.0)
    assert pd.isna(first.subset_size) and first.rewind_steps == 0
    assert (results.arm[4], results.subset_size[4], results.rewind_steps[4]) == ("random", 128, 4)
    assert set(results.seed) == {42} and set(results.planned_levels) == {1} and set(results.train_steps) == {12}


def test_command_writes_what_load_reads_and_lists_incomplete_replicates(store, place, capsys):
    assert collect.main(["--experiment", "tiny", "-o", "results.csv"]) == 0
    out, err = capsys.readouterr()
    assert out == "7 levels of 4 replicates: results.csv\n"
    assert err == "incomplete: digits, random 128, t_r = 4, replicate 1: level 1 of 1 not finished\n"
    pd.testing.assert_frame_equal(collect.load("results.csv"), collect.collect(store, "tiny"))


def test_all_experiments_are_collected_by_default(store, record):
    record("all", {0: [80.0]}, experiment="other")
    assert set(collect.collect(store).arm) == {"init", "random", "all"}
    assert set(collect.collect(store, "other").arm) == {"all"}


def test_commas_at_the_end_of_rows_are_no_columns(place):
    assert collect.load(csv(place, "digits,m,init,,0,0,0,0,100,90,x,")).run_id[0] == "x"


def test_missing_optional_columns_are_empty(place):
    frame = collect.load(csv(place, "digits,m,init,,0,0,0,0,100,90,x", "digits,m,init,,0,0,0,1,80,91,x"))
    assert frame.seed.isna().all() and frame.planned_levels.isna().all() and frame.train_steps.isna().all()
    assert frame.test_accuracy_percent.tolist() == [90, 91]


def test_values_that_init_and_all_do_not_use_are_dropped(place):
    frame = collect.load(csv(place, "digits,m,init,9,9,0.5,0,0,100,90,x", "digits,m,all,9,9,0.5,0,0,100,90,y"))
    assert frame.subset_size.isna().all()
    assert frame.set_index("arm")[["rewind_steps", "label_noise"]].T.to_dict("list") == {
        "init": [0, 0],
        "all": [9, 0.5],
    }


GOOD = "digits,m,random,256,20,0,0,0,100,90,x"


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        (["digits,m,random,256,20,0,0,0,100,,x"], "row 2: test_accuracy_percent is empty or NaN: must be a number"),
        ([GOOD, "digits,m,random,256,20,0,0,1,80,NaN,x"], "row 3: test_accuracy_percent is empty or NaN: must be"),
        (
            ["digits,m,random,256,20,0,0,0,100,120,x"],
            "row 2: test_accuracy_percent = '120': must be 0 to 100",
        ),
        (["digits,m,random,256,20,0,0,0,100,inf,x"], "row 2: test_accuracy_percent = 'inf': must be a number"),
        (["digits,m,random,256,20,0,0,1.5,100,90,x"], "row 2: level = '1.5': must be a whole number"),
        (["digits,m,random,256,20,0,-1,0,100,90,x"], "row 2: replicate = '-1': must be 0 or more"),
        (["digits,m,random,many,20,0,0,0,100,90,x"], "row 2: subset_size = 'many': must be a number"),
        (["digits,m,random,,20,0,0,0,100,90,x"], "must be a number (only init and all may have none)"),
        (["digits,m,all,,20,0,0,10001,100,90,x"], "row 2: level = '10001': must be 0 to 10000"),
        (["digits,m,random,256,20,2,0,0,100,90,x"], "row 2: label_noise = '2': must be 0 to 1"),
        (["digits,m,random,256,20,0,0,0,0,90,x"], "row 2: weights_remaining_percent = '0': must be greater than 0"),
        ([",m,random,256,20,0,0,0,100,90,x"], "row 2: dataset is empty or NaN: must be text"),
        (
            [GOOD, GOOD],
            "random, level 0: two rows for the same replicate and level: rows 2 and 3, replicate 0 of run id x, with 90 and 90 %",
        ),
        (["digits,m,random,256,20,0,0,0,80,90,x"], "row 2: weights_remaining_percent = 80: must be 100 at level 0"),
        (
            [GOOD, "digits,m,random,256,20,0,0,2,40,90,x", "digits,m,random,256,20,0,0,1,20,90,x"],
            "row 3: weights_remaining_percent = 40 at level 2: must be at most that of the level before",
        ),
        ([GOOD.replace("90", "90,5")], "the rows have more fields than the header"),
        ([GOOD, f"{GOOD},"], "cannot be read: not a CSV table"),
        ([], "no rows; expected one row per replicate and level"),
    ],
)
def test_error_names_file_row_column_and_value(place, rows, sentence):
    with pytest.raises(UserError, match=r"results\.csv") as error:
        collect.load(csv(place, *rows))
    assert sentence in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("column", HEADER.split(","))
def test_error_names_the_missing_column(place, column):
    pd.read_csv(io.StringIO(f"{HEADER}\n{GOOD}\n")).drop(columns=column).to_csv("missing.csv", index=False)
    with pytest.raises(UserError, match=rf"missing\.csv: column {column} is missing; expected columns dataset, model"):
        collect.load("missing.csv")


def test_file_that_is_not_a_table_is_rejected(place):
    with pytest.raises(UserError, match=r"nowhere\.csv cannot be read: No such file"):
        collect.load("nowhere.csv")
    packed = gzip.compress(f"{HEADER}\n{GOOD}\n".encode())
    for name, content, reason in (
        ("empty.csv", b"", "no columns"),
        ("packed.csv", packed, "not text in UTF-8"),
        ("plain.csv.gz", HEADER.encode(), "Not a gzipped file"),
        ("part.csv.gz", packed[:-20], "Compressed file ended"),
    ):
        (place / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{re.escape(name)} cannot be read: {reason}"):
            collect.load(name)
    shutil.copy(ROOT / "docs/quickstart.png", "picture.csv")
    with pytest.raises(UserError, match=r"picture\.csv"):
        collect.load("picture.csv")


@pytest.mark.parametrize(
    ("scale", "options", "sentence"),
    [
        (
            {"test_accuracy_percent": 0.01},
            {},
            "test_accuracy_percent is at most 0.9, which looks like fractions of 1",
        ),
        (
            {"weights_remaining_percent": 0.01},
            {},
            "weights_remaining_percent is 1 at level 0, which looks like fractions",
        ),
        ({}, {"sep": ";"}, "the columns are separated by semicolons; expected commas"),
        ({}, {"sep": ";", "decimal": ","}, "the columns are separated by semicolons; expected commas"),
        ({}, {"sep": "\t"}, "the columns are separated by tabs; expected commas"),
    ],
)
def test_fractions_of_1_and_other_delimiters_are_named(place, scale, options, sentence):
    frame = pd.read_csv(io.StringIO(f"{HEADER}\n{GOOD}\n{GOOD.replace('0,0,100,90', '1,0,100,89.5')}\n"))
    frame.assign(**{key: frame[key] * factor for key, factor in scale.items()}).to_csv("x.csv", index=False, **options)
    with pytest.raises(UserError, match=rf"x\.csv: {sentence}"):
        collect.load("x.csv")


def test_a_replicate_that_may_be_in_fractions_among_others_in_percent_is_a_warning(place, capsys):
    other = GOOD.replace("0,0,100,90", "1,0,100,0.9")
    collect.print_incomplete(collect.load(csv(place, GOOD, other)))
    assert (
        "warning: results.csv: replicate 1 of run id x (random) has accuracies of at most 0.9 %"
        in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"seed": ""}, "has rows with and without a seed"),
        (
            {"identity": '{"precision": "auto", "arm": "init"}'},
            "two rows for the same replicate and level: rows 2 and 3",
        ),
        ({"model": "M"}, "two rows for the same replicate and level"),
        ({"seed": "18446744073709551615"}, "row 3: seed = '18446744073709551615': must be a number below 1e15"),
    ],
)
def test_a_replicate_that_is_there_twice_is_rejected_whatever_the_spelling_of_its_identity(place, change, sentence):
    row = dict(zip(HEADER.split(","), ["digits", "m", "init", "", "0", "0", "0", "0", "100", "90", "x"], strict=True))
    rows = [
        row | {"seed": "1", "identity": '{"arm": "init"}'},
        row | {"seed": "1", "identity": '{"arm": "init"}'} | change,
    ]
    pd.DataFrame(rows).to_csv("twice.csv", index=False)
    with pytest.raises(UserError, match=re.escape(sentence)):
        collect.load("twice.csv")


def test_accuracies_at_the_chance_level_of_many_classes_are_not_taken_for_fractions(place):
    assert len(collect.load(csv(place, GOOD.replace(",90,", ",1,")))) == 1


def test_an_invalid_level_is_left_out_by_name_and_takes_nothing_else_with_it(store, record, capsys):
    run = record("all", {0: [80.0, 79.0]}, "pretrain.steps=8")
    client = MlflowClient(store)
    (mlflow_run,) = client.search_runs(["1"], f"tags.run_id = '{run.path.name[-10:]}' and tags.phase = 'all'")
    client.log_metric(mlflow_run.info.run_id, "weights_remaining_percent", 0.0, step=1)
    assert collect.main(["--experiment", "tiny", "-o", "results.csv"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("8 levels of 5 replicates")
    sentence = (
        f"run {run.path.name}/replicate_0 of experiment 'tiny', level 1, is left out: weights_remaining_percent = '0.0'"
    )
    assert f"warning: {sentence}" in err and "all, t_r = 8" not in err


def test_a_run_of_two_experiments_is_merged_if_it_has_the_same_results_and_named_otherwise(record):
    uri = tracking_uri()
    record("all", {0: [80.0]}, experiment="a")
    shutil.move("runs", "first")
    run = record("all", {0: [80.0, 79.0], 1: [70.0]}, experiment="b")
    frame = collect.collect(uri)
    assert frame.test_accuracy_percent.tolist() == [80.0, 79.0, 70.0] and frame.attrs["left_out"] == []
    assert set(frame.planned_levels) == {1}
    shutil.move("runs", "second")
    record("all", {1: [71.0]}, "replicates=[1]", experiment="c")
    frame = collect.collect(uri)
    (sentence,) = frame.attrs["left_out"]
    assert len(frame) == 3 and all(part in sentence for part in ("70 %", "71 %", "'b'", "'c'", run.path.name))
    assert set(collect.collect(uri, "c").test_accuracy_percent) == {71.0}


def test_image_folders_with_other_images_are_separate_data_sets(place):
    row = pd.read_csv(io.StringIO(f"{HEADER}\nimage_folder,m,init,,0,0,0,0,100,90,x\n"))
    marks = ("1111111122222222", "3333333344444444")
    known = [row.assign(identity=json.dumps({"dataset.fingerprint": mark})) for mark in marks]
    pd.concat([*known, row]).to_csv("folders.csv", index=False)
    frame = collect.load("folders.csv")
    names = ["image_folder-11111111", "image_folder-33333333", "image_folder"]
    assert sorted(collect.dataset_names(frame)) == sorted(names)
    assert len(collect.select(frame, names[0], None)) == 1 and len(collect.select(frame, "image_folder", None)) == 3
    with pytest.raises(UserError, match=f"choose one with --dataset image_folder | {names[0]}"):
        collect.select_one(frame, "image_folder", None)


def test_collecting_nothing_is_reported_in_one_sentence(store, place, capsys):
    for arguments, sentence in (
        (["--experiment", "other"], "no experiment 'other' in the MLflow store; expected one of "),
        (["--experiment", "Default"], "no level is finished yet in experiment 'Default' of the MLflow store"),
        (["--tracking-uri", "sqlite:///nowhere.db"], "no MLflow store at nowhere.db"),
        (["--tracking-uri", "nowhere"], "no MLflow store at nowhere"),
        (["--experiment", "tiny", "-o", "no/such/folder.csv"], "no/such/folder.csv cannot be written"),
    ):
        assert collect.main(["-o", "x.csv", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"error: {sentence}") and err.count("\n") == 1
    assert not (place / "x.csv").exists() and not list(place.glob("nowhere*"))


def test_the_published_curves_are_summaries_with_the_sample_standard_deviation():
    frame = collect.published()
    assert list(frame.columns) == list(collect.SUMMARY)
    assert frame.groupby(["dataset", "arm", "subset_size", "rewind_steps", "label_noise"], dropna=False).ngroups == 92
    init = frame[(frame.dataset == "cifar10") & (frame.arm == "init")].set_index("level")
    assert len(init) == 21 and init["mean"][8] == 88.4975  # once, though every figure repeats it
    hard = frame[(frame.dataset == "cinic10") & (frame.arm == "hard")]
    assert set(hard[hard.rewind_steps == 200].n) == {2} and set(hard[hard.rewind_steps == 400].n) == {3}
    assert set(frame[(frame.arm != "hard") | (frame.dataset != "cinic10")].n) == {4}
    assert np.allclose(frame.weights_remaining_percent, 100 * 0.8**frame.level)
    assert not ((frame.dataset == "cifar10") & (frame.arm == "random") & (frame.subset_size == 25600)).any()


def test_several_data_sets_or_models_require_a_choice(place):
    rows = ["digits,m,init,,0,0,0,0,100,90,x", "other,m,init,,0,0,0,0,100,90,x", "other,k,init,,0,0,0,0,100,90,y"]
    frame = collect.load(csv(place, *rows))
    with pytest.raises(UserError, match=r"mix datasets; choose one with --dataset digits \| other"):
        collect.select_one(frame, None, None)
    with pytest.raises(UserError, match=r"mix models; choose one with --model k \| m"):
        collect.select_one(frame, "other", None)
    with pytest.raises(UserError, match=r"--dataset = 'mnist': not in these results; expected one of digits, other"):
        collect.select_one(frame, "mnist", None)
    assert len(collect.select_one(frame, "other", "k")) == 1
    assert len(collect.select(frame, None, "m")) == 2 and len(collect.select(frame, None, None)) == 3


def test_an_incomplete_replicate_is_named_by_what_distinguishes_its_arm_and_by_its_seed_if_there_are_several(place):
    identity = {"arm": "easy", "pretrain.steps": 20, "pretrain.subset.size": 256}
    row = {"dataset": "digits", "model": "m", "arm": "easy", "subset_size": 256, "rewind_steps": 20, "label_noise": 0}
    row |= {
        "replicate": 0,
        "level": 0,
        "weights_remaining_percent": 100,
        "test_accuracy_percent": 90,
        "planned_levels": 1,
    }
    rows = []
    for balanced, seed in ((False, 1), (True, 1), (True, 2)):
        text = json.dumps(identity | {"pretrain.subset.class_balanced": balanced})
        rows.append(row | {"seed": seed, "run_id": f"{balanced}{seed}", "identity": text})
    pd.DataFrame(rows).to_csv("some.csv", index=False)
    assert collect.describe_incomplete(collect.load("some.csv")) == [
        "digits, easy 256, t_r = 20, replicate 0: level 1 of 1 not finished",
        "digits, easy 256, t_r = 20, balanced, replicate 0 of seed 1: level 1 of 1 not finished",
        "digits, easy 256, t_r = 20, balanced, replicate 0 of seed 2: level 1 of 1 not finished",
    ]


def test_without_planned_levels_the_other_replicates_set_the_last_level(place):
    rows = [
        f"digits,m,init,,0,0,{replicate},{level},{100 * 0.8**level},90,x"
        for replicate, level in ((0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (2, 0), (2, 1), (2, 3))
    ]
    assert collect.describe_incomplete(collect.load(csv(place, *rows))) == [
        "digits, init, replicate 1: levels 1 to 3 of 3 not finished",
        "digits, init, replicate 2: level 2 of 3 not finished",
    ]
