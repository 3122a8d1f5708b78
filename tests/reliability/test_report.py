"""docs/reliability.md counts the faults that the tests try."""

from pathlib import Path

import pytest

from tests.reliability import report


def test_the_page_is_what_is_collected(pytestconfig):
    plugin = pytestconfig.pluginmanager.get_plugin("reliability")
    tests = Path(report.__file__).parent.parent
    everything = {path for path in tests.rglob("test_*.py")
                  if "pytest.mark.fault" in path.read_text() and "interpreted" not in path.parts}
    if not everything <= plugin.files or "::" in " ".join(pytestconfig.args):
        pytest.skip("not all tests were collected")
    fresh = report.page(plugin.rows)
    assert report.counts_of(report.PAGE.read_text()) == report.counts_of(fresh), "run `make reliability`"


def test_every_marked_test_says_its_fault(pytestconfig):
    plugin = pytestconfig.pluginmanager.get_plugin("reliability")
    for (section, file, fault), n in plugin.rows.items():
        assert section in report.SECTIONS and len(fault) > 10, f"{file}: {section!r}, {fault!r}"


def test_the_page_shows_what_it_is_given():
    text = report.page({("Fuzz", "tests/a.py", "torn files"): 3, ("Resume", "tests/b.py", "a | b"): 2}, {"passed": 5})
    assert "5 cases of 2 faults" in text and "| torn files | 3 | `tests/a.py` |" in text and "| a / b | 2 |" in text
    assert text.index("## Resume: 2") < text.index("## Fuzz: 3") and "5 passed" in text
    assert "5 passed" not in "\n".join(report.counts_of(text))
