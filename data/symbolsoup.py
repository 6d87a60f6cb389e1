"""SymbolSoup: classify a soup of letters by the styles of two blocks that are hidden in noise. Writes example sets.

  data/symbolsoup.py                                   # data/symbolsoup_{train,val,test}.safetensors: 20,000, 2,000, 2,000
  data/symbolsoup.py --train 500 --val 100 --test 100 --seed 3 --prefix /tmp/soup
  data/symbolsoup.py --min-tokens 900 --max-tokens 1024 --train 100000 --prefix /tmp/long    # longer texts are easier
  ./train_sessa --data data/symbolsoup_train.safetensors --val data/symbolsoup_val.safetensors --dim 256 --layers 4 \
    --out symbolsoup.safetensors

The task is that of the Sessa paper (arXiv 2604.18580), written anew from its description. An example is the text

  <bos> noise <sep1> block <sep2> noise <sep1> block <sep2> noise <sep> <label>

in tokens: letters a to p with a space between two, each of the ten parts on a line of its own. One block is written in one of
four left styles, the other in one of five right styles, in random order: 20 classes, equally many of each. The only target is
the class, at <label>. The same seed gives the same bytes. dev/claims/soup.py computes the best possible accuracy.
"""
import argparse
import itertools
import os
from dataclasses import dataclass

import numpy as np

from example_set import Stream, write_examples

LETTERS = "abcdefghijklmnop"
TOKENS = list(LETTERS) + [" ", "\n", "<bos>", "<sep1>", "<sep2>", "<sep>", "<label>"]      # the classes' tokens follow
SPACE, NEWLINE, BOS, SEP1, SEP2, SEP, LABEL = range(16, 23)
CLASSES = 20

# Primary and secondary letters. A style's bigrams follow from them: every letter with itself, each primary letter with the
# next one (the last with the first), and each with the secondary letter in its place, in both orders.
LEFT = ("jdif chkl", "bjmk pnhg", "ngpf edio", "gpck njao")
RIGHT = ("fmpe ldcb", "lfpo akjh", "kbje gaip", "opfm edbk", "lnag obhf")


@dataclass
class Parameters:
    min_tokens: int = 400
    max_tokens: int = 600
    noise_low: float = 0.3          # of the letters; the noise has between these two parts of them
    noise_high: float = 0.6
    motif: float = 0.3              # probability of a motif, a run of neighbours in the alphabet, where a letter is due
    motif_primary: float = 0.9      # what each of its letters adds to a motif's weight of 1
    motif_secondary: float = 0.5
    primary: float = 3.0            # a letter's weight; 1 for the others
    secondary: float = 2.0
    bigram: float = 4.0             # times this if it makes a bigram with the letter before
    replaced: float = 0.03          # of a block's letters, in the end


class Style:
    """How one style writes a block."""

    def __init__(self, letters, p):
        first, second = ([LETTERS.index(c) for c in part] for part in letters.split())
        self.bigrams = {(c, c) for c in first + second} | set(zip(first, first[1:] + first[:1]))
        self.bigrams |= set(zip(first, second)) | set(zip(second, first))
        weights = [p.primary if c in first else p.secondary if c in second else 1.0 for c in range(16)]
        # sums[c + 1] after the letter c, sums[0] at the beginning
        self.sums = [list(itertools.accumulate(w * (p.bigram if (before, c) in self.bigrams else 1) for c, w in enumerate(weights)))
                     for before in range(-1, 16)]
        self.motifs = [list(range(start, start + length)) for length in (3, 4, 5) for start in range(17 - length)]
        self.motif_sums = list(itertools.accumulate(
            1 + sum(p.motif_primary * (c in first) + p.motif_secondary * (c in second) for c in motif) for motif in self.motifs))
        self.fitting = [sum(len(motif) <= room for motif in self.motifs) for room in range(6)]
        self.p = p

    def block(self, stream, length):
        """A list of `length` letters."""
        out = []
        while len(out) < length:
            room = length - len(out)
            if room >= 3 and stream.uniform() < self.p.motif:
                out += self.motifs[stream.weighted(self.motif_sums[:self.fitting[min(room, 5)]])]
            else:
                out.append(stream.weighted(self.sums[out[-1] + 1 if out else 0]))
        for i, letter in enumerate(out):
            if stream.uniform() < self.p.replaced:
                out[i] = (letter + stream.integer(1, 15)) % 16
        return out


