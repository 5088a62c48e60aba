// A score over training: a line for each head, the chosen one strong. Where there is one step, there is no line.

const TIMELINE = { width: 400, height: 124, left: 30, right: 44, top: 7, bottom: 20 };
const timelineView = { name: "", x: null, y: null, lines: [] };

function pointsOf(which, score, layer, head) {
  return about.runs[which].steps
    .map((entry) => [entry.step, entry.scores[score]?.[layer]?.[head] ?? null])
    .filter(([, value]) => value !== null);
}

const pathOf = (points, x, y) =>
  points.map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");

// A few round numbers from low to high.
function roundTicks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((times) => times * power >= rough) * power;
  const ticks = [];
  for (let value = Math.ceil(low / unit) * unit; value <= high + unit * 1e-6; value += unit) ticks.push(value);
  return ticks;
}

function scales(score) {
  const { width, height, left, right, top, bottom } = TIMELINE;
  const all = about.runs.flatMap((entry) => entry.steps.map(({ step }) => step));
  const [first, last] = [Math.min(...all), Math.max(...all)];
  const [low, high] = limitsOf(score);
  const x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - right);
  const y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  return { x, y, first, last, low, high };
}

function axes({ x, y, first, last, low, high }) {
  const { width, height, left, right, bottom } = TIMELINE;
  const parts = [];
  for (const value of roundTicks(low, high, 3)) {
    parts.push(makeSvg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "rule" }));
    parts.push(makeSvg("text", { x: left - 5, y: y(value) + 3.5, class: "tick end" }, String(Number(value.toPrecision(3)))));
  }
  for (const step of last > first ? roundTicks(first, last, 4) : [first]) {
    parts.push(makeSvg("text", { x: x(step), y: height - bottom + 14, class: "tick middle" }, String(step)));
  }
  return parts;
}

// Everything but the strong line, once for each score.
function buildTimeline(score) {
  const scale = scales(score);
  Object.assign(timelineView, scale, { lines: [] });
  const faint = [];
  for (let l = 0; l < run.layers; l++) for (let h = 0; h < run.heads; h++) {
    const points = pointsOf(0, score, l, h);
    const line = makeSvg("path", { d: pathOf(points, scale.x, scale.y), class: "faint" });
    timelineView.lines.push({ l, h, points, line });
    faint.push(line);
  }
  const later = ["other", "now", "strong", "dot", "name"];
  const marks = later.map((name) => makeSvg({ name: "text", dot: "circle", now: "line" }[name] || "path", { class: name }));
  timelineView.marks = Object.fromEntries(later.map((name, k) => [name, marks[k]]));
  fill(find("timeline"), ...axes(scale), ...faint, ...marks);
}

function drawTimeline() {
  find("training").hidden = run.steps.length < 2;
  const score = state.score;
  if (timelineView.name !== score) buildTimeline(score);
  timelineView.name = score;
  const { x, y, marks } = timelineView;
  const { height, top, bottom } = TIMELINE;
  const mine = timelineView.lines.find(({ l, h }) => l === state.layer && h === state.head);
  const now = x(stepNumber(state.step));
  const value = run.steps[state.step].scores[score]?.[state.layer]?.[state.head] ?? null;
  const set = (mark, attributes) => Object.entries(attributes).forEach(([k, v]) => mark.setAttribute(k, v));
  set(marks.strong, { d: pathOf(mine.points, x, y) });
  set(marks.other, { d: second ? pathOf(pointsOf(1, score, state.layer, state.head), x, y) : "" });
  set(marks.now, { x1: now, x2: now, y1: top, y2: height - bottom });
  set(marks.dot, { cx: now, cy: value === null ? -9 : y(value), r: 3.5 });
  const [, last] = mine.points.at(-1) || [0, null];
  set(marks.name, { x: TIMELINE.width - TIMELINE.right + 5, y: last === null ? -9 : y(last) + 4 });
  marks.name.textContent = headName(state.layer, state.head);
  timelineWords(mine, state.step);
}

function timelineWords(line, k) {
  const value = run.steps[k].scores[state.score]?.[line.l]?.[line.h] ?? null;
  const out = find("timeline-readout");
  const shown = value === null ? "not measured" : fixed(value, 3);
  fill(out, `step ${stepNumber(k)}: ${headName(line.l, line.h)} `, make("strong", {}, shown));
  if (second) out.append(`; dashed: ${second.label}`);
  Object.assign(out.dataset, { step: stepNumber(k), value: value ?? "" });
}

// The step and the head whose line is nearest to the pointer.
function nearestLine(event) {
  const box = find("timeline").getBoundingClientRect();
  const px = ((event.clientX - box.left) / box.width) * TIMELINE.width;
  const py = ((event.clientY - box.top) / box.height) * TIMELINE.height;
  const { x, y, lines } = timelineView;
  let step = 0;
  run.steps.forEach((entry, k) => {
    if (Math.abs(x(entry.step) - px) < Math.abs(x(stepNumber(step)) - px)) step = k;
  });
  let [line, near] = [lines[0], Infinity];
  for (const one of lines) {
    const value = run.steps[step].scores[state.score]?.[one.l]?.[one.h] ?? null;
    if (value !== null && Math.abs(y(value) - py) < near) [near, line] = [Math.abs(y(value) - py), one];
  }
  return { step, line };
}

function hoverTimeline(event) {
  for (const { line } of timelineView.lines) line.classList.remove("hover");
  if (!event) return drawTimeline();
  const { step, line } = nearestLine(event);
  line.line.classList.add("hover");
  return timelineWords(line, step);
}
