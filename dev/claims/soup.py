"""SymbolSoup's best possible accuracy: the exact posterior of the class, all that the generator hides summed
out. Needs numpy.

  dev/claims/soup.py                                          # 20,000 fresh examples of the defaults: the optimum, and the ladder
  dev/claims/soup.py --min-tokens 900 --max-tokens 1024 -n 4000
  dev/claims/soup.py --lengths                                # the table of dev/claims/claims.md, optimum by length
  dev/claims/soup.py --author data/symbol_soup_seed0          # the author's own examples

Who sees an example's text sees the five parts, as the marks stand between them. Noise is uniform whatever the
class, and the lengths of all parts are drawn without looking at it, so two blocks x and y are all that tells,
left or right in an even chance of order:

  P(left l, right r | text) ∝ P_l(x) P_r(y) + P_r(x) P_l(y),        all 20 classes being equally likely before

What is P_s(x), the probability that style s, asked for n letters, writes x_1 … x_n? The generator adds events
until the block is full. With k letters missing and b the clean letter before (a block's first has none) it
adds

  with probability 1 - m_k   a letter c, with probability T_s(c | b)                        m_k = 0.3 if k ≥ 3, else 0
  with probability m_k       a motif u = u_1 … u_j, j ≤ k, with probability w_s(u) / Σ_{|v| ≤ k} w_s(v)

and in the end a clean letter c is seen as x with probability E(c, x): 0.97 if x is c, 0.03/15 if not. Nothing
remembers more than b and k. So let β_k(b) be the probability of the last k letters of what is seen, given k
missing after b: β_0 = 1, and with x' these last k letters

  β_k(b) = (1 - m_k) Σ_c T_s(c | b) E(c, x'_1) β_{k-1}(c)  +  m_k Σ_u w_s(u)/Σ_v w_s(v) Π_i E(u_i, x'_i) β_{k-j}(u_j)

P_s(x) is β_n(none): 17 numbers a style, carried from a block's end to its beginning. The sum over all ways to
write x, and over all replaced letters, is exact. The ladder is what is left if less is known, and is named by
what is known:

  letters of the text          how often each stands in the text, marks unseen: a mixture of noise and two styles, its parts unknown
  pairs of the text            how often each pair of neighbours does: the chain of pairs that this mixture has
  letters, pairs of the blocks the same without the noise
  letters, blocks apart        a style's letters as independent
  pairs, blocks apart          a style's letters as a Markov chain

with the styles' letters and pairs of letters as an endless block has them. These six are predictors, not
bounds: what treats letters as independent is not the best that can be made of them, and expects more of
itself than it reaches. The exact posterior's accuracy is told twice, by hits and by the mean of its largest
posterior, which has the smaller error.
"""
import argparse
import csv
import dataclasses
import os
import sys

import numpy as np

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
sys.path.insert(0, os.path.join(ROOT, "data"))
import symbolsoup

LETTERS, NONE = 16, 16      # b = NONE: no letter before
LENGTHS = ((400, 600), (500, 600), (600, 800), (800, 1000), (900, 1024), (1000, 1200), (1024, 2048), (2000, 2048))


