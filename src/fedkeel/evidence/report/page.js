// Puts the figures into the page and keeps them as its reader wants them: light or dark, narrow or wide, hidden or chosen.
"use strict";
(async () => {
  const PAPER = [660, 320]; // CSS pixels that A4 leaves between the margins, for one panel and for one of two side by side
  const dark = matchMedia("(prefers-color-scheme: dark)"), narrow = matchMedia("(max-width: 34rem)");
  const options = { ast: true, renderer: "svg", actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true } };
  const all = (what, node = document) => [...node.querySelectorAll(what)];
  const off = (control) => control.getAttribute("aria-pressed") === "false";
  let printing = false, folded = [];

  const figures = await Promise.all(JSON.parse(document.getElementById("figures").textContent).map(async (held) => {
    const node = document.getElementById(held.id), panels = all(".panel", node);
    const made = await Promise.all(panels.map((panel, n) => vegaEmbed(panel, held.specs[n], options)));
    return { node, names: held.names, views: made.map((one) => one.view), controls: all(".legend button, option", node) };
  }));

  function show({ names, views, controls }) { // on paper all series are there, but of grids the chosen one
    const gone = (control) => ("selected" in control ? !control.selected : off(control) && !printing);
    for (const view of views) {
      if (printing) view.width(PAPER[Number(views.length > 1)]);
      view.signal("dark", dark.matches && !printing).signal("narrow", narrow.matches && !printing);
      view.signal("hidden", names.filter((_, n) => gone(controls[n]))).run();
    }
  }

  for (const figure of figures) {
    const { node, controls } = figure;
    const press = (shown) => { // shown: says of each button whether its series is
      controls.forEach((one, n) => one.setAttribute("aria-pressed", String(shown(one, n))));
      show(figure);
    };
    for (const button of all(".legend button", node)) {
      button.addEventListener("click", () => press((one) => (one === button ? off(one) : !off(one))));
      button.addEventListener("dblclick", () => { // the two clicks before it undid each other
        const alone = controls.every((one) => one === button || off(one));
        press((one) => alone || one === button);
      });
    }
    node.querySelector("select")?.addEventListener("change", (event) => {
      node.querySelector(".finding").textContent = event.target.value;
      node.querySelector(".plot").setAttribute("aria-label", event.target.value);
      show(figure);
    });
    for (const one of all(".legend, .choice", node)) one.hidden = false;
    show(figure);
  }

  function turn(onPaper) { // on paper everything is unfolded, and on white
    printing = onPaper;
    if (onPaper) folded = all("details:not([open])");
    for (const one of folded) one.open = onPaper;
    figures.forEach(show);
    if (!onPaper) window.dispatchEvent(new Event("resize")); // at which Vega fits each figure into its place again
  }
  for (const query of [dark, narrow]) query.addEventListener("change", () => figures.forEach(show));
  for (const when of ["beforeprint", "afterprint"]) window.addEventListener(when, () => turn(when === "beforeprint"));
  document.documentElement.dataset.drawn = String(figures.length);
})();
