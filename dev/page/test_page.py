#!/usr/bin/env python3
"""Tests the page in headless browsers against the native programs.

  python3 dev/page/test_page.py --page sessa.html --program ./train_sessa --influence ./influence

Held together: the losses of 50 steps, the maps and memory tails of dev/claims/influence, the knife and the
program's --eval, checkpoints that go both ways, the three tokens and the equations computed again here.
Survived: a file that is no text, a broken checkpoint, wrong numbers, a closed worker, a resize. Browsers that
are not there are skipped, in a line. --pictures fills a folder with pictures of the page, to be looked at.
"""

import argparse
import base64
import json
import math
import os
import struct
import subprocess
import sys
import tempfile
import time
import traceback

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from browser import Chromium, Firefox  # noqa: E402

MIXERS = ["sessa", "attention", "mamba2"]
SHAPE = "--dim 32 --layers 2 --heads 2"
PASSED, FAILED = [], []


def close(what, got, wanted, bound):
    worst = max(
        (abs(a - b) if math.isfinite(a) and math.isfinite(b) else math.inf)
        for a, b in zip(got, wanted, strict=True)
    )
    assert worst <= bound, f"{what}: off by {worst:.2e}, bound {bound:.0e}"
    print(f"      {what}: within {worst:.1e} (bound {bound:.0e})")


def read_tensors(data):
    """{name: (shape, numbers)} of a safetensors file's F32 tensors"""
    (n,) = struct.unpack("<Q", data[:8])
    header, out = json.loads(data[8 : 8 + n]), {}
    for name, tensor in header.items():
        if name != "__metadata__" and tensor["dtype"] == "F32":
            begin, end = tensor["data_offsets"]
            out[name] = (
                tensor["shape"],
                list(struct.unpack(f"<{(end - begin) // 4}f", data[8 + n + begin : 8 + n + end])),
            )
    return out


def with_zeros(data, names):
    """The file with these tensors zero, as dev/claims/knife.py makes it."""
    (n,) = struct.unpack("<Q", data[:8])
    header, data = json.loads(data[8 : 8 + n]), bytearray(data)
    for name in names:
        begin, end = header[name]["data_offsets"]
        data[8 + n + begin : 8 + n + end] = bytes(end - begin)
    return bytes(data)


class Native:
    """The native programs, in a folder of their own that holds the page's text."""

    def __init__(self, program, influence):
        self.program, self.influence_program = os.path.abspath(program), os.path.abspath(influence)
        self.folder = tempfile.mkdtemp()

    def path(self, name):
        return os.path.join(self.folder, name)

    def write(self, name, data):
        with open(self.path(name), "wb") as file:
            file.write(data)

    def read(self, name):
        with open(self.path(name), "rb") as file:
            return file.read()

    def run(self, command, *more, program=None):
        """Its standard output. command: words, to be split at spaces; more: words that may hold some"""
        words = [*command.split(), *more]
        done = subprocess.run([program or self.program, *words], cwd=self.folder, capture_output=True)
        assert done.returncode == 0, f"{words}: {done.stderr.decode()}"
        return done.stdout.decode()

    def log(self, name):
        with open(self.path(name)) as file:
            return [json.loads(line) for line in file]


