"""A model of transformers whose layers are the swarm's, for Python programs and notebooks."""

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2pmodel.engine.head import load_head
from p2pmodel.node.client import SwarmClient
from p2pmodel.node.inference import RoutedChain, RoutedSession
from p2pmodel.tensors.codecs import DEFAULT_CODEC


class DistributedModelForCausalLM:
    """Named after transformers' AutoModelForCausalLM, and used like it:

    with DistributedModelForCausalLM.from_swarm(peers=["/ip4/…/tcp/…/p2p/…"]) as model:
        inputs = model.tokenizer("def main(", return_tensors="pt")
        print(model.tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
    """

    @classmethod
    def from_swarm(
        cls,
        model: str | None = None,
        peers: Sequence[str] = (),
        *,
        version: str = "head",
        codec: str = DEFAULT_CODEC,
        home: Path | None = None,
        base: Path | None = None,
    ) -> Any:
        """The family's own CausalLM: `model(input_ids).logits`, `labels=` for the loss, `generate()` with streamers,
        sampling, beams, padded batches and an `assistant_model`. Embeddings and head are here, the layers on peers.

        model: its id or name, where the swarm has several; peers: multiaddrs, or those of the node on this machine;
        version: a number or an id, kept to the end; base: the folder of the base checkpoint, if it is not found.
        `model.tokenizer` goes with it. Close it, or use it in a `with` statement. It blocks, so it needs no event loop;
        threads may share it. Raises Unreachable, NotFound, InvalidInput.
        """
        client = SwarmClient.connect(home, tuple(peers), model, base)
        try:
            chain = client.chain(client.lineage.find_version(version), codec)
            loaded = load_head(client.checkpoint, _Membership(client, chain))
        except BaseException:
            client.close()
            raise
        loaded.__dict__["tokenizer"] = client.tokenizer  # no module, and no tensor
        weakref.finalize(loaded, client.close)
        return loaded


class _Membership:
    """Implements `engine.head.RemoteChain`: leaves the swarm when it is closed."""

    def __init__(self, client: SwarmClient, chain: RoutedChain) -> None:
        self._client, self._chain = client, chain

    def open(self, max_tokens: int, rows: int, rewinds: bool) -> RoutedSession:
        return self._chain.open(max_tokens, rows, rewinds)

    def close(self) -> None:
        self._client.close()
