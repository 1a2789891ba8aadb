"""The balanced split (section 2.2): 10% of each source's images for validation, with about 10% of every class's pixels.

    python balance_split.py --data ade20k,os,dtd     # writes data/split.json

From a random split, one image of each side is picked again and again, and the two are swapped if that brings classes'
shares nearer to 10%: if the mean of their distances gets smaller (our measure; each source is split by itself)."""

import json, math, os, shlex
from pathlib import Path

import numpy as np
import torch

import datasets
from datasets import Index, Option, UserError

SWAPS = 1_000_000  # some seconds: a swap's cost does not depend on the number of images


def balance(counts: torch.Tensor, fraction=0.1, swaps=SWAPS, seed=0, chance=0.5) -> torch.Tensor:
    """The images chosen for validation: bool (images,), exactly round(fraction * images) of them True.
    counts: coalesced sparse COO tensor (images, classes) of pixels. `swaps` pairs of images are tried. `chance` is that
    of taking a swap of average size that makes it worse, at the start; it falls to 0 (simulated annealing, a choice of
    ours, which leaves dead ends; chance 0 is the paper's procedure). The same seed gives the same answer. Raises
    ValueError for a fraction outside of (0, 1) or a chance outside of [0, 1)."""
    if not 0 < fraction < 1 or not 0 <= chance < 1:
        raise ValueError(f"fraction {fraction} must lie between 0 and 1, chance {chance} in [0, 1)")
    rng = np.random.default_rng(seed)
    images = counts.shape[0]
    order, n = rng.permutation(images), round(fraction * images)
    inside, outside = order[:n].tolist(), order[n:].tolist()  # validation and training
    shares = class_shares(counts)
    if inside and outside and shares.shape[1]:
        error = shares[inside].sum(axis=0, dtype=np.float64) - fraction  # of each class, its share in validation - 10%
        distance = np.abs(error).sum()
        pairs = np.stack([rng.integers(len(side), size=swaps) for side in (inside, outside)], axis=1)
        accepts = annealing(error, shares, inside, outside, pairs[:1000], chance, rng.random(swaps))
        for k, (i, j) in enumerate(pairs):
            a, b = inside[i], outside[j]
            swapped = error + (shares[b] - shares[a])
            worse_by = np.abs(swapped).sum() - distance
            if worse_by < 0 or accepts(k, worse_by):  # the paper's rule, or the annealing
                inside[i], outside[j] = b, a
                error, distance = swapped, distance + worse_by
    validation = torch.zeros(images, dtype=torch.bool)
    validation[inside] = True
    return validation


def annealing(error, shares, inside, outside, pairs, chance: float, luck: np.ndarray):
    """`accepts(k, worse_by)`: whether swap k is taken although it makes the distance worse. Ours: with probability
    exp(-worse_by / temperature), which is `chance` for an average bad swap at the start and falls to 0 at the end."""
    if not chance:
        return lambda k, worse_by: False
    distance = np.abs(error).sum()
    changes = [np.abs(error + shares[outside[j]] - shares[inside[i]]).sum() - distance for i, j in pairs]
    worse = [change for change in changes if change > 0] or [0.0]
    start = sum(worse) / len(worse) / -math.log(chance)
    log_luck = np.log(luck)
    return lambda k, worse_by: -worse_by > start * (1 - k / len(luck)) ** 2 * log_luck[k]


def class_shares(counts: torch.Tensor) -> np.ndarray:
    """Of each class's pixels the share that each image has: (images, classes that have pixels) float32."""
    image, label = counts.indices().numpy()
    pixels = counts.values().double().numpy()
    total = np.bincount(label, pixels, minlength=counts.shape[1])
    shares = np.zeros(counts.shape, np.float32)
    shares[image, label] = pixels / np.maximum(total[label], 1)
    return shares[:, total > 0]


def deviation(shares: np.ndarray, validation: np.ndarray, fraction: float) -> float:
    """What `balance` minimises: the mean over the classes of |validation share - fraction|; 0 without a class."""
    return float(np.abs(shares[validation].sum(axis=0, dtype=np.float64) - fraction).mean()) if shares.shape[1] else 0.0


def pixel_table(index: Index, vocabulary: dict) -> torch.Tensor:
    """What a split is balanced in: sparse (images, classes) of pixels, all levels of the source side by side.
    Our choice: scenes and textures, which have no pixels, count one for each image."""
    part_of = lambda name: name[1] in vocabulary["part"].get(name[0], ())
    known = lambda level, name: part_of(name) if level == "part" else name in vocabulary[level]
    tables = {level: table for level, table in datasets.class_pixels(index).items() if level in vocabulary}
    columns = [images for level, table in tables.items() for name, images in table.items() if known(level, name)]
    entries = [(image, k, pixels) for k, images in enumerate(columns) for image, pixels in images.items()]
    *where, pixels = torch.tensor(entries, dtype=torch.float64).reshape(-1, 3).T
    with torch.sparse.check_sparse_tensor_invariants():
        return torch.sparse_coo_tensor(torch.stack(where).long(), pixels, (len(index.images), len(columns))).coalesce()