class Page:
    """The page in a browser, and what a person does with it."""

    def __init__(self, browser, url):
        self.browser = browser
        browser.open(url)
        browser.until("$('status').textContent === 'ready'", 60)
        self.text = self.js("return TEXT;").encode()
        self.text_name = self.js("return TEXT_NAME;")

    def js(self, code, *arguments):
        return self.browser.script(code, *arguments)

    def status(self):
        return self.js("return $('status').textContent;")

    def train(self, mixer, steps, fields={}):
        self.js(
            """const form = $('settings');
            form.querySelector(`[name=mixer][value=${args[0]}]`).checked = true;
            form.querySelector('[name=size]').checked = true;
            for (const [name, value] of Object.entries(args[1])) form.elements[name].value = value;
            $('start').click();""",
            mixer,
            {"steps": str(steps), "seq": "64", "batch": "12", "lr": "3e-3", "seed": "1337"} | fields,
        )

    def losses(self, slot):
        return self.js("return [...runs[args[0]].points.values()];", slot)

    def done(self, slots, steps, seconds=240):
        self.browser.until(
            " && ".join(
                f"runs[{slot}] && runs[{slot}].step === {steps} && !runs[{slot}].active" for slot in slots
            ),
            seconds,
        )

    def drop(self, name, data):
        before = self.status()
        self.js(
            """$('status').textContent = '';
            const bytes = Uint8Array.from(atob(args[1]), (c) => c.charCodeAt(0));
            const transfer = new DataTransfer();
            const how = {dataTransfer: transfer, bubbles: true, cancelable: true};
            transfer.items.add(new File([bytes], args[0]));
            document.dispatchEvent(new DragEvent('drop', how));""",
            name,
            base64.b64encode(data).decode(),
        )
        self.browser.until("$('status').textContent", 60)
        return self.status() or before

    def saved(self, slot):
        """The files that the two buttons of a run save: {its name: bytes}"""
        return {
            name: base64.b64decode(data)
            for name, data in self.js(
                """
            const files = {}, blobs = [], make = URL.createObjectURL, anchor = HTMLAnchorElement.prototype;
            const click = anchor.click;
            URL.createObjectURL = (blob) => { blobs.push(blob); return make.call(URL, blob); };
            anchor.click = function () { blobs[blobs.length - 1].fileName = this.download; };
            try {
                for (const which of ['run', 'best']) await saveRun(args[0], which);
            } finally {
                URL.createObjectURL = make;
                anchor.click = click;
            }
            for (const blob of blobs) {
                const bytes = new Uint8Array(await blob.arrayBuffer());
                let string = '';
                for (let i = 0; i < bytes.length; i += 4096)
                    string += String.fromCharCode(...bytes.subarray(i, i + 4096));
                files[blob.fileName] = btoa(string);
            }
            return files;""",
                slot,
            ).items()
        }


# ----------------------------------------------------------------------------
# what is tested. Each leaves the page as the next may find it.


def losses(page, native):
    """50 steps of each mixer: the native program's losses and validations"""
    page.train("all", 50)
    page.done([0, 1, 2], 50)
    for slot, mixer in enumerate(MIXERS):
        native.run(
            f"--data {page.text_name} --mixer {mixer} {SHAPE} --steps 50 --eval-every 5 "
            f"--eval-batches 10 --log {mixer}.jsonl --out {mixer}.safetensors"
        )
        log = native.log(f"{mixer}.jsonl")
        close(f"{mixer}, losses of 50 steps", page.losses(slot), [entry["train_loss"] for entry in log], 1e-5)
        kept = page.js(
            "return [...runs[args[0]].kept.entries()].sort((a, b) => a[0] - b[0]).map((entry) => entry[1]);",
            slot,
        )
        close(
            f"{mixer}, validations", kept, [entry["val_loss"] for entry in log if "val_loss" in entry], 1e-5
        )
    drawn = page.js("return document.querySelectorAll('#loss path').length;")
    assert drawn == 6, f"{drawn} curves are drawn, not 6"


def both_ways(page, native):
    """A run saved by the page goes on natively, and the reverse; weights alone write the same text in both"""
    files = page.saved(0)
    assert set(files) == {"sessa.safetensors", "sessa.best.safetensors"}, sorted(files)
    for name, data in files.items():
        native.write(f"page.{name}" if "best" not in name else "page.sessa.best.safetensors", data)
    native.run("--resume page.sessa.safetensors --steps 60 --log on.jsonl")
    native.run("--resume sessa.safetensors --steps 60 --log straight.jsonl --out straight.safetensors")
    straight = [entry["train_loss"] for entry in native.log("straight.jsonl")]
    close(
        "steps 51 to 60 of the page's run, natively",
        [entry["train_loss"] for entry in native.log("on.jsonl")],
        straight,
        1e-5,
    )

    said = page.drop("sessa.safetensors", native.read("sessa.safetensors"))
    assert "a run at step 50 of 50" in said, said
    page.js("$('settings').elements.steps.value = 10; $('go-on').click();")
    page.done([0], 60)
    native.run(
        "--resume sessa.safetensors --steps 60 --decay-steps 60 --log stretched.jsonl --out "
        "stretched.safetensors"
    )
    close(
        "steps 51 to 60 of the native run, in the page",
        page.losses(0)[-10:],
        [entry["train_loss"] for entry in native.log("stretched.jsonl")],
        1e-5,
    )

    said = page.drop("sessa.best.safetensors", native.read("sessa.best.safetensors"))
    assert "weights loaded" in said, said
    ours = page.js("return ask('sample', {slot: 0, prompt: 'The ', n: 60, temperature: 0, seed: 1});")
    theirs = native.run(
        "--load sessa.best.safetensors --generate 60", "--prompt", "The ", "--temperature", "0"
    )
    assert ours == theirs, f"{ours!r} and {theirs!r}"
    print(f"      both write {ours[:30]!r}…")


