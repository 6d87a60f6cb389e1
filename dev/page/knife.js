// The knife: what a path carries, by cutting it.
"use strict";

const CUTS =
    [["0", "whole"], ["1", "no feedback (γ = 0)"], ["2", "even feedback (α = 1/t)"], ["3", "even attention"]];
const cutting = {
    slot: -1,
    cuts: [],
    turn: 0,
    each: null
};
const cutKinds = (mixer) => CUTS.filter(
    ([value]) => value === "0" || (mixer === "sessa") || (mixer === "attention" && value === "3"));

function showCuts() {
    const slot = Number($("knife-model").value), run = runs[slot], kinds = cutKinds(run.info.mixer);
    if (cutting.slot !== slot || cutting.cuts.length !== run.info.layers)
        Object.assign(cutting, {slot, cuts: new Array(run.info.layers).fill("0"), each: null});
    $("each").disabled = kinds.length === 1;
    if (kinds.length === 1) {
        $("cuts").replaceChildren(
            element("p", {}, "Mamba-2 has neither a feedback path nor attention: there is nothing to cut."));
        return;
    }
    $("cuts").replaceChildren(...cutting.cuts.map(
        (cut, l) => element(
            "fieldset", {}, element("legend", {}, `layer ${l + 1}`),
            ...kinds.map(
                ([value, name]) => element(
                    "label", {}, element("input", {
                        type: "radio",
                        name: `cut${l}`,
                        value,
                        checked: value === cut,
                        onchange: () => {
                            cutting.cuts[l] = value;
                            knife();
                        }
                    }),
                    ` ${name}`)))));
}

const BATCHES = 20, KNIFE_SEED = 7;
const knife = guard(async () => {
    showCuts();
    const turn = ++cutting.turn, {slot, cuts} = cutting, prompt = $("knife-prompt").value;
    const measure = (which, n) =>
        ask("knife", {slot, cuts: which, batches: BATCHES, prompt, n, seed: KNIFE_SEED});
    const whole = await measure("0".repeat(cuts.length), 300),
          cut = cuts.some((c) => c !== "0") ? await measure(cuts.join(""), 300) : null;
    if (turn !== cutting.turn) return;
    Object.assign(cutting, {whole, cut});
    showKnife();
});
function showKnife() {
    const {whole, cut, each} = cutting, rows = [["whole", whole.loss, 0]];
    if (cut) rows.push(["as cut above", cut.loss, cut.loss - whole.loss]);
    for (const [name, loss] of each || []) rows.push([name, loss, loss - whole.loss]);
    const {text, loaded} = runs[cutting.slot];
    const note = `Nats a letter, on up to ${BATCHES} batches of the last tenth of ${text.name}` +
        (loaded ? ", which the loaded weights may have been trained on." : ".");
    const largest = Math.max(0.05, ...rows.map(([, , more]) => Math.abs(more)));
    $("knife-loss")
        .replaceChildren(
            element(
                "div", {className: "scroll"},
                element(
                    "table", {},
                    element(
                        "tr", {},
                        ...["", "loss", "more by", ""].map(
                            (name, i) =>
                                element("th", {className: i === 1 || i === 2 ? "number" : ""}, name))),
                    ...rows.map(([name, loss, more]) => {
                        const bar = element("td");
                        const wide = window.innerWidth < 600 ? 80 : 160,
                              svg = draw.make("svg", {width: wide, height: 12});
                        svg.append(draw.make("rect", {
                            x: 0,
                            y: 1,
                            width: Math.max(more ? 1 : 0, wide * Math.abs(more) / largest),
                            height: 10,
                            fill: `var(--${more < 0 ? "sessa" : "negative"})`
                        }));
                        bar.append(svg);
                        return element(
                            "tr", {}, element("td", {}, name),
                            element("td", {className: "number"}, loss.toFixed(4)),
                            element(
                                "td", {className: "number"},
                                more ? `${more > 0 ? "+" : "−"}${Math.abs(more).toFixed(4)}` : ""),
                            bar);
                    }))),
            element("p", {className: "note"}, note));
    let same = 0;
    while (cut && same < cut.text.length && cut.text[same] === whole.text[same]) same++;
    $("knife-texts")
        .replaceChildren(
            element("div", {}, element("h3", {}, "whole"), element("pre", {}, whole.text.trimEnd())),
            cut ? element(
                      "div", {}, element("h3", {}, "cut, the same dice; marked from where it differs"),
                      element(
                          "pre", {}, cut.text.slice(0, same),
                          element("mark", {}, cut.text.slice(same).trimEnd()))) :
                  "");
}
const tryEach = guard(async () => {
    const {slot, cuts} = cutting, each = [];
    await knife();
    for (const [value, name] of cutKinds(runs[slot].info.mixer).slice(1))
        for (let l = 0; l < cuts.length; l++) {
            const which = cuts.map((_, k) => (k === l ? value : "0")).join("");
            each.push([
                `layer ${l + 1}, ${name}`,
                (await ask("knife", {slot, cuts: which, batches: BATCHES, prompt: "", n: 0, seed: 0})).loss
            ]);
            cutting.each = each;
            showKnife();
        }
});
