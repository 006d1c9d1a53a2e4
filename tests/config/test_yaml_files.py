import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from lth_diet.config import loading, yaml_files
from lth_diet.errors import UserError

AMBIGUOUS = {
    "0400": "0400 is 256 in YAML 1.1 (octal) and 400 in YAML 1.2; write 400 or 256, or quote it if it is text",
    "-010": "-010 is -8 in YAML 1.1 (octal) and -10 in YAML 1.2; write -10 or -8",
    "0_400": "0_400 is 256 in YAML 1.1 (octal) and 400 in YAML 1.2",
    "089": "089 starts with a zero, as octal numbers do in YAML 1.1; write 89",
    "007": "007 starts with a zero, as octal numbers do in YAML 1.1; write 7",
    "00": "write 0, or quote it",
    "0400ba": "write 400ba, or quote it",
    "00.5": "write 0.5, or quote it",
    "01e-3": "write 1e-3, or quote it",
    "1:30": "1:30 is 90 in YAML 1.1 (base 60) and text in YAML 1.2; write 90, or quote it if it is text",
    "1:30.5": "1:30.5 is 90.5 in YAML 1.1 (base 60)",
    "-1:30:00": "-1:30:00 is -5400 in YAML 1.1 (base 60)",
    "0o10": "0o10 is 8 in YAML 1.2 (octal) and text in YAML 1.1; write 8",
}


@pytest.mark.parametrize("text", AMBIGUOUS)
@pytest.mark.parametrize("around", ["{}", "[1, {}]", "{{a: {{b: {}}}}}", "{{{}: 1}}", "- {}"])
def test_a_number_with_two_readings_is_rejected_with_both_wherever_it_is(text, around):
    with pytest.raises(UserError) as error:
        yaml_files.parse(around.format(text), "here")
    assert AMBIGUOUS[text] in str(error.value) and str(error.value).startswith("here: ")


@pytest.mark.parametrize("text", AMBIGUOUS)
@pytest.mark.parametrize("quotes", ["'{}'", '"{}"', "{} x", "x{}", "s3://{}"])
def test_the_same_characters_in_a_text_are_text(text, quotes):
    assert text in yaml_files.parse(quotes.format(text), "here")


READ = {"1_000": 1000, "0x10": 16, "0b11": 3, "+5": 5, ".5": 0.5, "0": 0, "0.5": 0.5, "1e3": "1e3", "1.0e+3": 1000.0}
READ |= {"2026-11-26": "2026-11-26", "2026-11-26 10:00:00": "2026-11-26 10:00:00", "1,000": "1,000", "yes": True}


@pytest.mark.parametrize("text", READ)
def test_a_number_with_one_reading_is_accepted_and_a_date_is_text(text):
    value = yaml_files.parse(text, "here")
    assert value == READ[text] and type(value) is type(READ[text])


@given(st.from_regex(r"[-+]?[0-9_]{1,6}([.:eE][-+0-9_:.]{0,6})?(ba)?", fullmatch=True))
@settings(max_examples=300)
def test_an_accepted_number_is_read_as_its_digits_say(text):
    try:
        value = yaml_files.parse(text, "here")
    except UserError:
        return
    if isinstance(value, int | float):
        assert value == float(text.replace("_", ""))
    elif not isinstance(value, dict):  # `1:` is a section
        assert value == text


def test_a_number_on_the_command_line_is_rejected_by_its_key(tiny):
    with pytest.raises(UserError, match=r"^train.steps on the command line: 0400 is 256"):
        loading.load_config(tiny(), ["train.steps=0400"])
    with pytest.raises(UserError, match=r"^train on the command line: lr: 010 is 8"):
        loading.load_config(tiny(), ["train={lr: 010}"])


@pytest.mark.parametrize("text", ["'0400'", "'0400ba'", "'1:30'", "' 400'", "'٤٠٠'", "'400 '", "4e2", "400.0"])
def test_quoted_steps_have_one_reading_too(tiny, text):
    with pytest.raises(UserError, match=r"train.steps = .* must be a number of batches, such as 400 or 400ba"):
        loading.load_config(tiny(), [f"train.steps={text}"])


@pytest.mark.parametrize("text", ["'010'", "'1:30'", "' 1'", "'٣'", "1,5", "0x", "."])
def test_quoted_numbers_have_one_reading_too(tiny, text):
    with pytest.raises(UserError, match=r"train.lr = .* must be a number"):
        loading.load_config(tiny(), [f"train.lr={text}"])


@pytest.mark.parametrize(("text", "lr"), [("1e3", 1000), ("1E-3", 0.001), ("5.", 5), ("1_0.5", 10.5), ("'.5e1'", 5)])
def test_decimal_and_scientific_notation_are_numbers(tiny, text, lr):
    assert loading.load_config(tiny(), [f"train.lr={text}"]).train.lr == lr


@pytest.mark.parametrize(("text", "steps"), [("1_000", 1000), ("1_000ba", 1000), ("0x20", 32), ("0b1_0000", 16)])
def test_underscores_and_hexadecimal_numbers_are_what_they_say(tiny, text, steps):
    assert loading.load_config(tiny(), [f"train.steps={text}"]).train.steps == steps


def test_a_value_in_a_message_is_written_as_in_yaml():
    value = {"a": [True, None, 1.5], "b": "x\x1b"}
    assert yaml_files.quote(value) == "{'a': [true, null, 1.5], 'b': 'x\\x1b'}"
    assert yaml.safe_load(yaml_files.quote([True, None, "x"])) == [True, None, "x"]
