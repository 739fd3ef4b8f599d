// Experts: those of a mixture, and who hosts them apart from their layers; and what modular experts are chosen for.

import { count, element, peerName, short, table } from "./parts.js";

const MOST_DRAWN = 128;
const at = (id) => document.getElementById(id);

function grid(columns, ...children) {
  const node = element("div", { class: "row" }, children);
  node.style.setProperty("--layers", columns);
  return node;
}

function overview(hosted) {
  const total = hosted.hosts.length;
  if (total > MOST_DRAWN) return null;
  const most = Math.max(...hosted.asked, 0.01);
  const cell = (attributes, said, shown) => element("div", attributes, element("span", { class: "out-of-sight" }, said), shown);
  return [
    grid(total, element("div", { class: "who quiet" }, "expert"), hosted.hosts.map((_, expert) => element("div", { class: "cell", "aria-hidden": "true" }, expert))),
    grid(total, element("div", { class: "who quiet" }, "hosts of it"), hosted.hosts.map((hosts, expert) => cell(
      { class: `cell ${hosts ? "covered" : "uncovered"}`, title: `expert ${expert}: ${count(hosts, "host")}` }, `expert ${expert}, hosts: `, hosts ? String(hosts) : "✗"))),
    grid(total, element("div", { class: "who quiet" }, "rows/s"), hosted.asked.map((rate, expert) => {
      const node = cell({ class: "cell shaded", title: `expert ${expert}: ${rate} rows a second in a layer` }, `expert ${expert}, rows a second: `, rate >= 10 ? rate.toFixed(0) : rate.toFixed(1));
      node.style.setProperty("--share", rate / most);
      return node;
    })),
  ];
}

function hosts(hosted, here) {
  const rows = hosted.leases.map((lease) => [
    element("span", {}, peerName(lease.peer), here && here.peer === lease.peer ? " (this node)" : ""),
    lease.coming ? `${lease.experts} (exchanging ${lease.going} for ${lease.coming})` : lease.experts,
    `${lease.start}:${lease.end}`,
    lease.asked === null ? "" : lease.asked.toFixed(1),
    (lease.pair_seconds * 1000).toFixed(2),
    lease.versions.map((version) => version.number || short(version.id)).join(", "),
    lease.dtype,
  ]);
  return table("Hosts of experts", ["host", "experts", "layers", "rows a second", "ms a row", "versions", "dtype"], rows);
}

function heatmap(shares) {
  const rows = shares.rows.map((row) => [row.text, ...row.shares.map((share) => {
    const node = element("span", { class: "shaded share" }, `${(share * 100).toFixed(0)} %`);
    node.style.setProperty("--share", share);
    return node;
  })]);
  return [
    element("h3", {}, `Modular experts of ${shares.number}, by text`),
    table("Share of each expert, by text", ["text", ...shares.names], rows),
  ];
}

export function experts(status) {
  const { hosted, shares } = status.experts ?? { hosted: null, shares: null };
  at("experts-card").hidden = !hosted && !shares;
  const parts = [hosted ? [overview(hosted), hosts(hosted, status.here)] : null, shares ? heatmap(shares) : null];
  at("experts").replaceChildren(...parts.flat(Infinity).filter(Boolean));
  const missing = hosted ? hosted.hosts.map((peers, expert) => (peers ? null : expert)).filter((expert) => expert !== null) : [];
  at("experts-note").textContent = missing.length ? `nobody hosts ${missing.length > 8 ? `${missing.length} of them` : `expert ${missing.join(", ")}`}`
    : hosted ? "hosted apart from their layers: by whom, and how often they are asked" : "";
}
