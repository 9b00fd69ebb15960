// The map: the nearest text to the pointer is marked on all sides at once, with lines to what belongs to it.
for (const map of document.querySelectorAll(".map")) {
  const tasks = JSON.parse(map.querySelector("script").textContent), NEAR = 4; // per cent of the picture's width
  const part = (name) => map.querySelector(`[data-part="${name}"]`);
  const drawn = (name, content) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", name);
    for (const [key, value] of Object.entries(content)) element.setAttribute(key, value);
    return element;
  };
  const resting = "Point at a text, or use the arrow keys.";
  let task, places, marks = [], at = -1;

  const colour = (i) => task.group[i] < task.coloured ? `c${task.group[i]}` : "other";
  const dot = ([x, y]) => `M${x} ${y}h0`;
  const draw = () => {
    places = task.methods[part("method").value].places;
    const order = task.group.map((_, i) => i).sort((i, j) => task.group[j] - task.group[i]); // grey ones lie below
    marks = [];
    part("pair").replaceChildren(...places.map((side, n) => {
      const svg = drawn("svg", { viewBox: "0 0 100 100", role: "img", "aria-label": `${side.length} texts in the plane, ${task.sides[n].toLowerCase()} training` });
      svg.append(...order.map((i) => drawn("path", { class: colour(i), d: dot(side[i]) })));
      marks.push([drawn("path", { class: "link" }), drawn("path", { class: "mark" })]);
      svg.append(...marks[n]);
      svg.addEventListener("pointermove", (event) => point(n, svg, event));
      svg.addEventListener("pointerleave", () => show(-1));
      const box = document.createElement("div"), title = document.createElement("h3");
      title.textContent = task.sides[n];
      box.append(title, svg);
      return box;
    }));
    part("key").replaceChildren(...task.groups.map((name, i) => {
      const item = document.createElement("li"), spot = document.createElement("i");
      spot.className = i < task.coloured ? `c${i}` : "other";
      item.append(spot, name);
      return item;
    }));
    const method = task.methods[part("method").value];
    part("note").textContent = `${method.title}: ${method.says}. ${task.note}`;
    show(-1);
  };

  const point = (n, svg, event) => {
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 100, y = (event.clientY - box.top) / box.height * 100;
    let best = -1, nearest = NEAR;
    places[n].forEach(([a, b], i) => {
      const far = Math.hypot(a - x, b - y);
      if (far < nearest) [best, nearest] = [i, far];
    });
    show(best);
  };
  const show = (i) => {
    at = i;
    const others = i < 0 ? [] : task.links.filter((link) => link.includes(i)).map(([query, document]) => query === i ? document : query);
    marks.forEach(([link, mark], n) => {
      const side = places[n];
      link.setAttribute("d", others.map((other) => `M${side[i]}L${side[other]}`).join(""));
      mark.setAttribute("d", i < 0 ? "" : dot(side[i]));
      mark.setAttribute("class", `mark ${i < 0 ? "" : colour(i)}`);
    });
    part("out").textContent = i < 0 ? resting : task.texts[i];
  };

  const options = (select, names) => {
    select.replaceChildren(...names.map((name, i) => new Option(name, i)));
    select.closest("label").hidden = names.length === 1;
  };
  const show_task = () => {
    task = tasks[part("task").value];
    options(part("method"), task.methods.map((method) => method.title));
    map.querySelector(".controls").hidden = tasks.length === 1 && task.methods.length === 1;
    draw();
  };
  options(part("task"), tasks.map((one) => one.name));
  part("task").addEventListener("change", show_task);
  part("method").addEventListener("change", draw);
  map.addEventListener("keydown", (event) => {
    if (event.target !== map) return;
    const last = task.texts.length - 1;
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, Home: 0, End: last, Escape: -1 }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    show(event.key === "Escape" ? -1 : Math.max(0, Math.min(last, to)));
  });
  map.addEventListener("blur", () => show(-1));
  show_task();
}