def make_styles(p):
    return [Style(letters, p) for letters in LEFT], [Style(letters, p) for letters in RIGHT]


def example(stream, label, styles, p):
    """(noise, block, noise, block, noise), lists of letters, of the class `label`."""
    total = stream.integer(-(-(p.min_tokens - 13) // 2), (p.max_tokens - 13) // 2)
    least = max(3, int(p.noise_low * total))
    noise = stream.integer(least, max(least, int(p.noise_high * total)))
    one = stream.integer(1, noise - 2)
    two = stream.integer(1, noise - one - 1)
    left = stream.integer(1, total - noise - 1)
    blocks = [styles[0][label // 5].block(stream, left), styles[1][label % 5].block(stream, total - noise - left)]
    if stream.uniform() < 0.5:
        blocks.reverse()
    one, two, three = ([stream.integer(0, 15) for _ in range(n)] for n in (one, two, noise - one - two))
    return one, blocks[0], two, blocks[1], three


def examples(n, seed, p=Parameters()):
    """n examples in random order, the classes as even as n allows: a list of (label, parts)."""
    stream, styles = Stream(seed), make_styles(p)
    labels = [i % CLASSES for i in range(n)]
    stream.shuffle(labels)
    return [(label, example(stream, label, styles, p)) for label in labels]


def tokens(parts):
    """The token ids of an example's text, up to <label>."""
    ids = [BOS, NEWLINE]
    for i, letters in enumerate(parts):
        line = [SPACE] * (2 * len(letters) - 1)
        line[::2] = letters
        if i:
            ids += [SEP1 if i % 2 else SEP2, NEWLINE]
        ids += line + [NEWLINE]
    return ids + [SEP, SPACE, LABEL]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for split, n in (("train", 20000), ("val", 2000), ("test", 2000)):
        parser.add_argument(f"--{split}", type=int, default=n, help=f"examples, 0: no such file [{n}]")
    for name, text in (("min_tokens", "of the shortest text"), ("max_tokens", "of the longest; what is shorter is filled up at its end")):
        n = getattr(Parameters, name)
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=n, help=f"tokens {text} [{n}]")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    parser.add_argument("--prefix", default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "symbolsoup"),
                        help="files are PREFIX_train.safetensors … [data/symbolsoup]")
    o = parser.parse_args()
    if min(o.train, o.val, o.test, o.seed) < 0:
        parser.error("numbers of examples and the seed must not be negative")
    if o.min_tokens < 23 or -(-(o.min_tokens - 13) // 2) > (o.max_tokens - 13) // 2:      # 3 letters of noise, 1 of each block
        parser.error("a text has 23 tokens or more, and an odd number: none has --min-tokens to --max-tokens of them")
    p = Parameters(min_tokens=o.min_tokens, max_tokens=o.max_tokens)
    # the defaults are told by no metadata: their files stay the same bytes
    told = {} if p == Parameters() else {"min_tokens": p.min_tokens, "max_tokens": p.max_tokens}
    for i, split in enumerate(("train", "val", "test")):
        n, path = getattr(o, split), f"{o.prefix}_{split}.safetensors"
        if not n:
            continue
        made = examples(n, [o.seed, i], p)
        inputs, targets = np.full((n, p.max_tokens), NEWLINE, np.int8), np.full((n, p.max_tokens), -1, np.int8)
        for row, (label, parts) in enumerate(made):
            ids = tokens(parts)
            inputs[row, :len(ids)] = ids
            targets[row, len(ids) - 1] = len(TOKENS) + label
        write_examples(path, {"vocab_size": len(TOKENS) + CLASSES, "task": "symbolsoup", "split": split, "seed": o.seed, **told},
                       inputs=inputs, targets=targets)
        print(f"{path}: {n} examples of {p.max_tokens} tokens, vocabulary {len(TOKENS) + CLASSES}")


if __name__ == "__main__":
    main()
