"""Which rows of the trail belong to no answer, and why."""

from pathlib import Path

from tests.chaos.hosts import Host
from tests.chaos.probing import Answer
from tests.chaos.scenarios.database import rows_without_answer

WEB = Host("web", "web", {}, Path("web.log"))


def answered(begin: float, end: float, status: int = 200) -> Answer:
    """A request for the connection `one`; status 0 means that no answer came."""
    return Answer(WEB, "one", begin, end, status)


def test_every_row_with_its_answer_leaves_nothing() -> None:
    """Two requests at once and two rows are two hand-outs."""
    answers = [answered(10.0, 10.2), answered(10.1, 10.3)]
    assert rows_without_answer(answers, {"one": [10.15, 10.16]}) == (0, 0)


def test_a_row_of_a_request_without_answer_was_dropped() -> None:
    """It was accepted, for it was recorded, and then its caller heard nothing."""
    answers = [answered(10.0, 10.2), answered(20.0, 20.2, status=0)]
    assert rows_without_answer(answers, {"one": [10.1, 20.1]}) == (1, 0)


def test_a_second_row_of_one_answer_was_decided_anew() -> None:
    """The token did not outlive its record, so another was recorded and handed out."""
    assert rows_without_answer([answered(10.0, 11.0)], {"one": [10.2, 10.9]}) == (0, 1)
