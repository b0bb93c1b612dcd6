// The browser of groups: a list to choose from, and the group chosen, at the training step chosen.

const FILTERS = [
  ["all", "all questions", () => true],
  ["won", "won over", (group) => group.won],
  ["lost", "lost", (group) => group.lost],
  ["mixed", "right and wrong answers", (group) => group.right > 0 && group.right < group.judged],
  ["allWrong", "all wrong", (group) => group.allWrong],
  ["filmed", "seen at several steps", (group) => group.steps.length > 1],
];
const SORTS = [
  ["interest", "most telling first", (group) => -group.interest],
  ["change", "largest change since the first step", (group) => -Math.abs(group.change || 0)],
  ["spread", "largest reward spread", (group) => -(group.spread || 0)],
  ["step", "in order of training", (group) => group.step],
];

const keyOf = (group) => group.key;

/** One entry a question: its groups by step. */
function questionsOf(groups) {
  const films = new Map();
  for (const group of groups) films.set(keyOf(group), [...(films.get(keyOf(group)) || []), group]);
  return [...films.values()].map((film) => film.sort((a, b) => a.step - b.step));
}

function makeBrowser(root) {
  if (!data.groups.length) {
    root.replaceWith(el("p", { class: "nothing" }, "No groups were recorded, so there is nothing to look at here."));
    return;
  }
  const questions = questionsOf(data.groups);
  const list = el("ol", { class: "list" });
  const detail = el("div", { class: "detail", id: "detail" });
  const count = el("p", { class: "count", role: "status" });
  const filter = chooser("Show", FILTERS);
  const sort = chooser("Sort", SORTS);
  const runs = data.runs.length > 1 ? chooser("Run", [["all", "all runs"], ...data.runs.map((run, i) => [String(i), run.name])]) : null;
  const show = (film, entry) => {
    list.querySelectorAll("[aria-current]").forEach((one) => one.removeAttribute("aria-current"));
    entry.setAttribute("aria-current", "true");
    showFilm(detail, film);
  };
  const refill = () => {
    const keep = FILTERS.find(([name]) => name === filter.select.value)[2];
    const order = SORTS.find(([name]) => name === sort.select.value)[2];
    const last = (film) => film[film.length - 1];
    const of = (film) => !runs || runs.select.value === "all" || String(last(film).run) === runs.select.value;
    const kept = questions.filter((film) => of(film) && keep(last(film))).sort((a, b) => order(last(a)) - order(last(b)));
    const entries = kept.map((film) => makeEntry(last(film), film, (entry) => show(film, entry)));
    list.replaceChildren(...entries.map((entry) => el("li", {}, entry)));
    count.textContent = `${kept.length} of ${questions.length} questions`;
    if (entries.length) show(kept[0], entries[0]);
    else detail.replaceChildren(el("p", { class: "nothing" }, "No question is like that."));
    entries.forEach((entry, i) => entry.setAttribute("tabindex", i === 0 ? "0" : "-1"));
  };
  roving(list, () => [...list.querySelectorAll("button")], { column: true });
  for (const { select } of [filter, sort, runs].filter(Boolean)) select.addEventListener("change", refill);
  const choose = el("div", { class: "choose" }, filter.label, sort.label, runs && runs.label, count);
  root.append(el("aside", { class: "chooser", "aria-label": "Questions" }, choose, list), detail);
  refill();
}

function chooser(name, options) {
  const select = el("select", {}, options.map(([value, text]) => el("option", { value }, text)));
  return { select, label: el("label", {}, el("span", {}, name), select) };
}

