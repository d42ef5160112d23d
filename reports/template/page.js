// The page works without this script; it adds sorting and downloads.

// The records lie in the page as JSON lines; hand them out as the file they came from.
for (const link of document.querySelectorAll("a[data-records]")) {
  const records = document.getElementById(link.dataset.records).textContent;
  link.href = URL.createObjectURL(new Blob([records], { type: "application/x-ndjson" }));
  link.hidden = false;
}

// A cell's number where it begins with one (a time, a rate, "+5.1 %"), to sort by; text sorts as text, behind all numbers.
const figure = text => {
  const found = text.trim().replaceAll(",", "").match(/^(?:at (?:least|most) )?([+−-]?\d+(?:\.\d+)?(?:e[+-]?\d+)?)/i);
  return found ? parseFloat(found[1].replace("−", "-")) : null;
};
const compared = (a, b) => {
  const [x, y] = [figure(a), figure(b)];
  if (x !== null && y !== null) return x - y;
  if (x !== null || y !== null) return x !== null ? -1 : 1;
  return a.localeCompare(b, "en", { numeric: true });
};

// Each heading of a table becomes a button: once sorts upwards, again downwards, a third time as it was.
const sortable = table => {
  const body = table.tBodies[0], heads = [...(table.tHead?.rows[0]?.cells ?? [])], rows = [...(body?.rows ?? [])];
  const plain = table.tBodies.length === 1 && table.tHead?.rows.length === 1 && !table.querySelector("[colspan], [rowspan]");
  if (!plain || rows.length < 2 || rows.some(row => row.cells.length !== heads.length)) return;
  heads.forEach((head, column) => {
    if (!head.textContent.trim()) return;
    const button = document.createElement("button");
    button.type = "button";
    button.className = "fc-sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const next = { ascending: "descending", descending: null }[head.ariaSort] ?? (head.ariaSort ? null : "ascending");
      heads.forEach(other => other.removeAttribute("aria-sort"));
      const text = row => row.cells[column].innerText;
      const way = next === "descending" ? -1 : 1;
      const order = next ? [...rows].sort((a, b) => way * compared(text(a), text(b))) : rows;
      if (next) head.ariaSort = next;
      body.append(...order);
    });
  });
};
document.querySelectorAll(".fc-table table, .fc-output table").forEach(sortable);

// What is wider than its place can be scrolled by keyboard.
const reachable = () => {
  for (const box of document.querySelectorAll(".fc-output, .fc-text, .fc-prose")) {
    if (box.scrollWidth > box.clientWidth + 1 && !box.hasAttribute("tabindex")) {
      box.tabIndex = 0;
      if (!box.hasAttribute("role")) box.setAttribute("role", "group");
      if (!box.hasAttribute("aria-label")) box.setAttribute("aria-label", "Wide content, can be scrolled");
    }
  }
};
reachable();
addEventListener("resize", reachable);
addEventListener("toggle", reachable, true);

// A link into folded content unfolds it.
const unfold = () => location.hash.length > 1 && document.getElementById(location.hash.slice(1))?.closest("details")?.setAttribute("open", "");
unfold();
addEventListener("hashchange", unfold);
