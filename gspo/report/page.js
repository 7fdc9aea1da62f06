"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const several = data.runs.length > 1;
const GREY = "#8d97a5";

/* ---- elements */

/* An element; texts in it are texts and never markup. */
function element(tag, name, ...inner) {
  const made = document.createElement(tag);
  made.className = name;
  made.append(...inner);
  return made;
}

function text(value) {
  return typeof value === "string" ? value : JSON.stringify(value ?? "-");
}

function figure(value) {
  return Number.isFinite(value) ? String(+value.toPrecision(4)) : "-";
}

function list(value) {
  return Array.isArray(value) ? value : [];
}

function folded(title, ...inner) {
  return element("details", "", element("summary", "", title), ...inner);
}

function table(rows) {
  const cells = (row) => row.map((cell) => element("td", "", text(cell)));
  return element("div", "table", element("table", "", ...rows.map((row) => element("tr", "", ...cells(row)))));
}

/* Nothing if there are no parts. */
function section(title, note, parts) {
  return parts.length ? [element("h2", "", title), element("p", "faint", note), ...parts] : [];
}

/* ---- curves */

const STYLES = {
  line: { width: 2 },
  points: { width: 2, dash: [6, 4], points: { show: true, size: 8 } },
  faint: { width: 1, alpha: 0.5, points: { show: false } },
  low: { width: 0, points: { show: false } },
  high: { width: 0, points: { show: false } },
};

/* Paint what lies under the lines: the band of healthy values, and alarms. */
function underlay(plot, chart) {
  const { ctx, bbox } = plot;
  const at = (value, axis) => plot.valToPos(value, axis, true);
  ctx.save();
  ctx.beginPath();
  ctx.rect(bbox.left, bbox.top, bbox.width, bbox.height);
  ctx.clip();
  if (chart.band.length) {
    const [low, high] = chart.band.map((value) => at(value, "y"));
    ctx.fillStyle = "#12a97522";
    ctx.fillRect(bbox.left, high, bbox.width, low - high);
  }
  ctx.font = `600 ${12 * devicePixelRatio}px system-ui`;
  const named = new Set();
  for (const mark of chart.marks) {
    const from = at(mark.first - 0.5, "x");
    ctx.fillStyle = "#e5484d44";
    ctx.fillRect(from, bbox.top, at(mark.last + 0.5, "x") - from + 2, bbox.height);
    if (named.has(mark.kind)) continue;
    named.add(mark.kind);
    ctx.fillStyle = "#e5484d";
    const room = bbox.left + bbox.width - ctx.measureText(mark.kind).width;
    ctx.fillText(mark.kind, Math.min(from, room), bbox.top + 14 * named.size * devicePixelRatio);
  }
  ctx.restore();
}

function draw(chart, host) {
  const lines = chart.lines;
  const axis = { stroke: GREY, grid: { stroke: GREY + "44", width: 1 }, ticks: { stroke: GREY + "44" } };
  const series = lines.map((line) => (
    { label: line.label, stroke: line.colour, value: (_, y) => figure(y), spanGaps: true, ...STYLES[line.kind] }));
  const bands = lines.flatMap((line, i) => (
    line.kind === "high" ? [{ series: [i + 1, i], fill: line.colour + "40" }] : []));
  const marked = chart.marks.flatMap((mark) => [mark.first, mark.last]);
  const steps = lines.flatMap((line) => line.x).concat(marked, 0, 1);
  const first = steps.reduce((a, b) => Math.min(a, b));
  const last = steps.reduce((a, b) => Math.max(a, b));
  function range(_, low, high) {
    if (chart.top) return [Math.min(0, low), Math.max(chart.top, high) * 1.03];
    const room = 0.05 * (high - low || Math.abs(high) || 1);
    return [low - room, high + room];
  }
  return new uPlot({
    width: host.clientWidth,
    height: 240,
    scales: { x: { time: false, range: [first - 0.5, last + 0.5] }, y: { range } },
    axes: [{ ...axis, space: 45, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 10000] }, { ...axis, size: 58 }],
    series: [{ label: "rollout batch", value: (_, x) => figure(x) }, ...series],
    bands,
    cursor: { sync: { key: "runs" }, drag: { x: true, y: false } },
    hooks: { drawAxes: [(plot) => underlay(plot, chart)] },
  }, uPlot.join(lines.map((line) => [line.x, line.y])), host);
}

