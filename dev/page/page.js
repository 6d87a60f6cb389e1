/*
The page: it asks the worker, and draws what comes back. A call of the worker that fails is one line in the status, and
changes nothing. A worker that is gone is started again, with the runs that it had saved last.
*/
"use strict";
const MIXERS = ["sessa", "attention", "mamba2"]; // a slot of the worker is the place in this list
const NAMES = {sessa: "Sessa", attention: "attention", mamba2: "Mamba-2"};
const DASHES = {sessa: undefined, attention: "7 3", mamba2: "2 3"};
const TITLE = {direct: "Direct read: α", feedback: "Feedback, one hop: γα", hops: "Two hops: (γα)²",
    solve: "All hops: (I − γα)⁻¹", chain: "Chain of states"};
const KIND = {direct: 0, feedback: 1, hops: 2, solve: 3, chain: 4};
const $ = (id) => document.getElementById(id);

const runs = [];                                                // by slot: what the page knows of a run
let text = {name: TEXT_NAME, bytes: new TextEncoder().encode(TEXT)};
let chosen = [];                                                // the slots that were trained last
let part = "train";

function say(message, kind = "") {
    $("status").textContent = message;
    $("status").className = kind;
}
function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
        if (key in made && key !== "list") made[key] = value;
        else made.setAttribute(key, value);
    }
    made.append(...children);
    return made;
}
const short = (x) => minus(Math.abs(x) < 5e-4 && x ? x.toExponential(0) : x.toFixed(3));
const minus = (string) => string.replace("-", "−");

// Runs what may fail; then its line is said.
function guard(action) {
    return async (...values) => {
        try {
            await action(...values);
        } catch (error) {
            say(error.message, "bad");
        }
    };
}

// ----------------------------------------------------------------------------
// the worker

let worker = null, waiting = new Map(), questions = 0, pinged = 0, restarts = 0;

function ask(call, data = {}) {
    return new Promise((resolve, reject) => {
        const id = ++questions;
        waiting.set(id, {resolve, reject, call});
        worker.postMessage({id, call, ...data});
    });
}

function startWorker() {
    const url = URL.createObjectURL(new Blob([WORKER], {type: "text/javascript"}));
    worker = new Worker(url);
    pinged = 0;
    return new Promise((resolve, reject) => {
        worker.onmessage = ({data}) => {
            pinged = 0;
            if (data.ready) resolve();
            else if (data.fatal) lose(data.fatal);
            else if (data.id === undefined) progress(data);
            else {
                const {resolve, reject} = waiting.get(data.id);
                waiting.delete(data.id);
                if (data.error === undefined) resolve(data.result);
                else reject(new Error(data.error));
            }
        };
        worker.onerror = (event) => {
            event.preventDefault();
            reject(new Error(`the program did not start: ${event.message}`));
            lose(event.message);
        };
    });
}

// The worker is gone: another takes its place, with every run as it was saved last.
const lose = guard(async (why) => {
    worker.terminate();
    for (const {reject} of waiting.values()) reject(new Error("the worker was closed; the question is lost"));
    waiting.clear();
    if (++restarts > 3) throw new Error(`the worker stops again and again (${why}): reload the page`);
    say(`the worker was closed (${why}); starting it again…`, "bad");
    await startWorker();
    const before = runs.slice();
    for (const run of before) {
        if (!run) continue;
        await openRun(run.source.words, run.source.files, run);
        cutBack(run);
    }
    const active = before.map((run, slot) => (run && run.active ? slot : -1)).filter((slot) => slot >= 0);
    if (active.length) await ask("train", {slots: active});
    showRuns();
    say("the worker was closed and is started again; the runs go on from where they were saved last");
});

// A worker that ends says nothing: it is asked, and given up when it does not answer.
setInterval(() => {
    if (!worker) return;
    const asked = [...waiting.values()].some(({call}) => call !== "ping");
    if (!pinged) {
        pinged = performance.now();
        ask("ping").catch(() => {});
    } else if (performance.now() - pinged > (asked ? 60000 : 6000)) {
        pinged = 0;
        lose("no answer");
    }
}, 1000);

// ----------------------------------------------------------------------------
// train

function settings() {
    const form = new FormData($("settings"));
    const [dim, layers, heads] = form.get("size").split(",");
    const steps = form.get("steps").trim();
    const every = Math.min(100, Math.max(5, Math.round(Number(steps) / 20) || 50));
    return {mixer: form.get("mixer"), words: [`--data=${text.name}`, `--dim=${dim}`, `--layers=${layers}`, `--heads=${heads}`,
        ...["seq", "steps", "batch", "lr", "seed"].map((name) => `--${name}=${form.get(name).trim()}`),
        `--eval-every=${every}`, "--eval-batches=10", "--save-every=1000000000000"]};
}

// Opens a run in the worker. before: the run that it goes on with.
async function openRun(words, files, before) {
    const info = await ask("open", {words, files});
    runs[info.slot] = Object.assign(before || {points: new Map(), kept: new Map(), sample: ""}, {info, source: {words, files}, text,
        step: info.step, steps: info.steps});
    if (before) before.info = info;
    return info;
}
// What was drawn beyond the step that a run is taken up at is not so any more.
function cutBack(run) {
    for (const map of [run.points, run.kept]) for (const step of map.keys()) if (step > run.step) map.delete(step);
}

const start = guard(async () => {
    const {mixer, words} = settings(), wanted = mixer === "all" ? MIXERS : [mixer];
    const slots = [];
    await ask("train", {slots: []});
    for (const run of runs) if (run) run.active = false;
    for (const name of wanted) slots.push((await openRun([...words, `--mixer=${name}`], {[text.name]: text.bytes})).slot);
    say(`training on ${text.name}`);
    await train(slots);
    fillModels();
});

async function train(slots) {
    chosen = slots;
    runs.forEach((run, slot) => { if (run) run.active = slots.includes(slot) && run.step < run.steps; });
    await ask("train", {slots});
    showRuns();
}

const stop = guard(async () => {
    await ask("train", {slots: []});
    for (const run of runs) if (run) run.active = false;
    say("stopped; Go on continues exactly where it was");
    showRuns();
});