# ---------------------------------------------------------------- which images validate
def validation_images(index: Index, vocabulary: dict, args, make: bool = True) -> list[str]:
    """The validation images of a source, sorted paths.
    args.split: "official", the source's own lists or folders (OpenSurfaces has none and takes the balanced split);
    "balanced", those of split.json, where a missing source is split and added with `make`; None, for a network that was
    not trained here, balanced if it is there, else official, or all of OpenSurfaces. Raises UserError for a source
    whose images are no longer those that were split, and without `make` for one that was not."""
    path, how, source = split_path(args), args.split, index.source
    split = read_split(path)
    missing = source not in split["sources"]
    if how == "official" and source != "os" or how is None and missing:
        if how is None:
            taken = "all images" if source == "os" else "its validation folder"
            datasets.say(f"{source}: not in {path}; taking {taken}")
        return sorted(i for i, side in zip(index.images, index.official) if side == "val" or source == "os")
    cache = f" --cache {shlex.quote(args.cache)}" if args.cache else ""
    command = f"python balance_split.py --data {source} --root {shlex.quote(datasets.data_root(args))}{cache}"
    if missing and not make:
        raise UserError(f"{path}: no split of {source}; {command} makes one")
    if missing:
        split["sources"][source], _ = split_source(index, vocabulary, split["fraction"])
        datasets.write_json(split, path)
    entry = split["sources"][source]
    if entry["fingerprint"] != datasets.hash_of(index.images):
        raise UserError(f"{path}: its split of {source} is of other images than are there; {command} makes a new one")
    return sorted(entry["validation"])


def split_source(index: Index, vocabulary: dict, fraction: float, swaps: int | None = None) -> tuple[dict, list]:
    """The entry of one source in split.json, and each class's share in validation at random and balanced."""
    counts = pixel_table(index, vocabulary)
    shares, sides = class_shares(counts), []
    for n in (0, min(SWAPS, 1000 * len(index.images)) if swaps is None else swaps):
        sides.append(balance(counts, fraction, n, datasets.SEED).numpy())
    entry = {"images": len(index.images), "fingerprint": datasets.hash_of(index.images)}
    entry["validation"] = [image for image, validates in zip(index.images, sides[1]) if validates]
    entry["deviation_before"], entry["deviation_after"] = (deviation(shares, side, fraction) for side in sides)
    return entry, [shares[side].sum(axis=0) for side in sides]


def split_path(args) -> str:
    """<root>/split.json; in the cache's folder if that root cannot be written and has none."""
    root = datasets.data_root(args)
    path = os.path.join(root, "split.json")
    writable = os.path.exists(path) or os.access(root, os.W_OK)
    return path if writable else os.path.join(datasets.cache_folder(args), "split.json")


def read_split(path: str) -> dict:
    """The content of split.json, without sources if it is missing. Raises UserError for any other file."""
    if not os.path.exists(path):
        return {"seed": datasets.SEED, "fraction": 0.1, "sources": {}}
    try:
        split = json.loads(Path(path).read_text())
        [(entry["fingerprint"], entry["images"], set(entry["validation"])) for entry in split["sources"].values()]
        return {"seed": datasets.SEED, "fraction": 0.1} | split
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a split of balance_split.py's ({e}); delete it") from None


# ---------------------------------------------------------------- the command
def split(args) -> None:
    import evaluate  # which imports this file

    indexes, minima = datasets.open_indexes(args)
    vocabulary = datasets.build_vocabulary(indexes, minima)
    content, panels = read_split(path := split_path(args)), []
    others = sorted(set(content["sources"]) - set(indexes))
    if others and content["fraction"] != args.fraction:
        raise UserError(f"{path}: splits {', '.join(others)} at {content['fraction']}; name them in --data for another")
    content["fraction"] = args.fraction
    for name, index in indexes.items():
        entry, shares = split_source(index, vocabulary, args.fraction, args.swaps)
        content["sources"][name], n = entry, max(1, len(shares[0]))
        found = f"mean deviation {entry['deviation_before']:.4f} at random, {entry['deviation_after']:.4f} balanced"
        print(f"{name}: {len(entry['validation'])} of {len(index.images)} images; {found}")
        points = {c: (np.arange(len(s)) + 0.5, np.sort(s)) for c, s in zip(("#999999", "#2255cc"), shares)}
        title, top = f"{name}: validation share (grey: random)", max(0.3, 2 * args.fraction)
        panels.append([evaluate.plot(title, points, top, n, "classes", [args.fraction])])
    datasets.write_json(content, path)
    print(f"wrote {path}; train.py uses it")
    if args.plot:
        evaluate.save_picture(evaluate.sheet_of(panels), args.plot)
        print(f"wrote {args.plot}")


def main(argv: list[str] | None = None) -> None:
    options = [
        Option("fraction", float, 0.1, "share of the images that validate", least=1e-6, below=1),
        Option("swaps", int, None, f"pairs of images to try ({SWAPS}, or 1000 an image)", least=0),
        Option("plot", str, None, "write a picture of the classes' shares, at random and balanced"),
    ]
    description = "Splits each source so that about a tenth of every class's pixels validate."
    parser = datasets.Parser(description, datasets.DATA_OPTIONS + options)
    given = parser.parse_args(argv)
    parser.run(lambda: split(parser.complete(given)))


if __name__ == "__main__":
    main()
