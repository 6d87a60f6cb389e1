// Look: who hears whom in a text, and how far the memory reaches.
"use strict";

const seen = {
    T: 0,
    letters: [],
    picked: -1,
    rows: [],
    maps: {},
    slot: -1
};
let looking = 0;
const LETTERED = 160; // longer texts are drawn with less

function fillModels(slot) {
    for (const id of ["look-model", "knife-model"]) {
        const before = slot === undefined ? $(id).value : String(slot);
        $(id).replaceChildren(
            ...runs.map((run, i) => run ? element("option", {value: String(i)}, NAMES[MIXERS[i]]) : "")
                .filter(Boolean));
        if ([...$(id).options].some((option) => option.value === before)) $(id).value = before;
    }
    fillLayers();
}
function fillLayers() {
    const run = runs[Number($("look-model").value)];
    const fill = (id, names) => {
        const before = $(id).value;
        $(id).replaceChildren(...names.map(([value, name]) => element("option", {value}, name)));
        if (names.some(([value]) => value === before)) $(id).value = before;
    };
    fill(
        "look-layer",
        Array.from({length: run.info.layers}, (_, l) => [String(l), `${l + 1} of ${run.info.layers}`]));
    const heads = run.info.mixer === "mamba2" ?
        [] :
        Array.from({length: run.info.heads}, (_, h) => [String(h), `${h + 1} of ${run.info.heads}`]);
    fill("look-head", heads.length ? [["-1", "mean of all"], ...heads] : [["-1", "none"]]);
}

// Each byte of the text is a token; one that is a part of a character shows a dot.
function lettersOf(string) {
    return [...string].flatMap((c) => [c, ...new Array(new TextEncoder().encode(c).length - 1).fill("·")]);
}
const KINDS = {
    sessa: ["direct", "feedback", "solve"],
    attention: ["direct"],
    mamba2: ["chain"]
};

const look = guard(async () => {
    const turn = ++looking, slot = Number($("look-model").value), run = runs[slot];
    if (!run) return;
    const layer = Number($("look-layer").value), head = Number($("look-head").value),
          string = $("look-text").value;
    const letters = lettersOf(string), mixer = run.info.mixer,
          get = (kind, l, h) => ask("matrix", {kind: KIND[kind], layer: l, head: h, T: letters.length});
    $("look-state").textContent = "";
    let T;
    try {
        T = await ask("look", {slot, text: string});
    } catch (error) {
        $("look-state").textContent = error.message.replace("--prompt: the", "the");
        return;
    }
    const maps = {};
    for (const kind of [...KINDS[mixer], ...(mixer === "sessa" ? ["hops"] : [])])
        maps[kind] = await get(kind, layer, head);
    const gamma = mixer === "sessa" ? await ask("gamma", {layer, T}) : null;
    const all = [];
    for (let l = 0; l < run.info.layers && T <= LETTERED; l++) {
        const row = [];
        for (const kind of KINDS[mixer])
            for (let h = kind === "direct" ? 0 : -1; h < (kind === "direct" ? run.info.heads : 0); h++)
                row.push({kind, head: h, layer: l, matrix: await get(kind, l, h)});
        all.push(row);
    }
    if (turn !== looking) return; // it was asked again meanwhile
    Object.assign(seen, {T, letters, maps, gamma, slot, mixer, layer, head, all});
    if (seen.picked < 0 || seen.picked >= T) seen.picked = T - 1;
    const step = run.step ? `step ${run.step}` : run.loaded ? "loaded weights" : "untrained";
    $("look-state").textContent =
        `${step}; ${T} letters${T > run.info.seq ? `, trained on sequences of ${run.info.seq}` : ""}`;
    showArcs();
    showMaps();
    showOverview();
    if (seen.tailOf !== tailKey(slot, layer)) await tail(slot, layer);
});

function rowOf(matrix, t) { return [...matrix.slice(t * seen.T, t * seen.T + t + 1)]; }

