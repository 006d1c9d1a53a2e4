import pytest

from lth_diet.config import loading
from lth_diet.errors import UserError
from lth_diet.files import read_json, write_json
from lth_diet.runs.run_directory import RunDirectory


def test_nothing_is_written_before_create(tiny, place):
    RunDirectory(loading.load_config(tiny()))
    assert not (place / "runs").exists()


def test_a_directory_of_a_different_configuration_is_rejected_and_the_key_named(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    path = run.path / "config.json"
    content = read_json(path)
    content["identity"]["train.lr"] = 0.7
    write_json(path, content)
    with pytest.raises(
        UserError, match=r"was created with a different configuration: train\.lr is 0\.7 there, 0\.1 here"
    ):
        RunDirectory(loading.load_config(tiny()))


def test_a_field_that_an_old_run_lacks_has_its_default(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    path = run.path / "config.json"
    content = read_json(path)
    del content["identity"]["deterministic"]
    write_json(path, content)
    assert RunDirectory(loading.load_config(tiny())).path == run.path


@pytest.mark.parametrize("content", ["", "[]", '{"x": 1}'])
def test_a_damaged_config_json_is_rejected(tiny, content):
    run = RunDirectory(loading.load_config(tiny()))
    run.create()
    (run.path / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged or was not written by lth_diet; move it away"):
        RunDirectory(loading.load_config(tiny()))


def test_a_folder_of_other_files_is_rejected(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.path.mkdir(parents=True)
    (run.path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not a run directory"):
        RunDirectory(loading.load_config(tiny()))


def test_a_directory_that_another_rank_is_creating_is_accepted(tiny):
    run = RunDirectory(loading.load_config(tiny()))
    run.path.mkdir(parents=True)
    (run.path / ".config.json.part-123").write_text("{")
    assert RunDirectory(loading.load_config(tiny())).path == run.path


@pytest.mark.parametrize("runs", ["/proc/nope", "tiny.yaml"])
def test_an_unwritable_folder_is_reported(tiny, runs):
    with pytest.raises(UserError, match=r"runs = '.*': cannot be written \(.+\); expected a writable folder"):
        RunDirectory(loading.load_config(tiny(), [f"runs={runs}"])).create()
