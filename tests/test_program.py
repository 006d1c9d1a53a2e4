"""The outermost frame of every program: closed streams, encodings, users without a home folder."""

import os
import re
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, run, start

PROGRAMS = [path for folder in ("recipes", "analysis", "lth_diet") for path in (ROOT / folder).rglob("*.py")]
PROGRAMS = [path for path in PROGRAMS if "__name__ ==" in path.read_text()]
KEYS = [sys.executable, "-m", "lth_diet", "keys"]
LONG = """
import sys
from lth_diet.program import run_program
run_program(lambda: print("line\\n" * 99_999, file=sys.{stream}) or print("±", file=sys.{stream}) or 3)
"""


def test_every_program_starts_in_the_same_frame():
    assert len(PROGRAMS) >= 16
    for path in PROGRAMS:
        assert path.read_text().endswith('\n\nif __name__ == "__main__":\n    run_program(main)\n'), path


def environment(**values):
    return {**os.environ, "PYTHONPATH": str(ROOT), **values}


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_program_whose_reader_is_gone_ends_without_a_word(stream):
    reader, writer = os.pipe()
    os.close(reader)
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | {stream: writer}
    done = subprocess.run([sys.executable, "-c", LONG.format(stream=stream)], env=environment(), **streams)
    os.close(writer)
    assert (done.returncode, done.stdout or b"", done.stderr or b"") == (3, b"", b"")


def test_output_to_a_full_disk_is_an_error_of_one_sentence():
    with open("/dev/full", "w") as full:
        done = subprocess.run(KEYS, stdout=full, stderr=subprocess.PIPE, text=True, env=environment())
    assert (done.returncode, done.stderr) == (1, "error: the output cannot be written (No space left on device)\n")


STOPPED = "stopped; rerun the same command to resume\n"


@pytest.mark.parametrize(
    ("end", "status"), [("raise KeyboardInterrupt", 130), ("sys.exit(130)", 130), ("sys.exit(143)", 143)]
)
@pytest.mark.parametrize(("rank", "output"), [("0", STOPPED), ("1", "")])
def test_an_interrupt_is_one_line_of_the_first_rank(end, status, rank, output):
    script = f"import sys\nfrom lth_diet.program import run_program\ndef main():\n    {end}\nrun_program(main)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment(RANK=rank))
    assert (done.returncode, done.stdout, done.stderr) == (status, "", output)


def test_an_interrupted_training_ends_with_one_line_and_resumes(tiny, place):
    process = start(tiny(), "train.steps=3000", "intervals.checkpoint=5", "prune.levels=0")
    while not list(place.glob("runs/*/replicate_0/level_0/checkpoint.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.endswith(STOPPED) and "Traceback" not in err
    planned = run(tiny(), "train.steps=3000", "prune.levels=0", "--plan")[1]
    assert "resumes at step" in planned


@pytest.mark.parametrize("settings", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1:strict"}])
def test_characters_that_the_encoding_lacks_are_printed_as_escapes(settings):
    script = "from lth_diet.program import run_program\nrun_program(lambda: print('1 ± 2 猫'))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, env=environment(**settings))
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout in (b"1 \\xb1 2 \\u732b\n", b"1 \xb1 2 \\u732b\n")


UNKNOWN = {"HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "LTH_DIET_CACHE", "XDG_CACHE_HOME"}
NOBODY = """
import getpass, os, pwd, re, sys
def unknown(uid): raise KeyError(uid)
pwd.getpwuid = unknown  # a user without passwd entry
import lth_diet
from pathlib import Path
from lth_diet.files import cache_folder
assert str(cache_folder()).startswith(str(Path.home())) and getpass.getuser() == str(os.getuid())
print(Path.home())
"""


def test_a_user_without_home_and_name_gets_a_private_folder_which_stays_the_same(place):
    variables = {key: value for key, value in environment(TMPDIR=str(place)).items() if key not in UNKNOWN}
    runs = [
        subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, env=variables) for _ in range(2)
    ]
    assert all(done.returncode == 0 for done in runs), runs[0].stderr
    assert [done.stdout for done in runs] == [f"{place}/home-{os.getuid()}\n"] * 2
    (place / f"home-{os.getuid()}").chmod(0o777)  # others could have written to it
    done = subprocess.run([sys.executable, "-c", NOBODY], capture_output=True, text=True, env=variables)
    assert re.fullmatch(rf"{place}/tmp\w+\n", done.stdout), done.stderr
