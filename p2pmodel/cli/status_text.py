"""A node's status as data and as text."""

from typing import Any

from google.protobuf.json_format import MessageToDict

from p2pmodel.cli.output import counted, duration, printable
from p2pmodel.domain.experts import describe
from p2pmodel.domain.ids import short
from p2pmodel.wire.v1 import control_pb2 as pb

MOST_EXPERTS_DRAWN = 64


def status_data(reply: pb.StatusReply) -> dict[str, Any]:
    """Every field, those with default values too."""
    return MessageToDict(reply, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def status_text(reply: pb.StatusReply) -> str:
    blocks = [
        f"peer {reply.peer}, up {reply.uptime_seconds:.0f} s, {printable(reply.software)}\n"
        + "\n".join(f"join with: p2pmodel join --peers {printable(address)}" for address in reply.addresses)
    ]
    return "\n\n".join([*blocks, *(_model(reply, model) for model in reply.models)])


def _model(reply: pb.StatusReply, model: pb.ModelStatus) -> str:
    covered = sum(1 for n in model.coverage if n)
    state = (
        "every layer is served" if covered == model.layers else f"only {covered} of {model.layers} layers are served"
    )
    lines = [
        f"{printable(model.name)} {model.head.number} ({short(model.id)}): {model.layers} layers, {state}",
        f"  {'layers':<10}" + "".join(str(min(n, 9)) for n in model.coverage) + "   (how many peers serve each)",
    ]
    for lease in model.leases:
        mine = "  this node" if lease.peer == reply.peer else ""
        versions = ", ".join(v.number or short(v.id) for v in lease.versions)
        lines.append(
            f"  {lease.span.start}:{lease.span.end:<8}{lease.peer}  {versions}  {printable(lease.dtype)}, "
            f"{lease.layer_seconds * 1e3:.2f} ms a layer, "
            f"{lease.queue} sessions{mine}"
        )
    lines += _experts(reply, model)
    lines.append(
        f"  {len(model.presences)} peers: "
        + ", ".join(f"{p.peer[-8:]} ({printable(', '.join(p.roles))})" for p in model.presences)
    )
    lines.append(f"  {round_line(model.round)}")
    return "\n".join(lines)


def round_line(state: pb.RoundStatus) -> str:
    examined = f" ({state.examined} examined here)" if state.examined else ""
    return (
        f"round {state.number}: {state.phase} for {duration(state.since_seconds)}, {counted(state.patches, 'patch')}"
        f"{examined}, {state.accepts} of {state.threshold} accepting verdicts"
    )


def _experts(reply: pb.StatusReply, model: pb.ModelStatus) -> list[str]:
    if not model.expert_leases:
        return []
    counts = model.expert_hosts
    row = (
        "".join(str(min(n, 9)) for n in counts)
        if len(counts) <= MOST_EXPERTS_DRAWN
        else f"{min(counts)} to {max(counts)}"
    )
    lines = [f"  {'experts':<10}{row}   (how many peers host each)"]
    for lease in model.expert_leases:
        mine = "  this node" if lease.peer == reply.peer else ""
        versions = ", ".join(v.number or short(v.id) for v in lease.versions)
        moving = f", exchanging {describe(lease.going)} for {describe(lease.coming)}" if lease.coming else ""
        layers = f"{lease.span.start}:{lease.span.end}"
        lines.append(
            f"  {describe(lease.experts)} of {layers}  {lease.peer}  {versions}  {printable(lease.dtype)}, "
            f"{lease.pair_seconds * 1e3:.2f} ms a row, {rows_said(lease)}{moving}{mine}"
        )
    return lines


def rows_said(lease: pb.ExpertLeaseStatus) -> str:
    """How often its experts were asked lately, all together and the one that was asked most."""
    rates = list(lease.rows_per_second)
    if not rates:
        return "rows not told"
    said = f"{sum(rates):.1f} rows a second and layer"
    most = max(rates)
    return f"{said}, {most:.1f} of them for expert {lease.experts[rates.index(most)]}" if most else said
