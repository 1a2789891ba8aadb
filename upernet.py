"""UPerNet: one network for scene, objects, parts, materials and textures (Xiao et al., ECCV 2018, section 3, figure 4).

    from upernet import UPerNet
    net = UPerNet({"scene": 365, "object": 335, "part": {11: 4, 20: 7}, "material": 25, "texture": 47})
    net(images)["object"]                      # images (N, 3, H, W), RGB in [0, 1] -> logits (N, 335, H/4, W/4)
    net(images, levels=["scene", "material"])  # computes what these two need, no more

    from upernet import load
    net, vocabulary = load("ckpt.pt")

    python upernet.py                          # parameters, operations and speed of the network on this machine

This file and resnet.py work on their own, copied anywhere; with `backbone=` a module, this file alone.
"""

import argparse
import csv
import inspect
import os
import re
import time
import warnings

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = ("scene", "object", "part", "material", "texture")
# As released; that of texture is ours.
LOSS_WEIGHTS = {"scene": 0.25, "object": 1.0, "part": 0.5, "material": 1.0, "texture": 1.0}
UNLABELLED = -1  # in every label map and list of labels
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of RGB in [0, 1]


# ---------------------------------------------------------------- pieces


class ConvBNReLU(nn.Sequential):
    """Section 3.1: every convolution that is no classifier is followed by batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

    def norm_relu(self, y: Tensor) -> Tensor:
        return self[2](self[1](y))


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def enlarged_and_shifted(n: int, size: int, like: Tensor) -> Tensor:
    """(3, size, n): `resize` along one axis, from n cells to `size`, as a matrix, three times: moved by one cell, as it
    is, and moved by one the other way, zeros coming in at the border, as the taps of a 3x3 convolution see it."""
    precise = torch.promote_types(like.dtype, torch.float32)
    unit_vectors = torch.eye(n, dtype=precise, device=like.device)[None]
    matrix = F.interpolate(unit_vectors, size=size, mode="linear", align_corners=False)[0].T  # (size, n)
    return F.pad(matrix, (0, 0, 1, 1)).unfold(0, size, 1).transpose(1, 2).to(like.dtype)


def conv_of_enlarged(maps: list[Tensor], weights: list[Tensor], size: tuple[int, int]) -> Tensor:
    """The sum of `F.conv2d(resize(x, size), w, padding=1)` over the maps x and their weights w: the same up to
    rounding, for a quarter of the operations or less, and without the enlarged maps.

    Enlarging and convolution are both linear and act on different axes, so they may change places. A convolution is
    the sum over its taps (t, u) of w_tu @ (A_t x B_u^T), where A_t enlarges and shifts x along the height and B_u
    along the width, and that is the sum of A_t (w_tu @ x) B_u^T: 1x1 convolutions of the small map to nine times the
    channels, then two matrix products. The inner sum of the last one runs over the taps t and over all maps.
    """
    rows = torch.cat([a for x in maps for a in enlarged_and_shifted(x.shape[2], size[0], x)], dim=1)  # (H, 3 * all h)
    columns = [enlarged_and_shifted(x.shape[3], size[1], x).permute(1, 2, 0).flatten(1) for x in maps]  # (W, w * 3)
    pieces = []
    groups = zip(*(w.split(128) for w in weights))  # of output channels, so that what lies in between fits the cache
    for group in groups:
        wide = []
        for x, w, b in zip(maps, group, columns):
            (n, _, height, width), channels = x.shape, len(w)
            for t in range(3):
                taps = w[:, :, t].permute(2, 0, 1).reshape(3 * channels, -1, 1, 1)
                y = F.conv2d(x, taps).permute(0, 2, 3, 1)  # (n, h, w, 3 u * channels)
                y = b @ y.reshape(n * height, width * 3, channels)
                wide.append(y.view(n, height, size[1] * channels))
        piece = rows @ torch.cat(wide, dim=1)
        pieces.append(piece.view(len(piece), *size, -1).permute(0, 3, 1, 2))  # (n, channels, H, W)
    return torch.cat(pieces, dim=1)


def prroi_weights(bins: int, n: int, like: Tensor) -> Tensor:
    """Precise RoI pooling along one axis, over the whole of it, as a matrix (bins, n).

    n samples stand at 0..n-1, linear between them and falling to zero one beyond; bin b is the mean of that curve
    from b*n/bins to (b+1)*n/bins (Jiang et al., ECCV 2018). The curve reaches from 0 to n: half of the first sample's
    triangle is outside, and the weights of the last bin sum to less than one.
    """

    def area_left_of(t: Tensor) -> Tensor:  # under the triangle of height 1 on [-1, 1]
        t = t.clamp(-1, 1)
        return torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)

    edges = torch.arange(bins + 1, dtype=torch.float64, device="cpu") * n / bins
    area = area_left_of(edges[:, None] - torch.arange(n, dtype=torch.float64, device="cpu"))  # (bins + 1, n)
    return ((area[1:] - area[:-1]) * bins / n).to(like.dtype).to(like.device)


def prroi_pool(x: Tensor, bins: int) -> Tensor:
    """Precise RoI pooling of the whole map: (N, C, h, w) -> (N, C, bins, bins); two small matrix products."""
    rows, columns = (prroi_weights(bins, n, x) for n in x.shape[2:])
    return rows @ x @ columns.T


# ---------------------------------------------------------------- the network, from C5 upwards


class PPM(nn.Module):
    """Pyramid Pooling Module on C5 (PSPNet's, Zhao et al., CVPR 2017): C5 -> P5."""

    BINS = (1, 2, 3, 6)

    def __init__(self, in_channels: int, channels: int, pool: str):
        super().__init__()
        self.pool = prroi_pool if pool == "prroi" else F.adaptive_avg_pool2d
        self.branches = nn.ModuleList(ConvBNReLU(in_channels, channels, 1) for _ in self.BINS)
        self.last = ConvBNReLU(in_channels + len(self.BINS) * channels, channels)

    def forward(self, c5: Tensor) -> Tensor:
        # As released, the pooled maps are resized before batch norm, which then sees more than one value even of a
        # single image. There the 1x1 convolution comes after the resize, too; both are linear and may be exchanged,
        # and this way it is cheaper.
        pooled = [
            branch.norm_relu(resize(branch[0](self.pool(c5, bins)), c5.shape[2:]))
            for bins, branch in zip(self.BINS, self.branches)
        ]  # 4 x (N, channels, H/32, W/32)
        return self.last(torch.cat([c5, *pooled], dim=1))


class FPN(nn.Module):
    """Feature Pyramid Network's top-down path (Lin et al., CVPR 2017): C<finest>..C4 and P5 -> P<finest>..P5.

    The map that is handed down is the one before the 3x3 convolution. With `all_maps` false only the finest map is
    ever asked for, and only its 3x3 convolution is built.
    """

    def __init__(self, in_channels: list[int], channels: int, all_maps: bool):
        super().__init__()
        self.laterals = nn.ModuleList(ConvBNReLU(c, channels, 1) for c in in_channels)
        self.convs = nn.ModuleList(ConvBNReLU(channels, channels) for _ in range(len(in_channels) if all_maps else 1))

    def forward(self, stages: list[Tensor], p5: Tensor, only_finest: bool = False) -> list[Tensor]:
        """[P<finest>, .., P5], or [P<finest>] alone: nothing beside the path to it is computed."""
        f, maps = p5, [p5]
        for i in reversed(range(len(self.laterals))):
            lateral = self.laterals[i](stages[i])
            f = resize(f, lateral.shape[2:])
            f += lateral
            if i == 0 or not only_finest:
                maps.insert(0, self.convs[i](f))
        return maps[:1] if only_finest else maps


class Fusion(nn.Module):
    """P<finest>..P5, resized to the finest and concatenated, through one 3x3 convolution: the map of objects and parts.

    That is `self.conv(torch.cat([maps[0], *(resize(p, maps[0].shape[2:]) for p in maps[1:])], dim=1))`, two thirds of
    the whole network's operations; the coarser maps' share of it is computed before they are enlarged.
    """

    def __init__(self, maps: int, channels: int):
        super().__init__()
        self.conv = ConvBNReLU(maps * channels, channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        weights = self.conv[0].weight.split([p.shape[1] for p in maps], dim=1)
        fused = F.conv2d(maps[0], weights[0], padding=1)
        fused += conv_of_enlarged(maps[1:], weights[1:], maps[0].shape[2:])
        return self.conv.norm_relu(fused)


class Head(nn.Module):
    """A level's own convolutions and its classifier; `pool_first` averages over the map in between (scene)."""

    def __init__(self, in_channels: int, channels: int, classes: int, convs: int, pool_first: bool = False):
        super().__init__()
        widths = [in_channels] + [channels] * convs
        self.conv = nn.Sequential(*(ConvBNReLU(a, b) for a, b in zip(widths, widths[1:])))
        self.pool_first = pool_first
        self.classifier = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.classifier(x.mean(dim=(2, 3), keepdim=True) if self.pool_first else x)


class UPerNet(nn.Module):
    """The network of figure 4.

    classes: level -> number of classes, for any of scene, object, part, material, texture; for part a dict, object's
        class index -> number of its parts with the object's background (index 0 among them) counted.
    backbone: "resnet18", "resnet34", "resnet50", "resnet101" (resnet.py beside this file), or a module with
        `.channels`, the widths of the four maps C2..C5 that its forward returns.
    channels: width of all that follows the backbone.
    head_conv: a 3x3 convolution before each classifier, as in the paper; without it the network of most other code
        bases. The texture head keeps its own convolutions in any case.
    pool: the PPM's pooling, "prroi" as released or "adaptive" as in PSPNet.
    ppm, fpn, fusion: with output_stride the rows of the paper's table 2. `fpn` is the finest level built (2, 3 or 4; 0
        for none, then everything sits on P5); without `fusion` the object head sits on that level; without `ppm` P5 is
        C5 through a 1x1 lateral of its own.
    stem, output_stride: see `resnet.ResNet`; for a backbone given by name alone.

    Parameters are named `backbone.*`, `ppm.*`, `fpn.*`, `fusion.*`, `heads.<level>.*`. `part_slices[object index]` is
    the slice of that object's channels in the part logits. Raises ValueError for an argument that is not as above.
    """

    TEXTURE_CONVS = 4  # "several" in the paper; the released code has no texture head; the number is our choice

    def __init__(
        self,
        classes: dict,
        backbone: str | nn.Module = "resnet50",
        channels: int = 512,
        head_conv: bool = True,
        pool: str = "prroi",
        ppm: bool = True,
        fpn: int = 2,
        fusion: bool = True,
        stem: str = "7x7",
        output_stride: int = 32,
    ):
        super().__init__()
        if not classes or set(classes) - set(LEVELS):
            raise ValueError(f"classes {list(classes)}: give one or more of {', '.join(LEVELS)}")
        flat = [n for c in classes.values() for n in (c.values() if isinstance(c, dict) else [c])]
        if not isinstance(classes.get("part", {}), dict) or not all(
            isinstance(n, int) and n > 0 for n in [*flat, channels]
        ):
            raise ValueError(
                "classes: numbers above 0, for part a dict of them by the object's class index; channels likewise"
            )
        if pool not in ("prroi", "adaptive"):
            raise ValueError(f"pool {pool!r}: choose 'prroi' or 'adaptive'")
        if fpn not in (0, 2, 3, 4):
            raise ValueError(f"fpn {fpn!r}: choose 2, 3 or 4, or 0 for none")
        self.classes = {level: classes[level] for level in LEVELS if level in classes}
        self.fpn_level = fpn

        if isinstance(backbone, str):
            if not re.fullmatch(r"resnet\d+", backbone):
                raise ValueError(
                    f"backbone {backbone!r}: choose resnet18, resnet34, resnet50 or resnet101, or give a module"
                )
            from resnet import ResNet

            backbone = ResNet(int(backbone.removeprefix("resnet")), stem, output_stride)
        self.backbone = backbone
        self.stops_early = "last" in inspect.signature(backbone.forward).parameters  # ours does, at the stage asked for

        c2, *_, c5 = backbone.channels
        self.ppm = PPM(c5, channels, pool) if ppm else ConvBNReLU(c5, channels, 1)
        self.fpn = FPN(backbone.channels[fpn - 2 : 3], channels, all_maps=fusion) if fpn else None
        self.fusion = Fusion(6 - fpn, channels) if fpn and fusion else None
        self.heads = nn.ModuleDict()
        for level, n in self.classes.items():
            if level == "texture":
                self.heads[level] = Head(c2, channels, n, self.TEXTURE_CONVS)
            else:
                n = sum(n.values()) if level == "part" else n
                self.heads[level] = Head(channels, channels, n, int(head_conv), pool_first=level == "scene")

        self.part_slices, start = {}, 0
        for index, n in self.classes.get("part", {}).items():
            self.part_slices[index] = slice(start, start + n)
            start += n

        for module in (self.ppm, self.fpn, self.fusion, self.heads):  # as released; biases of classifiers as PyTorch's
            for m in module.modules() if module is not None else ():
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                elif isinstance(m, nn.BatchNorm2d):
                    nn.init.constant_(m.bias, 1e-4)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))
        self.to(memory_format=torch.channels_last)  # quicker on CPUs too: convolutions need not reorder their inputs

    def forward(self, images: Tensor, levels: list[str] | None = None) -> dict[str, Tensor]:
        """Logits of the asked levels (all by default), and only the work that they need.

        images: (N, 3, H, W), RGB in [0, 1], H and W at least 32 (64 in training mode with a single image).
        Returns a dict:
          scene         (N, classes)
          object        (N, classes, H/4, W/4)
          part          (N, sum of part counts, H/4, W/4); softmax within `part_slices[object]`
          material      (N, classes, H/4, W/4)
          texture       (N, classes), the mean over texture_map
          texture_map   (N, classes, H/4, W/4)
        Raises ValueError for a level that the network does not have.
        """
        levels = list(self.classes) if levels is None else levels
        if unknown := set(levels) - set(self.classes):
            raise ValueError(f"no head for {', '.join(sorted(unknown))}: this network has {', '.join(self.classes)}")
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        only_texture = set(levels) == {"texture"}
        stages = self.backbone(x, last=2) if only_texture and self.stops_early else self.backbone(x)  # C2..
        quarter = stages[0].shape[2:]
        logits = {}

        if "texture" in levels:  # section 3.1: trained apart, on C2, without a gradient into the backbone
            logits["texture_map"] = self.heads["texture"](stages[0].detach())
            logits["texture"] = logits["texture_map"].mean(dim=(2, 3))
        if only_texture:
            return logits

        p5 = self.ppm(stages[-1])
        if "scene" in levels:
            logits["scene"] = self.heads["scene"](p5).flatten(1)

        # Material sits on P2, object and part on the fused map. A network that stops before P2 has material where the
        # objects are; without fusion all three sit on the finest map.
        on_fused = {"object", "part"} if self.fpn_level == 2 else {"object", "part", "material"}
        needs_fused = self.fusion is not None and bool(on_fused & set(levels))
        if {"object", "part", "material"} & set(levels):
            pyramid = self.fpn(stages[self.fpn_level - 2 : 3], p5, only_finest=not needs_fused) if self.fpn else [p5]
            fused = self.fusion(pyramid) if needs_fused else pyramid[0]
            for level in ("object", "part", "material"):
                if level in levels:
                    y = self.heads[level](fused if level in on_fused else pyramid[0])
                    logits[level] = y if y.shape[2:] == quarter else resize(y, quarter)
        return logits


