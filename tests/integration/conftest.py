"""Integration tests fork their nodes, see tests/forked.py."""

import pytest

from p2pmodel.cli import localswarm
from tests import forked


@pytest.fixture(autouse=True, scope="session")
def nodes_are_forked() -> None:
    localswarm.launch = forked.launch  # type: ignore[assignment]