def maps(page, native):
    """The maps and the memory by lag: those of dev/claims/influence"""
    T = 40
    begin = len(page.text) * 9 // 10
    string = page.text[begin : begin + T].decode()
    for slot, mixer in enumerate(MIXERS):
        weights = native.read(f"{mixer}.best.safetensors")
        native.write("given.safetensors", weights)
        said = page.drop(f"{mixer}.safetensors", weights)
        assert "weights loaded" in said, said
        for layer in range(2):
            native.run(
                f"out.safetensors --load given.safetensors --data {page.text_name} --out "
                f"no.safetensors --seq {T} --map {layer} --map-size {T} --targets 1 --probes 1",
                program=native.influence_program,
            )
            wanted = read_tensors(native.read("out.safetensors"))
            page.js(
                "choose('look'); $('look-model').value = args[0]; fillLayers();"
                "$('look-layer').value = args[1]; $('look-head').value = '-1';"
                "$('look-text').value = args[2]; await look();",
                str(slot),
                str(layer),
                string,
            )
            page.browser.until(f"seen.slot === {slot} && seen.layer === {layer} && seen.T === {T}", 30)
            for kind in {
                "sessa": ["direct", "feedback", "solve"],
                "attention": ["direct"],
                "mamba2": ["chain"],
            }[mixer]:
                shape, numbers = wanted[f"map.{kind}"]
                assert shape == [T, T]
                close(
                    f"{mixer}, layer {layer + 1}, {kind}",
                    page.js("return [...seen.maps[args[0]]];", kind),
                    numbers,
                    2e-6,
                )
            if mixer == "sessa":
                A, hops = wanted["map.feedback"][1], page.js("return [...seen.maps.hops];")
                squared = [
                    sum(A[t * T + u] * A[u * T + j] for u in range(T)) for t in range(T) for j in range(T)
                ]
                close("sessa, two hops", hops, squared, 2e-6)
                heads = page.js(
                    """const head = async (head) =>
                        [...await ask('matrix', {kind: 0, layer: args[0], head, T: args[1]})];
                    return Promise.all([0, 1].map(head));""",
                    layer,
                    T,
                )
                close(
                    "sessa, mean of the heads",
                    [(a + b) / 2 for a, b in zip(*heads)],
                    wanted["map.direct"][1],
                    2e-6,
                )
        native.run(
            f"out.safetensors --load given.safetensors --data {page.text_name} --out "
            "no.safetensors --seq 256 --sequences 4 --targets 1 --probes 1",
            program=native.influence_program,
        )
        wanted, tail = read_tensors(native.read("out.safetensors")), page.js(
            "return [...await ask('tail', {slot: args[0], ...TAIL})];", slot
        )
        kind = {"sessa": "solve", "attention": "direct", "mamba2": "chain"}[mixer]
        for layer in range(2):
            own = tail[layer * 258 : layer * 258 + 258]
            close(f"{mixer}, layer {layer + 1}, by lag", own[:256], wanted[f"layers.{layer}.{kind}"][1], 2e-6)
            x = [math.log(lag) for lag in range(4, 200)]
            y = [math.log(own[lag]) if own[lag] > 1e-30 else None for lag in range(4, 200)]
            if None not in y:
                mx, my = sum(x) / len(x), sum(y) / len(y)
                slope = sum((a - mx) * (b - my) for a, b in zip(x, y)) / sum((a - mx) ** 2 for a in x)
                close(f"{mixer}, layer {layer + 1}, its slope", [own[256]], [slope], 1e-9)
    dark = page.js(
        """const pen = document.querySelector('#maps canvas').getContext('2d'), side = pen.canvas.width;
        const data = pen.getImageData(0, 0, side, side).data, kinds = new Set();
        for (let i = 0; i < data.length; i += 4) kinds.add(`${data[i]},${data[i + 1]},${data[i + 2]}`);
        return kinds.size;"""
    )
    assert dark > 10, f"the map has {dark} colours only"


