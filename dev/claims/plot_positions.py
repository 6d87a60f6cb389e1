"""Loss by position: what positions.py kept (--json), one line a model.

  dev/claims/plot_positions.py positions.json --names Sessa Transformer Mamba-2 --out positions.png

A bin of positions is drawn at its geometric middle.
"""
import argparse
import json
import os
import sys

from plot_training import plt, save


def read(path):
    """{checkpoint: [(bin's first position, loss)]}"""
    try:
        with open(path) as file:
            found = json.load(file)
        return {name: sorted((int(low), float(loss)) for low, loss in by_bin.items()) for name, by_bin in found.items()}
    except OSError as error:
        sys.exit(f"{path}: {error.strerror}")
    except (ValueError, TypeError, AttributeError):
        sys.exit(f"{path}: not a file of positions.py")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file")
    parser.add_argument("--names", nargs="+", help="one a checkpoint [their files' names]")
    parser.add_argument("--title", default="")
    parser.add_argument("--out", default="positions.svg", help="[positions.svg]")
    o = parser.parse_args()
    found = read(o.file)
    names = o.names or [os.path.basename(path).split(".")[0] for path in found]
    if len(names) != len(found):
        parser.error(f"{len(names)} names for {len(found)} checkpoints")
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for name, points in zip(names, found.values()):
        middles = [low * 2 ** 0.5 or 4 for low, _ in points]
        axis.plot(middles, [loss for _, loss in points], marker="o", ms=4, label=name)
    axis.set_xscale("log", base=2)
    axis.set_xlabel("position in the window, tokens")
    axis.set_ylabel("validation loss there, nats a byte")
    axis.set_title(o.title)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
    save(figure, o.out)


if __name__ == "__main__":
    main()
