"use strict";
/* Draws the charts, which are those of charts.py, with uPlot. */
const GREY = "#8d97a5";
const HEIGHT = 240;
const STYLES = {
  line: { width: 2 },
  points: { width: 2, dash: [6, 4], points: { show: true, size: 8 } },
  faint: { width: 1, alpha: 0.4, points: { show: false } },
  low: { width: 0, points: { show: false } },
  high: { width: 0, points: { show: false } },
};
const figure = (_, value) => (value === null || value === undefined ? "-" : String(+value.toPrecision(4)));

/* Paint the rollout batches with alarms, under the lines. */
function underlay({ ctx, bbox, valToPos }, marks) {
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  ctx.fillStyle = "#e5484d44";
  for (const mark of marks) {
    const from = valToPos(mark.first - 0.5, "x", true);
    const to = valToPos(mark.last + 0.5, "x", true);
    ctx.fillRect(from, bbox.top, Math.max(3, to - from), bbox.height);
  }
  ctx.restore();
}

function draw({ title, lines, marks, top }) {
  const host = document.createElement("div");
  host.append(Object.assign(document.createElement("h3"), { textContent: title }));
  document.getElementById("charts").append(host);
  const labels = lines.map((line) => line.label);
  const series = lines.map((line, i) => ({
    label: line.label,
    stroke: line.colour,
    spanGaps: true,
    value: figure,
    // A mean over neighbours has the label of the line before it, whose values are shown.
    class: labels.indexOf(line.label) < i ? "hidden" : null,
    ...STYLES[line.kind],
  }));
  const highs = lines.flatMap((line, i) => (line.kind === "high" ? [i + 1] : []));
  const axis = { stroke: GREY, grid: { stroke: GREY + "44", width: 1 }, ticks: { stroke: GREY + "44" } };
  function range(_, low, high) {
    const room = 0.05 * (high - low || Math.abs(high) || 1);
    return top ? [Math.min(0, low), Math.max(top, high) + room] : [low - room, high + room];
  }
  // The alarms' rollout batches are part of the axis, also one that was not finished.
  const marked = [...new Set(marks.flatMap((mark) => [mark.first, mark.last]))].sort((a, b) => a - b);
  const tables = [[marked, marked.map(() => null)], ...lines.map((line) => [line.x, line.y])];
  const [x, , ...ys] = uPlot.join(tables);
  return new uPlot({
    width: host.clientWidth,
    height: HEIGHT,
    scales: { x: { time: false, range: (_, low, high) => [low - 0.5, high + 0.5] }, y: { range } },
    axes: [{ ...axis, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000] }, { ...axis, size: 58 }],
    series: [{ label: "rollout batch", value: figure }, ...series],
    bands: highs.map((i) => ({ series: [i, i - 1], fill: lines[i - 1].colour + "40" })),
    cursor: { sync: { key: "runs" }, drag: { x: true, y: false } },
    hooks: { drawAxes: [(plot) => underlay(plot, marks)] },
  }, [x, ...ys], host);
}

const plots = charts.map(draw);
performance.mark("drawn");
addEventListener("resize", () => {
  plots.forEach((plot) => plot.setSize({ width: plot.root.parentElement.clientWidth, height: HEIGHT }));
});