// Goes on; a run that is at its end gets as many steps more as the form says.
const goOn = guard(async () => {
    const more = Number(new FormData($("settings")).get("steps")) || 0;
    for (const slot of chosen) {
        const run = runs[slot];
        if (run.step < run.steps) continue;
        const files = await ask("save", {slot}), steps = run.steps + more;
        await openRun([...resumeWords(run.text.name), `--steps=${steps}`, `--decay-steps=${steps}`], resumeFiles(run, files), run);
    }
    say("going on");
    await train(chosen);
});
function resumeWords(name) { return ["--resume={run}.safetensors", `--data=${name}`, "--eval-every=50", "--eval-batches=10",
    "--save-every=1000000000000"]; }
function resumeFiles(run, files) {
    const out = {[run.text.name]: run.text.bytes, "{run}.safetensors": files.run};
    if (files.best) out["{run}.best.safetensors"] = files.best;
    return out;
}

// News of a run that trains.
function progress({slot, lines, step, steps, rate, done, error, files}) {
    const run = runs[slot];
    if (!run) return;
    let judged = false;
    for (const entry of lines) {
        run.points.set(entry.step, entry.train_loss);
        if (entry.val_loss !== undefined && entry.val_loss !== null && run.kept.get(entry.step) !== entry.val_loss) {
            run.kept.set(entry.step, entry.val_loss);
            judged = true;
        }
    }
    Object.assign(run, {step, steps, rate});
    if (files) run.source = {words: resumeWords(run.text.name), files: resumeFiles(run, files)};
    if (done) run.active = false;
    if (error) say(error, "bad");
    else if (done && runs.every((other) => !other || !other.active)) say("done", "good");
    if (judged || done) write(slot);
    later("loss", showLoss);
    later("runs", showRuns);
    if (done && part === "look") later("look", look);
}

// Draws once a frame, however often it is asked to.
const planned = new Set();
function later(name, action) {
    if (planned.has(name)) return;
    planned.add(name);
    requestAnimationFrame(() => {
        planned.delete(name);
        action();
    });
}

function showLoss() {
    const lines = [];
    runs.forEach((run, slot) => {
        const key = MIXERS[slot];
        lines.push({points: [...run.points], key, thin: true, dash: DASHES[key]});
        lines.push({points: [...run.kept].sort((a, b) => a[0] - b[0]), key, dots: true, dash: DASHES[key]});
    });
    const last = Math.max(1, ...runs.map((run) => (run && run.points.size ? run.steps : 0)));
    draw.chart($("loss"), {lines, xName: "step", yName: "loss", empty: "Train draws the curve here",
        xRange: lines.some((line) => line.points.length) ? [0, last] : undefined});
}

function showRuns() {
    const active = runs.some((run) => run && run.active);
    $("stop").disabled = !active;
    $("go-on").disabled = active || !chosen.length;
    $("go-on").textContent = chosen.length && chosen.every((slot) => runs[slot].step >= runs[slot].steps) ? "Go on for more steps" : "Go on";
    const body = element("tbody");
    runs.forEach((run, slot) => {
        const last = [...run.points.values()].pop(), kept = [...run.kept.values()].pop(), name = MIXERS[slot];
        const key = element("span", {className: `key ${name}`});
        const save = (label, which) => element("button", {type: "button", disabled: !run.step, onclick: () => saveRun(slot, which)}, label);
        body.append(element("tr", {},
            element("td", {}, key, NAMES[name]),
            element("td", {}, run.step || run.active ? `step ${run.step} of ${run.steps}` : run.info.loaded ? "loaded" : "untrained"),
            element("td", {className: "number", "data-name": "loss"}, last === undefined ? "" : last.toFixed(4)),
            element("td", {className: "number", "data-name": "kept back"}, kept === undefined ? "" : kept.toFixed(4)),
            element("td", {className: "number", "data-name": "letters/s"}, run.active && run.rate ? `${Math.round(run.rate * run.info.batch * run.info.seq)}` : ""),
            element("td", {}, `${run.info.dim} wide, ${run.info.layers} layers, ${run.info.parameters} weights`),
            element("td", {}, save("Save the run", "run"), " ", save("Save the best weights", "best"))));
    });
    const head = element("tr", {}, ...["mixer", "", "loss", "kept back", "letters/s", "model", ""].map((title, i) =>
        element("th", {className: i > 1 && i < 5 ? "number" : ""}, title)));
    // the buttons must not vanish under a finger: the table is made anew only where it changes
    const table = element("table", {}, element("thead", {}, head), body), old = $("runs").querySelector("table");
    if (!old || !sameShape(old, table)) $("runs").replaceChildren(element("div", {className: "scroll"}, table));
    else [...table.querySelectorAll("td")].forEach((cell, i) => {
        const shown = old.querySelectorAll("td")[i];
        if (!cell.querySelector("button, span")) shown.textContent = cell.textContent;
        cell.querySelectorAll("button").forEach((button, k) => { shown.querySelectorAll("button")[k].disabled = button.disabled; });
    });
}
function sameShape(a, b) { return a.querySelectorAll("td").length === b.querySelectorAll("td").length; }

function download(name, bytes) {
    const url = URL.createObjectURL(new Blob([bytes]));
    element("a", {href: url, download: name}).click();
    setTimeout(() => URL.revokeObjectURL(url), 10000);
}
const saveRun = guard(async (slot, which) => {
    const files = await ask("save", {slot}), name = MIXERS[slot];
    if (which === "best" && !files.best) throw new Error("there are no best weights before the first validation");
    download(which === "run" ? `${name}.safetensors` : `${name}.best.safetensors`, files[which]);
    say(which === "run" ? `saved: ./train_sessa --resume ${name}.safetensors --data ${runs[slot].text.name} goes on with it`
        : `saved: ./train_sessa --load ${name}.best.safetensors --generate 500 writes with it`, "good");
});

