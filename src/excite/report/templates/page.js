"use strict";
const page = (() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const root = document.documentElement;
  const charts = [...document.querySelectorAll(".chart")];
  const hidden = new Set();
  // No tool bar: it would cover the curves, and by default it offers to send the chart to a server.
  const config = { displayModeBar: false };
  const pen = document.createElement("canvas").getContext("2d");

  // A colour such as "--series-1" is a variable of the style sheet, and so depends on the light or dark scheme.
  function coloured() {
    const style = getComputedStyle(root);
    return JSON.parse(JSON.stringify(figures), (key, value) =>
      typeof value === "string" && /color$/.test(key) && value.startsWith("--") ? style.getPropertyValue(value).trim() : value);
  }

  // Writes each name beside its point where it hides nothing; a name without room is left to the key and the hover text.
  function placeNames(figure, width, height) {
    const { margin, xaxis, yaxis, font } = figure.layout;
    const w = width - margin.l - margin.r, h = height - margin.t - margin.b;
    const number = (axis, value) => (axis.type === "log" ? Math.log10(value) : value);
    const pixel = (axis, value, size) => (size * (number(axis, value) - axis.range[0])) / (axis.range[1] - axis.range[0]);
    const named = figure.data.filter((trace) => trace.text && trace.visible);
    const taken = figure.data.filter((trace) => trace.visible).flatMap((trace) => {
      const x = pixel(xaxis, trace.x[0], w);
      const at = (value) => h - pixel(yaxis, value, h);
      if (!trace.text) return trace.y.map((value) => [x - 4, at(value) - 4, x + 4, at(value) + 4]);
      const y = trace.y[0], bar = trace.error_y;
      const point = [x - 9, at(y) - 9, x + 9, at(y) + 9];
      return bar ? [point, [x - 4, at(y + bar.array[0]), x + 4, at(y - bar.arrayminus[0])]] : [point];
    });
    const overlaps = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    for (const trace of named) {
      pen.font = `${trace.textfont.size}px ${font.family}`;
      const decoded = new DOMParser().parseFromString(trace.text[0], "text/html").documentElement.textContent;
      const wide = pen.measureText(decoded).width, tall = 17, gap = 12;
      const x = pixel(xaxis, trace.x[0], w), y = h - pixel(yaxis, trace.y[0], h);
      const places = {
        "middle right": [x + gap, y - tall / 2, x + gap + wide, y + tall / 2],
        "middle left": [x - gap - wide, y - tall / 2, x - gap, y + tall / 2],
        "top center": [x - wide / 2, y - gap - tall, x + wide / 2, y - gap],
        "bottom center": [x - wide / 2, y + gap, x + wide / 2, y + gap + tall],
      };
      const free = Object.entries(places).find(([, box]) =>
        box[0] > 0 && box[2] < w + margin.r && box[1] > 0 && box[3] < h && !taken.some((other) => overlaps(box, other)));
      if (free) {
        trace.textposition = free[0];
        taken.push(free[1]);
      } else {
        trace.text = [""];
      }
    }
  }

  // Draws the charts again; those whose figure is not there yet are left to whoever makes it.
  function draw(chosen = charts) {
    const all = coloured();
    for (const chart of chosen) {
      if (!all[chart.dataset.figure]) continue;
      const { data, layout } = all[chart.dataset.figure];
      const width = chart.clientWidth, height = chart.clientHeight;
      for (const trace of data) trace.visible = !hidden.has(trace.legendgroup);
      Object.assign(layout, { width, height, uirevision: chart.dataset.figure, font: { family: getComputedStyle(document.body).fontFamily } });
      layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom"; // a finger on a chart scrolls the page
      if ("labels" in chart.dataset) placeNames({ data, layout }, width, height);
      Plotly.react(chart, data, layout, config);
    }
    root.dataset.charts = "drawn";
  }

  const buttons = [...document.querySelectorAll("button[data-series]")];
  for (const button of buttons) {
    button.addEventListener("click", () => {
      const series = button.dataset.series;
      if (!hidden.delete(series)) hidden.add(series);
      for (const same of buttons) {
        if (same.dataset.series === series) same.setAttribute("aria-pressed", String(!hidden.has(series)));
      }
      draw();
    });
  }

  for (const radio of document.querySelectorAll(".switch input[data-spoken]")) {
    const choose = () => {
      const chart = document.getElementById(`${radio.name}-chart`);
      chart.dataset.figure = radio.value;
      chart.setAttribute("aria-label", radio.dataset.spoken);
    };
    radio.addEventListener("change", () => { choose(); draw(); });
    if (radio.checked) choose(); // a reloaded page keeps the reader's choice
  }

  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const details of closed) details.open = true;
    root.dataset.printing = "";
    draw();
  });
  addEventListener("afterprint", () => {
    for (const details of closed) details.open = false;
    delete root.dataset.printing;
    draw();
  });

  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw());
  const seen = new Map();
  const observer = new ResizeObserver((entries) => {
    const changed = entries.filter(({ target }) => seen.get(target) !== target.clientWidth);
    for (const { target } of entries) seen.set(target, target.clientWidth);
    if (changed.length) requestAnimationFrame(() => draw());
  });
  draw();
  for (const chart of charts) {
    seen.set(chart, chart.clientWidth);
    observer.observe(chart);
  }
  return { figures, draw };
})();
