// The page works without this script; it adds sorting, filters, tooltips, links to rows, and downloads.

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

// A table with more rows than these is worth sorting, or filtering.
const SORTED = 5, FILTERED = 12;

// Each heading of a table becomes a button: once sorts upwards, again downwards, a third time as it was.
const sortable = table => {
  const body = table.tBodies[0], heads = [...(table.tHead?.rows[0]?.cells ?? [])], rows = [...(body?.rows ?? [])];
  const plain = table.tBodies.length === 1 && table.tHead?.rows.length === 1 && !table.querySelector("[colspan], [rowspan]");
  if (!plain || rows.length <= SORTED || rows.some(row => row.cells.length !== heads.length)) return;
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

// A box above a long table keeps the rows that hold what is typed.
const filterable = table => {
  const rows = [...(table.tBodies[0]?.rows ?? [])];
  if (rows.length <= FILTERED || table.tBodies.length !== 1) return;
  const box = document.createElement("input"), name = table.caption?.textContent.trim() || "this table";
  box.type = "search";
  box.className = "fc-filter";
  box.placeholder = `Filter ${rows.length} rows`;
  box.setAttribute("aria-label", `Filter the rows of: ${name}`);
  box.addEventListener("input", () => {
    const wanted = box.value.trim().toLowerCase().split(/\s+/);
    for (const row of rows) row.hidden = !wanted.every(word => row.textContent.toLowerCase().includes(word));
  });
  (table.closest(".fc-table, .fc-output") ?? table).before(box);
};
document.querySelectorAll(".fc-table table, .fc-output table").forEach(filterable);

// The row under the pointer shows a link to itself, to be sent to somebody.
const permalink = document.createElement("a");
permalink.className = "fc-permalink";
permalink.textContent = "#";
permalink.setAttribute("aria-label", "Link to this row");
document.addEventListener("pointerover", event => {
  const row = event.target.closest?.("tbody tr[id]");
  if (!row) return permalink.remove();
  permalink.href = `#${row.id}`;
  if (permalink.parentElement !== row.cells[0]) row.cells[0].append(permalink);
});

// The plotted point nearest to the pointer, or to a finger, says its value and spread.
const NEAR = 24;
const tip = document.createElement("div");
tip.className = "fc-tip";
tip.setAttribute("role", "status");
const point = event => {
  const plot = event.target.closest?.("svg.fc-plot");
  if (!plot) return tip.remove();
  let nearest = null, least = NEAR;
  for (const mark of plot.querySelectorAll("use:has(> title)")) {
    const box = mark.getBoundingClientRect();
    const far = Math.hypot(box.x + box.width / 2 - event.clientX, box.y + box.height / 2 - event.clientY);
    if (far < least) [nearest, least] = [mark, far];
  }
  if (!nearest) return tip.remove();
  tip.textContent = nearest.querySelector("title").textContent;
  document.body.append(tip);
  tip.style.left = `${Math.max(4, Math.min(event.clientX + 12, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${Math.max(4, event.clientY - tip.offsetHeight - 12)}px`;
};
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);

// What is wider than its place can be scrolled by keyboard, and says that there is more.
const reachable = () => {
  for (const box of document.querySelectorAll(".fc-table.scroll")) {
    const wide = box.clientWidth > 0 && box.scrollWidth > box.clientWidth + 1, hint = box.previousElementSibling;
    const there = hint?.classList.contains("fc-hint");
    if (wide && !there) {
      const words = document.createElement("p");
      words.className = "fc-hint";
      words.textContent = "Scroll sideways for more columns →";
      box.before(words);
    } else if (!wide && there) hint.remove();
  }
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
