"""Addresses to begin with: those that answered last, noted in the home."""

import json
from collections.abc import Sequence

from p2pmodel.control.client import ControlClient
from p2pmodel.domain.errors import NotRunning, Unreachable
from p2pmodel.store.home import Home

CONTACTS = "contacts"
"""The ref that holds them."""


def contacts(home: Home) -> tuple[str, ...]:
    """Addresses to begin with: of the node that runs on the home, or those that answered last. Raises Unreachable."""
    try:
        with ControlClient.connect(home.control_socket) as client:
            return tuple(client.status().addresses)
    except NotRunning:
        noted = home.refs.get(CONTACTS)
    if not noted:
        raise Unreachable("No swarm is known on this machine.", "Name a node with --peers, or start one: p2pmodel join")
    return tuple(json.loads(noted))


def remember_contacts(home: Home, peers: Sequence[str]) -> None:
    note = json.dumps(list(peers))
    if home.refs.get(CONTACTS) != note:
        home.refs.set(CONTACTS, note)
