"""Counts the faults that are tried: see tests/reliability/report.py."""

from tests.reliability.report import Reliability


def pytest_addoption(parser):
    parser.addoption("--write-reliability", action="store_true", help="write docs/reliability.md from this run")


def pytest_configure(config):
    config.pluginmanager.register(Reliability(), "reliability")