function makeEntry(group, film, on) {
  const dots = group.responses.map((one) => el("i", { class: { true: "right", false: "wrong", null: "" }[one.right] }));
  const badge = group.won ? "won over" : group.lost ? "lost" : group.allWrong ? "all wrong" : "";
  const steps = film.length > 1 ? `steps ${film[0].step}–${group.step}` : `step ${group.step}`;
  const entry = el(
    "button",
    { type: "button", class: "entry", onclick: () => on(entry) },
    el("span", { class: "question", dir: "auto" }, group.question || group.id || "(no question)"),
    el("span", { class: "meta" }, el("span", { class: "dots", "aria-hidden": "true" }, dots), group.judged ? `${group.right}/${group.judged} right · ` : "", steps, badge ? el("b", { class: `badge ${group.won ? "won" : "lost"}` }, badge) : null),
  );
  return entry;
}

/** A question at the step its slider stands at. */
function showFilm(detail, film) {
  let stage = null;
  const body = el("div", { class: "body" });
  const slider = film.length > 1 ? makeSlider(film, (at) => show(at)) : null;
  const heading = el("header", { class: "asked" });
  const show = (at) => {
    const group = film[at];
    heading.replaceChildren(...askedOf(group));
    stage = showGroup(body, group, stage);
  };
  detail.replaceChildren(heading, ...(slider ? [slider.element] : []), body);
  show(film.length - 1);
}

function askedOf(group) {
  const run = data.runs.length > 1 ? `${data.runs[group.run].name} · ` : "";
  return [
    el("p", { class: "where" }, `${run}${group.id || "question"}${group.video && !group.video.startsWith(group.id) ? ` · ${group.video}` : ""} · step ${group.step}`),
    el("h3", { class: "question", dir: "auto" }, group.question || "(no question recorded)"),
    el("p", { class: "gold" }, group.answer ? ["Answer ", el("b", { dir: "auto" }, group.answer)] : "No gold answer: nobody won, nobody lost", group.judged ? el("span", { class: "score" }, ` · ${group.right} of ${group.judged} right`) : null),
  ];
}

/** Training as a film: a slider over the steps at which this question was asked, under the share of right answers. */
function makeSlider(film, on) {
  const last = film.length - 1;
  const output = el("output", {});
  const range = el("input", { type: "range", min: 0, max: last, value: last, step: 1, "aria-label": "Training step" });
  const bars = film.map((group) => {
    const share = group.judged ? group.right / group.judged : 0;
    return el("span", { class: "step", style: { "--share": share.toFixed(3) } }, el("i", {}), el("small", {}, String(group.step)));
  });
  const move = (at) => {
    range.value = at;
    bars.forEach((bar, i) => bar.classList.toggle("here", i === at));
    const { step, right, judged } = film[at];
    output.textContent = `step ${step}${judged ? `: ${right} of ${judged} right` : ""}`;
    range.setAttribute("aria-valuetext", output.textContent);
    on(at);
  };
  let timer = null;
  const stop = () => {
    clearInterval(timer);
    timer = null;
    play.textContent = "▶ Play";
  };
  const play = el("button", { type: "button", class: "play" }, "▶ Play");
  play.addEventListener("click", () => {
    if (timer) return stop();
    play.textContent = "❚❚ Pause";
    move(0);
    timer = setInterval(() => {
      if (!play.isConnected || Number(range.value) >= last) return stop();
      move(Number(range.value) + 1);
    }, calm.matches ? 1600 : 900);
  });
  range.addEventListener("input", () => {
    stop();
    move(Number(range.value));
  });
  bars.forEach((bar, i) => bar.classList.toggle("here", i === last));
  output.textContent = `step ${film[last].step}: ${film[last].right} of ${film[last].judged} right`;
  const track = el("div", { class: "track", style: { "--steps": film.length } }, el("div", { class: "bars", "aria-hidden": "true" }, bars), range);
  return { element: el("div", { class: "film", role: "group", "aria-label": "Training as a film" }, play, track, output) };
}

