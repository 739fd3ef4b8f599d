"""A model of transformers whose layers are the swarm's, for Python programs and notebooks."""

import threading
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from p2pmodel.engine.head import NO_VECTORS, load_head
from p2pmodel.node.asking.client import SwarmClient
from p2pmodel.node.asking.inference import RoutedChain, RoutedSession
from p2pmodel.node.asking.private import demand_vectors, private_vectors, trainable_vectors
from p2pmodel.node.asking.tape import RoutedTape
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
        patch: str | None = None,
        trainable: bool = False,
        home: Path | None = None,
        base: Path | None = None,
        swarm_key: Path | None = None,
    ) -> Any:
        """The family's own CausalLM: `model(input_ids).logits`, `labels=` for the loss, `generate()` with streamers,
        sampling, beams, padded batches and an `assistant_model`. Embeddings and head are here, the layers on peers.

        model: its id or name, where the swarm has several; peers: multiaddrs, or those of the node on this machine;
        version: a number or an id, kept to the end; patch: a file, or the id of a known patch, of kind ia3, that nobody
        has to have merged: its vectors travel with this model's own sessions; base: the folder of the base checkpoint,
        if it is not found; swarm_key: the key file of a private swarm. `model.tokenizer` goes with it.

        trainable: the model has (IA)³ vectors as its only parameters that require gradients, from those of the version
        or patch on; `loss.backward()` brings theirs back through the swarm, for any optimiser. They are
        `model.vectors`, whose `state()` is {slot: vector}.

        Close it, or use it in a `with` statement. It blocks, so it needs no event loop;
        threads may share it. Raises Unreachable, NotFound, InvalidInput.
        """
        client = SwarmClient.connect(home, tuple(peers), model, base, swarm_key)
        try:
            wanted = client.lineage.find_version(version)
            vectors: Mapping[str, Tensor] = NO_VECTORS
            if patch is not None:
                wanted, vectors = private_vectors(client.lineage, patch)
                if trainable:
                    demand_vectors(vectors)
            elif trainable:
                vectors = trainable_vectors(client.lineage, wanted)
            loaded = load_head(client.checkpoint, _Membership(client, client.chain(wanted, codec)))
            if trainable:
                loaded.vectors = Vectors(vectors)
                vectors = loaded.vectors.state()
            loaded.run_with(vectors)  # type: ignore[operator]
        except BaseException:
            client.close()
            raise
        loaded.__dict__["tokenizer"] = client.tokenizer  # no module, and no tensor
        weakref.finalize(loaded, _leave, client)
        return loaded


def _leave(client: SwarmClient) -> None:
    """When nobody refers to the model any more: in the main thread, at the end of the program at the latest, or in
    whatever thread the garbage collector happens to run, which may be one that the client would wait for."""
    if threading.current_thread() is threading.main_thread():
        client.close()
    else:
        threading.Thread(target=client.close, name="leaving", daemon=True).start()


class Vectors(nn.Module):
    """Trainable (IA)³ vectors, a parameter for every slot."""

    def __init__(self, start: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._by_slot = {}
        for name, vector in sorted(start.items()):
            self._by_slot[name] = nn.Parameter(vector.detach().clone())
            self.register_parameter(name.replace(".", "/"), self._by_slot[name])  # a dot would be a path

    def state(self) -> Mapping[str, nn.Parameter]:
        """{slot: [D] float32}, the parameters themselves."""
        return self._by_slot


class _Membership:
    """Implements `engine.head.RemoteChain`: leaves the swarm when it is closed."""

    def __init__(self, client: SwarmClient, chain: RoutedChain) -> None:
        self._client, self._chain = client, chain

    def open(
        self, max_tokens: int, rows: int, rewinds: bool, vectors: Mapping[str, Tensor] = NO_VECTORS
    ) -> RoutedSession:
        return self._chain.open(max_tokens, rows, rewinds, vectors)

    def tape(self) -> RoutedTape:
        return self._chain.tape()

    def close(self) -> None:
        self._chain.close()
        self._client.close()