# ---------------------------------------------------------------- losses


def losses(logits: dict[str, Tensor], labels: dict[str, Tensor], part_slices: dict[int, slice]) -> dict[str, Tensor]:
    """The loss of every level in `logits`, before `LOSS_WEIGHTS`: float32 scalars, 0 for a level without a label here.

    labels, with UNLABELLED (-1) where there is none:
      scene, texture     (N,) class indices
      object, material   (N, H/4, W/4) class indices
      part               (N, H/4, W/4) index in the list of parts of the object at that pixel; 0, background, elsewhere
    A loss of 0 is still connected to the graph: the level's parameters get gradients of zero.
    """
    result = {}
    for level in ("scene", "object", "material"):
        if level in logits:
            result[level] = mean_cross_entropy(logits[level], labels[level])
    if "part" in logits:
        result["part"] = part_loss(logits["part"], labels["object"], labels["part"], part_slices)
    if "texture_map" in logits:  # predicted at every pixel, each with the image's label
        texture_map = logits["texture_map"]
        everywhere = labels["texture"][:, None, None].expand(-1, *texture_map.shape[2:])
        result["texture"] = mean_cross_entropy(texture_map, everywhere)
    return result


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, mean over what is labelled; 0 where nothing is."""
    total = F.cross_entropy(logits.float(), labels.long(), ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def part_loss(logits: Tensor, objects: Tensor, parts: Tensor, part_slices: dict[int, slice]) -> Tensor:
    """Cross entropy over the parts of each object, within that object's pixels, summed over the objects.

    An object counts in an image where at least one pixel of it has a part; there all its pixels count, those without
    a part as background. Per object the mean over its pixels in all such images of the batch (as released).
    """
    annotated = parts > 0
    total = logits.float().sum() * 0
    for index in sorted(part_slices.keys() & torch.unique(objects[annotated]).tolist()):
        inside = objects == index  # (N, H/4, W/4)
        valid = (inside & annotated).flatten(1).any(dim=1)  # (N,)
        labels = torch.where(inside & valid[:, None, None], parts.long(), UNLABELLED)
        total = total + mean_cross_entropy(logits[:, part_slices[index]], labels)
    return total


# ---------------------------------------------------------------- loading


def read_tensors(path: str, device: str = "cpu") -> dict:
    """What `torch.load` finds in a file of tensors and plain values; it runs no code. Raises ValueError, naming the
    file, for anything else."""
    if not os.path.isfile(path):
        raise ValueError(f"{path}: a folder, not a file" if os.path.isdir(path) else f"{path}: no such file")
    try:
        with warnings.catch_warnings():  # about what it may hold that we do not take
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location=device, weights_only=True)
    except Exception as e:  # damaged bytes can trip the reader anywhere
        raise ValueError(f"{path}: not a file of PyTorch weights, or a damaged one ({type(e).__name__})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no dictionary of weights")
    return content


def fill(net: nn.Module, state: dict, path: str, name_of=lambda key: key) -> None:
    """Loads `state` into `net` (which may be on the device "meta"). `name_of` turns a key of `net` into the file's.

    Raises ValueError for the first key that does not fit.
    """
    wanted = {name_of(key): (key, value) for key, value in net.state_dict().items()}
    for name in dict.fromkeys([*wanted, *state]):
        if name not in state:
            raise ValueError(f"{path}: {name} is missing")
        if name not in wanted:
            raise ValueError(f"{path}: {name} is not a part of this network")
        value, shape = state[name], tuple(wanted[name][1].shape)
        dense = isinstance(value, Tensor) and value.layout == torch.strided
        found = tuple(value.shape) if dense else type(value).__name__
        if found != shape:
            raise ValueError(f"{path}: {name} is {found}, not {shape}")
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} has values that are not finite")
    values = {key: state[name].to(value.dtype) for name, (key, value) in wanted.items()}
    net.load_state_dict(values, assign=next(net.parameters()).is_meta)


def load(path: str, device: str = "cpu") -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) from a checkpoint of train.py.

    The vocabulary maps each level to its class names; for part, object name -> part names, "background" first.
    Raises ValueError, with the file's name and what is wrong, for anything that is no such checkpoint.
    """
    return from_checkpoint(read_tensors(path, device), path, device)


