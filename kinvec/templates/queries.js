// The query browser: search, filter, sort, and what each model found. A page of rows is in the document at a time, one of
// them open. Whatever the data say is text (textContent, append), never markup.
const make = (tag, name, ...content) => {
  const element = document.createElement(tag);
  if (name) element.className = name;
  element.append(...content);
  return element;
};

for (const box of document.querySelectorAll(".browser")) {
  const PAGE = 20, { systems, tasks } = JSON.parse(box.querySelector("script").textContent);
  const part = (name) => box.querySelector(`[data-part="${name}"]`);
  const [search, sort, pick, left, right, list] = ["search", "sort", "task", "left", "right", "rows"].map(part);
  let task, a, b, words, found = [], page = 0, open = -1;

  const options = (select, names) => select.replaceChildren(...names.map((name, i) => new Option(name, i)));
  const change = (i) => (task.values[b][i] ?? 0) - (task.values[a][i] ?? 0);
  const kind = (i) => change(i) > 0 ? "won" : change(i) < 0 ? "lost" : "same";
  const orders = {
    change: (i, j) => Math.abs(change(j)) - Math.abs(change(i)), lost: (i, j) => change(i) - change(j),
    won: (i, j) => change(j) - change(i), worst: (i, j) => task.values[b][i] - task.values[b][j], order: (i, j) => i - j,
  };

  // Which queries, in which order: all words of the search occur in the text or the id.
  const select = () => {
    const wanted = search.value.toLowerCase().split(/\s+/).filter(Boolean), which = box.querySelector("[name=which]:checked").value;
    const counts = { all: 0, won: 0, lost: 0, same: 0 };
    found = [];
    task.ids.forEach((_, i) => {
      if (!wanted.every((word) => words[i].includes(word))) return;
      counts.all += 1;
      counts[kind(i)] += 1;
      if (which === "all" || which === kind(i)) found.push(i);
    });
    found.sort((i, j) => orders[sort.value](i, j) || i - j);
    for (const [name, count] of Object.entries(counts)) box.querySelector(`[data-count=${name}]`).textContent = count.toLocaleString("en");
    page = 0;
    open = -1;
    draw();
  };

  const draw = () => {
    const pages = Math.max(1, Math.ceil(found.length / PAGE)), sampled = task.ids.length < task.total;
    part("found").textContent = `${found.length.toLocaleString("en")} ${task.unit}, by ${task.metric}`
      + (sampled ? `; the page holds ${task.ids.length.toLocaleString("en")} of ${task.total.toLocaleString("en")}, spread evenly, to stay small` : "");
    list.replaceChildren(...found.slice(page * PAGE, page * PAGE + PAGE).map(row));
    list.start = page * PAGE + 1;
    box.querySelector(".pages").hidden = pages === 1;
    part("page").textContent = `page ${page + 1} of ${pages}`;
    part("back").disabled = page === 0;
    part("next").disabled = page === pages - 1;
  };

  const row = (i) => {
    const value = (side) => task.values[side][i]?.toFixed(2) ?? "–";
    const moved = { won: ["up", "▲ "], lost: ["down", "▼ "], same: ["level", ""] }[kind(i)];
    const button = make("button", "query", make("span", "text", task.queries[i]),
      make("span", "move", value(a), " → ", make("span", moved[0], moved[1] + value(b))));
    button.type = "button";
    button.setAttribute("aria-expanded", i === open);
    button.addEventListener("click", () => toggle(i));
    const item = make("li", "card", button);
    if (i === open) item.append(task.top ? rankings(i) : facts(i));
    return item;
  };

  const toggle = (i) => {
    open = i === open ? -1 : i;
    draw();
    list.children[found.indexOf(i) - page * PAGE].firstChild.focus();
  };

  // Both rankings beside each other; beside a document where it stands on the other side.
  const rankings = (i) => {
    const grades = new Map(task.relevant[i]), sides = [a, b].map((side) => task.top[side][i]);
    const column = (side, n) => {
      const mine = sides[n], other = new Map(sides[1 - n].map((document, place) => [document, place]));
      const entries = mine.map((document, place) => {
        const there = other.get(document), score = task.scores[side][i]?.[place];
        const step = n === 0 || there === undefined ? 0 : there - place;
        const [name, label] = there === undefined ? (n === 0 ? ["gone", "then gone"] : ["new", "new"])
          : step > 0 ? ["up", `▲ ${step}`] : step < 0 ? ["down", `▼ ${-step}`] : n === 0 && there !== place ? ["", `then ${there + 1}.`] : ["", ""];
        return entry(document, `${place + 1}.`, grades.get(document), make("span", `moved ${name}`, label), score);
      });
      return make("div", "", make("h4", "", systems[side]), mine.length ? make("ol", "", ...entries) : make("p", "note", "Nothing was found."));
    };
    const missing = [...grades.keys()].filter((document) => !sides.some((side) => side.includes(document)));
    const detail = make("div", "detail", make("div", "sides", column(a, 0), column(b, 1)));
    if (missing.length) detail.append(make("h4", "", "Relevant, and in neither of these lists"),
      make("ol", "", ...missing.slice(0, 20).map((document) => entry(document, "–", grades.get(document), ""))));
    return detail;
  };

  const entry = (document, place, grade, moved, score) => {
    const item = make("li", grade ? "relevant" : "", make("span", "place", place));
    if (grade) item.append(make("span", "mark", grade === 1 ? "relevant" : `relevant, ${grade}`));
    item.append(moved, make("span", "said", task.documents.texts[document] || task.documents.ids[document]));
    if (score !== undefined) item.append(make("small", "", score.toFixed(3)));
    item.title = task.documents.ids[document];
    return item;
  };

  // Of other tasks the columns of the table.
  const facts = (i) => {
    const shown = (value) => value === null || value === undefined ? "–" : String(value);
    const rows = task.facts.map(({ name, values }) => make("tr", "", Object.assign(make("th", "", name), { scope: "row" }),
      ...(values.length === 1 ? [Object.assign(make("td", "", shown(values[0][i])), { colSpan: 2 })] : [a, b].map((side) => make("td", "", shown(values[side][i]))))));
    const head = make("thead", "", make("tr", "", make("td", "", ""), make("th", "", systems[a]), make("th", "", systems[b])));
    return make("div", "detail", make("table", "", head, make("tbody", "", ...rows)));
  };

  const show_task = () => {
    task = tasks[pick.value];
    words = task.ids.map((id, i) => `${id} ${task.queries[i]}`.toLowerCase());
    select();
  };
  const turn = (by, last) => {
    page += by;
    open = -1;
    draw();
    list.children[last ? list.children.length - 1 : 0].firstChild.focus();
  };
  const step = (by) => {
    const buttons = [...list.querySelectorAll(".query")], at = buttons.indexOf(document.activeElement?.closest?.("li")?.firstChild);
    const to = at < 0 ? 0 : at + by;
    if (to >= 0 && to < buttons.length) buttons[to].focus();
    else if (to < 0 && page > 0) turn(-1, true);
    else if (to >= buttons.length && (page + 1) * PAGE < found.length) turn(1, false);
  };

  options(pick, tasks.map((one) => one.name));
  pick.closest("label").hidden = tasks.length === 1;
  for (const side of [left, right]) options(side, systems);
  right.value = systems.length - 1;
  box.querySelector(".versus").hidden = systems.length === 2;
  const sides = () => { a = Number(left.value); b = Number(right.value); };
  sides();
  box.querySelector("form").hidden = false;
  box.querySelector("form").addEventListener("submit", (event) => event.preventDefault());
  pick.addEventListener("change", show_task);
  for (const side of [left, right]) side.addEventListener("change", () => { sides(); select(); });
  search.addEventListener("input", select);
  for (const control of [sort, ...box.querySelectorAll("[name=which]")]) control.addEventListener("change", select);
  part("back").addEventListener("click", () => turn(-1, false));
  part("next").addEventListener("click", () => turn(1, false));
  box.addEventListener("keydown", (event) => {
    if (event.key === "Escape" && open >= 0) toggle(open);
    if (event.target === search && (event.key === "Enter" || event.key === "ArrowDown")) { event.preventDefault(); step(1); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input, select, textarea")) return;
    const free = event.target === document.body, inside = list.contains(event.target);
    if (event.key === "/") { event.preventDefault(); search.focus(); search.select(); }
    const by = { j: 1, k: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (by && (inside || (free && event.key.length === 1))) { event.preventDefault(); step(by); }
  });
  show_task();
}