// What the run writes now.
const write = guard(async (slot) => {
    const run = runs[slot];
    if (run.writing) return;
    run.writing = true;
    try {
        const temperature = Number($("temperature").value);
        if (!(temperature >= 0 && $("temperature").value.trim())) throw new Error(`a temperature is a number from 0 on, not '${$("temperature").value}'`);
        run.sample = await ask("sample", {slot, prompt: $("prompt").value, n: 240, temperature, seed: 1337 + run.step});
        run.sampledAt = run.step;
    } finally {
        run.writing = false;
    }
    showSamples();
});
function showSamples() {
    $("samples").replaceChildren(...runs.map((run, slot) => !run || !run.sample ? "" : element("div", {},
        element("h3", {}, element("span", {className: `key ${MIXERS[slot]}`}), `${NAMES[MIXERS[slot]]}, step ${run.sampledAt}`),
        element("pre", {}, run.sample.replace(/\n$/, "")))));
}

// ----------------------------------------------------------------------------
// files

function safeName(name) { return name.replace(/[^A-Za-z0-9._-]/g, "_").replace(/^[.-]+/, "") || "text.txt"; }

const takeFile = guard(async (file) => {
    const bytes = new Uint8Array(await file.arrayBuffer()), name = safeName(file.name);
    if (/\.safetensors$/.test(name)) return takeCheckpoint(name, bytes);
    try {
        const n = await ask("check", {name, bytes});
        text = {name, bytes};
        showText();
        say(`${name}: a text of ${n} bytes; Train begins with it`, "good");
    } catch (error) {
        throw new Error(`${error.message.replace(/; --format bytes.*/, "")}; ${text.name} stays`);
    }
});

// A run goes on, weights alone are a beginning. Where a run's text is another one, its weights are taken.
async function takeCheckpoint(name, bytes) {
    let info, loaded = false;
    const files = {[text.name]: text.bytes};
    try {
        info = await openRun(resumeWords(text.name), {...files, "{run}.safetensors": bytes});
    } catch (error) {
        const words = settings().words.filter((word) => !/^--(dim|layers|heads|seq)=/.test(word));
        try {
            info = await openRun([...words, "--load={run}.load"], {...files, "{run}.load": bytes});
        } catch (second) {
            const line = second.message.replaceAll(/\/?run\d+\.load/g, name);
            throw new Error(/lacks|vocabulary/.test(line) ? `${line}; drop the text that the model was trained on first` : line);
        }
        loaded = info.loaded = true;
    }
    runs[info.slot].active = false;
    chosen = [info.slot];
    say(loaded ? `${name}: weights loaded (${NAMES[info.mixer]}, ${info.dim} wide, ${info.layers} layers); Go on trains from them`
        : `${name}: a run at step ${info.step} of ${info.steps}; Go on continues it`, "good");
    showRuns();
    showLoss();
    write(info.slot);
    fillModels(info.slot);
    if (part === "look") look();
    if (part === "knife") knife();
}

function showText() { $("text-name").textContent = `${text.name}, ${text.bytes.length} bytes`; }

// ----------------------------------------------------------------------------
// look

const seen = {T: 0, letters: [], picked: -1, rows: [], maps: {}, slot: -1};
let looking = 0;