function showArcs() {
    const {maps, picked, letters, mixer} = seen, rows = [];
    if (mixer === "sessa") {
        const all = rowOf(maps.solve, picked);
        all[picked] = 0; // its own f: no hop
        rows.push({name: "feedback, one hop: γα", weights: rowOf(maps.feedback, picked)});
        rows.push({name: "feedback, two hops: (γα)²", weights: rowOf(maps.hops, picked)});
        rows.push({name: "feedback, all hops: (I − γα)⁻¹ less I", weights: all});
    }
    const whose =
        seen.head < 0 ? "direct read: α, mean of all heads" : `direct read: α of head ${seen.head + 1}`;
    if (maps.direct) rows.push({name: whose, weights: rowOf(maps.direct, picked)});
    if (maps.chain)
        rows.push({name: "chain of states: what is left of it", weights: rowOf(maps.chain, picked)});
    draw.arcs($("arcs"), {letters, picked, rows, gamma: seen.gamma, pick});
    const bars = "Bars under the letters: γ of each, from −1 to 1, how much of the past comes back. ";
    $("arcs-note").textContent = (seen.gamma ? bars : "") + "Each row of arcs has a scale of its own.";
    const told = rows.map((row) => {
        const best = row.weights.map((weight, j) => [weight, j])
                         .sort((a, b) => Math.abs(b[0]) - Math.abs(a[0]))
                         .slice(0, 4)
                         .filter(([weight]) => weight);
        const each =
            best.map(([weight, j]) => `“${draw.visible(letters[j])}” ${picked - j} back ${short(weight)}`);
        return `${row.name}: ${each.join(", ") || "none"}`;
    });
    const gamma = seen.gamma ? ` γ ${minus(seen.gamma[picked].toFixed(3))}.` : "";
    $("arcs-list")
        .replaceChildren(
            `Letter ${picked + 1}, “${draw.visible(letters[picked])}”.${gamma} `,
            ...told.flatMap((line) => [element("br"), line]));
    $("arcs").setAttribute("aria-valuenow", picked + 1);
    $("arcs").setAttribute("aria-valuemax", seen.T);
    $("arcs").setAttribute("aria-valuetext", `letter ${picked + 1}, ${letters[picked]}`);
}
function pick(t) {
    if (t === seen.picked || t < 0 || t >= seen.T) return;
    seen.picked = t;
    const left = $("arcs").scrollLeft;
    showArcs();
    $("arcs").scrollLeft = left;
    showMaps();
}

// The largest weight that a map is shaded by; the solve's diagonal, which is 1, does not count.
function largestOf(matrix, T, strict) {
    let largest = 1e-12;
    for (let t = 0; t < T; t++)
        for (let j = 0; j < t + (strict ? 0 : 1); j++)
            largest = Math.max(largest, Math.abs(matrix[t * T + j]));
    return largest;
}
function showMaps() {
    const kinds = KINDS[seen.mixer];
    const boxes = kinds.map((kind) => $("maps").querySelector(`[data-kind="${kind}"]`) || mapBox(kind));
    if (boxes.some((box, i) => box !== $("maps").children[i]) || $("maps").children.length !== boxes.length)
        $("maps").replaceChildren(...boxes);
    // a long text's letters would make the map wider than a screen: it goes without
    const lettered = seen.T <= LETTERED, smallest = lettered ? 9 : 2, letters = lettered ? seen.letters : null;
    $("maps").style.setProperty("--map", `${13 + smallest * seen.T}px`);
    kinds.forEach((kind, i) => {
        const matrix = seen.maps[kind], room = boxes[i].clientWidth - 2;
        const cell = Math.max(smallest, Math.min(22, Math.floor((room - 14) / (seen.T + 1))));
        const largest = largestOf(matrix, seen.T, kind === "solve"), canvas = boxes[i].querySelector("canvas");
        boxes[i].cell = cell;
        boxes[i].edge = draw.map(canvas, {matrix, T: seen.T, letters, cell, largest, picked: seen.picked});
        const upTo = kind === "solve" ? "beside the diagonal of 1, up to" : "up to";
        const without = lettered ? "" : `; without letters above ${LETTERED}`;
        boxes[i].querySelector("p").textContent = `${upTo} ${largest.toPrecision(3)}${without}`;
    });
}
function mapBox(kind) {
    const canvas = element("canvas", {
        role: "img",
        "aria-label": `${TITLE[kind]}, a map; the list above tells its row of the chosen letter`
    });
    const box = element(
        "div", {"data-kind": kind}, element("h3", {}, TITLE[kind]), element("p", {className: "note"}),
        element("div", {className: "scroll"}, canvas));
    const point = (event) => {
        const rect = canvas.getBoundingClientRect();
        const t = Math.floor((event.clientY - rect.top - box.edge) / box.cell),
              j = Math.floor((event.clientX - rect.left - box.edge) / box.cell);
        if (t < 0 || t >= seen.T || j < 0 || j > t) return;
        const [hears, heard] = [seen.letters[t], seen.letters[j]].map(draw.visible);
        canvas.title =
            `${hears} hears ${heard}, ${t - j} back: ${seen.maps[kind][t * seen.T + j].toPrecision(3)}`;
        pick(t);
    };
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener(
        "pointermove", (event) => event.pointerType === "mouse" && seen.T <= LETTERED && point(event));
    return box;
}
function showOverview() {
    const {all, T} = seen;
    if (!all.length) {
        $("overview")
            .replaceChildren(element("p", {className: "note"}, `shown for texts of up to ${LETTERED} letters`));
        return;
    }
    const side = Math.max(1, Math.floor(64 / T)),
          title = ({kind, head}) => kind === "direct" ? `head ${head + 1}` :
        kind === "feedback" ? "γα" :
        kind === "solve"    ? "all hops" :
                              "chain";
    const table = element(
        "table", {className: "overview"},
        element("tr", {}, element("th"), ...all[0].map((entry) => element("th", {}, title(entry)))));
    all.forEach(
        (row, l) =>
            table.append(element("tr", {}, element("th", {}, `layer ${l + 1}`), ...row.map((entry) => {
                const canvas = element("canvas"), {kind, head, layer, matrix} = entry;
                draw.map(canvas, {matrix, T, cell: side, largest: largestOf(matrix, T, kind === "solve")});
                return element(
                    "td", {},
                    element(
                        "button", {
                            type: "button",
                            "aria-label": `layer ${layer + 1}, ${title(entry)}`,
                            onclick: () => {
                                $("look-layer").value = String(layer);
                                if (kind === "direct") $("look-head").value = String(head);
                                look();
                            }
                        },
                        canvas));
            }))));
    $("overview").replaceChildren(element("div", {className: "scroll"}, table));
}

