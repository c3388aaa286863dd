"""The package's own checker, as tests ask it."""

from pathlib import Path

from counter_server.server.prove.history import Operation, save, violations


def assert_exactly_once(history: list[Operation], final: int, save_to: Path) -> None:
    """Fail if the history shows a violation, with the history saved beside the test's other files."""
    found = violations(history, final)
    if found:
        save(save_to, history, final)
        raise AssertionError(f"{len(found)} violations, the first: {found[:5]}; the history is in {save_to}")
