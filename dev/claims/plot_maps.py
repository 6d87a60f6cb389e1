"""One layer's matrices as heat maps: attention (the direct read), the feedback path's weights, and (I - diag(γ) α)^-1, which sums
every number of hops. Row: the position that reads; column: the position that is read. Colours are logarithmic.

  ./influence maps.safetensors --load sessa.best.safetensors --data data/tinyshakespeare.txt --seq 256 --map 3 --map-size 128
  dev/claims/plot_maps.py maps.safetensors --out maps.png
"""
import argparse
import sys

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import LogNorm
from safetensors import SafetensorError, safe_open

from plot_training import save

TITLES = {"map.direct": "attention, mean over heads", "map.feedback": r"feedback, $|\gamma_t\,\alpha_{tj}|$",
          "map.solve": r"all hops, $|(I - \mathrm{diag}(\gamma)\,\alpha)^{-1}|$", "map.chain": "chain, mean over heads"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", help="of dev/claims/influence.c")
    parser.add_argument("--floor", type=float, default=1e-4, help="smaller numbers have the colour of this one [1e-4]")
    parser.add_argument("--out", default="maps.png", help="picture, .svg or .png [maps.png]")
    o = parser.parse_args()
    if not 0 < o.floor < 1:
        parser.error("--floor lies between 0 and 1")
    try:
        with safe_open(o.file, framework="numpy") as file:
            maps, metadata = {name: file.get_tensor(name) for name in TITLES if name in file.keys()}, file.metadata() or {}
    except OSError as error:
        sys.exit(f"{o.file}: {error.strerror or error}")
    except SafetensorError as error:
        sys.exit(f"{o.file}: {error}")
    if not maps:
        sys.exit(f"{o.file}: it holds no map")

    figure, axes = plt.subplots(1, len(maps), figsize=(1 + 4.6 * len(maps), 4.4), squeeze=False, layout="constrained")
    for axis, (name, matrix) in zip(axes[0], maps.items()):
        above = np.triu(np.ones(matrix.shape, bool), 1)
        shown = np.ma.array(np.maximum(np.abs(matrix), o.floor), mask=above)
        image = axis.imshow(shown, norm=LogNorm(o.floor, 1), cmap="magma", interpolation="nearest")
        axis.set(title=TITLES[name], xlabel="position read")
    axes[0, 0].set_ylabel("position that reads")
    figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8)
    figure.suptitle(f"{metadata.get('mixer', '')}, layer {metadata.get('map_layer', '?')}")
    save(figure, o.out)


if __name__ == "__main__":
    main()
