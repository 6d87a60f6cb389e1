"""Shapes of the three mixers with equally many parameters: for a width and a Sessa depth, the nearest shapes within 2 %.

  dev/claims/match.py --dim 256 --layers 4 --vocab 43
  dev/claims/match.py --dim 128 --layers 5 --heads 4 --vocab 65 --tolerance 1

Attention has 7D² numbers a layer where Sessa has 9D², Mamba-2 9D² and what its state adds: they cannot be matched at the same
width and depth, so width and depth may both move, as little as possible. Mamba-2's heads are 64 wide, or narrower where that
keeps the shape near. "without feedback" is attention in Sessa's own shape: the same model with its feedback path cut off, and
fewer parameters.
"""
import argparse
import math
import sys
from typing import NamedTuple


class Shape(NamedTuple):
    mixer: str
    dim: int
    layers: int
    heads: int
    head_dim: int = 0       # mamba2's two
    state_dim: int = 0

    def options(self):
        """Of train_sessa."""
        words = ["--mixer", self.mixer, "--dim", self.dim, "--layers", self.layers, "--heads", self.heads]
        words += ["--head-dim", self.head_dim, "--state-dim", self.state_dim] if self.mixer == "mamba2" else []
        return [str(word) for word in words]


def parameters(s, V):
    """Numbers in train_sessa.c's parameter table, as many key/value heads as heads."""
    D, E, N = s.dim, 2 * s.dim, s.state_dim
    if s.mixer == "mamba2":
        heads, channels = E // s.head_dim, E + 2 * N
        mixer = (E + channels + heads) * D + 5 * channels + 3 * heads + E + E * D   # in_proj, conv1d, a head's three, norm, out_proj
    else:
        mixer = 3 * D * (D + 1) + (D * D if s.heads > 1 else 0)                     # q, k, v, W_o
    if s.mixer == "sessa":
        mixer += 2 * D * (D + 1) + D + 1                                            # q' and k', γ
    return V * D + s.layers * (mixer + 2 * D + 3 * D * (D + 1)) + 2 * D             # LayerNorm, W_in and W_out; the last LayerNorm


def match(mixer, V, like, tolerance=0.02, state_dim=64):
    """The Shape of this mixer nearest to `like` with its number of parameters, within the tolerance; None if there is none."""
    target, found = parameters(like, V), []
    for head_dim in (64, 32, 16, 8) if mixer == "mamba2" else (0,):
        step = head_dim // 2 or 2 * like.heads      # heads of an even width; a mamba2 head divides twice the width
        for layers in range(max(1, like.layers // 2), 3 * like.layers + 1):
            for dim in range(step, 2 * like.dim + 1, step):
                s = Shape(mixer, dim, layers, 1 if head_dim else like.heads, head_dim, state_dim if head_dim else 0)
                if abs(parameters(s, V) / target - 1) <= tolerance:
                    moved = abs(math.log(dim / like.dim)) + abs(math.log(layers / like.layers))
                    found.append((moved + (0.1 * math.log2(64 / head_dim) if head_dim else 0), s))
    return min(found)[1] if found else None


def rows(V, sessa, tolerance=0.02, state_dim=64):
    """The four models of the paper's tables as (name, Shape). Stops with one line where a mixer has no such shape."""
    out = [("Sessa", sessa)]
    for name, mixer in (("Transformer", "attention"), ("Mamba-2", "mamba2")):
        out.append((name, match(mixer, V, sessa, tolerance, state_dim)))
        if not out[-1][1]:
            sys.exit(f"{mixer} has no shape near D {sessa.dim}, L {sessa.layers} within {100 * tolerance:g} % of "
                     f"{parameters(sessa, V)} parameters")
    return out + [("Sessa without feedback", sessa._replace(mixer="attention"))]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (("dim", 256, "Sessa's width"), ("layers", 4, "Sessa's depth"), ("heads", 4, "of both attentions"),
                                ("vocab", 65, "vocabulary"), ("state-dim", 64, "mamba2: state")):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} [{default}]")
    parser.add_argument("--tolerance", type=float, default=2, help="percent [2]")
    o = parser.parse_args()
    if min(o.dim, o.layers, o.heads, o.vocab, o.state_dim) < 1 or o.dim % (2 * o.heads):
        parser.error("sizes must be positive, and the heads must divide the width into even parts")
    sessa = Shape("sessa", o.dim, o.layers, o.heads)
    for name, shape in rows(o.vocab, sessa, o.tolerance / 100, o.state_dim):
        count = parameters(shape, o.vocab)
        print(f"{name:24s} {count:12,d} {100 * (count / parameters(sessa, o.vocab) - 1):+6.2f} %   " + " ".join(shape.options()))


if __name__ == "__main__":
    main()
