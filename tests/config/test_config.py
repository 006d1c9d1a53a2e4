import json
import string
from pathlib import Path

import numpy as np
import pytest
from helpers import ROOT, TINY, YAMLS, write_image_folder
from hypothesis import given
from hypothesis import strategies as st

from lth_diet.config import loading, run_ids
from lth_diet.config.run_ids import run_id, run_name, scores_id
from lth_diet.data import catalog
from lth_diet.errors import UserError
from lth_diet.launch import plan
from lth_diet.runs.config_directory import read_config
from lth_diet.runs.run_directory import RunDirectory
from lth_diet.runs.scores_directory import ScoresDirectory
from lth_diet.scores import artifact


def load(tiny, *overrides, arm="random"):
    return loading.load_config(tiny(arm), overrides)


def test_a_file_overrides_its_base_and_overrides_override_both(place):
    (place / "base").mkdir()
    (place / "base/b.yaml").write_text(
        "dataset: {name: digits}\nmodel: {depth: 8}\ntrain: {steps: 50, batch_size: 64}\n"
    )
    (place / "a.yaml").write_text("base: base/b.yaml\narm: all\npretrain: {steps: 5ba}\ntrain: {lr: 0.2}\n")
    loaded = loading.load_config("a.yaml", ["train.batch_size=32", "replicates=[1, 3]"])
    assert (loaded.train.steps, loaded.train.batch_size, loaded.train.lr) == (50, 32, 0.2)
    assert loaded.replicates == (1, 3)
    assert loaded.pretrain.steps == 5


def test_steps_are_given_with_or_without_the_unit(tiny):
    assert load(tiny, "train.steps=20ba").train.steps == load(tiny, "train.steps=20").train.steps == 20


PATHS = {"runs": ["config", "runs"], "dataset.root": ["config", "dataset", "root"]}


@pytest.mark.parametrize("key", PATHS)
def test_a_tilde_is_the_home_folder_in_files_and_on_the_command_line(tiny, place, monkeypatch, key):
    monkeypatch.setenv("HOME", "/home/ada")
    section, _, name = key.rpartition(".")
    value = f"{{{name}: ~/x}}" if section else "~/x"
    (place / "a.yaml").write_text(f"base: {tiny()}\n{section or name}: {value}\n")
    for loaded in (loading.load_config("a.yaml"), load(tiny, f"{key}=~/x")):
        assert run_ids.flatten(loaded.model_dump())[key] == "/home/ada/x"
    assert run_id(loaded) == run_id(load(tiny))


