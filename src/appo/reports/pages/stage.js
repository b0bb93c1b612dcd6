// The stage: the frames of the clip, and who looked at which of them. Made once a shape, then repainted in place.

/** A row of the heat map: its label, its cells. */
function stageRow(kind, frames, listeners) {
  const label = el("span", { class: "label" });
  const cells = Array.from({ length: frames }, (_, frame) => el("span", { class: "cell", "data-frame": frame, ...listeners(frame) }));
  return { row: el("div", { class: `row ${kind}`, role: "img" }, label, cells), label, cells };
}

/** The stage of a group: `element`, and `paint(group)`, `glance(token or null)`, `point(frame or null)`. */
function makeStage(group, on) {
  const frames = group.times.length;
  const hover = (row) => (frame) => ({ onpointerenter: () => on.cell(row, frame), onpointerleave: () => on.cell(null, null) });
  const buttons = group.times.map((_, frame) =>
    el(
      "button",
      {
        type: "button",
        class: "frame",
        onpointerenter: () => on.frame(frame),
        onpointerleave: () => on.frame(null),
        onfocus: () => on.frame(frame),
        onblur: () => on.frame(null),
        onclick: () => on.pin(frame),
      },
      el("span", { class: "picture" }),
      el("span", { class: "bar" }),
      el("span", { class: "time" }),
    ),
  );
  const strip = el("div", { class: "row strip" }, el("span", { class: "label" }, "frames"), buttons);
  const means = { right: stageRow("mean right", frames, hover("right")), wrong: stageRow("mean wrong", frames, hover("wrong")) };
  const rows = group.responses.map((_, i) => stageRow("one", frames, hover(i)));
  const grid = el("div", { class: "grid", style: { "--frames": frames } }, strip);
  grid.append(means.right.row, means.wrong.row, el("div", { class: "rule" }), ...rows.map((one) => one.row));
  const element = el("div", { class: "stage", role: "group", "aria-label": "Frames, and who looked at them" }, el("div", { class: "scroll" }, grid));
  roving(strip, () => buttons);
  const stage = { element, frames, rows, buttons, means, strip };
  stage.paint = (shown) => paintStage(stage, shown);
  stage.glance = (shown, values) => paintGlance(stage, shown, values);
  stage.point = (frame) => grid.querySelectorAll("[data-frame], .frame").forEach((one, i) => one.classList.toggle("pointed", i % frames === frame));
  return stage;
}

function paintStage(stage, group) {
  const film = group.film && data.films[group.film];
  stage.buttons.forEach((button, frame) => {
    const crucial = group.crucial.includes(frame);
    const event = (group.event || []).includes(frame);
    button.classList.toggle("crucial", crucial);
    button.classList.toggle("event", event);
    button.classList.toggle("blank", !film);
    const words = [`Frame ${frame + 1}, ${seconds(group.times[frame], frame)}`, crucial && "crucial", event && "the answer is seen here"];
    button.setAttribute("aria-label", words.filter(Boolean).join(", "));
    button.querySelector(".time").textContent = seconds(group.times[frame], frame);
    const picture = button.querySelector(".picture");
    if (!film) return;
    picture.style.setProperty("aspect-ratio", `${film.width / stage.frames} / ${film.height}`);
    picture.style.setProperty("background-image", `url("${film.src}")`);
    picture.style.setProperty("background-size", `${100 * stage.frames}% 100%`);
    picture.style.setProperty("background-position", `${stage.frames > 1 ? (100 * frame) / (stage.frames - 1) : 0}% 0`);
  });
  for (const [name, words] of [["right", "right answers"], ["wrong", "wrong answers"]]) {
    const { row, label, cells } = stage.means[name];
    const heat = group.meanHeat[name];
    row.hidden = !heat;
    label.textContent = `${name === "right" ? "✓" : "✗"} ${name}`;
    row.setAttribute("aria-label", `Mean of the ${words}: ${lookedAt(group, heat)}`);
    cells.forEach((cell, frame) => cell.style.setProperty("--light", light(heat ? heat[frame] : null)));
  }
  stage.rows.forEach(({ row, label, cells }, i) => {
    const response = group.responses[i];
    row.classList.toggle("right", response.right === true);
    row.classList.toggle("wrong", response.right === false);
    row.classList.toggle("first", i > 0 && response.right !== group.responses[i - 1].right);
    label.textContent = nameOf(response);
    row.setAttribute("aria-label", `Response ${response.number}${verdict(response)}: ${lookedAt(group, response.heat)}`);
    cells.forEach((cell, frame) => cell.style.setProperty("--light", light(response.heat[frame])));
  });
  stage.glance(group, null);
}

/** Dim and light the frames by one token's attention (values from 0 to 1), or let all be as they are. */
function paintGlance(stage, group, values) {
  stage.element.classList.toggle("glancing", Boolean(values));
  stage.buttons.forEach((button, frame) => button.style.setProperty("--look", values ? values[frame].toFixed(3) : "0"));
}

const nameOf = (response) => `${{ true: "✓ ", false: "✗ ", null: "" }[response.right]}${response.number}`;
const verdict = (response) => ({ true: ", right", false: ", wrong", null: "" })[response.right];

function lookedAt(group, heat) {
  if (!heat || heat.some((one) => one === null)) return "no attention recorded";
  const most = heat.indexOf(Math.max(...heat));
  return `looked most at ${seconds(group.times[most], most)}`;
}