def from_checkpoint(checkpoint: dict, path: str, device: str = "cpu") -> tuple[UPerNet, dict]:
    """`load`, from a checkpoint that has been read; `path` is for the messages."""
    if missing := [key for key in ("model", "network", "vocabulary") if not isinstance(checkpoint.get(key), dict)]:
        raise ValueError(f"{path}: not a checkpoint of train.py (no {', '.join(missing)} in it)")
    vocabulary = checkpoint["vocabulary"]
    try:
        with torch.device("meta"):  # no memory yet: the file may ask for any size
            net = UPerNet(**checkpoint["network"])
        counted = class_counts(vocabulary)
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, OverflowError) as e:
        raise ValueError(f"{path}: its network or vocabulary is not one of ours ({e})") from None
    lists = [names for level, names in vocabulary.items() if level != "part"] + [*vocabulary.get("part", {}).values()]
    if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
        raise ValueError(f"{path}: its vocabulary has names that are no text")
    if counted != net.classes:
        raise ValueError(f"{path}: the vocabulary does not have the network's numbers of classes")
    fill(net, checkpoint["model"], path)
    return net.to(device, memory_format=torch.channels_last).eval(), vocabulary


def class_counts(vocabulary: dict) -> dict:
    """The `classes` argument of the network that goes with a vocabulary."""
    counts = {level: len(vocabulary[level]) for level in LEVELS if level in vocabulary and level != "part"}
    if "part" in vocabulary:
        index = {name: i for i, name in enumerate(vocabulary["object"])}
        counts["part"] = {index[name]: len(parts) for name, parts in vocabulary["part"].items()}
    return {level: counts[level] for level in LEVELS if level in counts}


