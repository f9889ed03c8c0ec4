"use strict";

// The order of table rows by their values: numbers by size, words by alphabet, what is missing always last.
function order(values, descending) {
  const missing = (value) => value === "";
  const numeric = values.every((value) => missing(value) || !Number.isNaN(Number(value)));
  const compare = (a, b) => (numeric ? Number(a) - Number(b) : a.localeCompare(b));
  return values
    .map((value, index) => index)
    .sort((i, j) => {
      const [a, b] = [values[i], values[j]];
      if (missing(a) || missing(b)) return missing(a) - missing(b) || i - j;
      return (descending ? -1 : 1) * compare(a, b) || i - j;
    });
}

// The most network calls that are no more than the limit; null if all of a model's cells need more.
function affordable(calls, limit) {
  const within = calls.filter((value) => value <= limit);
  return within.length ? Math.max(...within) : null;
}

function sortable(table) {
  const body = table.tBodies[0];
  const headings = [...table.tHead.rows[0].cells];
  headings.forEach((heading, column) => {
    heading.querySelector("button").addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const descending = before ? before === "ascending" : heading.dataset.first === "descending";
      headings.forEach((other) => other.removeAttribute("aria-sort"));
      heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
      const rows = [...body.rows];
      const values = rows.map((row) => row.cells[column].dataset.value);
      order(values, descending).forEach((index) => body.append(rows[index]));
    });
  });
}

function hoverable(table, hint) {
  const points = [...document.querySelectorAll('g[id^="point-"]')];
  const rows = [...table.tBodies[0].rows];
  const headings = [...table.tHead.rows[0].cells].map((cell) => cell.textContent.trim());
  const number = (point) => point.id.split("-").pop();
  const rowOf = (index) => rows.find((row) => row.dataset.row === index);
  const mark = (index, on) => {
    rowOf(index).classList.toggle("marked", on);
    points.filter((point) => number(point) === index).forEach((point) => point.classList.toggle("marked", on));
  };
  const tell = (point, x, y) => {
    const cells = [...rowOf(number(point)).cells].map((cell) => cell.textContent.trim().replace(/\s+/g, " "));
    // textContent, so that nothing in a model's name is read as HTML.
    hint.textContent = cells.map((text, i) => (i ? `${headings[i]}: ${text}` : text)).join("\n");
    hint.style.left = `${Math.min(x + 14, window.innerWidth - 260)}px`;
    hint.style.top = `${y + 14}px`;
    hint.hidden = false;
    mark(number(point), true);
  };
  points.forEach((point) => {
    const leave = () => {
      hint.hidden = true;
      mark(number(point), false);
    };
    point.setAttribute("tabindex", "0");
    point.addEventListener("mousemove", (event) => tell(point, event.clientX, event.clientY));
    point.addEventListener("mouseleave", leave);
    point.addEventListener("focus", () => {
      const box = point.getBoundingClientRect();
      tell(point, box.right, box.bottom);
    });
    point.addEventListener("blur", leave);
  });
  rows.forEach((row) => {
    row.addEventListener("mouseenter", () => mark(row.dataset.row, true));
    row.addEventListener("mouseleave", () => mark(row.dataset.row, false));
  });
}

function choosable(select) {
  const show = () => {
    document.querySelectorAll("[data-quality]").forEach((figure) => {
      figure.hidden = figure.dataset.quality !== select.value;
    });
  };
  select.addEventListener("input", show);
  show();
}

function sliding(slider, output) {
  const limits = slider.dataset.limits.split(" ").map(Number);
  const places = [...document.querySelectorAll("[data-model]")];
  const show = () => {
    const limit = limits[Number(slider.value)];
    output.textContent = `at most ${limit} network ${limit === 1 ? "call" : "calls"} per image`;
    places.forEach((place) => {
      const cells = [...place.querySelectorAll("[data-nfe]")];
      const calls = cells.map((cell) => Number(cell.dataset.nfe));
      const chosen = affordable(calls, limit);
      cells.forEach((cell, index) => {
        cell.hidden = calls[index] !== chosen;
      });
      place.querySelector(".needs").hidden = chosen !== null;
    });
  };
  slider.addEventListener("input", show);
  show();
}

function start() {
  const table = document.getElementById("results");
  sortable(table);
  hoverable(table, document.getElementById("hint"));
  const select = document.getElementById("quality");
  if (select) choosable(select);
  const slider = document.getElementById("nfe");
  if (slider) sliding(slider, document.getElementById("limit"));
}

if (typeof document !== "undefined") start();
