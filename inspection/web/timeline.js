// A score over training: a line per head, the selected head emphasised.

const TIMELINE = { width: 400, height: 124, left: 30, right: 44, top: 7, bottom: 20 };
const timeline = { score: "", x: null, y: null, lines: [] };

const evaluationsOf = (run) => (run.timeline.length > run.steps.length ? run.timeline : run.steps);

const scorePoints = (run, score, layer, head) => evaluationsOf(run)
  .map((entry) => [entry.step, scoreAt(entry, score, layer, head)])
  .filter(([, value]) => value !== null);

function linePath(points) {
  const { x, y } = timeline;
  return points.map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

// About `count` round numbers between low and high.
function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const unit = [1, 2, 5, 10].find((multiple) => multiple * power >= rough) * power;
  const first = Math.ceil(low / unit);
  return range(Math.floor(high / unit + 1e-6) - first + 1).map((k) => (first + k) * unit);
}

function axes(first, last, low, high) {
  const { width, height, left, right, bottom } = TIMELINE;
  const { x, y } = timeline;
  const scoreTicks = ticks(low, high, 3).flatMap((value) => [
    createSvg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "border" }),
    createSvg("text", { x: left - 5, y: y(value) + 3.5, class: "tick end" }, String(Number(value.toPrecision(3)))),
  ]);
  const stepTicks = (last > first ? ticks(first, last, 4) : [first]).map((step) =>
    createSvg("text", { x: x(step), y: height - bottom + 14, class: "tick middle" }, String(step)));
  return [...scoreTicks, ...stepTicks];
}

function buildTimeline(score) {
  const { width, height, left, right, top, bottom } = TIMELINE;
  const steps = page.runs.flatMap((run) => evaluationsOf(run).map(({ step }) => step));
  const [first, last] = [Math.min(...steps), Math.max(...steps)];
  const { low, high } = page.scores[score];
  timeline.score = score;
  timeline.x = (step) => left + ((step - first) / (last - first || 1)) * (width - left - right);
  timeline.y = (value) => height - bottom - ((value - low) / (high - low)) * (height - top - bottom);
  timeline.lines = range(run.layers).flatMap((layer) => range(run.heads).map((head) => {
    const points = scorePoints(run, score, layer, head);
    return { layer, head, points, path: createSvg("path", { d: linePath(points), class: "other-head" }) };
  }));
  const marks = createSvg("g", { id: "timeline-marks" });
  byId("timeline").replaceChildren(...axes(first, last, low, high), ...timeline.lines.map(({ path }) => path), marks);
}

function drawTimeline() {
  const { score, layer, head } = state;
  byId("training").hidden = evaluationsOf(run).length < 2;
  if (timeline.score !== score) buildTimeline(score);
  const { x, y } = timeline;
  const { top, bottom, height, width, right } = TIMELINE;
  const line = timeline.lines[layer * run.heads + head];
  const now = x(stepNumber(state.step));
  const value = scoreAt(run.steps[state.step], score, layer, head);
  const second = secondRun ? scorePoints(secondRun, score, layer, head) : [];
  const marks = [
    createSvg("path", { d: linePath(line.points), class: "selected-head" }),
    createSvg("path", { d: linePath(second), class: "second-run" }),
    createSvg("line", { x1: now, x2: now, y1: top, y2: height - bottom, class: "now" }),
  ];
  if (value !== null) marks.push(createSvg("circle", { cx: now, cy: y(value), r: 3.5, class: "dot" }));
  const last = line.points.at(-1);
  if (last) marks.push(createSvg("text", { x: width - right + 5, y: y(last[1]) + 4, class: "name" }, headName(layer, head)));
  byId("timeline-marks").replaceChildren(...marks);
  drawTimelineReadout(line, state.step);
}

function drawTimelineReadout({ layer, head }, k) {
  const value = scoreAt(run.steps[k], state.score, layer, head);
  const text = value === null ? "not measured" : fixed(value, 3);
  const out = byId("timeline-readout");
  out.replaceChildren(`step ${stepNumber(k)}: ${headName(layer, head)} `, create("strong", {}, text));
  if (secondRun) out.append(`; dashed: ${secondRun.label}`);
}

const nearest = (items, distance) => items.reduce((best, item) => (distance(item) < distance(best) ? item : best));

// The stored step and the head's line nearest to the pointer.
function timelineAt(event) {
  const box = byId("timeline").getBoundingClientRect();
  const px = ((event.clientX - box.left) / box.width) * TIMELINE.width;
  const py = ((event.clientY - box.top) / box.height) * TIMELINE.height;
  const step = nearest(range(run.steps.length), (k) => Math.abs(timeline.x(stepNumber(k)) - px));
  const line = nearest(timeline.lines, ({ layer, head }) => {
    const value = scoreAt(run.steps[step], state.score, layer, head);
    return value === null ? Infinity : Math.abs(timeline.y(value) - py);
  });
  return { step, line };
}

function hoverTimeline(event) {
  for (const { path } of timeline.lines) path.classList.remove("hover");
  if (!event) return drawTimeline();
  const { step, line } = timelineAt(event);
  line.path.classList.add("hover");
  return drawTimelineReadout(line, step);
}
