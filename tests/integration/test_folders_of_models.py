"""A model that is named by its folder, among those that peers take part in."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from p2pmodel import starter
from p2pmodel.domain.errors import NotFound
from p2pmodel.node.lineages.bases import find_base
from p2pmodel.node.lineages.discovery import swarm_lineage
from p2pmodel.node.lineages.founding import Founding, found
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobServer
from p2pmodel.swarm.sync import SyncServer
from tests.support.swarm import Members, swarm
from tests.support.training import byte_tokenizer, small_model

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def members(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Members]:
    async with swarm(tmp_path_factory.mktemp("keys"), 2) as members:
        yield members


async def test_the_folder_that_names_a_peers_model_is_its_base(members: Members, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    small_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    there = Home.open(tmp_path / "there")
    lineage = found(there, folder, Founding("mine", (there.key.peer,), 1, starter.EXAM))
    host = members[1][1]
    servers = SyncServer(host, lambda model: (), lambda: [lineage.offer()]), BlobServer(host, there.objects)
    for server in servers:
        await server.start()
    try:
        by_name = Home.open(tmp_path / "by name")
        known = await swarm_lineage(by_name, members[0][1], (host.peer,), "mine")
        with pytest.raises(NotFound, match="--base"):
            find_base(by_name, known)
        here = Home.open(tmp_path / "here")
        known = await swarm_lineage(here, members[0][1], (host.peer,), str(folder))
        assert find_base(here, known) == folder.resolve()
    finally:
        for server in servers:
            await server.stop()
