// Draws the figures of a report page. What they show was computed before; here they get sizes, colours and a legend.
"use strict";
(() => {
  const SANS = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, "DejaVu Sans", sans-serif';
  // Okabe and Ito: blue, vermilion, bluish green, reddish purple, orange, sky blue
  const HUES = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"];
  const LIGHT = {
    ink: "#1c1c1a", muted: "#6b6b66", grid: "#e6e5df", axis: "#a8a79f", paper: "#ffffff", tint: "#f5f4f0", hues: HUES,
    scale: [[0, "#f3f6f8"], [0.5, "#b7d3e5"], [1, "#62a5cf"]],
  };
  const DARK = {
    ink: "#e9e7e1", muted: "#a5a39b", grid: "#33353a", axis: "#6d6f74", paper: "#17191c", tint: "#22252a",
    hues: ["#4FA8E0", "#E8752B", "#1FB58B", "#D98BB5", "#E69F00", "#8FD0F5"],
    scale: [[0, "#1f252b"], [0.5, "#24495f"], [1, "#2a729d"]],
  };
  const SHAPES = { // in a box from −5 to 5
    circle: "M-4,0a4,4 0 1,0 8,0a4,4 0 1,0 -8,0Z",
    square: "M-3.6,-3.6H3.6V3.6H-3.6Z",
    diamond: "M0,-5L5,0L0,5L-5,0Z",
    "triangle-up": "M0,-4.6L4.6,3.6H-4.6Z",
    "triangle-down": "M0,4.6L4.6,-3.6H-4.6Z",
    cross: "M-1.5,-4.5H1.5V-1.5H4.5V1.5H1.5V4.5H-1.5V1.5H-4.5V-1.5H-1.5Z",
    x: "M-4.2,-2.4L-2.4,-4.2L0,-1.8L2.4,-4.2L4.2,-2.4L1.8,0L4.2,2.4L2.4,4.2L0,1.8L-2.4,4.2L-4.2,2.4L-1.8,0Z",
    star: "M0,-5L1.4,-1.6L5,-1.5L2.2,0.8L3.1,4.4L0,2.3L-3.1,4.4L-2.2,0.8L-5,-1.5L-1.4,-1.6Z",
  };
  const STROKES = { solid: "", dash: "6 3", dot: "1.5 2.5", dashdot: "6 2.5 1.5 2.5", longdash: "9 3" };
  const SVG = "http://www.w3.org/2000/svg";
  const PRINT_WIDTH = 660; // CSS pixels that A4 leaves between the margins
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const figures = JSON.parse(document.getElementById("figures").textContent);
  let printing = false;

  const theme = () => (dark.matches && !printing ? DARK : LIGHT);

  function colour(name) {
    const [key, opacity] = name.slice(1).split(":");
    const hex = theme()[key] ?? theme().hues[Number(key)];
    const part = (at) => parseInt(hex.slice(at, at + 2), 16);
    return opacity === undefined ? hex : `rgba(${part(1)},${part(3)},${part(5)},${opacity})`;
  }

  function coloured(value) { // a copy in which names of colours are colours
    if (Array.isArray(value)) return value.map(coloured);
    if (value === null || typeof value !== "object") return value;
    const copy = {};
    for (const [key, held] of Object.entries(value)) {
      copy[key] = key.endsWith("color") && typeof held === "string" && held[0] === "@" ? colour(held) : coloured(held);
    }
    return copy;
  }

  const named = (axis, n) => (n ? `${axis}${n + 1}` : axis);
  const axisName = (axis, n) => `${axis}axis${n ? n + 1 : ""}`;
  const range = (n) => Array.from({ length: n }, (_, k) => k);

  function plainAxis(t) {
    return {
      gridcolor: t.grid, linecolor: t.axis, zeroline: false, automargin: true, fixedrange: true, ticks: "", color: t.ink,
      tickfont: { color: t.muted, size: 12 }, title: { font: { color: t.muted, size: 12.5 }, standoff: 10 },
    };
  }

  const plain = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;");

  function categorical(axis, names, width, most) { // most: letters of a name, more are cut; the table has them
    const short = names.map((name) => (name.length > most ? `${name.slice(0, most - 1)}…` : name));
    const longest = Math.max(...short.map((name) => name.length));
    axis.tickvals = range(names.length);
    axis.ticktext = short.map(plain);
    axis.range = [-0.5, names.length - 0.5];
    if (width && longest * 7 * names.length > width) axis.tickangle = -40;
  }

  function counted(axis, fig, n) { // whole numbers, such as rounds, get whole ticks
    const all = fig.traces.filter((trace) => trace.xaxis === named("x", n)).flatMap((trace) => trace.x);
    if (!all.every(Number.isInteger)) return;
    const span = Math.max(...all) - Math.min(...all);
    axis.tick0 = 0;
    axis.dtick = [1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000].find((step) => span / step <= axis.nticks) ?? 5000;
  }

  function flat(axis, fig, n) { // a curve that does not move, on an axis of its own size
    const all = fig.traces.filter((trace) => trace.yaxis === named("y", n)).flatMap((trace) => trace.y).filter((v) => v !== null);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    if (high - low < 1e-9 * Math.abs(high)) axis.range = [low - 0.1 * Math.abs(low), high + 0.1 * Math.abs(high)];
  }

  function logarithmic(axis, fig, n, width) { // round numbers, as many as there is room for
    const all = fig.traces.filter((trace) => trace.xaxis === named("x", n)).flatMap((trace) => trace.x).filter((v) => v > 0);
    const [low, high] = [Math.min(...all), Math.max(...all)];
    const decades = range(12).map((k) => 10 ** (k - 5));
    const steps = [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7], [1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 4, 5, 6, 7, 8, 9]];
    const inside = (list) => decades.flatMap((d) => list.map((s) => s * d)).filter((v) => v >= low * 0.9 && v <= high * 1.1);
    const fitting = steps.map(inside).filter((list) => list.length <= width / 48);
    axis.type = "log";
    axis.tickvals = fitting.at(-1) ?? [low, high];
    axis.ticktext = axis.tickvals.map((v) => String(Number(v.toPrecision(2))));
    axis.ticks = "outside";
    axis.ticklen = 4;
    axis.tickcolor = theme().axis;
  }

  function aroundZero(axis, fig) { // all bars and the zero that they are held against, with some air
    const ends = fig.traces.flatMap((trace) => trace.x.flatMap((v, k) => [
      v - (trace.error_x?.arrayminus[k] ?? 0), v + (trace.error_x?.array[k] ?? 0),
    ]));
    const [low, high] = [Math.min(0, ...ends), Math.max(0, ...ends)];
    const air = 0.05 * (high - low || 1);
    axis.range = [low - air, high + air];
  }

  function layoutOf(fig, width) {
    const t = theme();
    const count = fig.panels.length;
    const rows = fig.kind === "rows";
    const heat = fig.kind === "heat";
    const letters = width < 520 ? 18 : 34;
    const columns = count === 1 ? 1 : Math.min(count, width >= 860 && count !== 4 && count > 2 ? 3 : width >= 520 ? 2 : 1);
    const lines = Math.ceil(count / columns);
    const titled = count > 1;
    const margin = { l: 48, r: 14, t: titled ? 46 : heat || rows ? 8 : 30, b: 52 };
    const gapX = 58;
    const gapY = 112;
    let each = titled ? 200 : 320;
    if (rows) each = 26 * fig.panels[0].categories.length + 14;
    if (heat) each = Math.max(34 * fig.lines[fig.chosen].length, 110);
    if (width < 520 && !rows && !heat && !titled) each = 260;
    const inner = { w: width - margin.l - margin.r, h: lines * each + (lines - 1) * gapY };
    const cell = (inner.w - (columns - 1) * gapX) / columns;
    const layout = {
      width, height: inner.h + margin.t + margin.b, margin, showlegend: false, dragmode: false, hovermode: "closest",
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { family: SANS, size: 12.5, color: t.ink },
      hoverlabel: { bgcolor: t.paper, bordercolor: t.axis, font: { family: SANS, size: 12.5, color: t.ink }, align: "left" },
      annotations: [], shapes: [],
    };
    fig.panels.forEach((panel, n) => {
      const column = n % columns;
      const line = Math.floor(n / columns);
      const left = (column * (cell + gapX)) / inner.w;
      const top = 1 - (line * (each + gapY)) / inner.h;
      const x = { ...plainAxis(t), domain: [left, left + cell / inner.w], anchor: named("y", n) };
      const y = { ...plainAxis(t), domain: [Math.max(0, top - each / inner.h), top], anchor: named("x", n) };
      x.title = { ...x.title, text: plain(panel.x) };
      x.nticks = Math.max(3, Math.floor(cell / 70));
      y.nticks = 6;
      if (rows) {
        x.showgrid = true;
        if (fig.zero) aroundZero(x, fig);
        categorical(y, panel.categories, 0, letters);
        y.range = [panel.categories.length - 0.5, -0.5];
        y.tickfont = { color: t.ink, size: 12.5 };
        y.griddash = "dot";
      } else if (heat) {
        categorical(x, fig.columns[fig.chosen], cell - 60, letters);
        categorical(y, fig.lines[fig.chosen], 0, letters);
        y.range = [fig.lines[fig.chosen].length - 0.5, -0.5];
        x.showgrid = y.showgrid = false;
        x.side = "bottom";
        if (fig.columns[fig.chosen].length > 14) x.tickvals = x.tickvals.filter((k) => k % 2 === 0);
        x.ticktext = x.tickvals.map((k) => plain(fig.columns[fig.chosen][k]));
      } else {
        x.showgrid = false;
        x.showline = true;
        if (panel.categories) categorical(x, panel.categories, cell, letters);
        else if (panel.log) logarithmic(x, fig, n, cell);
        else counted(x, fig, n);
        if (fig.shared && n) y.matches = "y";
        if (!fig.shared) flat(y, fig, n);
        const head = titled ? `<b>${plain(panel.title)}</b><br>${plain(panel.y)}` : plain(panel.y);
        layout.annotations.push({
          text: head, showarrow: false, xref: "paper", yref: "paper", x: left, y: top, xanchor: "left", yanchor: "bottom",
          yshift: 7, xshift: titled ? 0 : -30, align: "left", font: { size: 12.5, color: titled ? t.ink : t.muted },
        });
      }
      if (panel.apart) {
        layout.shapes.push({
          type: "rect", xref: `${named("x", n)} domain`, yref: `${named("y", n)} domain`, x0: 0, x1: 1, y0: 0, y1: 1,
          layer: "below", fillcolor: t.tint, line: { width: 0 },
        });
      }
      const rules = fig.zero ? [0] : fig.starts;
      for (const at of rules) {
        layout.shapes.push({
          type: "line", xref: named("x", n), yref: `${named("y", n)} domain`, x0: at, x1: at, y0: 0, y1: 1, layer: "below",
          line: { color: fig.zero ? t.ink : t.axis, width: 1, dash: fig.zero ? "solid" : "dot" },
        });
      }
      layout[axisName("x", n)] = x;
      layout[axisName("y", n)] = y;
    });
    return layout;
  }

  function dataOf(fig, width) {
    if (fig.kind !== "heat") {
      const shown = (trace) => printing || !fig.hidden.has(trace.legendgroup);
      return fig.traces.map((trace) => ({ ...coloured(trace), visible: shown(trace) }));
    }
    const trace = { ...fig.choices[fig.chosen].trace, colorscale: theme().scale, showscale: false };
    if (!roomy(fig, width)) { // a scale in the place of numbers
      const height = 34 * trace.y.length;
      Object.assign(trace, {
        showscale: true,
        colorbar: {
          thickness: 9, outlinewidth: 0, orientation: "h", y: -62 / Math.max(height, 110), yanchor: "top", len: 0.75,
          tickfont: { size: 11, color: theme().muted }, title: { text: fig.unit, side: "bottom", font: { size: 11.5, color: theme().muted } },
        },
      });
    }
    return [trace];
  }

  // Whether a heat map's cells have room for their numbers.
  const roomy = (fig, width) => (width - 150) / fig.choices[fig.chosen].trace.x.length >= 30;

  function cellTexts(fig) { // the numbers in a heat map's cells
    const { z, text } = fig.choices[fig.chosen].trace;
    return z.flatMap((line, y) => line.flatMap((value, x) => (value === null ? [] : [{
      text: text[y][x], x, y, showarrow: false, font: { size: 12.5, color: theme().ink },
    }])));
  }

  function draw(fig) {
    const width = printing ? PRINT_WIDTH : Math.max(260, Math.floor(fig.node.clientWidth));
    const layout = layoutOf(fig, width);
    if (fig.kind === "heat" && roomy(fig, width)) layout.annotations = cellTexts(fig);
    if (fig.kind === "heat" && !roomy(fig, width)) {
      layout.margin = { ...layout.margin, b: layout.margin.b + 62 };
      layout.height += 62;
    }
    fig.node.style.minHeight = `${layout.height}px`;
    Plotly.react(fig.node, dataOf(fig, width), layout, { displayModeBar: false, responsive: false, scrollZoom: false, doubleClick: false });
    fig.width = width;
  }

  function element(tag, attributes, text) {
    const node = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    return node;
  }

  function swatch(entry) {
    const svg = document.createElementNS(SVG, "svg");
    svg.setAttribute("viewBox", "-14 -6 28 12");
    svg.setAttribute("width", "28");
    svg.setAttribute("height", "12");
    svg.setAttribute("aria-hidden", "true");
    const hue = colour(entry.colour);
    if (entry.mode === "lines") {
      const line = document.createElementNS(SVG, "line");
      for (const [key, value] of Object.entries({ x1: -14, x2: 14, y1: 0, y2: 0, stroke: hue, "stroke-width": 2 })) {
        line.setAttribute(key, value);
      }
      line.setAttribute("stroke-dasharray", STROKES[entry.dash]);
      svg.append(line);
    }
    const mark = document.createElementNS(SVG, "path");
    mark.setAttribute("d", SHAPES[entry.symbol]);
    mark.setAttribute("fill", entry.hollow ? "none" : hue);
    mark.setAttribute("stroke", hue);
    mark.setAttribute("stroke-width", entry.hollow ? 1.6 : 0);
    svg.append(mark);
    return svg;
  }

  function show(fig, hidden) {
    fig.hidden = hidden;
    fig.buttons.forEach((button, n) => button.setAttribute("aria-pressed", String(!hidden.has(fig.legend[n].name))));
    draw(fig);
  }

  function legend(fig) {
    if (fig.legend.length < 2) return;
    const box = element("div", { class: "legend", role: "group", "aria-label": "Shown in the figure" });
    fig.buttons = fig.legend.map((entry) => {
      const button = element("button", { type: "button", "aria-pressed": "true" });
      button.append(swatch(entry), element("span", {}, entry.name));
      button.title = "Click to hide or show; double-click to see it alone";
      button.addEventListener("click", () => {
        const hidden = new Set(fig.hidden);
        if (!hidden.delete(entry.name)) hidden.add(entry.name);
        show(fig, hidden);
      });
      button.addEventListener("dblclick", () => {
        const others = fig.legend.map((one) => one.name).filter((name) => name !== entry.name);
        const alone = others.every((name) => fig.hidden.has(name)); // the two clicks before it undid each other
        show(fig, new Set(alone ? [] : others));
      });
      box.append(button);
      return button;
    });
    fig.node.before(box);
  }

  function chooser(fig) {
    if (fig.kind !== "heat" || fig.choices.length < 2) return;
    const label = element("label", { class: "choice" }, "Shown ");
    const select = element("select", {});
    fig.choices.forEach((choice, n) => select.append(element("option", { value: String(n) }, choice.name)));
    select.addEventListener("change", () => {
      fig.chosen = Number(select.value);
      fig.node.setAttribute("aria-label", fig.choices[fig.chosen].finding);
      document.getElementById(`${fig.id}-finding`).textContent = fig.choices[fig.chosen].finding;
      draw(fig);
    });
    label.append(select);
    fig.node.before(label);
  }

  function recolour() {
    for (const fig of figures) {
      fig.buttons.forEach((button, n) => button.firstChild.replaceWith(swatch(fig.legend[n])));
      draw(fig);
    }
  }

  for (const fig of figures) {
    Object.assign(fig, { node: document.getElementById(`${fig.id}-plot`), hidden: new Set(), chosen: 0, buttons: [] });
    legend(fig);
    chooser(fig);
    draw(fig);
  }
  document.documentElement.dataset.drawn = String(figures.length);

  let waiting = 0;
  window.addEventListener("resize", () => {
    cancelAnimationFrame(waiting);
    waiting = requestAnimationFrame(() => figures.filter((fig) => fig.node.clientWidth !== fig.width).forEach(draw));
  });
  dark.addEventListener("change", recolour);

  let closed = [];
  window.addEventListener("beforeprint", () => { // everything on paper: all series, all numbers, on white
    printing = true;
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
    recolour();
  });
  window.addEventListener("afterprint", () => {
    printing = false;
    for (const one of closed) one.open = false;
    recolour();
  });
})();
