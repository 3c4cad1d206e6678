"use strict";
// Tables: a header is a button that sorts by its column, first from the highest.
for (const table of document.querySelectorAll("table")) {
  if (table.tBodies[0].rows.length < 2) continue;
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    const note = head.querySelector("small");
    const nodes = [...head.childNodes].filter((node) => node !== note);
    head.prepend(button);
    button.append(...nodes);
    button.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") === "descending";
      heads.forEach((each) => each.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const value = (row) => {
        const cell = row.cells[column];
        const text = cell.dataset.sort ?? cell.firstChild?.textContent.trim() ?? "";
        const number = parseFloat(text.replace("−", "-").replaceAll(",", ""));
        return Number.isNaN(number) ? text : number;
      };
      const compared = (one, other) => {
        const [a, b] = [value(one), value(other)];
        if (typeof a !== typeof b) return typeof a === "number" ? -1 : 1; // what has no number stays last
        const order = typeof a === "number" ? a - b : a.localeCompare(b);
        return up ? order : -order;
      };
      table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compared));
    });
  });
}
// Points: what a point says is shown beside it, for the pointer and for the key; arrows go from point to point.
const told = document.createElement("div");
told.id = "told";
told.hidden = true;
told.setAttribute("aria-hidden", "true"); // a point's own name says the same
document.body.append(told);
const show = (point) => {
  told.textContent = point.getAttribute("aria-label");
  told.hidden = false;
  const place = point.querySelector(".reach").getBoundingClientRect();
  const size = told.getBoundingClientRect();
  const left = Math.min(place.left + place.width / 2 - size.width / 2, document.documentElement.clientWidth - size.width - 8);
  const above = place.top - size.height - 6;
  told.style.left = `${Math.max(8, left) + scrollX}px`;
  told.style.top = `${(above > 4 ? above : place.bottom + 6) + scrollY}px`;
};
const hide = () => { told.hidden = true; };
for (const chart of document.querySelectorAll("svg.chart")) {
  const points = [...chart.querySelectorAll(".point")];
  for (const point of points) {
    point.querySelector("title").remove(); // the browser's own box would cover ours
    point.addEventListener("pointerenter", () => show(point));
    point.addEventListener("pointerleave", hide);
    point.addEventListener("focus", () => show(point));
    point.addEventListener("blur", hide);
  }
  chart.addEventListener("keydown", (event) => {
    const at = points.indexOf(document.activeElement);
    const steps = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: points.length - 1 };
    if (event.key === "Escape") hide();
    if (at < 0 || !(event.key in steps)) return;
    event.preventDefault();
    const next = points[Math.max(0, Math.min(points.length - 1, steps[event.key]))];
    points[at].tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}
// Legends: a pointer on an entry fades the other series of its figure.
for (const figure of document.querySelectorAll("figure.drawn")) {
  const marks = figure.querySelectorAll(".panels [data-s]");
  figure.querySelectorAll(".legend li").forEach((entry, number) => {
    const fade = (on) => marks.forEach((mark) => {
      mark.classList.toggle("faded", on && mark.dataset.s !== String(number));
      mark.classList.toggle("lit", on && mark.dataset.s === String(number));
    });
    entry.addEventListener("pointerenter", () => fade(true));
    entry.addEventListener("pointerleave", () => fade(false));
  });
}
// Print: what is folded is unfolded.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((each) => { each.open = true; }));