class Model:
    """The generator's probabilities, for all nine styles at once."""

    def __init__(self, p=symbolsoup.Parameters()):
        styles = sum(symbolsoup.make_styles(p), [])
        weights = np.array([np.diff(style.sums, axis=1, prepend=0) for style in styles])            # (9,17,16), before -1 to 15
        self.T = np.roll(weights / weights.sum(2, keepdims=True), -1, axis=1)                       # T[s,b,c], b = 16: none
        self.w = np.array([np.diff(style.motif_sums, prepend=0) for style in styles])               # w[s,u]
        self.motifs = styles[0].motifs
        self.E = np.where(np.eye(LETTERS) > 0, 1 - p.replaced, p.replaced / (LETTERS - 1))          # E[c,x]
        self.m = p.motif

    def motif_part(self, k):
        """(9,39): the probability of each motif with k letters missing."""
        w = self.w * [len(u) <= k for u in self.motifs]
        return (self.m if k >= 3 else 0) * w / w.sum(1, keepdims=True) if k >= 3 else 0 * w

    def log_likelihood(self, blocks):
        """log P_s(x) of every block and style, (N,9). The blocks must be sorted, the longest first."""
        n = np.array([len(x) for x in blocks])
        assert (np.diff(n) <= 0).all() and n[-1] > 0
        out = np.empty((len(blocks), len(self.T)))
        seen = np.zeros((len(blocks), n[0]), int)               # seen[:, k-1]: the letter after which k - 1 more come
        for i, x in enumerate(blocks):
            seen[i, :n[i]] = x[::-1]
        beta = [np.ones((len(self.T), len(blocks), 17))]        # β_{k-1}, β_{k-2} …, five of them, on a common scale
        log_scale = np.zeros((len(blocks), len(self.T)))
        for k in range(1, n[0] + 1):
            N = int((n >= k).sum())                             # those that have k letters
            beta, motif = [b[:, :N] for b in beta], self.motif_part(k)
            letter = self.E[:, seen[:N, k - 1]].T * beta[0][:, :, :LETTERS]
            now = (1 - self.m * (k >= 3)) * letter @ self.T.transpose(0, 2, 1)
            for j in (3, 4, 5):
                if j > k:
                    break
                these = [u for u in range(len(self.motifs)) if len(self.motifs[u]) == j]
                ways = np.ones((N, len(these)))                                                     # Π_i E(u_i, x'_i)
                for i in range(j):
                    ways *= self.E[[self.motifs[u][i] for u in these]][:, seen[:N, k - 1 - i]].T
                after = beta[j - 1][:, :, [self.motifs[u][-1] for u in these]]
                now += np.einsum("snu,nu,su->sn", after, ways, motif[:, these])[:, :, None]         # whatever came before
            scale = now.max(2, keepdims=True)
            beta = [b / scale for b in [now] + beta[:4]]
            log_scale[:N] += np.log(scale[:, :, 0]).T
            full = slice(int((n > k).sum()), N)
            out[full] = np.log(beta[0][:, full, NONE]).T + log_scale[full]
        return out

    def pairs(self):
        """(9,16,16): how often the seen letters c, d follow each other in an endless block of each style."""
        out, motif = [], self.motif_part(5)
        for T, u in zip(self.T[:, :LETTERS], motif):
            # the clean letter at the end of each event is a chain; its stationary distribution
            step = (1 - self.m) * T
            for i, letters in enumerate(self.motifs):
                step[:, letters[-1]] += u[i]
            at = np.full(LETTERS, 1 / LETTERS)
            for _ in range(200):
                at = at @ step
            pairs = (1 - self.m) * at[:, None] * T
            for i, letters in enumerate(self.motifs):
                pairs[:, letters[0]] += u[i] * at
                for c, d in zip(letters, letters[1:]):
                    pairs[c, d] += u[i]
            out.append(self.E.T @ (pairs / pairs.sum()) @ self.E)
        return np.array(out)


def in_chunks(function, blocks, size=1000):
    """function(blocks sorted by falling length) in the blocks' own order."""
    order = np.argsort([-len(x) for x in blocks], kind="stable")
    parts = [function([blocks[i] for i in order[k:k + size]]) for k in range(0, len(order), size)]
    out = np.empty((len(blocks), parts[0].shape[1]))
    out[order] = np.concatenate(parts)
    return out


def posterior(first, second):
    """(N,20) from log P_s of the two blocks, each (N,9): either may be the left one."""
    def one(left, right):
        return left[:, :4, None] + right[:, None, 4:]
    both = np.logaddexp(one(first, second), one(second, first)).reshape(len(first), symbolsoup.CLASSES)
    return normalised(both)


def normalised(log_p):
    p = np.exp(log_p - log_p.max(1, keepdims=True))
    return p / p.sum(1, keepdims=True)


def exact(model, parts):
    """(N,20): the posterior of examples, (one, block, two, block, three) each."""
    return posterior(*(in_chunks(model.log_likelihood, [x[i] for x in parts]) for i in (1, 3)))


def counts(row):
    """How often each letter, (16), and each pair of neighbours, (16,16), stands in a list of lists of letters."""
    letters, pairs = np.zeros(16), np.zeros(256)
    for x in row:
        x = np.array(x)
        letters += np.bincount(x, minlength=16)
        pairs += np.bincount(16 * x[:-1] + x[1:], minlength=256)
    return letters, pairs.reshape(16, 16)


def mixture(letters, pairs, model_pairs, noise_parts):
    """(N,20): the posterior where it is not known which letter comes from which part. In a mixture of noise and the
    two styles a pair has probability p(c, d); the text is Π p(d | c) over its pairs, or, pairs None, Π p(c) over its
    letters; and the shares of noise and of the left block among the letters are any, all equally likely."""
    total = np.full((len(letters), symbolsoup.CLASSES), -np.inf)
    left_style, right_style = model_pairs[np.repeat(range(4), 5)], model_pairs[np.tile(range(4, 9), 4)]     # (20,16,16)
    for noise in noise_parts:
        for left in np.arange(0.025, 1, 0.05):
            p = noise / 256 + (1 - noise) * (left * left_style + (1 - left) * right_style)
            alone = p.sum(2, keepdims=True)
            if pairs is None:
                given = letters @ np.log(alone[:, :, 0]).T
            else:
                given = pairs.reshape(-1, 256) @ np.log(p / alone).reshape(-1, 256).T
            total = np.logaddexp(total, given)
    return normalised(total)


