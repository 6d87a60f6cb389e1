// Step by step: the mixer at its smallest, every number beside the line that computes it.
"use strict";

const three = {
    seed: 1,
    inputs: [1, 0.5, -0.5, 1, 0.8, -0.3, 0.2, 0, 0, -0.4, 1, -0.5],
    params: null,
    stage: -1,
    at: -1,
    shown: new Map()
};
const STAGE = {
    linear_forward: "ā → q, k, v, q′, k′",
    rope_forward: "RoPE",
    attention_forward: "direct read → f",
    gain_forward: "γ",
    feedback_forward: "feedback → s",
    feedback_backward: "feedback ← λ",
    attention_backward: "direct read ←",
    rope_backward: "RoPE ←",
    linear_backward: "dā, dW ←",
    gain_backward: "γ ←"
};

const askThree = guard(async (fresh) => {
    const result = await ask("three", {
        seed: fresh ? three.seed : undefined,
        params: fresh ? undefined : three.params,
        inputs: three.inputs
    });
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
            const nested = f === "softmax_row" ||
                (f === "rope_forward" && last && last.name === "rope_backward" && !last.notes.length);
            if (nested)
                last.functions.add(f);
            else
                three.stages.push({name: f, functions: new Set([f]), notes: []});
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
    const tensor = table.filter(
        (row) => offset >= row.offset && offset < row.offset + row.count &&
            !(which === 1 && row.stride > row.shape[row.shape.length - 1]))[0];
    const name = tensor.name.replace(/^layers\.0\./, "").replace(/^mixer\./, ""),
          index = offset - tensor.offset;
    let row = Math.floor(index / tensor.stride), column = index % tensor.stride,
        short = base.replace(/_[tbh]$/, "");
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

function tensorOf(name) {
    return three.tables[1].find((row) => row.name === name || row.name === `layers.0.${name}`);
}
function valuesOf(name) { // rows of numbers of an activation
    const row = tensorOf(name), width = row.shape[row.shape.length - 1], out = [];
    for (let at = row.offset; out.length * width < row.count; at += row.stride)
        out.push([...three.acts.subarray(at, at + width)]);
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
    const f = valuesOf("f"), s = valuesOf("s"), gamma = valuesOf("gamma")[0], lambda = valuesOf("ds"),
          dabar = valuesOf("dabar");
    const alpha = [[], [0], [0, 0]], dgamma = [],
          find = (name) => three.stages.find((stage) => stage.name === name);
    for (const note of find("feedback_forward").notes)
        if (note.label.startsWith("weights[") && note.t > 0)
            alpha[note.t][note.place[1] % 3 - tensorOf("scratch").offset % 3] = note.value;
    for (const note of find("feedback_backward").notes)
        if (note.label.startsWith("dgamma[")) dgamma[note.t] = note.value;
    const ds = [0, 1, 2].map((t) => three.inputs.slice(6 + 2 * t, 8 + 2 * t));
    const pair = (key, x) => `(${shown(`${key}0`, x[0])}, ${shown(`${key}1`, x[1])})`;
    const g = (t) => shown(`γ${t}`, gamma[t]), a = (t, j) => shown(`α${t}${j}`, alpha[t][j]);
    const rows = (key, list) => list.map((x, t) => pair(`${key}${t}`, x));
    const parts = {f: rows("f", f), s: rows("s", s), l: rows("λ", lambda), d: rows("ds", ds)};
    const gammas = [0, 1, 2].map(g), alphas = {10: a(1, 0), 20: a(2, 0), 21: a(2, 1)};
    // "s_1" with its index below the line
    const below = (line) => line.replace(/_([0-9a-z]+)/g, "<sub>$1</sub>");
    const card = (title, lines) => `<div class="card"><h3>${below(title)}</h3>` +
        lines.map((line) => `<div>${below(line).replace(/^=/, "&nbsp;&nbsp; =")}</div>`).join("") + "</div>";
    const {f: F, s: S, l: L, d: D} = parts;
    const before = card("What there is before: f, γ, α", [
        ...F.map((x, t) => `f_${t} = ${x} &nbsp; γ_${t} = ${gammas[t]}`),
        `α_10 = ${alphas[10]} <span class="why">one past row: 1</span>`,
        `α_20 = ${alphas[20]} &nbsp; α_21 = ${alphas[21]}`,
    ]);
    const forward = card("Forward: s_t = f_t + γ_t Σ α_tj s_j, from the first row", [
        `s_0 = f_0 = ${S[0]}`,
        "s_1 = f_1 + γ_1 s_0",
        `= ${F[1]} + ${gammas[1]} · ${S[0]}`,
        `= ${S[1]}`,
        "s_2 = f_2 + γ_2 (α_20 s_0 + α_21 s_1)",
        `= ${F[2]} + ${gammas[2]} · (${alphas[20]} ${S[0]} + ${alphas[21]} ${S[1]})`,
        `= ${S[2]}`,
    ]);
    const backward = card("Backward: λ_j = ds_j + Σ γ_t α_tj λ_t, from the last row", [
        `λ_2 = ds_2 = ${L[2]}`,
        "λ_1 = ds_1 + γ_2 α_21 λ_2",
        `= ${D[1]} + ${gammas[2]} · ${alphas[21]} ${L[2]}`,
        `= ${L[1]}`,
        "λ_0 = ds_0 + γ_1 λ_1 + γ_2 α_20 λ_2",
        `= ${D[0]} + ${gammas[1]} · ${L[1]} + ${gammas[2]} · ${alphas[20]} ${L[2]}`,
        `= ${L[0]}`,
    ]);
    const after = card("What goes on backward", [0, 1, 2].map((t) => {
        const delta = shown(`dγ${t}`, dgamma[t]), dinput = pair(`dā${t}`, dabar[t]);
        return `df_${t} = λ_${t} &nbsp; dγ_${t} = δ_${t} = ${delta} &nbsp; dā_${t} = ${dinput}`;
    }));
    $("equations").innerHTML = before + forward + backward + after;
}

function showStages() {
    $("stages").replaceChildren(...three.stages.map(
        (stage, i) => element(
            "button", {
                type: "button",
                "aria-pressed": String(i === three.stage),
                title: stage.name,
                onclick: () => {
                    three.stage = i;
                    three.at = -1;
                    showStages();
                }
            },
            STAGE[stage.name] || stage.name)));
    const {notes} = three.stages[three.stage];
    if (three.at < 0 || three.at >= notes.length) three.at = notes.length - 1;
    $("at").max = notes.length - 1;
    showListing();
}
function escape(string) { return string.replace(/&/g, "&amp;").replace(/</g, "&lt;"); }
function showListing() {
    const {notes, functions} = three.stages[three.stage], now = notes[three.at], lines = [];
    $("at").value = three.at;
    const weights = {
        attention_forward: "p",
        attention_backward: "p",
        feedback_forward: "alpha",
        feedback_backward: "alpha"
    }[three.stages[three.stage].name];
    const calls = weights ? ` What softmax_row calls weights are ${weights} here.` : "";
    $("stage-note").textContent = `${three.stages[three.stage].name}.${calls} ` +
        "An element of an array shows its last value, a local variable each that it had.";
    $("at-text").textContent = `${three.at + 1} of ${notes.length}: ${now.label} = ${number(now.value)}`;
    // of each line: arrays' elements as they are now, and the values that a local has had
    const values = new Map();
    notes.slice(0, three.at + 1).forEach((note) => {
        if (!values.has(note.line)) values.set(note.line, new Map());
        const local = !note.label.includes("["), key = local ? `${note.label}#` : note.label,
              own = values.get(note.line);
        if (local && own.has(key))
            own.get(key).push(note.value);
        else
            own.set(key, [note.value]);
    });
    for (const name of functions) { // in the order in which they are called
        const f = LISTING.functions.find((f) => f.name === name);
        if (lines.length) lines.push("<tr><td>&nbsp;</td></tr>");
        for (let line = f.first; line <= f.last; line++) {
            const cells = [...values.get(line) || []].map(([key, list]) => {
                const label = key.replace("#", "");
                const all = list.length > 12 ? ["…", ...list.slice(-11).map(number)] : list.map(number);
                const current = line === now.line && label === now.label ? " now" : "";
                const kind = list.length > 1 ? " list" : "";
                return `<span class="value${current}${kind}"><b>${label}</b> ${all.join(" ")}</span>`;
            });
            const code = escape(LISTING.lines[line]).replace(/(\/\/.*)$/, '<span class="comment">$1</span>');
            const row = line === now.line ? '<tr class="now">' : "<tr>";
            lines.push(
                `${row}<td class="n">${line}</td><td>${code}</td>` +
                `<td class="values">${cells.join(" ")}</td></tr>`);
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
    return element("input", {
        type: "number",
        step: "0.1",
        value: String(+value.toFixed(4)),
        "aria-label": name,
        oninput: (event) => {
            if (event.target.value.trim() === "" || !Number.isFinite(Number(event.target.value)))
                return; // it is being typed
            change(Math.max(-100, Math.min(100, Number(event.target.value))));
            askThree(false);
        }
    });
}
function showInputs() {
    for (const [id, first, name] of [["input-abar", 0, "ā"], ["input-ds", 6, "ds"]])
        $(id).replaceChildren(...[0, 1, 2].flatMap(
            (t) =>
                [element("span", {}, `${name}${"₀₁₂"[t]}`),
                 ...[0, 1].map(
                     (i) => numberInput(three.inputs[first + 2 * t + i], `${name} ${t} ${i}`, (x) => {
                         three.inputs[first + 2 * t + i] = x;
                     }))]));
}
const isMixer = (row) => row.name.startsWith("layers.0.mixer.");
function showWeights() {
    $("input-weights").replaceChildren(...three.tables[0].filter(isMixer).map((row) => {
        const width = row.shape.length ? row.shape[row.shape.length - 1] : 1,
              name = row.name.replace("layers.0.mixer.", ""), table = element("table");
        for (let k = 0; k < row.count; k += width)
            table.append(element(
                "tr", {},
                ...Array.from(
                    {length: width},
                    (_, i) => element(
                        "td", {},
                        numberInput(three.params[row.offset + k + i], `${name} ${k / width} ${i}`, (x) => {
                            three.params[row.offset + k + i] = x;
                        })))));
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