function fillModels(slot) {
    for (const id of ["look-model", "knife-model"]) {
        const before = slot === undefined ? $(id).value : String(slot);
        $(id).replaceChildren(...runs.map((run, i) => run ? element("option", {value: String(i)}, NAMES[MIXERS[i]]) : "").filter(Boolean));
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
    fill("look-layer", Array.from({length: run.info.layers}, (_, l) => [String(l), `${l + 1} of ${run.info.layers}`]));
    const heads = run.info.mixer === "mamba2" ? [] : Array.from({length: run.info.heads}, (_, h) => [String(h), `${h + 1} of ${run.info.heads}`]);
    fill("look-head", heads.length ? [["-1", "mean of all"], ...heads] : [["-1", "none"]]);
}

// Each byte of the text is a token; one that is a part of a character shows a dot.
function lettersOf(string) {
    return [...string].flatMap((c) => [c, ...new Array(new TextEncoder().encode(c).length - 1).fill("·")]);
}
const KINDS = {sessa: ["direct", "feedback", "solve"], attention: ["direct"], mamba2: ["chain"]};

const look = guard(async () => {
    const turn = ++looking, slot = Number($("look-model").value), run = runs[slot];
    if (!run) return;
    const layer = Number($("look-layer").value), head = Number($("look-head").value), string = $("look-text").value;
    const letters = lettersOf(string), mixer = run.info.mixer, get = (kind, l, h) => ask("matrix", {kind: KIND[kind], layer: l, head: h, T: letters.length});
    $("look-state").textContent = "";
    let T;
    try {
        T = await ask("look", {slot, text: string});
    } catch (error) {
        $("look-state").textContent = error.message.replace("--prompt: the", "the");
        return;
    }
    const maps = {};
    for (const kind of [...KINDS[mixer], ...(mixer === "sessa" ? ["hops"] : [])]) maps[kind] = await get(kind, layer, head);
    const gamma = mixer === "sessa" ? await ask("gamma", {layer, T}) : null;
    const all = [];
    for (let l = 0; l < run.info.layers && T <= 160; l++) {
        const row = [];
        for (const kind of KINDS[mixer])
            for (let h = kind === "direct" ? 0 : -1; h < (kind === "direct" ? run.info.heads : 0); h++) row.push({kind, head: h, layer: l, matrix: await get(kind, l, h)});
        all.push(row);
    }
    if (turn !== looking) return; // it was asked again meanwhile
    Object.assign(seen, {T, letters, maps, gamma, slot, mixer, layer, head, all});
    if (seen.picked < 0 || seen.picked >= T) seen.picked = T - 1;
    const step = run.step ? `step ${run.step}` : run.info.loaded ? "loaded weights" : "untrained";
    $("look-state").textContent = `${step}; ${T} letters${T > run.info.seq ? `, trained on sequences of ${run.info.seq}` : ""}`;
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
    if (maps.direct) rows.push({name: seen.head < 0 ? "direct read: α, mean of all heads" : `direct read: α of head ${seen.head + 1}`, weights: rowOf(maps.direct, picked)});
    if (maps.chain) rows.push({name: "chain of states: what is left of it", weights: rowOf(maps.chain, picked)});
    draw.arcs($("arcs"), {letters, picked, rows, gamma: seen.gamma, pick});
    $("arcs-note").textContent = seen.gamma ? "Bars under the letters: γ of each, from −1 to 1: how much of the past comes back. Each row of arcs has a scale of its own."
        : "Each row of arcs has a scale of its own.";
    const told = rows.map((row) => {
        const best = row.weights.map((weight, j) => [weight, j]).sort((a, b) => Math.abs(b[0]) - Math.abs(a[0])).slice(0, 4).filter(([weight]) => weight);
        return `${row.name}: ${best.length ? best.map(([weight, j]) => `“${draw.visible(letters[j])}” ${picked - j} back ${short(weight)}`).join(", ") : "none"}`;
    });
    const gamma = seen.gamma ? ` γ ${minus(seen.gamma[picked].toFixed(3))}.` : "";
    $("arcs-list").replaceChildren(`Letter ${picked + 1}, “${draw.visible(letters[picked])}”.${gamma} `, ...told.flatMap((line) => [element("br"), line]));
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
    for (let t = 0; t < T; t++) for (let j = 0; j < t + (strict ? 0 : 1); j++) largest = Math.max(largest, Math.abs(matrix[t * T + j]));
    return largest;
}
function showMaps() {
    const kinds = KINDS[seen.mixer];
    const boxes = kinds.map((kind) => $("maps").querySelector(`[data-kind="${kind}"]`) || mapBox(kind));
    if (boxes.some((box, i) => box !== $("maps").children[i]) || $("maps").children.length !== boxes.length) $("maps").replaceChildren(...boxes);
    $("maps").style.setProperty("--map", `${13 + 9 * seen.T}px`);
    kinds.forEach((kind, i) => {
        const matrix = seen.maps[kind], room = boxes[i].clientWidth - 2;
        const cell = Math.max(9, Math.min(22, Math.floor((room - 14) / (seen.T + 1)))), largest = largestOf(matrix, seen.T, kind === "solve");
        draw.map(boxes[i].querySelector("canvas"), {matrix, T: seen.T, letters: seen.letters, cell, largest, picked: seen.picked});
        boxes[i].cell = cell;
        boxes[i].querySelector("p").textContent = `${kind === "solve" ? "beside the diagonal of 1, up to" : "up to"} ${largest.toPrecision(3)}`;
    });
}
function mapBox(kind) {
    const canvas = element("canvas", {role: "img", "aria-label": `${TITLE[kind]}, a map; the list above tells its row of the chosen letter`});
    const box = element("div", {"data-kind": kind}, element("h3", {}, TITLE[kind]), element("p", {className: "note"}), element("div", {className: "scroll"}, canvas));
    const point = (event) => {
        const edge = Math.max(12, box.cell + 3), rect = canvas.getBoundingClientRect();
        const t = Math.floor((event.clientY - rect.top - edge) / box.cell), j = Math.floor((event.clientX - rect.left - edge) / box.cell);
        if (t < 0 || t >= seen.T || j < 0 || j > t) return;
        canvas.title = `${draw.visible(seen.letters[t])} hears ${draw.visible(seen.letters[j])}, ${t - j} back: ${seen.maps[kind][t * seen.T + j].toPrecision(3)}`;
        pick(t);
    };
    canvas.addEventListener("pointerdown", point);
    canvas.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event));
    return box;
}
function showOverview() {
    const {all, T} = seen;
    if (!all.length) {
        $("overview").replaceChildren(element("p", {className: "note"}, "shown for texts of up to 160 letters"));
        return;
    }
    const side = Math.max(1, Math.floor(64 / T)), title = ({kind, head}) => kind === "direct" ? `head ${head + 1}` : kind === "feedback" ? "γα" : kind === "solve" ? "all hops" : "chain";
    const table = element("table", {className: "overview"}, element("tr", {}, element("th"), ...all[0].map((entry) => element("th", {}, title(entry)))));
    all.forEach((row, l) => table.append(element("tr", {}, element("th", {}, `layer ${l + 1}`), ...row.map((entry) => {
        const canvas = element("canvas"), {kind, head, layer, matrix} = entry;
        draw.map(canvas, {matrix, T, cell: side, largest: largestOf(matrix, T, kind === "solve")});
        return element("td", {}, element("button", {type: "button", "aria-label": `layer ${layer + 1}, ${title(entry)}`, onclick: () => {
            $("look-layer").value = String(layer);
            if (kind === "direct") $("look-head").value = String(head);
            look();
        }}, canvas));
    }))));
    $("overview").replaceChildren(element("div", {className: "scroll"}, table));
}

// ----------------------------------------------------------------------------
// memory by lag, the three mixers beside each other

