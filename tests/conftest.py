"""Fixtures of all tests: an environment without this machine's keys, a provider as a process of its own."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

import pytest

from tests.jobs import KEY, ProviderProcess

if TYPE_CHECKING:
    from collections.abc import Generator, Iterator


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Let reports travel between processes: pytest-xdist takes no lone surrogates, which some tests print."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of this machine's keys and proxies reaches a test; the usual key is a made-up one."""
    for name in list(os.environ):
        if name.lower().endswith(("_proxy", "api_key", "_token")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


@pytest.fixture(autouse=True)
def _own_logging_level() -> Iterator[None]:
    """No test inherits the level that a run of the program within another test has set."""
    logger = logging.getLogger("api_request_parallel_processor")
    level = logger.level
    yield
    logger.setLevel(level)


@pytest.fixture(scope="session")
def _provider(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProviderProcess]:
    with ProviderProcess(tmp_path_factory.mktemp("provider"), "--record_calls") as provider:
        yield provider


@pytest.fixture
def provider(_provider: ProviderProcess) -> Iterator[ProviderProcess]:
    """Serve from a process of its own, forgetful between tests."""
    before = _provider.ask("/_control", {"reset": True})
    yield _provider
    _provider.ask("/_control", {name: value for name, value in before.items() if name not in ("host", "port")})
