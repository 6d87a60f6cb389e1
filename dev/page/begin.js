// The parts of the page, its keys, files that are dropped, sizes; and the beginning.
"use strict";

function choose(name) {
    part = name;
    for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== name;
    for (const button of document.querySelectorAll("nav button")) {
        if (button.dataset.part === name)
            button.setAttribute("aria-current", "page");
        else
            button.removeAttribute("aria-current");
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
    document.querySelectorAll("nav button")
        .forEach((button) => button.addEventListener("click", () => choose(button.dataset.part)));
    document.addEventListener("keydown", (event) => {
        if (event.target.closest("input, textarea, select") || event.ctrlKey || event.altKey || event.metaKey)
            return;
        if ("1234".includes(event.key)) choose(["train", "look", "steps", "knife"][Number(event.key) - 1]);
    });
    $("settings").addEventListener("submit", (event) => {
        event.preventDefault();
        start();
    });
    $("stop").onclick = stop;
    $("go-on").onclick = goOn;
    $("write").onclick = () =>
        runs.forEach((run, slot) => run && (run.step || run.loaded) && write(slot));
    for (const id of ["choose-text", "load"])
        $(id).onclick = () => {
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
    document.addEventListener(
        "dragleave", (event) => event.relatedTarget || document.body.classList.remove("dropping"));
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

    document.querySelectorAll("[data-preset]").forEach((button) => {
        button.onclick = () => preset(button.dataset.preset);
    });
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
