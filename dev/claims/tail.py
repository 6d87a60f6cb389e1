"""The exponent of a trained feedback path's tail, predicted from its weights, against the slope that is measured.

  ./influence tail.safetensors --load sessa.best.safetensors --data data/tinyshakespeare.txt --seq 4096 --sequences 4 --targets 1
  dev/claims/tail.py tail.safetensors                                 # a table, a row a layer
  dev/claims/tail.py text.safetensors soup.safetensors --names text SymbolSoup --out tail.svg     # and a point a layer, with the diagonal

A source's influence R_t on the feedback path's output obeys R_t = γ_t Σ_{j<t} α_tj R_j. Let the weights depend on the ratio of positions
alone, γ_t α_tj = h(j/t)/t. Then R_t = t^-β solves it if

  M(β) = ∫_0^1 h(u) u^-β du = 1,          on a trained layer M(β) = mean over t of Σ_j γ_t α_tj (t/(j + 1/2))^β

and M rises with β from M(0) = γ̄ < 1, the mean gain, so that there is one such β > 0. Even weights have h = γ, M = γ/(1-β): β = 1-γ, the
theory's. A part a of the weight that always goes to near neighbours has u = 1 and makes M = γ a + γ (1-a)/(1-β):
β = 1 - γ (1-a)/(1 - γ a), between 1-γ and 1: near hops neither carry influence away nor forget it, and count for nothing but
their loss. A part on the far past, say on the first token, has u near 0, and lowers β. Two things are left out: how γ_t and α_tj go with
each other and with R, and that a layer's weights may look otherwise at larger t.

The table: the mean gain; 1-γ̄, which even weights of that gain would have; β of the layer's own weights (`kernel` of influence.c);
the measured one, the negative slope of |(I - diag(γ) α)^-1| over the lags T/16 to 9T/10, each ratio counting alike.
"""
import argparse
import os
import sys

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from plot_influence import fit

PER_OCTAVE = 8      # of influence.c


def moment(kernel, beta):
    """M(β)"""
    return float(kernel @ 2 ** (beta * (np.arange(len(kernel)) + 0.5) / PER_OCTAVE))


def exponent(kernel):
    """β with M(β) = 1, or None: a path whose gain is not positive has none."""
    low, high = 0.0, 1.0
    if kernel.sum() <= 0:
        return None
    while moment(kernel, high) < 1:
        low, high = high, 2 * high
        if high > 64:
            return None
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if moment(kernel, middle) < 1 else (low, middle)
    return low


def layers_of(path):
    """[(layer, mean gain, β predicted or None, β measured)] of a file of influence.c."""
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        sys.exit(f"{path}: {error}")
    out = []
    for l in range(len(tensors)):
        kernel, solve = tensors.get(f"layers.{l}.kernel"), tensors.get(f"layers.{l}.solve")
        if kernel is None or solve is None:
            break
        T = len(solve)
        fitted = fit(solve, T // 16, T * 9 // 10)
        out.append((l, float(kernel.sum()), exponent(kernel.astype(np.float64)), -fitted[0] if fitted else None))
    if not out:
        sys.exit(f"{path}: it holds no layers of a feedback path; dev/claims/influence.c writes them")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", help="written by influence")
    parser.add_argument("--names", nargs="+", help="[their names]")
    parser.add_argument("--out", help="a picture, .svg or .png")
    o = parser.parse_args()
    names = o.names or [os.path.basename(path).split(".")[0] for path in o.files]
    if len(names) != len(o.files):
        parser.error("--names and files must be as many")
    found = {name: layers_of(path) for name, path in zip(names, o.files)}
    print("| model | layer | mean gain γ̄ | 1-γ̄ | predicted | measured |\n| --- | --- | --- | --- | --- | --- |")
    for name, layers in found.items():
        for l, gain, predicted, measured in layers:
            print(f"| {name} | {l} | {gain:.3f} | {1 - gain:.3f} | " +
                  " | ".join("" if x is None else f"{x:.3f}" for x in (predicted, measured)) + " |")
    pairs = np.array([(1 - gain, predicted, measured) for layers in found.values() for _, gain, predicted, measured in layers
                      if predicted is not None and measured is not None])
    if len(pairs):
        even, kernel = (np.abs(pairs[:, i] - pairs[:, 2]) for i in (0, 1))
        print(f"\n{len(pairs)} layers: 1-γ̄ is off by {even.mean():.3f} on the average, {even.max():.3f} at worst, the prediction by "
              f"{kernel.mean():.3f} and {kernel.max():.3f}")
    if o.out:
        import plot_training
        figure, axis = plot_training.plt.subplots(figsize=(5.5, 5.5))
        for i, (name, layers) in enumerate(found.items()):
            for l, gain, predicted, measured in layers:
                if predicted is not None and measured is not None:
                    axis.plot(1 - gain, measured, "o", mfc="none", color=f"C{i}", ms=6)
                    axis.plot(predicted, measured, "o", color=f"C{i}", ms=6)
                    axis.annotate(str(l), (predicted, measured), xytext=(5, 4), textcoords="offset points", fontsize=8)
            axis.plot([], [], "o", color=f"C{i}", label=name)
        ends = np.array([min(0, pairs.min()), max(1, pairs.max())]) if len(pairs) else np.array([0, 1])
        axis.plot(ends, ends, color="0.6", lw=1)
        axis.set_xlabel("exponent predicted (hollow: even weights, 1-γ̄)")
        axis.set_ylabel("exponent measured")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        plot_training.save(figure, o.out)


if __name__ == "__main__":
    main()