/** The stage, its read-out and the responses of a group; a stage of the same shape is repainted, so that light moves. */
function showGroup(body, group, stage) {
  let words = null;
  let pinned = null;
  const readout = el("p", { class: "readout", role: "status" }, group.says || "");
  const say = (text) => (readout.textContent = text || group.says || "");
  const point = (frame) => {
    const at = frame ?? pinned;
    lightTokens(words, group, at);
    stage.buttons.forEach((button, i) => {
      button.setAttribute("aria-pressed", String(i === pinned));
      button.classList.toggle("pointed", i === at);
    });
    say(at === null ? "" : frameWords(group, at));
  };
  const on = {
    frame: point,
    pin: (frame) => {
      pinned = pinned === frame ? null : frame;
      point(frame);
    },
    cell: (row, frame) => say(row === null ? "" : cellWords(group, row, frame)),
    token: (response, token, element) => {
      const values = token === null || !response.looks.length ? null : group.times.map((_, frame) => attention(group, response, token, frame));
      stage.glance(group, values && values.map((value) => glow(group, value)));
      stage.rows.forEach(({ row }, i) => row.classList.toggle("speaking", token !== null && group.responses[i] === response));
      say(token === null ? "" : tokenWords(group, response, token, values));
      if (element && element.matches(":focus-visible")) element.scrollIntoView({ block: "nearest" });
    },
  };
  const same = stage && stage.frames === group.times.length && stage.rows.length === group.responses.length;
  const handlers = same ? Object.assign(stage.on, on) : on;
  if (!same) stage = Object.assign(makeStage(group, proxied(handlers)), { on: handlers });
  words = makeWords(group, on);
  const notes = group.notes.map((note) => el("p", { class: "note" }, note));
  const fresh = [readout, legend(group), ...notes, words];
  if (same) while (body.lastChild !== stage.element) body.lastChild.remove();
  else body.replaceChildren(stage.element);
  body.append(...fresh);
  stage.paint(group);
  point(null);
  body.onkeydown = (event) => {
    if (event.key !== "Escape") return;
    pinned = null;
    point(null);
  };
  return stage;
}

/** Listeners that ask for the group's own at the time of the event: a repainted stage keeps its elements. */
const proxied = (handlers) => Object.fromEntries(Object.keys(handlers).map((name) => [name, (...given) => handlers[name](...given)]));

const mean = (values) => (values.length ? values.reduce((a, b) => a + b, 0) / values.length : null);

function frameWords(group, frame) {
  const of = (right) => mean(group.responses.filter((one) => one.right === right && known(one.scores[frame])).map((one) => one.scores[frame]));
  const parts = [[true, "right"], [false, "wrong"], [null, "responses"]].map(([right, name]) => known(of(right)) && `${name} ${number(of(right))}`);
  const kind = [group.crucial.includes(frame) && "crucial", (group.event || []).includes(frame) && "the answer is seen here"].filter(Boolean);
  return [`${seconds(group.times[frame], frame)}${kind.length ? ` (${kind.join(", ")})` : ""}`, "mean attention", ...parts.filter(Boolean)].join(" · ");
}

function cellWords(group, row, frame) {
  if (typeof row === "string") return frameWords(group, frame);
  const response = group.responses[row];
  return `Response ${response.number}${verdict(response)} · ${seconds(group.times[frame], frame)} · attention ${number(response.scores[frame], 3)}`;
}

function tokenWords(group, response, token, values) {
  const said = `“${response.tokens[token].trim() || "⏎"}” · response ${response.number} · weight ${((response.weights[token] ?? 100) / 100).toFixed(2)}`;
  if (!values) return said;
  const most = values.indexOf(Math.max(...values));
  return `${said}${response.chosen.includes(token) ? " · perception token" : ""} · looked most at ${seconds(group.times[most], most)} (≈ ${number(values[most], 1)})`;
}

function legend(group) {
  const items = [
    ["key-crucial", "crucial frame"],
    group.event && ["key-event", "the answer is seen here"],
    ["key-heat", "looked at more"],
    ["key-weight", "weighs more"],
    ["key-chosen", "perception token"],
  ];
  return el("ul", { class: "legend", "aria-label": "Legend" }, items.filter(Boolean).map(([kind, text]) => el("li", {}, el("i", { class: kind }), text)));
}
