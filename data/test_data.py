"""Tests of the generators of this folder and of the conversion to token shards: data/test_data.py, or pytest data/test_data.py.
With --program ./train_sessa the program must also read what they write.
"""
import contextlib
import gettext
import glob
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile

import numpy as np
from safetensors.numpy import load_file, save_file

DATA = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [DATA, os.path.join(DATA, "..", "dev", "pytorch")]
import mqar
import prose
import symbolsoup
from runner import Skip, run_tests
from sessa import read_metadata

PROGRAM = os.path.abspath(sys.argv[sys.argv.index("--program") + 1]) if "--program" in sys.argv else None


def run(script, *arguments, code=0, output=None):
    """Its output; the exit code must be `code`, and what goes wrong must be said in one line that holds `output`."""
    done = subprocess.run([sys.executable, os.path.join(DATA, script), *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == code, (script, arguments, done.returncode, done.stderr)
    if code:
        assert output in done.stderr.strip().splitlines()[-1] and "Traceback" not in done.stderr, done.stderr
    return done.stdout


def read_with_program(train, val, *options):
    if PROGRAM:
        with tempfile.TemporaryDirectory() as folder:
            log = os.path.join(folder, "log.jsonl")
            shape = ["--dim", "16", "--layers", "1", "--heads", "2", "--steps", "2", "--batch", "4"]
            done = subprocess.run([PROGRAM, "--data", train, "--val", val, *shape, "--log", log, "--out",
                                   os.path.join(folder, "out.safetensors"), *options], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            with open(log) as lines:
                return json.loads(lines.readlines()[-1])


def test_symbolsoup():
    with tempfile.TemporaryDirectory() as folder:
        a, b, c = (os.path.join(folder, x) for x in "abc")
        for prefix, seed in ((a, 5), (b, 5), (c, 6)):
            run("symbolsoup.py", "--train", 60, "--val", 25, "--test", 0, "--seed", seed, "--prefix", prefix)
        files = [open(x + "_train.safetensors", "rb").read() for x in (a, b, c)]
        assert files[0] == files[1] != files[2] and not os.path.exists(a + "_test.safetensors")
        train, val = (load_file(f"{a}_{split}.safetensors") for split in ("train", "val"))
        assert train["inputs"].shape == train["targets"].shape == (60, 600) and val["inputs"].shape == (25, 600)
        assert int(read_metadata(a + "_train.safetensors")["vocab_size"]) == 43
        names, classes = symbolsoup.TOKENS, []
        for ids, targets in zip(train["inputs"], train["targets"]):
            (place,) = np.flatnonzero(targets >= 0)
            assert ids[place] == names.index("<label>") and 400 <= place + 1 <= 600
            classes.append(int(targets[place]) - len(names))
            lines = "".join(names[i] for i in ids[:place + 1]).split("\n")
            assert lines[::2] == ["<bos>", "<sep1>", "<sep2>", "<sep1>", "<sep2>", "<sep> <label>"]
            letters = [line.split(" ") for line in lines[1::2]]
            assert len(letters) == 5 and all(len(x) == 1 and x in symbolsoup.LETTERS for line in letters for x in line)
            noise, total = sum(len(x) for x in letters[::2]), sum(map(len, letters))
            assert 2 * total + 13 == place + 1 and int(0.3 * total) <= noise <= int(0.6 * total)
        assert (np.bincount(classes) == 3).all() and len(set(classes)) == 20 and classes != sorted(classes)
        last = read_with_program(a + "_train.safetensors", a + "_val.safetensors")
        assert last is None or 0 <= last["val_accuracy"] <= 1
        run("symbolsoup.py", "--train", -1, code=2, output="must not be negative")
        run("symbolsoup.py", "--train", 20, "--prefix", "/nowhere/x", code=1, output="No such file")


def test_bytes():
    """The defaults' files are byte for byte those of the tables in claims.md, whatever options came since."""
    want = {"symbolsoup": "1a510cc05636bc7563b050c4ae6e550dc8f2971d7019647f9ef5a77f8446c642",
            "mqar": "9fb718153f6f86e2b8aa239af8184fed2fe8afd2c38979c960b75c3803d55a5a"}
    with tempfile.TemporaryDirectory() as folder:
        for name, digest in want.items():
            prefix = os.path.join(folder, name)
            run(name + ".py", "--train", 300, "--val", 0, "--test", 0, "--prefix", prefix)
            with open(prefix + "_train.safetensors", "rb") as file:
                assert hashlib.sha256(file.read()).hexdigest() == digest, name


def test_symbolsoup_lengths():
    with tempfile.TemporaryDirectory() as folder:
        prefix = os.path.join(folder, "x")
        for low, high in ((23, 24), (30, 41), (900, 1024)):
            run("symbolsoup.py", "--train", 40, "--val", 0, "--test", 0, "--min-tokens", low, "--max-tokens", high, "--prefix", prefix)
            targets = load_file(prefix + "_train.safetensors")["targets"]
            lengths = targets.argmax(1) + 1
            assert targets.shape == (40, high) and low <= lengths.min() and lengths.max() <= high and (lengths % 2 == 1).all()
            assert read_metadata(prefix + "_train.safetensors")["min_tokens"] == str(low)
            assert lengths.max() - lengths.min() >= 0.7 * (high - low - 2)
    for low, high in ((22, 30), (500, 499), (40, 40)):
        run("symbolsoup.py", "--min-tokens", low, "--max-tokens", high, code=2, output="none has")


def test_mqar():
    """Every answer follows from the pairs alone, lies as far back as it says, and the noise has distractors."""
    with tempfile.TemporaryDirectory() as folder:
        a, b = (os.path.join(folder, x) for x in "ab")
        for prefix in (a, b):
            run("mqar.py", "--train", 100, "--val", 40, "--test", 50, "--value-length", 2, "--prefix", prefix, "--pairs", 12, "--queries", 5)
        assert open(a + "_test.safetensors", "rb").read() == open(b + "_test.safetensors", "rb").read()
        o = mqar.parse(["--value-length", "2", "--pairs", "12", "--queries", "5"])
        longest = {}
        for split, (low, high) in (("train", o.lag), ("val", o.lag), ("test", o.test_lag)):
            f, size = load_file(f"{a}_{split}.safetensors"), o.key_length + o.value_length
            assert f["inputs"].max() < int(read_metadata(f"{a}_{split}.safetensors")["vocab_size"]) == 3 + 16 + 128
            means, near = [], []
            for ids, targets, lags in zip(*(f[name].tolist() for name in ("inputs", "targets", "lags"))):
                noise, query = ids.index(mqar.NOISE), ids.index(mqar.QUERY)
                pairs = {tuple(ids[i:i + 3]): (i + 3, ids[i + 3:i + 5]) for i in range(1, noise, size)}
                assert len(pairs) == 12 and noise == 1 + 12 * size
                answered = [t for t, x in enumerate(targets) if x >= 0]
                assert answered == [query + 1 + k * size + 2 + v for k in range(5) for v in range(2)]
                assert [t for t, x in enumerate(lags) if x] == answered
                for k in range(5):
                    at = query + 1 + k * size
                    place, value = pairs.pop(tuple(ids[at:at + 3]))         # each is asked for once
                    assert [targets[at + 2], targets[at + 3]] == value == ids[at + 3:at + 5]
                    assert lags[at + 2] == lags[at + 3] == at + 3 - place
                    means.append(lags[at + 2])
                keys = [tuple(ids[i:i + 3]) for i in range(1, noise, size)]
                inside = [tuple(ids[i:i + 3]) for i in range(noise + 1, query - 4)]
                near.append(sum(any(x[:2] == key[:2] and x[2] != key[2] and 3 <= x[2] < 19 for key in keys) for x in inside) / len(inside))
            assert abs(np.mean(means) - (low + high) / 2) < 0.1 * high
            assert low - 60 <= min(means) and max(means) <= high + 60 and np.mean(near) > 0.1
            longest[split] = max(means)
        assert longest["test"] > 3 * longest["train"]
        last = read_with_program(a + "_train.safetensors", a + "_val.safetensors")
        assert last is None or {"64", "128"} <= set(last["accuracy_by_lag"]) <= {"16", "32", "64", "128", "256"}
        run("mqar.py", "--lag", 5, 9, code=2, output="too short")
        run("mqar.py", "--queries", 17, code=2, output="no more queries than pairs")


def test_mqar_distractors_never_answer():
    """No key of the pairs appears as a distractor: with distractors only, no key stands anywhere in the noise at a pair's start."""
    o = mqar.parse(["--distractors", "1", "--pairs", "6", "--queries", "6", "--lag", "200", "200"])
    inputs, _, _ = mqar.examples(50, 3, o, o.lag)
    for ids in inputs.tolist():
        noise, query = ids.index(mqar.NOISE), ids.index(mqar.QUERY)
        keys = {tuple(ids[i:i + 3]) for i in range(1, noise, 4)}
        i, seen = noise + 1, 0
        while i + 4 <= query:
            if tuple(ids[i:i + 2]) in {key[:2] for key in keys} and ids[i + 3] >= 19:
                assert tuple(ids[i:i + 3]) not in keys
                i, seen = i + 4, seen + 1
            else:
                i += 1
        assert seen > 35


def test_mqar_repeat():
    """With replacement every pair is asked for as often as chance has it, and a lag leads to the nearest place of key and value."""
    arguments = ["--repeat", "--pairs", "4", "--queries", "6", "--lag", "40", "60"]
    o, again = mqar.parse(arguments), 0
    inputs, targets, far = mqar.examples(300, 4, o, o.lag)
    for ids, answers, lags in zip(inputs.tolist(), targets.tolist(), far.tolist()):
        query, asked = ids.index(mqar.QUERY), []
        for at in range(query + 1, query + 1 + 6 * 4, 4):
            key, value = ids[at:at + 3], ids[at + 3]
            assert answers[at + 2] == value and lags[at + 2] > 0
            back = at + 3 - lags[at + 2]
            assert ids[back - 3:back + 1] == key + [value] and (back < 17 or tuple(key) in asked)
            assert back > query or tuple(key) not in asked
            again += back > query
            asked.append(tuple(key))
    expected = 1 - 4 * (1 - 0.75 ** 6) / 6
    assert abs(again / 1800 - expected) < 0.05, again / 1800
    with tempfile.TemporaryDirectory() as folder:
        run("mqar.py", *arguments, "--train", 20, "--val", 20, "--test", 0, "--prefix", os.path.join(folder, "x"))
        assert read_metadata(os.path.join(folder, "x_train.safetensors"))["repeat"] == "1"
        read_with_program(os.path.join(folder, "x_train.safetensors"), os.path.join(folder, "x_val.safetensors"))


def test_prose_paragraphs():
    sentence = "This is a sentence of the kind that a book has, with all the little words which belong to it, and it ends."
    page = f"<html><head><title>{sentence}</title></head><body><p>{sentence}<p>It has <b>two</b>\n parts.<pre>{sentence}</pre><ul><li>x</ul></body>"
    assert [x for x in prose.of_html(page) if x] == [sentence, "It has two parts.", "x"]
    pod = f"=head1 NAME\n\n{sentence}\nIt has C<code> and L<links>.\n\n    my $code = 1;\n\nThe :ref:`end <label>` of ``it``.\n"
    assert prose.of_text(pod) == [sentence + " It has code and links.", "The end of it."]
    assert prose.is_prose(sentence) and prose.is_prose(f'"{sentence}"')
    for other in (sentence.lower(), sentence[:60] + ".", sentence[:-1], sentence + " {[_]} = <%$#@> ~|~|~ 0x7f {}{}.", sentence.replace("a ", "ä "),
                  "Debian Ubuntu Fedora Gentoo Slackware Mandriva Knoppix Suse Redhat Centos Mint Arch Void Alpine Nix Guix and Devuan."):
        assert not prose.is_prose(other), other


def test_prose_of_a_package():
    """A small package of our own, unpacked and read as a real one is: order, doubles, other languages, licence, hash."""
    if not shutil.which("dpkg-deb"):
        raise Skip("dpkg-deb is not there")
    sentence = "This is sentence {} of the kind that a book has, with all the little words which belong to it, and so it ends."
    number = ["one", "two", "three", "four"]
    with tempfile.TemporaryDirectory() as folder:
        path = lambda *names: os.path.join(folder, *names)
        os.makedirs(path("deb", "DEBIAN"))
        os.makedirs(path("deb", "usr", "share", "doc", "git-doc", "html"))
        os.makedirs(path("kept"))
        doc = lambda *names: path("deb", "usr", "share", "doc", "git-doc", *names)
        for name, text in ((path("deb", "DEBIAN", "control"), "Package: git-doc\nVersion: 1:2-3\nArchitecture: all\nMaintainer: x <x@x>\nDescription: x\n"),
                           (doc("copyright"), "License: ours\n"), (doc("b.de.html"), "<p>" + sentence.format("five")),
                           (doc("html", "a.html"), f"<p>{sentence.format(number[0])}<p>x<p>{sentence.format('‘two’')}"),
                           (doc("z.txt"), "\n\n".join(sentence.format(n) for n in ("'two'", *number[2:])))):
            with open(name, "w") as file:
                file.write(text)
        subprocess.run(["dpkg-deb", "-b", "--root-owner-group", path("deb"), path("kept", "git-doc_1%3a2-3_all.deb")], check=True, capture_output=True)
        for _ in range(2):
            out = run("prose.py", "--packages", "git-doc", "--keep", path("kept"), "--out", path("t.txt"))
            text = open(path("t.txt")).read()
            found = sorted(text.rstrip("\n").split("\n\n"))
            assert found == sorted(sentence.format(n) for n in ("one", "'two'", "three", "four")), found
            assert text.index("three") < text.index("four") and hashlib.sha256(text.encode()).hexdigest()[:16] in out
        told = open(path("t_licences.txt")).read()
        assert told.split()[:5] == ["git-doc", "1:2-3", "GPL-2", "2", "documents"] and told.endswith("git-doc 1:2-3\n\nLicense: ours\n")
        run("prose.py", "--packages", "git-doc", "--keep", path("kept"), "--out", path("t.txt", "x.txt"), code=1, output="Not a directory")


def test_simplestories_conversion():
    try:
        from tokenizers import Tokenizer, models, pre_tokenizers
    except ImportError:
        raise Skip("tokenizers is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        words = ["[UNK]", "[EOS]", "the", "cat", "sat", "dog", "."]
        tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        tokenizer.save(path("tokenizer.json"))
        for name, text in (("train.txt", "the cat sat.\nthe dog\n\nthe dog sat.\r\n\r\n\n\n"), ("val.txt", "a cat.")):
            with open(path(name), "w", newline="") as file:
                file.write(text)
        arguments = ("--text", path("train.txt"), "--val-text", path("val.txt"), "--tokenizer", path("tokenizer.json"), "--prefix", path("s"))
        run("simplestories.py", *arguments)
        for split, want in (("train", [2, 3, 4, 6, 2, 5, 1, 2, 5, 4, 6, 1]), ("val", [0, 3, 6, 1])):
            raw = open(path(f"s_{split}.bin"), "rb").read()
            header = np.frombuffer(raw[:1024], "<i4")
            assert header[:3].tolist() == [20240520, 1, len(want)] and not header[3:].any()
            assert np.frombuffer(raw[1024:], "<u2").tolist() == want
        last = read_with_program(path("s_train.bin"), path("s_val.bin"), "--vocab", "7", "--seq", "3")
        assert last is None or last["val_loss"] > 0
        run("simplestories.py", *arguments[:3], path("none.txt"), *arguments[4:], code=1, output="none.txt: No such file")
        run("simplestories.py", "--text", path("train.txt"), code=2, output="go together")
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            return
        import simplestories
        pyarrow.parquet.write_table(pyarrow.table({"story": ["the cat", "dog"], "topic": ["x", "y"]}), path("p.parquet"))
        assert simplestories.stories_of_parquet(path("p.parquet")) == ["the cat", "dog"]


def test_simplestories_without_network():
    """One line, exit code 1, nothing left behind. Every host name is made unknown."""
    with tempfile.TemporaryDirectory() as folder:
        code = "import socket, sys\ndef unknown(*a, **k): raise socket.gaierror('no network')\nsocket.getaddrinfo = unknown\n" \
               f"sys.path.insert(0, {DATA!r}); sys.argv = ['x', '--prefix', {folder!r} + '/s']\nimport simplestories; simplestories.main()"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 1 and "cannot be fetched" in done.stderr, done.stderr
        assert not os.listdir(folder)


ENCODE = """
#define SESSA_NO_MAIN
#include "train_sessa.c"
// prints the ids of each text of standard input, which end with a zero byte, on a line
int main(int argc, char **argv) {
    char error[ERROR_SIZE], *text = NULL;
    size_t room = 0;
    Words words;
    if (argc != 2 || words_read_file(&words, argv[1], error)) return 1;
    for (ssize_t n; (n = getdelim(&text, &room, 0, stdin)) > 0; puts("")) {
        int *ids = (int *)malloc((size_t)n * sizeof(int));
        int count = encode_text(ids, &words, (const unsigned char *)text, (size_t)n - 1, error);
        for (int i = 0; i < count; i++) printf("%d ", ids[i]);
        free(ids);
    }
    free(text);
    words_free(&words);
}
"""


def encode_in_c(words, texts):
    """The ids of texts in the words of a file, by the functions of train_sessa.c."""
    if not shutil.which("cc"):
        raise Skip("cc is not there")
    with tempfile.TemporaryDirectory() as folder:
        source, binary = os.path.join(folder, "encode.c"), os.path.join(folder, "encode")
        with open(source, "w") as file:
            file.write(ENCODE)
        subprocess.run(["cc", "-O1", "-w", "-I", os.path.join(DATA, ".."), source, "-o", binary, "-lm"], check=True)
        given = b"".join(text + b"\0" for text in texts)
        done = subprocess.run([binary, words], input=given, capture_output=True, check=True)
        return [[int(x) for x in line.split()] for line in done.stdout.decode().split("\n")[:-1]]


def translated_lines(most_each):
    """Lines of this machine's message catalogues, some of each language; and how many languages these are."""
    by_language = {}
    places = ("/usr/share/locale/*/LC_MESSAGES/*.mo", "/usr/share/vim/vim*/lang/*/LC_MESSAGES/*.mo")
    for path in sorted(path for place in places for path in glob.glob(place)):
        lines = by_language.setdefault(path.split("/")[-3].split("_")[0].split(".")[0], set())
        try:
            with open(path, "rb") as file:
                catalogue = gettext.GNUTranslations(file)._catalog
        except (OSError, ValueError, LookupError):     # some catalogues are odd
            continue
        for text in catalogue.values():
            if len(lines) < 4 * most_each:
                lines.update(line for line in text.split("\n") if "\0" not in line)
    chosen = [sorted(lines)[::max(1, len(lines) // most_each)][:most_each] for lines in by_language.values()]
    return [line for lines in chosen for line in lines if line], len(by_language)


def mixed_lines(n, random):
    """Lines of our own: words of many scripts and signs, every kind of white space and number between them."""
    scripts = [(0x61, 0x7B), (0x41, 0x5B), (0xC0, 0x180), (0x3B1, 0x3CA), (0x430, 0x450), (0x5D0, 0x5EB),
               (0x628, 0x64B), (0x905, 0x93A), (0xE01, 0xE3B), (0x3041, 0x3097), (0x4E00, 0x5000),
               (0xAC00, 0xAD00), (0x1F600, 0x1F650), (0x21, 0x30), (0x30, 0x3A), (0x300, 0x310)]
    spaces = [" ", " ", " ", " ", "  ", "   ", "\t", "\n", "\n\n  ", " \r\n", "\x0b \x0c",
              "\u00a0", "\u3000", "", "\x01", "\x7f"]
    lines = []
    for _ in range(n):
        words = []
        for _ in range(int(random.integers(1, 12))):
            low, high = scripts[random.integers(len(scripts))]
            words.append("".join(chr(c) for c in random.integers(low, high, int(random.integers(1, 9)))))
            words.append(spaces[random.integers(len(spaces))])
        lines.append("".join(words))
    return lines


def test_words_are_the_library_s():
    """Ids in C equal the library's on 10,000 lines, of the message catalogues of this machine and of mixed scripts."""
    try:
        import bpe
        from tokenizers import Tokenizer
    except ImportError:
        raise Skip("tokenizers is not installed")
    translated, languages = translated_lines(48)
    translated = translated[:8000]
    lines = translated + mixed_lines(10000 - len(translated), np.random.default_rng(1))
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        with open(path("text.txt"), "w", newline="") as file:
            file.write("\n".join(lines[::2]))
        run("bpe.py", path("text.txt"), "--vocab", 3000)
        tokenizer = Tokenizer.from_file(path("text_tokenizer.json"))
        want = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
        texts = [line.encode() for line in lines]
        got = encode_in_c(path("text_words.safetensors"), texts)
        wrong = [i for i in range(len(lines)) if i >= len(got) or got[i] != want[i]]
        first = wrong[0] if wrong else 0
        assert len(got) == len(lines) == 10000 and not wrong, (len(wrong), lines[first], got[first], want[first])
        words = load_file(path("text_words.safetensors"))
        ends, raw = words["tokenizer.offsets"], words["tokenizer.tokens"].tobytes()
        assert len(ends) == 3001 and len(words["tokenizer.merges"]) == 3000 - 256
        assert all(b"".join(raw[ends[i]:ends[i + 1]] for i in ids) == text for ids, text in zip(got, texts))
        assert max(map(max, want)) > 2500 and sum(map(len, want)) < 0.6 * sum(map(len, texts))
        long = ["ab" * 50000, "ж" * 30000, " " * 20000 + "x", "7" * 10000, "\n \n" * 9999]
        ids = encode_in_c(path("text_words.safetensors"), [x.encode() for x in long])
        assert ids == [tokenizer.encode(x).ids for x in long]
        mixed = len(lines) - len(translated)
        print(f"      {len(translated)} lines of {languages} languages' catalogues, {mixed} of mixed scripts")


REFERENCE = os.path.join(DATA, "babel_words.safetensors")
REFERENCE_TEXT = """\
All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act.
Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen handeln.
Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience.
Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью.
Όλοι οι άνθρωποι γεννιούνται ελεύθεροι και ίσοι στην αξιοπρέπεια και τα δικαιώματα.
人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心。
सभी मनुष्यों को गौरव और अधिकारों के मामले में जन्मजात स्वतन्त्रता और समानता प्राप्त है।
يولد جميع الناس أحرارا متساوين في الكرامة والحقوق. 😀 😀
  for (int i = 0; i < 1234567; i++) {\t// 3.14159, 2026-11-29\r
\t\tif (x[i]  ==  y[i] && !done) x[i]++;   \n\n\n        return;\x0b \x0c \x01 \x7f
"""


def write_reference(path):
    """Words for train_sessa's tests, trained on the text above, and that text with the library's ids."""
    import bpe
    tokenizer = bpe.train(REFERENCE_TEXT, 400)
    with contextlib.redirect_stdout(None):
        bpe.write_words(path, tokenizer)
    text = np.frombuffer(REFERENCE_TEXT.encode(), dtype=np.uint8)
    save_file({**load_file(path), "text": text, "ids": bpe.encode(tokenizer, REFERENCE_TEXT).astype(np.uint16)}, path)


def test_reference_words():
    """The committed file is what this library makes: data/test_data.py --reference writes it anew."""
    try:
        import tokenizers
    except ImportError:
        raise Skip("tokenizers is not installed")
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.safetensors")
        write_reference(path)
        made, committed = load_file(path), load_file(REFERENCE)
        assert made.keys() == committed.keys() and all((made[x] == committed[x]).all() for x in made)


def shard_ids(path):
    raw = open(path, "rb").read()
    assert np.frombuffer(raw[:1024], "<i4")[2] == (len(raw) - 1024) // 2
    return np.frombuffer(raw[1024:], "<u2").tolist()


def test_shards_of_words():
    """The shards hold the text, whole, whatever is encoded at a time; the program reads them and their words."""
    try:
        import bpe
        from tokenizers import Tokenizer
    except ImportError:
        raise Skip("tokenizers is not installed")
    text = "\n".join(mixed_lines(400, np.random.default_rng(2)))
    with tempfile.TemporaryDirectory() as folder:
        path = lambda name: os.path.join(folder, name)
        with open(path("text.txt"), "w", newline="") as file:
            file.write(text)
        run("bpe.py", path("text.txt"), "--vocab", 600)
        tokenizer = Tokenizer.from_file(path("text_tokenizer.json"))
        train, val = (part.decode() for part in bpe.split(text.encode()))
        assert train + val == text and 0 <= len(text.encode()) * 9 // 10 - len(train.encode()) < 4
        assert shard_ids(path("text_train.bin")) == tokenizer.encode(train).ids
        assert shard_ids(path("text_val.bin")) == tokenizer.encode(val).ids
        whole, bpe.PART = bpe.encode(tokenizer, text), 50
        assert len(list(bpe.parts(text))) > 50 and "".join(bpe.parts(text)) == text
        assert (bpe.encode(tokenizer, text) == whole).all() and whole.tolist() == tokenizer.encode(text).ids
        bpe.PART = 1 << 20
        files = [open(path(x), "rb").read() for x in ("text_words.safetensors", "text_train.bin")]
        run("bpe.py", path("text.txt"), "--tokenizer", path("text_tokenizer.json"), "--prefix", path("again"))
        assert [open(path(x), "rb").read() for x in ("again_words.safetensors", "again_train.bin")] == files
        last = read_with_program(path("text_train.bin"), path("text_val.bin"), "--seq", "16")
        if last is not None:
            n = (len(shard_ids(path("text_val.bin"))) - 1) // 16 * 16
            size = len(tokenizer.decode(shard_ids(path("text_val.bin"))[1:n + 1]).encode())
            assert abs(last["val_bits_per_byte"] / (last["val_loss"] * n / np.log(2) / size) - 1) < 0.02, last
        with contextlib.redirect_stdout(None):
            bpe.write_shard(path("wide.bin"), [70000, 1, 0], wide=True)
        raw = open(path("wide.bin"), "rb").read()
        assert np.frombuffer(raw, "<i4").tolist() == [20240801, 7, 3] + [0] * 253 + [70000, 1, 0]
        run("bpe.py", path("none.txt"), code=1, output="none.txt: No such file")
        run("bpe.py", path("text.txt"), "--vocab", 255, code=2, output="256")
        with open(path("latin.txt"), "wb") as file:
            file.write(b"caf\xe9 " * 9)
        run("bpe.py", path("latin.txt"), code=1, output="not a text in UTF-8, at byte 3")


def test_words_of_other_tokenizers():
    """Byte-level, SentencePiece's and WordPiece: what the words print is the text, but for a space where it begins."""
    try:
        import bpe
        import tokenizers
        from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers
    except ImportError:
        raise Skip("tokenizers is not installed")
    text = "the cat sat on the mat, the dog sat on the log. " * 40 + "naïve 数据 end."
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False)
    spaced, between = pre_tokenizers.Metaspace(), pre_tokenizers.Whitespace()
    pieces, joined = models.WordPiece(unk_token="[UNK]"), decoders.WordPiece(cleanup=False)
    kinds = {"bytes": (models.BPE(), trainers.BpeTrainer, by_bytes, decoders.ByteLevel()),
             "sentencepiece": (models.Unigram(), trainers.UnigramTrainer, spaced, decoders.Metaspace()),
             "wordpiece": (pieces, trainers.WordPieceTrainer, between, joined)}
    for kind, (model, trainer, cutter, decoder) in kinds.items():
        tokenizer = tokenizers.Tokenizer(model)
        tokenizer.pre_tokenizer, tokenizer.decoder = cutter, decoder
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind == "bytes" else []
        learner = trainer(vocab_size=400, special_tokens=["[UNK]"], show_progress=False, initial_alphabet=alphabet)
        tokenizer.train_from_iterator([text], learner)
        words, ids = bpe.token_bytes(tokenizer), tokenizer.encode(text).ids
        got = b"".join(words[i] for i in ids).decode()
        assert not bpe.cuts_alike(tokenizer) and words[0] == b"[UNK]", kind
        assert got.lstrip() == (tokenizer.decode(ids) if kind == "wordpiece" else text), (kind, got)
        with tempfile.TemporaryDirectory() as folder:
            path = lambda name: os.path.join(folder, name)
            tokenizer.save(path("tokenizer.json"))
            with open(path("text.txt"), "w") as file:
                file.write(text)
            run("bpe.py", path("text.txt"), "--tokenizer", path("tokenizer.json"))
            assert "tokenizer.merges" not in load_file(path("text_words.safetensors"))
            last = read_with_program(path("text_train.bin"), path("text_val.bin"), "--seq", "4")
            assert last is None or (last["val_loss"] > 0 and "val_bits_per_byte" not in last)


if __name__ == "__main__":
    if sys.argv[1:] == ["--reference"]:
        sys.exit(write_reference(REFERENCE))
    run_tests(globals())
