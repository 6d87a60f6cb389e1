"""The tail of a trained feedback path, predicted from its weights by ratio of positions, against the tail
that is measured.

  ./influence tail.safetensors --load sessa.best.safetensors --data my.txt --seq 4096 --sequences 4 --targets 1
  dev/claims/tail.py tail.safetensors                                 # a table, a row a layer
  dev/claims/tail.py text.safetensors recall.safetensors --out tail.svg     # and a point a layer, with the diagonal

With s = f + γ u the path is u_t = Σ_{j<t} α_tj (f_j + γ_j u_j): u_t is what it reads at t. Behind a source at
τ, scaled to u_τ = 1,

  u_t = Σ_{τ≤j<t} α_tj γ_j u_j.

Let the weights depend on the ratio of positions alone, α_tj γ_j = h(j/t)/t. Then u_t = t^-β solves it where

  M(β) = ∫_0^1 h(x) x^-β dx = 1.

Even weights have h = γ, M = γ/(1-β), β = 1-γ: the theory's. A part a of the weight that always goes to near
neighbours has x = 1, so M = γ a + γ (1-a)/(1-β) and β = 1 - γ (1-a)/(1 - γ a), between 1-γ and 1: near hops
neither carry influence away nor forget it, and count for nothing but their loss. A part on the far past, say
on the first token, has x near 0, and lowers β.

A trained h may be of both signs, and with a negative mean the integral has no root where it converges. The
recursion has its answer all the same. So it is solved as it stands, with the trained layer's h (`kernel` of
influence.c, its mean over positions) in the place of its weights, from each of the first --sources positions.
What this leaves out: that h changes with t, and how α_tj and γ_j go with u_j.

The table: γ̄, the mean gain; Σ α γ, the gain that is attended to (the mean of Σ_j α_tj γ_j); 1-γ̄, the
exponent that even weights of that gain would have; the exponent predicted from h; the measured one, of
|(I - diag(γ) α)^-1|. The last two are negative slopes over the lags T/16 to 9T/10, each ratio of lags
counting alike.
"""
import argparse
import os
import sys

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from plot_influence import fit

PER_OCTAVE = 8      # of influence.c


def bins(t):
    """The kernel's bin of each position j < t."""
    return (PER_OCTAVE * np.log2(t / (np.arange(t) + 0.5))).astype(int)


def even(n, T):
    """The kernel (n) of weights 1/t: the share of a row's positions that a bin has, mean over the rows t ≥ T/16 as
    in influence.c."""
    first = 1 if T < 32 else T // 16
    return sum(np.bincount(bins(t), minlength=n) / t for t in range(first, T)) / (T - first)


def profile(kernel, T, sources=16):
    """|u| by lag (T), mean over the sources, where α_tj γ_j is h(j/t)/t. h: the kernel, each bin in units of what
    even weights have."""
    share = even(len(kernel), T)
    h = kernel / np.where(share > 0, share, 1)
    u = np.zeros((T, sources))
    for t in range(T):
        u[t] = h[bins(t)] @ u[:t] / max(t, 1)
        if t < sources:
            u[t, t] = 1
    by_lag, count = np.zeros(T), np.zeros(T)
    for source in range(min(sources, T)):
        by_lag[:T - source] += np.abs(u[source:, source])
        count[:T - source] += 1
    return by_lag / count


def exponent(values):
    """β of values ≈ lag^-β. None if they are 0."""
    fitted = fit(values, len(values) // 16, len(values) * 9 // 10)
    return -fitted[0] if fitted else None


def layers_of(path, sources):
    """[(mean gain, attended gain, β predicted, β measured)], one a layer, of a file of influence.c."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path}: {error}")
    out = []
    while f"layers.{len(out)}.kernel" in tensors:
        kernel, gain, solve = (tensors[f"layers.{len(out)}.{name}"].astype(np.float64)
                               for name in ("kernel", "gain", "solve"))
        out.append((gain[0], kernel.sum(), exponent(profile(kernel, len(solve), sources)), exponent(solve)))
    if not out:
        sys.exit(f"{path}: it holds no layers of a feedback path; dev/claims/influence.c writes them")
    return out


def draw(found, path):
    """A point a layer: predicted, and hollow what even weights of the same mean gain would have."""
    import plot_training
    figure, axis = plot_training.plt.subplots(figsize=(5.5, 5.5))
    for i, (name, layers) in enumerate(found.items()):
        for l, (gain, _, predicted, measured) in enumerate(layers):
            if predicted is None or measured is None:
                continue
            axis.plot([1 - gain, predicted], [measured, measured], color=f"C{i}", lw=0.6, alpha=0.5)
            axis.plot(1 - gain, measured, "o", mfc="none", color=f"C{i}", ms=6)
            axis.plot(predicted, measured, "o", color=f"C{i}", ms=6)
            axis.annotate(str(l), (predicted, measured), xytext=(5, 4), textcoords="offset points", fontsize=8)
        axis.plot([], [], "o", color=f"C{i}", label=name)
    axis.axline((0, 0), slope=1, color="0.6", lw=1)
    axis.set_xlabel("exponent predicted (hollow: even weights, 1-γ̄)")
    axis.set_ylabel("exponent measured")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    plot_training.save(figure, path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="written by influence")
    parser.add_argument("--names", nargs="+", help="[the files' names]")
    parser.add_argument("--sources", type=int, default=16, help="as influence was told [16]")
    parser.add_argument("--out", help="a picture, .svg or .png")
    o = parser.parse_args()
    names = o.names or [os.path.basename(path).split(".")[0] for path in o.files]
    if len(names) != len(o.files) or o.sources < 1:
        parser.error("--names and files must be as many, --sources 1 or more")
    found = {name: layers_of(path, o.sources) for name, path in zip(names, o.files)}
    print("| model | layer | γ̄ | Σ α γ | 1-γ̄ | predicted | measured |\n| --- | --- | --- | --- | --- | --- | --- |")
    for name, layers in found.items():
        for l, (gain, attended, *exponents) in enumerate(layers):
            told = " | ".join("" if x is None else f"{x:.2f}" for x in (gain, attended, 1 - gain, *exponents))
            print(f"| {name} | {l} | {told} |")
    rows = np.array([row for layers in found.values() for row in layers if None not in row])
    if len(rows):
        theory, kernel = np.abs(1 - rows[:, 0] - rows[:, 3]), np.abs(rows[:, 2] - rows[:, 3])
        print(f"\n{len(rows)} layers, distance from what is measured, median and worst: 1-γ̄ {np.median(theory):.2f} "
              f"and {theory.max():.2f}, predicted {np.median(kernel):.2f} and {kernel.max():.2f}")
    if o.out:
        draw(found, o.out)


if __name__ == "__main__":
    main()
