"""Training curves of one or more logs (train_sessa's --log): loss, validation loss and, where there is one, accuracy, by step.

  dev/claims/plot_training.py run.jsonl --out run.svg
  dev/claims/plot_training.py sessa.jsonl attention.jsonl mamba2.jsonl --names Sessa Transformer Mamba-2 --out curves.png
  dev/claims/plot_training.py soup.jsonl --level 0.82 "best possible" --level 0.79 "pairs" --out soup.png       # lines behind the accuracy
"""
import argparse
import json
import os
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def read_log(path):
    """The log's lines. One line and exit code 1 if it is none."""
    try:
        with open(path) as file:
            lines = [json.loads(line) for line in file]
        if not lines or not all("step" in line and "train_loss" in line for line in lines):
            raise ValueError
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, TypeError):
        sys.exit(f"{path}: not a log of train_sessa")
    return lines


def smooth(values, part=0.02):
    """A running mean over a small part of the whole."""
    width, out, total = max(1, int(len(values) * part)), [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0)
        out.append(total / min(i + 1, width))
    return out


def save(figure, path):
    try:
        figure.savefig(path, bbox_inches="tight", dpi=110, metadata={"Date": None} if path.endswith(".svg") else None)
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error.strerror if isinstance(error, OSError) else error}")
    print(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("logs", nargs="+")
    parser.add_argument("--names", nargs="+", help="one a log [the files' names]")
    parser.add_argument("--out", default="training.svg", help="picture, .svg or .png [training.svg]")
    parser.add_argument("--level", nargs=2, action="append", default=[], metavar=("ACCURACY", "NAME"), help="a line across; again for more")
    parser.add_argument("--title", default="")
    o = parser.parse_args()
    names = o.names or [os.path.splitext(os.path.basename(path))[0] for path in o.logs]
    if len(names) != len(o.logs):
        parser.error(f"{len(names)} names for {len(o.logs)} logs")
    try:
        levels = [(float(accuracy), name) for accuracy, name in o.level]
    except ValueError:
        parser.error("--level takes an accuracy and a name")

    logs = [read_log(path) for path in o.logs]
    with_accuracy = any("val_accuracy" in line for lines in logs for line in lines)
    figure, axes = plt.subplots(1, 1 + with_accuracy, figsize=(6 + 5 * with_accuracy, 4), squeeze=False)
    for i, (name, lines) in enumerate(zip(names, logs)):
        color = f"C{i % 10}"
        axes[0, 0].plot([line["step"] for line in lines], smooth([line["train_loss"] for line in lines]), color=color, lw=0.8, alpha=0.5)
        for axis, key in ((axes[0, 0], "val_loss"), (axes[0, -1], "val_accuracy")):
            points = [(line["step"], line[key]) for line in lines if key in line]
            if points:
                axis.plot(*zip(*points), color=color, lw=1.6, marker="." if len(points) < 60 else "", label=name)
    axes[0, 0].set_ylabel("loss (bold: validation)")
    if with_accuracy:
        axes[0, 1].set_ylabel("validation accuracy")
        for accuracy, name in levels:
            axes[0, 1].axhline(accuracy, color="0.6", lw=0.8, zorder=0)
            axes[0, 1].annotate(name, (0.01, accuracy), xycoords=("axes fraction", "data"), va="bottom", fontsize=7, color="0.4")
    for axis in axes[0]:
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()    # one legend for both, where it hides no curve
    if handles:
        figure.legend(handles, labels, frameon=False, loc="center left", bbox_to_anchor=(0.91, 0.5))
    figure.suptitle(o.title)
    save(figure, o.out)


if __name__ == "__main__":
    main()
