import { experts } from "./experts.js";
import { count, curves, element, peerName, short, table, tail } from "./parts.js";

const at = (id) => document.getElementById(id);
const show = (id, ...children) => at(id).replaceChildren(...children.flat(Infinity));
const text = (id, value) => { if (at(id).textContent !== value) at(id).textContent = value; };
const PHASES = { open: "open: patches come in", sealed: "sealed: merging and examining", voting: "voting: maintainers examine" };
const ENDS = { adopted: "adopted", rejected: "rejected", abandoned: "abandoned" };

let before = null;
let latest = null;

function summary(status) {
  const served = status.coverage.filter((peers) => peers > 0).length;
  const complete = served === status.model.layers;
  const items = [
    ["Version served", status.model.served.number || short(status.model.served.id), status.model.served.id === status.model.head.id ? "the newest" : `${status.model.head.number} is being taken on`],
    ["Layers served", `${served} of ${status.model.layers}`, complete ? "✓ complete" : "✗ not usable"],
    ["Peers", String(status.peers.length), count(status.leases.length, "host")],
    ["Sessions lately", String(status.leases.reduce((most, lease) => Math.max(most, lease.queue), 0)), "at the busiest host"],
  ];
  if (status.requests) items.push(["Answers", String(status.requests.at_work), `at work, ${status.requests.waiting} waiting`], ["Answered", String(status.requests.answered), "here"]);
  if (status.round) items.push(["Round", String(status.round.number), `${status.round.phase}, ${count(status.round.patches.length, "patch", "patches")}`]);
  show("summary", items.map(([name, value, note]) => element("div", {}, element("dt", {}, name), element("dd", {}, value, element("small", {}, note)))));
}

const milliseconds = (lease) => (lease.layer_seconds * 1000).toFixed(2);
const newest = (lease) => lease.versions.map((version) => version.number || short(version.id)).pop();

function place(node, first, last) {
  node.style.gridColumn = `${first + 2} / ${last + 2}`;
  return node;
}

function row(layers, ...children) {
  const node = element("div", { class: "row" }, children);
  node.style.setProperty("--layers", layers);
  return node;
}

function layers(status) {
  const total = status.model.layers;
  const numbers = row(total, element("div", { class: "who quiet" }, "layer"), status.coverage.map((_, layer) => element("div", { class: "cell", "aria-hidden": "true" }, layer)));
  const covered = row(total, element("div", { class: "who quiet" }, "hosts of it"), status.coverage.map((peers, layer) => element("div", {
    class: `cell ${peers ? "covered" : "uncovered"}`, title: `layer ${layer}: ${count(peers, "host")}` },
    element("span", { class: "out-of-sight" }, `layer ${layer}: `), peers ? String(peers) : "✗", element("span", { class: "out-of-sight" }, peers ? " hosts. " : " nobody. "))));
  const bars = status.leases.map((lease) => {
    const here = status.here !== null && lease.peer === status.here.peer;
    const said = [newest(lease), `${milliseconds(lease)} ms a layer`, lease.dtype, `${lease.queue} sessions`, here ? "this node" : ""].filter(Boolean).join(" · ");
    const bar = place(element("div", { class: `bar${here ? " here" : ""}`, title: `${lease.peer}: layers ${lease.start} to ${lease.end - 1} · ${said}` },
      element("span", { class: "out-of-sight" }, `layers ${lease.start} to ${lease.end - 1}: `), said), lease.start, lease.end);
    const moving = lease.moving && place(element("div", { class: "bar moving" }, "is loading these"), lease.moving[0], lease.moving[1]);
    return [row(total, element("div", { class: "who" }, peerName(lease.peer)), bar), moving ? row(total, element("div", { class: "who" }), moving) : null];
  });
  show("layers", numbers, covered, bars.flat().filter(Boolean));
  const missing = status.coverage.map((peers, layer) => (peers ? null : layer)).filter((layer) => layer !== null);
  text("layers-note", missing.length ? `nobody serves ${missing.length > 8 ? `${missing.length} of them` : `layer ${missing.join(", ")}`}` : "who serves each, at what speed and version");
}

function verdict(one) {
  return [one.accept ? element("span", { class: "good" }, "✓ accepts") : element("span", { class: "bad" }, "✗ rejects"), " ", peerName(one.maintainer), one.reason ? ` ${one.reason}` : ""];
}

