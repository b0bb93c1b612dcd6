// Curves of all runs over each other, smoothed as the reader likes; accuracies before and after; where the time went.

const COLOURS = ["var(--run-1)", "var(--run-2)", "var(--run-3)", "var(--run-4)", "var(--run-5)", "var(--run-6)"];
const colour = (run) => COLOURS[run % COLOURS.length];
const [WIDTH, HEIGHT] = [320, 110];

/** Exponential moving average, corrected for its start. */
function smoothed(values, keep) {
  let [sum, weight] = [0, 0];
  return values.map((value) => {
    sum = keep * sum + (1 - keep) * value;
    weight = keep * weight + 1 - keep;
    return sum / weight;
  });
}

function makeCurves(root) {
  const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves)))];
  const levels = data.runs.some((run) => run.levels.length);
  const times = data.runs.some((run) => run.times.length);
  if (!names.length && !levels) {
    root.append(el("p", { class: "nothing" }, "Nothing was measured, so there are no curves."));
    return;
  }
  if (data.runs.length > 1) root.append(el("ul", { class: "legend runs", "aria-label": "Runs" }, data.runs.map((run, i) => el("li", {}, el("i", { style: { background: colour(i) } }), run.name))));
  if (levels) root.append(makeLevels());
  if (names.length) {
    const range = el("input", { type: "range", min: 0, max: 0.95, step: 0.05, value: names.length && longest() > 15 ? 0.6 : 0 });
    const output = el("output", {});
    const figures = names.map(makeCurve);
    const draw = () => {
      output.textContent = Number(range.value) ? Number(range.value).toFixed(2) : "none";
      figures.forEach((figure) => figure.draw(Number(range.value)));
    };
    range.addEventListener("input", draw);
    root.append(el("label", { class: "smooth" }, el("span", {}, "Smoothing"), range, output));
    root.append(el("div", { class: "figures" }, figures.map((figure) => figure.element)));
    draw();
  }
  if (times) root.append(makeTimes());
}

const longest = () => Math.max(0, ...data.runs.flatMap((run) => Object.values(run.curves).map((curve) => curve.values.length)));

/** A figure of one measure over all runs: `element` and `draw(smoothing)`. */
function makeCurve(name) {
  const runs = data.runs.map((run, i) => ({ run: i, name: run.name, ...run.curves[name] })).filter((one) => one.values);
  const [steps, values] = ["steps", "values"].map((axis) => runs.flatMap((one) => one[axis]));
  const [first, last, low, high] = [Math.min(...steps), Math.max(...steps), Math.min(...values), Math.max(...values)];
  const x = (step) => (last > first ? ((step - first) / (last - first)) * WIDTH : WIDTH / 2);
  const y = (value) => (high > low ? 4 + (1 - (value - low) / (high - low)) * (HEIGHT - 8) : HEIGHT / 2);
  const line = (one, list) => list.map((value, i) => `${i ? "L" : "M"}${x(one.steps[i]).toFixed(1)} ${y(value).toFixed(1)}`).join("");
  const paths = runs.map((one) => ({
    raw: el("svg:path", { class: "raw", d: line(one, one.values), style: { stroke: colour(one.run) } }),
    smooth: el("svg:path", { class: "smooth", style: { stroke: colour(one.run) } }),
  }));
  const cross = el("svg:line", { class: "cross", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const svg = el("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": runs.map((one) => `${runs.length > 1 ? `${one.name}: ` : ""}${one.says}`).join("; ") });
  svg.append(...[0, 0.5, 1].map((part) => el("svg:line", { class: "guide", x1: 0, x2: WIDTH, y1: 4 + part * (HEIGHT - 8), y2: 4 + part * (HEIGHT - 8) })));
  svg.append(...paths.flatMap((one) => [one.raw, one.smooth]), cross);
  const value = el("output", { class: "value" });
  const at = (i) => {
    value.replaceChildren(...runs.map((one) => {
      const place = i === null ? one.values.length - 1 : nearest(one.steps, i);
      return el("span", { style: { color: runs.length > 1 ? colour(one.run) : "inherit" } }, `${number(one.values[place])}`, i === null ? null : el("small", {}, ` step ${one.steps[place]}`));
    }));
    if (i !== null) ["x1", "x2"].forEach((end) => cross.setAttribute(end, x(i)));
    cross.setAttribute("visibility", i === null ? "hidden" : "visible");
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    at(first + ((event.clientX - box.left) / box.width) * (last - first));
  });
  svg.addEventListener("pointerleave", () => at(null));
  at(null);
  const draw = (keep) => paths.forEach(({ smooth }, i) => smooth.setAttribute("d", line(runs[i], smoothed(runs[i].values, keep))));
  const element = el(
    "figure",
    { class: "curve", "data-curve": name },
    el("figcaption", {}, el("b", {}, name), value, el("small", {}, runs[0].meaning)),
    el("div", { class: "plot" }, el("span", { class: "high" }, number(high)), el("span", { class: "low" }, number(low)), svg),
    el("div", { class: "axis", "aria-hidden": "true" }, el("span", {}, `step ${first}`), el("span", {}, String(last))),
  );
  return { element, draw };
}

