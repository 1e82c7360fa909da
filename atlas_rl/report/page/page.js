// Draws the figures in the reader's light or dark colours, and again where these change or the page is printed.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const options = { displayModeBar: false };
  const printWidth = 680; // px, of a page of A4 or letter

  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  const dressed = (id, data, layout, print) => {
    const ink = print ? "#1c2128" : colour("--ink");
    const rule = print ? "#d8dde3" : colour("--rule");
    const paper = print ? "#ffffff" : colour("--paper");
    const axis = { gridcolor: rule, zerolinecolor: rule, linecolor: rule, automargin: true };
    return {
      ...layout,
      font: { family: "system-ui, sans-serif", size: 12, color: ink },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      margin: { l: 50, r: 12, t: 10, b: 40 },
      xaxis: { ...axis, ...layout.xaxis },
      yaxis: { ...axis, ...layout.yaxis },
      hoverlabel: { bgcolor: paper, bordercolor: rule, font: { color: ink } },
      hovermode: "closest",
      showlegend: data.length > 1,
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.03, yanchor: "bottom", maxheight: 0.8, ...layout.legend },
      ...(print ? { width: printWidth, height: document.getElementById(id).offsetHeight, autosize: false } : { autosize: true }),
    };
  };

  // `react` to another width leaves legends where those of the old width were, across the lines: for print all is drawn anew.
  const draw = (print) =>
    Promise.all(
      Object.entries(figures).map(([id, { data, layout }]) =>
        (print ? Plotly.newPlot : Plotly.react)(id, data, dressed(id, data, layout, print), options),
      ),
    );

  const resized = new ResizeObserver((entries) => {
    for (const { target } of entries) if (target.layout?.autosize) Plotly.Plots.resize(target);
  });

  draw(false).then(() => {
    document.querySelectorAll(".chart").forEach((chart) => resized.observe(chart));
    document.body.dataset.drawn = document.querySelectorAll(".chart .main-svg").length;
  });
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(false));
  window.addEventListener("beforeprint", () => draw(true));
  window.addEventListener("afterprint", () => draw(false));
})();
