from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from lth_diet.networks.parameters import bare_names, enumerate_names, match_names

names = st.lists(
    st.lists(st.sampled_from(["module", "conv", "fc", "weight"]), min_size=1, max_size=4).map(".".join),
    min_size=1,
    max_size=5,
    unique=True,
)
prefixes = st.lists(st.sampled_from(["module", "_orig_mod"]), max_size=3).map(
    lambda parts: "".join(f"{p}." for p in parts)
)


@given(names, prefixes)
@example(["module.module.module.module"], "module.")
def test_every_name_is_found_behind_the_prefixes_of_wrappers(names, prefix):
    wrapped = [prefix + name for name in names]
    assert match_names(names, wrapped) == dict(zip(names, wrapped, strict=True))
    assert match_names(wrapped, names) == dict(zip(wrapped, names, strict=True))


@given(names, prefixes)
def test_bare_names_do_not_depend_on_wrappers(names, prefix):
    assert list(bare_names(prefix + name for name in names)) == list(bare_names(names))


def test_an_attribute_called_module_is_part_of_a_name():
    network = nn.ModuleDict({"module": nn.Linear(2, 2), "fc": nn.Linear(2, 2)})
    own = [name for name, _ in network.named_parameters()]
    assert list(bare_names(f"module.{name}" for name in own)) == own
    assert match_names(["fc.weight", "weight"], own) == {"fc.weight": "fc.weight"}


def test_names_in_a_sentence_are_at_most_ten():
    assert enumerate_names(map(str, range(12))) == "0, 1, 2, 3, 4, 5, 6, 7, 8, 9 and 2 more"
    assert enumerate_names(["a", "b"]) == "a, b"
