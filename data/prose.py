"""English prose for long contexts, 50 MB or more, from free books and documentation that Debian packages:
data/prose.txt.

  data/prose.py                                        # fetches 150 MB of packages with apt-get download; needs Debian
  data/prose.py --packages anarchism perl-doc --out /tmp/some.txt
  data/prose.py --keep /tmp/debs                       # packages that lie there are not fetched again
  ./train_sessa --data data/prose.txt --seq 8192 --out prose.safetensors

Nothing is installed, and none of the text is part of this repository. prose_licences.txt beside the text
names each package's version, its licence, and how much came of it; the packages' own copyright files follow
there in full.

A document is one file of a package: HTML, plain text, Perl's pod, the kernel's reStructuredText, or a
dictionary. Taken are its paragraphs that read as prose: a sentence's length or more, begun with a capital and
ended with a mark, nearly all letters, with the little words of English; no code, no tables, no lists of
names, no paragraph twice. Typographic marks become ASCII, and all else that is not ASCII loses its paragraph.
Paragraphs of a document keep their order, one a line with an empty line after it; documents come in random
order, the same every time. The text depends on the release of Debian, and so does a loss on it: tell it by
its hash.
"""
import argparse
import gzip
import hashlib
import html.parser
import os
import re
import shutil
import subprocess
import sys
import tempfile

from example_set import Stream

# package: licence, as its copyright file has it. Some are names of the release's current version, which they depend on.
PACKAGES = {
    "anarchism": "GPL-2+",
    "debian-handbook": "CC-BY-SA-3.0 or GPL-2+",
    "debian-policy": "GPL-2+",
    "debian-reference-en": "GPL-2+",
    "developers-reference": "GPL-2+",
    "dict-gcide": "GPL-2+",
    "erlang-doc": "Apache-2.0",
    "git-doc": "GPL-2",
    "harden-doc": "GPL-2+",
    "libreoffice-help-en-us": "MPL-2.0",
    "linux-doc": "GPL-2",
    "perl-doc": "Artistic or GPL-1+",
    "postgresql-doc": "PostgreSQL",
    "python-django-doc": "BSD-3-Clause",
    "python3-doc": "PSF-2",
    "sqlite3-doc": "public domain",
}
SMALL = set("the of and to a in is that it for as with be by on not are this or which from at an was have".split())
ASCII = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": " - ", "…": "...", "\u00a0": " ", "\u00ad": "", "‐": "-", "‑": "-",
                       "é": "e", "è": "e", "ö": "o", "ü": "u", "ä": "a", "ç": "c"})
PLAIN = re.compile(r"[A-Za-z ,.;:'\"()?!-]")


class Paragraphs(html.parser.HTMLParser):
    """The texts of an HTML page's paragraphs, list items and definitions."""
    BLOCKS = {"p", "li", "dd", "blockquote", "div", "td", "h1", "h2", "h3", "h4", "h5", "h6", "dt", "tr", "table", "ul", "ol", "dl", "section"}
    SILENT = {"pre", "script", "style", "nav", "header", "footer", "table", "title"}

    def __init__(self):
        super().__init__()
        self.out, self.text, self.silent = [], [], 0

    def flush(self):
        self.out.append(" ".join("".join(self.text).split()))
        self.text = []

    def handle_starttag(self, tag, attrs):
        if tag in self.BLOCKS:
            self.flush()
        self.silent += tag in self.SILENT

    def handle_endtag(self, tag):
        if tag in self.BLOCKS:
            self.flush()
        self.silent = max(0, self.silent - (tag in self.SILENT))

    def handle_data(self, data):
        if not self.silent:
            self.text.append(data)


def of_html(text):
    parser = Paragraphs()
    parser.feed(text)
    parser.flush()
    return parser.out


def of_text(text):
    """Paragraphs of plain text, pod or reStructuredText, their marks taken away; what is indented is code."""
    text = re.sub(r"[A-Z]<<* ?([^<>]*?) ?>*>", r"\1", text)                    # pod's C<…>
    text = re.sub(r":[a-z:]+:`([^`<]*?)(?: ?<[^>]*>)?`", r"\1", text).replace("``", "").replace("**", "")
    parts = re.split(r"\n\s*\n", text)
    return [" ".join(part.split()) for part in parts if not part.startswith((" ", "\t", "=", "..", "\n "))]


def of_dictionary(text):
    """The definitions and quotations of GCIDE."""
    return [re.sub(r"[{}]|\[1913 Webster\]|\[PJC\]", "", " ".join(part.split())).strip() for part in re.split(r"\n\s*\n", text)]


def is_prose(x):
    """Whether a paragraph reads as prose."""
    if len(x) < 80 or not (x[0].isupper() or x[0] in "\"'(") or x[-1] not in ".!?:\"')" or not x.isascii():
        return False
    words = re.findall(r"[A-Za-z']+", x)
    return len(PLAIN.findall(x)) >= 0.96 * len(x) and len(words) >= 12 and sum(word.lower() in SMALL for word in words) >= 0.2 * len(words)


