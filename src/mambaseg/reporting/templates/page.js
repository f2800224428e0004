// Sorts a table by the column whose heading is pressed: by number where its cells start with one.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  table.querySelectorAll("th button").forEach((button, column) => {
    button.addEventListener("click", () => {
      const heading = button.parentElement;
      const next = { none: "ascending", ascending: "descending", descending: "none" }[heading.ariaSort || "none"];
      table.querySelectorAll("th").forEach((other) => other.setAttribute("aria-sort", "none"));
      heading.setAttribute("aria-sort", next);
      const sign = next === "descending" ? -1 : 1;
      const rows = next === "none" ? original : [...original].sort((a, b) => compare(a, b, column, sign));
      body.append(...rows);
    });
  });
}

// Cells without a number come last in both directions.
function compare(a, b, column, sign) {
  const [x, y] = [a, b].map((row) => row.cells[column].textContent.trim());
  const [p, q] = [x, y].map(number);
  if (Number.isNaN(p) || Number.isNaN(q)) {
    return Number.isNaN(p) && Number.isNaN(q) ? sign * x.localeCompare(y) : Number.isNaN(p) ? 1 : -1;
  }
  return sign * (p - q);
}

// 3 h 20 min and 45 s in seconds.
function number(text) {
  const parts = /^(?:(\d+) h)? ?(?:(\d+) min)? ?(?:(\d+) s)?$/.exec(text);
  if (text && parts) return 3600 * (parts[1] || 0) + 60 * (parts[2] || 0) + 1 * (parts[3] || 0);
  return parseFloat(text.replace(/,/g, "").replace("−", "-").replace(/^</, ""));
}
