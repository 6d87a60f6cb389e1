/*
Drawing: line charts, maps with letters on both axes, arcs over a text. It computes no number of the model:
all that it is given comes from the program. Colours come from the style sheet, so that dark and light are its
business.
*/
"use strict";
const draw = (() => {
    const SVG = "http://www.w3.org/2000/svg";

    // An element of a drawing: make("line", {x1: 0, ...}, "text or children")
    function make(name, attributes = {}, ...children) {
        const element = document.createElementNS(SVG, name);
        for (const [key, value] of Object.entries(attributes)) {
            if (value !== undefined)
                element.setAttribute(key, typeof value === "number" ? +value.toFixed(2) : value);
        }
        element.append(...children);
        return element;
    }
    function colour(name) {
        return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
    }

    // How a letter is shown where white space must be seen.
    function visible(letter) {
        return letter === "\n" ? "↵" : letter === " " ? "·" : letter === "\t" ? "⇥" : letter;
    }

    // Round numbers between low and high.
    function ticks(low, high, count) {
        const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
        const step = [1, 2, 5, 10].map((x) => x * power).find((x) => x >= rough);
        const out = [];
        for (let x = Math.ceil(low / step) * step; x <= high + step * 1e-9; x += step)
            out.push(+x.toPrecision(12));
        return out;
    }
    function powers(low, high, base) {
        const out = [];
        for (let k = Math.ceil(Math.log(low) / Math.log(base) - 1e-9); base ** k <= high * 1.000001; k++)
            out.push(base ** k);
        return out;
    }
    const superscript = (k) => String(k).replace(/./g, (c) => "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"["-0123456789".indexOf(c)]);
    function power(x) {
        const k = Math.round(Math.log10(x));
        return Math.abs(k) < 3 ? String(+x.toPrecision(2)) : `10${superscript(k)}`;
    }

    // A chart into `box`. lines: [{points: [[x, y]], name, key, dash, dots, thin}], key: the colour's name.
    // log: both axes. marks: [{x, text}], lines across.
    function chart(box, {lines, log = false, xName, yName, xRange, yRange, marks = [], height = 300, empty}) {
        const width = Math.max(260, box.clientWidth), left = 52, right = 14, top = 12, bottom = 40;
        const svg = make("svg", {
            width,
            height,
            viewBox: `0 0 ${width} ${height}`,
            role: "img",
            "aria-label": `${yName} over ${xName}`
        });
        const all = lines.flatMap((line) => line.points);
        if (!all.length && !xRange) {
            svg.append(make(
                "text", {x: width / 2, y: height / 2, "text-anchor": "middle", class: "axis"}, empty || ""));
            box.replaceChildren(svg);
            return;
        }
        const span = (k) => {
            const values = all.map((point) => point[k]);
            return values.length ? [Math.min(...values), Math.max(...values)] : [0, 1];
        };
        let [x0, x1] = xRange || span(0), [y0, y1] = yRange || span(1);
        if (!log && y1 - y0 < 0.2) [y0, y1] = [y0 - 0.1, y1 + 0.1];
        if (!log && !yRange) [y0, y1] = [y0 - 0.04 * (y1 - y0), y1 + 0.04 * (y1 - y0)];
        if (x1 <= x0) x1 = x0 + 1;
        const scale = log ? Math.log : (x) => x;
        const px = (x) => left + (width - left - right) * (scale(x) - scale(x0)) / (scale(x1) - scale(x0));
        const py = (y) =>
            height - bottom - (height - top - bottom) * (scale(y) - scale(y0)) / (scale(y1) - scale(y0));
        for (const x of log ? powers(x0, x1, 2) : ticks(x0, x1, width / 90)) {
            svg.append(make("line", {x1: px(x), x2: px(x), y1: top, y2: height - bottom, class: "grid"}));
            if (!log || width > 500 || Math.log2(x) % 2 === 0)
                svg.append(make(
                    "text", {x: px(x), y: height - bottom + 16, "text-anchor": "middle", class: "axis"},
                    String(x)));
        }
        for (const y of log ? powers(y0, y1, 10) : ticks(y0, y1, height / 55)) {
            svg.append(make("line", {x1: left, x2: width - right, y1: py(y), y2: py(y), class: "grid"}));
            svg.append(make(
                "text", {x: left - 6, y: py(y) + 4, "text-anchor": "end", class: "axis"},
                log ? power(y) : String(y)));
        }
        svg.append(make(
            "text", {x: (left + width - right) / 2, y: height - 6, "text-anchor": "middle", class: "axis"},
            xName));
        svg.append(make(
            "text", {
                x: 12,
                y: (top + height - bottom) / 2,
                "text-anchor": "middle",
                class: "axis",
                transform: `rotate(-90 12 ${(top + height - bottom) / 2})`
            },
            yName));
        for (const mark of marks) {
            svg.append(
                make("line", {x1: px(mark.x), x2: px(mark.x), y1: top, y2: height - bottom, class: "mark"}));
            svg.append(make("text", {x: px(mark.x) + 4, y: top + 11, class: "axis"}, mark.text));
        }
        for (const line of lines) {
            const inside = line.points.filter(
                ([x, y]) => Number.isFinite(y) && y >= y0 && y <= y1 && x >= x0 && x <= x1);
            const path =
                inside.map(([x, y], i) => `${i ? "L" : "M"}${px(x).toFixed(1)} ${py(y).toFixed(1)}`).join("");
            if (inside.length > 1)
                svg.append(make("path", {
                    d: path,
                    fill: "none",
                    stroke: `var(--${line.key})`,
                    "stroke-dasharray": line.dash,
                    "stroke-width": line.thin ? 1.2 : 2.2,
                    opacity: line.thin ? 0.75 : 1
                }));
            if (line.dots)
                for (const [x, y] of inside)
                    svg.append(make("circle", {cx: px(x), cy: py(y), r: 3.2, fill: `var(--${line.key})`}));
        }
        box.replaceChildren(svg);
    }

    // Parts of red, green and blue between two colours #rrggbb.
    function mix(from, to, share) {
        return [1, 3, 5].map((i) => {
            const a = parseInt(from.slice(i, i + 2), 16), b = parseInt(to.slice(i, i + 2), 16);
            return Math.round(a + (b - a) * share);
        });
    }

    // The map of a matrix, causal: row t, column j. Shades go with the square root, so that small weights are
    // seen; its sign has a colour of its own. largest: what gets the darkest shade. letters: on both axes, if
    // given. Returns how far from the edge it begins.
    function map(canvas, {matrix, T, letters, cell, largest, picked = -1}) {
        const edge = letters ? Math.max(12, cell + 3) : 0, side = edge + cell * T,
              ratio = window.devicePixelRatio || 1;
        canvas.width = Math.round(side * ratio);
        canvas.height = Math.round(side * ratio);
        canvas.style.width = canvas.style.height = `${side}px`;
        const pen = canvas.getContext("2d"), paper = colour("paper"), positive = colour("positive"),
              negative = colour("negative");
        pen.scale(ratio, ratio);
        pen.fillStyle = colour("never");
        pen.fillRect(edge, edge, cell * T, cell * T);
        for (let t = 0; t < T; t++)
            for (let j = 0; j <= t; j++) {
                const weight = matrix[t * T + j],
                      share = Math.min(1, Math.sqrt(Math.abs(weight) / largest)) || 0;
                const [r, g, b] = mix(paper, weight < 0 ? negative : positive, share);
                pen.fillStyle = `rgb(${r},${g},${b})`;
                pen.fillRect(edge + j * cell, edge + t * cell, cell, cell);
            }
        if (picked >= 0) {
            pen.strokeStyle = colour("accent");
            pen.lineWidth = 1.5;
            pen.strokeRect(edge, edge + picked * cell, cell * (picked + 1), cell);
        }
        if (!letters) return edge;
        pen.textAlign = "center";
        pen.textBaseline = "middle";
        pen.font = `${Math.min(13, cell)}px ui-monospace, monospace`;
        for (let t = 0; t < T; t++) {
            pen.fillStyle = t === picked ? colour("accent") : colour("ink");
            pen.fillText(visible(letters[t]), edge + (t + 0.5) * cell, edge / 2);
            pen.fillText(visible(letters[t]), edge / 2, edge + (t + 0.5) * cell);
        }
        return edge;
    }

    // Arcs over a text: one row for each of `rows` [{name, weights (T)}], from the picked letter to those
    // that reach it; below them the letters and, if given, γ as bars, up where it is positive. pick(t): a
    // letter was pointed at.
    function arcs(box, {letters, picked, rows, gamma, pick}) {
        const T = letters.length, step = Math.max(10, Math.min(40, Math.floor((box.clientWidth - 16) / T))),
              high = 76, bars = gamma ? 66 : 0;
        const width = Math.max(step * T + 16, box.clientWidth),
              height = rows.length * (high + 18) + 26 + bars;
        const svg = make("svg", {width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true"});
        const x = (t) => 8 + step * (t + 0.5);
        rows.forEach((row, i) => {
            const base = (i + 1) * (high + 18), largest = Math.max(1e-12, ...row.weights.map(Math.abs));
            svg.append(make("text", {x: 8, y: base - high - 4, class: "axis strong"}, row.name));
            svg.append(make("line", {x1: 8, x2: 8 + step * T, y1: base, y2: base, class: "grid"}));
            row.weights.forEach((weight, j) => {
                const share = Math.abs(weight) / largest;
                if (share < 0.01) return;
                const from = x(j), to = x(picked), lift = Math.min(high, 12 + (to - from) * 0.45) * 1.25;
                const top = base - 26; // of its own arc
                const loop =
                    `M${from - 3} ${base}C${from - 12} ${top} ${from + 12} ${top} ${from + 3} ${base}`;
                const arc = `M${from} ${base}C${from} ${base - lift} ${to} ${base - lift} ${to} ${base}`;
                const stroke = `var(--${weight < 0 ? "negative" : "positive"})`,
                      title = `${letters[j]} ${weight.toPrecision(3)}`;
                const path = make(
                    "path", {
                        d: from === to ? loop : arc,
                        fill: "none",
                        stroke,
                        "stroke-width": 0.6 + 5 * share,
                        opacity: 0.25 + 0.65 * share
                    },
                    make("title", {}, title));
                svg.append(path);
            });
        });
        const base = rows.length * (high + 18) + 18;
        letters.forEach((letter, t) => {
            svg.append(make(
                "text",
                {x: x(t), y: base, "text-anchor": "middle", class: t === picked ? "letter picked" : "letter"},
                visible(letter)));
            if (!gamma) return;
            const tall = 26 * gamma[t], middle = base + 8 + 28;
            svg.append(make(
                "rect", {
                    x: x(t) - step * 0.36,
                    width: step * 0.72,
                    y: tall > 0 ? middle - tall : middle,
                    height: Math.max(0.5, Math.abs(tall)),
                    fill: `var(--${tall < 0 ? "negative" : "positive"})`
                },
                make("title", {}, `γ ${gamma[t].toFixed(3)}`)));
        });
        if (gamma) {
            svg.append(make("line", {x1: 8, x2: 8 + step * T, y1: base + 36, y2: base + 36, class: "grid"}));
        }
        svg.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event));
        svg.addEventListener("pointerdown", point);
        function point(event) {
            const t = Math.floor((event.clientX - svg.getBoundingClientRect().left - 8) / step);
            if (t >= 0 && t < T) pick(t);
        }
        box.replaceChildren(svg);
    }

    return {chart, map, arcs, visible, make};
})();
