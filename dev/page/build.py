#!/usr/bin/env python3
"""Makes the page: one HTML file that holds the program (WebAssembly), its worker and the beginning of a text.

  python3 dev/page/build.py --text data/tinyshakespeare.txt --out sessa.html

Needs emscripten (Debian: apt install emscripten). Nothing else is fetched, by this script or by the page.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.normpath(os.path.join(HERE, "..", ".."))
FLAGS = [
    "-O3",
    "-msimd128",
    "-ffast-math",
    "-fno-finite-math-only",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-unknown-warning-option",
]
LINK = [
    "-sSINGLE_FILE=1",
    "-sENVIRONMENT=worker",
    "-sALLOW_MEMORY_GROWTH=1",
    "-sTOTAL_STACK=2097152",
    "-sFORCE_FILESYSTEM=1",
    "-sEXPORTED_RUNTIME_METHODS=['ccall','FS','UTF8ToString','HEAPU8','HEAPF32','HEAPF64']",
    "--no-entry",
]
SCRIPTS = ("draw.js", "page.js", "train.js", "look.js", "steps.js", "knife.js", "begin.js")  # in this order
BEGINNING = 120000  # bytes of the text that the page holds


def declarators(text):
    """The parts of a declaration between its commas, those in brackets left alone."""
    parts, depth = [""], 0
    for c in text:
        depth += (c in "([{") - (c in ")]}")
        if c == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += c
    return [part.strip() for part in parts]


def split_prefix(text):
    """`for (...) x = 1;` -> ("for (...) ", "x = 1;")"""
    prefix = ""
    while True:
        match = re.match(r"(for|if|while) \(", text)
        if match:
            depth, i = 0, match.end() - 1
            while i < len(text):
                depth += (text[i] == "(") - (text[i] == ")")
                i += 1
                if depth == 0:
                    break
            end = i + (text[i : i + 1] == " ")
        elif text.startswith("else "):
            end = 5
        else:
            return prefix, text
        prefix, text = prefix + text[:end], text[end:]


def add_notes(source):
    """The program with a note after every assignment of its plain layers, each on the line that it is about;
    and what the page shows of them:
    {"functions": [{name, first, last}], "names": {line: [variables]}, "lines": {line: text}}
    """
    lines = source.split("\n")
    first = next(i for i, text in enumerate(lines) if text.startswith("// layers, in the order"))
    last = next(i for i in range(first, len(lines)) if text_is_rule(lines[i]) and i > first + 2)
    names, functions, shown = {}, [], {}
    for i in range(first, last):
        number, text = i + 1, lines[i]
        code = re.sub(r"\s*//.*$", "", text)
        shown[number] = text
        if re.match(r"static .*\w+\(", code):
            functions.append({"name": re.search(r"(\w+)\(", code)[1], "first": number, "last": number})
        if code == "}":
            functions[-1]["last"] = number
        if not functions or (functions[-1]["last"] > functions[-1]["first"] and code != "}"):
            continue
        if code.endswith(") {") and not code.startswith("  "):  # the signature's last line
            lines[i] = code + f" NOTE_ENTER({number});"
        elif re.match(r" {20,}.*\) {$", code) and lines[i - 1].endswith(","):
            lines[i] = code + f" NOTE_ENTER({number});"
        elif re.match(r"\s+for \(int64_t t = .* {$", code):
            lines[i] = code + f" NOTE_ROW({number}, t);"
        if not code.endswith(";") or code.lstrip().startswith(("return", "if (!plain)")):
            continue
        indent = re.match(r"\s*", code)[0]
        prefix, statement = split_prefix(code.strip())
        noted = []
        declaration = re.match(r"(?:const )?(?:real|double) (.*);$", statement)
        if declaration:
            noted = [
                part.split(" = ")[0]
                for part in declarators(declaration[1])
                if " = " in part and part[0] != "*"
            ]
            noted = [name for name in noted if re.fullmatch(r"\w+", name)]
            if noted:
                notes = " ".join(f"NOTE({number}, {name}, {k});" for k, name in enumerate(noted))
                lines[i] = f"{code} {notes}"
        else:
            rest = statement
            while True:
                match = re.match(r"(\w+(?:\[[^=]*\])?) (?:[-+*/]?=) ", rest)
                if not match:
                    break
                noted.append(match[1])
                rest = rest[match.end() :]
            if noted:
                notes = " ".join(f"NOTE({number}, {name}, {k});" for k, name in enumerate(noted))
                lines[i] = f"{indent}{prefix}{{ {statement} {notes} }}"
        if noted:
            names[number] = noted
    return "\n".join(lines), {"functions": functions, "names": names, "lines": shown}


def text_is_rule(text):
    return text.startswith("// -----")


def beginning(path):
    """The first part of a text, up to the end of a line, and a name for it."""
    with open(path, "rb") as file:
        data = file.read(BEGINNING)
    stem, ending = os.path.splitext(os.path.basename(path))
    return data[: data.rfind(b"\n") + 1].decode(), f"{stem}-beginning{ending}"


def embed(value):
    """Text or other data as it may stand in a <script>, where "</script" and "<!--" would end or hide it."""
    return json.dumps(value).replace("<", "\\u003c")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", default=os.path.join(ROOT, "data", "tinyshakespeare.txt"))
    parser.add_argument("--out", default=os.path.join(ROOT, "sessa.html"))
    options = parser.parse_args()
    emcc = os.environ.get("EMCC") or shutil.which("emcc")
    if not emcc:
        sys.exit(
            "make page needs emscripten: apt install emscripten (Debian), brew install emscripten (macOS)"
        )
    if not os.path.exists(options.text):
        sys.exit(f"{options.text}: not there; sh data/tinyshakespeare.sh fetches it")
    with open(os.path.join(ROOT, "train_sessa.c"), encoding="utf-8") as file:
        noted, listing = add_notes(file.read())
    env = dict(os.environ)
    env["NODE_PATH"] = ":".join(
        filter(None, [env.get("NODE_PATH"), "/usr/share/nodejs"])
    )  # where Debian keeps acorn
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, "noted_sessa.c"), "w", encoding="utf-8") as file:
            file.write(noted)
        script = os.path.join(folder, "program.js")
        command = [
            emcc,
            *FLAGS,
            "-I",
            folder,
            os.path.join(HERE, "page.c"),
            os.path.join(HERE, "three.c"),
            *LINK,
            "-o",
            script,
        ]
        if subprocess.run(command, env=env).returncode:
            sys.exit("emscripten failed")
        with open(script, encoding="utf-8") as file:
            program = file.read()
    parts = {}
    for name in ("page.html", "page.css", "worker.js", *SCRIPTS):
        with open(os.path.join(HERE, name), encoding="utf-8") as file:
            parts[name] = file.read()
    script = "\n".join(parts[name] for name in SCRIPTS)
    if "</script" in script:
        sys.exit("a part of the page would end its script")
    page = parts["page.html"].replace("/* STYLE */", parts["page.css"]).replace("/* PAGE */", script)
    # the worker's own lines first: they say where the program's output goes
    page = page.replace('"WORKER"', embed(parts["worker.js"] + "\n" + program))
    text, name = beginning(options.text)
    page = page.replace('"TEXT"', embed(text)).replace('"TEXT NAME"', embed(name))
    page = page.replace('"LISTING"', embed(listing))
    with open(options.out, "w", encoding="utf-8") as file:
        file.write(page)
    print(f"{options.out}: {len(page.encode()) / 1e3:.0f} KB; open it in a browser")


if __name__ == "__main__":
    main()
