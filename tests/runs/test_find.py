from lth_diet.__main__ import main


def test_a_folder_without_runs_is_rejected(place, capsys):
    assert main(["verify", str(place)]) == 2
    assert "contains no runs" in capsys.readouterr().err


def test_the_error_for_a_url_names_the_command_that_copies_it(place, capsys):
    assert main(["verify", "s3://bucket/runs"]) == 2
    assert "python -m lth_diet pull <URL> <folder>" in capsys.readouterr().err
