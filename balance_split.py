"""The balanced split (section 2.2): 10% of each source's images for validation, such that of every class about 10% of
the pixels are there.

    python balance_split.py --data ade20k,os,dtd     # writes data/split.json

Images are drawn at random; then, again and again, one image of each side is picked and the two change places if that
brings the classes' shares nearer to 10%: if the mean of their distances from it gets smaller (our measure of "nearer",
and each source is split for itself).
"""

import argparse
import hashlib
import json
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from datasets import (
    SEED,
    Index,
    Parser,
    UserError,
    add_data_options,
    build_vocabulary,
    data_root,
    natural,
    open_sources,
    pixel_table,
    write_json,
)

SWAPS = 1_000_000  # some seconds: a swap's cost does not depend on the number of images


def class_shares(counts: torch.Tensor) -> np.ndarray:
    """Of each class's pixels the share that each image has, (images, classes that have pixels) float32."""
    image, label = counts.indices().numpy()
    pixels = counts.values().double().numpy()
    total = np.bincount(label, pixels, minlength=counts.shape[1])
    shares = np.zeros(counts.shape, np.float32)
    shares[image, label] = pixels / np.maximum(total[label], 1)
    return shares[:, total > 0]


def deviation(shares: np.ndarray, validation: np.ndarray, fraction: float) -> float:
    """Mean over the classes of |validation share - fraction|; 0 without a class. What `balance` minimises."""
    return float(np.abs(shares[validation].sum(axis=0, dtype=np.float64) - fraction).mean()) if shares.shape[1] else 0.0


def balance(
    counts: torch.Tensor, fraction: float = 0.1, swaps: int = SWAPS, seed: int = 0, chance: float = 0.5
) -> torch.Tensor:
    """Which images to validate on: bool (images,), exactly round(fraction * images) of them True.

    counts: coalesced sparse COO tensor (images, classes) of pixels. `swaps` pairs of images are proposed. `chance` is
    that of taking a swap which makes matters worse, at the start and for one of average size; it falls to 0 (simulated
    annealing, a choice of ours, which gets out of dead ends; the paper's procedure is chance 0). The same seed gives
    the same answer. Raises ValueError for a fraction or a chance outside of (0, 1) and [0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction {fraction}: must lie between 0 and 1")
    if not 0 <= chance < 1:
        raise ValueError(f"chance {chance}: must be at least 0 and below 1")
    rng = np.random.default_rng(seed)
    images = counts.shape[0]
    order = rng.permutation(images)
    held = round(fraction * images)
    inside, outside = order[:held].tolist(), order[held:].tolist()
    shares = class_shares(counts)

    if inside and outside and shares.shape[1]:
        error = shares[inside].sum(axis=0, dtype=np.float64) - fraction
        cost = float(np.abs(error).sum())
        proposals = np.stack([rng.integers(len(side), size=swaps) for side in (inside, outside)], axis=1)
        luck = rng.random(swaps)
        temperature = 0.0
        if chance:
            trials = [float(np.abs(error + shares[outside[j]] - shares[inside[i]]).sum()) for i, j in proposals[:1000]]
            worse = [c - cost for c in trials if c > cost]
            temperature = sum(worse) / len(worse) / -math.log(chance) if worse else 0.0
        for k, (i, j) in enumerate(proposals):
            a, b = inside[i], outside[j]
            swapped = error + (shares[b] - shares[a])
            worse_by = float(np.abs(swapped).sum()) - cost
            cooled = temperature * (1 - k / swaps) ** 2
            if worse_by < 0 or (cooled > 0 and luck[k] < math.exp(-worse_by / cooled)):
                inside[i], outside[j] = b, a
                error = swapped
                cost += worse_by
    validation = torch.zeros(images, dtype=torch.bool)
    validation[inside] = True
    return validation


# ---------------------------------------------------------------- split.json


def fingerprint(index: Index) -> str:
    """Changes with the set of usable images of a source."""
    return hashlib.sha256("\n".join(index.images).encode()).hexdigest()[:16]


def split_source(index: Index, vocabulary: dict, fraction: float, swaps: int | None = None) -> dict:
    """The entry of one source in split.json."""
    counts = pixel_table(index, vocabulary)
    shares = class_shares(counts)
    at_random = balance(counts, fraction, 0, SEED)
    validation = balance(counts, fraction, swaps if swaps is not None else min(SWAPS, 1000 * len(index.images)), SEED)
    return {
        "images": len(index.images),
        "fingerprint": fingerprint(index),
        "validation": [index.images[i] for i in validation.nonzero().flatten().tolist()],
        "deviation_before": deviation(shares, at_random.numpy(), fraction),
        "deviation_after": deviation(shares, validation.numpy(), fraction),
    }


def split_path(root: str, cache: str | None) -> str:
    """<root>/split.json; in the cache's folder if that root cannot be written and has none."""
    path = os.path.join(root, "split.json")
    return (
        os.path.join(cache, "split.json")
        if cache and not os.path.exists(path) and not os.access(root, os.W_OK)
        else path
    )


def read_split(path: str) -> dict:
    """What split.json holds, or an empty one if there is no such file. Raises UserError if it is something else."""
    try:
        with open(path) as file:
            split = json.load(file)
        fraction = split.setdefault("fraction", None)
        if fraction is not None and not 0 < float(fraction) < 1:
            raise ValueError(f"fraction {fraction}")
        for entry in split["sources"].values():
            entry["fingerprint"], int(entry["images"]), set(entry["validation"])
        return split
    except FileNotFoundError:
        return {"seed": SEED, "fraction": None, "sources": {}}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(
            f"{path}: not a split that balance_split.py wrote ({type(e).__name__}: {e}); delete it"
        ) from None