def pointing(page, native):
    """Arcs: of the letter that is pointed at, by keys and by pointer; their numbers are the map's"""
    said = page.drop("sessa.safetensors", native.read("sessa.best.safetensors"))
    assert "weights loaded" in said, said
    page.js(
        "choose('look'); $('look-model').value = '0'; fillLayers();"
        "$('look-text').value = 'Before we'; await look();"
    )
    page.browser.until("seen.T === 9 && seen.mixer === 'sessa'", 30)
    page.js(
        "pick(8); $('arcs').dispatchEvent(new KeyboardEvent('keydown', {key: 'ArrowLeft', bubbles: true}));"
    )
    assert page.js("return seen.picked;") == 7
    page.js("$('arcs').dispatchEvent(new KeyboardEvent('keydown', {key: 'Home', bubbles: true}));")
    assert page.js("return seen.picked;") == 0
    page.js("""const canvas = document.querySelector('#maps canvas'), box = canvas.getBoundingClientRect();
        const {cell, edge} = canvas.closest('[data-kind]');
        const at = {clientX: box.left + cell + 16, clientY: box.top + edge + 5.5 * cell, bubbles: true};
        canvas.dispatchEvent(new PointerEvent('pointerdown', at));""")
    assert page.js("return seen.picked;") == 5
    listed, weight = page.js(
        "return [$('arcs-list').textContent, Math.max(...seen.maps.direct.slice(5 * 9, 6 * 9))];"
    )
    assert f"{weight:.3f}" in listed, (weight, listed)
    bars = page.js("return document.querySelectorAll('#arcs rect').length;")
    assert bars == 9, f"{bars} bars of γ for 9 letters"
    page.js("$('look-text').value = args[0]; await look();", page.text[:512].decode())
    T, width = page.js("return [seen.T, document.querySelector('#maps canvas').clientWidth];")
    assert T == 512 and width < 2100, f"a map of {T} letters is {width} wide"
    page.js("$('look-text').value = args[0]; await look();", page.text[:513].decode())
    said = page.js("return $('look-state').textContent;")
    assert "512 are the most" in said, said


def knife(page, native):
    """A cut: the loss that --eval gives of a file that is cut alike; the model is whole again afterwards"""
    data = native.read("sessa.best.safetensors")
    page.drop("sessa.safetensors", data)
    page.js("choose('knife'); $('knife-model').value = '0'; await knife();")
    cuts = {
        "0": [],
        "1": ["gamma_ctx.weight", "gamma_bias"],
        "2": ["proj_fb.weight", "proj_fb.bias"],
        "3": ["q_proj.weight", "q_proj.bias"],
    }
    seen = []
    for value, names in cuts.items():
        for layer in range(2):
            native.write(
                "cut.safetensors", with_zeros(data, [f"layers.{layer}.mixer.{name}" for name in names])
            )
            loss = float(native.run(f"--load cut.safetensors --data {page.text_name} --eval").split()[1])
            page.js(
                "document.querySelector(`[name=cut${args[0]}][value='${args[1]}']`).click();", layer, value
            )
            page.browser.until(
                f"cutting.cuts[{layer}] === '{value}' && (cutting.cut ? true : {value} === 0)", 30
            )
            time.sleep(0.2)
            ours = page.js("await knife(); return cutting.cut ? cutting.cut.loss : cutting.whole.loss;")
            seen.append((ours, loss))
            page.js("document.querySelector(`[name=cut${args[0]}][value='0']`).click();", layer)
    close("losses of six cuts and of the whole", [a for a, _ in seen], [b for _, b in seen], 2e-6)
    assert len({round(a, 6) for a, _ in seen}) == 7, seen
    page.js("document.querySelector(`[name=cut0][value='1']`).click(); await knife();")
    texts = page.js(
        "return [...document.querySelectorAll('#knife-texts pre')].map((box) => box.textContent);"
    )
    assert len(texts) == 2 and texts[0] != texts[1] and all(text.startswith("The ") for text in texts), texts


