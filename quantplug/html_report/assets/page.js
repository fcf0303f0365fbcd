// Draws a report from the JSON beside it. All text of files goes into the page as text, never as markup.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const number = new Intl.NumberFormat("en");
  const bytes = (count) => {
    const units = ["B", "kB", "MB", "GB", "TB"];
    const unit = count > 0 ? Math.min(units.length - 1, Math.floor(Math.log10(count) / 3)) : 0;
    return `${(count / 1000 ** unit).toFixed(unit ? 2 : 0)} ${units[unit]}`;
  };
  const short = (value) => (value === null || value === undefined ? "" : Number(value).toPrecision(3));
  const make = (tag, text, name) => {
    const element = document.createElement(tag);
    element.textContent = text;
    if (name) element.className = name;
    return element;
  };

  function head() {
    document.title = `${data.ok ? "OK" : "NOT OK"}: ${data.directory}`;
    at("verdict").textContent = data.ok ? "OK" : "NOT OK";
    at("verdict").classList.toggle("ok", data.ok);
    at("directory").textContent = data.directory;
    const count = (of, what) => `${number.format(of)} ${what}${of === 1 ? "" : "s"}`;
    const counted = [count(data.errors, "error"), count(data.warnings, "warning"), count(data.notes, "note")].join(", ");
    at("about").textContent = `${counted}. ` + (data.source === null ? "Not compared with a source." : `Compared with ${data.source}.`);
    const ratio = data.sourceBytes ? ` (${(data.bytes / data.sourceBytes * 100).toFixed(0)} % of the source)` : "";
    const facts = [
      ["Quantization", data.quantization], ["Architecture", data.architecture ?? "not of the table"],
      ["KV cache", data.kvCache ?? "16 bits"], ["Tensors", number.format(data.tensors)],
      ["Quantized weights", number.format(data.weights.length)], ["Size", bytes(data.bytes) + ratio],
    ];
    facts.push(["Tensor-parallel sizes", data.servingTp]);
    const loading = data.readers.filter(([, answer]) => answer === "yes").map(([reader]) => reader);
    if (data.readers.length) facts.push(["Readers", loading.join(", ") || "none is known"]);
    for (const [name, value] of facts) {
      const box = document.createElement("div");
      box.append(make("dt", name), make("dd", value));
      at("facts").append(box);
    }
    at("footer").textContent = `quantplug ${data.version}. What each check means: docs/verify.md of quantplug.`;
    for (const pattern of data.excludes) at("excludes").append(make("li", pattern));
  }

  // A section without anything to show is left out, and so is its entry in the list of sections.
  function leaveOut(id, when) {
    if (when) at(id).hidden = true;
  }
  function contents() {
    for (const section of document.querySelectorAll("main > section")) {
      if (section.hidden) continue;
      const link = make("a", section.dataset.title);
      link.href = `#${section.id}`;
      at("contents").append(link);
    }
  }

  // Tables. Tabulator draws the rows in sight alone, so that twelve thousand are as quick as twelve.
  const tables = [];
  function table(id, columns, rows, height) {
    const fields = columns.map((column, index) => ({
      field: String(index), headerFilter: "input", headerFilterPlaceholder: "filter", formatter: "plaintext", ...column,
    }));
    const made = new Tabulator(at(id), {
      data: rows, columns: fields, height: rows.length > 12 ? height : undefined, layout: "fitDataStretch",
      placeholder: "Nothing here.", columnDefaults: { headerTooltip: true },
    });
    tables.push(made);
  }
  const textual = (title, width) => ({ title, minWidth: width ?? 110, cssClass: "wraps" });
  const numeric = (title, show) => ({
    title, hozAlign: "right", headerHozAlign: "right", sorter: "number", width: 105,
    headerFilter: "input", headerFilterFunc: compares, headerFilterPlaceholder: "> 0.1",
    formatter: (cell) => document.createTextNode((show ?? ((value) => (value === null ? "" : String(value))))(cell.getValue())),
  });
  // "> 0.1", "<= 3", "= 7" or "7".
  function compares(wanted, value) {
    const match = /^\s*(<=|>=|<|>|=)?\s*(-?[\d.]+(?:e-?\d+)?)\s*$/i.exec(wanted);
    if (!match) return true;
    if (value === null) return false;
    const bound = Number(match[2]);
    switch (match[1]) {
      case "<": return value < bound;
      case ">": return value > bound;
      case "<=": return value <= bound;
      case ">=": return value >= bound;
      default: return value === bound;
    }
  }

  function findings() {
    at("no-findings").hidden = data.findings.length > 0;
    at("findings-table").hidden = data.findings.length === 0;
    if (!data.findings.length) return;
    const severity = {
      title: "Severity", width: 110,
      formatter: (cell) => make("span", cell.getValue(), cell.getValue()),
      sorter: (one, other) => ["error", "warning", "note"].indexOf(one) - ["error", "warning", "note"].indexOf(other),
    };
    table("findings-table", [severity, { title: "Check", width: 150 }, textual("What", 260), textual("Message", 380)], data.findings, "420px");
  }

  function readers() {
    leaveOut("readers", data.readers.length === 0);
    if (!data.readers.length) return;
    const answer = { title: "Loads it", width: 110, formatter: (cell) => make("span", cell.getValue(), `answer ${cell.getValue()}`) };
    table("readers-table", [
      { title: "Reader", width: 150 }, answer, textual("How that is known", 300), textual("Tensor-parallel sizes", 180),
      textual("What stands against it", 330),
    ], data.readers);
    for (const [what, size, whole, refused] of data.servingLimits) {
      at("limits").append(make("li", `not ${refused.join(", ")}: ${size} ${what}${whole > 1 ? ` in blocks of ${whole}` : ""}`));
    }
    at("limits-of-sizes").hidden = data.servingLimits.length === 0;
  }

  // Charts. One that is out of sight keeps nobody waiting: it is drawn when it comes in sight, or for paper.
  const watches = [];
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  // The library runs from the first chart on. The page's policy names its digest: no other text would run in its place.
  function library() {
    if (!window.echarts) document.head.append(make("script", at("charts-library").textContent));
    return window.echarts;
  }
  function chart(id, option) {
    let made = null;
    const draw = (renderer = "canvas") => {
      made ??= library().init(at(id), null, { renderer });
      made.setOption(option(), true);
    };
    const show = (renderer) => {
      sight.disconnect();
      if (!made) draw(renderer);
    };
    const sight = new IntersectionObserver((seen) => {
      if (seen.some(({ isIntersecting }) => isIntersecting)) show("canvas");
    });
    watches.push(() => sight.observe(at(id)));
    // As shapes: Chromium prints a canvas that is drawn in this very turn with white for all that is clear.
    window.addEventListener("beforeprint", () => show("svg"));
    window.addEventListener("resize", () => made?.resize());
    dark.addEventListener("change", () => made && draw());
    return draw;
  }

  // A value by (layer, column), darker or lighter with its size on a scale of its own.
  function heat(cells, columnName, valueName) {
    const layers = [...new Set(cells.map(([layer]) => layer))].sort((a, b) => a - b);
    const columns = [...new Set(cells.map(([, column]) => column))];
    if (columns.every((column) => typeof column === "number")) columns.sort((a, b) => a - b);
    const row = new Map(layers.map((layer, index) => [layer, index]));
    const place = new Map(columns.map((column, index) => [column, index]));
    const values = cells.map(([, , value]) => value).filter((value) => value !== null);
    const least = values.length ? values.reduce((a, b) => Math.min(a, b)) : 0;
    const most = values.reduce((a, b) => Math.max(a, b), least);
    const axis = { axisLabel: { color: colour("--soft") }, axisLine: { lineStyle: { color: colour("--line") } }, nameTextStyle: { color: colour("--soft") } };
    return {
      animation: false, backgroundColor: "transparent",
      grid: { left: 60, right: 20, top: 20, bottom: 90, containLabel: false },
      xAxis: { type: "category", data: columns.map(String), name: columnName, nameLocation: "middle", nameGap: 28, ...axis },
      yAxis: { type: "category", data: layers.map(String), name: "layer", nameLocation: "middle", nameGap: 40, inverse: true, ...axis },
      visualMap: {
        min: least, max: most > least ? most : least + (Math.abs(least) || 1), calculable: true, orient: "horizontal", left: "center", bottom: 0,
        precision: 4, textStyle: { color: colour("--soft") }, itemHeight: 180, formatter: (value) => short(value),
        inRange: { color: ["#440154", "#414487", "#2a788e", "#22a884", "#7ad151", "#fde725"] },
      },
      // Names in a tooltip are text of files: drawn on the canvas, they cannot be markup.
      tooltip: {
        renderMode: "richText", confine: true,
        formatter: ({ value }) => `layer ${layers[value[1]]}, ${columnName} ${columns[value[0]]}\n${valueName}: ${short(value[2])}`,
      },
      series: [{
        type: "heatmap", progressive: 0, // All in one turn: paper waits for no other.
        data: cells.filter(([, , value]) => value !== null).map(([layer, column, value]) => [place.get(column), row.get(layer), value]),
      }],
    };
  }

  function choose(id, label, options, onChange) {
    const select = document.createElement("select");
    options.forEach((name, index) => {
      const option = make("option", name);
      option.value = String(index);
      select.append(option);
    });
    select.addEventListener("change", () => onChange(Number(select.value)));
    const wrapped = make("label", `${label} `);
    wrapped.append(select);
    at(id).append(wrapped);
  }

  // One picture for each kind of module of which there are many in a layer, one for all that a layer has once.
  function heats(section, of, valueName) {
    const cells = data.weights.filter((row) => row[2] !== null && row[of] !== null);
    leaveOut(section, cells.length === 0);
    if (!cells.length) return;
    const kinds = [...new Set(cells.filter((row) => row[3] !== null).map((row) => row[1]))];
    const views = kinds.map((kind) => ({
      name: kind, column: "expert", cells: cells.filter((row) => row[1] === kind && row[3] !== null).map((row) => [row[2], row[3], row[of]]),
    }));
    const others = cells.filter((row) => row[3] === null).map((row) => [row[2], row[1], row[of]]);
    if (others.length) views.push({ name: "all others", column: "module", cells: others });
    let view = views[0];
    const draw = chart(`${section}-chart`, () => heat(view.cells, view.column, valueName));
    choose(`${section}-controls`, "Modules", views.map(({ name }) => name), (index) => { view = views[index]; draw(); });
  }

  function experts() {
    const views = [];
    for (const { module, cells } of data.experts) {
      if (cells.some((cell) => cell[3] !== null)) {
        views.push({ name: `${module}: tokens`, value: "tokens", cells: cells.map(([layer, expert, , tokens]) => [layer, expert, tokens]) });
      }
      if (cells.some((cell) => cell[2] !== null)) {
        views.push({ name: `${module}: amax`, value: "amax", cells: cells.map(([layer, expert, amax]) => [layer, expert, amax]) });
      }
    }
    leaveOut("experts", views.length === 0);
    if (!views.length) return;
    let view = views[0];
    const draw = chart("experts-chart", () => heat(view.cells, "expert", view.value));
    choose("experts-controls", "Quantizers", views.map(({ name }) => name), (index) => { view = views[index]; draw(); });
  }

  function bars(found) {
    const axis = { axisLabel: { color: colour("--soft") }, axisLine: { lineStyle: { color: colour("--line") } }, splitLine: { lineStyle: { color: colour("--line") } } };
    const pairs = found ? found.bars : [];
    const total = pairs.reduce((sum, [, count]) => sum + count, 0);
    return {
      animation: false, backgroundColor: "transparent", grid: { left: 60, right: 10, top: 20, bottom: 40 },
      xAxis: { type: "category", data: pairs.map(([value]) => short(value)), ...axis },
      yAxis: { type: "value", axisLabel: { color: colour("--soft"), formatter: (value) => `${value} %` }, splitLine: axis.splitLine },
      tooltip: { trigger: "axis", renderMode: "richText", confine: true, formatter: ([bar]) => `${bar.name}\n${Number(bar.value).toFixed(3)} %` },
      series: [{ type: "bar", data: pairs.map(([, count]) => count / total * 100), itemStyle: { color: colour("--link") }, barCategoryGap: "10%" }],
    };
  }

  function histograms() {
    leaveOut("histograms", data.codes.length === 0);
    if (!data.codes.length) return;
    let codes = data.codes[0];
    const scales = () => data.scales.find(({ format, kind }) => format === codes.format && kind === codes.kind);
    const say = () => {
      const part = (found, what) => found ? `${what}: ${number.format(found.counted)} of ${number.format(found.of)} counted` : `${what}: one a weight`;
      at("codes-caption").textContent = part(codes, "Codes, by the value that they stand for before scaling");
      at("scales-caption").textContent = part(scales(), "Scales of blocks, groups or rows");
    };
    const draws = [chart("codes-chart", () => bars(codes)), chart("scales-chart", () => bars(scales()))];
    say();
    choose("histograms-controls", "Modules", data.codes.map(({ format, kind }) => `${kind} (${format})`), (index) => {
      codes = data.codes[index];
      draws.forEach((draw) => draw());
      say();
    });
  }

  head();
  leaveOut("weights", data.weights.length === 0);
  leaveOut("kept", data.kept.length === 0 && data.excludes.length === 0);
  leaveOut("sizes", data.sizes.length === 0);
  findings();
  readers();
  heats("errors", 9, "relative error");
  heats("input-errors", 12, "relative error by inputs");
  heats("amaxes", 8, "range");
  experts();
  histograms();
  // What is asked first stands first: where a weight is, and how far it is off.
  const columns = [
    [0, textual("Module", 330)], [2, numeric("Layer")], [3, numeric("Expert")], [4, { title: "Format", width: 150 }],
    ...(data.source === null ? [] : [[9, numeric("Error", short)], ...(data.weights.some((row) => row[12] !== null) ? [[12, numeric("By inputs", short)]] : []), [10, numeric("Bound", short)], [11, numeric("Largest", short)]]),
    [8, numeric("Range", short)], [5, numeric("Rows")], [6, numeric("Columns")], [7, numeric("Bytes", (value) => number.format(value))],
  ];
  table("weights-table", columns.map(([from, column]) => ({ field: String(from), ...column })), data.weights, "560px");
  table("kept-table", [textual("Kind", 250), textual("Why", 350), numeric("Tensors"), numeric("Bytes", (value) => number.format(value))], data.kept, "420px");
  table("sizes-table", [
    textual("Kind", 250), numeric("Export", (value) => number.format(value)), numeric("Source", (value) => (value === null ? "" : number.format(value))),
  ], data.sizes, "420px");
  contents();
  // For whoever waits for the page: tables are built when the browser has had a turn, and charts after them.
  Promise.all(tables.map((made) => new Promise((done) => made.on("tableBuilt", done)))).then(() => {
    document.documentElement.dataset.ready = "true";
    watches.forEach((watch) => watch());
  });
})();
