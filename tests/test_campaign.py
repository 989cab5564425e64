"""The promise of the results file under faults, kills and restarts: short runs of two of the benchmark commands."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest

from tests.benchmarks.campaign import run_seed
from tests.benchmarks.kills import kill_often

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.skipif(os.name != "posix", reason="needs signals and wait4")]


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_faults_and_restarts(seed: int) -> None:
    """A random combination of faults, limits and interruptions leaves what was promised."""
    _, problems, said = run_seed(seed, short=True)
    assert not problems, "\n".join([*problems, *said])


def test_ten_kills(tmp_path: Path) -> None:
    """Killed ten times, at moments of every kind, the program loses nothing and has nothing twice."""
    assert kill_often(tmp_path, kills=10, seed=2).kinds.total() == 10