def released_name(key: str, paper: bool) -> str:
    """What the authors' decoder calls a parameter or buffer of ours; `paper`: their network of the paper, not the
    ADE20K one."""
    fusion, head = ("conv_fusion", r"\1_head.0") if paper else ("conv_last.0", None)
    for ours, theirs in (
        (r"ppm\.branches", "ppm_conv"),
        (r"ppm\.last", "ppm_last_conv"),
        (r"fpn\.laterals", "fpn_in"),
        (r"fpn\.convs\.(\d)", r"fpn_out.\1.0"),
        (r"fusion\.conv", fusion),
        (r"heads\.(\w+)\.conv\.0", head),
        (r"heads\.scene\.classifier", "scene_head.2"),  # their 1 is the pooling
        (r"heads\.(\w+)\.classifier", r"\1_head.1" if paper else "conv_last.1"),
    ):
        key, changed = re.subn(f"^{ours}", theirs or "", key)
        if changed:
            break
    return key


def load_release(encoder: str, decoder: str, labels: str) -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) of a network that the authors released, from its two .pth files.

    The network of the paper (unifiedparsing) with `labels` their folder `joint_dataset` of class tables: 336 objects
    and 26 materials with a background at index 0, 427 part channels, 365 scenes. Or their ADE20K network
    (semantic-segmentation-pytorch), 150 objects, with `labels` their `object150_info.csv`. ResNet-50 or 101.
    Their input (BGR in [0, 255] minus a mean, or ImageNet's normalisation) is folded in: call it as any other network.
    Raises ValueError with the file and the first key that does not fit.
    """
    body, top = read_tensors(encoder), read_tensors(decoder)
    for path, state, key in ((encoder, body, "conv1.weight"), (decoder, top, "ppm_last_conv.0.weight")):
        if not isinstance(state.get(key), Tensor) or state[key].ndim != 4:
            raise ValueError(f"{path}: {key} is missing; the encoder comes first, then the decoder")
    if not os.path.exists(labels):
        raise ValueError(f"{labels}: no such file or folder")
    paper = "conv_last.1.weight" not in top
    if paper != os.path.isdir(labels):
        needs = "the authors' folder joint_dataset" if paper else "the authors' file object150_info.csv"
        raise ValueError(f"{labels}: not the class tables of {decoder}, which needs {needs}")
    vocabulary = release_vocabulary(labels, paper)
    with torch.device("meta"):  # the weights come from the files
        net = UPerNet(
            class_counts(vocabulary),
            "resnet101" if "layer3.22.conv1.weight" in body else "resnet50",
            channels=len(top["ppm_last_conv.0.weight"]),
            head_conv=paper,
            pool="prroi" if paper else "adaptive",
            stem="deep",
        )
    # Their synchronised batch norm keeps sums of its own, which mean nothing in eval mode.
    body, top = (
        {
            k: v
            for k, v in state.items()
            if not str(k).endswith(("._tmp_running_mean", "._tmp_running_var", "._running_iter"))
        }
        for state in (body, top)
    )
    fill(net.backbone, body, encoder)
    fill(
        nn.ModuleDict({n: m for n, m in net.named_children() if n != "backbone"}),
        top,
        decoder,
        lambda k: released_name(k, paper),
    )
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    if paper:  # RGB in [0, 1] instead of BGR in [0, 255]: other constants, and the first filters' channels turned round
        mean, std = [value / 255 for value in (122.7717, 115.9465, 102.9801)], [1 / 255] * 3
        net.backbone.conv1.weight.data = net.backbone.conv1.weight.data.flip(1)
    net.mean, net.std = torch.tensor(mean).view(3, 1, 1), torch.tensor(std).view(3, 1, 1)
    return net.to(memory_format=torch.channels_last).eval(), vocabulary


def release_vocabulary(labels: str, paper: bool) -> dict:
    """Class names from the authors' tables: a folder of CSV files, or object150_info.csv."""

    def rows(path: str) -> list[dict]:
        try:
            with open(path, newline="", encoding="utf-8") as file:
                return list(csv.DictReader(file))
        except (OSError, UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f"{path}: cannot be read as a table of classes ({e})") from None

    try:
        if not paper:
            synonyms = [row["Name"].split(";") for row in rows(labels)]
            if len(synonyms) != 150:
                raise ValueError(f"{labels}: has {len(synonyms)} classes, not the 150 of their ADE20K network")
            first = [names[0] for names in synonyms]  # the whole entry where two classes share the first: 59 and 131
            return {"object": [n[0] if first.count(n[0]) == 1 else " ".join(n) for n in synonyms]}
        vocabulary = {
            level: [r["name"] for r in rows(os.path.join(labels, f"{level}.csv"))]
            for level in ("scene", "object", "material")
        }
        vocabulary["object"][0] = vocabulary["material"][0] = "background"
        vocabulary["part"] = {
            row["object_name"]: ["background", *row["part_names"].split(";")[1:]]
            for row in rows(os.path.join(labels, "object_part_hierarchy.csv"))
        }
        if unknown := vocabulary["part"].keys() - set(vocabulary["object"]):
            raise ValueError(f"{labels}: object_part_hierarchy.csv has '{min(unknown)}', which object.csv lacks")
        return vocabulary
    except KeyError as e:
        raise ValueError(f"{labels}: its table has no column {e}") from None
    except (AttributeError, IndexError):
        raise ValueError(f"{labels}: its tables of classes are cut short") from None


# ---------------------------------------------------------------- speed


def seconds(run, device: str, rounds: int = 5) -> float:
    """Median time of a call, after one to warm up."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[rounds // 2]


def peak_flops(device: str, dtype: torch.dtype) -> float:
    """Operations a second that this machine really does: of a large matrix product or a 3x3 convolution, the faster."""
    a = torch.rand(4096, 2048, device=device, dtype=dtype)
    image, weight = torch.rand(1, 512, 64, 64, device=device, dtype=dtype), torch.rand(512, 512, 3, 3).to(a)
    with torch.inference_mode():
        product = 2 * 4096 * 4096 * 2048 / seconds(lambda: a @ a.T, device)
        convolution = 2 * 512 * 512 * 9 * 64 * 64 / seconds(lambda: F.conv2d(image, weight, padding=1), device)
    return max(product, convolution)


def peak_memory(run, device: str) -> float | None:
    """GiB at the most while `run` runs: of the GPU's tensors, or of the process (on Linux; None elsewhere)."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak starts anew
        run()
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) / 2**20
    except OSError:
        return None


