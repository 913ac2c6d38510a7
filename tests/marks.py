"""Which of many cases run with the fast tests; the slow tests run all of them."""

from collections.abc import Iterable

import pytest


def slow_but_for(
    cases: Iterable[object], *fast: str, mark: pytest.MarkDecorator = pytest.mark.slow
) -> list:
    """The cases as parameters named by themselves, all slow (or of another mark) but those of these
    names."""
    cases = list(cases)
    assert set(fast) <= {str(case) for case in cases}, "a name that no case has"
    marks = lambda case: () if str(case) in fast else mark
    return [pytest.param(case, id=str(case), marks=marks(case)) for case in cases]
