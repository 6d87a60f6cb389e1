// Train: texts and checkpoints, runs, their losses and what they write.
"use strict";

function settings() {
    const form = new FormData($("settings"));
    const [dim, layers, heads] = form.get("size").split(",");
    const steps = form.get("steps").trim();
    const every = Math.min(100, Math.max(5, Math.round(Number(steps) / 20) || 50));
    return {
        mixer: form.get("mixer"),
        words: [
            `--data=${text.name}`, `--dim=${dim}`, `--layers=${layers}`, `--heads=${heads}`,
            ...["seq", "steps", "batch", "lr", "seed"].map((name) => `--${name}=${form.get(name).trim()}`),
            `--eval-every=${every}`, "--eval-batches=10", "--save-every=1000000000000"
        ]
    };
}

// Opens a run in the worker. before: the run that it goes on with.
async function openRun(words, files, before) {
    const info = await ask("open", {words, files});
    const run = before || {points: new Map(), kept: new Map(), sample: "", text, loaded: false};
    runs[info.slot] = Object.assign(run, {info, source: {words, files}, step: info.step, steps: info.steps});
    return info;
}
// What was drawn beyond the step that a run is taken up at is not so any more.
function cutBack(run) {
    for (const map of [run.points, run.kept])
        for (const step of map.keys())
            if (step > run.step) map.delete(step);
}

const start = guard(async () => {
    const {mixer, words} = settings(), wanted = mixer === "all" ? MIXERS : [mixer];
    const slots = [];
    for (const name of wanted)
        slots.push((await openRun([...words, `--mixer=${name}`], {[text.name]: text.bytes})).slot);
    say(`training on ${text.name}`);
    await train(slots);
    fillModels();
});

async function train(slots) {
    chosen = slots;
    runs.forEach((run, slot) => {
        if (run) run.active = slots.includes(slot) && run.step < run.steps;
    });
    await ask("train", {slots});
    showRuns();
}

const stop = guard(async () => {
    await ask("train", {slots: []});
    for (const run of runs)
        if (run) run.active = false;
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
        await openRun(
            [...resumeWords(run.text.name), `--steps=${steps}`, `--decay-steps=${steps}`],
            resumeFiles(run, files), run);
    }
    say("going on");
    await train(chosen);
});
function resumeWords(name) {
    return [
        "--resume={run}.safetensors", `--data=${name}`, "--eval-every=50", "--eval-batches=10",
        "--save-every=1000000000000"
    ];
}
function resumeFiles(run, files) {
    const out = {[run.text.name]: run.text.bytes, "{run}.safetensors": files.run};
    if (files.best) out["{run}.best.safetensors"] = files.best;
    return out;
}

// News of a run that trains.
function progress({slot, lines, step, steps, done, error, files}) {
    const run = runs[slot];
    if (!run) return;
    let judged = false;
    for (const entry of lines) {
        run.points.set(entry.step, entry.train_loss);
        run.rate = entry.tok_per_s;
        if (entry.val_loss !== undefined && entry.val_loss !== null &&
            run.kept.get(entry.step) !== entry.val_loss) {
            run.kept.set(entry.step, entry.val_loss);
            judged = true;
        }
    }
    Object.assign(run, {step, steps});
    if (files) restarts = 0; // it works
    if (files) run.source = {words: resumeWords(run.text.name), files: resumeFiles(run, files)};
    if (done) run.active = false;
    if (error)
        say(error, "bad");
    else if (done && runs.every((other) => !other || !other.active))
        say("done", "good");
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
    draw.chart($("loss"), {
        lines,
        xName: "step",
        yName: "loss",
        empty: "Train draws the curve here",
        xRange: lines.some((line) => line.points.length) ? [0, last] : undefined
    });
}

