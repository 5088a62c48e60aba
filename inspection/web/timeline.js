// A score over training: a line per head, the selected head emphasised.

const PLOT = { left: 30, right: 356, top: 7, bottom: 104 }; // in a picture of 400 x 124
const timeline = { score: "", x: null, y: null };

const evaluationsOf = (run) => (run.timeline.length > run.steps.length ? run.timeline : run.steps);

const scorePoints = (run, { layer, head }) => evaluationsOf(run)
  .map((entry) => [entry.step, scoreAt(entry, layer, head)])
  .filter(([, value]) => value !== null);

function linePath(points) {
  const { x, y } = timeline;
  return points.map(([step, value], k) => `${k ? "L" : "M"}${x(step).toFixed(1)} ${y(value).toFixed(1)}`).join("");
}

// The axes, and a line per head; `timeline.x` and `timeline.y` map steps and scores to the picture.
function buildTimeline() {
  const { left, right, top, bottom } = PLOT;
  const evaluated = page.runs.flatMap((run) => evaluationsOf(run).map(({ step }) => step));
  const [first, last] = [Math.min(...evaluated), Math.max(...evaluated)];
  const { low, high } = page.scores[state.score];
  const x = (step) => left + ((step - first) / (last - first || 1)) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  Object.assign(timeline, { score: state.score, x, y });
  const lines = allHeads.map((head) => createSvg("path", { d: linePath(scorePoints(run, head)), class: "other-head" }));
  const tick = (x, y, anchor, text) => createSvg("text", { x, y, class: "tick", "text-anchor": anchor }, text);
  const scores = [low, (low + high) / 2, high].flatMap((value) => [
    createSvg("line", { x1: left, x2: right, y1: y(value), y2: y(value), class: "border" }),
    tick(left - 5, y(value) + 3.5, "end", Number(value.toPrecision(3))),
  ]);
  const steps = [first, last].map((step) => tick(x(step), bottom + 14, "middle", step));
  const marks = createSvg("g", { id: "timeline-marks" });
  byId("timeline").replaceChildren(...scores, ...steps, ...lines, marks);
}

function drawTimeline() {
  byId("training").hidden = evaluationsOf(run).length < 2;
  if (timeline.score !== state.score) buildTimeline();
  const { x, y } = timeline;
  const points = scorePoints(run, state);
  const now = x(stepNumber(state.step));
  const value = scoreAt(run.steps[state.step], state.layer, state.head);
  const marks = [
    createSvg("path", { d: linePath(points), class: "selected-head" }),
    createSvg("path", { d: secondRun ? linePath(scorePoints(secondRun, state)) : "", class: "second-run" }),
    createSvg("line", { x1: now, x2: now, y1: PLOT.top, y2: PLOT.bottom, class: "now" }),
  ];
  if (value !== null) marks.push(createSvg("circle", { cx: now, cy: y(value), r: 3.5, class: "dot" }));
  const last = points.at(-1);
  const name = headName(state.layer, state.head);
  if (last) marks.push(createSvg("text", { x: PLOT.right + 5, y: y(last[1]) + 4, class: "name" }, name));
  byId("timeline-marks").replaceChildren(...marks);
}
