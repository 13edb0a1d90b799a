// The player of llmbook's figures and dashboards: redraws a swept state when a control moves. Needs window.Plotly for figures.
window.llmbook = window.llmbook || (() => {
  const drawn = [];   // functions that redraw, for a change between light and dark

  const isDark = el => {
    const m = getComputedStyle(el).color.match(/[\d.]+/g).map(Number);
    return (m[0] * 299 + m[1] * 587 + m[2] * 114) / 1000 > 140;   // light text: a dark page
  };

  const themed = (layout, el) => {
    const dark = isDark(el), ink = dark ? "#dee2e6" : "#212529", grid = dark ? "#495057" : "#dee2e6";
    const axis = {gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true};
    const narrow = el.clientWidth < 520;
    const template = {layout: {title: {font: {size: narrow ? 13 : 16}},
      font: {color: ink, family: "system-ui, sans-serif", size: 13}, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      colorway: ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#f0e442"],
      margin: {l: 56, r: 16, t: 48, b: 48}, xaxis: axis, yaxis: axis, legend: {orientation: "h", x: 0, y: -64 / Math.max(80, (layout.height || 450) - (narrow ? 210 : 150)), yanchor: "top"},
      hoverlabel: {font: {family: "system-ui, sans-serif"}}}};
    return {...layout, template, autosize: true, width: undefined};
  };

  const draw = (el, data, layout) => {
    const go = () => window.Plotly.react(el, structuredClone(data), themed(structuredClone(layout), el), {responsive: true, displaylogo: false, displayModeBar: false})
      .then(() => { el.dataset.drawn = Number(el.dataset.drawn || 0) + 1; });
    if (window.Plotly) return go();
    let tries = 0;
    const wait = setInterval(() => {
      if (window.Plotly) { clearInterval(wait); go(); }
      else if (++tries > 100) { clearInterval(wait); el.textContent = "To see this figure, run the cell or open the page on the book's site."; }
    }, 100);
  };

  const json = root => JSON.parse(root.querySelector('script[type="application/json"]').textContent);

  const mountFigure = root => {
    if (root.dataset.mounted) return;
    root.dataset.mounted = "yes";
    const {data, layout} = json(root), el = root.querySelector(".llmbook-plot");
    const redraw = () => draw(el, data, layout);
    drawn.push(redraw);
    redraw();
  };

  const mountDashboard = root => {
    if (root.dataset.mounted) return;
    root.dataset.mounted = "yes";
    const {pool, states} = json(root), parts = root.querySelector(".llmbook-parts");
    const controls = [...root.querySelectorAll("[data-control]")];
    const index = c => c.type === "checkbox" ? Number(c.checked) : c.tagName === "SELECT" ? c.selectedIndex : Number(c.value);
    const count = c => c.type === "checkbox" ? 2 : c.tagName === "SELECT" ? c.options.length : Number(c.max) + 1;
    const redraw = () => {
      let state = 0;
      for (const c of controls) {
        state = state * count(c) + index(c);
        const out = c.parentElement.querySelector("output");
        if (out) { const text = JSON.parse(c.dataset.names)[index(c)]; out.textContent = text; c.setAttribute("aria-valuetext", text); }
      }
      states[state].forEach((part, i) => {
        let el = parts.children[i];
        if (!el || el.dataset.kind !== part[0]) {
          const fresh = document.createElement("div");
          fresh.dataset.kind = part[0];
          if (part[0] === "f") fresh.className = "llmbook-plot";
          el ? el.replaceWith(fresh) : parts.append(fresh);
          el = fresh;
        }
        if (part[0] === "f") draw(el, part[1].map(k => pool[k]), pool[part[2]]);
        else el.innerHTML = pool[part[1]];
      });
      while (parts.children.length > states[state].length) parts.lastChild.remove();
      root.dataset.state = state;
    };
    controls.forEach(c => c.addEventListener("input", redraw));
    root.querySelectorAll("[data-play]").forEach(button => {
      const c = controls.find(c => c.dataset.control === button.dataset.play);
      let timer = 0;
      const stop = () => { clearInterval(timer); timer = 0; button.textContent = "▶"; };
      const next = () => {
        c.value = Number(c.value) + 1;
        redraw();
        if (c.value === c.max) stop();
      };
      button.addEventListener("click", () => {
        if (timer) return stop();
        if (c.value === c.max) { c.value = 0; redraw(); }
        button.textContent = "❚❚";
        timer = setInterval(next, 400);
      });
      c.addEventListener("input", stop);   // whoever takes the slider in hand has it
    });
    root.querySelector("form").addEventListener("submit", e => e.preventDefault());
    drawn.push(redraw);
    redraw();
  };

  const mountAll = () => {
    document.querySelectorAll(".llmbook-figure").forEach(mountFigure);
    document.querySelectorAll(".llmbook-dashboard").forEach(mountDashboard);
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  new MutationObserver(() => drawn.forEach(f => f())).observe(document.documentElement, {attributes: true, attributeFilter: ["class", "data-bs-theme", "data-jp-theme-light"]});
  return {mountAll};
})();
window.llmbook.mountAll();
