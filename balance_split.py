"""The balanced split (section 2.2): 10% of the images, with about 10% of every class's pixels.

    python balance_split.py --data ade20k,os,dtd     # writes data/split.json

From a random split, one image of each side is picked again and again, and the two are swapped if
that brings classes' shares nearer to 10%: if the mean of their distances gets smaller (our measure;
each source is split by itself). Ours, too: some worse swaps are taken, ever fewer (simulated
annealing), since the rule alone ends where no single swap helps; `balance(.., chance=0)` is the
paper's rule alone.
"""

import json
import math
import os
from pathlib import Path

import numpy as np

import datasets
from datasets import Index, UserError

SWAPS = 1_000_000  # some seconds: a swap's cost does not depend on the number of images


def balance(counts, fraction=0.1, swaps=SWAPS, seed=0, chance=0.5) -> np.ndarray:
    """The images chosen for validation: bool (images,), `round(fraction * images)` of them True,
    but at least one of two or more.

    counts: float array or tensor (images, classes), the pixels of each class in each image.
    swaps: pairs of images that are tried.
    chance: of taking an average bad swap at the start, below 1, falling to 0; 0 is the paper's own
        procedure.
    The same seed gives the same answer. Raises UserError, a ValueError, for a fraction outside of
    (0, 1).
    """
    if not 0 < fraction < 1:
        raise UserError(f"--fraction {fraction}: not between 0 and 1")
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

    error = shares[inside].sum(axis=0) - fraction  # of each class
    distance = np.abs(error).sum()
    picks_inside = rng.integers(len(inside), size=swaps)
    picks_outside = rng.integers(len(outside), size=swaps)
    start = start_temperature(shares, inside, outside, error, chance, rng)
    uniform = rng.random(swaps)
    for k in range(swaps):
        i = picks_inside[k]
        j = picks_outside[k]
        swapped = error + (shares[outside[j]] - shares[inside[i]])
        worse_by = np.abs(swapped).sum() - distance
        temperature = start * (1 - k / swaps) ** 2
        # The paper's rule, or our annealing.
        if worse_by < 0 or (temperature > 0 and uniform[k] < math.exp(-worse_by / temperature)):
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


def start_temperature(shares, inside, outside, error, chance, rng):
    """Where the annealing starts: there a swap that makes the split worse by an average amount is
    taken with probability `chance`."""
    if chance == 0:
        return 0.0
    i = rng.choice(inside, 1000)
    j = rng.choice(outside, 1000)
    change = np.abs(error + shares[j] - shares[i]).sum(axis=1) - np.abs(error).sum()
    if not (change > 0).any():
        return 0.0
    return float(change[change > 0].mean()) / -math.log(chance)


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
    for classes in datasets.class_pixels(index, vocabulary).values():
        columns += classes.values()
    table = np.zeros((len(index.images), len(columns)), np.float32)
    for k, images in enumerate(columns):
        table[list(images), k] = list(images.values())
    return table


# ---------------------------------------------------------------- which images validate
def validation_images(
    index: Index, split: str, path: str, vocabulary: dict | None = None
) -> list[str]:
    """The validation images of a source, sorted paths, by the --split: "all" images, the "official"
    ones of its own lists or folders, or the "balanced" ones in split.json, at `path`.

    vocabulary: with it a source that is not in split.json yet is split and added.
    Raises UserError for a source that is not in split.json, without a vocabulary; for one whose
    images are no longer those that were split; for an official split without validation images.
    """
    if split == "all":
        return index.images
    if split == "official" and index.data_set.has_official:
        if "val" not in index.official:
            where = ", images/validation/ beside images/training/" if index.data_set.own else ""
            raise UserError(f"{index.source}: --split official needs validation images{where}")
        return sorted(i for i, side in zip(index.images, index.official) if side == "val")
    content = read_split(path)
    if index.source not in content["sources"]:
        if vocabulary is None:
            raise UserError(f"{path}: no split of {index.source}; balance_split.py makes one")
        content["sources"][index.source] = split_source(index, vocabulary, content["fraction"])
        datasets.write_json(content, path)
    entry = content["sources"][index.source]
    if entry["fingerprint"] != datasets.hash_of(index.images):
        raise UserError(
            f"{path}: its split of {index.source} is of other images than are there; "
            f"python balance_split.py --data {index.source} makes a new one (with your --root)"
        )
    return sorted(entry["validation"])


def split_source(index, vocabulary, fraction, swaps=None):
    """The entry of one source in split.json."""
    table = pixel_table(index, vocabulary)
    shares = class_shares(table)
    if swaps is None:
        swaps = min(SWAPS, 1000 * len(index.images))
    at_random = balance(table, fraction, 0, datasets.SEED)
    balanced = balance(table, fraction, swaps, datasets.SEED)
    return {
        "images": len(index.images),
        "fingerprint": datasets.hash_of(index.images),
        "validation": [image for image, validates in zip(index.images, balanced) if validates],
        "deviation_before": deviation(shares, at_random, fraction),
        "deviation_after": deviation(shares, balanced, fraction),
    }


def split_path(folder, cache):
    """split.json in the folder of the data; in the cache's if the former has none and cannot be
    written."""
    path = os.path.join(folder, "split.json")
    if os.path.exists(path) or os.access(folder, os.W_OK):
        return path
    return os.path.join(cache, "split.json")


def read_split(path):
    """The content of split.json, without sources if it is missing. UserError for another file."""
    empty = {"seed": datasets.SEED, "fraction": 0.1, "sources": {}}
    if not os.path.exists(path):
        return empty
    try:
        return {**empty, **json.loads(Path(path).read_text())}
    except (ValueError, TypeError) as e:
        raise UserError(f"{path}: not a split of balance_split.py's ({e}); delete it") from None


# ---------------------------------------------------------------- the command
def command(argv):
    parser = datasets.make_parser(
        "balance_split.py",
        "Splits each source so that about a tenth of every class's pixels validate.",
    )
    datasets.add_data_options(parser)
    add = parser.add_argument
    add("--fraction", type=float, default=0.1, help="share of the images (0.1)")
    swaps = f"pairs of images to try ({SWAPS}, or 1000 an image)"
    add("--swaps", type=datasets.not_negative, metavar="N", help=swaps)
    add("--plot", help="picture of the classes' shares, at random and balanced")
    args = datasets.parse_options(parser, argv, datasets.TOY_OPTIONS, {})
    place = (args.folder, args.cache_folder)
    indexes = datasets.open_indexes(args.data, *place, args.workers)
    vocabulary = datasets.build_vocabulary(indexes, args.thresholds)
    path = split_path(*place)
    content = read_split(path)
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


def plot_shares(index, vocabulary, validation, fraction):
    """The classes' shares in validation, sorted: balanced in blue, of a random split in grey."""
    shares = class_shares(pixel_table(index, vocabulary))
    balanced = np.array([image in validation for image in index.images])
    at_random = np.random.default_rng(datasets.SEED).permutation(balanced)
    classes = shares.shape[1]
    top = max(0.3, 2 * fraction)
    curves = [([(k, fraction) for k in range(classes)], "#cc3333")]
    for side, colour in ((at_random, "#999999"), (balanced, "#2255cc")):
        heights = np.sort(shares[side].sum(axis=0)).clip(max=top)
        curves.append((list(enumerate(heights.tolist())), colour))
    title = f"{index.source}: validation share by class (grey: random)"
    return datasets.plot(title, classes, top, curves)


def main(argv: list[str] | None = None) -> None:
    with datasets.one_line_errors("balance_split.py"):
        command(argv)


if __name__ == "__main__":
    main()
