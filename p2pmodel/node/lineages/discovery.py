"""Which lineage a user means, and how its Manifest comes from peers."""

import logging
from collections.abc import Sequence
from pathlib import Path

from p2pmodel import starter
from p2pmodel.domain.errors import Busy, InvalidInput, NotFound, P2PModelError, PeerFailed, Rejected, Unreachable
from p2pmodel.domain.ids import PeerId, abbreviates, short
from p2pmodel.domain.swarm import LineageOffer
from p2pmodel.logic.admission import result_limit
from p2pmodel.node.lineages import bases, hub
from p2pmodel.node.lineages.lineage import Lineage, find_lineage, known_lineages
from p2pmodel.store.home import Home
from p2pmodel.swarm.blobs import BlobFetcher
from p2pmodel.swarm.host import PeerHost
from p2pmodel.swarm.sync import lineages
from p2pmodel.wire import records
from p2pmodel.wire.signing import RECORD_OVERHEAD

log = logging.getLogger(__name__)

BUSY_SECONDS = 60.0
"""For so long are peers that serve others asked again for what a lineage begins with."""


def bootstrap_peers(addresses: Sequence[str]) -> tuple[PeerId, ...]:
    return tuple(PeerId(address.rsplit("/p2p/", 1)[-1]) for address in addresses)


def local_lineage(home: Home, text: str | None, say: bases.Say = lambda _: None) -> Lineage:
    """Of a name, an id, a checkpoint's folder or a hub id, without asking anybody; None is the starter model. A folder
    and a hub id stand for the lineage that was founded on it, rather than for a branch.

    A folder that no known lineage is based on begins one, with this home's key as its maintainer, and the starter's
    exam standing in for its own until a Manifest is made on purpose.
    """
    if text is None:
        return _lineage_of_folder(home, starter.MODEL, starter.NAME, starter.LICENCE)
    if Path(text).is_dir():
        folder = Path(text)
        return _lineage_of_folder(home, folder, _name_of(folder.resolve().name), "")
    if hub.Source.parse(text):
        return _lineage_of_hub(home, text, say)
    return find_lineage(home, text)


def _lineage_of_hub(home: Home, text: str, say: bases.Say) -> Lineage:
    found = bases.found_on_hub(text, _branches_last(home), say)
    if isinstance(found, Lineage):
        return found
    from p2pmodel.node.lineages import founding  # loads transformers, which most commands can do without

    name = _name_of(found.source.repository.split("/")[1])
    return founding.found_from_hub(home, found, founding.Founding(name, (home.key.peer,), 1, starter.EXAM))


def _branches_last(home: Home) -> list[Lineage]:
    return sorted(known_lineages(home), key=lambda lineage: lineage.founding.origin is not None)


def _name_of(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in text)[:64]


def _lineage_of_folder(home: Home, folder: Path, name: str, licence: str) -> Lineage:
    for lineage in _branches_last(home):
        if bases.is_base_of(folder, lineage.manifest):
            return lineage
    from p2pmodel.node.lineages import founding  # loads transformers, which most commands can do without

    return founding.found(home, folder, founding.Founding(name, (home.key.peer,), 1, starter.EXAM, licence=licence))


async def swarm_lineage(home: Home, host: PeerHost, peers: Sequence[PeerId], text: str | None) -> Lineage:
    """The lineage that the user means, among those that the peers take part in, with the values of its base version. A
    folder that stands for it is where its base is looked for from now on.

    Raises NotFound with what they offer, Unreachable, Busy."""
    offers = await _offers(host, peers)
    lineage = await _choose(home, host, offers, text)
    await _fetch_base_values(lineage, host, offers[lineage.model][1])
    return lineage


async def _offers(host: PeerHost, peers: Sequence[PeerId]) -> dict[str, tuple[LineageOffer, list[PeerId]]]:
    offers: dict[str, tuple[LineageOffer, list[PeerId]]] = {}
    for peer in peers:
        try:
            for offer in await lineages(host, peer):
                offers.setdefault(offer.model, (offer, []))[1].append(peer)
        except (PeerFailed, Rejected) as error:
            log.warning("%s does not say what it takes part in: %s", peer, error)
    return offers


async def _choose(
    home: Home, host: PeerHost, offers: dict[str, tuple[LineageOffer, list[PeerId]]], text: str | None
) -> Lineage:
    folder = starter.MODEL if text is None else Path(text)
    by_files = folder.is_dir()
    source = None if by_files or text is None else hub.Source.parse(text)
    by_name = not by_files and source is None and text is not None
    found: list[Lineage] = []
    failed: P2PModelError | None = None
    for model, (offer, holders) in sorted(offers.items()):
        if by_name and offer.name != text and not abbreviates(text or "", model):
            continue
        try:
            lineage = await _with_manifest(home, host, offer, holders)
        except (Rejected, Unreachable, Busy) as error:
            log.warning("%s (%s) is left out: %s", offer.name, short(model), error)
            failed = failed or error
            continue
        if by_files and not bases.is_base_of(folder, lineage.manifest):
            continue
        if source is None or bases.has_source(lineage, source):
            found.append(lineage)
    if len(found) == 1:
        if by_files and text is not None:  # the starter's is found by itself
            bases.remember_base(home, found[0], folder, ())
        return found[0]
    offered = ", ".join(f"{o.name} ({short(o.model)})" for o, _ in offers.values()) or "none at all"
    wanted = "the starter model" if text is None else repr(text)
    if found:
        raise InvalidInput(f"Several models of these peers match {wanted}.", f"Name one by its id: {offered}.")
    if failed is not None:
        raise failed  # it may be the one that is meant
    missing = "starter model" if text is None else f"model {text!r}"
    raise NotFound(f"These peers have no {missing}.", f"They have: {offered}; name one with --model.")


async def _with_manifest(home: Home, host: PeerHost, offer: LineageOffer, holders: Sequence[PeerId]) -> Lineage:
    if not home.objects.has(offer.model):
        if offer.manifest.digest != offer.model or offer.manifest.size > records.MAX_MANIFEST_BYTES + RECORD_OVERHEAD:
            raise Rejected("schema", f"{holders[0]} offers a Manifest that is not the model's.")
        await BlobFetcher(host, home.objects.sink, patience=BUSY_SECONDS).fetch(offer.manifest, holders)
    return Lineage.create(home, home.objects.load(offer.model))


async def _fetch_base_values(lineage: Lineage, host: PeerHost, holders: Sequence[PeerId]) -> None:
    ref, objects = lineage.founding.base_values, lineage.home.objects
    if ref is None or objects.has(ref.digest):
        return
    from p2pmodel.node.lineages.intake import check_values  # loads torch, which other lineages can do without

    limit = result_limit(lineage.founding)
    if ref.size > limit:
        raise Rejected("size", f"The base of {lineage.manifest.name} has {ref.size} bytes of values; {limit} may be.")
    await BlobFetcher(host, objects.sink, patience=BUSY_SECONDS).fetch(ref, holders)
    try:
        check_values(lineage.founding, objects.load(ref.digest, limit))
    except Rejected:
        objects.remove(ref.digest)
        raise
