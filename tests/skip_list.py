"""Tests skip themselves for the reasons in CONTRIBUTING's table only: a plugin that fails a session with any other."""

import re
from pathlib import Path

import pytest

CONTRIBUTING = Path(__file__).parent.parent / "CONTRIBUTING.md"


def listed_reasons() -> list[str]:
    """How the reasons begin that the table under "What is skipped" has."""
    section = CONTRIBUTING.read_text().split("## What is skipped", 1)[1].split("\n## ", 1)[0]
    return re.findall(r"^\| (?!reason begins)([^|]+?) \|", section, re.MULTILINE)


def reason_of(report: pytest.TestReport | pytest.CollectReport) -> str:
    """Why a test, or a whole file, was skipped."""
    words = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return words.removeprefix("Skipped: ")


class SkipList:
    """Gathers the skips of a session that the table has no reason for."""

    def __init__(self) -> None:
        self.listed = listed_reasons()
        self.unlisted: dict[str, str] = {}

    def _note(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = reason_of(report)
            if not reason.startswith(tuple(self.listed)):
                self.unlisted[report.nodeid] = reason

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._note(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unlisted and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        for name, reason in self.unlisted.items():
            terminalreporter.write_line(
                f"{name} is skipped for a reason that CONTRIBUTING does not list ({reason}): install what it needs "
                "(make .venv), or list it there",
                red=True,
            )


def pytest_configure(config: pytest.Config) -> None:
    """Once for a session: of workers side by side, the process that starts them sees all reports."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(SkipList(), "skip list")
