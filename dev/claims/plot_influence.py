"""Influence by lag, both axes logarithmic, with fitted slopes: files of dev/claims/influence.c as a picture.

  dev/claims/plot_influence.py uniform.safetensors --out uniform.svg                 # ./influence --uniform 0.5 4096 uniform.safetensors
  dev/claims/plot_influence.py sessa.safetensors attention.safetensors mamba2.safetensors --names Sessa Transformer Mamba-2 --out tail.png
  dev/claims/plot_influence.py sessa.safetensors --kind solve --layers 0 3 --fit 10 500

One panel a kind. A line is straight where influence is a power of the lag; its slope is fitted, by least squares on both
logarithms, over --fit LOW HIGH (a hundredth of the longest lag to nine tenths of it). Points are means in 40 bins of equal ratio.
"""
import argparse
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from plot_training import save

KINDS = {"uniform": "even weights, impulse at 0", "direct": "attention: one hop", "feedback": "feedback: one hop",
         "solve": "feedback: all hops", "chain": "state: one chain", "jacobian": "whole mixer"}
UNIFORM = {"solve": "feedback", "closed": "its closed form", "direct": "attention", "chain": "chain"}


def read(path):
    """{kind: {label: values by lag}} of a file of dev/claims/influence.c."""
    try:
        tensors = load_file(path)
    except OSError as error:
        sys.exit(f"{path}: {error.strerror or error}")
    except SafetensorError as error:
        sys.exit(f"{path}: {error}")
    out = {}
    for name, values in sorted(tensors.items()):
        parts = name.split(".")
        if parts[0] == "uniform":
            out.setdefault("uniform", {})[UNIFORM[parts[1]]] = values
        elif parts[0] == "layers" and len(parts) == 3 and parts[2] in KINDS:
            out.setdefault(parts[2], {})[int(parts[1])] = values
    if not out:
        sys.exit(f"{path}: it holds no influence by lag")
    return out


def fit(values, low, high):
    """(slope, factor) of values ≈ factor · lag^slope over low ≤ lag ≤ high."""
    lags = np.arange(low, min(high, len(values) - 1) + 1)
    lags = lags[np.abs(values[lags]) > 0]
    if len(lags) < 2:
        return None
    # every ratio of lags counts alike, as in the picture: weight 1/lag
    slope, constant = np.polyfit(np.log(lags), np.log(np.abs(values[lags])), 1, w=lags ** -0.5)
    return slope, np.exp(constant)


def binned(values, bins=40):
    """Means in bins of equal ratio from lag 1 on."""
    edges, out = np.unique(np.round(np.geomspace(1, len(values), bins + 1)).astype(int)), []
    for a, b in zip(edges, edges[1:]):
        lags = a + np.flatnonzero(values[a:b])      # 0: not measured
        if len(lags):
            out.append([np.exp(np.log(lags).mean()), np.abs(values[lags]).mean()])
    return np.array(out).T


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--names", nargs="+", help="one a file [the files' names]")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="panels [all there are]")
    parser.add_argument("--layers", nargs="+", type=int, help="[all, as their mean where there are several files]")
    parser.add_argument("--fit", nargs=2, type=int, metavar=("LOW", "HIGH"))
    parser.add_argument("--out", default="influence.svg", help="picture, .svg or .png [influence.svg]")
    o = parser.parse_args()
    names = o.names or [os.path.splitext(os.path.basename(path))[0] for path in o.files]
    if len(names) != len(o.files):
        parser.error(f"{len(names)} names for {len(o.files)} files")
    if o.fit and not 1 <= o.fit[0] < o.fit[1]:
        parser.error("--fit takes two lags, the first the smaller one and at least 1")
    files = [read(path) for path in o.files]
    kinds = [kind for kind in o.kind or KINDS if any(kind in file for file in files)]
    if not kinds:
        sys.exit(f"none of the files holds {' or '.join(o.kind)}")

    figure, axes = plt.subplots(1, len(kinds), figsize=(1 + 4.6 * len(kinds), 4.2), squeeze=False)
    for axis, kind in zip(axes[0], kinds):
        lines = []
        for name, file in zip(names, files):
            rows = file.get(kind, {})
            if kind == "uniform":
                rows = {f"{name}, {label}" if len(files) > 1 else label: x for label, x in rows.items()}
            else:
                rows = {f"layer {l}": x for l, x in rows.items() if not o.layers or l in o.layers}
                if len(files) > 1 and rows and not o.layers:
                    rows = {name: np.mean(list(rows.values()), axis=0)}
                elif len(files) > 1:
                    rows = {f"{name}, {label}": x for label, x in rows.items()}
            lines += rows.items()
        if not lines:
            sys.exit(f"no file holds layer {' or '.join(map(str, o.layers))} of '{kind}'")
        for i, (label, values) in enumerate(lines):
            T, closed = len(values), kind == "uniform" and label.endswith("closed form")
            low, high = o.fit or (max(1, T // 100), 9 * T // 10)
            fitted = None if closed or (kind == "uniform" and label.endswith("chain")) else fit(values, low, high)
            text = label + (f": slope {fitted[0]:.3f}" if fitted else "")
            style = {"color": "k", "ls": "--", "zorder": 3} if closed else {"color": f"C{i % 10}", "marker": "."}
            axis.plot(*binned(values), lw=1, ms=4, label=text, **style)
            if fitted:
                ends = np.array([low, min(high, T - 1)])
                axis.plot(ends, fitted[1] * ends ** fitted[0], color=f"C{i % 10}", lw=3, alpha=0.25)
                print(f"{KINDS[kind]}, {label}: slope {fitted[0]:+.4f} over lags {low} to {ends[1]}")
        points = np.concatenate([binned(x)[1] for _, x in lines])
        peak = points.max()
        axis.set(xscale="log", yscale="log", xlabel="lag", ylabel="influence", title=KINDS[kind],
                 ylim=(max(peak * 1e-7, points.min() / 2), peak * 2))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, o.out)


if __name__ == "__main__":
    main()
