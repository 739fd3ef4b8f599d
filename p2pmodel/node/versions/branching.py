"""Beginning a branch: a lineage of its own over the same base, whose base version has the values of another's version.

It takes over what is in force there: files, kinds, slots, merge, exam, schedule and limits. Who decides is new.
"""

import dataclasses
import time
from collections.abc import Callable, Sequence

from p2pmodel.domain.errors import Busy, InvalidInput, NotFound
from p2pmodel.domain.ids import Digest, PeerId, VersionId
from p2pmodel.domain.model import Origin
from p2pmodel.node.lineages.bases import inherit_base
from p2pmodel.node.lineages.lineage import Lineage, known_lineages
from p2pmodel.node.lineages.states import state_bytes


def branch(
    lineage: Lineage,
    version: VersionId,
    name: str,
    maintainers: Sequence[PeerId],
    threshold: int,
    find: Callable[[Digest], bytes | None] = lambda _: None,
) -> Lineage:
    """Makes, signs and stores the Manifest. find: brings an object of the home's swarm into the home, if it can.

    Raises Busy when the name is taken here, InvalidInput, NotFound when the version's values or the exam are not
    here."""
    home, manifest = lineage.home, lineage.manifest_at(version)
    if any(known.manifest.name == name for known in known_lineages(home)):
        raise Busy(f"A model {name!r} is known here already.", "Choose another name.")
    if not home.objects.has(manifest.exam.digest) and find(manifest.exam.digest) is None:
        raise NotFound(
            f"The exam of {manifest.name} is not on this machine, and a branch needs it.",
            "Name a node that has it with --peers: a maintainer's.",
        )
    if lineage.experts(version):
        raise InvalidInput(
            f"{manifest.name} {lineage.number(version)} has experts, and the base of a branch cannot have any.",
            "Begin with a version from before them.",
        )
    origin = lineage.founding.origin if version == lineage.model else None
    if origin is None:
        ref = lineage.result(version)
        if ref is not None and not home.objects.has(ref.digest):
            find(ref.digest)
        result = home.objects.put(state_bytes(lineage, version))
        origin = Origin(lineage.model, version, str(lineage.number(version)), result)
    try:
        new = dataclasses.replace(
            manifest,
            name=name,
            created=int(time.time()),
            maintainers=tuple(sorted(maintainers)),
            threshold=threshold,
            origin=origin,
        )
    except ValueError as error:
        raise InvalidInput(f"The Manifest can't be made: {error}.") from None
    made = Lineage.create(home, home.key.sign("manifest", new))
    inherit_base(home, lineage, made)
    return made
