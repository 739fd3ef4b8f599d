// How things are drawn. Every string goes into a text node or an attribute: nothing here is ever parsed as HTML.

const SVG = "http://www.w3.org/2000/svg";

export function element(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

export function drawing(tag, attributes = {}, ...children) {
  return filled(document.createElementNS(SVG, tag), attributes, children);
}

function filled(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : String(value));
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

export const tail = (peer) => `…${String(peer).slice(-8)}`;
export const short = (digest) => String(digest).slice(0, 10);
export const count = (n, one, many = `${one}s`) => `${n} ${n === 1 ? one : many}`;

export function peerName(peer) {
  return element("span", { class: "mono", title: peer }, tail(peer));
}

export function table(caption, columns, rows) {
  const figures = columns.map((_, at) => rows.length > 0 && rows.some((row) => row[at] !== "") && rows.every((row) => typeof row[at] === "string" && /^[-+]?[\d.,]+ ?%?$|^$/.test(row[at])));
  const cell = (tag, at, content, attributes = {}) => element(tag, { ...attributes, class: figures[at] ? "figure" : null }, content);
  return element("table", {},
    element("caption", { class: "out-of-sight" }, caption),
    element("thead", {}, element("tr", {}, columns.map((name, at) => cell("th", at, name, { scope: "col" })))),
    element("tbody", {}, rows.map((row) => element("tr", {}, row.map((value, at) => cell("td", at, value))))));
}

const MARKS = {
  circle: (x, y) => drawing("circle", { cx: x, cy: y, r: 3.2 }),
  square: (x, y) => drawing("rect", { x: x - 3, y: y - 3, width: 6, height: 6 }),
  triangle: (x, y) => drawing("path", { d: `M${x} ${y - 4}l4 7h-8z` }),
  diamond: (x, y) => drawing("path", { d: `M${x} ${y - 4.2}l4.2 4.2l-4.2 4.2l-4.2-4.2z` }),
};
const SHAPES = Object.keys(MARKS);
const DASHES = [null, "6 3", "2 3", "9 3 2 3"];

// Colour, mark and dashes all differ, so that none of them has to be seen.
const look = (index) => ({ class: `s${(index % 6) + 1}`, shape: SHAPES[index % 4], dash: DASHES[index % 4] });

// width: in CSS pixels, so that letters are as large as elsewhere.
export function curves(labels, series, width) {
  const [height, left, right, top, bottom] = [220, 46, 12, 12, 24];
  const values = series.flatMap((one) => one.values.filter((value) => value !== null));
  let [least, most] = [Math.min(...values), Math.max(...values)];
  const room = Math.max((most - least) * 0.12, 0.002);
  [least, most] = [least - room, most + room];
  const x = (at) => left + (labels.length === 1 ? 0.5 : at / (labels.length - 1)) * (width - left - right);
  const y = (value) => top + (1 - (value - least) / (most - least)) * (height - top - bottom);
  const every = Math.ceil(labels.length / (width / 70));
  const grid = [0, 1, 2, 3].map((step) => least + ((most - least) * (step + 0.5)) / 4);
  const chart = drawing("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `Exam losses of ${count(labels.length, "version")}; the tables below have the figures.` },
    grid.map((value) => [
      drawing("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }),
      drawing("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end" }, value.toFixed(3)),
    ]),
    labels.map((label, at) => at % every === 0 ? drawing("text", { x: x(at), y: height - 6, "text-anchor": labels.length > 1 && at === labels.length - 1 ? "end" : at === 0 && labels.length > 1 ? "start" : "middle" }, label) : null),
    series.map((one, index) => {
      const style = look(index);
      const points = one.values.map((value, at) => (value === null ? null : [x(at), y(value)])).filter((point) => point);
      return drawing("g", { class: style.class },
        drawing("polyline", { class: "series", points: points.map((point) => point.join(",")).join(" "), "stroke-dasharray": style.dash }),
        points.map((point) => MARKS[style.shape](...point)));
    }));
  const key = series.map((one, index) => {
    const style = look(index);
    return element("span", {}, drawing("svg", { viewBox: "0 0 26 10", class: style.class, "aria-hidden": "true" },
      drawing("line", { x1: 0, x2: 26, y1: 5, y2: 5, "stroke-width": 2, "stroke-dasharray": style.dash }), MARKS[style.shape](13, 5)), one.name);
  });
  return [chart, element("figcaption", {}, element("span", {}, "Exam, nats per byte; lower is better:"), key)];
}
