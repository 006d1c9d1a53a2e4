import json

import pytest

from analysis import examples
from lth_diet.config import loading
from lth_diet.scoring import Scoring
from lth_diet.training.progress import Progress


@pytest.fixture
def artifact(tiny):
    """EL2N scores of the digits with label noise, from two networks."""
    loaded = loading.load_config(tiny("easy"), ["pretrain.label_noise=0.2"])
    scoring = Scoring(loaded, Progress([], 0), lambda: None, range(2))
    scoring.folder.create()
    scoring.run()
    return scoring.folder.path


def test_command_reproduces_the_files_that_scoring_wrote(artifact, place, capsys):
    assert examples.main([str(artifact), "-o", "out"]) == 0
    for name in ("summary.json", "histogram.png", "easiest.png", "hardest.png"):
        assert (place / "out" / name).read_bytes() == (artifact / "examples" / name).read_bytes()
    assert '"wrong_labels_roc_auc"' in capsys.readouterr().out


def test_command_draws_a_subset(artifact, place):
    assert examples.main([str(artifact), "--arm", "hard", "--size", "100", "--class-balanced", "-o", "out"]) == 0
    found = json.loads((place / "out/subset.json").read_text())
    assert found["size"] == 100 and set(found["classes"].values()) == {10}
    assert (place / "out/images.png").exists()


BAD = {
    "--arm easy": "--arm and --size must be given together",
    "--arm easy --size 2000": "--size = 2000: must be between 1 and 1442",
    "--arm easy --size 5 --offset 1440": "--size = 5: must be between 1 and 2",
    "--arm easy --size 5 --offset 2000": "--offset = 2000: must be between 0 and 1441",
    "--pixels 2": "--pixels = 2: must be between 4 and 1024",
    "--class-balanced": "--offset and --class-balanced require --arm and --size",
    "--root x -o /dev/null": "-o /dev/null: File exists; expected a writable folder",
}


@pytest.mark.parametrize("arguments", BAD)
def test_invalid_input_is_reported_in_one_sentence(artifact, place, capsys, arguments):
    assert examples.main([str(artifact), "-o", "out", *arguments.split()]) == 2
    err = capsys.readouterr().err
    assert BAD[arguments] in err and err.count("\n") == 1
    assert not (place / "out").exists()


def test_folder_without_scores_is_reported_in_one_sentence(place, capsys):
    assert examples.main([str(place), "-o", "out"]) == 2
    assert "manifest.json cannot be read (No such file or directory)" in capsys.readouterr().err
