from helpers import MEASURED

from lth_diet.config import loading
from lth_diet.runs.scores_directory import ScoresDirectory


def test_scores_are_done_once_they_have_a_manifest(tiny):
    scores = ScoresDirectory(loading.load_config(tiny("easy")))
    scores.create()
    scores.network(0).write("curve.jsonl", b"")
    scores.network(0).finish(MEASURED)
    assert [network.done for network in scores.networks()] == [True, False] and not scores.done
    (scores.path / "manifest.json").write_text("{}")
    assert scores.done
