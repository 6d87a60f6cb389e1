"""Holds data/symbolsoup.py against examples of the author's own generator: lengths, classes, letters, pairs of letters, runs and
motifs, in noise and by style, must be distributed alike.

  data/check_symbolsoup.py FOLDER                         # with symbol_soup_train.tsv, _val.tsv and _test.tsv
  data/check_symbolsoup.py FOLDER --set replaced=0.02     # a wrong parameter must be noticed
  data/check_symbolsoup.py FOLDER --wrong                 # every parameter made wrong in turn, and each must be

Each statistic is a histogram; two histograms p, q are Σ (p-q)²/(p+q) apart. How far apart chance alone brings two sets of these
sizes is found by drawing, again and again, as many of our own examples as there are of theirs and comparing them with the rest:
the author's set must lie within BOUND standard deviations of what those draws give. The two blocks' places are random and not
written down, so the likelier assignment of styles to blocks is taken, for ours and theirs alike.
"""
import argparse
import csv
import dataclasses
import os
import sys

import numpy as np

import symbolsoup

BOUND, DRAWS, TIMES = 5.0, 200, 6       # TIMES as many examples of ours as of theirs
WRONG = {"min_tokens": 410, "max_tokens": 590, "noise_low": 0.28, "noise_high": 0.57, "motif": 0.28, "motif_primary": 0.65,
         "motif_secondary": 0.25, "primary": 2.7, "secondary": 1.8, "bigram": 3.5, "replaced": 0.02}


