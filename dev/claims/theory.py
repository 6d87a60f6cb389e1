"""What the theory says of even weights, computed and drawn: influence that does not decay, and position out
of nothing. Needs numpy and, for the pictures, matplotlib.

  dev/claims/theory.py                                    # both tables
  dev/claims/theory.py --profiles profiles.svg --position position.svg

PROFILES. With all feedback weights even, U_tj = 1/t for j < t, and a constant gain γ, the layer's all-hop
matrix is closed:

  S = (I - γU)^-1 - I,    S_tj = γ · Γ(j+1)/Γ(j+1+γ) · Γ(t+γ)/Γ(t+1) ≈ γ (j+1)^-γ t^(γ-1)            for j < t

A source at j is weaker by (j+1)^-γ, for it joins a mean of j others. Let the values make up for that, r_j =
(j+1)^γ, and stack k residual layers y = x + S diag(r) x. From a source at τ one layer gives γ t^(γ-1), and
each further layer sums over where the way may halt, Σ_j γ t^(γ-1) γ j^(γ-1) ≈ γ t^(2γ-1), so that

  k layers fall, or rise, as t^(kγ-1):    for γ = 0.5 the second is level and the third grows.

Even attention, 1/(t+1) for j ≤ t, with the same gain r: t^-1, then t^-1 Σ_j j^γ j^-1 ≈ t^(γ-1)/γ, and so on:
t^((k-1)γ-1), one layer behind. Without the gain t^-1 (log t)^(k-1). So what separates the two is one layer in
this family, and the theorem's premise that a Transformer's gains are bounded; the picture shows both.

POSITION. Feed the feedback path a constant 1: s_0 = 1, s_t = 1 + γ · mean of s before t. With e_t = 1/(1-γ) -
s_t that is e_t = γ · mean of e before t, the impulse's own equation, so

  s_t = 1/(1-γ) - γ²/(1-γ) · Γ(t+γ) / (Γ(1+γ) Γ(t+1)),    t ≥ 1

strictly rising for 0 < γ < 1, each position its own number, neighbours t^(γ-2) apart. Attention without a
position encoding, whatever its weights, returns the constant: its rows sum to 1.
"""
import argparse
import math

import numpy as np


def feedback(f, gain):
    """s_t = f_t + γ · mean of s before t."""
    s, total = np.empty(len(f)), 0.0
    for t, x in enumerate(f):
        s[t] = x + (gain / t * total if t else 0)
        total += s[t]
    return s


def attention(f):
    """The mean of f up to t."""
    return np.cumsum(f) / np.arange(1, len(f) + 1)


def stack(layers, gain, T, source, mixer="feedback", compensated=True):
    """Influence of `source` on every position after that many residual layers."""
    x, r = np.zeros(T), np.arange(1.0, T + 1) ** gain if compensated else np.ones(T)
    x[source] = 1
    for _ in range(layers):
        hop = feedback(r * x, gain) - r * x if mixer == "feedback" else attention(r * x)
        x = x + hop
    return x


def slope(x, source, low, high):
    """Of log x over log lag, each ratio of lags counting alike."""
    lags = np.arange(low, high)
    return np.polyfit(np.log(lags), np.log(x[source + lags]), 1, w=lags ** -0.5)[0]


def position(gain, T):
    """The closed form of a constant's answer."""
    t = np.arange(1, T)
    ratio = np.array([math.exp(math.lgamma(i + gain) - math.lgamma(i + 1) - math.lgamma(1 + gain)) for i in t])
    return np.concatenate(([1.0], (1 - gain ** 2 * ratio) / (1 - gain)))


FAMILIES = (("feedback", "feedback", True, lambda k, g: k * g - 1),
            ("even attention, same gain", "attention", True, lambda k, g: (k - 1) * g - 1),
            ("even attention", "attention", False, lambda k, g: -1.0))


def picture():
    import plot_training
    return plot_training


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gamma", type=float, default=0.5, help="[0.5]")
    parser.add_argument("--length", type=int, default=16384, help="positions [16384]")
    parser.add_argument("--source", type=int, default=8, help="[8]")
    parser.add_argument("--profiles", metavar="FILE", help="the first picture")
    parser.add_argument("--position", metavar="FILE", help="the second picture")
    o = parser.parse_args()
    if not 0 < o.gamma < 1 or not 0 <= o.source < o.length // 100:
        parser.error("--gamma lies between 0 and 1, and --source in the first hundredth of --length")
    low, high = o.length // 30, o.length - o.source
    print(f"| γ {o.gamma:g}, source {o.source}, lags {low} to {high - 1} | layers | slope to be | slope |\n| --- | --- | --- | --- |")
    curves = []
    for name, mixer, compensated, theory in FAMILIES:
        for k in (1, 2, 3):
            x = stack(k, o.gamma, o.length, o.source, mixer, compensated)
            curves.append((name, k, x))
            told = f"{theory(k, o.gamma):+.2f}" + (", logarithms apart" if not compensated and k > 1 else "")
            print(f"| {name} | {k} | {told} | {slope(x, o.source, low, high):+.4f} |")
    print("\n| a constant, γ | s_1 | s_10 | s_100 | s_1000 | limit | worst point against the closed form |")
    print("| --- " * 7 + "|")
    codes = [(g, feedback(np.ones(o.length), g)) for g in (0.3, 0.5, 0.7, 0.9)]
    for g, s in codes:
        shown = " | ".join(f"{s[t]:.4f}" for t in (1, 10, 100, 1000) if t < o.length)
        print(f"| {g:g} | {shown} | {1 / (1 - g):.4f} | {np.abs(s / position(g, o.length) - 1).max():.1e} |")

    if o.profiles:
        plot = picture()
        figure, axes = plot.plt.subplots(1, 3, figsize=(12, 4), sharey=True)
        for i, (name, *_) in enumerate(FAMILIES):
            for k, x in [(k, x) for other, k, x in curves if other == name]:
                lags = np.unique(np.geomspace(1, high - 1, 200).astype(int))
                fitted = slope(x, o.source, low, high)
                axes[i].loglog(lags, x[o.source + lags], lw=1.6, label=f"{k} layer{'s' * (k > 1)}: slope {fitted:+.2f}")
            axes[i].set_title(f"{name}, γ {o.gamma:g}" if i < 2 else name)
            axes[i].set_xlabel("lag")
            axes[i].grid(alpha=0.3)
            axes[i].legend(frameon=False, fontsize=8)
        axes[0].set_ylabel(f"influence of position {o.source}")
        plot.save(figure, o.profiles)
    if o.position:
        plot = picture()
        figure, axis = plot.plt.subplots(figsize=(6, 4))
        for i, (g, s) in enumerate(codes):
            axis.semilogx(np.arange(1, o.length), s[1:], color=f"C{i}", lw=1.6, label=f"γ {g:g}")
            axis.axhline(1 / (1 - g), color=f"C{i}", lw=0.7, ls=":")
        axis.axhline(1, color="0.4", lw=1.2, label="attention")
        axis.set_xlabel("position")
        axis.set_ylabel("answer to a constant 1 (dotted: limit)")
        axis.grid(alpha=0.3)
        axis.legend(frameon=False)
        plot.save(figure, o.position)


if __name__ == "__main__":
    main()
