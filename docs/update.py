"""Rewrites what the documentation shows of the code and of the quickstart.

python docs/update.py                 the tables of keys and claims
python docs/update.py --check         says which pages are out of date, and exits with 1
python docs/update.py --quickstart    also the times and the picture of the README: installs, runs `make quickstart` and
                                      `make test` in a new clone of the last commit
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from analysis import claims, collect, figures, paper  # noqa: E402
from lth_diet.config import keys  # noqa: E402
from lth_diet.config.schema import Config  # noqa: E402
from lth_diet.sweep.grid import Settings  # noqa: E402

RESULTS = ROOT / "analysis/results"
MARGIN, LEVELS, CONFIDENCE = 0.3, (3, 12), 0.95


def pages() -> dict[Path, str]:
    """Pages with generated tables, and the text that they should have."""
    tables = {
        "configuration": [keys.table(Config)],
        "sweeps": [keys.table(Settings)],
        "statistics": claims.table(collect.published(), MARGIN, LEVELS, CONFIDENCE).split("\n\n"),
    }
    for name in ("digits", "cifar10_small", "cifar10_overnight"):
        results = collect.load(RESULTS / f"{name}.csv.gz")
        tables[name] = claims.table(results, None, None, CONFIDENCE).split("\n\n")[:1]
    texts = {}
    for name, generated in tables.items():
        path = ROOT / f"docs/{name}.md"
        texts[path] = path.read_text()
        for table in generated:
            header = re.escape(table.splitlines()[0])
            texts[path] = re.sub(rf"^{header}\n(\|.*\n)*", lambda _, table=table: f"{table}\n", texts[path], flags=re.M)
    return texts


def run_quickstart(clone: Path) -> None:
    """Run the README's two commands in a new clone, and write their times and the picture of the digits."""
    subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
    times = {}
    for target in (".venv/installed", "quickstart", "test"):
        begin = time.monotonic()
        subprocess.run(["make", "-C", clone, target], check=True)
        minutes, seconds = divmod(round(time.monotonic() - begin), 60)
        times[target] = f"{minutes} min {seconds} s"
    sentence = "On {} CPU cores, the installation took {}, the quickstart {} and the tests {}."
    readme = ROOT / "README.md"
    pattern = sentence.replace(".", r"\.").replace("{}", r"[\w ]+")
    text, count = re.subn(pattern, sentence.format(os.cpu_count(), *times.values()), readme.read_text())
    assert count == 1, "the README has no sentence of times"
    readme.write_text(text)
    picture(f"sqlite:///{clone}/mlflow.db", "digits", ROOT / "docs/quickstart.png")


def picture(tracking_uri: str, experiment: str, path: Path) -> None:
    """Draw the large figure of a report, of the results without label noise."""
    ((dataset, curves),) = collect.results_by_dataset(collect.collect(tracking_uri, experiment)).items()
    family = next(family for family in paper.families(dataset, curves) if not family.label_noise)
    figures.headline_figure(figures.Panel(family, family.size), curves).savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--quickstart", action="store_true")
    arguments = parser.parse_args()
    stale = {path: text for path, text in pages().items() if path.read_text() != text}
    if arguments.check:
        for path in stale:
            print(f"{path}: out of date; run python docs/update.py")
        return int(bool(stale))
    for path, text in stale.items():
        path.write_text(text)
    if arguments.quickstart:
        with tempfile.TemporaryDirectory() as folder:
            run_quickstart(Path(folder) / "lth_diet")
    return 0


if __name__ == "__main__":
    sys.exit(main())
