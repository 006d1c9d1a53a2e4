import fractions
import json
import math
import warnings
from decimal import Decimal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from lth_diet.errors import UserError
from lth_diet.masks.mask import Mask
from lth_diet.masks.prunable import prunable
from lth_diet.masks.pruning import prune_by_magnitude
from lth_diet.networks.resnet import ResNet


def mask_of(*values, shape=None):
    return Mask({"a": torch.tensor(values, dtype=torch.bool).reshape(shape or (len(values),))})


def test_each_level_of_resnet_20_prunes_exactly_20_percent_rounded_up():
    network = ResNet(20, 10)
    weights = {name: weight.detach() for name, weight in prunable(network).items()}
    mask, remaining = Mask.dense(network), 270_896
    for _ in range(20):
        mask = prune_by_magnitude(weights, mask, 0.2)
        remaining -= math.ceil(fractions.Fraction(1, 5) * remaining)
        assert mask.remaining == remaining
    assert remaining == 3121


@given(
    st.lists(st.sampled_from([-2.0, -1.0, -0.0, 0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=40),
    st.floats(0.01, 0.99).map(lambda x: round(x, 2)),
    st.data(),
)
def test_pruning_equals_a_naive_reference(values, fraction, data):
    remains = data.draw(st.lists(st.booleans(), min_size=len(values), max_size=len(values)))
    cut = data.draw(st.integers(0, len(values)))
    weights = {"a": torch.tensor(values[:cut]), "b": torch.tensor(values[cut:])}
    mask = Mask(
        {"a": torch.tensor(remains[:cut], dtype=torch.bool), "b": torch.tensor(remains[cut:], dtype=torch.bool)}
    )
    order = sorted((abs(v), i) for i, v in enumerate(values) if remains[i])
    smallest = {i for _, i in order[: math.ceil(fractions.Fraction(str(fraction)) * len(order))]}
    if len(smallest) == len(order):
        with pytest.raises(ValueError, match="leaves none"):
            prune_by_magnitude(weights, mask, fraction)
        return
    pruned = prune_by_magnitude(weights, mask, fraction)
    expected = [remains[i] and i not in smallest for i in range(len(values))]
    assert torch.cat([pruned["a"], pruned["b"]]).tolist() == expected


def test_pruned_weights_stay_pruned_even_if_they_are_large():
    pruned = prune_by_magnitude({"a": torch.tensor([9.0, 1.0, 2.0])}, mask_of(False, True, True), 0.5)
    assert pruned == mask_of(False, False, True)


def test_ties_are_broken_by_position():
    assert prune_by_magnitude({"a": torch.tensor([1.0, -1.0, 1.0, 1.0])}, mask_of(1, 1, 1, 1), 0.5) == mask_of(
        0, 0, 1, 1
    )


def test_fraction_is_taken_as_a_decimal_number():
    # 0.07 * 100 is 7.000000000000001 in binary floating point
    pruned = prune_by_magnitude({"a": torch.arange(100.0)}, mask_of(*[1] * 100), 0.07)
    assert pruned.remaining == 93


@pytest.mark.parametrize(
    ("weights", "mask", "fraction", "message"),
    [
        *(({"a": torch.ones(1)}, mask_of(1), fraction, "between 0 and 1") for fraction in (0.0, 1.0, -0.2, math.nan)),
        ({"a": torch.ones(2)}, mask_of(1, 1), "0.2", "fraction is '0.2', a str; expected a number such as 0.2"),
        ({"a": torch.ones(2)}, mask_of(1, 0), 0.2, "pruning 0.2 of 1 remaining weights leaves none"),
        ({"b": torch.ones(2)}, mask_of(1, 1), 0.2, "the mask has a, which is not among the weights: b"),
        ({"a": torch.ones(1, 2)}, mask_of(1, 1), 0.2, r"the mask of a has shape \(2,\); expected \(1, 2\)"),
        (torch.nn.Linear(2, 2), mask_of(1, 1), 0.2, "expected weights by name, such as network.state_dict"),
        ({"a": torch.ones(2)}, [True, True], 0.2, "a mask maps names of parameters to boolean tensors; got a list"),
    ],
)
def test_invalid_arguments_of_pruning_raise_with_one_sentence(weights, mask, fraction, message):
    with pytest.raises((ValueError, TypeError), match=message):
        prune_by_magnitude(weights, mask, fraction)


def test_weights_and_masks_may_be_arrays_and_fractions_any_number():
    weights, mask = {"a": np.arange(4.0)}, {"a": np.array([True, False, True, True])}
    for fraction in (np.float32(0.5), Decimal("0.5"), fractions.Fraction(1, 2)):
        assert prune_by_magnitude(weights, mask, fraction) == mask_of(0, 0, 0, 1)


def test_a_layer_that_loses_its_last_weight_is_named_in_a_warning():
    weights = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0, 4.0])}
    mask = Mask({"a": [True, True], "b": [True, True]})
    with pytest.warns(UserWarning, match="^no weight remains of a$"):
        pruned = prune_by_magnitude(weights, mask, 0.5)
    assert pruned.empty_layers == ["a"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prune_by_magnitude(weights, pruned, 0.5)


def test_nan_weight_raises():
    with pytest.raises(ValueError, match="a remaining weight is NaN"):
        prune_by_magnitude({"a": torch.tensor([1.0, float("nan")])}, mask_of(1, 1), 0.5)


def test_density_and_table_count_remaining_weights():
    mask = Mask({"a": torch.tensor([[True, False], [True, True]]), "b": torch.zeros(4, dtype=torch.bool)})
    assert (mask.remaining, mask.total, mask.density) == (3, 8, 3 / 8)
    assert mask.table().to_dict("records") == [
        {"layer": "a", "shape": "2 x 2", "total": 4, "remaining": 3, "density": 0.75},
        {"layer": "b", "shape": "4", "total": 4, "remaining": 0, "density": 0.0},
    ]


def test_repr_has_the_numbers_of_tensors_and_weights():
    assert repr(Mask.dense(ResNet(20, 10))) == "Mask(22 tensors, 270,896 of 270,896 weights remain)"


@given(st.lists(st.lists(st.booleans(), min_size=1, max_size=9), min_size=1, max_size=4))
def test_saved_mask_is_loaded_unchanged(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("mask") / "mask.safetensors"
    mask = Mask({f"z{9 - i}.conv-1 (é).weight": torch.tensor(v) for i, v in enumerate(values)})
    mask.save(path, {"level": "3"})
    assert Mask.load(path) == mask
    assert list(Mask.load(path)) == list(mask)


def test_saved_metadata_is_in_the_header_next_to_the_counts(place):
    mask_of(True, False, True).save("mask.safetensors", {"level": "3", "run": "a"})
    with safe_open("mask.safetensors", "pt") as file:
        header = json.loads(file.metadata()["mask"])
    assert header == {"remaining": 2, "total": 3, "order": ["a"], "level": "3", "run": "a"}


def test_weights_are_zero_outside_only_if_every_pruned_weight_is_zero():
    mask = Mask({"a": torch.tensor([True, False, False]), "b": torch.tensor([False, True])})
    zero = {"a": torch.tensor([1.0, 0.0, -0.0]), "b": torch.tensor([0.0, 2.0])}
    assert mask.is_zero_outside(zero)
    for name, values in (("a", [1.0, 0.0, 1e-9]), ("b", [-1.0, 2.0])):
        assert not mask.is_zero_outside({**zero, name: torch.tensor(values)})


def test_equal_masks_give_equal_files():
    mask = Mask.dense(ResNet(8, 10, width=2))
    assert len({mask.to_bytes({"level": "3", "a": "b"}) for _ in range(50)}) == 1


def test_masks_with_other_values_names_or_order_are_not_equal():
    a, b = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    assert Mask({"a": a}) == Mask({"a": a.clone()})
    assert Mask({"a": a}) != Mask({"a": b})
    assert Mask({"a": a}) != Mask({"b": a})
    assert Mask({"a": a, "b": b}) != Mask({"b": b, "a": a})


@pytest.mark.parametrize("content", [b"", b"not a mask", None])
def test_file_that_is_not_a_mask_raises_with_its_path(place, content):
    path = place / "mask.safetensors"
    if content is None:
        from safetensors.torch import save_file

        save_file({"a": torch.ones(2)}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"mask\.safetensors: not a mask"):
        Mask.load(path)


def test_mask_of_another_network_raises_with_the_name_of_the_tensor():
    network = ResNet(8, 10, width=4)
    Mask.dense(network).validate(network)
    with pytest.raises(ValueError, match=r"fc\.weight.*shape"):
        Mask.dense(ResNet(8, 11, width=4)).validate(network)
    with pytest.raises(ValueError, match=r"has extra\.weight, which is not a prunable weight"):
        Mask({**Mask.dense(network), "extra.weight": torch.ones(1, dtype=torch.bool)}).validate(network)
    fewer = {name: tensor for name, tensor in Mask.dense(network).items() if name != "fc.weight"}
    with pytest.raises(
        ValueError, match=r"has fc\.weight, which the mask lacks; .*use Mask\({\*\*Mask.dense\(network\)"
    ):
        Mask(fewer).validate(network)
    Mask({**Mask.dense(network), **fewer}).validate(network)
    Mask(fewer).validate(network, exclude="fc")


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a": torch.ones(2)}, "mask a has dtype torch.float32; expected torch.bool"),
        ({"a": "11"}, "mask a is a str; expected a boolean tensor or array"),
        ({}, "the mask has no weights"),
        ({"a": torch.ones(0, dtype=torch.bool)}, "the mask has no weights"),
        ([torch.ones(2)], "a mask maps names of parameters to boolean tensors; got a list"),
        *(({name: [True]}, "is not a parameter name") for name in (1, "", "a..b", "a\x1b[2J", "__metadata__")),
    ],
)
def test_what_is_no_mask_raises_with_one_sentence(tensors, message):
    with pytest.raises((ValueError, TypeError), match=message):
        Mask(tensors)


def test_a_mask_is_a_copy_and_its_tensors_may_share_memory(place):
    tensor = torch.tensor([True, False])
    mask = Mask({"a": tensor, "b": tensor, "c": tensor.numpy()})
    tensor[:] = False
    assert mask.remaining == 3
    mask.save("mask.safetensors")
    assert Mask.load("mask.safetensors") == mask


def test_metadata_does_not_replace_what_the_mask_writes():
    with pytest.raises(ValueError, match="metadata has the key 'order'"):
        mask_of(1).to_bytes({"order": "1"})


def test_pruning_does_not_depend_on_the_memory_format_of_the_weights():
    weight = torch.from_numpy(np.random.default_rng(0).normal(size=(4, 3, 3, 3)))
    dense = Mask({"a": torch.ones(weight.shape, dtype=torch.bool)})
    last = weight.contiguous(memory_format=torch.channels_last)
    assert prune_by_magnitude({"a": weight}, dense, 0.3) == prune_by_magnitude({"a": last}, dense, 0.3)
