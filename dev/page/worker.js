/*
The page's worker: it holds the program and lets it work, so that the page stays free to draw. The page sends
{id, call, ...}; the answer is {id, result} or {id, error}, the program's own line. While a run trains, its
log's new lines and, when the program has saved, its files go to the page unasked. The program itself follows
this text.
*/
"use strict";
const output = [], errors = []; // bytes that the program has printed
var Module = {
    noInitialRun: true,
    preRun:
        [() => Module.FS.init(
             () => null, (byte) => byte !== null && output.push(byte),
             (byte) => byte !== null && errors.push(byte))],
    onRuntimeInitialized: () => postMessage({ready: true}),
    onAbort: (what) => postMessage({fatal: String(what)}),
};

const training = new Map(); // slot: what it needs to train
let opened = 0, turning = false;

function call(name, type, ...values) {
    const types = values.map((value) => (typeof value === "string" ? "string" : "number"));
    return Module.ccall(name, type, types, values);
}
function line() { return call("page_line", "string"); }

// What has been printed since the last time. Texts may hold any bytes.
function printed() { return new TextDecoder().decode(new Uint8Array(output.splice(0))); }

// The result of a call, or the program's line.
function checked(result) {
    if (result < 0) throw new Error(line());
    return result;
}
function doubles(pointer, n) {
    if (!pointer) throw new Error(line());
    return Module.HEAPF64.slice(pointer / 8, pointer / 8 + n);
}
function readFile(path) {
    try {
        return Module.FS.readFile(path);
    } catch (error) {
        return null; // there is none
    }
}
function told(slot) { return JSON.parse(call("page_tell", "string", slot)); }

// The log's lines that the page has not had, and the last one again: its validation may have come in.
function newLines(slot) {
    const run = training.get(slot), bytes = readFile(run.log);
    if (!bytes || bytes.length <= run.read) return [];
    const text = new TextDecoder().decode(bytes.subarray(run.read));
    const end = text.lastIndexOf("\n") + 1;
    run.read += end > 1 ? text.lastIndexOf("\n", end - 2) + 1 : 0; // each character is a byte
    return text.slice(0, end).split("\n").filter(Boolean).map((entry) => JSON.parse(entry));
}

function filesOf(slot) {
    const run = told(slot);
    return {step: run.step, run: readFile(run.out), best: readFile(run.best)};
}

// A turn of training: every run that is at it makes steps for a moment; then messages may come in.
function turn() {
    turning = false;
    for (const [slot, run] of training) {
        if (!run.active) continue;
        const begin = performance.now();
        let result = 0, left = told(slot).steps - told(slot).step;
        while (!result && performance.now() - begin < 40) {
            if (--left === 0) postMessage({busy: true}); // the last step validates on all that is kept back
            result = call("page_step", "number", slot);
        }
        printed();
        const lines = newLines(slot), now = told(slot);
        const message = {slot, lines, step: now.step, steps: now.steps};
        if (result < 0) message.error = line();
        if (result) run.active = false;
        if (result) message.done = true;
        if (result > 0 || now.step - run.kept >= 50) {
            if (result >= 0 && call("page_save", "number", slot) === 0) message.files = filesOf(slot);
            run.kept = now.step;
        }
        postMessage(message);
    }
    next();
}
const channel = new MessageChannel();
channel.port1.onmessage = turn;
function next() {
    if (turning || ![...training.values()].some((run) => run.active)) return;
    turning = true;
    channel.port2.postMessage(0);
}

const calls = {
    ping() { return true; },

    // Whether bytes are a text: their number.
    check({name, bytes}) {
        Module.FS.writeFile(name, bytes);
        try {
            return checked(call("page_check", "number", name));
        } finally {
            Module.FS.unlink(name);
        }
    },

    // Opens a run from options and files {path: bytes}; `out` and `log` are added here.
    open({words, files}) {
        const name = `/run${++opened}`;
        const named = (word) => word.replace("{run}", name);
        for (const [path, bytes] of Object.entries(files)) Module.FS.writeFile(named(path), bytes);
        errors.length = 0;
        let slot;
        try {
            slot = checked(call(
                "page_open", "number",
                words.map(named)
                    .concat([`--out=${name}.safetensors`, `--log=${name}.jsonl`, "--overwrite"])
                    .join("\n")));
        } finally {
            for (const path of Object.keys(files)) {
                if (path.includes("{run}") && named(path) !== `${name}.safetensors`)
                    Module.FS.unlink(named(path));
            }
        }
        const warning = new TextDecoder().decode(new Uint8Array(errors)).trim();
        training.set(slot, {active: false, read: 0, kept: told(slot).step, log: told(slot).log});
        return {slot, ...told(slot), printed: printed(), warning};
    },
    train({slots}) {
        for (const [slot, run] of training) run.active = slots.includes(slot);
        next();
        return true;
    },
    save({slot}) {
        checked(call("page_save", "number", slot));
        printed();
        return filesOf(slot);
    },
    sample({slot, prompt, n, temperature, seed}) {
        printed();
        checked(call("page_sample", "number", slot, prompt, n, temperature, seed));
        return printed();
    },

    look({slot, text}) { return checked(call("page_look", "number", slot, text)); },
    matrix(
        {kind, layer, head, T}) { return doubles(call("page_matrix", "number", kind, layer, head), T * T); },
    gamma({layer, T}) { return doubles(call("page_gamma", "number", layer), T); },
    tail({slot, T, sources, from, to}) {
        return doubles(call("page_tail", "number", slot, T, sources, from, to), told(slot).layers * (T + 2));
    },
    knife({slot, cuts, batches, prompt, n, seed}) {
        printed();
        const loss = doubles(call("page_knife", "number", slot, cuts, batches, prompt, n, seed), 1)[0];
        return {loss, text: printed()};
    },

    // The smallest mixer: its weights, inputs and tables; then one run of it with all that was noted.
    three({seed, params, inputs}) {
        if (seed !== undefined) call("three_begin", "number", seed);
        const tables = JSON.parse(call("three_tables", "string"));
        const sizes = tables.map((table) => Math.max(...table.map((row) => row.offset + row.count)));
        const block = (which, n) => {
            const at = call("three_block", "number", which) / 4;
            return Module.HEAPF32.subarray(at, at + n);
        };
        if (params) block(0, sizes[0]).set(params);
        const input = call("three_input", "number") / 4;
        Module.HEAPF32.set(inputs, input);
        const n = call("three_run", "number"), size = call("three_note_size", "number"),
              at = call("three_notes", "number");
        const view = new DataView(Module.HEAPU8.buffer, at, n * size), notes = [];
        const starts = [0, 1, 2].map((which) => call("three_block", "number", which));
        for (let i = 0; i < n; i++) { // {line, kind, value, at}
            const address = view.getUint32(i * size + 16, true);
            let place = null;
            for (let which = 0; which < 3; which++) {
                const offset = (address - starts[which]) / 4;
                if (offset >= 0 && offset < sizes[which === 1 ? 1 : 0]) place = [which, offset];
            }
            notes.push({
                line: view.getInt32(i * size, true),
                kind: view.getInt32(i * size + 4, true),
                value: view.getFloat64(i * size + 8, true),
                place
            });
        }
        return {
            tables,
            notes,
            params: block(0, sizes[0]).slice(),
            acts: block(1, sizes[1]).slice(),
            grads: block(2, sizes[0]).slice()
        };
    },
};

onmessage = ({data}) => {
    try {
        postMessage({id: data.id, result: calls[data.call](data)});
    } catch (error) {
        postMessage({id: data.id, error: String(error.message || error)});
    }
};
