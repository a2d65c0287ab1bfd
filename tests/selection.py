"""Which cases of a parametrized test are in the fast set.

A test over methods, types and layouts has hundreds of cases, of which few find a fault that the
others do not. The fast set takes, for each test:

- of methods, one of each family, another one from test to test;
- of the values of all other parameters, each at least once;
- with three parameters or more, each pair of values of the two with the most, if these are few.

`make test-all` takes each pair of values of any two parameters, and so all cases of a test with
two; of a test marked `families`, those of one method of each. `make test-every` takes each case.
A test marked `every_case` has all of them in the fast set, one marked `pairs("x", "y")` each pair
of values of these two parameters, one marked `few(n)`, whose cases take seconds each, n of those
above.
"""

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from zlib import crc32

Case = Mapping[str, Hashable]

FEW = 24  # pairs, at most, of which each is taken
FAMILIES = (
    ("bn", "sync", "mbn", "brn"),
    ("mabn",),
    ("ghost", "bgn"),
    ("cbn",),
    ("ns", "bs", "fs", "points"),
    ("vdn", "fs+vdn", "bs+vdn"),
    ("l1", "range"),
    ("gn", "ln", "in"),
)
METHODS = {method for family in FAMILIES for method in family}


def axes(cases: Sequence[Case]) -> list[str]:
    """The parameters that vary on their own: of those that always vary together, the first."""
    found: dict[tuple[Hashable, ...], str] = {}
    for name in cases[0]:
        values = [case[name] for case in cases]
        numbers = {value: number for number, value in enumerate(dict.fromkeys(values))}
        if len(numbers) > 1:
            found.setdefault(tuple(numbers[value] for value in values), name)
    return list(found.values())


def key(value: object) -> Hashable:
    """What stands for a parameter's value, equal for the same value only."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def of_families(cases: Sequence[Case], test: str) -> list[int]:
    """Numbers of the cases of one method of each family, where a parameter is a method."""
    numbers = list(range(len(cases)))
    for name in axes(cases):
        found = dict.fromkeys(case[name] for case in cases)
        methods = [value[1] for value in found if isinstance(value, tuple)]
        if len(methods) < 4 or not METHODS.issuperset(methods):
            continue
        present = [[m for m in family if m in methods] for family in FAMILIES]
        turn = crc32(test.encode())
        taken = {family[turn % len(family)] for family in present if family}
        numbers = [i for i in numbers if cases[i][name][1] in taken]  # type: ignore[index]
    return numbers


def covering(cases: Sequence[Case], pairs: tuple[str, ...] = ()) -> list[int]:
    """Numbers of the cases that have every value of every parameter, and few pairs or these."""
    names = axes(cases) if cases else []
    if len(names) < 2:
        return list(range(len(cases)))
    parts: list[tuple[str, ...]] = [(name,) for name in names]
    if pairs:
        parts.append(pairs)
    elif len(names) > 2:
        sizes = {name: len({case[name] for case in cases}) for name in names}
        first, second = sorted(names, key=lambda name: -sizes[name])[:2]
        if sizes[first] * sizes[second] <= FEW:
            parts.append((first, second))
    covered = [{(part, tuple(case[name] for name in part)) for part in parts} for case in cases]
    missing = set().union(*covered)
    used: Counter[object] = Counter()
    found: list[int] = []
    left = dict(enumerate(covered))
    while missing:
        # The case with the most that is missing; of equal ones, values that were seldom taken.
        best = max(left, key=lambda i: (len(left[i] & missing), -sum(used[v] for v in left[i]), -i))
        missing -= left[best]
        used.update(left.pop(best))
        found.append(best)
    return sorted(found)


def chosen(cases: Sequence[Case], test: str, pairs: tuple[str, ...] = ()) -> set[int]:
    """Numbers of a test's cases in the fast set."""
    if len(cases) < 2:
        return set(range(len(cases)))
    numbers = of_families(cases, test)
    return {numbers[i] for i in covering([cases[i] for i in numbers], pairs)}


def some(numbers: set[int], most: int, test: str) -> set[int]:
    """So many of a test's cases, others from test to test."""
    return set(sorted(numbers, key=lambda number: crc32(f"{test} {number}".encode()))[:most])


def pairwise(cases: Sequence[Case], taken: set[int], test: str) -> set[int]:
    """Those taken, and cases that have every other pair of values of any two parameters."""
    names = axes(cases) if cases else []
    if len(names) < 3:
        return set(range(len(cases)))
    found, seen = set(taken), set()
    rest = sorted(set(range(len(cases))) - taken, key=lambda i: crc32(f"{test} {i}".encode()))
    for number in (*taken, *rest):
        case = cases[number]
        pairs = {(a, b, case[a], case[b]) for a, b in combinations(names, 2)}
        if not pairs <= seen:
            found.add(number)
            seen |= pairs
    return found