const nearest = (steps, step) => steps.reduce((best, one, i) => (Math.abs(one - step) < Math.abs(steps[best] - step) ? i : best), 0);

/** Accuracy of each level before and after, with its interval. */
function makeLevels() {
  const rows = data.runs.flatMap((run, i) =>
    run.levels.map(({ level, before, after }) => {
      const gain = after.mean - before.mean;
      const words = `${level}: ${before.mean} % before, ${after.mean} % after (${after.low} to ${after.high} %), ${after.questions} questions`;
      return el(
        "div",
        { class: "level" },
        el("span", { class: "label" }, data.runs.length > 1 ? `${run.name} ${level}` : level),
        el(
          "div",
          { class: "lane", role: "img", "aria-label": words },
          el("i", { class: "span before", style: { left: `${before.low}%`, width: `${before.high - before.low}%` } }),
          el("i", { class: "span after", style: { left: `${after.low}%`, width: `${after.high - after.low}%`, "--run": colour(i) } }),
          el("i", { class: "move", style: { left: `${Math.min(before.mean, after.mean)}%`, width: `${Math.abs(gain)}%`, "--run": colour(i) } }),
          el("i", { class: "dot before", style: { left: `${before.mean}%` } }),
          el("i", { class: "dot after", style: { left: `${after.mean}%`, "--run": colour(i) } }),
        ),
        el("span", { class: "numbers" }, `${before.mean.toFixed(1)} `, el("span", { "aria-label": "to" }, "→"), " ", el("b", {}, `${after.mean.toFixed(1)} %`), el("small", { class: gain >= 0 ? "up" : "down" }, ` ${gain >= 0 ? "+" : "−"}${Math.abs(gain).toFixed(1)}`)),
      );
    }),
  );
  return el("figure", { class: "levels" }, el("figcaption", {}, el("b", {}, "accuracy before and after"), el("small", {}, "greedy answers to held-out questions, per cent, with 95 % intervals")), rows);
}

/** Where the seconds of a step went. */
function makeTimes() {
  const bars = data.runs.map((run) =>
    el(
      "div",
      { class: "times" },
      data.runs.length > 1 ? el("span", { class: "label" }, run.name) : null,
      el("div", { class: "stack", "aria-hidden": "true" }, run.times.map(({ part, share }) => el("i", { class: `part-${part}`, style: { width: `${share}%` } }))),
      el("ul", { class: "legend" }, run.times.map(({ part, seconds: spent, share }) => el("li", {}, el("i", { class: `part-${part}` }), `${part} `, el("b", {}, `${number(spent)} s`), ` ${number(share, 1)} %`))),
    ),
  );
  return el("figure", { class: "time" }, el("figcaption", {}, el("b", {}, "where a step’s time goes"), el("small", {}, "mean seconds of each part")), bars);
}
