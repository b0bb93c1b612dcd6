// Responses: each token shaded by its weight, underlined where it is a perception token, lit by the frame pointed at.

/** The cards of all responses, winners beside losers. `on.token(response index, token or null)` follows the pointer. */
function makeWords(group, on) {
  const sides = [
    ["Right", group.responses.filter((one) => one.right === true)],
    ["Wrong", group.responses.filter((one) => one.right === false)],
    ["Responses", group.responses.filter((one) => one.right === null)],
  ].filter(([, responses]) => responses.length);
  const heaviest = Math.max(101, ...group.responses.flatMap((one) => one.weights));
  const columns = sides.map(([title, responses]) =>
    el(
      "div",
      { class: `side ${title.toLowerCase()}` },
      el("h4", {}, `${{ Right: "✓ ", Wrong: "✗ " }[title] || ""}${title} `, el("span", { class: "count" }, String(responses.length))),
      responses.map((response) => makeCard(group, response, heaviest, on)),
    ),
  );
  return el("div", { class: `sides of-${sides.length}` }, columns);
}

function makeCard(group, response, heaviest, on) {
  const facts = [
    ...Object.entries(response.rewards).map(([name, value]) => [name.replace(/_reward$/, "").replaceAll("_", " "), number(value)]),
    ["advantage", `${response.advantage > 0 ? "+" : ""}${number(response.advantage)}`],
    ["tokens", String(response.length)],
  ];
  const text = el("p", { class: "text", dir: "auto", role: "group", "aria-label": `Response ${response.number}${verdict(response)}` });
  if (response.tokens.length) fillTokens(text, group, response, heaviest, on);
  else text.append(response.text || "(empty)");
  return el(
    "article",
    { class: "card", "data-response": response.number, "aria-label": `Response ${response.number}` },
    el("header", {}, el("span", { class: "name" }, nameOf(response)), el("dl", { class: "parts" }, facts.map(([name, value]) => el("div", {}, el("dt", {}, name), el("dd", {}, value))))),
    text,
    response.more ? el("p", { class: "more" }, `… ${response.more} more tokens`) : null,
  );
}

function fillTokens(text, group, response, heaviest, on) {
  const chosen = new Set(response.chosen);
  const tokens = response.tokens.map((token, j) => {
    const weight = response.weights[j] ?? 100;
    return el(
      "span",
      {
        class: `token${chosen.has(j) ? " chosen" : ""}${weight < 100 ? " light" : ""}`,
        "data-token": j,
        style: { "--weight": clamp((weight - 100) / (heaviest - 100), 0, 1).toFixed(3) },
      },
      token,
    );
  });
  tokens.forEach((token, j) => text.append(token, ...(response.gap && j + 1 < tokens.length ? [response.gap] : [])));
  const follow = (event) => {
    const token = event.target.closest("[data-token]");
    on.token(response, token ? Number(token.dataset.token) : null, token);
  };
  text.addEventListener("pointerover", follow);
  text.addEventListener("focusin", follow);
  text.addEventListener("pointerleave", () => on.token(response, null, null));
  text.addEventListener("focusout", () => on.token(response, null, null));
  roving(text, () => tokens);
}

/** Light every token by its attention to a frame; null: by its weight again. */
function lightTokens(words, group, frame) {
  words.classList.toggle("by-frame", frame !== null);
  if (frame === null) return;
  for (const card of words.querySelectorAll(".card")) {
    const response = group.responses.find((one) => one.number === Number(card.dataset.response));
    for (const token of card.querySelectorAll(".token")) {
      token.style.setProperty("--look", glow(group, attention(group, response, Number(token.dataset.token), frame)).toFixed(3));
    }
  }
}