def three_tokens(page, native):
    """Step by step: every number shown is the one that the equations give, computed again here"""
    page.js("choose('steps');")
    for preset in (None, "other", "even", "strong", "cut", "other"):
        if preset:
            page.js("await preset(args[0]);", preset)
        page.js(
            "const input = document.querySelector('#input-abar input'); input.value = args[0];"
            "input.dispatchEvent(new Event('input'));",
            0.3 if preset else 0.7,
        )
        time.sleep(0.3)
        state = page.js("""return {inputs: three.inputs, params: [...three.params], table: three.tables[0],
            shown: Object.fromEntries([...document.querySelectorAll('#equations [data-key]')].map(
                (e) => [e.dataset.key, Number(e.textContent.replace('−', '-'))]))};""")
        wanted = mixer_by_hand(state)
        assert set(wanted) <= set(state["shown"]), sorted(set(wanted) - set(state["shown"]))
        keys = sorted(wanted)
        close(
            f"{preset or 'at first'}: {len(keys)} numbers",
            [state["shown"][key] for key in keys],
            [wanted[key] for key in keys],
            6e-5,
        )
    # each line that computes a number shows it, in every function
    silent = page.js("""const silent = [];
        three.stages.forEach((stage, i) => {
            three.stage = i;
            three.at = -1;
            showStages();
            for (const row of document.querySelectorAll('#listing tr')) {
                const line = row.querySelector('.n')?.textContent;
                if (LISTING.names[line] && !row.querySelector('.value'))
                    silent.push(`${stage.name} ${LISTING.lines[line].trim()}`);
            }
        });
        return [three.stages.map((stage) => stage.name), silent];""")
    assert silent[0] == [
        "linear_forward",
        "rope_forward",
        "attention_forward",
        "gain_forward",
        "feedback_forward",
        "feedback_backward",
        "attention_backward",
        "rope_backward",
        "linear_backward",
        "gain_backward",
    ], silent[0]
    assert not silent[1], silent[1]
    page.js("three.stage = 4; three.at = -1; showStages(); $('first').click();")
    one = page.js("return document.querySelectorAll('#listing .value').length;")
    page.js("$('next').click();")
    two = page.js("return document.querySelectorAll('#listing .value').length;")
    assert (one, two) == (1, 2), (one, two)


def mixer_by_hand(state):
    """The equations of the head of train_sessa.c, in float64: three tokens, one head, two numbers wide"""
    params = {}
    for row in state["table"]:
        params[row["name"]] = state["params"][row["offset"] : row["offset"] + row["count"]]
    p = {name.replace("layers.0.mixer.", ""): x for name, x in params.items()}
    abar = [state["inputs"][2 * t : 2 * t + 2] for t in range(3)]
    ds = [state["inputs"][6 + 2 * t : 8 + 2 * t] for t in range(3)]

    def linear(x, weight, bias):
        return [bias[o] + sum(weight[o * 2 + i] * x[i] for i in range(2)) for o in range(len(bias))]

    def turn(x, t):
        return [x[0] * math.cos(t) - x[1] * math.sin(t), x[0] * math.sin(t) + x[1] * math.cos(t)]

    def softmax(q, keys):
        e = [math.exp((q[0] * k[0] + q[1] * k[1]) / math.sqrt(2)) for k in keys]
        return [x / sum(e) for x in e]

    q = [turn(linear(x, p["q_proj.weight"], p["q_proj.bias"]), t) for t, x in enumerate(abar)]
    k = [turn(linear(x, p["k_proj.weight"], p["k_proj.bias"]), t) for t, x in enumerate(abar)]
    v = [linear(x, p["v_proj.weight"], p["v_proj.bias"]) for x in abar]
    fb = [linear(x, p["proj_fb.weight"], p["proj_fb.bias"]) for x in abar]
    gamma = [
        0.999 * math.tanh(p["gamma_bias"][0] + sum(w * x for w, x in zip(p["gamma_ctx.weight"], row)))
        for row in abar
    ]
    f, s, alpha, out = [], [], [], {}
    for t in range(3):
        weights = softmax(q[t], k[: t + 1])
        f.append([sum(w * row[i] for w, row in zip(weights, v)) for i in range(2)])
        alpha.append(softmax(fb[t][:2], [row[2:] for row in fb[:t]]))
        s.append([f[t][i] + gamma[t] * sum(alpha[t][j] * s[j][i] for j in range(t)) for i in range(2)])
    lam = [list(row) for row in ds]
    for t in (2, 1, 0):
        for j in range(t):
            for i in range(2):
                lam[j][i] += gamma[t] * alpha[t][j] * lam[t][i]
    for t in range(3):
        out[f"γ{t}"] = gamma[t]
        out[f"dγ{t}"] = sum(alpha[t][j] * sum(lam[t][i] * s[j][i] for i in range(2)) for j in range(t))
        for i in range(2):
            out.update({f"f{t}{i}": f[t][i], f"s{t}{i}": s[t][i], f"λ{t}{i}": lam[t][i]})
        for j in range(t):
            out[f"α{t}{j}"] = alpha[t][j]
    return out