function showRuns() {
    const active = runs.some((run) => run && run.active);
    $("stop").disabled = !active;
    $("go-on").disabled = active || !chosen.length;
    $("go-on").textContent = chosen.length && chosen.every((slot) => runs[slot].step >= runs[slot].steps) ?
        "Go on for more steps" :
        "Go on";
    const body = element("tbody");
    runs.forEach((run, slot) => {
        const last = [...run.points.values()].pop(), kept = [...run.kept.values()].pop(), name = MIXERS[slot];
        const key = element("span", {className: `key ${name}`});
        const save = (label, which) => element(
            "button", {type: "button", disabled: !run.step, onclick: () => saveRun(slot, which)}, label);
        body.append(element(
            "tr", {}, element("td", {}, key, NAMES[name]),
            element(
                "td", {},
                run.step || run.active ? `step ${run.step} of ${run.steps}` :
                    run.loaded ? "loaded" :
                                      "untrained"),
            element(
                "td", {className: "number", "data-name": "loss"}, last === undefined ? "" : last.toFixed(4)),
            element(
                "td", {className: "number", "data-name": "kept back"},
                kept === undefined ? "" : kept.toFixed(4)),
            element(
                "td", {className: "number", "data-name": "letters/s"},
                run.active && run.rate ? String(Math.round(run.rate)) : ""),
            element(
                "td", {}, `${run.info.dim} wide, ${run.info.layers} layers, ${run.info.parameters} weights`),
            element("td", {}, save("Save the run", "run"), " ", save("Save the best weights", "best"))));
    });
    const head = element(
        "tr", {},
        ...["mixer", "", "loss", "kept back", "letters/s", "model", ""].map(
            (title, i) => element("th", {className: i > 1 && i < 5 ? "number" : ""}, title)));
    // the buttons must not vanish under a finger: the table is made anew only where it changes
    const table = element("table", {}, element("thead", {}, head), body),
          old = $("runs").querySelector("table");
    if (!old || !sameShape(old, table))
        $("runs").replaceChildren(element("div", {className: "scroll"}, table));
    else
        [...table.querySelectorAll("td")].forEach((cell, i) => {
            const shown = old.querySelectorAll("td")[i];
            if (!cell.querySelector("button, span")) shown.textContent = cell.textContent;
            cell.querySelectorAll("button").forEach((button, k) => {
                shown.querySelectorAll("button")[k].disabled = button.disabled;
            });
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
    if (which === "best" && !files.best)
        throw new Error("there are no best weights before the first validation");
    download(which === "run" ? `${name}.safetensors` : `${name}.best.safetensors`, files[which]);
    const goesOn = `--resume ${name}.safetensors --data ${runs[slot].text.name} goes on with it`;
    const writes = `--load ${name}.best.safetensors --generate 500 writes with it`;
    say(`saved: ./train_sessa ${which === "run" ? goesOn : writes}`, "good");
});

// What the run writes now.
const write = guard(async (slot) => {
    const run = runs[slot];
    if (run.writing) return;
    run.writing = true;
    try {
        const temperature = Number($("temperature").value);
        if (!(temperature >= 0 && $("temperature").value.trim()))
            throw new Error(`a temperature is a number from 0 on, not '${$("temperature").value}'`);
        run.sample = await ask(
            "sample", {slot, prompt: $("prompt").value, n: 240, temperature, seed: 1337 + run.step});
        run.sampledAt = run.step;
    } finally {
        run.writing = false;
    }
    showSamples();
});
function showSamples() {
    $("samples").replaceChildren(...runs.map(
        (run, slot) => !run || !run.sample ?
            "" :
            element(
                "div", {},
                element(
                    "h3", {}, element("span", {className: `key ${MIXERS[slot]}`}),
                    `${NAMES[MIXERS[slot]]}, step ${run.sampledAt}`),
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
            const hint =
                /lacks|vocabulary/.test(line) ? "; drop the text that the model was trained on first" : "";
            throw new Error(line + hint);
        }
        loaded = runs[info.slot].loaded = true;
    }
    runs[info.slot].active = false;
    chosen = [info.slot];
    const model = `${NAMES[info.mixer]}, ${info.dim} wide, ${info.layers} layers`;
    if (loaded)
        say(`${name}: weights loaded (${model}); Go on trains from them`, "good");
    else
        say(`${name}: a run at step ${info.step} of ${info.steps} (${model}); Go on continues it`, "good");
    showRuns();
    showLoss();
    write(info.slot);
    fillModels(info.slot);
    if (part === "look") look();
    if (part === "knife") knife();
}

function showText() { $("text-name").textContent = `${text.name}, ${text.bytes.length} bytes`; }
