(() => {
  "use strict";
  const root = document.documentElement;
  const plots = JSON.parse(document.getElementById("plots").textContent);
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  // Colours stand in the plots as names of the style sheet's variables, so that light, dark and paper are told there.
  const themed = (value) => {
    if (typeof value === "string") return value.startsWith("--") ? colour(value) : value;
    if (Array.isArray(value)) return value.map(themed);
    if (value === null || typeof value !== "object") return value;
    return Object.fromEntries(Object.entries(value).map(([name, part]) => [name, themed(part)]));
  };
  const narrow = () => innerWidth < 560;
  const sparse = ({ tickvals, ticktext }) => { // only the powers of ten
    const kept = tickvals.map((_, i) => i).filter((i) => ticktext[i].replace(/[0.]/g, "").startsWith("1"));
    return { tickvals: kept.map((i) => tickvals[i]), ticktext: kept.map((i) => ticktext[i]) };
  };
  const axis = (own) => ({
    automargin: true, zeroline: false, tickangle: 0, nticks: narrow() ? 4 : own?.type === "date" ? 5 : 8, gridcolor: "--grid", linecolor: "--line", tickcolor: "--line", fixedrange: false,
    tickfont: { color: "--muted" }, ...own,
    ...(own.tickvals?.length > 6 && narrow() ? sparse(own) : {}), title: { standoff: 8, font: { color: "--muted", size: 12 }, ...own?.title },
  });
  const layout = (own, size) => themed({
    font: { family: getComputedStyle(document.body).fontFamily, size: 12, color: "--text" },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", margin: { l: 44, r: 14, t: 28, b: 34 },
    legend: { orientation: "h", traceorder: "normal", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { color: "--muted" } },
    hoverlabel: { bgcolor: "--card", bordercolor: "--line", font: { color: "--text" }, align: "left" },
    dragmode: false, ...own, ...size, xaxis: axis(own.xaxis), yaxis: axis(own.yaxis),
  });
  const config = { responsive: true, displaylogo: false, displayModeBar: false, doubleClick: "reset" };
  const draw = (size) => Promise.all(plots.map((plot) =>
    Plotly.react(document.getElementById(plot.id), themed(plot.traces), layout(plot.layout, size), config)));

  const paper = (on) => {
    root.classList.toggle("paper", on);
    draw(on ? { width: 660, height: 250 } : {});
  };
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  addEventListener("beforeprint", () => paper(true));
  addEventListener("afterprint", () => paper(false));
  for (const button of document.querySelectorAll("button[data-list]")) {
    button.hidden = false;
    button.addEventListener("click", () => {
      const items = [...document.getElementById(button.dataset.list).querySelectorAll("details")];
      const open = items.some((item) => !item.open);
      for (const item of items) item.open = open;
      button.textContent = open ? "Close all" : "Open all";
    });
  }
  draw().then(() => { root.dataset.plots = "drawn"; });
})();
