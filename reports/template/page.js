// The records lie in the page as one JSON string; hand them out as the file they came from.
{
  const link = document.getElementById("fc-download");
  const records = JSON.parse(document.getElementById("fc-records").textContent);
  link.href = URL.createObjectURL(new Blob([records], { type: "application/x-ndjson" }));
  link.hidden = false;
}
// Folded evidence is printed unfolded only if the reader unfolded it; a link into it unfolds it.
addEventListener("hashchange", () => document.querySelector(location.hash)?.closest("details")?.setAttribute("open", ""));
