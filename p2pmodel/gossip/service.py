"""What the child does for its node: frames in, gossip out, and back."""

import trio

from p2pmodel.domain.ids import ModelId
from p2pmodel.gossip import frames
from p2pmodel.gossip.dialler import Dialler
from p2pmodel.gossip.mesh import Announcements, Mesh

STATUS_SECONDS = 0.5
QUIET_SECONDS = 10.0
"""A status is sent at least this often, so that the node can tell a silent child from a stuck one."""

OUTBOX_FRAMES = 256


class Service:
    """One node's gossip, until the node closes the socket."""

    def __init__(self, link: trio.SocketStream, mesh: Mesh, nursery: trio.Nursery) -> None:
        self._link = link
        self._mesh = mesh
        self._nursery = nursery
        self._dialler = Dialler(mesh.host)
        self._models: set[str] = set()
        self._outbox, self._outgoing = trio.open_memory_channel[frames.FromChild](OUTBOX_FRAMES)

    async def run(self, messages: frames.Incoming[frames.ToChild]) -> None:
        """Returns at the end of the messages; the tasks that it started in the nursery run on."""
        self._nursery.start_soon(self._write)
        self._nursery.start_soon(self._report)
        self._nursery.start_soon(self._dialler.run)
        await self._outbox.send(frames.Ready(self._mesh.peer, self._mesh.addresses))
        while message := await messages.next():
            match message:
                case frames.Subscribe(model):
                    if model not in self._models:
                        self._models.add(model)
                        self._nursery.start_soon(self._deliver, await self._mesh.subscribe(ModelId(model)))
                case frames.Connect(addresses):
                    self._dialler.add(addresses)
                case frames.Publish(number, model, data):
                    refusal = await self._mesh.publish(ModelId(model), data)
                    await self._outbox.send(frames.Published(number, refusal))

    async def _deliver(self, messages: Announcements) -> None:
        async for message in messages:
            await self._outbox.send(frames.Received(message.data))

    async def _report(self) -> None:
        last, at = frames.Status(0, {}), trio.current_time()
        while True:
            status = frames.Status(self._mesh.peers, self._mesh.refused)
            if status != last or trio.current_time() - at > QUIET_SECONDS:
                last, at = status, trio.current_time()
                await self._outbox.send(status)
            await trio.sleep(STATUS_SECONDS)

    async def _write(self) -> None:
        async for message in self._outgoing:
            try:
                await self._link.send_all(frames.encode(message))
            except trio.BrokenResourceError:
                return  # the node is gone, and the reader sees it too
