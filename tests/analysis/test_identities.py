import json

import pytest

from analysis import identities
from lth_diet.config import loading
from lth_diet.config.run_ids import run_identity


@pytest.mark.parametrize("arm", ["init", "all", "random", "easy"])
def test_identity_survives_mlflow_as_text_and_lacks_only_defaults(tiny, arm):
    config = loading.load_config(tiny(arm), ["train.weight_decay=1e-5", "compile=true", "train.lr=1"])
    identity = json.loads(json.dumps(run_identity(config)))
    params = {key: str(value) for key, value in identity.items()}
    short = identities.from_params(params, "1")
    assert identities.normalize(short) == identities.normalize(identity)
    assert short["train.weight_decay"] == 1e-5 and short["compile"] is True and "threads" not in short
    assert "seed" not in identities.normalize(short) and "dataset.root" not in identities.normalize(short)


def test_keys_that_an_arm_ignores_and_missing_keys_do_not_matter():
    old = identities.normalize({"arm": "all", "dataset.name": "digits"})
    new = {"arm": "all", "dataset.name": "digits", "scores.networks": 3, "pretrain.subset.size": 9, "threads": 1}
    assert identities.normalize(new) == old
    assert identities.normalize(new | {"prune.levels": 4, "seed": 8}) == old
    assert identities.normalize(new | {"threads": 2}) != old
    stacked = identities.normalize(new | {"stack": 8})
    assert identities.normalize(new | {"stack": 1}) == old and identities.setup(stacked) == identities.setup(old)
    assert identities.differences(stacked, old) == ("", "stack = 8 and 1")


def test_ranks_belong_to_the_identity_only_if_they_train_one_replicate_together():
    assert "ranks" not in identities.from_params({"arm": "all"}, "4")
    assert identities.from_params({"parallelism": "data"}, "4") == {"parallelism": "data", "ranks": 4}


@pytest.mark.parametrize("text", ["1234567890123456", "1e10234567890123"])
def test_fingerprints_stay_text_even_if_they_look_like_numbers(text):
    assert identities.from_params({"dataset.fingerprint": text}, None) == {"dataset.fingerprint": text}
