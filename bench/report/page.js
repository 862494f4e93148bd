"use strict";
(() => {
  const board = document.getElementById("board");
  const body = board.tBodies[0];
  const rows = [...body.rows];
  const form = document.getElementById("filters");
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const drawn = new Map();

  // sorting: a number that is missing stays last either way
  for (const head of board.tHead.rows[0].cells) {
    head.querySelector("button").addEventListener("click", () => {
      const number = head.dataset.type === "number";
      const key = head.dataset.key;
      const first = number && key !== "n" ? "descending" : "ascending";
      const other = first === "ascending" ? "descending" : "ascending";
      const order = head.ariaSort === first ? other : first;
      for (const cell of board.tHead.rows[0].cells) cell.ariaSort = cell === head ? order : "none";
      const sign = order === "ascending" ? 1 : -1;
      rows.sort((a, b) => {
        const [x, y] = [a.dataset[key], b.dataset[key]];
        if (x === "" || y === "") return (x === "") - (y === "");
        return sign * (number ? x - y : x.localeCompare(y));
      });
      body.append(...rows);
    });
  }

  const filter = () => {
    const asked = Object.fromEntries(new FormData(form));
    const part = asked.label.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const fits = ["dataset", "protocol", "kind", "verdict"].every((name) => !asked[name] || row.dataset[name] === asked[name]);
      row.hidden = !(fits && row.dataset.label.toLowerCase().includes(part));
      shown += !row.hidden;
    }
    document.getElementById("count").textContent = `${shown} of ${rows.length} rows`;
    if (drawn.has(overview)) draw(overview);
  };
  form.addEventListener("input", filter);
  form.addEventListener("submit", (event) => event.preventDefault());

  // charts: Vega-Lite, drawn when they come into sight
  const percent = { type: "quantitative", scale: { domain: [0, 100] } };
  const look = (width) => {
    const night = dark.matches;
    const ink = night ? "#e8e8e8" : "#1a1a1a";
    const first = night ? "#56b4e9" : "#0072b2";
    const faint = night ? "#3a4048" : "#e2e2e2";
    return {
      background: "transparent", area: { color: first }, bar: { color: first }, line: { color: first }, point: { color: first, opacity: 0.9 }, view: { stroke: null }, font: "system-ui, sans-serif",
      axis: { labelColor: ink, titleColor: ink, gridColor: faint, domainColor: ink, tickColor: ink, labelFontSize: 11, titleFontSize: 12 },
      legend: { labelColor: ink, titleColor: ink, orient: "top", columns: width < 600 ? 2 : 0, symbolOpacity: 1 },
      range: { category: night ? ["#56b4e9", "#e69f00", "#2fd6a5", "#e59ac6", "#f0864a", "#c9c9c9"] : ["#0072b2", "#d55e00", "#009e73", "#cc79a7", "#8a6d00", "#444444"] },
    };
  };
  const curve = (chart) => {
    const tip = [{ field: "x", title: chart.axis }, { field: "y", title: "accuracy (%)" }, { field: "low" }, { field: "high" }];
    const x = { field: "x", type: "quantitative", title: chart.axis, axis: { labelOverlap: true } };
    if (chart.axis.startsWith("radius")) x.scale = { type: "symlog", constant: 0.02 };
    return {
      data: { values: chart.values }, encoding: { x },
      layer: [
        { mark: { type: "area", opacity: 0.22 }, encoding: { y: { ...percent, field: "low", title: "accuracy (%)" }, y2: { field: "high" } } },
        { mark: { type: "line" }, encoding: { y: { ...percent, field: "y" } } },
        { mark: { type: "point", filled: true, size: 60 }, encoding: { y: { ...percent, field: "y" }, tooltip: tip } },
      ],
    };
  };
  const classes = (figure) => {
    const lines = [...figure.closest("details").querySelector("table.classes").tBodies[0].rows];
    const values = lines.flatMap((row) => [["worst case", 1], ["clean", 2]].map(([what, cell]) => ({ name: row.cells[0].textContent, what, accuracy: parseFloat(row.cells[cell].textContent) })));
    return {
      data: { values: values.filter((one) => !Number.isNaN(one.accuracy)) }, mark: { type: "bar" },
      encoding: {
        x: { field: "name", type: "nominal", title: "class", sort: null, axis: { labelAngle: 0, labelOverlap: true } },
        xOffset: { field: "what" }, y: { ...percent, field: "accuracy", title: "accuracy (%)" },
        color: { field: "what", title: null }, tooltip: [{ field: "name", title: "class" }, { field: "what" }, { field: "accuracy", title: "accuracy (%)" }],
      },
    };
  };
  // a table's cells, by the headings of their row and column; columns that are no part of the picture say data-not
  const cells = (figure) => {
    const table = figure.parentElement.querySelector("table.source");
    const heads = [...table.tHead.rows[0].cells];
    const all = [...table.tBodies[0].rows].flatMap((row) => heads.map((head, at) => ({ x: head.textContent, y: row.cells[0].textContent, value: +row.cells[at].textContent, used: at && !("not" in head.dataset) })));
    return all.filter((one) => one.used);
  };
  const slanted = (values) => {
    const long = values.some((one) => one.x.length > 5);
    return { labelAngle: long ? -45 : 0, labelOverlap: !long };
  };
  const heat = (figure) => {
    const said = JSON.parse(figure.dataset.heat);
    const values = cells(figure);
    const range = dark.matches ? ["#1d2126", "#8fd0ff"] : ["#f3f6fa", "#08306b"];
    const most = said.most ?? Math.max(...values.map((one) => one.value));
    return {
      data: { values }, mark: { type: "rect" }, height: Math.max(280, 110 + 16 * new Set(values.map((one) => one.y)).size),
      encoding: {
        x: { field: "x", type: "nominal", sort: null, title: said.x, axis: slanted(values) }, y: { field: "y", type: "nominal", sort: null, title: said.y },
        color: { field: "value", type: "quantitative", title: said.value, scale: { domain: [0, most], range } },
        tooltip: [{ field: "y", title: said.y }, { field: "x", title: said.x }, { field: "value", title: said.value }],
      },
    };
  };
  const bars = (figure) => {
    const all = cells(figure);
    const values = all.filter((one) => one.value);
    const domain = [...new Set(all.map((one) => one.x))];
    return {
      data: { values }, mark: { type: "bar", stroke: dark.matches ? "#14171b" : "#ffffff" },
      encoding: {
        x: { field: "x", type: "nominal", sort: null, title: "step", scale: { domain }, axis: slanted(all) }, y: { field: "value", type: "quantitative", title: "images" }, detail: { field: "y" },
        tooltip: [{ field: "y", title: "attack" }, { field: "x", title: "step" }, { field: "value", title: "images" }],
      },
    };
  };
  const scatter = () => {
    const values = rows.filter((row) => !row.hidden && row.dataset.worst && row.dataset.clean).map(({ dataset: d }) => ({ defense: d.label, dataset: d.dataset, protocol: d.protocol, kind: d.kind, audit: d.verdict, clean: +(+d.clean).toFixed(2), worst: +(+d.worst).toFixed(2), low: +d.low, high: +d.high }));
    const tip = ["defense", "dataset", "protocol", "audit", "clean", "worst"].map((field) => ({ field }));
    return {
      data: { values }, encoding: { x: { ...percent, field: "clean", scale: { zero: false, padding: 15, nice: false }, title: "clean accuracy (%)" } },
      layer: [
        { mark: { type: "rule", color: "#888888" }, encoding: { y: { ...percent, field: "low", title: "worst case (%)" }, y2: { field: "high" } } },
        { mark: { type: "point", filled: true, size: 90 }, encoding: { y: { ...percent, field: "worst" }, color: { field: "kind", title: null }, shape: { field: "kind", title: null }, tooltip: tip } },
      ],
    };
  };
  const overview = document.getElementById("overview");
  const draw = async (figure) => {
    const chart = figure.dataset.chart ? JSON.parse(figure.dataset.chart) : null;
    const kind = [["heat", heat], ["bars", bars], ["classes", classes]].find(([name]) => name in figure.dataset);
    const spec = chart ? curve(chart) : kind ? kind[1](figure) : scatter();
    let plot = figure.querySelector(".plot");
    if (!plot) {
      plot = document.createElement("div");
      plot.className = "plot";
      figure.prepend(plot);
    }
    drawn.get(figure)?.finalize();
    drawn.set(figure, null);
    const said = figure === overview ? "Worst case against clean accuracy; the numbers are in the table below" : figure.querySelector("figcaption").textContent;
    const whole = { $schema: "https://vega.github.io/schema/vega-lite/v6.json", width: "container", height: 230, autosize: { type: "fit", contains: "padding" }, description: said, config: look(figure.clientWidth), ...spec };
    // the interpreter in place of generated code: the page's policy forbids eval
    const made = await vegaEmbed(plot, whole, { actions: false, renderer: "svg", ast: true, mode: "vega-lite", tooltip: { theme: dark.matches ? "dark" : "light" } });
    drawn.set(figure, made);
  };
  const sight = new IntersectionObserver((seen) => {
    for (const { target, isIntersecting } of seen) {
      if (isIntersecting && !drawn.has(target)) draw(target);
    }
  }, { rootMargin: "200px" });
  document.querySelectorAll("figure.chart").forEach((figure) => sight.observe(figure));
  dark.addEventListener("change", () => drawn.forEach((_, figure) => draw(figure)));

  // a link into a section opens it
  const open = () => {
    const target = location.hash && document.getElementById(location.hash.slice(1));
    if (target instanceof HTMLDetailsElement) {
      target.open = true;
      target.scrollIntoView();
    }
  };
  addEventListener("hashchange", open);
  open();
})();
