"use strict";
(() => {
  const about = JSON.parse(document.getElementById("about").textContent);
  const at = (id) => document.getElementById(id);
  const units = new Map(about.units.map((unit) => [unit.name, unit]));
  const canvas = at("canvas"), slider = at("scale"), chosenClass = at("class");
  const SVG = "http://www.w3.org/2000/svg";

  // file: what was dropped; looks: the answers by scale, for the tables that compare them; unit: the one that is drawn.
  const state = { file: null, look: null, looks: new Map(), picture: null, unit: null, busy: false, again: false };

  // --- words ----------------------------------------------------------------------------------------------------

  const percent = (share) => {
    const value = 100 * share;
    if (share > 0 && value < 0.05) return "< 0.1 %";
    if (share < 1 && value >= 99.95) return "> 99.9 %";
    return `${value.toFixed(1)} %`;
  };
  const number = (value) => value.toFixed(3).replace("-", "−");
  const signed = (value) => (value > 0 ? "+" : "") + number(value);
  const times = (scale) => `${Number(scale).toFixed(1)}×`;

  function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    made.append(...children);
    return made;
  }

  function drawn(name, attributes, text) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function complain(sentence) {
    at("problem").textContent = sentence;
    at("problem").hidden = !sentence;
  }

  // --- asking ---------------------------------------------------------------------------------------------------

  async function asked(scale) {
    const query = new URLSearchParams({ scale });
    if (chosenClass.value) query.set("target", chosenClass.value);
    let response;
    try {
      response = await fetch(`look?${query}`, { method: "POST", body: state.file });
    } catch {
      throw new Error("The studio does not answer: has it been ended in the terminal, or the file changed since?");
    }
    const answer = await response.json();
    if (!response.ok) throw new Error(answer.error);
    return answer;
  }

  // One question at a time: while the slider moves, those in between are left out.
  async function ask() {
    if (!state.file) return;
    if (state.busy) {
      state.again = true;
      return;
    }
    state.busy = true;
    document.documentElement.dataset.state = "busy";
    const file = state.file, scale = Number(slider.value);
    try {
      if (!state.looks.has(1) && scale !== 1) state.looks.set(1, await asked(1));
      const look = await asked(scale);
      const picture = new Image();
      picture.src = look.seen;
      await picture.decode();
      if (file === state.file) {
        state.looks.set(scale, look);
        Object.assign(state, { look, picture });
        complain("");
        show();
      }
    } catch (problem) {
      if (file === state.file) complain(problem.message);
    } finally {
      state.busy = false;
      if (state.again) {
        state.again = false;
        ask();
      } else {
        document.documentElement.dataset.state = "done";
      }
    }
  }

  function take(file) {
    if (!file) {
      complain("That was no file: save the picture first, or copy and paste it.");
    } else if (file.size > about.max_bytes) {
      complain(`${file.name} has ${(file.size / 1e6).toFixed(1)} MB, more than the ${about.max_bytes / 1e6} MB that are taken: shrink it.`);
    } else {
      state.file = file;
      state.looks.clear();
      ask();
    }
  }

  // --- showing --------------------------------------------------------------------------------------------------

  function show() {
    const { look } = state;
    for (const control of [slider, chosenClass, at("layers")]) control.disabled = false;
    for (const id of ["excitation", "selection", "field"]) {
      if (at(id)) at(id).hidden = false;
    }
    showPicture();
    showPredictions(look);
    if (look.excitation.length) showUnits(look);
    if (look.selection.length) showKernels(look);
    showField(look);
  }

  function showPicture() {
    const { look, picture } = state;
    const layer = document.querySelector("input[name=layer]:checked").value;
    const enlarged = Math.max(1, Math.round(512 / picture.width)); // small images: sharp pixels under a smooth layer
    canvas.width = picture.width * enlarged;
    canvas.height = picture.height * enlarged;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    pen.drawImage(picture, 0, 0, canvas.width, canvas.height);
    canvas.hidden = false;
    at("drop").classList.add("filled");
    const said = at("layer-said");
    said.textContent = "This is what the network is given: cropped and resized as in its training.";
    let values = null;
    if (layer === "activation") {
      values = look.activation.map;
      said.textContent = `Bright places speak for ${look.class} (Grad-CAM at ${look.activation.layer}).`;
    } else if (layer === "field" && look.receptive_field) {
      // The root: the gradient falls off quickly, and its rim would not be seen.
      values = look.receptive_field.field.map((row) => row.map(Math.sqrt));
      said.textContent = `The brighter a pixel, the more it moves the centre of ${look.receptive_field.unit} (root of its gradient).`;
    }
    canvas.setAttribute("aria-label", `The image as the network sees it. ${layer === "none" ? "" : said.textContent}`);
    if (!values) return;
    pen.imageSmoothingEnabled = true;
    pen.imageSmoothingQuality = "high";
    pen.drawImage(heated(values, (value) => 90 + 130 * value), 0, 0, canvas.width, canvas.height);
  }

  // Rows of values in 0 … 1 as colours, as opaque (0 … 255) as their value has it.
  function heated(values, opacity) {
    const rows = values.length, columns = values[0].length;
    const made = element("canvas", { width: columns, height: rows });
    const pixels = new ImageData(columns, rows);
    values.flat().forEach((value, i) => {
      const colour = about.heat[Math.round(value * (about.heat.length - 1))];
      pixels.data.set([...colour, opacity(value)], 4 * i);
    });
    made.getContext("2d").putImageData(pixels, 0, 0);
    return made;
  }

  function showPredictions(look) {
    const [first, second] = look.predictions;
    let sentence = `Most likely ${first.class}, ${percent(first.probability)}`;
    sentence += second ? `; then ${second.class}, ${percent(second.probability)}.` : ".";
    const before = state.looks.get(1);
    if (before && before.predictions[0].index !== first.index) sentence += ` At 1.0× it was ${before.predictions[0].class}.`;
    at("sentence").textContent = sentence;
    const rows = [...look.predictions];
    if (!rows.some((row) => row.index === look.target)) {
      rows.push({ class: look.class, index: look.target, probability: look.probability });
    }
    at("predictions").replaceChildren(...rows.map((row) => {
      const bar = element("i");
      bar.style.width = `${100 * row.probability}%`;
      const button = element("button", { type: "button", "aria-pressed": String(row.index === look.target), "data-class": row.index },
        element("span", { class: "name" }, row.class), element("span", { class: "value" }, percent(row.probability)),
        element("span", { class: "trough", "aria-hidden": "true" }, bar));
      button.addEventListener("click", () => { chosenClass.value = String(row.index); ask(); });
      return element("li", {}, button);
    }));
    at("how-predictions").hidden = false;
  }

  // --- excitation

  const push = (unit) => unit.gates.reduce((sum, gate, i) => sum + Math.abs(gate - unit.reference[i]), 0) / unit.gates.length;

  function showUnits(look) {
    const shown = look.excitation.find((unit) => unit.unit === state.unit) || look.excitation.at(-1);
    state.unit = shown.unit;
    const most = Math.max(...look.excitation.map(push), 1e-9);
    const old = document.activeElement?.dataset?.unit;
    at("se-units").replaceChildren(...look.excitation.map((unit) => {
      const bar = element("i");
      bar.style.width = `${100 * push(unit) / most}%`;
      const button = element("button", { type: "button", "aria-pressed": String(unit === shown), "data-unit": unit.unit,
        title: `Mean distance of its gates from what they are held against: ${number(push(unit))}` },
        element("span", { class: "spec" }, unit.unit), element("span", { class: "trough", "aria-hidden": "true" }, bar));
      button.addEventListener("click", () => { state.unit = unit.unit; showUnits(state.look); });
      return element("li", {}, button);
    }));
    if (old) [...at("se-units").querySelectorAll("button")].find((button) => button.dataset.unit === old)?.focus();
    const against = shown.against === "class" ? `the mean over all images of ${look.class}` : "the unit’s own mean over its channels";
    at("how-excitation").textContent = "The line is what a channel’s gate is held against, the point the gate for this image: " +
      "above the line it was pushed up, below it down. The bars under the units say how much they depart from it.";
    at("se-caption").textContent = `Gates of ${shown.unit} against ${against}`;
    drawGates(shown);
    for (const side of ["up", "down"]) {
      const rows = shown[side].map(({ channel, gate, reference }) => element("tr", {}, element("th", { scope: "row" }, String(channel)),
        ...[number(gate), number(reference), signed(gate - reference)].map((text) => element("td", { class: "number" }, text))));
      at(side).replaceChildren(...(rows.length ? rows : [element("tr", {}, element("td", { colspan: "4" }, "none"))]));
    }
  }

  function drawGates(unit) {
    const svg = at("gates"), count = unit.gates.length;
    const width = svg.clientWidth || 900, height = svg.clientHeight || 280;
    const left = 40, right = 12, top = 12, bottom = 34;
    const [low, high] = unit.range;
    const x = (channel) => left + ((channel + 0.5) / count) * (width - left - right);
    const y = (gate) => top + ((high - gate) / (high - low)) * (height - top - bottom);
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    const parts = [];
    for (let k = 0; k <= 4; k++) {
      const value = low + (k / 4) * (high - low);
      parts.push(drawn("line", { class: "grid", x1: left, x2: width - right, y1: y(value), y2: y(value) }));
      parts.push(drawn("text", { class: "tick", x: left - 8, y: y(value) + 4, "text-anchor": "end" }, String(value).replace("-", "−")));
    }
    const steps = [1, 2, 5, 10, 20, 50, 100, 200, 500, 1000];
    const step = steps.find((one) => count / one <= width / 70) || 2000;
    for (let channel = 0; channel < count; channel += step) {
      parts.push(drawn("text", { class: "tick", x: x(channel), y: height - bottom + 16, "text-anchor": "middle" }, channel));
    }
    parts.push(drawn("text", { class: "tick", x: left + (width - left - right) / 2, y: height - 2, "text-anchor": "middle" }, "channel"));
    const room = (width - left - right) / count;
    const thick = Math.max(1, Math.min(6, 0.35 * room)), radius = Math.max(1.4, Math.min(4.5, 0.3 * room));
    unit.gates.forEach((gate, i) => {
      const side = gate >= unit.reference[i] ? "up" : "down";
      parts.push(drawn("line", { class: `stem ${side}`, x1: x(i), x2: x(i), y1: y(unit.reference[i]), y2: y(gate), "stroke-width": thick }));
      parts.push(drawn("circle", { class: `stem ${side}`, cx: x(i), cy: y(gate), r: radius }));
    });
    const line = unit.reference.map((gate, i) => `${x(i).toFixed(1)},${y(gate).toFixed(1)}`).join(" ");
    parts.push(drawn("polyline", { class: "reference", points: line }));
    const cursor = drawn("line", { class: "cursor", y1: top, y2: height - bottom, x1: -9, x2: -9 });
    svg.replaceChildren(...parts, cursor);
    at("se-hover").textContent = "\u00a0";
    svg.onpointermove = (event) => {
      const box = svg.getBoundingClientRect();
      const across = ((event.clientX - box.left) / box.width) * width;
      const channel = Math.min(count - 1, Math.max(0, Math.floor(((across - left) / (width - left - right)) * count)));
      cursor.setAttribute("x1", x(channel));
      cursor.setAttribute("x2", x(channel));
      const gate = unit.gates[channel], reference = unit.reference[channel];
      at("se-hover").textContent = `Channel ${channel} of ${unit.unit}: gate ${number(gate)}, held against ${number(reference)} (${signed(gate - reference)})`;
    };
  }

  // --- selection

  const difference = (unit) => {
    const [small, large] = units.get(unit.unit).branches;
    return unit.attention[large] - unit.attention[small];
  };

  function showKernels(look) {
    const before = new Map((state.looks.get(1)?.selection || []).map((unit) => [unit.unit, unit]));
    const most = look.selection.reduce((a, b) => (b.kernels.length > a.kernels.length ? b : a)).kernels;
    at("kernel-names").replaceChildren(...most.map((name, i) => element("li", {}, element("i", { class: `kernel-${i % 6}` }), name)));
    at("kernel-rows").replaceChildren(...look.selection.map((unit) => {
      const then = before.get(unit.unit);
      const bar = element("div", { class: "stack" });
      unit.chosen.forEach((share, i) => {
        const part = element("i", { class: `kernel-${i % 6}`, title: `${unit.kernels[i]}: ${percent(share)} of the channels, mean attention ${number(unit.attention[i])}` });
        part.style.width = `${100 * share}%`;
        bar.append(part);
      });
      let sum = 0;
      for (const share of then ? then.chosen.slice(0, -1) : []) {
        sum += share;
        const mark = element("b", { "aria-hidden": "true" });
        mark.style.left = `${100 * sum}%`;
        bar.append(mark);
      }
      const said = unit.chosen.map((share, i) => `${unit.kernels[i]}: ${percent(share)}`).join(" · ");
      return element("tr", { "data-unit": unit.unit }, element("th", { scope: "row" }, unit.unit),
        element("td", {}, bar, element("small", {}, said)),
        element("td", { class: "number" }, signed(difference(unit))),
        element("td", { class: "number" }, then ? signed(difference(then)) : "–"));
    }));
  }

  // --- receptive field

  function showField(look) {
    at("field-said").textContent = `How much each pixel moves the centre of the last unit’s map, ${look.receptive_field.unit}: ` +
      "the root of its gradient. The numbers are the sides of the smallest squares that hold half and nine tenths of the gradient.";
    const scales = [...new Set([1, look.scale])].filter((scale) => state.looks.has(scale));
    at("fields").replaceChildren(...scales.map((scale) => {
      const { field, sides } = state.looks.get(scale).receptive_field;
      const said = `${sides["0.5"]} × ${sides["0.5"]} px hold 50 %, ${sides["0.9"]} × ${sides["0.9"]} px hold 90 %`;
      const shown = heated(field.map((row) => row.map(Math.sqrt)), () => 255);
      shown.setAttribute("role", "img");
      shown.setAttribute("aria-label", `Receptive field at ${times(scale)}`);
      return element("figure", { "data-scale": scale }, shown, element("figcaption", {}, element("b", {}, times(scale)), ` ${said}`));
    }));
  }

  // --- what the reader does ---------------------------------------------------------------------------------------

  const drop = at("drop");
  at("file").addEventListener("change", (event) => {
    if (event.target.files.length) take(event.target.files[0]);
    event.target.value = ""; // the same file may be chosen again
  });
  // Anywhere on the page: a picture that misses the frame would else replace the page.
  addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  addEventListener("drop", (event) => {
    event.preventDefault();
    drop.classList.remove("over");
    take(event.dataTransfer.files[0]);
  });
  addEventListener("paste", (event) => {
    if (event.clipboardData.files.length) take(event.clipboardData.files[0]);
  });
  slider.addEventListener("input", () => {
    at("scale-said").textContent = times(slider.value);
    ask();
  });
  chosenClass.addEventListener("change", ask);
  for (const radio of document.querySelectorAll("input[name=layer]")) radio.addEventListener("change", showPicture);

  const tabs = [...document.querySelectorAll("[role=tab]")];
  for (const tab of tabs) {
    tab.addEventListener("click", () => {
      for (const other of tabs) {
        other.setAttribute("aria-selected", String(other === tab));
        at(other.getAttribute("aria-controls")).hidden = other !== tab;
      }
      const report = at("report");
      if (report && !report.src && tab.id === "tab-all") report.src = report.dataset.src;
      else if (tab.id === "tab-one" && state.look) show(); // what is hidden has no width to be drawn for
    });
  }

  let width = innerWidth;
  addEventListener("resize", () => {
    if (innerWidth !== width && state.look?.excitation.length) showUnits(state.look);
    width = innerWidth;
  });
  slider.value = "1";
  chosenClass.value = "";
  document.querySelector("input[name=layer][value=none]").checked = true;
})();