def ladder(model, parts):
    """{what is known: (N,20)}"""
    two, noise = model.pairs(), np.arange(0.315, 0.6, 0.03)
    one, chain = two.sum(2), np.log(two / two.sum(2, keepdims=True))
    text, mixed, first, second = ([np.array(x) for x in zip(*(counts(x[part]) for x in parts))]
                                  for part in (slice(0, 5), slice(1, 5, 2), slice(1, 2), slice(3, 4)))
    letters = [x[0] @ np.log(one).T for x in (first, second)]
    pairs = [np.log(one)[:, [x[i][0] for x in parts]].T + x[1].reshape(-1, 256) @ chain.reshape(-1, 256).T
             for i, x in ((1, first), (3, second))]
    return {
        "letters of the text": mixture(text[0], None, two, noise),
        "pairs of the text": mixture(*text, two, noise),
        "letters of the blocks": mixture(mixed[0], None, two, (0,)),
        "pairs of the blocks": mixture(*mixed, two, (0,)),
        "letters, blocks apart": posterior(*letters),
        "pairs, blocks apart": posterior(*pairs),
    }


def score(p, labels):
    """Accuracy, its standard error, the accuracy that p itself expects, cross-entropy."""
    right = p.argmax(1) == labels
    return right.mean(), right.std() / len(right) ** 0.5, p.max(1).mean(), -np.log(p[np.arange(len(p)), labels] + 1e-300).mean()


def tell(name, p, labels):
    accuracy, error, expected, loss = score(p, labels)
    spread = p.max(1).std() / len(p) ** 0.5
    print(f"{name:30s} {accuracy:.4f} ± {error:.4f}   it expects {expected:.4f} ± {spread:.4f}   loss {loss:.4f}", flush=True)


def read_author(folder):
    """[(label, parts)] of symbol_soup_{train,val,test}.tsv."""
    out = []
    for split in ("train", "val", "test"):
        try:
            with open(os.path.join(folder, f"symbol_soup_{split}.tsv"), newline="") as file:
                rows = list(csv.DictReader(file, delimiter="\t"))
        except OSError as error:
            sys.exit(f"{error.filename}: {error.strerror}")
        for row in rows:
            lines = row["Text"].split("\n")[1::2]
            parts = [[symbolsoup.LETTERS.index(c) for c in x.split(" ")] for x in lines]
            out.append((int(row["Answer"].removeprefix("CLASS_")), parts))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, help="examples [20000; with --lengths 4000]")
    parser.add_argument("--min-tokens", type=int, default=400, help="[400]")
    parser.add_argument("--max-tokens", type=int, default=600, help="[600]")
    parser.add_argument("--seed", type=int, default=100, help="of the examples [100]")
    parser.add_argument("--lengths", action="store_true", help="the optimum for several lengths")
    parser.add_argument("--author", metavar="FOLDER", help="the author's examples in place of ours")
    o = parser.parse_args()
    lengths = LENGTHS if o.lengths else ((o.min_tokens, o.max_tokens),)
    for low, high in lengths:
        p = dataclasses.replace(symbolsoup.Parameters(), min_tokens=low, max_tokens=high)
        model, examples = Model(p), read_author(o.author) if o.author else \
            symbolsoup.examples(o.n or (4000 if o.lengths else 20000), [o.seed, low, high], p)
        labels, parts = np.array([label for label, _ in examples]), [x for _, x in examples]
        if o.lengths:
            rungs = ladder(model, parts)
            tell(f"{low} to {high}: exact", exact(model, parts), labels)
            for name in ("pairs, blocks apart", "letters, blocks apart"):
                tell("    " + name, rungs[name], labels)
            continue
        best = exact(model, parts)
        print(f"{len(parts)} examples" + ("" if o.author else f" of {low} to {high} tokens"))
        for name, q in ladder(model, parts).items():
            tell(name, q, labels)
        tell("exact", best, labels)
        left, right = best.reshape(-1, 4, 5).sum(2), best.reshape(-1, 4, 5).sum(1)
        print(f"exact, the left style alone {(left.argmax(1) == labels // 5).mean():.4f}, "
              f"the right {(right.argmax(1) == labels % 5).mean():.4f}")
        shorter = np.array([min(len(x[1]), len(x[3])) for x in parts])
        for low, high in ((1, 4), (5, 9), (10, 19), (20, 39), (40, 79), (80, 999)):
            these = (low <= shorter) & (shorter <= high)
            if these.any():
                print(f"the shorter block has {low} to {high} letters, {100 * these.mean():4.1f} % of the examples: "
                      f"{(best.argmax(1) == labels)[these].mean():.3f}")


if __name__ == "__main__":
    main()
