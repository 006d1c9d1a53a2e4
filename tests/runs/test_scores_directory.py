from helpers import MEASURED

from lth_diet.config import loading
from lth_diet.runs.scores_directory import ScoresDirectory


def test_repr_shows_path_and_state(tiny):
    scores = ScoresDirectory(loading.load_config(tiny("easy")))
    scores.create()
    scores.network(0).write("curve.jsonl", b"")
    scores.network(0).finish(MEASURED)
    assert repr(scores) == f"ScoresDirectory({scores.path}, 1 of 2 networks done)"
    (scores.path / "manifest.json").write_text("{}")
    assert repr(scores) == f"ScoresDirectory({scores.path}, done)"
