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

// A table with more rows than these is worth sorting, or filtering; one of facts, each by its name, is not.
const SORTED = 5, FILTERED = 12, FACTS = ".fc-facts";

// Each heading of a table becomes a button: once sorts upwards, again downwards, a third time as it was.
const sortable = table => {
  const body = table.tBodies[0], heads = [...(table.tHead?.rows[0]?.cells ?? [])], rows = [...(body?.rows ?? [])];
  const plain = table.tBodies.length === 1 && table.tHead?.rows.length === 1 && !table.querySelector("[colspan], [rowspan]");
  if (!plain || table.closest(FACTS) || rows.length <= SORTED || rows.some(row => row.cells.length !== heads.length)) return;
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

// A box above a long table keeps the rows that hold what is typed.
const filterable = table => {
  const rows = [...(table.tBodies[0]?.rows ?? [])];
  if (table.closest(FACTS) || rows.length <= FILTERED || table.tBodies.length !== 1) return;
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

// The plotted point nearest to the pointer, or to a finger, says its value and spread. A plot is one stop of the Tab key;
// arrow keys, Home and End go through its points, and Escape takes the words away.
const NEAR = 24;
const tip = document.createElement("div"), spoken = document.createElement("p");
tip.className = "fc-tip";
spoken.className = "fc-unseen";
spoken.setAttribute("role", "status");
document.body.append(spoken);
const ring = document.createElementNS("http://www.w3.org/2000/svg", "circle");
ring.setAttribute("class", "fc-ring");
ring.setAttribute("r", "9");
const points = plot => [...plot.querySelectorAll("use:has(> title)")];
const middle = mark => {
  const box = mark.getBoundingClientRect();
  return [box.x + box.width / 2, box.y + box.height / 2];
};
let shown = null;
const place = () => {
  if (!shown) return;
  const [x, y] = middle(shown), above = y - tip.offsetHeight - 14;
  tip.style.left = `${Math.max(4, Math.min(x + 12, innerWidth - tip.offsetWidth - 4))}px`;
  tip.style.top = `${above > 4 ? above : y + 14}px`;
};
const show = mark => {
  shown = mark;
  if (!mark) {
    tip.remove();
    return ring.remove();
  }
  tip.textContent = mark.querySelector("title").textContent;
  ring.setAttribute("cx", mark.getAttribute("x"));
  ring.setAttribute("cy", mark.getAttribute("y"));
  mark.closest("svg").append(ring);
  document.body.append(tip);
  place();
};
const point = event => {
  const plot = event.target.closest?.("svg.fc-plot");
  let nearest = null, least = NEAR;
  for (const mark of plot ? points(plot) : []) {
    const [x, y] = middle(mark), far = Math.hypot(x - event.clientX, y - event.clientY);
    if (far < least) [nearest, least] = [mark, far];
  }
  if (nearest !== shown) show(nearest);
};
document.addEventListener("pointermove", point);
document.addEventListener("pointerdown", point);
addEventListener("scroll", place, { capture: true, passive: true });
addEventListener("resize", place);

const walkable = plot => {
  const marks = points(plot);
  let at = 0;
  plot.tabIndex = 0;
  plot.setAttribute("aria-keyshortcuts", "ArrowRight ArrowLeft Home End Escape");
  const go = place => {
    at = Math.max(0, Math.min(place, marks.length - 1));
    show(marks[at]);
    spoken.textContent = `Point ${at + 1} of ${marks.length}: ${tip.textContent}`;
  };
  plot.addEventListener("focus", () => plot.matches(":focus-visible") && go(at));
  plot.addEventListener("blur", () => show(null));
  plot.addEventListener("keydown", event => {
    const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: marks.length };
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    if (event.key === "Escape") show(null);
    else if (event.key in to) {
      event.preventDefault();
      go(to[event.key]);
    }
  });
};

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

// All of it for what stands in a part of the page, once the part is there.
const furnish = part => {
  part.querySelectorAll(".fc-table table, .fc-output table").forEach(table => {
    sortable(table);
    filterable(table);
  });
  part.querySelectorAll("svg.fc-plot:has(use > title)").forEach(walkable);
  reachable();
};

// An executed notebook is text until its fold is opened, so that a page of thousands of rows is light; without this script
// a browser reads it at once.
const unpack = packed => {
  const place = packed.parentElement;
  place.innerHTML = packed.textContent;
  furnish(place);
};
const packedIn = part => [...part.querySelectorAll("noscript")];
furnish(document);
packedIn(document).filter(packed => packed.closest("details")?.open).forEach(unpack);
document.addEventListener("click", event => {
  const fold = event.target.closest?.("summary")?.parentElement;
  if (fold) packedIn(fold).forEach(unpack);
}, true);
addEventListener("resize", reachable);
addEventListener("toggle", event => {
  if (event.target.open) packedIn(event.target).forEach(unpack);
  reachable();
}, true);

// A link into folded content unfolds it.
const unfold = () => {
  const id = location.hash.slice(1);
  if (!id) return;
  const packed = document.getElementById(id) ? null : packedIn(document).find(one => one.textContent.includes(` id="${id}"`));
  if (packed) unpack(packed);
  for (let fold = document.getElementById(id)?.closest("details"); fold; fold = fold.parentElement.closest("details")) fold.open = true;
  if (packed) location.replace(location.href);  // the browser looked for it before it was there
};
unfold();
addEventListener("hashchange", unfold);
