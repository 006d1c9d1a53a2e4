import re

import pytest
from helpers import ROOT

from lth_diet.__main__ import main
from lth_diet.config import keys
from lth_diet.config.run_ids import DEFAULTS
from lth_diet.config.schema import Config
from lth_diet.sweep.grid import Settings

ROWS = {re.match(r"\| `(.*?)`", line)[1]: line for line in keys.table(Config).splitlines()[2:]}
PAGES = {Config: "configuration", Settings: "sweeps"}


def test_every_key_is_in_the_table_with_a_meaning():
    assert set(ROWS) == {key for key in DEFAULTS if f"{key}." not in "".join(f"{other} " for other in DEFAULTS)}
    for line in ROWS.values():
        assert len(line.split(" | ")[-1]) > 10


def test_types_defaults_and_ranges_are_those_of_the_schema():
    assert ROWS["train.steps"].startswith("| `train.steps` | batches | required | > 0 | ")
    assert ROWS["train.momentum"].startswith("| `train.momentum` | number | 0.9 | ≥ 0, < 1 | ")
    assert ROWS["precision"].startswith("| `precision` | auto, fp32, bf16 | auto |  | ")
    assert ROWS["model.width"].startswith("| `model.width` | integer | 16 | > 0, ≤ 1024 | ")
    assert ROWS["scores.file"].startswith("| `scores.file` | text | none |  | ")
    assert ROWS["compile"].startswith("| `compile` | true, false | false |  | ")


@pytest.mark.parametrize("section", PAGES)
def test_the_documentation_has_the_table_that_the_command_prints(capsys, section):
    assert main(["keys"]) == 0
    table = keys.table(section)
    assert table in capsys.readouterr().out
    assert f"\n{table}\n" in (ROOT / f"docs/{PAGES[section]}.md").read_text()