function verdicts(all, threshold) {
  return element("p", { class: "small" }, `${count(all.length, "verdict")}, ${all.filter((one) => one.accept).length} of ${threshold} needed accept: `,
    all.map((one, index) => [index ? ", " : "", verdict(one)]));
}

function patchRows(patches, settled = new Map()) {
  return patches.map((patch) => [
    element("span", { class: "mono", title: patch.id }, short(patch.id)),
    patch.contributor ? peerName(patch.contributor) : element("span", { class: "quiet" }, "not here"),
    patch.kind || "", String(patch.samples ?? ""),
    patch.claimed ? `${patch.claimed[0].toFixed(3)} → ${patch.claimed[1].toFixed(3)}` : "",
    patch.licence || "", settled.get(patch.id) || "",
  ]);
}

const PATCH_COLUMNS = ["patch", "contributor", "kind", "samples", "loss it claims", "licence", "what became of it"];

function round(status) {
  const now = status.round;
  at("round-card").hidden = now === null;
  if (!now) return;
  const phases = now.phase in ENDS ? { ...PHASES, [now.phase]: ENDS[now.phase] } : { ...PHASES, adopted: ENDS.adopted };
  show("phases", Object.entries(phases).map(([phase, said]) => element("li", { "aria-current": phase === now.phase ? "step" : null }, element("span", {}, said))));
  const settled = new Map();
  for (const candidate of now.candidates) {
    for (const patch of candidate.patches) settled.set(patch, element("span", { class: "good" }, `✓ in ${candidate.number}`));
    for (const left of candidate.left_out) settled.set(left.patch, `left out: ${left.reason}`);
  }
  show("round",
    now.patches.length ? element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Patches of the round" }, table("Patches of the round", PATCH_COLUMNS, patchRows(now.patches, settled)))
      : element("p", { class: "quiet small" }, `No patches yet; ${count(now.wanted, "patch", "patches")} seal the round.`),
    now.candidates.map((candidate) => [element("h3", {}, `Candidate ${candidate.number} `, element("span", { class: "mono quiet" }, short(candidate.id)), " by ", peerName(candidate.proposer)), verdicts(candidate.verdicts, now.threshold)]));
  ages();
}

// Sections of an exam other than texts are named KIND/NAME, and their scores are shares of failed cases.
const isLoss = (score) => !score.domain.includes("/");

function change(score) {
  const difference = score.parent > 0 && isLoss(score) ? score.candidate / score.parent - 1 : score.candidate - score.parent;
  return `${difference > 0 ? "+" : ""}${(difference * 100).toFixed(2)}%`;
}

function version(one, status) {
  const rows = one.scores.map((score) => [score.domain, score.base.toFixed(4), score.parent.toFixed(4), score.candidate.toFixed(4), change(score), score.mean === null ? "-" : score.mean.toFixed(4)]);
  const settled = new Map(one.left_out.map((left) => [left.patch, `left out: ${left.reason}`]));
  const patches = [...one.patches, ...one.left_out.map((left) => ({ id: left.patch }))];
  const losses = one.scores.filter((score) => isLoss(score) && score.parent > 0);
  const mean = losses.length ? losses.reduce((sum, score) => sum + score.candidate / score.parent - 1, 0) / losses.length : null;
  return element("details", { id: `version-${one.id}` },
    element("summary", {}, element("b", {}, one.number), element("span", { class: "mono quiet" }, short(one.id)),
      element("span", {}, `round ${one.round}, ${count(one.patches.length, "patch", "patches")} by ${one.strategy}`),
      mean === null ? null : element("span", { class: mean <= 0 ? "good" : "bad" }, `${mean <= 0 ? "▼" : "▲"} ${Math.abs(mean * 100).toFixed(2)} % loss`),
      one.id === status.model.served.id ? element("span", { class: "quiet" }, "served now") : null),
    element("div", {},
      element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Exam of ${one.number}` }, table(`Exam of ${one.number}`, ["exam; lower is better", "base", "parent", one.number, "change", "plain mean"], rows)),
      element("h3", {}, "Patches"), element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Patches of ${one.number}` }, table(`Patches of ${one.number}`, PATCH_COLUMNS, patchRows(patches, settled))),
      verdicts(one.verdicts, status.model.threshold)));
}

