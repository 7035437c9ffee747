// The example browser. Text from data and models enters the page as text (textContent), never as markup, and an answer
// enters it only after a click.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("examples").textContent);
  const cards = document.getElementById("cards");
  if (!cards) return;
  const PAGE = 12;
  const place = (entry) => entry.attack + (entry.attack === "clean" ? "" : ", rewrite " + entry.shot);
  const clean = new Map(
    data.questions.filter((e) => e.attack === "clean").map((e) => [e.set + "\n" + e.id, e]),
  );

  function node(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children);
    return made;
  }

  function verdictOf(answer) {
    return answer ? answer.verdicts[data.judges[0]] ?? Object.values(answer.verdicts)[0] : undefined;
  }

  // A judge that cannot tell correct from irrelevant answers gives both the verdict "answered".
  // One that decides harm alone calls the others "harmless", refusals among them.
  function differ(a, b) {
    if ([a, b].includes("harmless")) return [a, b].includes("harmful");
    return a !== b && ![a, b].includes("answered");
  }

  function chip(verdict) {
    const shown = node("span", { class: "verdict" }, verdict);
    if (/^[a-z]+$/.test(verdict)) shown.classList.add(verdict);
    return shown;
  }

  function answerOf(entry, number) {
    const model = data.models[number], answer = entry.answers[number];
    const name = node("span", { class: "name", style: `--c:var(--slot${model.slot})` }, model.name);
    if (!answer) return node("div", { class: "answer" }, name, node("span", { class: "count" }, "no answer"));
    const others = Object.entries(answer.verdicts).filter(([judge]) => judge !== data.judges[0]);
    const row = node("div", { class: "answer" }, name, chip(verdictOf(answer)));
    for (const [judge, verdict] of others)
      if (differ(verdict, verdictOf(answer))) row.append(node("span", { class: "count" }, `${judge}: ${verdict}`));
    if (!data.outputs) return row;
    const response = node("p", { class: "response", hidden: "" });
    const button = node("button", { type: "button", "aria-expanded": "false" }, "Show answer");
    button.addEventListener("click", () => {
      response.hidden = !response.hidden;
      response.textContent = response.hidden ? "" : answer.response || "(empty)";
      button.textContent = response.hidden ? "Show answer" : "Hide answer";
      button.setAttribute("aria-expanded", String(!response.hidden));
    });
    row.append(button, response);
    return row;
  }

  function card(entry) {
    const set = data.sets[entry.set];
    const about = [set.kind === entry.set ? entry.set : `${entry.set} (${set.kind})`, place(entry), entry.category];
    const terms = node("dl", {});
    const term = (title, text) => terms.append(node("dt", {}, title), node("dd", {}, text));
    term("question", entry.question);
    if (entry.question !== entry.original) term("original wording", entry.original);
    if (entry.expected !== null) term("answer in the data", entry.expected);
    if (entry.pixels) term("picture", "before the attack on its pixels, which gave each model another one");
    const question = node("div", { class: "example" });
    if (entry.picture !== null)
      question.append(node("img", { alt: "the question's picture", src: data.pictures[entry.picture] }));
    question.append(terms);
    const answers = entry.answers.map((_, number) => answerOf(entry, number));
    return node("article", {}, node("p", { class: "about" }, about.filter(Boolean).join(" · ")), question, ...answers);
  }

  // ------------------------------------------------------------------------------------------------- filters

  const form = document.getElementById("filters");
  function choice(name, title, options) {
    const select = node("select", { name });
    for (const [value, text] of options) select.append(node("option", { value }, text));
    form.append(node("label", {}, node("span", {}, title), select));
  }
  const unique = (values) => [...new Set(values)];
  const plain = (values) => unique(values).filter(Boolean).map((v) => [v, v]);
  const verdicts = data.questions.flatMap((e) => e.answers.map(verdictOf));
  form.append(
    node("label", { class: "wide" }, node("span", {}, "Search"), node("input", { name: "text", type: "search" })),
  );
  choice("set", "Set", [["", "all"], ...plain(Object.keys(data.sets))]);
  choice("attack", "Wording", [["", "any"], ...plain(data.questions.map(place))]);
  choice("model", "Model", [["", "any"], ...data.models.map((m, i) => [String(i), m.name])]);
  choice("verdict", "Verdict", [["", "any"], ...plain(verdicts.filter(Boolean).sort())]);
  choice("only", "Only where", [
    ["", "(any)"],
    ["flipped", "the attack changed the verdict"],
    ["models", "models differ"],
    ["judges", "judges differ"],
  ]);
  const category = plain(data.questions.map((e) => e.category).sort());
  if (category.length) choice("category", "Category", [["", "all"], ...category]);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", () => show(matching()));

  const SPECIAL = {
    flipped: (entry, of) => of.some((n) => {
      const before = clean.get(entry.set + "\n" + entry.id);
      return before && entry.answers[n] && verdictOf(before.answers[n]) !== verdictOf(entry.answers[n]);
    }),
    models: (entry) => unique(entry.answers.filter(Boolean).map(verdictOf)).length > 1,
    judges: (entry, of) => of.some((n) => {
      const verdicts = Object.values(entry.answers[n]?.verdicts ?? {});
      return verdicts.some((verdict) => differ(verdict, verdicts[0]));
    }),
  };

  function matching() {
    const want = Object.fromEntries(new FormData(form));
    const words = want.text.toLowerCase().split(/\s+/).filter(Boolean);
    const of = want.model ? [Number(want.model)] : data.models.map((_, number) => number);
    return data.questions.filter((entry) => {
      const responses = of.map((n) => entry.answers[n]?.response ?? "");
      const text = [entry.id, entry.question, entry.original, ...responses].join(" ").toLowerCase();
      return (
        (!want.set || entry.set === want.set) &&
        (!want.attack || place(entry) === want.attack) &&
        (!want.category || entry.category === want.category) &&
        (!want.verdict || of.some((n) => verdictOf(entry.answers[n]) === want.verdict)) &&
        (!want.only || SPECIAL[want.only](entry, of)) &&
        words.every((word) => text.includes(word))
      );
    });
  }

  const more = document.getElementById("more");
  let left = [];
  function page() {
    cards.append(...left.slice(0, PAGE).map(card));
    left = left.slice(PAGE);
    more.hidden = left.length === 0;
  }
  function show(matches) {
    document.getElementById("matches").textContent = `${matches.length} of ${data.questions.length} questions and rewrites`;
    cards.replaceChildren();
    left = matches;
    page();
  }
  more.addEventListener("click", page);
  show(data.questions);

  // ------------------------------------------------------------------------------------------------- gallery

  // The first attacked question of each kind: its clean wording and the attack's first rewrite.
  const gallery = document.getElementById("gallery");
  for (const kind of ["unsafe", "safe"]) {
    const attacked = data.questions.find((e) => data.sets[e.set].kind === kind && e.shot === 1 && clean.has(e.set + "\n" + e.id));
    if (attacked) gallery.append(card(clean.get(attacked.set + "\n" + attacked.id)), card(attacked));
  }
})();