def balanced_validation(indexes: dict[str, Index], vocabulary: dict, path: str) -> dict[str, set[str]]:
    """The validation images of each source as split.json has them; a source that it lacks is split now and added.

    Raises UserError for a source whose images are no longer those that were split.
    """
    split = read_split(path)
    lacking = [source for source in indexes if source not in split["sources"]]
    for source in lacking:
        split["fraction"] = split["fraction"] or 0.1
        split["sources"][source] = split_source(indexes[source], vocabulary, split["fraction"])
    if lacking:
        write_json(split, path, "name a folder for it with --cache")
    for source, index in indexes.items():
        entry = split["sources"][source]
        if entry["fingerprint"] != fingerprint(index):
            found = f"its split of {source} is of {entry['images']} images and no longer fits the {len(index.images)}"
            raise UserError(
                f"{path}: {found} that are there; make a new one with python balance_split.py --data {source}"
            )
    return {source: set(split["sources"][source]["validation"]) for source in indexes}


def official_validation(index: Index) -> set[str]:
    """The validation images of the source's own lists or folders."""
    return {image for image, side in zip(index.images, index.official) if side == "validation"}


def plot(before: np.ndarray, after: np.ndarray, fraction: float, title: str) -> Image.Image:
    """Each class's share of pixels in validation, classes sorted by it: grey before the swaps, blue after."""
    width, height, left, bottom, top = 760, 300, 60, 40, 30
    picture = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    highest = max(0.3, 2 * fraction)
    bottom_y = height - bottom
    y_of = lambda share: bottom_y - min(share, highest) / highest * (bottom_y - top)
    for tick in np.linspace(0, highest, 4):
        draw.line([(left, y_of(tick)), (width - 15, y_of(tick))], fill="#dddddd")
        draw.text((left - 8, y_of(tick)), f"{tick:.0%}", fill="black", font=font, anchor="rm")
    draw.line([(left, y_of(fraction)), (width - 15, y_of(fraction))], fill="#cc3333")
    for shares, colour in ((before, "#999999"), (after, "#2255cc")):
        for k, share in enumerate(sorted(shares.tolist())):
            x = left + (k + 0.5) / len(shares) * (width - 15 - left)
            draw.ellipse([x - 2, y_of(share) - 2, x + 2, y_of(share) + 2], fill=colour)
    draw.text((left, 8), title, fill="black", font=font)
    draw.text(
        (left, bottom_y + 12),
        f"the {len(after)} classes, sorted: share of their pixels in validation",
        fill="black",
        font=font,
    )
    draw.text((width - 15, bottom_y + 12), "blue: balanced, grey: at random", fill="black", font=font, anchor="ra")
    return picture


def fraction_of(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number between 0 and 1")
    return value


def main(argv: list[str] | None = None) -> None:
    parser = Parser("Splits each source so that of every class about a tenth of the pixels are for validation.")
    add_data_options(parser)
    group = parser.add_argument_group("split")
    group.add_argument("--fraction", type=fraction_of, default=0.1, metavar="F", help="share of the images (0.1)")
    group.add_argument(
        "--swaps", type=natural, metavar="N", help=f"pairs of images to try ({SWAPS}, of a small source fewer)"
    )
    group.add_argument("--plot", metavar="FILE", help="draws the classes' shares before and after, as a picture")
    args = parser.parse_args(argv)
    try:
        indexes, minima = open_sources(args)
        vocabulary = build_vocabulary(indexes, minima)
        path = split_path(data_root(args), args.cache)
        split = read_split(path)
        if split["fraction"] not in (None, args.fraction) and set(split["sources"]) - set(indexes):
            others = ", ".join(sorted(set(split["sources"]) - set(indexes)))
            kept = f"splits {others} at {split['fraction']}"
            raise UserError(f"{path}: {kept}; --fraction {args.fraction} must name them in --data too")
        split["fraction"] = args.fraction
        panels = []
        for source, index in indexes.items():
            entry = split["sources"][source] = split_source(index, vocabulary, args.fraction, args.swaps)
            held, before, after = len(entry["validation"]), entry["deviation_before"], entry["deviation_after"]
            found = f"mean deviation {before:.4f} at random, {after:.4f} balanced"
            print(f"{source}: {held} of {len(index.images)} images; {found}")
            if args.plot:
                counts = pixel_table(index, vocabulary)
                shares = class_shares(counts)
                chosen = np.isin(index.images, entry["validation"])
                at_random = balance(counts, args.fraction, 0, SEED).numpy()
                panels.append(plot(shares[at_random].sum(axis=0), shares[chosen].sum(axis=0), args.fraction, source))
        write_json(split, path, "name a folder for it with --cache")
        print(f"wrote {path}; train.py uses it by itself")
        if args.plot:
            sheet = Image.new("RGB", (panels[0].width, sum(p.height for p in panels)))
            for k, panel in enumerate(panels):
                sheet.paste(panel, (0, k * panel.height))
            try:
                sheet.save(args.plot)
            except (OSError, ValueError) as e:
                raise UserError(f"{args.plot}: the plot cannot be written ({e})") from None
            print(f"wrote {args.plot}")
    except UserError as e:
        parser.error(str(e))


if __name__ == "__main__":
    main()