function versions(status) {
  if (before && JSON.stringify([before.versions, before.model]) === JSON.stringify([status.versions, status.model])) return;
  const open = new Set([...document.querySelectorAll("#versions details[open]")].map((node) => node.id));
  show("versions", [...status.versions].reverse().map((one) => version(one, status)),
    element("p", { class: "small quiet" }, "1.0.0 is the base: ", status.model.architecture, status.model.licence ? `, ${status.model.licence}` : ""));
  for (const node of document.querySelectorAll("#versions details")) node.open = open.has(node.id);
  text("versions-note", status.versions.length ? `${count(status.versions.length, "adopted version")}, the newest first` : "none adopted yet but the base");
  figure(status);
}

function figure(status) {
  const examined = status.versions.filter((one) => one.scores.some(isLoss));
  const domains = [...new Set(examined.flatMap((one) => one.scores.filter(isLoss).map((score) => score.domain)))];
  if (!examined.length) return show("curves");
  const first = Object.fromEntries(examined[0].scores.map((score) => [score.domain, score.parent]));
  const series = domains.map((name) => ({ name, values: [first[name] ?? null, ...examined.map((one) => one.scores.find((score) => score.domain === name)?.candidate ?? null)] }));
  show("curves", curves(["before", ...examined.map((one) => one.number)], series, Math.max(280, at("curves").clientWidth)));
}

function peers(status) {
  const maintainers = new Set(status.model.maintainers);
  const hosts = new Map(status.leases.map((lease) => [lease.peer, lease]));
  show("peers", table("Peers", ["peer", "roles", "layers", "version", "ms a layer", "sessions", "software"], status.peers.map((peer) => [
    element("span", {}, peerName(peer.peer), status.here && status.here.peer === peer.peer ? " (this node)" : ""),
    peer.roles.join(", ") + (maintainers.has(peer.peer) && !peer.roles.includes("maintainer") ? ", its key maintains" : ""),
    hosts.has(peer.peer) ? `${hosts.get(peer.peer).start}:${hosts.get(peer.peer).end}` : "–",
    hosts.has(peer.peer) ? newest(hosts.get(peer.peer)) : "",
    hosts.has(peer.peer) ? milliseconds(hosts.get(peer.peer)) : "",
    hosts.has(peer.peer) ? String(hosts.get(peer.peer).queue) : "", peer.software])));
  text("peers-note", count(status.peers.length, "peer"));
}

function news(status) {
  if (!before) return;
  const said = [];
  if (before.model.served.id !== status.model.served.id) said.push(`Version ${status.model.served.number} is served.`);
  if (before.round && status.round && before.round.phase !== status.round.phase) said.push(`Round ${status.round.number}: ${status.round.phase}.`);
  const whole = (one) => one.coverage.every((hosts) => hosts > 0);
  if (whole(before) !== whole(status)) said.push(whole(status) ? "Every layer is served again." : "Not every layer is served.");
  const [had, has] = [before, status].map((one) => new Map(one.leases.map((lease) => [lease.peer, lease])));
  for (const peer of has.keys()) if (!had.has(peer)) said.push(`Host ${tail(peer)} has come.`);
  for (const peer of had.keys()) if (!has.has(peer)) said.push(`Host ${tail(peer)} has gone.`);
  if (said.length) text("news", said.join(" "));
}

function ages() {
  if (!latest || !latest.round) return;
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - latest.round.since));
  const age = seconds < 90 ? `${seconds} s` : seconds < 5400 ? `${Math.round(seconds / 60)} min` : seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} days`;
  text("round-note", `${latest.round.number}, ${latest.round.phase} for ${age}`);
}

function render(status) {
  latest = status;
  document.title = `${status.model.name} ${status.model.served.number} – p2pmodel`;
  text("name", status.model.name);
  at("to-chat").hidden = !status.chat;
  for (const part of [summary, layers, experts, round, versions, peers, news]) part(status);
  at("join-card").hidden = !status.join;
  text("join", status.join);
  before = status;
}

function listen() {
  const source = new EventSource("/events");
  source.addEventListener("status", (event) => { text("connection", "live"); render(JSON.parse(event.data)); });
  source.addEventListener("open", () => { if (!latest) text("connection", "waiting for the node …"); else text("connection", "live"); });
  source.addEventListener("error", () => text("connection", "not connected: what you see may be old"));
}

at("copy").addEventListener("click", async () => {
  const selection = getSelection();
  selection.selectAllChildren(at("join"));
  try {
    await navigator.clipboard.writeText(at("join").textContent);
    text("copied", "Copied.");
  } catch {
    text("copied", "Selected: copy it with your keyboard.");
  }
});
addEventListener("resize", () => latest && figure(latest));
setInterval(ages, 1000);
listen();