const TAIL = {T: 256, sources: 16, from: 4, to: 200};
function tailKey(slot, layer) { return `${slot} ${layer} ${runs.map((run) => (run ? `${run.step}${run.info.out}` : "")).join(" ")}`; }

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
        const l = Math.min(layer, run.info.layers - 1), own = numbers.subarray(l * (TAIL.T + 2), (l + 1) * (TAIL.T + 2));
        const points = [], [power, rate] = own.subarray(TAIL.T);
        for (let lag = 1; lag < TAIL.T - TAIL.sources; lag++) points.push([lag, own[lag]]);
        lines.push({points: points.filter(([, y]) => y > 0), key, dash: DASHES[key]});
        if (other !== 2 && Number.isFinite(power)) { // the fitted power, drawn through the middle of its points
            const inside = points.filter(([x, y]) => x >= TAIL.from && x < TAIL.to && y > 0);
            const middle = (f) => inside.reduce((sum, point) => sum + f(point), 0) / inside.length;
            const a = middle(([, y]) => Math.log(y)) - power * middle(([x]) => Math.log(x));
            lines.push({points: [TAIL.from, TAIL.to].map((x) => [x, Math.exp(a + power * Math.log(x))]), key, thin: true});
        }
        rows.push(element("tr", {}, element("td", {}, element("span", {className: `key ${key}`}), `${NAMES[key]}, layer ${l + 1}`),
            element("td", {}, run.step ? `step ${run.step}` : run.info.loaded ? "loaded" : "untrained"),
            element("td", {className: "number"}, ...(other !== 2 && Number.isFinite(power) ? ["lag", element("sup", {}, minus(power.toFixed(2)))] : ["no power"])),
            element("td", {className: "number"}, Number.isFinite(rate) ? `× ${Math.exp(rate).toFixed(4)}` : "none")));
    }
    if (runs[slot].info.seq < TAIL.T) marks.push({x: runs[slot].info.seq, text: `trained on ${runs[slot].info.seq}`});
    const values = lines.flatMap((line) => line.points.map(([, y]) => y)), top = Math.max(1, ...values);
    draw.chart($("tail"), {lines, log: true, xName: "lag in letters", yName: "weight", marks, xRange: [1, TAIL.T],
        yRange: [Math.max(1e-7, Math.min(...values)), top], height: 340});
    $("tail-note").textContent = `What a letter keeps of one that stands lag letters before it: the mean size of the weight over ${TAIL.sources} letters of up to 4 ` +
        `windows of the kept-back text: Sessa's (I − γα)⁻¹, attention's α, Mamba-2's chain. On these axes a power of the lag is a straight line; thin: the fit, lags ${TAIL.from} to ${TAIL.to}.`;
    $("tail-table").replaceChildren(element("table", {}, element("tr", {}, ...["", "", "fitted power", "or, a factor each letter"].map((name, i) => element("th", {className: i > 1 ? "number" : ""}, name))), ...rows));
    seen.tail = lines;
}

// ----------------------------------------------------------------------------
// step by step

const three = {seed: 1, inputs: [1, 0.5, -0.5, 1, 0.8, -0.3, 0.2, 0, 0, -0.4, 1, -0.5], params: null, stage: -1, at: -1, shown: new Map()};
const STAGE = {linear_forward: "ā → q, k, v, q′, k′", rope_forward: "RoPE", attention_forward: "direct read → f", gain_forward: "γ",
    feedback_forward: "feedback → s", feedback_backward: "feedback ← λ", attention_backward: "direct read ←", rope_backward: "RoPE ←",
    linear_backward: "dā, dW ←", gain_backward: "γ ←"};

const askThree = guard(async (fresh) => {
    const result = await ask("three", {seed: fresh ? three.seed : undefined, params: fresh ? undefined : three.params, inputs: three.inputs});
    Object.assign(three, result);
    if (fresh) showWeights();
    findStages();
    showEquations();
    showStages();
});

// The function that a line of the listing belongs to.
function functionAt(line) { return LISTING.functions.find((f) => line >= f.first && line <= f.last); }

// The notes in parts: each function that the mixer calls, with what that calls in turn.
function findStages() {
    three.stages = [];
    let t = -1;
    for (const note of three.notes) {
        const f = functionAt(note.line).name;
        if (note.kind === -1) {
            const last = three.stages[three.stages.length - 1];
            const nested = f === "softmax_row" || (f === "rope_forward" && last && last.name === "rope_backward" && !last.notes.length);
            if (nested) last.functions.add(f);
            else three.stages.push({name: f, functions: new Set([f]), notes: []});
            if (!nested) t = -1;
        } else if (note.kind === -2) {
            t = note.value;
        } else {
            note.t = t;
            note.label = labelOf(note);
            three.stages[three.stages.length - 1].notes.push(note);
        }
    }
    if (three.stage < 0) three.stage = three.stages.findIndex((stage) => stage.name === "feedback_forward");
}

const PARTS = ["q", "k", "v", "fb_q", "fb_k"];
// What a number is called: the code's own name of it, with the indices that the address tells.
function labelOf(note) {
    const expression = LISTING.names[note.line][note.kind], base = expression.match(/^\w+/)[0];
    if (!expression.includes("[") || !note.place) return base;
    const [which, offset] = note.place, table = three.tables[which === 1 ? 1 : 0];
    const tensor = table.filter((row) => offset >= row.offset && offset < row.offset + row.count && !(which === 1 && row.stride > row.shape[row.shape.length - 1]))[0];
    const name = tensor.name.replace(/^layers\.0\./, "").replace(/^mixer\./, ""), index = offset - tensor.offset;
    let row = Math.floor(index / tensor.stride), column = index % tensor.stride, short = base.replace(/_[tbh]$/, "");
    if (name === "scratch") return `${short}[${note.t}][${index % 3}]`;
    if (name === "proj" || name === "dproj") {
        const partName = PARTS[column >> 1];
        column &= 1;
        if (/^(out|pair|inp)$/.test(base)) short = name === "dproj" ? `d${partName}` : partName;
    } else if (/^(dweight|dbias|weight|bias)$/.test(base)) {
        short = `d ${name}`;
    } else if (/^(dinp|dx)$/.test(base)) {
        short = name;
    }
    const rows = tensor.count / tensor.stride;
    return rows > 1 ? `${short}[${row}][${column}]` : `${short}[${column}]`;
}

function tensorOf(name) { return three.tables[1].find((row) => row.name === name || row.name === `layers.0.${name}`); }
function valuesOf(name) { // rows of numbers of an activation
    const row = tensorOf(name), width = row.shape[row.shape.length - 1], out = [];
    for (let at = row.offset; out.length * width < row.count; at += row.stride) out.push([...three.acts.subarray(at, at + width)]);
    return out;
}
const number = (x) => minus((Math.abs(x) < 5e-5 ? 0 : x).toFixed(4));