/* ---- texts */

function response(value, reward, passed) {
  const earned = Number.isFinite(reward) ? `reward ${figure(reward)}` : "not judged";
  return element("div", "", element("b", passed ? "good" : "bad", earned), element("pre", "", text(value)));
}

function evaluated(line) {
  const when = line.step ? `after rollout batch ${line.step}` : "before training";
  const cut = line.cut_characters ? ` (${line.cut_characters} characters were not kept)` : "";
  const shown = list(line.responses).map((value, i) => response(value, list(line.rewards)[i], list(line.passed)[i]));
  return element("div", "", element("p", "", when + cut), ...shown);
}

function question(line) {
  return [element("pre", "", text(line.prompt)), element("p", "faint", `reference answer: ${text(line.answer)}`)];
}

function problem({ problem, before, after, means }, i) {
  const sides = before.step === after.step ? [before] : [before, after];
  const title = `problem ${problem}: mean reward ${means.map(figure).join(" → ")}`;
  const made = folded(title, ...question(before), element("div", "pair", ...sides.map(evaluated)));
  made.open = i < 2;
  return made;
}

function pair({ step, best, worst }) {
  const both = [best, worst].filter((sample) => sample);
  const title = `rollout batch ${step}: rewards ${both.map((sample) => figure(sample.reward)).join(" and ")}`;
  const shown = both.map((sample) => response(sample.response, sample.reward, sample.reward > 0));
  return folded(title, ...question(both[0] ?? {}), element("div", "pair", ...shown));
}

function texts(run) {
  const alarms = run.alarms.map((alarm) => element("p", "", `${alarm.kind}, ${alarm.when}: ${alarm.message}`));
  const evidence = run.emergency_samples.map((sample) => response(sample.response, sample.reward, sample.reward > 0));
  return [
    ...section("Alarms", "", alarms),
    ...section("Evidence of the emergency stop", "Responses of the rollout batch in which it stopped.", evidence),
    ...section("Held-out problems before and after",
      `${run.problems.length} of ${run.all_problems}, those whose reward changed most first.`, run.problems.map(problem)),
    ...section("Best and worst responses of groups in training",
      `Of ${run.samples.length} of ${run.all_samples} rollout batches.`, run.samples.map(pair)),
  ];
}

/* ---- the page */

function verdict(run) {
  const [headline, ...others] = run.verdict;
  const isBad = /^(Collapsed|Stopped|Tied|Responses|It got worse)/.test(headline);
  const colour = isBad ? "bad" : headline.startsWith("It learned") ? "good" : "";
  return element("div", "card",
    element("b", "", several ? run.name : ""),
    element("p", `headline ${colour}`, headline),
    ...others.map((sentence) => element("p", "", sentence)),
    ...run.damage.map((what) => element("p", "bad", `Damaged: ${what}.`)),
    folded("Command, commit, hardware, configuration", table(Object.entries(run.config))));
}

const differing = Object.entries(data.differences).map(([name, values]) => [name, ...values]);
const hosts = data.charts.map((chart, i) => {
  const host = element("div", "chart", element("h3", "", chart.title));
  host.id = `chart${i}`;
  return host;
});
document.getElementById("page").replaceChildren(
  element("h1", "", several ? `${data.runs.length} runs` : data.runs[0].name),
  element("div", several ? "runs" : "", ...data.runs.map(verdict)),
  ...section("Settings that differ", "", differing.length ? [table([["", ...data.runs.map((run) => run.name)], ...differing])] : []),
  ...section("Curves", "Over rollout batches. Point at a chart for its values; drag to zoom, double-click to go back.",
    [element("div", "charts", ...hosts)]),
  ...data.runs.flatMap((run) => (several ? [folded(`Texts of ${run.name}`, ...texts(run))] : texts(run))));

const plots = data.charts.map((chart, i) => draw(chart, hosts[i]));
performance.mark("drawn");
addEventListener("resize", () => plots.forEach((plot, i) => plot.setSize({ width: hosts[i].clientWidth, height: 240 })));