def documents(folder):
    """[(path, its paragraphs)] of an unpacked package, its files in order of their names."""
    out = []
    for place, folders, names in os.walk(folder):
        folders.sort()
        if re.search(r"/(po|locale|translations|html/(?!en)[a-z]{2}(-[A-Z]{2})?)(/|$)", place):
            continue        # other languages
        for name in sorted(names):
            path = os.path.join(place, name)
            kind = re.sub(r"\.(gz|dz)$", "", name).rsplit(".", 1)[-1].lower()
            # a page in another language ends as in .de.html
            other = re.search(r"\.(?!en)[a-z]{2}(-[a-z]{2})?\.(html|txt)", name)
            if other or os.path.islink(path) or name.startswith(("copyright", "changelog")):
                continue
            if kind not in ("html", "htm", "txt", "pod", "rst", "dict"):
                continue
            with gzip.open(path) if name.endswith((".gz", ".dz")) else open(path, "rb") as file:
                text = file.read().decode("utf-8", "replace")
            split = of_html if kind in ("html", "htm") else of_dictionary if kind == "dict" else of_text
            out.append((os.path.relpath(path, folder), split(text)))
    return out


def run(command, folder=None):
    try:
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder, errors="replace")
    except OSError as error:
        sys.exit(f"{command[0]}: {error.strerror}: this needs Debian's tools")
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def fetch(package, folder):
    """(path, (name, version)) of the package, downloaded into the folder if it is not there; of one that only names its current
    version, of that."""
    def there(name):
        return sorted(file for file in os.listdir(folder) if file.startswith(name + "_") and file.endswith(".deb"))

    found = there(package)
    if not found:
        stem = re.escape(package.removesuffix("-doc"))
        depends = re.findall(rf"^  Depends: ({stem}[\w.+]*-doc(?:-[\d.]+)?)$", run(["apt-cache", "depends", package]), re.M)
        package = depends[0] if depends else package
        if not there(package):
            print(f"fetching {package}", flush=True)
            run(["apt-get", "download", "-qq", package], folder)
        found = there(package)
    return os.path.join(folder, found[-1]), found[-1].split("_")[:2]


def collect(unpacked, seen):
    """The package's documents as texts, paragraphs in `seen` left out and added to it."""
    out = []
    for path, paragraphs in documents(unpacked):
        kept = []
        for x in paragraphs:
            x = " ".join(x.translate(ASCII).split())
            digest = hashlib.blake2b(x.encode(), digest_size=10).digest()
            if is_prose(x) and digest not in seen:
                seen.add(digest)
                kept.append(x)
        if kept:
            out.append("\n\n".join(kept) + "\n\n")
    return out


def write(path, text):
    try:
        with open(path + ".part", "w") as file:
            file.write(text)
        os.replace(path + ".part", path)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packages", nargs="+", choices=PACKAGES, default=list(PACKAGES), help="only these")
    parser.add_argument("--keep", metavar="FOLDER", help="where packages are kept [nowhere]")
    parser.add_argument("--out", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "prose.txt"), help="[data/prose.txt]")
    o = parser.parse_args()
    texts, rows, copyrights, seen = [], [], [], set()
    with tempfile.TemporaryDirectory() as temporary:
        if o.keep:
            os.makedirs(o.keep, exist_ok=True)
        for package in o.packages:
            path, (name, version) = fetch(package, o.keep or temporary)
            unpacked = os.path.join(temporary, name)
            run(["dpkg-deb", "-x", path, unpacked])
            made, version = collect(unpacked, seen), version.replace("%3a", ":")
            try:
                with open(os.path.join(unpacked, "usr", "share", "doc", name, "copyright"), errors="replace") as file:
                    copyrights.append(f"\n{'=' * 80}\n{name} {version}\n\n{file.read()}")
            except OSError as error:
                sys.exit(f"{error.filename}: {error.strerror}")
            shutil.rmtree(unpacked)
            rows.append(f"{name:24s} {version:28s} {PACKAGES[package]:24s} {len(made):6,d} documents {sum(map(len, made)) / 1e6:6.1f} MB")
            print(rows[-1], flush=True)
            texts += made
    Stream(0).shuffle(texts)
    text = "".join(texts)
    digest = hashlib.sha256(text.encode()).hexdigest()
    told = f"{len(text):,} bytes, sha256 {digest}. A package's licence is that of most of it; all of them follow.\n"
    write(os.path.splitext(o.out)[0] + "_licences.txt", "\n".join([*rows, "", told, *copyrights]))
    write(o.out, text)
    print(f"{o.out}: {len(text):,} bytes, {len(set(text))} different, sha256 {digest[:16]}…")


if __name__ == "__main__":
    main()
