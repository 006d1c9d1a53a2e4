import re

from helpers import ROOT

README = (ROOT / "README.md").read_text()


def test_the_algorithms_run_in_a_trainer_as_the_readme_shows(capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    names = {}
    exec(block, names)
    assert names["mask"].density == 1212 / 2368
    network = dict(names["network"].named_parameters())
    assert all(bool((network[name][~left] == 0).all()) for name, left in names["mask"].items())
    assert "0.weight" in capsys.readouterr().out


def test_the_readme_names_every_module_and_requirement():
    modules = {path.name for path in (ROOT / "lth_diet").glob("*.py")} - {"__init__.py", "errors.py"}
    assert all(name in README for name in modules)
    required = re.findall(r"^[A-Za-z0-9-]+", (ROOT / "requirements.in").read_text(), flags=re.M)
    assert len(required) > 10 and all(name in README for name in required)
