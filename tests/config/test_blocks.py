import re

from hypothesis import given
from hypothesis import strategies as st

from lth_diet.config.blocks import blocks, blocks_problem, fills_blocks, largest_stack
from lth_diet.config.fields import MAX_REPLICATES

STACKS = st.integers(1, 64)
REPLICATES = st.one_of(
    st.integers(1, 200).map(range),
    st.lists(st.integers(0, 20), min_size=1, unique=True),
    st.lists(st.integers(0, 3), min_size=1, unique=True).map(
        lambda found: [4 * b + i for b in found for i in range(4)]
    ),
).map(tuple)


@given(REPLICATES, STACKS)
def test_every_index_is_in_one_block_with_those_of_the_same_quotient(replicates, stack):
    found = blocks(replicates, stack)
    assert sorted(index for block in found for index in block) == sorted(replicates)
    assert all(list(block) == sorted(block) and len({index // stack for index in block}) == 1 for block in found)
    assert [block[0] // stack for block in found] == list(dict.fromkeys(index // stack for index in replicates))


@given(REPLICATES, STACKS)
def test_what_a_problem_suggests_fills_blocks(replicates, stack):
    problem = blocks_problem(replicates, stack, MAX_REPLICATES)
    assert bool(problem) != fills_blocks(replicates, stack)
    if problem:
        assert fills_blocks(replicates, int(re.search("or use stack = (.*)", problem)[1]))
        if match := re.search(r"replicates = (\d+)(?: or (\d+))?,", problem):
            assert all(fills_blocks(range(int(count)), stack) for count in match.groups() if count)
        else:
            first, last, lacking = re.search(r"the block (\d+) to (\d+) lacks ([\d, ]+), or", problem).groups()
            block = [index for index in replicates if int(first) <= index <= int(last)]
            assert block and sorted([*block, *map(int, lacking.split(", "))]) == [*range(int(first), int(last) + 1)]


@given(st.lists(REPLICATES, min_size=1, max_size=3), st.integers(1, 40), STACKS)
def test_the_largest_stack_fills_blocks_for_every_rank_and_no_larger_one_does(replicates, ranks, most):
    def fits(stack):
        number = sum(len(blocks(indices, stack)) for indices in replicates)
        return number >= ranks and all(fills_blocks(indices, stack) for indices in replicates)

    largest = largest_stack(replicates, ranks, most)
    assert 1 <= largest <= most and (fits(largest) or not any(map(fits, range(1, most + 1))))
    assert not any(map(fits, range(largest + 1, most + 1)))
