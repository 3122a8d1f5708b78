"""docs/reliability.md from the tests that carry `pytest.mark.fault("section")`.

A row is a test function: the first line of its docstring is the fault, its cases are counted. The
page is written at the end of a run with `--write-reliability`, and
`test_the_page_is_what_is_collected` holds that the committed one counts what is there.
"""

from collections import Counter
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "reliability.md"
SECTIONS = ("The guard", "Frozen bytes", "All or nothing", "Resume", "Bad input", "Fuzz", "Warnings", "Compatibility")
HEAD = """# Faults tried

Every fault that the tests plant or provoke, with the number of cases of each; the fault itself is the first line
of the test's docstring. Written by `make reliability`; a test holds the counts to what is collected.
"""


def rows_of(items) -> dict[tuple[str, str, str], int]:
    """Cases by (section, file, fault)."""
    rows = Counter()
    for item in items:
        if mark := item.get_closest_marker("fault"):
            section, *said = mark.args
            fault = said[0] if said else (item.function.__doc__ or "").strip().splitlines()[0]
            rows[section, item.path.relative_to(PAGE.parent.parent).as_posix(), fault] += 1
    return dict(rows)


def page(rows: dict[tuple[str, str, str], int], outcomes: Counter | None = None) -> str:
    """The page; `outcomes` of the run that wrote it, if there was one."""
    lines = [HEAD, f"{sum(rows.values())} cases of {len(rows)} faults.", ""]
    if outcomes:
        lines += ["The run that wrote this page: " + ", ".join(f"{n} {what}" for what, n in sorted(outcomes.items())) + ".", ""]
    for section in SECTIONS:
        chosen = sorted((fault, file, n) for (where, file, fault), n in rows.items() if where == section)
        if chosen:
            lines += [f"## {section}: {sum(n for *_, n in chosen)}", "", "| fault | cases | test |", "|---|---|---|",
                      *(f"| {fault.replace('|', '/')} | {n} | `{file}` |" for fault, file, n in chosen), ""]
    return "\n".join(lines).rstrip() + "\n"


def counts_of(text: str) -> list[str]:
    """The lines of a page that say what was tried, without what became of it."""
    return [line for line in text.splitlines() if line and not line.startswith("The run that wrote this page")]


class Reliability:
    """The pytest plugin: collects rows before anything is deselected, and outcomes."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], int] = {}
        self.files: set[Path] = set()
        self.outcomes: Counter = Counter()
        self._marked: set[str] = set()

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items) -> None:
        self.rows = rows_of(items)
        self.files = {item.path for item in items}
        self._marked = {item.nodeid for item in items if item.get_closest_marker("fault")}

    def pytest_runtest_logreport(self, report) -> None:
        if report.nodeid in self._marked and (report.when == "call" or report.outcome != "passed"):
            self.outcomes[report.outcome] += 1

    def pytest_sessionfinish(self, session) -> None:
        if session.config.getoption("--write-reliability") and not hasattr(session.config, "workerinput"):
            PAGE.write_text(page(self.rows, self.outcomes))
