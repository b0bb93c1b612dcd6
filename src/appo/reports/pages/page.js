// The page: title, notes, groups, curves, settings.

function makeHead() {
  byId("lede").textContent = ledeOf(data.runs);
  const notes = data.runs.flatMap((run) => run.notes.map((note) => (data.runs.length > 1 ? `${run.name}: ${note}` : note)));
  if (notes.length) byId("notes").append(...notes.map((note) => el("li", {}, note)));
  else byId("notes").remove();
  byId("foot").append(`Made by appo ${data.made.version} at ${data.made.at.replace("T", " ").replace("+00:00", " UTC")}. Nothing on this page is fetched over the network.`);
}

function ledeOf(runs) {
  if (runs.length > 1) return `${runs.length} runs, ${counted(data.groups.length, "recorded group")}`;
  const facts = Object.fromEntries(runs[0].facts);
  const gains = runs[0].levels.map(({ level, before, after }) => `${level} ${before.mean.toFixed(0)} → ${after.mean.toFixed(0)} %`);
  const parts = [
    facts.method && `${facts.method.toUpperCase()}${facts.steps ? `, ${counted(Number(facts.steps), "step")}` : ""}`,
    gains.length && `accuracy ${gains.join(", ")}`,
    data.groups.length && counted(data.groups.length, "recorded group"),
  ];
  return parts.filter(Boolean).join(" · ");
}

function makeFacts(root) {
  const names = [...new Set(data.runs.flatMap((run) => run.settings.map((one) => one.name)))];
  for (const run of data.runs) {
    if (data.runs.length > 1) root.append(el("h3", {}, run.name));
    if (run.facts.length) root.append(el("dl", { class: "facts" }, run.facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", { dir: "auto" }, value)))));
  }
  if (!names.length) {
    root.append(el("p", { class: "nothing" }, "The settings are not known."));
    return;
  }
  const cell = (run, name) => {
    const found = run.settings.find((one) => one.name === name);
    return el("td", { class: found && !found.same ? "differs" : null }, found ? found.value : "–");
  };
  const paper = (name) => data.runs.flatMap((run) => run.settings).find((one) => one.name === name).paper ?? "";
  const head = el("tr", {}, el("th", { scope: "col" }, "setting"), data.runs.map((run) => el("th", { scope: "col" }, data.runs.length > 1 ? run.name : "here")), el("th", { scope: "col" }, "paper"));
  const rows = names.map((name) => el("tr", {}, el("th", { scope: "row" }, name), data.runs.map((run) => cell(run, name)), el("td", { class: "paper" }, paper(name))));
  root.append(el("div", { class: "wide", tabindex: "0", role: "region", "aria-label": "Settings" }, el("table", {}, el("caption", {}, "Settings beside the paper’s; what differs is marked"), el("thead", {}, head), el("tbody", {}, rows))));
}

makeHead();
makeBrowser(byId("browser"));
const trained = data.runs.some((run) => Object.keys(run.curves).length || run.levels.length || run.settings.length);
if (!trained && data.groups.length) {
  byId("run").remove();
  document.querySelector('nav a[href="#run"]').remove();
} else makeCurves(byId("curves"));
makeFacts(byId("facts"));
