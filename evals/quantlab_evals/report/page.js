"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const measures = Object.fromEntries(data.measures.map((measure) => [measure.name, measure]));
  const variants = data.variants;
  const state = {
    x: data.axes[0], y: data.axes[1], measuredOnly: false, frontOnly: false,
    hidden: {}, selected: null, sort: data.axes[0], descending: false,
  };
  const COLOURS = ["#3b82f6", "#f59e0b", "#10b981", "#a855f7", "#ef4444", "#06b6d4", "#84cc16", "#ec4899"];
  const SYMBOLS = { quantized: "circle", baseline: "diamond", original: "star" };
  const at = (id) => document.getElementById(id);

  // --- words ---

  function element(tag, attributes = {}, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) {
      if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
      else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.filter((child) => child !== null));
    return made;
  }
  function shown(value) {
    if (value === null || value === undefined) return "";
    const size = Math.abs(value);
    if (size !== 0 && (size < 0.001 || size >= 1e6)) return value.toExponential(1);
    const digits = size >= 1000 ? 0 : size >= 100 ? 1 : size >= 10 ? 2 : size >= 1 ? 3 : 4;
    return value.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  }
  const titled = (measure) =>
    measure.label + (measure.unit && !measure.label.includes(measure.unit) ? ` (${measure.unit})` : "");
  const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;");
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const figure = (variant, name) => variant.measures[name] ?? null;

  function method(variant) {
    const labels = variant.labels;
    const parts = [labels.quantizer ?? variant.kind];
    for (const axis of ["compensation", "transforms"]) {
      if (labels[axis] && labels[axis] !== "none") parts.push(labels[axis]);
    }
    return parts.join(" + ");
  }
  const methods = [...new Set(variants.map(method))];

  // --- which variants are shown, and which of them no other beats ---

  const passes = (variant) =>
    Object.entries(state.hidden).every(([facet, values]) => !values.has(variant.labels[facet]));
  function visible() {
    const drawn = variants.filter(
      (variant) => passes(variant) && figure(variant, state.x) !== null && figure(variant, state.y) !== null);
    return state.frontOnly ? front(drawn) : drawn;
  }
  function cost(variant, name) {
    const measure = measures[name];
    const value = figure(variant, name);
    const rounded = measure.resolution ? Math.round(value / measure.resolution) : value;
    return measure.higher_is_better ? -rounded : rounded;
  }
  function front(among) {
    const costs = among.map((variant) => [cost(variant, state.x), cost(variant, state.y)]);
    return among.filter((_, i) => !costs.some((other, j) => j !== i &&
      other[0] <= costs[i][0] && other[1] <= costs[i][1] && (other[0] < costs[i][0] || other[1] < costs[i][1])));
  }

  // --- plots ---

  function layout(rest) {
    const axis = { gridcolor: colour("--grid"), zeroline: false, linecolor: colour("--line"), automargin: true };
    return {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--ink"), family: "system-ui, -apple-system, 'Segoe UI', sans-serif", size: 13 },
      margin: { l: 56, r: 16, t: 16, b: 44 }, hovermode: "closest",
      hoverlabel: { bgcolor: colour("--card"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" },
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("--muted"), activecolor: colour("--accent") },
      legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, font: { size: 12 } },
      ...rest, xaxis: { ...axis, ...rest.xaxis }, yaxis: { ...axis, ...rest.yaxis },
    };
  }
  const narrow = () => window.innerWidth < 600;
  const config = () => ({
    responsive: true, displaylogo: false, displayModeBar: narrow() ? false : "hover",
    modeBarButtonsToRemove: ["lasso2d", "select2d", "autoScale2d"],
  });

  function axisOf(name) {
    const measure = measures[name];
    const values = variants.map((variant) => figure(variant, name)).filter((value) => value !== null);
    const logarithmic = measure.logarithmic && values.every((value) => value > 0);
    const better = measure.higher_is_better ? "higher is better" : "lower is better";
    return {
      title: { text: `${titled(measure)}<span style="font-size:11px"> · ${better}</span>`, standoff: 8 },
      type: logarithmic ? "log" : "linear",
      ...(logarithmic ? { dtick: Math.max(...values) / Math.min(...values) > 300 ? 1 : "D2" } : {}),
    };
  }
  function hover(variant) {
    const lines = data.measures.filter((measure) => figure(variant, measure.name) !== null).slice(0, 9)
      .map((measure) => `${escaped(measure.label)}: ${shown(figure(variant, measure.name))} ${escaped(measure.unit)}`);
    return `<b>${escaped(variant.name)}</b><br>${lines.join("<br>")}`;
  }
  function drawFront() {
    const drawn = visible();
    const best = front(drawn).sort((a, b) => figure(a, state.x) - figure(b, state.x));
    const members = new Set(best);
    const onLine = best.filter((variant, i) => !i || figure(best[i - 1], state.x) !== figure(variant, state.x));
    const labelled = new Set(onLine);
    const ends = drawn.map((v) => figure(v, state.x));
    const middle = (Math.min(...ends) + Math.max(...ends)) / 2;
    const side = (v) => (figure(v, state.x) > middle ? "top left" : "top right");
    const traces = [{
      name: "front", x: onLine.map((v) => figure(v, state.x)), y: onLine.map((v) => figure(v, state.y)),
      mode: "lines", line: { color: colour("--front"), width: 1.5, shape: measures[state.x].higher_is_better ? "vh" : "hv" },
      hoverinfo: "skip", showlegend: false,
    }];
    methods.forEach((name, place) => {
      const own = drawn.filter((variant) => method(variant) === name);
      if (!own.length) return;
      traces.push({
        name, x: own.map((v) => figure(v, state.x)), y: own.map((v) => figure(v, state.y)),
        mode: narrow() ? "markers" : "markers+text",
        text: own.map((v) => (labelled.has(v) ? escaped(v.name) : "")), textposition: own.map(side),
        textfont: { size: 11, color: colour("--muted") }, cliponaxis: false,
        customdata: own.map((v) => variants.indexOf(v)), hovertext: own.map(hover), hoverinfo: "text",
        marker: {
          color: COLOURS[place % COLOURS.length], symbol: own.map((v) => SYMBOLS[v.kind] ?? "circle"),
          size: own.map((v) => (v === state.selected ? 17 : members.has(v) ? 12 : 9)),
          opacity: own.map((v) => (members.has(v) || v === state.selected ? 1 : 0.55)),
          line: { width: own.map((v) => (v === state.selected ? 3 : 1)),
                  color: own.map((v) => colour(v === state.selected ? "--ink" : "--card")) },
        },
      });
    });
    Plotly.react("front", traces, layout({ xaxis: axisOf(state.x), yaxis: axisOf(state.y) }), config());
    at("count").textContent = `${drawn.length} of ${variants.length} shown, ${best.length} on the front`;
    const predicted = [state.x, state.y].filter((name) => measures[name].predicted);
    at("prediction").hidden = !predicted.length;
    at("prediction").textContent = predicted.map((name) => `${measures[name].label}: ${measures[name].how}.`).join(" ");
    return members;
  }

  // A layer's name: where it is (its block), and what it is.
  const places = data.layers.map((name) => {
    const match = name.match(/\.(\d+)\.(.*)$/) ?? name.match(/^(\d+)\.(.*)$/);
    return match ? { block: Number(match[1]), kind: match[2] } : { block: "outside", kind: name };
  });
  function matrix(values) {
    const blocks = [...new Set(places.map((place) => place.block))].sort((a, b) => (a === "outside") - (b === "outside") || a - b);
    const kinds = [...new Set(places.map((place) => place.kind))];
    const cells = kinds.map(() => blocks.map(() => null));
    places.forEach((place, i) => {
      cells[kinds.indexOf(place.kind)][blocks.indexOf(place.block)] = values[i];
    });
    return { blocks: blocks.map(String), kinds, cells };
  }
  function heat(id, values, label, logarithmic) {
    const { blocks, kinds, cells } = matrix(values);
    const z = logarithmic ? cells.map((row) => row.map((v) => (v > 0 ? Math.log10(v) : null))) : cells;
    const flat = z.flat().filter((v) => v !== null);
    const low = Math.min(...flat), high = Math.max(...flat);
    const ticks = [low, (low + high) / 2, high];
    const text = cells.map((row, k) => row.map((v, b) =>
      v === null ? "" : `block ${blocks[b]}, ${escaped(kinds[k])}<br>${label}: ${shown(v)}`));
    at(id).style.height = `${Math.max(200, 90 + 26 * kinds.length)}px`;
    Plotly.react(id, [{
      type: "heatmap", x: blocks, y: kinds, z, text, hoverinfo: "text", xgap: 1, ygap: 1, hoverongaps: false,
      colorscale: logarithmic ? "YlOrRd" : "Blues", reversescale: true,
      zmin: low === high ? low - 1 : low, zmax: low === high ? high + 1 : high,
      colorbar: {
        thickness: 10, tickvals: low === high ? [low] : ticks, outlinewidth: 0,
        ticktext: (low === high ? [low] : ticks).map((v) => shown(logarithmic ? 10 ** v : v)),
      },
    }], layout({
      margin: { l: 20, r: 8, t: 10, b: 40 },
      xaxis: { title: { text: "block", standoff: 4 }, type: "category", nticks: 20, showgrid: false },
      yaxis: { autorange: "reversed", showgrid: false, tickfont: { size: narrow() ? 10 : 12 } },
    }), { ...config(), displayModeBar: false });
  }
  const METRICS = {
    output: "Squared, relative to the output of each layer, on the calibration text.",
    weighted: "Squared, relative, of the weights, weighted by the layer's inputs.",
    weight: "Squared, relative to the weights.",
  };
  function drawLayers() {
    const variant = variants[Number(at("layered").value)];
    if (!variant) return;
    at("metric").textContent = METRICS[variant.metric] ?? "";
    heat("errors", variant.errors, "error", true);
    heat("bits", variant.bits, "bits", false);
  }
  function drawReliability() {
    const named = new Set(data.verdicts.map((verdict) => verdict.variant));
    const chosen = variants.filter((v) => v.reliability && (v.kind === "original" || v === state.selected || named.has(v.name)));
    const traces = [{ x: [0, 1], y: [0, 1], mode: "lines", line: { dash: "dot", color: colour("--front"), width: 1 },
                      hoverinfo: "skip", showlegend: false }];
    chosen.forEach((variant, place) => {
      const bins = variant.reliability.filter((bin) => bin[2]);
      traces.push({
        name: escaped(variant.name), x: bins.map((bin) => bin[0]), y: bins.map((bin) => bin[1]), mode: "lines+markers",
        line: { width: variant.kind === "original" ? 3 : 1.5, color: variant.kind === "original" ? colour("--ink") : COLOURS[place % COLOURS.length] },
        marker: { size: 6 },
        hovertext: bins.map((bin) => `<b>${escaped(variant.name)}</b><br>sure ${shown(bin[0])}, right ${shown(bin[1])}, ${bin[2]} tokens`),
        hoverinfo: "text",
      });
    });
    Plotly.react("reliability", traces, layout({
      xaxis: { title: { text: "probability of the likeliest token" }, range: [0, 1.02] },
      yaxis: { title: { text: "how often it is right" }, range: [0, 1.02] },
    }), config());
  }

  // --- the chosen variant ---

  async function copy(text, button) {
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const area = element("textarea", { style: "position:fixed;opacity:0" });
      area.value = text;
      document.body.append(area);
      area.select();
      document.execCommand("copy");
      area.remove();
    }
    const before = button.textContent;
    button.textContent = "copied";
    setTimeout(() => { button.textContent = before; }, 1500);
  }
  function figures(variant) {
    const original = variants.find((other) => other.kind === "original");
    return element("dl", { class: "figures" }, ...data.measures.filter((m) => figure(variant, m.name) !== null).map((measure) => {
      const before = original && original !== variant ? figure(original, measure.name) : null;
      return element("div", { title: measure.how },
        element("dt", {}, measure.label),
        element("dd", {}, `${shown(figure(variant, measure.name))} ${measure.unit}`),
        before === null ? null : element("span", { class: "of" }, `original ${shown(before)}`));
    }));
  }
  function drawChosen() {
    const variant = state.selected;
    const card = at("chosen");
    card.replaceChildren();
    if (!variant) return;
    const head = element("div", { class: "row" }, element("h2", {}, variant.name));
    card.append(head, figures(variant));
    for (const note of variant.notes) card.append(element("p", { class: "note" }, note));
    if (variant.recipe) {
      const pre = element("pre", { tabindex: "0", "aria-label": "recipe" }, variant.recipe);
      const button = element("button", { type: "button", class: "small", id: "copy" }, "copy the recipe");
      button.addEventListener("click", () => copy(variant.recipe, button));
      head.append(button);
      card.append(element("p", { class: "muted" }, "Save as recipe.yaml, then: ",
        element("code", {}, `quantlab quantize ${data.model} --recipe recipe.yaml --out DIR`)), pre);
    } else if (variant.kind === "baseline") {
      card.append(element("p", { class: "muted" }, "Made by another tool, to compare with."));
    }
  }
  function select(variant, { scroll = false } = {}) {
    state.selected = variant;
    drawFront(); drawChosen(); drawTable(); drawReliability();
    if (variant.errors) {
      at("layered").value = String(variants.indexOf(variant));
      drawLayers();
    }
    if (scroll) at("chosen").scrollIntoView({ behavior: "smooth", block: "nearest" });
  }

  // --- tables and controls ---

  function drawTable() {
    const members = new Set(front(variants.filter((v) => figure(v, state.x) !== null && figure(v, state.y) !== null)));
    const columns = data.measures;
    const key = (variant) => (state.sort === "name" ? variant.name : figure(variant, state.sort));
    const sorted = [...variants].sort((a, b) => {
      const [one, other] = [key(a), key(b)];
      if (one === null || other === null) return (one === null) - (other === null);
      return (one < other ? -1 : one > other ? 1 : 0) * (state.descending ? -1 : 1);
    });
    const header = (name, text, title) => {
      const up = state.sort === name;
      const sort = () => { state.descending = up && !state.descending; state.sort = name; drawTable(); };
      return element("th", { scope: "col", title, "aria-sort": up ? (state.descending ? "descending" : "ascending") : null },
        element("button", { type: "button", onclick: sort }, text + (up ? (state.descending ? " ↓" : " ↑") : "")));
    };
    at("table").replaceChildren(
      element("thead", {}, element("tr", {}, header("name", "variant", ""), ...columns.map((m) => header(m.name, titled(m), m.how)))),
      element("tbody", {}, ...sorted.map((variant) => element("tr",
        { class: [members.has(variant) ? "member" : "", variant === state.selected ? "selected" : ""].join(" "),
          onclick: () => select(variant) },
        element("td", {}, variant.name), ...columns.map((m) => element("td", {}, shown(figure(variant, m.name))))))));
  }
  function drawAxes() {
    for (const id of ["x", "y"]) {
      const groups = [["measured", false], ["predicted, not measured", true]].map(([label, predicted]) => {
        const own = data.measures.filter((m) => m.predicted === predicted && !(predicted && state.measuredOnly));
        return own.length ? element("optgroup", { label }, ...own.map((m) => element("option", { value: m.name }, titled(m)))) : null;
      });
      at(id).replaceChildren(...groups.filter((group) => group !== null));
      if (state.measuredOnly && measures[state[id]].predicted) state[id] = data.axes[id === "x" ? 0 : 1];
      at(id).value = state[id];
    }
  }
  function drawFacets() {
    const facets = [...new Set(variants.flatMap((variant) => Object.keys(variant.labels)))];
    at("facets").replaceChildren(...facets.map((facet) => {
      const values = [...new Set(variants.map((variant) => variant.labels[facet]).filter((value) => value !== undefined))];
      if (values.length < 2) return null;
      const hidden = (state.hidden[facet] ??= new Set());
      const toggle = (value) => { if (!hidden.delete(value)) hidden.add(value); drawFacets(); drawFront(); };
      return element("div", { class: "facet", "data-facet": facet }, element("span", {}, facet), ...values.map((value) =>
        element("button", { type: "button", class: "chip", "aria-pressed": String(!hidden.has(value)), "data-value": value,
                            onclick: () => toggle(value) }, value)));
    }).filter((facet) => facet !== null));
    const count = Object.values(state.hidden).reduce((sum, values) => sum + values.size, 0);
    at("filtered").textContent = count ? `· ${count} off` : "";
  }
  function drawVerdicts() {
    at("verdicts").replaceChildren(...data.verdicts.map((verdict, place) => {
      const variant = variants.find((other) => other.name === verdict.variant);
      const card = { type: "button", class: `verdict${place ? "" : " first"}`, onclick: () => select(variant, { scroll: true }) };
      return element("button", card,
        element("span", { class: "wish" }, place ? verdict.wish : `If you want one answer: ${verdict.wish[0].toLowerCase()}${verdict.wish.slice(1)}`),
        element("span", { class: "name" }, verdict.variant), element("span", { class: "why" }, verdict.why),
        verdict.alike.length ? element("span", { class: "alike" }, `not distinguishable from ${verdict.alike.join(", ")}`) : null);
    }));
  }
  function drawHow() {
    const row = (name, value) => element("tr", {}, element("td", {}, name), element("td", {}, value));
    at("measures").replaceChildren(element("tbody", {}, ...data.measures.map((m) =>
      row(titled(m), m.how + (m.predicted ? "" : m.higher_is_better ? "; higher is better" : "")))));
    at("settings").replaceChildren(element("tbody", {}, ...Object.entries(data.measurement).map(([name, value]) => row(name, value))));
    if (data.failed.length) {
      at("failed").replaceChildren(element("h3", {}, `${data.failed.length} failed`), ...data.failed.map((one) =>
        element("p", { class: "note" }, `${one.name}: ${one.error}`)));
    }
  }
  function drawEverything() {
    drawFront(); drawTable(); drawChosen();
    if (data.layers.length) drawLayers();
    if (variants.some((variant) => variant.reliability)) drawReliability();
  }

  let asked = 0;
  function drawSoon() { // once for all that changed meanwhile, when the page has its new size
    cancelAnimationFrame(asked);
    asked = requestAnimationFrame(drawEverything);
  }

  function begin() {
    at("model").textContent = data.name;
    at("subtitle").textContent = data.title + (data.measurement.text ? ` · measured on ${data.measurement.text.replace(/^\/.*\//, "")}` : "") +
      (data.measurement.windows ? `, ${data.measurement.windows} windows of ${data.measurement["window length"]} tokens` : "");
    const layered = variants.map((variant, i) => [variant, i]).filter(([variant]) => variant.errors);
    at("layered").replaceChildren(...layered.map(([variant, i]) => element("option", { value: i }, variant.name)));
    at("layers").hidden = !layered.length;
    at("calibration").hidden = !variants.some((variant) => variant.reliability);
    for (const id of ["x", "y"]) at(id).addEventListener("change", (event) => { state[id] = event.target.value; drawFront(); drawTable(); });
    at("measured").addEventListener("change", (event) => { state.measuredOnly = event.target.checked; drawAxes(); drawFront(); });
    at("frontonly").addEventListener("change", (event) => { state.frontOnly = event.target.checked; drawFront(); });
    at("layered").addEventListener("change", drawLayers);
    at("measured").closest("label").hidden = !data.measures.some((measure) => measure.predicted);
    at("theme").addEventListener("click", () => {
      const dark = document.documentElement.dataset.theme
        ? document.documentElement.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      document.documentElement.dataset.theme = dark ? "light" : "dark";
      drawEverything();
    });
    for (const query of ["(prefers-color-scheme: dark)", "(max-width: 599px)"]) {
      matchMedia(query).addEventListener("change", drawSoon);
    }
    if (data.verdicts.length) state.selected = variants.find((variant) => variant.name === data.verdicts[0].variant) ?? null;
    if (state.selected?.errors) at("layered").value = String(variants.indexOf(state.selected));
    drawVerdicts(); drawAxes(); drawFacets(); drawHow(); drawEverything();
    at("front").on("plotly_click", (event) => {
      const place = event.points[0].customdata;
      if (place !== undefined) select(variants[place]);
    });
  }
  begin();
})();