def bad_input(page, native):
    """A file that is no text, a broken checkpoint, wrong numbers, unknown letters: a line, nothing is lost"""
    page.js("choose('train');")
    before = page.js("return [runs.map((run) => run.step), text.name, runs[1].points.size];")
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 9
    checkpoint = native.read("sessa.best.safetensors")
    for name, data in (
        ("picture.png", png),
        ("empty.txt", b""),
        ("cut.safetensors", checkpoint[:5000]),
        ("words.safetensors", b"no checkpoint at all"),
        ("zeros.safetensors", bytes(100)),
    ):
        said = page.drop(name, data)
        assert name in said and "\n" not in said and len(said) < 300, (name, said)
        assert page.js("return $('status').className;") == "bad", said
        print(f"      {said}")
    for field, value in (("steps", "many"), ("lr", "-1"), ("seq", "0"), ("seq", "90000"), ("batch", "1e99")):
        page.js("$('status').textContent = '';")
        page.train("sessa", 20, {field: value})
        page.browser.until(
            "$('status').className === 'bad' && $('status').textContent",
            30,
        )
        print(f"      {page.status()}")
    lacking = next(byte for byte in range(33, 127) if byte not in page.text)
    page.js(
        "choose('look'); $('look-text').value = args[0]; await look();",
        f"a {chr(lacking)} b",
    )
    said = page.js("return $('look-state').textContent;")
    assert f"0x{lacking:02X}" in said, said
    page.js("$('look-text').value = ''; await look();")
    assert "no text" in page.js("return $('look-state').textContent;")
    assert before == page.js("return [runs.map((run) => run.step), text.name, runs[1].points.size];")
    own = "Größe: what is dropped is trained on, byte by byte. "
    said = page.drop("own text.txt", (own * 60).encode())
    assert f"a text of {len(own.encode()) * 60} bytes" in said, said
    page.train("sessa", 5, {"seq": "32"})
    page.done([0], 5)
    page.js(
        "$('look-model').value = '0'; $('look-text').value = args[0]; await look();",
        own,
    )
    assert page.js("return [seen.T, seen.letters.length];") == [len(own.encode())] * 2
    page.js("text = {name: TEXT_NAME, bytes: new TextEncoder().encode(TEXT)};")


def closed_worker(page, native):
    """A worker closed while it trains is started again; the run ends as if nothing had been, on its own text"""
    page.js("choose('train');")
    page.train("sessa", 400)
    page.browser.until("runs[0].active && runs[0].step > 120", 120)
    page.drop("other.txt", b"Another text, which is not the run's. " * 100)
    page.js("worker.terminate();")
    page.browser.until("$('status').textContent.includes('started again')", 120)
    page.browser.until("runs[0].active", 10)
    page.done([0], 400)
    native.run(
        f"--data {page.text_name} {SHAPE} --steps 400 --eval-every 20 --eval-batches 10 "
        "--log whole.jsonl --out whole.safetensors"
    )
    wanted = [entry["train_loss"] for entry in native.log("whole.jsonl")]
    got = page.losses(0)
    assert len(got) == 400
    close("all 400 losses", got, wanted, 1e-4)
    page.js("text = {name: TEXT_NAME, bytes: new TextEncoder().encode(TEXT)};")


def stop_and_go(page, native):
    """Stop stops, Go on goes on, a wrong number does neither: the losses are those of a run left alone"""
    page.train("attention", 300)
    page.browser.until("runs[1].active && runs[1].step > 20", 60)
    page.train("attention", "few")  # what cannot be started stops nothing
    page.browser.until("$('status').textContent.includes(\"not 'few'\")", 30)
    assert page.js("return runs[1].active;")
    page.js("$('stop').click();")
    page.browser.until("!runs[1].active && $('status').textContent.startsWith('stopped')", 30)
    time.sleep(0.5)
    step = page.js("return runs[1].step;")
    time.sleep(0.7)
    assert page.js("return runs[1].step;") == step < 300
    page.js("$('go-on').click();")
    page.done([1], 300)
    native.run(
        f"--data {page.text_name} --mixer attention {SHAPE} --steps 300 --eval-every 15 "
        "--eval-batches 10 --log stop.jsonl --out stop.safetensors"
    )
    close("its losses", page.losses(1), [entry["train_loss"] for entry in native.log("stop.jsonl")], 1e-4)


