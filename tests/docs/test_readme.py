"""The README says what is so: its figures come from committed files, its names exist."""

import json
import re
from pathlib import Path

import alps_kernels

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_the_compatibility_table_is_the_generated_one():
    page = (ROOT / "docs" / "compatibility.md").read_text()
    table = re.search(r"\| task \|.*?\n\n", page, re.S).group(0).strip()
    assert table in README


def test_every_public_name_it_uses_exists():
    for name in set(re.findall(r"\balps(?:_kernels)?\.([A-Za-z_]+)\(", README)) - {"Path"}:
        assert hasattr(alps_kernels, name), name
    for name in set(re.findall(r"`HeadSelection\.([a-z_]+)`", README)):
        assert hasattr(alps_kernels.HeadSelection, name), name


def test_the_demo_figures_are_of_the_committed_run():
    results = json.loads((ROOT / "docs" / "demo" / "results.json").read_text())
    for measured in (results["base"], results["task_model"], results["after"]):
        assert f"{measured['exact_match']:.1%}" in README
        assert f"{measured['english_perplexity']:.2f}" in README and f"{measured['code_perplexity']:.2f}" in README
    assert results["bytes_changed_outside"] == 0


def test_its_tables_are_those_of_the_results_page():
    page = (ROOT / "docs" / "results.md").read_text()
    counted = README[README.index("### One training step, counted"):README.index("### Scoring")]
    rows = [line for line in counted.splitlines() if line.startswith("|")]
    assert len(rows) == 16 and all(row in page for row in rows)