def main(argv: list[str] | None = None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description="Parameters, operations, speed and memory of the network, here.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="side of the image for inference (512)")
    side = "side of the two images of a training step (256)"
    parser.add_argument("--train-size", type=int, default=256, metavar="N", help=side)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = parser.parse_args(argv)
    if min(args.size, args.train_size) < 32:
        parser.error("--size and --train-size: at least 32 pixels")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"150 objects, 512 channels, {where}: one {args.size}x{args.size} image; a step on two of {args.train_size}")
    print(f"{'':32s}{'inference':^39s}{'training':^39s}")
    columns = f"{'GMAC':>8s} {'ms':>7s} {'images/s':>8s} {'GiB':>6s} {'peak':>5s}  "
    print(f"{'backbone':11s}{'numbers':9s}{'M param.':>8s}    {columns}{columns}")
    for dtype in (torch.float32, torch.bfloat16) if device == "cuda" else (torch.float32,):
        peak = peak_flops(device, dtype)
        for backbone in ("resnet18", "resnet50", "resnet101"):
            net = UPerNet({"object": 150}, backbone).to(device)
            half = dtype == torch.bfloat16
            autocast = torch.autocast(device, torch.bfloat16, enabled=half)
            image, pair = (torch.rand(n, 3, s, s, device=device) for n, s in ((1, args.size), (2, args.train_size)))

            def infer(model: nn.Module) -> None:
                with torch.inference_mode(), autocast:
                    model(image)

            def step(model: nn.Module) -> None:
                model.zero_grad(set_to_none=True)
                with autocast:
                    logits = model(pair)["object"]
                mean_cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long)).backward()

            parameters = sum(p.numel() for p in net.parameters()) / 1e6
            line = f"{backbone:11s}{'bf16' if half else 'fp32':9s}{parameters:8.1f}    "
            for run, images in ((infer, 1), (step, 2)):
                net.train(run is step)
                with FlopCounterMode(display=False) as counter:
                    run(net)
                model = torch.compile(net) if args.compile else net
                operations, taken = counter.get_total_flops(), seconds(lambda: run(model), device)
                memory = peak_memory(lambda: run(model), device)
                shown = "     -" if memory is None else f"{memory:6.2f}"
                share = operations / taken / peak
                line += f"{operations / 2e9:8.1f} {1000 * taken:7.1f} {images / taken:8.2f} {shown} {share:5.0%}  "
            print(line, flush=True)
    print(
        "peak: share of the operations a second of a large matrix product or a 3x3 convolution here, the faster of them"
    )


if __name__ == "__main__":
    main()
