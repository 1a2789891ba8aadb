"""The balanced split (section 2.2): 10% of the images, with about 10% of every class's pixels.

    python balance_split.py --data ade20k,os,dtd     # writes data/split.json

From a random split, one image of each side is picked again and again, and the two are swapped if
that brings classes' shares nearer to 10%: if the mean of their distances gets smaller (our measure;
each source is split by itself). Ours, too: some worse swaps are taken, ever fewer (`Annealing`);
`balance(.., chance=0)` is the paper's rule alone.
"""

import argparse
import json
import math
import os
import shlex
from pathlib import Path

import numpy as np
import torch

import datasets
from datasets import Index, Option, UserError

SWAPS = 1_000_000  # some seconds: a swap's cost does not depend on the number of images


def balance(counts, fraction=0.1, swaps=SWAPS, seed=0, chance=0.5) -> np.ndarray:
    """The images chosen for validation: bool (images,), `round(fraction * images)` of them True,
    but at least one of two or more.

    counts: float array or tensor (images, classes), the pixels of each class in each image.
    swaps: pairs of images that are tried.
    chance: of taking an average bad swap at the start, falling to 0 (see `Annealing`); 0 is the
        paper's own procedure.
    The same seed gives the same answer. Raises ValueError for a fraction outside of (0, 1) or a
    chance outside of [0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction} is not between 0 and 1")
    if not 0 <= chance < 1:
        raise ValueError(f"chance {chance} is not in [0, 1)")
    shares = class_shares(counts)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(shares))
    size = round(fraction * len(shares))
    if len(shares) > 1:
        size = max(1, size)
    inside = order[:size]  # validation
    outside = order[size:]  # training
    validation = np.zeros(len(shares), bool)
    if size == 0 or len(outside) == 0:
        validation[inside] = True
        return validation

    error = shares[inside].sum(axis=0, dtype=np.float64) - fraction  # of each class
    distance = np.abs(error).sum()
    picks_inside = rng.integers(len(inside), size=swaps)
    picks_outside = rng.integers(len(outside), size=swaps)
    annealing = Annealing(shares, inside, outside, error, chance, swaps, rng)
    for k in range(swaps):
        i = picks_inside[k]
        j = picks_outside[k]
        swapped = error + (shares[outside[j]] - shares[inside[i]])
        worse_by = np.abs(swapped).sum() - distance
        if worse_by < 0 or annealing.accepts(worse_by, k):
            inside[i], outside[j] = outside[j], inside[i]
            error = swapped
            distance += worse_by
    validation[inside] = True
    return validation


def class_shares(counts) -> np.ndarray:
    """Of each class's pixels the share that each image has: float32 (images, classes with any)."""
    counts = np.asarray(counts, np.float32)
    total = counts.sum(axis=0, dtype=np.float64)
    return (counts[:, total > 0] / total[total > 0]).astype(np.float32)


class Annealing:
    """Simulated annealing, ours: some swaps are taken although they make the split worse, ever more
    rarely, since the paper's rule alone ends where no single swap helps."""

    def __init__(self, shares, inside, outside, error, chance, swaps, rng):
        self.swaps = swaps
        self.luck = rng.random(swaps)
        self.start = 0.0
        if chance > 0:
            i = rng.choice(inside, 1000)
            j = rng.choice(outside, 1000)
            change = np.abs(error + shares[j] - shares[i]).sum(axis=1) - np.abs(error).sum()
            if (change > 0).any():
                self.start = change[change > 0].mean() / -math.log(chance)

    def accepts(self, worse_by: float, k: int) -> bool:
        """Whether swap k is taken: with probability exp(-worse_by / temperature)."""
        temperature = self.start * (1 - k / self.swaps) ** 2
        return temperature > 0 and self.luck[k] < math.exp(-worse_by / temperature)


def deviation(shares: np.ndarray, validation: np.ndarray, fraction: float) -> float:
    """What `balance` minimises: the mean over the classes of |validation share - fraction|."""
    if shares.shape[1] == 0:
        return 0.0
    error = shares[validation].sum(axis=0, dtype=np.float64) - fraction
    return float(np.abs(error).mean())


def pixel_table(index: Index, vocabulary: dict) -> np.ndarray:
    """What a split is balanced in: float32 (images, classes) of pixels, all levels of the source
    side by side. Ours: scenes and textures, which have no pixels, count one for each image.
    """
    columns = []
    for level, classes in datasets.class_pixels(index).items():
        for name, images in classes.items():
            if level == "part":
                owner, part = name
                known = part in vocabulary.get("part", {}).get(owner, ())
            else:
                known = name in vocabulary.get(level, ())
            if known:
                columns.append(images)
    table = np.zeros((len(index.images), len(columns)), np.float32)
    for k, images in enumerate(columns):
        table[list(images), k] = list(images.values())
    return table


# ---------------------------------------------------------------- which images validate
def official_validation(index: Index) -> list[str]:
    """The validation images of the source's own lists or folders."""
    return sorted(i for i, side in zip(index.images, index.official) if side == "val")