// A number of the equations; what has moved since the last time is marked.
function shown(key, x) {
    const before = three.shown.get(key), moved = before !== undefined && number(before) !== number(x);
    three.shown.set(key, x);
    return `<span${moved ? ' class="changed"' : ""} data-key="${key}">${number(x)}</span>`;
}
function showEquations() {
    const f = valuesOf("f"), s = valuesOf("s"), gamma = valuesOf("gamma")[0], lambda = valuesOf("ds"), dabar = valuesOf("dabar");
    const alpha = [[], [0], [0, 0]], dgamma = [], find = (name) => three.stages.find((stage) => stage.name === name);
    for (const note of find("feedback_forward").notes)
        if (note.label.startsWith("weights[") && note.t > 0) alpha[note.t][note.place[1] % 3 - tensorOf("scratch").offset % 3] = note.value;
    for (const note of find("feedback_backward").notes) if (note.label.startsWith("dgamma[")) dgamma[note.t] = note.value;
    const ds = [0, 1, 2].map((t) => three.inputs.slice(6 + 2 * t, 8 + 2 * t));
    const pair = (key, x) => `(${shown(`${key}0`, x[0])}, ${shown(`${key}1`, x[1])})`;
    const g = (t) => shown(`γ${t}`, gamma[t]), a = (t, j) => shown(`α${t}${j}`, alpha[t][j]);
    const parts = {f: f.map((x, t) => pair(`f${t}`, x)), s: s.map((x, t) => pair(`s${t}`, x)), l: lambda.map((x, t) => pair(`λ${t}`, x)), d: ds.map((x, t) => pair(`ds${t}`, x))};
    const gammas = [0, 1, 2].map(g), alphas = {10: a(1, 0), 20: a(2, 0), 21: a(2, 1)};
    const card = (title, ...lines) => `<div class="card"><h3>${title}</h3>${lines.map((line) => `<div>${line}</div>`).join("")}</div>`;
    $("equations").innerHTML = card("What there is before: f, γ, α",
        ...parts.f.map((x, t) => `f<sub>${t}</sub> = ${x} &nbsp; γ<sub>${t}</sub> = ${gammas[t]}`),
        `α<sub>10</sub> = ${alphas[10]} <span class="why">one past row: 1</span>`, `α<sub>20</sub> = ${alphas[20]} &nbsp; α<sub>21</sub> = ${alphas[21]}`) +
        card("Forward: s<sub>t</sub> = f<sub>t</sub> + γ<sub>t</sub> Σ α<sub>tj</sub> s<sub>j</sub>, from the first row",
            `s<sub>0</sub> = f<sub>0</sub> = ${parts.s[0]}`,
            "s<sub>1</sub> = f<sub>1</sub> + γ<sub>1</sub> s<sub>0</sub>", `&nbsp;&nbsp; = ${parts.f[1]} + ${gammas[1]} · ${parts.s[0]}`, `&nbsp;&nbsp; = ${parts.s[1]}`,
            "s<sub>2</sub> = f<sub>2</sub> + γ<sub>2</sub> (α<sub>20</sub> s<sub>0</sub> + α<sub>21</sub> s<sub>1</sub>)",
            `&nbsp;&nbsp; = ${parts.f[2]} + ${gammas[2]} · (${alphas[20]} ${parts.s[0]} + ${alphas[21]} ${parts.s[1]})`, `&nbsp;&nbsp; = ${parts.s[2]}`) +
        card("Backward: λ<sub>j</sub> = ds<sub>j</sub> + Σ γ<sub>t</sub> α<sub>tj</sub> λ<sub>t</sub>, from the last row",
            `λ<sub>2</sub> = ds<sub>2</sub> = ${parts.l[2]}`,
            "λ<sub>1</sub> = ds<sub>1</sub> + γ<sub>2</sub> α<sub>21</sub> λ<sub>2</sub>", `&nbsp;&nbsp; = ${parts.d[1]} + ${gammas[2]} · ${alphas[21]} ${parts.l[2]}`, `&nbsp;&nbsp; = ${parts.l[1]}`,
            "λ<sub>0</sub> = ds<sub>0</sub> + γ<sub>1</sub> λ<sub>1</sub> + γ<sub>2</sub> α<sub>20</sub> λ<sub>2</sub>", `&nbsp;&nbsp; = ${parts.d[0]} + ${gammas[1]} · ${parts.l[1]} + ${gammas[2]} · ${alphas[20]} ${parts.l[2]}`, `&nbsp;&nbsp; = ${parts.l[0]}`) +
        card("What goes on backward", ...[0, 1, 2].map((t) => `df<sub>${t}</sub> = λ<sub>${t}</sub> &nbsp; dγ<sub>${t}</sub> = δ<sub>${t}</sub> = ${shown(`dγ${t}`, dgamma[t])} &nbsp; dā<sub>${t}</sub> = ${pair(`dā${t}`, dabar[t])}`));
}

function showStages() {
    $("stages").replaceChildren(...three.stages.map((stage, i) => element("button", {type: "button", "aria-pressed": String(i === three.stage),
        title: stage.name, onclick: () => {
            three.stage = i;
            three.at = -1;
            showStages();
        }}, STAGE[stage.name] || stage.name)));
    const {notes} = three.stages[three.stage];
    if (three.at < 0 || three.at >= notes.length) three.at = notes.length - 1;
    $("at").max = notes.length - 1;
    showListing();
}
function escape(string) { return string.replace(/&/g, "&amp;").replace(/</g, "&lt;"); }
function showListing() {
    const {notes, functions} = three.stages[three.stage], now = notes[three.at], lines = [];
    $("at").value = three.at;
    const weights = {attention_forward: "p", attention_backward: "p", feedback_forward: "alpha", feedback_backward: "alpha"}[three.stages[three.stage].name];
    $("stage-note").textContent = `${three.stages[three.stage].name}.${weights ? ` What softmax_row calls weights are ${weights} here.` : ""} An element shows its last value, a local variable each that it had.`;
    $("at-text").textContent = `${three.at + 1} of ${notes.length}: ${now.label} = ${number(now.value)}`;
    // of each line: arrays' elements as they are now, and the values that a local has had
    const values = new Map();
    notes.slice(0, three.at + 1).forEach((note) => {
        if (!values.has(note.line)) values.set(note.line, new Map());
        const local = !note.label.includes("["), key = local ? `${note.label}#` : note.label, own = values.get(note.line);
        if (local && own.has(key)) own.get(key).push(note.value);
        else own.set(key, [note.value]);
    });
    for (const f of LISTING.functions.filter((f) => functions.has(f.name)).sort((a, b) => functions.size > 1 ? [...functions].indexOf(a.name) - [...functions].indexOf(b.name) : 0)) {
        if (lines.length) lines.push("<tr><td>&nbsp;</td></tr>");
        for (let line = f.first; line <= f.last; line++) {
            const own = values.get(line), cells = [];
            for (const [key, list] of own || []) {
                const label = key.replace("#", ""), current = line === now.line && label === now.label;
                const tail = list.length > 12 ? ["…", ...list.slice(-11).map(number)] : list.map(number);
                cells.push(`<span class="value${current ? " now" : ""}${list.length > 1 ? " list" : ""}"><b>${label}</b> ${tail.join(" ")}</span>`);
            }
            const code = escape(LISTING.lines[line]).replace(/(\/\/.*)$/, '<span class="comment">$1</span>');
            lines.push(`<tr${line === now.line ? ' class="now"' : ""}><td class="n">${line}</td><td>${code}</td><td class="values">${cells.join(" ")}</td></tr>`);
        }
    }
    $("listing").innerHTML = `<table class="listing">${lines.join("")}</table>`;
}
function stepTo(at) {
    const {notes} = three.stages[three.stage];
    three.at = Math.min(notes.length - 1, Math.max(0, at));
    showListing();
}

