"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const page = document.getElementById("page");
const COLOURS = ["#3b82f6", "#f0871f", "#12a975", "#c54bb0", "#8b6cf0", "#8d97a5"];
const ALARM = "#e5484d";

/* An element; texts in it are texts and never markup. */
function element(tag, name, ...inner) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  made.append(...inner.filter((part) => part !== null && part !== undefined));
  return made;
}
const text = (value) => (typeof value === "string" ? value : JSON.stringify(value) ?? "");
const figure = (value) => (value === null || value === undefined ? "-" : String(+(+value).toPrecision(4)));
const sentence = (value) => value.split(/(--\w+)/).map((part, i) => (i % 2 ? element("span", "flag", part) : part));
const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

/* ---- curves */
function series(line, count) {
  const shade = COLOURS[line.colour % COLOURS.length];
  const base = { label: line.label, stroke: shade, width: 2, value: (_, value) => figure(value), points: { show: count < 40 } };
  switch (line.kind) {
    case "low":
    case "high":
      return { ...base, class: "edge", stroke: shade + "66", width: 0, spanGaps: true, points: { show: false } };
    case "trend":  // of the faint line before it, whose values the legend shows
      return { ...base, class: "hidden", points: { show: false } };
    case "faint":
      return { ...base, stroke: shade + (count < 200 ? "70" : "38"), width: 1, points: { show: false } };
    case "wide":
      return { ...base, stroke: shade + "60", width: 6, points: { show: false } };
    case "thin":
      return { ...base, stroke: COLOURS[5] + (count < 200 ? "99" : "40"), width: 1, points: { show: false } };
    case "second":
      return { ...base, scale: "share" };
    case "points":
      return { ...base, dash: [6, 4], spanGaps: true, points: { show: true, size: 8, fill: shade } };
  }
  return base;
}

function plot(chart, host, width) {
  const lines = chart.lines;
  const bands = lines.flatMap((line, i) =>
    line.kind === "high" ? [{ series: [i + 1, i], fill: COLOURS[line.colour % COLOURS.length] + "33" }] : []);
  const axis = { stroke: colour("--faint"), grid: { stroke: colour("--line"), width: 1 }, ticks: { stroke: colour("--line") } };
  const hasSecond = lines.some((line) => line.kind === "second");
  function range(_, low, high) {
    if (low === null) return [0, chart.top || 1];
    if (chart.top) return [Math.min(0, low), Math.max(chart.top, high) * 1.02];
    const room = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1;
    return [low - room, high + room];
  }
  function underlay(u) {
    const { left, top, width, height } = u.bbox;
    const ctx = u.ctx;
    ctx.save();
    ctx.beginPath();
    ctx.rect(left, top, width, height);
    ctx.clip();
    if (chart.band.length) {
      const [from, to] = chart.band.map((value) => u.valToPos(value, "y", true));
      ctx.fillStyle = "#12a97522";
      ctx.fillRect(left, to, width, from - to);
    }
    chart.marks.forEach((mark, i) => {
      const from = u.valToPos(mark.first - 0.5, "x", true);
      const to = Math.max(from + 3, u.valToPos(mark.last + 0.5, "x", true));
      ctx.fillStyle = ALARM + "44";
      ctx.fillRect(from, top, to - from, height);
      if (chart.marks.findIndex((other) => other.kind === mark.kind) < i) return;
      ctx.fillStyle = ALARM;
      ctx.font = `600 ${12 * devicePixelRatio}px system-ui`;
      ctx.textAlign = from > left + width / 2 ? "right" : "left";
      ctx.fillText(mark.kind, ctx.textAlign === "right" ? to : from, top + (14 + 14 * (i % 3)) * devicePixelRatio);
    });
    ctx.restore();
  }
  const xs = chart.x.concat(chart.marks.map((mark) => mark.last));
  return new uPlot({
    width: width || host.clientWidth,
    height: width ? 180 : 240,  // of a printed page, eight fit on two
    scales: {
      x: { time: false, range: () => [Math.min(...xs, 0) - 0.5, Math.max(...xs, 1) + 0.5] },
      y: { range },
      share: { range: [0, 1.02] },
    },
    axes: [{ ...axis, space: 45, incrs: [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 100000] },
      { ...axis, size: 58, values: (_, splits) => splits.map((value) => String(+value.toPrecision(6))) }, ...(hasSecond ? [{ ...axis, scale: "share", side: 1, size: 40, grid: { show: false } }] : [])],
    series: [{ label: "rollout batch", value: (_, value) => figure(value) }, ...lines.map((line) => series(line, chart.x.length))],
    bands,
    cursor: { sync: { key: "runs" }, drag: { x: true, y: false } },
    hooks: { drawAxes: [underlay] },
  }, [chart.x, ...lines.map((line) => line.y)], host);
}

let plots = [];
function drawCharts(width) {
  plots.forEach((drawn) => drawn.destroy());
  plots = data.charts.map((chart, i) => plot(chart, document.getElementById(`chart${i}`), width));
}

/* ---- texts */
function response(value, reward, passed) {
  const mark = passed === undefined ? "" : passed ? ", passed" : ", not passed";
  const earned = reward === null || reward === undefined ? "not judged" : `reward ${figure(reward)}`;
  return element("div", "", element("span", passed || (passed === undefined && reward > 0) ? "good" : "bad", earned + mark),
    element("pre", "", text(value) || "(empty)"));
}

