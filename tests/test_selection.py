"""The fast set of a test's cases."""

from itertools import combinations, product

import anybatch
import selection
from method_cases import NAMES, make


def cases(**values: list[object]) -> list[dict[str, object]]:
    keyed = [[selection.key(v) for v in options] for options in values.values()]
    return [dict(zip(values, case, strict=True)) for case in product(*keyed)]


def test_all_cases_of_one_parameter_are_fast() -> None:
    assert selection.chosen(cases(x=[1, 2, 3]), "test") == {0, 1, 2}


def test_every_value_of_two_parameters_is_fast() -> None:
    both = cases(x=[*range(9)], y=["a", "b", "c", "d"])
    fast = [both[i] for i in selection.chosen(both, "test")]
    assert len(fast) == 9
    assert {case["x"] for case in fast} == {case["x"] for case in both}
    assert {case["y"] for case in fast} == {case["y"] for case in both}


def test_every_pair_of_the_two_largest_of_three_parameters_is_fast() -> None:
    all_of_them = cases(x=[*range(6)], y=["a", "b", "c"], z=[True, False])
    fast = [all_of_them[i] for i in selection.chosen(all_of_them, "test")]
    assert len(fast) == 18
    assert len({case["z"] for case in fast}) == 2


def test_one_method_of_each_family_is_fast_and_every_method_in_some_test() -> None:
    methods = cases(name=sorted(selection.METHODS))
    taken = set()
    for number in range(40):
        fast = selection.chosen(methods, f"test {number}")
        assert len(fast) == len(selection.FAMILIES)
        taken |= {methods[i]["name"][1] for i in fast}  # type: ignore[index]
    assert taken == selection.METHODS


def test_a_few_cases_are_others_in_another_test() -> None:
    taken = [selection.some(set(range(20)), 3, f"test {number}") for number in range(8)]
    assert {len(few) for few in taken} == {3}
    assert len(set.union(*taken)) > 6


def test_all_pairs_of_values_are_taken_in_few_cases() -> None:
    three = cases(x=[*range(6)], y=["a", "b", "c"], z=[True, False], v=[*range(3)])
    taken = {0, 1}
    paired = selection.pairwise(three, taken, "test")
    assert taken < paired
    assert len(paired) < len(three) / 2
    for one, other in combinations("xyzv", 2):
        assert {(three[i][one], three[i][other]) for i in paired} == {
            (case[one], case[other]) for case in three
        }


def test_all_cases_of_two_parameters_are_pairs() -> None:
    assert selection.pairwise(cases(x=[1, 2, 3], y=[1, 2]), {0}, "test") == set(range(6))


def test_values_without_a_hash_are_told_apart() -> None:
    first, second = {"a": 1}, {"a": 1}
    assert selection.chosen(cases(x=[first, second], y=[1, 2]), "test") == {0, 3}


def test_every_method_belongs_to_a_family() -> None:
    """A method that does not would have all of its cases among the fast ones."""
    assert set(anybatch.METHODS) == selection.METHODS


def test_every_warm_up_of_the_contract_is_short() -> None:
    """Its tests train for some 30 steps; `QUICK` in `method_cases` has settings."""
    for name in NAMES:
        options = make(name).own_arguments()
        waits = {key: value for key, value in options.items() if "warmup" in key or "burn" in key}
        assert all(value < 20 for value in waits.values()), (name, waits)