function numberInput(value, name, change) {
    return element("input", {type: "number", step: "0.1", value: String(+value.toFixed(4)), "aria-label": name, oninput: (event) => {
        if (event.target.value.trim() === "" || !Number.isFinite(Number(event.target.value))) return; // it is being typed
        change(Math.max(-100, Math.min(100, Number(event.target.value))));
        askThree(false);
    }});
}
function showInputs() {
    for (const [id, first, name] of [["input-abar", 0, "ā"], ["input-ds", 6, "ds"]])
        $(id).replaceChildren(...[0, 1, 2].flatMap((t) => [element("span", {}, `${name}${"₀₁₂"[t]}`),
            ...[0, 1].map((i) => numberInput(three.inputs[first + 2 * t + i], `${name} ${t} ${i}`, (x) => { three.inputs[first + 2 * t + i] = x; }))]));
}
const isMixer = (row) => row.name.startsWith("layers.0.mixer.");
function showWeights() {
    $("input-weights").replaceChildren(...three.tables[0].filter(isMixer).map((row) => {
        const width = row.shape.length ? row.shape[row.shape.length - 1] : 1, name = row.name.replace("layers.0.mixer.", ""), table = element("table");
        for (let k = 0; k < row.count; k += width) table.append(element("tr", {}, ...Array.from({length: width}, (_, i) =>
            element("td", {}, numberInput(three.params[row.offset + k + i], `${name} ${k / width} ${i}`, (x) => { three.params[row.offset + k + i] = x; })))));
        return element("div", {}, element("span", {className: "note"}, name), table);
    }));
}
function preset(which) {
    const set = (name, from, to, value) => {
        const row = three.tables[0].find((row) => row.name === `layers.0.mixer.${name}`);
        three.params.fill(value, row.offset + from, row.offset + Math.min(to, row.count));
    };
    if (which === "other") {
        three.seed++;
        return askThree(true);
    }
    if (which === "even") { // q' rows come first
        set("proj_fb.weight", 0, 4, 0);
        set("proj_fb.bias", 0, 2, 0);
    }
    if (which === "cut" || which === "strong") {
        set("gamma_ctx.weight", 0, 9, 0);
        set("gamma_bias", 0, 1, which === "cut" ? 0 : 2);
    }
    showWeights();
    return askThree(false);
}

// ----------------------------------------------------------------------------
// the knife

const CUTS = [["0", "whole"], ["1", "no feedback (γ = 0)"], ["2", "even feedback (α = 1/t)"], ["3", "even attention"]];
const cutting = {slot: -1, cuts: [], turn: 0, each: null};
const cutKinds = (mixer) => CUTS.filter(([value]) => value === "0" || (mixer === "sessa") || (mixer === "attention" && value === "3"));

function showCuts() {
    const slot = Number($("knife-model").value), run = runs[slot], kinds = cutKinds(run.info.mixer);
    if (cutting.slot !== slot || cutting.cuts.length !== run.info.layers) Object.assign(cutting, {slot, cuts: new Array(run.info.layers).fill("0"), each: null});
    $("each").disabled = kinds.length === 1;
    if (kinds.length === 1) {
        $("cuts").replaceChildren(element("p", {}, "Mamba-2 has neither a feedback path nor attention: there is nothing to cut."));
        return;
    }
    $("cuts").replaceChildren(...cutting.cuts.map((cut, l) => element("fieldset", {}, element("legend", {}, `layer ${l + 1}`),
        ...kinds.map(([value, name]) => element("label", {}, element("input", {type: "radio", name: `cut${l}`, value, checked: value === cut, onchange: () => {
            cutting.cuts[l] = value;
            knife();
        }}), ` ${name}`)))));
}

