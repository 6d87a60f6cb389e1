"""Accuracy by lag, as knife.py and curriculum.py found it: one line a cut of a model, what it was trained on
shaded.

  dev/claims/plot_recall.py sessa.json --cuts "as it is" "feedback 0" "feedback 1" --out knife.svg
  dev/claims/plot_recall.py sessa.json attention.json --names Sessa Transformer --cuts "as it is" "feedback all" --out recall.svg
  dev/claims/plot_recall.py runs/curriculum/sessa_*/result.json --out seeds.svg      # one line a run
  dev/claims/plot_recall.py sessa_1.json sessa_2.json mamba2_1.json --names Sessa Sessa Mamba-2     # a mean a name

A bin of lags is drawn at its geometric middle; bars are two standard errors, of a bin's targets taken as
independent. Of files that share a name the lines are thin, without bars, and their mean is bold.
"""
import argparse
import json
import os
import statistics
import sys

from plot_training import plt, save


def read(path):
    """{label: {bin's first lag: (accuracy, targets)}} of a file of knife.py or curriculum.py."""
    try:
        with open(path) as file:
            found = json.load(file)
        if "stages" in found:       # a run of curriculum.py
            found = {"as it is": found} if "by_lag" in found else {}
        return {cut: {int(low): tuple(x) for low, x in r["by_lag"].items()} for cut, r in found.items()}
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, TypeError, KeyError, AttributeError):
        sys.exit(f"{path}: not a file of knife.py or curriculum.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+")
    parser.add_argument("--names", nargs="+",
                        help="one a file, and files may share one [their folders' or files' names]")
    parser.add_argument("--cuts", nargs="+", help="only these, where a file has them [all]")
    parser.add_argument("--trained", nargs=2, type=int, default=(12, 76), metavar=("LOW", "HIGH"), help="lags trained on [12 76]")
    parser.add_argument("--level", nargs=2, action="append", default=[], metavar=("ACCURACY", "NAME"), help="a line across")
    parser.add_argument("--fewest", type=int, default=40, help="targets a bin must have [40]")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", default="recall.svg", help="[recall.svg]")
    o = parser.parse_args()
    names = o.names or [os.path.basename(os.path.dirname(os.path.abspath(path))) if path.endswith("result.json") else
                        os.path.splitext(os.path.basename(path))[0] for path in o.files]
    if len(names) != len(o.files):
        parser.error(f"{len(names)} names for {len(o.files)} files")

    figure, axis = plt.subplots(figsize=(8, 4.5))
    axis.axvspan(*o.trained, color="0.9", label="lags trained on")
    lines = {}      # (name, cut): one {bin's middle: (accuracy, error)} a file
    for name, path in zip(names, o.files):
        for cut, by_lag in read(path).items():
            points = {low * 2 ** 0.5: (a, 2 * (a * (1 - a) / n) ** 0.5)
                      for low, (a, n) in sorted(by_lag.items()) if n >= o.fewest}
            if points and (not o.cuts or cut in o.cuts):
                lines.setdefault((name, cut), []).append(points)
    colours, cuts = list(dict.fromkeys(names)), []
    for (name, cut), runs in lines.items():
        cuts += [cut] if cut not in cuts else []
        k = cuts.index(cut)
        style = {"color": f"C{colours.index(name) % 10}", "ls": ("-", "--", ":", "-.")[k % 4]}
        label = name if cut == "as it is" else f"{name}, cut: {cut}"
        if len(runs) == 1:
            y, error = zip(*runs[0].values())
            axis.errorbar(list(runs[0]), y, error, marker="o^sv"[k % 4], ms=4, lw=1.4, capsize=2, label=label, **style)
            continue
        for points in runs:
            axis.plot(list(points), [a for a, _ in points.values()], lw=0.7, alpha=0.6, **style)
        shared = [x for x in runs[0] if all(x in points for points in runs)]
        means = [statistics.mean(points[x][0] for points in runs) for x in shared]
        label += f", mean of {len(runs)}"
        axis.plot(shared, means, marker="o^sv"[k % 4], ms=5, lw=2.2, label=label, **style)
    for accuracy, name in o.level:
        axis.axhline(float(accuracy), color="0.5", lw=0.8)
        axis.annotate(name, (1, float(accuracy)), xycoords=("axes fraction", "data"), ha="right", va="bottom",
                      fontsize=8, color="0.4")
    axis.set_xscale("log", base=2)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("lag, tokens")
    axis.set_ylabel("accuracy")
    axis.set_title(o.title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8)
    save(figure, o.out)


if __name__ == "__main__":
    main()
