/*
The page: it asks the worker, and draws what comes back. A call of the worker that fails is one line in the
status, and changes nothing. A worker that is gone is started again, with the runs that it had saved last.
*/
"use strict";
const MIXERS = ["sessa", "attention", "mamba2"]; // a slot of the worker is the place in this list
const NAMES = {
    sessa: "Sessa",
    attention: "attention",
    mamba2: "Mamba-2"
};
const DASHES = {
    sessa: undefined,
    attention: "7 3",
    mamba2: "2 3"
};
const TITLE = {
    direct: "Direct read: α",
    feedback: "Feedback, one hop: γα",
    hops: "Two hops: (γα)²",
    solve: "All hops: (I − γα)⁻¹",
    chain: "Chain of states"
};
const KIND = {
    direct: 0,
    feedback: 1,
    hops: 2,
    solve: 3,
    chain: 4
};
const $ = (id) => document.getElementById(id);

const runs = []; // by slot: what the page knows of a run
let text = {name: TEXT_NAME, bytes: new TextEncoder().encode(TEXT)};
let chosen = []; // the slots that were trained last
let part = "train";

function say(message, kind = "") {
    $("status").textContent = message;
    $("status").className = kind;
}
function element(name, attributes = {}, ...children) {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) {
        if (key in made && key !== "list")
            made[key] = value;
        else
            made.setAttribute(key, value);
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
let busy = false; // it has said that it will be silent for long

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
            busy = Boolean(data.busy);
            if (data.busy) return;
            if (data.ready)
                resolve();
            else if (data.fatal)
                lose(data.fatal);
            else if (data.id === undefined)
                progress(data);
            else {
                const {resolve, reject} = waiting.get(data.id);
                waiting.delete(data.id);
                if (data.error === undefined)
                    resolve(data.result);
                else
                    reject(new Error(data.error));
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
    const active = runs.some((run) => run && run.active);
    const patience = busy ? 600 : asked ? 120 : active ? 30 : 6; // seconds
    if (!pinged) {
        pinged = performance.now();
        ask("ping").catch(() => {});
    } else if (performance.now() - pinged > patience * 1000) {
        pinged = 0;
        lose("no answer");
    }
}, 1000);