const BATCHES = 20, KNIFE_SEED = 7;
const knife = guard(async () => {
    showCuts();
    const turn = ++cutting.turn, {slot, cuts} = cutting, prompt = $("knife-prompt").value;
    const measure = (which, n) => ask("knife", {slot, cuts: which, batches: BATCHES, prompt, n, seed: KNIFE_SEED});
    const whole = await measure("0".repeat(cuts.length), 300), cut = cuts.some((c) => c !== "0") ? await measure(cuts.join(""), 300) : null;
    if (turn !== cutting.turn) return;
    Object.assign(cutting, {whole, cut});
    showKnife();
});
function showKnife() {
    const {whole, cut, each} = cutting, rows = [["whole", whole.loss, 0]];
    if (cut) rows.push(["as cut above", cut.loss, cut.loss - whole.loss]);
    for (const [name, loss] of each || []) rows.push([name, loss, loss - whole.loss]);
    const largest = Math.max(0.05, ...rows.map(([, , more]) => Math.abs(more)));
    $("knife-loss").replaceChildren(element("div", {className: "scroll"}, element("table", {}, element("tr", {}, ...["", "loss", "more by", ""].map((name, i) => element("th", {className: i === 1 || i === 2 ? "number" : ""}, name))),
        ...rows.map(([name, loss, more]) => {
            const bar = element("td");
            const wide = window.innerWidth < 600 ? 80 : 160, svg = draw.make("svg", {width: wide, height: 12});
            svg.append(draw.make("rect", {x: 0, y: 1, width: Math.max(more ? 1 : 0, wide * Math.abs(more) / largest), height: 10, fill: `var(--${more < 0 ? "sessa" : "negative"})`}));
            bar.append(svg);
            return element("tr", {}, element("td", {}, name), element("td", {className: "number"}, loss.toFixed(4)),
                element("td", {className: "number"}, more ? `${more > 0 ? "+" : "−"}${Math.abs(more).toFixed(4)}` : ""), bar);
        }))), element("p", {className: "note"}, `Nats a letter, on up to ${BATCHES} batches of the last tenth of ${runs[cutting.slot].text.name}${
        runs[cutting.slot].info.loaded ? ", which the loaded weights may have been trained on" : ""}.`));
    let same = 0;
    while (cut && same < cut.text.length && cut.text[same] === whole.text[same]) same++;
    $("knife-texts").replaceChildren(element("div", {}, element("h3", {}, "whole"), element("pre", {}, whole.text.trimEnd())),
        cut ? element("div", {}, element("h3", {}, "cut, the same dice; marked from where it differs"), element("pre", {}, cut.text.slice(0, same), element("mark", {}, cut.text.slice(same).trimEnd()))) : "");
}
const tryEach = guard(async () => {
    const {slot, cuts} = cutting, each = [];
    await knife();
    for (const [value, name] of cutKinds(runs[slot].info.mixer).slice(1))
        for (let l = 0; l < cuts.length; l++) {
            const which = cuts.map((_, k) => (k === l ? value : "0")).join("");
            each.push([`layer ${l + 1}, ${name}`, (await ask("knife", {slot, cuts: which, batches: BATCHES, prompt: "", n: 0, seed: 0})).loss]);
            cutting.each = each;
            showKnife();
        }
});

// ----------------------------------------------------------------------------
// the parts, keys, files, sizes

function choose(name) {
    part = name;
    for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
    for (const button of document.querySelectorAll("nav button")) {
        if (button.dataset.part === name) button.setAttribute("aria-current", "page");
        else button.removeAttribute("aria-current");
    }
    redraw();
    if (name === "look") look();
    if (name === "knife") knife();
}
// What is drawn to the width, or in the colours, of before.
function redraw() {
    if (part === "train") showLoss();
    if (part === "look" && seen.T) {
        showArcs();
        showMaps();
        showOverview();
        seen.tailOf = "";
        tail(seen.slot, seen.layer);
    }
}

function listen() {
    document.querySelectorAll("nav button").forEach((button) => button.addEventListener("click", () => choose(button.dataset.part)));
    document.addEventListener("keydown", (event) => {
        if (event.target.closest("input, textarea, select") || event.ctrlKey || event.altKey || event.metaKey) return;
        if ("1234".includes(event.key)) choose(["train", "look", "steps", "knife"][Number(event.key) - 1]);
    });
    $("settings").addEventListener("submit", (event) => {
        event.preventDefault();
        start();
    });
    $("stop").onclick = stop;
    $("go-on").onclick = goOn;
    $("write").onclick = () => runs.forEach((run, slot) => run && (run.step || run.info.loaded) && write(slot));
    for (const id of ["choose-text", "load"]) $(id).onclick = () => {
        $("file").accept = id === "load" ? ".safetensors" : "";
        $("file").click();
    };
    $("file").onchange = () => {
        if ($("file").files[0]) takeFile($("file").files[0]);
        $("file").value = "";
    };
    $("save-text").onclick = () => download(text.name, text.bytes);
    document.addEventListener("dragover", (event) => {
        event.preventDefault();
        document.body.classList.add("dropping");
    });
    document.addEventListener("dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
    document.addEventListener("drop", (event) => {
        event.preventDefault();
        document.body.classList.remove("dropping");
        if (event.dataTransfer.files[0]) takeFile(event.dataTransfer.files[0]);
    });

    let typing = 0;
    const soon = (action) => () => {
        clearTimeout(typing);
        typing = setTimeout(action, 250);
    };
    $("look-text").oninput = soon(look);
    $("look-model").onchange = () => {
        fillLayers();
        look();
    };
    $("look-layer").onchange = $("look-head").onchange = look;
    $("arcs").onkeydown = (event) => {
        const moves = {ArrowLeft: seen.picked - 1, ArrowRight: seen.picked + 1, Home: 0, End: seen.T - 1};
        if (!(event.key in moves)) return;
        event.preventDefault();
        pick(moves[event.key]);
    };
    $("knife-model").onchange = knife;
    $("knife-prompt").oninput = soon(knife);
    $("each").onclick = tryEach;

    document.querySelectorAll("[data-preset]").forEach((button) => { button.onclick = () => preset(button.dataset.preset); });
    $("first").onclick = () => stepTo(0);
    $("previous").onclick = () => stepTo(three.at - 1);
    $("next").onclick = () => stepTo(three.at + 1);
    $("last").onclick = () => stepTo(Infinity);
    $("at").oninput = () => stepTo(Number($("at").value));

    let width = window.innerWidth;
    window.addEventListener("resize", () => {
        if (width === window.innerWidth) return; // a phone's address bar
        width = window.innerWidth;
        later("size", redraw);
    });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => later("size", redraw));
}

guard(async () => {
    listen();
    showText();
    $("look-text").value = "Before we proceed any further";
    say("starting…");
    await startWorker();
    const {words} = settings();
    for (const name of MIXERS) await openRun([...words, `--mixer=${name}`], {[text.name]: text.bytes});
    fillModels();
    showRuns();
    showLoss();
    showInputs();
    await askThree(true);
    say("ready");
})();
