"""Programs that some tests run besides Python's packages, and what installs them where they are missing."""

import shutil

import pytest

INSTALLED_BY = {
    "curl": "apt-get install curl",
    "kubectl": "kubernetes.io/docs/tasks/tools",
    "node": "apt-get install nodejs",
    "npm": "apt-get install npm",
    "prometheus": "apt-get install prometheus",
    "promtool": "apt-get install prometheus",
    "redis-server": "apt-get install redis-server",
}
NOT_INSTALLED = "not installed: "
"""How the reason begins for which a test is skipped, followed by the programs that it misses."""


def needs(*programs):
    """Return a mark: the test is skipped where one of these programs is not installed."""
    missing = not_installed(*programs)
    return pytest.mark.skipif(bool(missing), reason=NOT_INSTALLED + ", ".join(missing))


def require(*programs):
    """Skip the test that runs now, if one of these programs is not installed."""
    if missing := not_installed(*programs):
        pytest.skip(NOT_INSTALLED + ", ".join(missing))


def not_installed(*programs):
    assert INSTALLED_BY.keys() >= set(programs)
    return [program for program in programs if shutil.which(program) is None]


def closing_line(missing, reasons):
    """Return the line that names the programs that are missing, what installs each, and other reasons of skips."""
    named = [f"{program} ({INSTALLED_BY[program]})" for program in missing]
    others = sorted(reason for reason in reasons if not reason.startswith(NOT_INSTALLED))
    return f"Not tested here: {', '.join(named + others)}"