// ----------------------------------------------------------------------------
// memory by lag, the three mixers beside each other

const TAIL = {
    T: 256,
    sources: 16,
    from: 4,
    to: 200
};
function tailKey(slot, layer) {
    return `${slot} ${layer} ${runs.map((run) => (run ? `${run.step}${run.info.out}` : "")).join(" ")}`;
}

async function tail(slot, layer) {
    const lines = [], rows = [], marks = [];
    seen.tailOf = tailKey(slot, layer);
    for (let other = 0; other < MIXERS.length; other++) {
        const run = runs[other], key = MIXERS[other];
        if (!run) continue;
        let numbers;
        try {
            numbers = await ask("tail", {slot: other, ...TAIL});
        } catch (error) {
            $("tail-note").textContent = error.message;
            return;
        }
        const l = Math.min(layer, run.info.layers - 1),
              own = numbers.subarray(l * (TAIL.T + 2), (l + 1) * (TAIL.T + 2));
        const points = [], [power, rate] = own.subarray(TAIL.T);
        for (let lag = 1; lag < TAIL.T - TAIL.sources; lag++) points.push([lag, own[lag]]);
        lines.push({points: points.filter(([, y]) => y > 0), key, dash: DASHES[key]});
        if (other !== 2 &&
            Number.isFinite(power)) { // the fitted power, drawn through the middle of its points
            const inside = points.filter(([x, y]) => x >= TAIL.from && x < TAIL.to && y > 0);
            const middle = (f) => inside.reduce((sum, point) => sum + f(point), 0) / inside.length;
            const a = middle(([, y]) => Math.log(y)) - power * middle(([x]) => Math.log(x));
            lines.push({
                points: [TAIL.from, TAIL.to].map((x) => [x, Math.exp(a + power * Math.log(x))]),
                key,
                thin: true
            });
        }
        rows.push(element(
            "tr", {},
            element("td", {}, element("span", {className: `key ${key}`}), `${NAMES[key]}, layer ${l + 1}`),
            element(
                "td", {},
                run.step ? `step ${run.step}` :
                    run.loaded ? "loaded" :
                                      "untrained"),
            element(
                "td", {className: "number"},
                ...(other !== 2 && Number.isFinite(power) ?
                        ["lag", element("sup", {}, minus(power.toFixed(2)))] :
                        ["no power"])),
            element(
                "td", {className: "number"},
                Number.isFinite(rate) ? `× ${Math.exp(rate).toFixed(4)}` : "none")));
    }
    if (runs[slot].info.seq < TAIL.T)
        marks.push({x: runs[slot].info.seq, text: `trained on ${runs[slot].info.seq}`});
    const values = lines.flatMap((line) => line.points.map(([, y]) => y)), top = Math.max(1, ...values);
    draw.chart($("tail"), {
        lines,
        log: true,
        xName: "lag in letters",
        yName: "weight",
        marks,
        xRange: [1, TAIL.T],
        yRange: [Math.max(1e-5, Math.min(...values)), top],
        height: 340
    });
    $("tail-note").textContent =
        "What a letter keeps of one that stands lag letters before it: the mean size of " +
        `the weight over ${TAIL.sources} letters of up to 4 windows of the kept-back text. ` +
        "It is Sessa's (I − γα)⁻¹, attention's α, Mamba-2's chain. " +
        "On these axes a power of the lag is a straight line. " +
        `Thin: the fit, lags ${TAIL.from} to ${TAIL.to}.`;
    $("tail-table")
        .replaceChildren(element(
            "table", {},
            element(
                "tr", {},
                ...["", "", "fitted power", "or, a factor each letter"].map(
                    (name, i) => element("th", {className: i > 1 ? "number" : ""}, name))),
            ...rows));
    seen.tail = lines;
}