def balanced_validation(
    index: Index,
    vocabulary: dict,
    folder: str,
    cache: str,
    make: bool = True,
    keep: frozenset = frozenset(),
) -> list[str]:
    """The validation images of a source in split.json, sorted paths; if the source is missing
    there, it is split and added with `make`.

    folder, cache: where the data and the cache are, see `split_path`.
    keep: images that a new split leaves on the training side.
    Raises UserError for a source whose images are no longer those that were split, and without
    `make` for one that was not.
    """
    path = split_path(folder, cache)
    split = read_split(path)
    entry = split["sources"].get(index.source)
    command = (
        f"python balance_split.py --data {index.source} --root {shlex.quote(folder)} "
        f"--cache {shlex.quote(cache)}"
    )
    if entry is None:
        if not make:
            raise UserError(f"{path}: no split of {index.source}; {command} makes one")
        entry = split_source(index, vocabulary, split["fraction"], keep=keep)
        split["sources"][index.source] = entry
        datasets.write_json(split, path)
    if entry["fingerprint"] != datasets.hash_of(index.images):
        raise UserError(
            f"{path}: its split of {index.source} is of other images than are there; {command} "
            "makes a new one"
        )
    return sorted(entry["validation"])


def split_source(
    index: Index,
    vocabulary: dict,
    fraction: float,
    swaps: int | None = None,
    keep: frozenset = frozenset(),
) -> dict:
    """The entry of one source in split.json. Images in `keep` do not validate."""
    table = pixel_table(index, vocabulary)
    shares = class_shares(table)
    if swaps is None:
        swaps = min(SWAPS, 1000 * len(index.images))
    free = np.array([image not in keep for image in index.images], bool)
    if free.sum() < 2:
        free[:] = True
    # So many of the free images that they are `fraction` of all, but at most half of them.
    share = fraction * len(free) / free.sum()
    if not free.all():
        share = min(max(fraction, 0.5), share)
    at_random = np.zeros(len(free), bool)
    at_random[free] = balance(table[free], share, 0, datasets.SEED)
    balanced = np.zeros(len(free), bool)
    balanced[free] = balance(table[free], share, swaps, datasets.SEED)
    return {
        "images": len(index.images),
        "fingerprint": datasets.hash_of(index.images),
        "validation": [image for image, chosen in zip(index.images, balanced) if chosen],
        "deviation_before": deviation(shares, at_random, fraction),
        "deviation_after": deviation(shares, balanced, fraction),
    }


def split_path(folder: str, cache: str) -> str:
    """split.json in the folder of the data; in the cache's if the former has none and cannot be
    written."""
    path = os.path.join(folder, "split.json")
    if os.path.exists(path) or os.access(folder, os.W_OK):
        return path
    return os.path.join(cache, "split.json")


def read_split(path: str) -> dict:
    """The content of split.json, without sources if it is missing. UserError for another file."""
    empty = {"seed": datasets.SEED, "fraction": 0.1, "sources": {}}
    if not os.path.exists(path):
        return empty
    try:
        split = {**empty, **json.loads(Path(path).read_text())}
        for entry in split["sources"].values():
            sorted(entry["validation"])
            entry["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a split of balance_split.py's ({e}); delete it") from None
    return split


# ---------------------------------------------------------------- the command
def command(args: argparse.Namespace) -> None:
    indexes = datasets.open_indexes(
        args.data, args.folder, args.cache_folder, args.allow_broken, args.workers
    )
    vocabulary = datasets.build_vocabulary(indexes, datasets.minima(vars(args)))
    path = split_path(args.folder, args.cache_folder)
    content = read_split(path)
    others = sorted(set(content["sources"]) - set(indexes))
    if others and content["fraction"] != args.fraction:
        raise UserError(
            f"{path}: splits {', '.join(others)} at {content['fraction']}; name them in --data too "
            "for another --fraction"
        )
    content["fraction"] = args.fraction
    plots = []
    for source, index in indexes.items():
        entry = split_source(index, vocabulary, args.fraction, args.swaps)
        content["sources"][source] = entry
        plots.append([plot_shares(index, vocabulary, set(entry["validation"]), args.fraction)])
        print(
            f"{source}: {len(entry['validation'])} of {len(index.images)} images; mean deviation "
            f"{entry['deviation_before']:.4f} at random, {entry['deviation_after']:.4f} balanced"
        )
    datasets.write_json(content, path)
    print(f"wrote {path}; train.py uses it")
    if args.plot:
        datasets.save_picture(datasets.sheet_of(plots), args.plot)
        print(f"wrote {args.plot}")


def plot_shares(index: Index, vocabulary: dict, validation: set[str], fraction: float):
    """The classes' shares in validation, sorted: balanced in blue, of a random split in grey."""
    shares = class_shares(pixel_table(index, vocabulary))
    balanced = np.array([image in validation for image in index.images])
    at_random = np.random.default_rng(datasets.SEED).permutation(balanced)
    classes = shares.shape[1]
    places = np.arange(classes) + 0.5
    curves = [(places, np.full(classes, fraction), "#cc3333")]
    for side, colour in ((at_random, "#999999"), (balanced, "#2255cc")):
        curves.append((places, np.sort(shares[side].sum(axis=0)), colour))
    title = f"{index.source}: validation share (grey: random)"
    return datasets.plot(title, "class", max(1, classes), max(0.3, 2 * fraction), curves)


OPTIONS = [
    *datasets.DATA_OPTIONS,
    datasets.WORKERS_OPTION,
    Option("fraction", float, 0.1, "share of the images that validate", least=1e-6, below=1),
    Option("swaps", int, None, f"pairs of images to try ({SWAPS}, or 1000 an image)", least=0),
    Option("plot", str, None, "picture of the classes' shares, at random and balanced"),
]


def main(argv: list[str] | None = None) -> None:
    description = "Splits each source so that about a tenth of every class's pixels validate."
    parser = datasets.Parser(description, OPTIONS)
    given = parser.given(argv)
    parser.run(lambda: command(parser.complete(given)))


if __name__ == "__main__":
    main()
