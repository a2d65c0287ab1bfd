"""The numbers of every method, and checkpoints, are those of the golden record."""

from fnmatch import fnmatchcase

import pytest

from golden import record


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["torch", "numba", "triton", "compile"])
def test_every_case_of_a_backend_gives_the_recorded_numbers(backend: str) -> None:
    for module in {"torch": [], "numba": ["numba"], "compile": ["numba"]}.get(backend, [backend]):
        pytest.importorskip(module)
    differences, number, _ = record.check(lambda case: fnmatchcase(case, f"{backend}: *"))
    assert number > 0
    assert [str(one) for one in differences if not one.allowed] == []


@pytest.mark.parametrize("name", sorted(record.checkpoint_makers()))
@pytest.mark.filterwarnings("ignore")
def test_a_recorded_checkpoint_loads_and_gives_the_recorded_outputs(name: str) -> None:
    assert record.check_checkpoint(name) == []


def test_a_difference_in_one_bit_is_found() -> None:
    case = "torch: bn, plain"
    results = record.cases.run(case, record.cases.cases()[case])
    known = {case: record.entry(results)}
    assert record.compare(case, results, known, True, {}) == []
    results.output[0].view(-1)[0].nextafter_(results.output[0].new_tensor(9.0))
    results.state["0.running_var"].mul_(1 + 2e-7)
    output, state = record.compare(case, results, known, True, {})
    assert (output.section, output.ulps, output.allowed) == ("output", 0, False)
    assert (state.section, state.allowed) == ("state", False)
    assert 0 < state.ulps <= 4
    allowed = {"torch: *": record.Allowance(4, "a rounding")}
    assert [one.allowed for one in record.compare(case, results, known, True, allowed)] == [
        True,
        True,
    ]
    results.state["0.running_var"].mul_(1 + 2e-6)
    assert not record.compare(case, results, known, True, allowed)[1].allowed
