import dataclasses

import pytest
from helpers import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st

from lth_diet.config import loading
from lth_diet.config.blocks import fills_blocks
from lth_diet.launch import checks, stacks
from lth_diet.launch.processes import ProcessInfo
from lth_diet.training import devices
from recipes import imp

FILES = [loading.load(ROOT / f"yamls/digits_{arm}.yaml") for arm in ("init", "all", "random")]
REPLICATES = st.one_of(
    st.integers(1, 64).map(range),
    st.lists(st.integers(0, 40), min_size=1, max_size=16, unique=True),
    st.lists(st.integers(0, 4), min_size=1, unique=True).map(
        lambda found: [4 * b + i for b in found for i in range(4)]
    ),
).map(tuple)


@given(
    st.integers(1, 1 << 24),
    st.sampled_from(["CPU", "GPU"]),
    st.lists(REPLICATES, min_size=1, max_size=3),
    st.data(),
)
def test_the_recommended_stack_is_accepted_by_the_checks(activations, device, replicates, data):
    ranks = data.draw(st.integers(1, min(sum(map(len, replicates)), 20)))
    stack, reason = stacks.recommended_stack(activations, device, ranks, replicates)
    assert 1 <= stack <= stacks.MAX_STACK and reason
    assert all(fills_blocks(indices, stack) for indices in replicates)
    files = [
        dataclasses.replace(file, config=file.config.model_copy(update={"replicates": indices, "stack": stack}))
        for file, indices in zip(FILES, replicates, strict=False)
    ]
    checks.check_imp(files, ProcessInfo(0, ranks, 0, "", 1))


@given(st.integers(1, 1 << 24), st.integers(1, 8), st.integers(1, 64))
def test_larger_layers_or_more_ranks_never_ask_for_larger_stacks(activations, ranks, count):
    def recommended(device="CPU", factor=1, more=0):
        return stacks.recommended_stack(activations * factor, device, ranks + more, [range(count)])[0]

    assume(count >= ranks)
    assert recommended(factor=2) <= recommended() <= recommended("GPU")
    assert recommended(more=1) <= recommended()


MEASURED = {("dataset.size=8", 4): 8, ("dataset.size=16", 8): 4, ("dataset.size=16", 16): 1, ("dataset.size=32", 16): 1}


@pytest.mark.parametrize(("size", "width"), MEASURED)
def test_the_recommended_stack_of_the_networks_that_were_measured(size, width):
    config = loading.load_config(ROOT / "yamls/digits_all.yaml", [size, f"model.width={width}"])
    assert config.train.batch_size == 64
    activations = stacks.count_activations(config)
    assert stacks.recommended_stack(activations, "CPU", 2, [range(16)])[0] == MEASURED[size, width]
    assert stacks.recommended_stack(activations, "GPU", 2, [range(16)])[0] == 8


ASKED = {
    "replicates=1": None,
    "replicates=16": "stack: 1; recommended for 16 replicates on 1 rank: 8 on a CPU or GPU (more replicates per step gain "
    "little); another stack is another run id",
    "replicates=6 stack=2": "stack: 2; recommended for 6 replicates on 1 rank: 6 on a CPU or GPU (the largest whose "
    "blocks they fill); another stack is another run id",
    "replicates=8 dataset.size=16 model.width=16": "stack: 1; recommended for 8 replicates on 1 rank: 1 on a CPU (layers of "
    "this size gain hardly anything), 8 on a GPU (more replicates per step gain little); another stack is another run id",
}


@pytest.mark.parametrize("overrides", ASKED)
def test_the_plan_names_the_recommended_stack_if_it_is_larger_or_the_run_is_stacked(
    place, capsys, monkeypatch, overrides
):
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    monkeypatch.setattr(devices, "_DRIVER_FILE", place / "driver")
    file = str(ROOT / "yamls/digits_all.yaml")
    assert imp.main(["-f", file, "--plan", "prune.levels=0", "stack=1", *overrides.split()]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == ASKED[overrides] if ASKED[overrides] else last.startswith("total: ")


def test_the_plan_assumes_what_is_known_of_the_gpus_without_torch(place, monkeypatch):
    monkeypatch.setattr(devices, "_DRIVER_FILE", place / "driver")
    monkeypatch.delenv(devices.VISIBLE, raising=False)
    assert stacks.possible_devices() == ["CPU", "GPU"]
    (place / "driver").touch()
    assert stacks.possible_devices() == ["GPU"]
    monkeypatch.setenv(devices.VISIBLE, "")
    assert stacks.possible_devices() == ["CPU"]


def test_the_plan_of_several_arms_recommends_one_stack_for_all_of_them_and_the_ranks(place, capsys, monkeypatch):
    monkeypatch.setenv(devices.VISIBLE, "")
    for key, value in {"WORLD_SIZE": "3", "RANK": "0", "LOCAL_RANK": "0", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(key, value)
    files = [word for arm in ("init", "all") for word in ("-f", str(ROOT / f"yamls/digits_{arm}.yaml"))]
    assert imp.main([*files, "--plan", "replicates=8"]) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "for 16 replicates on 3 ranks: 4 on a CPU (the largest whose blocks they fill, 3 or more)" in last
