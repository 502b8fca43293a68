"use strict";
(() => {
  const told = JSON.parse(document.getElementById("explained").textContent);
  const { classes, gates, selection } = told;
  const MOST = 24, WIDTH = 200, HEIGHT = 80;
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const CODE = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
  const level = new Map([...CODE].map((letter, value) => [letter, value]));

  const find = (selector) => document.querySelector(selector);
  const all = (selector) => [...document.querySelectorAll(selector)];
  // Plotly reads texts as a kind of HTML, and %{…} as a variable.
  const text = (said) => String(said).replace(/[&<>"'%]/g, (letter) => `&#${letter.charCodeAt(0)};`);
  const signed = (value, places) => `${value < 0 ? "−" : value > 0 ? "+" : ""}${Math.abs(value).toFixed(places)}`;

  // The values of one class: two letters each are a level of the unit's range, the highest a value that is missing.
  function values(unit, row, count) {
    return Array.from({ length: count }, (_, place) => {
      const at = 2 * (row * count + place);
      const n = 64 * level.get(unit.codes[at]) + level.get(unit.codes[at + 1]);
      return n === 4095 ? null : unit.low + (unit.span * n) / 4094;
    });
  }

  // --- the classes that are drawn, each with a colour of its own as long as it is
  const slots = new Map(told.shown.map((row, slot) => [row, slot]));
  const color = (slot) => 1 + (slot % 11);
  const dash = (slot) => (slot < 4 ? "solid" : DASHES[1 + ((slot - 4) % 5)]);

  function toggle(row) {
    if (slots.delete(row)) return;
    if (slots.size >= MOST) return;
    const taken = new Set(slots.values());
    let slot = 0;
    while (taken.has(slot)) slot += 1;
    slots.set(row, slot);
  }

  // --- the small panels
  function path(series) {
    const [low, high] = gates.range;
    const stride = (WIDTH * 0.96) / Math.max(1, series.length - 1);
    let pen = "M";
    return series.map((value, place) => {
      if (value === null) { pen = "M"; return ""; }
      const said = `${pen}${(WIDTH * 0.02 + place * stride).toFixed(1)} ${((HEIGHT * (high - value)) / (high - low)).toFixed(1)}`;
      pen = "L";
      return said;
    }).join("");
  }

  const chosen = (name) => find(`input[name="${name}"]:checked`)?.value;

  // The channels as places in the unit's list, in the order that was chosen.
  function ordered(unit) {
    const places = unit.channels.map((_, place) => place);
    return chosen("gates-order") === "sorted" ? places.sort((a, b) => unit.overall[a] - unit.overall[b]) : places;
  }

  function drawPanels() {
    all('[data-chooses="gates"] svg').forEach((svg, place) => {
      const unit = gates.units[place], order = ordered(unit);
      const lines = [...slots].map(([row, slot]) => [`series-${color(slot)}`, values(unit, row, unit.channels.length)]);
      svg.replaceChildren(...[...lines, ["overall", unit.overall]].map(([name, series]) => {
        const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
        line.setAttribute("class", name);
        line.setAttribute("d", path(order.map((channel) => series[channel])));
        return line;
      }));
    });
  }

  // --- the chart of a unit of squeeze-and-excitation

  function gateFigure(chart) {
    const unit = gates.units[chosen("gates-unit")];
    const against = chosen("gates-values") === "difference";
    const order = ordered(unit);
    const x = order.map((place) => String(unit.channels[place]));
    const drawn = [...slots].map(([row, slot]) => {
      const series = values(unit, row, unit.channels.length);
      return {
        type: "scatter", mode: "lines", x, name: text(classes[row]),
        y: order.map((place) => (series[place] === null ? null : against ? series[place] - unit.overall[place] : series[place])),
        line: { color: `--series-${color(slot)}`, width: 2, dash: dash(slot) },
        hovertemplate: against ? "%{y:+.3f}" : "%{y:.3f}",
      };
    });
    const mean = {
      type: "scatter", mode: "lines", x, y: order.map((place) => (against ? 0 : unit.overall[place])), name: "all classes",
      line: { color: "--ink", width: 3 }, hovertemplate: against ? "0" : "%{y:.3f}",
    };
    const layout = structuredClone(told.layouts.gates);
    layout.xaxis.categoryorder = "array";
    layout.xaxis.categoryarray = x;
    layout.xaxis.range = [-0.5, x.length - 0.5];
    layout.xaxis.nticks = Math.max(3, Math.floor(chart.clientWidth / (12 + 8 * Math.max(...x.map((name) => name.length)))));
    layout.xaxis.title.text = chosen("gates-order") === "sorted" ? "Channel, sorted by mean gate" : "Channel";
    layout.xaxis.unifiedhovertitle = { text: `<b>${text(unit.name)}</b>, channel %{x}` };
    layout.annotations[0].text = against ? "Mean gate minus the mean over all classes" : "Mean gate";
    if (!against) layout.yaxis.range = gates.range;
    find("#gates-name").textContent = unit.name;
    find("#gates-about").textContent = unit.about;
    return { data: [mean, ...drawn], layout };
  }

  // --- the chart of a selective kernel: one row a class
  function kernelFigure(chart) {
    const unit = selection.units[chosen("kernels-unit")];
    const count = selection.scales.length;
    const rows = (told.few ? classes.map((_, row) => row) : [...slots.keys()])
      .map((row) => ({ name: classes[row], at: values(unit, row, count) }));
    const rise = ({ at }) => at[count - 1] - at[0];
    rows.sort((a, b) => rise(a) - rise(b));
    const clip = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);
    const y = rows.map((_, place) => place);
    const tracks = {
      type: "scatter", mode: "lines", hoverinfo: "skip", line: { color: "--line", width: 3 },
      x: rows.flatMap(({ at }) => { const known = at.filter((value) => value !== null); return [Math.min(...known), Math.max(...known), null]; }),
      y: y.flatMap((place) => [place, place, null]),
    };
    const dots = selection.scales.map((scale, place) => ({
      type: "scatter", mode: "markers", legendgroup: `scale-${place}`, x: rows.map(({ at }) => at[place]), y,
      marker: { color: `--step-${selection.steps[place]}`, size: 8 + (6 * place) / Math.max(1, count - 1), line: { color: "--card", width: 1.2 } },
      customdata: rows.map(({ name, at }) => `<b>${text(name)}</b><br>${text(unit.name)}<br>${scale}: ${at[place] === null ? "–" : signed(at[place], 3)} (${text(unit.large)} − ${text(unit.small)})`),
      hovertemplate: "%{customdata}<extra></extra>", cliponaxis: false,
    }));
    const layout = structuredClone(told.layouts.classes);
    Object.assign(layout.yaxis, { type: "linear", tickvals: y, ticktext: rows.map(({ name }) => text(clip(name))), range: [-0.6, rows.length - 0.4] });
    const reach = [0, ...rows.flatMap(({ at }) => at.filter((value) => value !== null))];
    const low = Math.min(...reach), high = Math.max(...reach), room = 0.04 * (high - low) || 0.01;
    layout.xaxis.range = [low - room, high + room];
    chart.style.height = `${64 + 30 * Math.max(1, rows.length)}px`;
    find("#kernels-name").textContent = unit.name;
    find("#kernels-about").textContent = unit.about;
    return { data: [tracks, ...dots], layout };
  }

  const gateChart = find('[data-figure="gates"]'), kernelChart = find('[data-figure="kernels"]');

  function draw() {
    if (gateChart) page.figures.gates = gateFigure(gateChart);
    if (kernelChart) page.figures.kernels = kernelFigure(kernelChart);
    page.draw([gateChart, kernelChart].filter(Boolean));
  }

  // --- choosing classes
  function chip(row) {
    const item = document.createElement("li"), button = document.createElement("button"), name = document.createElement("span");
    button.type = "button";
    button.dataset.row = row;
    name.textContent = classes[row];
    button.append(name);
    item.append(button);
    return item;
  }

  const pattern = find(".chips .swatch");

  function showChips() {
    for (const list of all(".chips")) {
      if (!told.few) {
        const there = new Map([...list.querySelectorAll("button")].map((button) => [Number(button.dataset.row), button]));
        for (const [row, button] of there) if (!slots.has(row)) button.parentElement.remove();
        for (const row of slots.keys()) {
          if (there.has(row)) continue;
          const item = chip(row);
          item.firstChild.prepend(pattern.cloneNode(true));
          list.append(item);
        }
      }
      for (const button of list.querySelectorAll("button")) {
        const slot = slots.get(Number(button.dataset.row));
        button.setAttribute("aria-pressed", String(slot !== undefined));
        button.title = told.few ? "Show or hide in the charts" : "Take out of the charts";
        const swatch = button.querySelector(".swatch");
        swatch.style.color = slot === undefined ? "" : `var(--series-${color(slot)})`;
        swatch.firstElementChild.style.strokeDasharray = { solid: "", dash: "5 4", dot: "0.1 4.5" }[dash(slot ?? 0)] ?? "6 3 0.1 3";
      }
    }
  }

  function changed() {
    showChips();
    if (gates) drawPanels();
    draw();
  }

  for (const box of all(".classes")) {
    const search = box.querySelector("input"), found = box.querySelector(".found");
    const look = () => {
      const wanted = search.value.trim().toLowerCase();
      const rows = wanted ? classes.map((_, row) => row).filter((row) => !slots.has(row) && classes[row].toLowerCase().includes(wanted)) : [];
      rows.sort((a, b) => classes[b].toLowerCase().startsWith(wanted) - classes[a].toLowerCase().startsWith(wanted));
      found.replaceChildren(...(slots.size < MOST ? rows.slice(0, 12).map(chip) : []));
    };
    box.addEventListener("click", (event) => {
      const button = event.target.closest("button[data-row]");
      if (!button) return;
      toggle(Number(button.dataset.row));
      changed();
      if (search) { look(); if (!button.isConnected) search.focus(); }
    });
    search?.addEventListener("input", look);
    search?.addEventListener("keydown", (event) => {
      if (event.key === "Enter") found.querySelector("button")?.click();
    });
  }

  for (const input of all(".panels input")) input.addEventListener("change", draw);
  for (const input of all(".switches input")) input.addEventListener("change", changed);
  changed(); // a reloaded page keeps the reader's choice of a unit
})();
