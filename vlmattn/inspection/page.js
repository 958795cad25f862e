"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const state = { step: 0, layer: -1, head: -1, mode: "both", score: "attention on images" };
  const at = (id) => document.getElementById(id);
  const make = (name, parent, properties = {}) => {
    const node = Object.assign(document.createElement(name), properties);
    if (parent) parent.append(node);
    return node;
  };
  // cividis: told apart by colour-blind readers, and ordered in grey too
  const STOPS = [[0, 34, 78], [18, 53, 112], [59, 73, 108], [87, 93, 109], [112, 113, 115], [138, 134, 120], [165, 156, 116], [195, 179, 105], [225, 204, 85], [254, 232, 56]];
  const colour = (share) => {
    const x = Math.min(1, Math.max(0, share)) * (STOPS.length - 1), low = Math.min(STOPS.length - 2, Math.floor(x));
    return STOPS[low].map((value, i) => Math.round(value + (STOPS[low + 1][i] - value) * (x - low)));
  };
  const number = (value) => (value >= 0.1 ? value.toFixed(2) : value.toFixed(3));

  const unpacked = (packed) => {
    const raw = (text) => Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
    const scale = new Float32Array(raw(packed.scale).buffer), bytes = raw(packed.bytes), cells = packed.shape.at(-1);
    return (...places) => {
      const map = places.reduce((sum, place, i) => sum * packed.shape[i] + place, 0);
      return Float64Array.from(bytes.subarray(map * cells, (map + 1) * cells), (byte) => (byte / 255) * scale[map]);
    };
  };
  const mean = (rows) => rows[0].map((_, i) => rows.reduce((sum, row) => sum + row[i], 0) / rows.length);
  for (const side of data.sides) [side.meanOf, side.singleOf] = [unpacked(side.mean), unpacked(side.single)];
  const layers = data.layers.map((_, place) => place);
  const stepOf = (side) => (state.step < side.tokens.length ? state.step : null);

  // attention of the chosen token's row on all image tokens; null where there is no such token or head
  const cellsOf = (side) => {
    const step = stepOf(side);
    if (step === null) return null;
    const chosen = state.layer < 0 ? layers : [state.layer];
    if (state.head < 0) return mean(chosen.map((layer) => side.meanOf(step, layer)));
    const found = chosen.map((layer) => {
      const place = side.some ? side.some[layer].indexOf(state.head) : state.head;
      return place < 0 ? null : side.singleOf(step, layer, place);
    }).filter((cells) => cells !== null);
    return found.length ? mean(found) : null;
  };
  const phiOf = (side) => (state.layer < 0 ? null : side.phi[state.layer]);

  const pictures = data.pictures.map((picture) => Object.assign(new Image(), { src: picture.source }));

  function paint(canvas, image, cells, top) {
    const picture = data.pictures[image], grow = Math.max(1, Math.ceil(336 / Math.max(picture.width, picture.height)));
    canvas.width = picture.width * grow;
    canvas.height = picture.height * grow;
    const pen = canvas.getContext("2d");
    pen.imageSmoothingEnabled = false;
    if (state.mode !== "attention") pen.drawImage(pictures[image], 0, 0, canvas.width, canvas.height);
    if (state.mode === "picture" || !cells) return;
    const first = data.counts.slice(0, image).reduce((a, b) => a + b, 0);
    for (const piece of data.images[image]) {
      const [left, upper, right, lower] = piece.box, rows = piece.cells.length, columns = piece.cells[0].length;
      const wide = ((right - left) * canvas.width) / columns, high = ((lower - upper) * canvas.height) / rows;
      piece.cells.forEach((row, y) => row.forEach((cell, x) => {
        const share = cells[first + cell] / top;
        pen.fillStyle = `rgba(${colour(share).join(",")},${state.mode === "attention" ? 1 : 0.25 + 0.5 * share})`;
        const x0 = Math.round(left * canvas.width + x * wide), y0 = Math.round(upper * canvas.height + y * high);
        pen.fillRect(x0, y0, Math.round(left * canvas.width + (x + 1) * wide) - x0, Math.round(upper * canvas.height + (y + 1) * high) - y0);
      }));
    }
  }

  function drawMaps() {
    const phi = state.mode === "sinks";
    const found = data.sides.map(phi ? phiOf : cellsOf);
    const top = Math.max(1e-9, ...found.filter(Boolean).map((cells) => cells.reduce((a, b) => Math.max(a, b), 0)));
    at("maps").replaceChildren();
    data.sides.forEach((side, number_) => {
      const cells = found[number_], step = stepOf(side);
      const box = make("div", at("maps"), { className: "side" });
      make("h3", box, { textContent: `${side.name}: ${step === null ? "the answer is shorter" : `“${side.tokens[step].text}”`}` });
      data.pictures.forEach((picture, image) => {
        if (data.pictures.length > 1) make("p", box, { textContent: `image ${image + 1}` });
        const canvas = make("canvas", box, { className: "map" });
        canvas.setAttribute("role", "img");
        canvas.setAttribute("aria-label", `attention of ${side.name} on image ${image + 1}`);
        paint(canvas, image, cells, top);
        const first = data.counts.slice(0, image).reduce((a, b) => a + b, 0);
        const own = cells ? Array.from(cells).slice(first, first + data.counts[image]) : null;
        const most = own ? own.reduce((a, b) => Math.max(a, b), 0) : 0;
        let note = "this head is not on the page; choose another, or all heads";
        if (phi && !cells) note = "choose one layer to see the sink values of its tokens";
        else if (step === null) note = "";
        else if (own && phi) note = `largest phi ${most.toFixed(1)}; above ${data.tau}: ${own.filter((value) => value > data.tau).length} tokens`;
        else if (own) note = `on this image ${number(own.reduce((a, b) => a + b, 0))} of the attention, on its hottest token ${number(most)}`;
        if (!data.images[image].length) note += ". Where these tokens lie in the picture is not known.";
        make("p", box, { innerHTML: "<small></small>" }).firstChild.textContent = note;
      });
    });
    const bar = at("bar");
    bar.replaceChildren();
    const line = make("div", bar, { className: "bar" });
    make("span", line, { textContent: "0" });
    const canvas = make("canvas", line, { width: 120, height: 1 }), pen = canvas.getContext("2d");
    for (let x = 0; x < 120; x++) { pen.fillStyle = `rgb(${colour(x / 119).join(",")})`; pen.fillRect(x, 0, 1, 1); }
    make("span", line, { textContent: phi ? `phi ${top.toFixed(1)}` : `${number(top)} of the row's attention` });
  }

  function drawAnswers() {
    at("answers").replaceChildren();
    const texts = data.sides.map((side) => side.tokens.map((token) => token.text));
    data.sides.forEach((side, number_) => {
      const box = make("div", at("answers"), { className: "answer" });
      make("b", box, { textContent: side.name });
      side.tokens.forEach((token, step) => {
        const chip = make("button", box, { className: "chip", type: "button", textContent: token.text.replace(/\n/g, "⏎") });
        const own = token.likely[side.name], base = token.likely[data.sides[0].name];
        const others = Object.entries(token.likely).filter(([name]) => name !== side.name);
        const other = number_ ? base : others.length ? others[0][1] : own;
        const gain = number_ ? own - other : other - own; // of the recipe over none
        const share = Math.min(1, Math.abs(gain) / 2);
        if (others.length && share > 0.02) chip.style.background = gain < 0 ? `rgba(230,97,1,${0.7 * share})` : `rgba(94,60,153,${0.5 * share})`;
        if (texts.some((text) => text[step] !== token.text)) chip.classList.add("differs");
        chip.title = Object.entries(token.likely).map(([name, value]) => `${name} ${value.toFixed(2)}`).join(", ");
        chip.setAttribute("aria-pressed", step === state.step);
        chip.addEventListener("click", () => set({ step }));
      });
    });
  }

  function drawHeads() {
    at("heads").replaceChildren();
    const saved = data.scores[state.score];
    const shown = saved ? [{ name: state.score, table: saved }] : data.sides.filter((side) => stepOf(side) !== null).map((side) => ({ name: side.name, table: side.visual[state.step] }));
    const values = shown.flatMap((one) => one.table.flat()), low = Math.min(0, ...values), high = Math.max(1e-9, ...values);
    shown.forEach(({ name, table }) => {
      const box = make("div", at("heads"), { className: "side" });
      make("h3", box, { textContent: name });
      const canvas = make("canvas", box, { className: "atlas" }), unit = 16;
      canvas.width = data.heads * unit;
      canvas.height = layers.length * unit;
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${name}: layers from the bottom, heads from the left`);
      const pen = canvas.getContext("2d");
      table.forEach((row, layer) => row.forEach((value, head) => {
        pen.fillStyle = `rgb(${colour((value - low) / (high - low)).join(",")})`;
        pen.fillRect(head * unit, (layers.length - 1 - layer) * unit, unit - 1, unit - 1);
      }));
      if (state.layer >= 0 || state.head >= 0) {
        pen.strokeStyle = "#D55E00";
        pen.lineWidth = 2;
        const x = state.head < 0 ? 0 : state.head, y = state.layer < 0 ? 0 : layers.length - 1 - state.layer;
        pen.strokeRect(x * unit, y * unit, unit * (state.head < 0 ? data.heads : 1) - 1, unit * (state.layer < 0 ? layers.length : 1) - 1);
      }
      canvas.addEventListener("click", (event) => {
        const area = canvas.getBoundingClientRect();
        const head = Math.floor(((event.clientX - area.left) / area.width) * data.heads);
        const layer = layers.length - 1 - Math.floor(((event.clientY - area.top) / area.height) * layers.length);
        set({ layer: Math.max(0, layer), head: Math.min(data.heads - 1, head) });
      });
      make("p", box, { innerHTML: "<small></small>" }).firstChild.textContent = `layer ${data.layers[0]} at the bottom, head 0 at the left; dark ${number(low)}, bright ${number(high)}`;
    });
    const note = [];
    if (state.layer >= 0 && state.head >= 0) {
      for (const side of data.sides) {
        if (stepOf(side) === null) continue;
        const gain = side.gains[state.step][state.layer][state.head];
        note.push(`${side.name}: ${number(side.visual[state.step][state.layer][state.head])} on the images${gain === 1 ? "" : `, output times ${gain}`}`);
      }
      for (const [name, table] of Object.entries(data.scores)) note.push(`${name} ${table[state.layer][state.head].toFixed(3)}`);
      note.unshift(`layer ${data.layers[state.layer]}, head ${state.head}`);
    }
    at("head-note").textContent = note.join(" · ");
  }

  const SVG = "http://www.w3.org/2000/svg";
  const draw = (name, parent, attributes, text) => {
    const node = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    if (text !== undefined) node.textContent = text;
    parent.append(node);
    return node;
  };

  // lines: [{values, colour, dashed}] with one value for each place on the x axis, all between 0 and top
  function chart(parent, title, lines, ticks, top, marked) {
    const box = make("div", parent, { className: "side" });
    make("h3", box, { textContent: title });
    const svg = draw("svg", box, { viewBox: "0 0 340 190", role: "img", "aria-label": title });
    const count = ticks.length, x = (i) => 34 + (count > 1 ? (i * 296) / (count - 1) : 148), y = (value) => 160 - (150 * value) / top;
    for (const share of [0, 0.5, 1]) {
      draw("line", svg, { x1: 30, x2: 334, y1: y(share * top), y2: y(share * top), stroke: "#ddd" });
      draw("text", svg, { x: 26, y: y(share * top) + 4, "text-anchor": "end" }, top === 1 ? share : (share * top).toFixed(1));
    }
    if (marked !== null) draw("line", svg, { x1: x(marked), x2: x(marked), y1: 8, y2: 160, stroke: "#999", "stroke-dasharray": "2 3" });
    const every = Math.ceil(count / 12);
    ticks.forEach((tick, i) => { if (i % every === 0) draw("text", svg, { x: x(i), y: 178, "text-anchor": "middle" }, tick); });
    for (const line of lines) {
      const points = line.values.map((value, i) => `${x(i).toFixed(1)},${y(Math.min(value, top)).toFixed(1)}`).join(" ");
      draw("polyline", svg, { points, fill: "none", stroke: line.colour, "stroke-width": 2, "stroke-dasharray": line.dashed ? "5 3" : "none" });
      if (line.values.length === 1) draw("circle", svg, { cx: x(0), cy: y(line.values[0]), r: 3, fill: line.colour });
    }
    return box;
  }

  function legend(parent, entries) {
    const line = make("p", parent, { className: "legend" });
    for (const [name, colour_, dashed] of entries) {
      const item = make("span", line), mark = make("i", item);
      mark.style.background = dashed ? `repeating-linear-gradient(90deg,${colour_} 0 5px,transparent 5px 8px)` : colour_;
      item.append(name);
    }
  }

  function drawGroups() {
    const box = at("groups");
    box.replaceChildren();
    const lines = data.sides.flatMap((side, number_) => (stepOf(side) === null ? [] : data.groups.map((_, group) => ({
      values: side.masses[state.step].map((row) => row[group]), colour: data.colours[group], dashed: number_ > 0,
    }))));
    const names = data.groups.map((name, group) => [name, data.colours[group]]);
    const kinds = data.sides.length > 1 ? [[data.sides[0].name, "#444"], [data.sides[1].name, "#444", true]] : [];
    const through = chart(box, "through the layers", lines, data.layers, 1, state.layer < 0 ? null : state.layer);
    legend(through, [...names, ...kinds]);
    data.sides.forEach((side) => {
      const of = (row, group) => (state.layer < 0 ? mean(row.map((layer) => [layer[group]]))[0] : row[state.layer][group]);
      chart(box, `through the answer: ${side.name}`, data.groups.map((_, group) => ({ values: side.masses.map((row) => of(row, group)), colour: data.colours[group] })), side.tokens.map((_, i) => i), 1, stepOf(side));
    });
  }

  function drawSinks() {
    const layer = state.layer, box = at("sinks");
    box.replaceChildren();
    const any = data.sides.some((side) => side.sinks.some((row) => row.text + row.image > 0));
    at("sink-note").textContent = (any ? `Tokens whose largest dimension exceeds ${data.tau} times the root mean square as they enter a layer; primary and secondary sinks are those that point where the first token does in at least 60 % and 12 % of the layers.` : `No token is massive in any layer: no dimension exceeds ${data.tau} times the root mean square.`) + (layer < 0 ? " Choose a layer to list its tokens with the largest values." : "");
    const count = at("sink-count");
    count.replaceChildren();
    if (any) {
      const table = make("table", count, { className: "small" }), head = make("tr", make("thead", table)), body = make("tbody", table);
      make("th", head, { textContent: "layer" });
      data.layers.forEach((name) => make("th", head, { textContent: name }));
      for (const side of data.sides) for (const [kind, words] of [["text", "text tokens"], ["image", "image tokens"], ["primary", "primary"], ["secondary", "secondary"]]) {
        const row = make("tr", body);
        make("th", row, { textContent: `${side.name}, ${words}` });
        side.sinks.forEach((one) => make("td", row, { textContent: one[kind] || "·" }));
      }
    }
    if (layer < 0) return;
    for (const side of data.sides) {
      const own = make("div", box, { className: "side" });
      make("h3", own, { textContent: `${side.name}, layer ${data.layers[layer]}` });
      const table = make("table", own, { className: "small" }), head = make("tr", make("thead", table)), body = make("tbody", table);
      for (const name of ["token", "phi", "dim", "norm", "level", "draws"]) make("th", head, { textContent: name });
      for (const one of side.sinks[layer].tokens) {
        const row = make("tr", body);
        make("th", row, { textContent: `${one.token} ${one.text.replace(/\n/g, "⏎")}` });
        for (const value of [one.phi, one.dim, one.norm, one.level, one.received]) make("td", row, { textContent: value });
      }
      make("p", own, { innerHTML: "<small>draws: mean attention of later answer rows</small>" });
    }
  }

  function drawLikely() {
    const box = at("likely");
    box.replaceChildren();
    data.sides.forEach((side) => {
      const own = make("div", box, { className: "side" });
      make("h3", own, { textContent: `answer of ${side.name}` });
      const names = Object.keys(side.tokens[0].likely), grid = make("div", own, { className: "likely" });
      side.tokens.forEach((token, step) => {
        make("div", grid, { className: step === state.step ? "text on" : "text", textContent: token.text.replace(/\n/g, "⏎") });
        const lines = make("div", grid, { title: names.map((name) => `${name} ${token.likely[name].toFixed(3)}`).join(", ") });
        names.forEach((name, i) => {
          const line = make("div", lines, { className: "line" });
          line.style.width = `${Math.min(100, (100 * -token.likely[name]) / 6)}%`;
          line.style.background = data.colours[i % data.colours.length];
        });
      });
      legend(own, names.map((name, i) => [`${name} (bar: 0 to -6)`, data.colours[i % data.colours.length]]));
      const step = stepOf(side);
      if (step !== null) {
        const table = make("table", own, { className: "small" }), body = make("tbody", table);
        side.tokens[step].rivals.forEach(([text, value]) => {
          const row = make("tr", body);
          make("th", row, { textContent: text.replace(/\n/g, "⏎") });
          make("td", row, { textContent: `${(100 * Math.exp(value)).toFixed(1)} %` });
        });
      }
    });
  }

  function set(change) {
    Object.assign(state, change);
    for (const name of ["step", "layer", "head"]) at(name).value = state[name];
    const texts = data.sides.map((side) => side.tokens[state.step]?.text).filter((text) => text !== undefined);
    at("step-name").textContent = `${state.step} ${[...new Set(texts)].join(" / ")}`;
    at("layer-name").textContent = state.layer < 0 ? "mean of all" : data.layers[state.layer];
    at("head-name").textContent = state.head < 0 ? "mean of all" : state.head;
    drawAnswers();
    drawMaps();
    drawHeads();
    drawSinks();
    drawGroups();
    drawLikely();
  }

  at("step").max = Math.max(...data.sides.map((side) => side.tokens.length)) - 1;
  at("layer").max = layers.length - 1;
  at("head").max = data.heads - 1;
  for (const name of ["step", "layer", "head"]) at(name).addEventListener("input", (event) => set({ [name]: Number(event.target.value) }));
  for (const name of ["mode", "score"]) at(name).addEventListener("change", (event) => set({ [name]: event.target.value }));
  for (const name of ["attention on images", ...Object.keys(data.scores)]) make("option", at("score"), { textContent: name });
  // begin where the answers part
  const parts = data.sides[0].tokens.findIndex((token, step) => data.sides.some((side) => side.tokens[step]?.text !== token.text));
  Promise.all(pictures.map((picture) => picture.decode())).then(() => {
    set({ step: Math.max(0, parts) });
    document.body.dataset.ready = "yes";
  });
})();