function evaluated(line) {
  const when = line.step === 0 ? "before training" : `after rollout batch ${figure(line.step)}`;
  const list = (value) => (Array.isArray(value) ? value : []);
  const cut = line.cut_characters ? ` (${line.cut_characters} characters were not kept)` : "";
  return element("div", "", element("b", "", when + cut),
    ...list(line.responses).map((value, i) => response(value, list(line.rewards)[i], list(line.passed)[i])));
}

function mean(rewards) {
  return Array.isArray(rewards) && rewards.length ? rewards.reduce((sum, value) => sum + (+value || 0), 0) / rewards.length : 0;
}

function problem(entry, i) {
  const { before, after } = entry;
  const [from, to] = [before, after].map((line) => figure(mean(line.rewards)));
  const title = element("summary", "", `problem ${entry.problem}: `,
    element("b", entry.change > 0 ? "good" : entry.change < 0 ? "bad" : "", `mean reward ${from} → ${to}`));
  const made = element("details", "", title, element("pre", "", text(before.prompt)),
    before.answer === null || before.answer === undefined ? null : element("p", "faint", "reference answer: ", text(before.answer)),
    element("div", "pair", evaluated(before), before.step === after.step ? null : evaluated(after)));
  made.open = i < 2;
  return made;
}

function pair(entry) {
  const shown = entry.best || entry.worst || {};
  const side = (name) => entry[name] && element("div", "", element("b", "", `, ${figure(entry[name].tokens)} tokens`),
    response(entry[name].response, entry[name].reward));
  return element("details", "",
    element("summary", "", `rollout batch ${entry.step}: rewards ${figure(entry.best?.reward)} and ${figure(entry.worst?.reward)}`),
    element("pre", "", text(shown.prompt)), element("p", "faint", "reference answer: ", text(shown.answer)),
    element("div", "pair", side("best"), side("worst")));
}

function table(rows) {
  return element("div", "table", element("table", "", ...rows.map((cells) =>
    element("tr", "", ...cells.map((cell) => element("td", "", text(cell)))))));
}

/* Some parts, with those after the first ten folded. */
function folded(parts) {
  if (parts.length <= 12) return parts;
  return [...parts.slice(0, 10), element("details", "", element("summary", "", `${parts.length - 10} more`), ...parts.slice(10))];
}

function section(title, note, parts) {
  return parts.length ? [element("h2", "", title), ...(note ? [element("p", "faint", note)] : []), ...parts] : [];
}

function verdict(run) {
  const [headline, ...others] = run.verdict;
  const bad = /^(Collapsed|Stopped|Tied|Responses|Every|It got worse)/.test(headline);
  return element("div", "card", several ? element("b", "", run.name) : null,
    element("p", `headline ${bad ? "bad" : /^It learned/.test(headline) ? "good" : ""}`, headline),
    ...others.map((other) => element("p", "", ...sentence(other))),
    element("details", "", element("summary", "", "Command, commit, hardware, configuration"),
      table(Object.entries(run.config))),
    ...run.damage.map((what) => element("p", "bad", `Damaged: ${what}.`)));
}

function texts(run) {
  const of = (kept, all) => (kept < all ? `${kept} of ${all} are shown. ` : "");
  return [
    ...section(`Alarms`, "", run.alarms.map((alarm) =>
      element("p", "", element("b", "bad", `${alarm.kind}, ${alarm.when}: `), ...sentence(alarm.message)))),
    ...section(`Evidence of the emergency stop`, "responses of the rollout batch in which it stopped",
      run.emergency_samples.map((sample) => response(sample.response, sample.reward))),
    ...section(`Held-out problems before and after`,
      of(run.problems.length, run.all_problems) + "Those whose reward changed most come first.", folded(run.problems.map(problem))),
    ...section(`Best and worst responses of groups in training`,
      of(run.samples.length, run.all_samples), folded(run.samples.map(pair))),
  ];
}

const several = data.runs.length > 1;
const differing = Object.entries(data.differences).map(([name, values]) => [name, ...values]);
page.replaceChildren(
  element("h1", "", several ? `${data.runs.length} runs` : data.runs[0].name),
  ...data.seeds.map((gain) => element("p", "", gain)),
  element("div", several ? "runs" : "", ...data.runs.map(verdict)),
  ...section("Settings that differ", "", several && differing.length
    ? [table([["", ...data.runs.map((run) => run.name)], ...differing])] : []),
  element("h2", "", "Curves"),
  element("p", "faint", data.note),
  element("div", "charts", ...data.charts.map((chart, i) => {
    const host = element("div", "chart", element("h3", "", chart.title));
    host.id = `chart${i}`;
    return host;
  })),
  ...data.runs.flatMap((run) => several ? [element("details", "", element("summary", "", `Texts of ${run.name}`), ...texts(run))] : texts(run)));

drawCharts();
performance.mark("drawn");
const dark = matchMedia("(prefers-color-scheme: dark)");
dark.addEventListener("change", () => drawCharts());
addEventListener("resize", () => plots.forEach((drawn) => drawn.setSize({ width: drawn.root.parentElement.clientWidth, height: 240 })));
addEventListener("beforeprint", () => { document.documentElement.classList.add("print"); drawCharts(330); });
addEventListener("afterprint", () => { document.documentElement.classList.remove("print"); drawCharts(); });
