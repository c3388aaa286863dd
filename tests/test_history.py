"""The checker finds impossible orders. tests/test_prove.py shows it servers that are really wrong."""

import pytest

from counter_server.history import Operation, violations


def op(key: str, invoked: float, returned: float | None = None, *answers: int) -> Operation:
    return Operation(key, invoked, returned, answers)


@pytest.mark.parametrize(
    ("history", "final"),
    [
        ([], 0),
        ([op("a", 0, 1, 1), op("b", 2, 3, 2)], 2),
        ([op("a", 0, 9, 2), op("b", 0, 9, 1)], 2),  # at the same time: any order
        ([op("a", 0, 1, 1), op("lost", 2), op("b", 3, 4, 3)], 3),
        ([op("a", 0, 1, 1), op("lost", 2)], 1),  # never applied
        ([op("lost", 0), op("a", 1, 2, 1)], 2),  # applied long after
        ([op("a", 0, 1, 1, 1, 1)], 1),
    ],
)
def test_a_possible_history_is_accepted(history: list[Operation], final: int) -> None:
    assert violations(history, final) == []


@pytest.mark.parametrize(
    ("history", "final", "complaint"),
    [
        ([op("a", 0, 1, 1), op("b", 0, 1, 1)], 2, "both answered 1"),
        ([op("a", 0, 1, 2)], 1, "outside"),
        ([op("a", 0, 1, 0)], 1, "outside"),
        ([op("a", 0, 1, 2)], 2, "no operation can have taken 1"),
        ([op("a", 0, 1, 1)], 2, "no operation can have taken 2"),
        ([op("a", 0, 1, 1, 2), op("b", 0, 1, 2)], 2, "was answered with [1, 2]"),
        ([op("a", 0, 1, 2), op("b", 2, 3, 1)], 2, "before a smaller number was asked for"),
        ([op("a", 0, 1, 2), op("lost", 2)], 2, "before a smaller number was asked for"),
        ([op("a", 0, 1, 1), op("lost", 2), op("b", 0, 1, 3)], 3, "before a smaller number was asked for"),
    ],
)
def test_an_impossible_history_is_reported(history: list[Operation], final: int, complaint: str) -> None:
    assert any(complaint in found for found in violations(history, final))
