// The theme: the reader's system decides until the button is pressed; the choice is kept where the browser allows it.
(() => {
  const root = document.documentElement, button = document.getElementById("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const dark = () => (root.dataset.theme || (system.matches ? "dark" : "light")) === "dark";
  const name = () => {
    const other = dark() ? "Light theme" : "Dark theme";
    button.setAttribute("aria-label", other);
    button.querySelector(".words").textContent = other;
  };
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    try { localStorage.setItem("kinvec-theme", root.dataset.theme); } catch { /* private windows keep nothing */ }
    name();
  });
  system.addEventListener("change", name);
  name();
})();

// The learning curve: pointer or arrow keys move one cursor through all plots and read out the step's values.
for (const curve of document.querySelectorAll(".curve")) {
  const points = JSON.parse(curve.querySelector("script").textContent);
  const out = curve.querySelector("output"), resting = out.textContent, cursors = curve.querySelectorAll(".cursor");
  let at = -1;
  const show = (i) => {
    at = Math.max(0, Math.min(points.length - 1, i));
    out.textContent = points[at].text;
    cursors.forEach((c) => { c.style.display = "block"; c.style.left = points[at].x + "%"; });
  };
  const hide = () => { at = -1; out.textContent = resting; cursors.forEach((c) => { c.style.display = "none"; }); };
  curve.addEventListener("pointermove", (event) => {
    const box = curve.querySelector(".area").getBoundingClientRect(), x = (event.clientX - box.left) / box.width * 100;
    show(points.reduce((best, p, i) => Math.abs(p.x - x) < Math.abs(points[best].x - x) ? i : best, 0));
  });
  curve.addEventListener("pointerleave", hide);
  curve.addEventListener("blur", hide);
  curve.addEventListener("keydown", (event) => {
    const far = Math.max(1, Math.round(points.length / 20));
    const to = { ArrowRight: at + 1, ArrowLeft: at < 0 ? points.length - 1 : at - 1, PageDown: at + far, PageUp: at - far, Home: 0, End: points.length - 1 }[event.key];
    if (to !== undefined) { event.preventDefault(); show(to); }
    if (event.key === "Escape") hide();
  });
}