def resize(page, native):
    """Wide, a phone's width and back: nothing is wider than the window, and pictures are drawn anew"""
    page.js("$('look-text').value = 'Before we proceed any further'; choose('look'); await look();")
    for width in (1200, 500, 1000):
        page.browser.size(width, 800)
        page.browser.until(f"Math.abs(window.innerWidth - {width}) < 120", 20)
        time.sleep(0.8)
        for part in ("train", "look", "steps", "knife"):
            page.js("choose(args[0]);", part)
            time.sleep(0.5)
            inner, outer, svg = page.js(
                """return [document.documentElement.clientWidth, document.documentElement.scrollWidth,
                Math.max(0, ...[...document.querySelectorAll('.picture svg')].map(
                    (svg) => svg.getBoundingClientRect().width))];"""
            )
            assert outer <= inner, f"{part}: {outer} wide in a window of {inner}"
            assert svg <= inner, f"{part}: a picture {svg} wide in a window of {inner}"


def no_network(page, native):
    """The page asks nothing of any network"""
    asked = page.js(
        "const names = performance.getEntriesByType('resource').map((entry) => entry.name);"
        "return names.filter((name) => !/^(blob|data):/.test(name));"
    )
    assert not asked, asked


TESTS = [
    losses,
    both_ways,
    maps,
    pointing,
    knife,
    three_tokens,
    bad_input,
    closed_worker,
    stop_and_go,
    resize,
    no_network,
]


def pictures(page, folder):
    """Every part, light, dark and as wide as a phone: to be looked at."""
    os.makedirs(folder, exist_ok=True)
    page.browser.size(1200, 900)
    page.train("all", 300)
    page.done([0, 1, 2], 300)
    page.js(
        "$('look-text').value = 'Before we proceed any further'; choose('knife');"
        "document.querySelector(`[name=cut0][value='1']`).click(); await tryEach();"
    )
    for name, width, dark in (("light", 1200, False), ("dark", 1200, True), ("phone", 375, False)):
        page.browser.size(width, 900)
        page.browser.dark(dark)
        for part in ("train", "look", "steps", "knife"):
            page.js("choose(args[0]);", part)
            time.sleep(2.5)
            page.browser.picture(os.path.join(folder, f"{part}-{name}.png"))


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--page", default="sessa.html")
    parser.add_argument("--program", default="./train_sessa")
    parser.add_argument("--influence", default="./influence")
    parser.add_argument("--browser", choices=["chromium", "firefox"])
    parser.add_argument("--only", nargs="*", help="names of tests")
    parser.add_argument("--pictures", help="a folder to be filled with pictures of the page (Chromium)")
    options = parser.parse_args()
    url = "file://" + os.path.abspath(options.page)
    for kind in (Chromium, Firefox):
        if options.browser and options.browser != kind.name.lower():
            continue
        if not kind.there():
            print(f"{kind.name}: not here, skipped")
            continue
        browser = kind()
        try:
            page, native = Page(browser, url), Native(options.program, options.influence)
            native.write(page.text_name, page.text)
            for test in [] if options.pictures else TESTS:
                if options.only and test.__name__ not in options.only and test is not losses:
                    continue
                start = time.time()
                print(f"{kind.name}: {test.__doc__}", flush=True)
                try:
                    test(page, native)
                    PASSED.append(test)
                    print(f"ok    {test.__name__} ({time.time() - start:.0f} s)", flush=True)
                except Exception as error:  # the others are still worth running
                    FAILED.append(test)
                    where = traceback.extract_tb(error.__traceback__)[1:2]
                    print(
                        f"FAIL  {test.__name__}: {error} (line {where[0].lineno if where else '?'})",
                        flush=True,
                    )
            if options.pictures and kind is Chromium:
                pictures(page, options.pictures)
        finally:
            browser.close()
    print(f"{len(PASSED)} passed, {len(FAILED)} failed")
    return len(FAILED) > 0


if __name__ == "__main__":
    sys.exit(main())