def test_a_base_and_a_scores_file_may_be_in_the_home_folder(tiny, place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    tiny("easy")
    (place / "sub").mkdir()
    (place / "sub/a.yaml").write_text("base: ~/tiny.yaml\n")
    artifact.save_scores(place, np.full((1, 1442), 0.5, np.float32), np.zeros(1442, int), "digits", "digits")
    assert loading.load_config("sub/a.yaml", ["scores.file=~/scores.safetensors"]).scores.file.startswith(str(place))


def test_a_folder_may_be_called_tilde_and_a_url_stays(tiny):
    assert load(tiny, "runs=./~").runs == "./~" and load(tiny, "runs=s3://b/~").runs == "s3://b/~"


def test_scientific_notation_without_a_point_is_a_number(tiny):
    assert load(tiny, "train.weight_decay=5e-4").train.weight_decay == 5e-4


def test_the_repr_of_a_configuration_is_short(tiny):
    assert repr(load(tiny)) == "Config(digits, random 128, t_r = 4)"


NOT_IDENTITY = [
    "replicates=7",
    "prune.levels=9",
    "runs=elsewhere",
    "experiment=other",
    "dataset.root=x",
    "intervals.log=7",
]


@pytest.mark.parametrize("override", NOT_IDENTITY)
def test_fields_without_effect_on_results_do_not_change_the_id(tiny, override):
    assert run_id(load(tiny, override)) == run_id(load(tiny))


IDENTITY = ["seed=1", "threads=2", "train.lr=0.3", "pretrain.steps=5", "pretrain.subset.size=64", "precision=fp32"]


@pytest.mark.parametrize("override", [*IDENTITY, "prune.fraction=0.3", "model.width=3", "deterministic=true"])
def test_fields_that_change_results_change_the_id(tiny, override):
    assert run_id(load(tiny, override)) != run_id(load(tiny))


@pytest.mark.parametrize(
    ("arm", "override"),
    [
        ("init", "pretrain.lr=0.9"),
        ("init", "pretrain.steps=9"),
        ("init", "pretrain.label_noise=0.5"),
        ("init", "pretrain.subset.size=65"),
        ("all", "pretrain.subset.size=65"),
        ("all", "scores.networks=3"),
        ("random", "scores.networks=3"),
        ("random", "pretrain.subset.class_balanced=true"),
        ("random", "pretrain.subset.offset=3"),
    ],
)
def test_fields_that_an_arm_ignores_do_not_change_its_id(tiny, arm, override):
    assert run_id(load(tiny, override, arm=arm)) == run_id(load(tiny, arm=arm))


@pytest.mark.parametrize(
    "override", ["pretrain.subset.class_balanced=true", "pretrain.subset.offset=3", "scores.networks=3"]
)
def test_scores_balance_and_offset_change_the_ids_of_easy_and_hard(tiny, override):
    ids = {run_id(load(tiny, *overrides, arm=arm)) for arm in ("easy", "hard") for overrides in ((), (override,))}
    assert len(ids) == 4


def test_an_explicit_default_does_not_change_the_id(tiny):
    written = ["train.momentum=0.9", "pretrain.subset.offset=0", "seed=42", "prune.fraction=0.2"]
    assert run_id(load(tiny, *written, arm="easy")) == run_id(load(tiny, arm="easy"))


def test_the_id_depends_on_the_content_of_an_image_folder_and_not_on_its_path(tiny, place):
    catalog.info.cache_clear()
    for name, sizes in (("a", None), ("b", None), ("c", {"train": 7, "test": 2})):
        write_image_folder(place / name, sizes)
    settings = ["dataset.name=image_folder", "train.batch_size=2", "pretrain.subset.size=4"]
    ids = [run_id(load(tiny, *settings, f"dataset.root={name}")) for name in "abc"]
    assert ids[0] == ids[1] != ids[2]


# Run ids name finished runs: they must not change when keys are added to the schema.
IDS = {
    "cifar100_all": "cifar100_all-8dc5322229",
    "cifar100_all_half": "cifar100_all-12d51972ca",
    "cifar100_easy": "cifar100_easy-7c4954c766",
    "cifar100_hard": "cifar100_hard-0bf45e2c25",
    "cifar100_init": "cifar100_init-980ff62193",
    "cifar100_random": "cifar100_random-fc04e4568e",
    "cifar10_all": "cifar10_all-8236c9693b",
    "cifar10_all_half": "cifar10_all-84b72b6b29",
    "cifar10_easy": "cifar10_easy-a2e5618623",
    "cifar10_hard": "cifar10_hard-01c49e16d9",
    "cifar10_init": "cifar10_init-6a027a3dfc",
    "cifar10_noise10_all": "cifar10_all-415af075bd",
    "cifar10_noise10_all_half": "cifar10_all-78c5bbbe1e",
    "cifar10_noise10_easy": "cifar10_easy-e080697ec5",
    "cifar10_noise10_random": "cifar10_random-e4b49234a0",
    "cifar10_noise50_all": "cifar10_all-1550ad94d1",
    "cifar10_noise50_all_half": "cifar10_all-ee7ea8d5f9",
    "cifar10_noise50_easy": "cifar10_easy-c022ecccbc",
    "cifar10_noise50_random": "cifar10_random-388ab7892f",
    "cifar10_random": "cifar10_random-c4c74dc415",
    "cinic10_all": "cinic10_all-d7b570b9ed",
    "cinic10_all_half": "cinic10_all-6306d45db1",
    "cinic10_easy": "cinic10_easy-db12383570",
    "cinic10_hard": "cinic10_hard-bdab87a715",
    "cinic10_init": "cinic10_init-8051fbde8e",
    "cinic10_random": "cinic10_random-acbf5d4856",
    "digits_all": "digits_all-5c9a828fce",
    "digits_all_half": "digits_all-bdba0c86db",
    "digits_easy": "digits_easy-71b3b074b1",
    "digits_hard": "digits_hard-db3ba52d31",
    "digits_init": "digits_init-eb3c6dc5a8",
    "digits_noise10_all": "digits_all-c40ffead10",
    "digits_noise10_all_half": "digits_all-cb57748fc6",
    "digits_noise10_easy": "digits_easy-309910f396",
    "digits_noise10_random": "digits_random-87b0ce27ba",
    "digits_noise50_all": "digits_all-812364b89f",
    "digits_noise50_all_half": "digits_all-612e35179f",
    "digits_noise50_easy": "digits_easy-b0d4dea261",
    "digits_noise50_random": "digits_random-2e85e9b9c1",
    "digits_random": "digits_random-c98dc121b5",
}


def test_run_ids_are_frozen():
    ids = {path.stem: run_name(loading.load_config(path)) for path in YAMLS}
    assert ids == IDS


def test_the_id_of_an_arm_that_uses_scores_is_frozen(tiny):
    settings = ["pretrain.label_noise=0.1", "scores.networks=10", "scores.steps=7800"]
    assert run_id(load(tiny, *settings, arm="easy")) == "2858869c85"


TABLE_1 = {
    "cifar10": {"depth": 20, "batch": 128, "pretrain": 0.4, "milestones": (31_200, 46_800), "steps": 62_400, "t": 400},
    "cinic10": {"depth": 56, "batch": 256, "pretrain": 0.1, "milestones": (15_625, 23_440), "steps": 31_250, "t": 800},
    "cifar100": {"depth": 32, "batch": 128, "pretrain": 0.4, "milestones": (31_200, 46_800), "steps": 62_400, "t": 800},
}


@pytest.mark.parametrize("dataset", TABLE_1)
def test_the_yaml_files_match_table_1_of_the_paper(dataset):
    row = TABLE_1[dataset]
    arms = {"init": 0, "all": row["t"], "all_half": row["t"] // 2, "random": row["t"] // 2}
    for arm, rewind_step in arms.items():
        loaded = loading.load_config(ROOT / "yamls" / f"{dataset}_{arm}.yaml")
        train = loaded.train
        assert loaded.dataset.name == dataset
        assert (loaded.model.depth, loaded.model.width) == (row["depth"], 16)
        assert (train.batch_size, train.steps, train.milestones) == (row["batch"], row["steps"], row["milestones"])
        assert (train.lr, train.momentum, train.weight_decay, train.gamma) == (0.1, 0.9, 1e-4, 0.1)
        assert loaded.pretrain.lr == row["pretrain"]
        assert (loaded.prune.fraction, loaded.prune.levels) == (0.2, 16 if dataset == "cinic10" else 20)
        assert loaded.rewind_step == rewind_step
        assert loaded.replicates == (0, 1, 2, 3)
        assert (loaded.scores.networks, loaded.scores.steps) == (10, 8000 if dataset == "cinic10" else 7800)
        assert loaded.arm == arm.removesuffix("_half")


def test_the_header_of_every_yaml_file_shows_its_command():
    for path in (ROOT / "yamls").glob("*.yaml"):
        assert f"recipes/imp.py -f yamls/{path.name}\n" in path.read_text()


@pytest.mark.parametrize("path", sorted((ROOT / "yamls").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_yaml_file_can_be_planned(path, place):
    write_image_folder(place / "data/mine", {"train": 80, "test": 1})
    catalog.info.cache_clear()
    loaded = loading.load_config(path)
    run = RunDirectory(loaded)
    scores = ScoresDirectory(loaded) if loaded.needs_scores else None
    planned = plan.plan(run, scores)
    levels = loaded.prune.levels
    assert planned.count(f"level {levels}") == len(loaded.replicates)
    steps = len(loaded.replicates) * (loaded.rewind_step + (levels + 1) * (loaded.train.steps - loaded.rewind_step))
    steps += loaded.scores.networks * loaded.scores.steps if loaded.needs_scores else 0
    assert planned.endswith(f"total: {steps:,} steps to train")
    assert [path.name for path in place.iterdir()] == ["data"]


SIZES = {"cifar10": 12_800, "cifar100": 2048, "cinic10": 51_200, "cifar10_noise10": 2048, "cifar10_noise50": 3200}


def test_the_yaml_files_have_the_subset_sizes_of_the_paper():
    for family, size in SIZES.items():
        for arm in ("random", "easy") if "noise" in family else ("random", "easy", "hard"):
            loaded = loading.load_config(ROOT / f"yamls/{family}_{arm}.yaml")
            assert (loaded.arm, loaded.subset_size) == (arm, size)
            assert loaded.rewind_step == (200 if family.startswith("cifar10_") or family == "cifar10" else 400)
            assert loaded.label_noise == {"10": 0.1, "50": 0.5}.get(family[-2:] if "noise" in family else "", 0)


def test_a_stack_of_one_is_not_part_of_an_identity_and_a_larger_one_is_part_of_both(tiny):
    one, four = (load(tiny, f"stack={stack}", "replicates=4", arm="easy") for stack in (1, 4))
    for identity in (run_ids.run_identity, run_ids.scores_identity):
        assert "stack" not in identity(one) and identity(four)["stack"] == 4
        assert set(identity(four)) == {*identity(one), "stack"}
    assert run_id(one) == run_id(load(tiny, arm="easy")) != run_id(four)
    assert scores_id(one) == scores_id(load(tiny, arm="easy")) != scores_id(four)


SHARED = ["arm=hard", "arm=all", "pretrain.steps=5", "pretrain.subset.size=64", "prune.fraction=0.3", "replicates=2"]


@pytest.mark.parametrize(
    "override", [*SHARED, "train.steps=20", "pretrain.lr=0.3", "train.milestones=[6, 10]", "train.gamma=0.3"]
)
def test_arms_with_equal_scoring_settings_share_one_scores_id(tiny, override):
    assert scores_id(load(tiny, override, arm="easy")) == scores_id(load(tiny, arm="easy"))


SCORED = [
    "scores.networks=3",
    "scores.steps=8",
    "pretrain.label_noise=0.1",
    "seed=1",
    "threads=2",
    "train.lr=0.3",
    "variant=tanh",
]


@pytest.mark.parametrize("override", [*SCORED, "model.width=4", "train.milestones=[5]", "train.gamma=0.3"])
def test_fields_that_change_the_scores_change_the_scores_id(tiny, override):
    drop = "train.milestones=[4]"
    assert scores_id(load(tiny, drop, override, arm="easy")) != scores_id(load(tiny, drop, arm="easy"))


SCORES_IDS = {
    "cifar10_easy": "677709013f",
    "cifar10_hard": "677709013f",
    "cifar10_noise10_easy": "c07d9c28bd",
    "cifar10_noise50_easy": "4c9ef52eff",
    "cifar100_easy": "340f096531",
    "cinic10_hard": "21d3a1f4d5",
    "digits_easy": "2809c3c58d",
}


def test_scores_ids_are_frozen():
    ids = {name: scores_id(loading.load_config(ROOT / f"yamls/{name}.yaml")) for name in SCORES_IDS}
    assert ids == SCORES_IDS


def test_the_id_depends_on_the_content_of_a_score_file_and_not_on_the_scoring_settings(tiny, place):
    for name, value in (("a", 0.5), ("b", 0.5), ("c", 0.7)):
        artifact.save_scores(
            place / name, np.full((1, 1442), value, np.float32), np.zeros(1442, int), "digits", "digits"
        )
    given = [f"scores.file={name}/scores.safetensors" for name in "abc"]
    ids = [run_id(load(tiny, file, arm="easy")) for file in given]
    assert ids[0] == ids[1] != ids[2]
    assert run_id(load(tiny, given[0], "scores.networks=3", arm="easy")) == ids[0]
    assert run_id(load(tiny, given[0])) == run_id(load(tiny)), "the random arm ignores scores"
    assert run_id(load(tiny, arm="easy")) not in ids


BAD = {
    "train.lrr=1": r"train.lrr on the command line is not a known key; did you mean train\??",
    "trian.lr=1": r"trian on the command line is not a known key; did you mean train\?",
    "zzzzzz=1": r"zzzzzz on the command line is not a known key; known keys are arm, dataset",
    "train.lr=fast": r"train.lr = 'fast' on the command line: must be a number",
    "train.lr=true": r"train.lr = true on the command line: must be a number",
    "train.lr=.nan": r"train.lr = nan on the command line: must be a finite number",
    "train.lr=0": r"train.lr = 0 on the command line: must be greater than 0",
    "train=5": r"train = 5 on the command line: must be a section of keys",
    "train.batch_size=12.5": r"train.batch_size = 12.5 on the command line: must be an integer",
    "train.batch_size=9999": r"train.batch_size = 9999 on the command line: must be at most 1442, the number of training images",
    "train.steps=10sp": r"train.steps = '10sp' on the command line: must be a number of batches, such as 400",
    "train.steps=4": r"pretrain.steps = 4 in .*tiny.yaml: must be between 1 and 3 \(less than train.steps\)",
    "pretrain.steps=12": r"pretrain.steps = 12 on the command line: must be between 1 and 11 \(less than train.steps\)",
    "pretrain.steps=0": r"pretrain.steps = 0 on the command line: must be between 1 and 11",
    "train.milestones=[9, 6]": r"train.milestones = \[9, 6\] on the command line: must be increasing steps",
    "train.milestones=[x]": r"train.milestones.0 = 'x' on the command line: must",
    "pretrain.subset.size=2000": r"pretrain.subset.size = 2000 on the command line: must be between 64 \(one batch\) and 1442",
    "pretrain.subset.size=63": r"pretrain.subset.size = 63 on the command line: must be between 64 \(one batch\) and 1442",
    "pretrain.subset=": r"pretrain.subset = null on the command line: must be {size: M} for arm: random",
    "prune.fraction=0": r"prune.fraction = 0 on the command line: must be greater than 0",
    "prune.fraction=1.0": r"prune.fraction = 1.0 on the command line: must be less than 1",
    "prune.levels=-1": r"prune.levels = -1 on the command line: must be greater than or equal to 0",
    "model.depth=21": r"model.depth = 21 on the command line: must be 6n \+ 2, such as 20, 32 or 56",
    "dataset.name=imagenet": r"dataset.name = 'imagenet' on the command line: must be 'cifar10', 'cifar100'",
    "arm=medium": r"arm = 'medium' on the command line: must be 'init', 'all', 'random', 'easy' or 'hard'",
    "replicates=0": r"replicates = 0 on the command line: must be a count between 1 and 1000, such as 4, or a list of distinct",
    "replicates=300000000": r"replicates = 300000000 on the command line: must be a count between 1 and 1000",
    "seed=5000000000": r"seed = 5000000000 on the command line: must be less than 4294967296",
    "replicates=[1, 1]": r"replicates = \[1, 1\] on the command line: must",
    "seed=-1": r"seed = -1 on the command line: must",
    "parallelism=pipeline": r"parallelism = 'pipeline' on the command line: must be 'replicates' or 'data'",
    "train.lr": r"command line: 'train.lr' is not an override; expected key.sub=value",
    "=3": r"command line: '=3' is not an override",
    "train.lr=[": r"train.lr on the command line: invalid YAML",
    "dataset.name=image_folder": r"dataset.root = 'data' on the command line: data does not exist; expected a folder with",
}


@pytest.mark.parametrize("override", BAD)
def test_an_invalid_override_is_reported_with_key_value_place_and_expectation(tiny, override):
    with pytest.raises(UserError, match=BAD[override]) as error:
        load(tiny, override)
    assert "\n" not in str(error.value)


BAD_FILES = {
    "a: [1": r"bad.yaml: invalid YAML in line 1",
    "- a list": r"bad.yaml: not a configuration",
    "": r"bad.yaml: not a configuration",
    "arm: all\narm: init": r"bad.yaml: invalid YAML in line 2: the key 'arm' is given twice",
    "arm: !!python/object/apply:os.mkdir [trap]": r"bad.yaml: invalid YAML in line 1",
    "base: missing.yaml\narm: all": r"missing.yaml, the base of bad.yaml, cannot be read: No such file or directory",
    "base: bad.yaml\narm: all": r"base = 'bad.yaml' in bad.yaml: must not lead back to this file",
    "base: 3": r"base = 3 in bad.yaml: must be a path",
    "arm: all": r"dataset is missing in bad.yaml",
    "3: 4": r"bad.yaml: not a configuration",
    "train.lr: 0.1": r"train.lr in bad.yaml is not a known key; write train: {lr: ...}",
}


@pytest.mark.parametrize("text", BAD_FILES)
def test_an_invalid_file_is_reported_by_name(place, text):
    (place / "bad.yaml").write_text(text)
    with pytest.raises(UserError, match=BAD_FILES[text]):
        loading.load_config("bad.yaml")
    assert not (place / "trap").exists()


def test_missing_and_binary_files_are_reported_by_name(place):
    with pytest.raises(UserError, match=r"nowhere\.yaml cannot be read: No such file or directory"):
        loading.load_config("nowhere.yaml")
    Path("binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"binary\.yaml cannot be read: not UTF-8 text"):
        loading.load_config("binary.yaml")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.floats() | st.text(string.printable, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(string.ascii_lowercase, max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
KEYS = st.sampled_from(sorted(run_ids.DEFAULTS) + [key.rpartition(".")[0] for key in run_ids.DEFAULTS if "." in key])


@given(st.dictionaries(KEYS, VALUES, max_size=4))
def test_any_value_of_any_key_is_accepted_or_rejected_with_one_sentence(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.yaml"
    path.write_text(TINY.format(arm="random"))
    try:
        loaded = loading.load_config(path, [f"{key}={json.dumps(value)}" for key, value in values.items()])
        assert len(run_id(loaded)) == 10
    except UserError as error:
        assert "\n" not in str(error)


STEP_KEYS = ["train.steps", "pretrain.steps", "scores.steps", "intervals.log", "intervals.checkpoint"]


def test_steps_in_epochs_are_steps(tiny):
    base = ["train.steps=2200", "train.milestones=[440,660]", "intervals.evaluate=22"]
    batches = [f"{key}=44ba" for key in STEP_KEYS[1:]]
    epochs = ["train.steps=100ep", "train.milestones=[20ep,30ep]", "intervals.evaluate=1ep"]
    epochs += [f"{key}=2ep" for key in STEP_KEYS[1:]]  # 1,442 images // 64 = 22 batches, also under a subset
    assert load(tiny, *epochs, arm="easy") == load(tiny, *base, *batches, arm="easy")
    assert load(tiny, "train.steps=3ep", "train.batch_size=100").train.steps == 42
    assert load(tiny, "train.steps=50ep", "pretrain.steps=1ep", "pretrain.subset.size=64").pretrain.steps == 22


@pytest.mark.parametrize("value", ["1.5ep", "-1ep", "ep", "1 ep", "01ep", "1EP"])
def test_epochs_are_whole_numbers(tiny, value):
    with pytest.raises(UserError, match="train.steps = .* (must be a number of batches|one reading|readings|write)"):
        load(tiny, f"train.steps={value}")


@pytest.mark.parametrize("setting", ["train.batch_size=0", "train.batch_size=9999", "dataset.name=mnist"])
def test_epochs_of_an_invalid_dataset_or_batch_size_report_that(tiny, setting):
    with pytest.raises(UserError, match=f"^{setting.split('=')[0]} = "):
        load(tiny, "train.steps=50ep", setting)


def test_a_size_or_flip_that_changes_nothing_is_not_part_of_the_run_id(tiny):
    known = run_id(load(tiny))
    assert run_id(load(tiny, "dataset.size=8", "dataset.flip=false")) == known
    assert len({known, run_id(load(tiny, "dataset.size=4")), run_id(load(tiny, "dataset.flip=true"))}) == 3
    for setting in ("dataset.flip=1", "dataset.size=8.0"):
        with pytest.raises(UserError, match=f"^{setting[:12]} = "):
            load(tiny, setting)
    cifar = ["dataset.name=cifar10", "dataset.size=32", "dataset.flip=true"]
    assert run_id(load(tiny, *cifar)) == run_id(load(tiny, "dataset.name=cifar10"))


def test_an_experiment_is_named_after_the_image_folder_and_a_run_keeps_its_own(tiny, place):
    write_image_folder(place / "data/mine", {"train": 40, "test": 1})
    catalog.info.cache_clear()
    folder = ["dataset.name=image_folder", "dataset.root=data/mine", "experiment=null"]
    assert load(tiny, *folder, arm="all").experiment_name == "mine"
    assert load(tiny, "experiment=null").experiment_name == "digits"
    RunDirectory(load(tiny, *folder[:2], "experiment=first", arm="all")).create()
    run = RunDirectory(load(tiny, *folder, arm="all"))
    run.create()
    assert read_config(run.path)["experiment"] == "first"
    run = RunDirectory(load(tiny, *folder[:2], "experiment=second", arm="all"))
    run.create()
    assert read_config(run.path)["experiment"] == "second"