def read(folder):
    """[(split, label, parts)] of the author's files; stops with one line if a text is not of the form that ours have."""
    out, p = [], symbolsoup.Parameters()
    for split in ("train", "val", "test"):
        path = os.path.join(folder, f"symbol_soup_{split}.tsv")
        try:
            with open(path, newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
        except OSError as error:
            sys.exit(f"{path}: {error.strerror}")
        for i, row in enumerate(rows):
            lines = row["Text"].split("\n")
            parts = [[symbolsoup.LETTERS.index(c) for c in line.split(" ")] for line in lines[1::2]]
            ids = symbolsoup.tokens(parts)
            if len(parts) != 5 or "".join(symbolsoup.TOKENS[t] for t in ids) != row["Text"]:
                sys.exit(f"{path}: example {i} is not the text that its parts make")
            if not p.min_tokens <= len(ids) <= p.max_tokens:
                sys.exit(f"{path}: example {i} has {len(ids)} tokens")
            out.append((split, int(row["Answer"].removeprefix("CLASS_")), parts))
    return out


def log_letters():
    """(9,16): how likely each letter is in each style, roughly: enough to tell left from right."""
    styles = sum(symbolsoup.make_styles(symbolsoup.Parameters()), [])
    weights = np.array([np.diff(style.sums[0], prepend=0) for style in styles])
    return np.log(weights / weights.sum(1, keepdims=True))


def histograms(examples):
    """{statistic: (N,bins) counts of each example}, examples being (label, parts)."""
    n, styles, likely = len(examples), sum(symbolsoup.make_styles(symbolsoup.Parameters()), []), log_letters()
    motifs, kinds, bigrams = styles[0].motifs, np.zeros((9, 16), int), np.zeros((9, 256), bool)
    for i, style in enumerate(styles):
        kinds[i] = np.unique(-np.diff(style.sums[0], prepend=0), return_inverse=True)[1]    # primary 0, secondary 1, other 2
        bigrams[i, [a * 16 + b for a, b in style.bigrams]] = True
    place = {tuple(m): i for i, m in enumerate(motifs)}
    out = {name: np.zeros((n, bins), np.float32) for name, bins in (
        ("letters in all", 20), ("part that is noise", 20), ("first noise of all", 20), ("second noise of the rest", 20),
        ("left of both blocks", 20), ("left comes first", 2), ("letters in noise", 16), ("pairs in noise", 256),
        ("letters by style", 9 * 16), ("pairs by style", 9 * 256), ("runs in blocks", 12), ("primary, secondary, other", 3),
        ("a style's bigrams, others", 2), ("motifs by style", 9 * len(motifs)))}

    def share(name, i, x):
        out[name][i, min(int(x * 20), 19)] += 1

    for i, (label, parts) in enumerate(examples):
        noise, blocks = parts[::2], parts[1::2]
        left, right = likely[label // 5], likely[4 + label % 5]
        first = bool(left[blocks[0]].sum() + right[blocks[1]].sum() >= left[blocks[1]].sum() + right[blocks[0]].sum())
        sizes, total = [len(x) for x in noise], sum(map(len, parts))
        share("letters in all", i, (total - 190) / 106)
        share("part that is noise", i, (sum(sizes) / total - 0.25) / 0.4)
        share("first noise of all", i, sizes[0] / sum(sizes))
        share("second noise of the rest", i, sizes[1] / (sizes[1] + sizes[2]))
        share("left of both blocks", i, len(blocks[not first]) / sum(map(len, blocks)))
        out["left comes first"][i, int(first)] = 1
        for part in noise:
            part = np.array(part)
            out["letters in noise"][i] += np.bincount(part, minlength=16)
            out["pairs in noise"][i] += np.bincount(part[:-1] * 16 + part[1:], minlength=256)
        for block, style in ((blocks[not first], label // 5), (blocks[first], 4 + label % 5)):
            part = np.array(block)
            pairs = part[:-1] * 16 + part[1:]
            out["letters by style"][i, style * 16:style * 16 + 16] += np.bincount(part, minlength=16)
            out["pairs by style"][i, style * 256:style * 256 + 256] += np.bincount(pairs, minlength=256)
            out["primary, secondary, other"][i] += np.bincount(kinds[style][part], minlength=3)
            out["a style's bigrams, others"][i] += np.bincount(~bigrams[style][pairs] + 0, minlength=2)
            breaks = np.flatnonzero(np.diff(part) != 1)
            lengths = np.diff(np.concatenate(([-1], breaks, [len(part) - 1])))
            out["runs in blocks"][i] += np.bincount(np.minimum(lengths, 12) - 1, minlength=12)
            for width in (3, 4, 5):
                for start in np.flatnonzero(np.all([part[k + 1:len(part) - width + 2 + k] - part[k:len(part) - width + 1 + k] == 1
                                                    for k in range(width - 1)], axis=0)) if len(part) >= width else ():
                    out["motifs by style"][i, style * len(motifs) + place[tuple(block[start:start + width])]] += 1
    return out


def distance(p, q, name):
    """Between histograms, the last axis; the mean over styles where there is one a style."""
    p, q = (x.reshape(x.shape[:-1] + (9 if "by style" in name else 1, -1)) for x in (p, q))
    p, q = p / p.sum(-1, keepdims=True), q / q.sum(-1, keepdims=True)
    return ((p - q) ** 2 / np.maximum(p + q, 1e-30)).sum(-1).mean(-1)


def compare(theirs, n, p, seed, show):
    """The names of the statistics in which n examples, whose histograms are `theirs`, differ from ours with the parameters p."""
    ours, differ = histograms(symbolsoup.examples(TIMES * n, seed, p)), []
    random = np.random.default_rng(seed)
    drawn = np.zeros((DRAWS, TIMES * n), np.float32)
    for row in drawn:
        row[random.permutation(TIMES * n)[:n]] = 1
    for name, counts in ours.items():
        whole = counts.sum(0, dtype=np.float64)
        parts = (drawn @ counts).astype(np.float64)
        chance = distance(parts, whole - parts, name)
        found = distance(theirs[name].sum(0, dtype=np.float64), whole - parts[0], name)
        z = (found - chance.mean()) / chance.std()
        if z > BOUND:
            differ.append(name)
        if show:
            print(f"  {name:26s} {counts.shape[1]:5d} bins   {found:.2e}   by chance {chance.mean():.2e} ± {chance.std():.1e}   "
                  f"{z:+6.1f} sd   {'FAIL' if z > BOUND else 'ok'}")
    return differ


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="the author's examples")
    parser.add_argument("--set", metavar="NAME=VALUE", help="change a parameter of ours: " + ", ".join(WRONG))
    parser.add_argument("--wrong", action="store_true", help="make every parameter wrong in turn")
    parser.add_argument("--seed", type=int, default=1, help="[1]")
    o = parser.parse_args()
    p = symbolsoup.Parameters()
    if o.set:
        name, _, value = o.set.partition("=")
        try:
            p = dataclasses.replace(p, **{name: type(getattr(p, name))(value)})
        except (AttributeError, ValueError):
            parser.error(f"--set takes NAME=VALUE with a parameter's name, not '{o.set}'")

    examples = read(o.folder)
    theirs, ok = histograms([(label, parts) for _, label, parts in examples]), True
    for split in ("train", "val", "test"):
        counts = np.bincount([label for s, label, _ in examples if s == split], minlength=symbolsoup.CLASSES)
        even = len(counts) == symbolsoup.CLASSES and counts.max() - counts.min() <= 1
        ok = ok and even
        print(f"  {split}: {counts.sum()} of theirs, {counts.min()} to {counts.max()} of each class   {'ok' if even else 'FAIL'}")
    if not o.wrong:
        ok = not compare(theirs, len(examples), p, o.seed, True) and ok
    else:
        for name, value in WRONG.items():
            differ = compare(theirs, len(examples), dataclasses.replace(p, **{name: value}), o.seed, False)
            ok = ok and bool(differ)
            print(f"  {name} {value} for {getattr(p, name)}: " + (", ".join(differ) or "NOT NOTICED"))
    print("OK" if ok else "FAIL")
    sys.exit(not ok)


if __name__ == "__main__":
    main()
