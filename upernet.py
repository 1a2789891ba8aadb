"""UPerNet: one network for scene, objects, parts, materials and textures (section 3 of the paper).

    from upernet import UPerNet, load, parse
    classes = {"scene": 365, "object": 335, "part": {11: 4, 20: 7}, "material": 25, "texture": 47}
    net = UPerNet(classes)
    net(images)["object"]                      # images (N, 3, H, W) -> logits (N, 335, H/4, W/4)
    net(images, levels=["scene", "material"])  # computes what these two need and no more

    net, vocabulary = load("ckpt.pt")          # or load_release(..), load_mmseg(..)
    parse(net, PIL.Image.open("a.jpg"))["object"]  # class indices at the photo's own size

The modules stand in the order of figure 4, from C5 upwards; then the losses, the way from a photo
to classes, and the files of weights. This file and resnet.py work on their own, copied anywhere,
with PyTorch (and Pillow for photos); with `backbone=` a module, this file alone. In comments,
"released" is what the authors' code does, and "ours" a choice of ours, where the paper is silent or
does otherwise.
"""

import collections
import contextlib
import csv
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = ("scene", "object", "part", "material", "texture")
TAGS = ("scene", "texture")  # label whole images, the others pixels
# As released, but for texture, which the released code lacks (ours).
LOSS_WEIGHTS = {"scene": 0.25, "object": 1.0, "part": 0.5, "material": 1.0, "texture": 1.0}
UNLABELLED = -1  # in every label map and list of labels
# Ours; the released network has constants of its own, see `load_release`.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of RGB in [0, 1]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
MEAN_COLOUR = (124, 116, 104)  # of padding: IMAGENET_MEAN, about zero after normalisation


# ---------------------------------------------------------------- pieces
class ConvBNReLU(nn.Sequential):
    """Section 3.1: every convolution except the classifiers is followed by batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        super().__init__(
            nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(inplace=True),
        )


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


# ---------------------------------------------------------------- PPM: C5 -> P5
def prroi_weights(bins: int, n: int, device: torch.device) -> Tensor:
    """Precise RoI pooling (Jiang et al., ECCV 2018) of n samples along an axis: a matrix (bins, n).

    Bin b is the mean, from b*n/bins to (b+1)*n/bins, of the curve that is linear between the
    samples at 0..n-1 and falls to zero one beyond them: a sum of triangles, of height 1 on [-1, 1]
    around each sample. So the weights of the last bin sum to less than one.
    """
    edges = torch.arange(bins + 1, device=device) * n / bins
    t = (edges[:, None] - torch.arange(n, device=device)).clamp(-1, 1)  # (bins + 1, n)
    area = torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)  # of each triangle, left of t
    return (area[1:] - area[:-1]) * bins / n


def average_weights(bins: int, n: int, device: torch.device) -> Tensor:
    """Adaptive average pooling along one axis, as PyTorch defines it: a matrix (bins, n)."""
    b = torch.arange(bins, device=device)[:, None]
    sample = torch.arange(n, device=device)
    first = b * n // bins
    end = ((b + 1) * n + bins - 1) // bins
    inside = (first <= sample) & (sample < end)
    return inside / inside.sum(dim=1, keepdim=True)


class PoolingBranch(ConvBNReLU):
    """A branch of the PPM: pooled to bins x bins, 1x1 convolution, resized to C5's size, BN, ReLU:
    (N, in_channels, h, w) -> (N, channels, h, w).

    With `pool="pspnet"` the resize comes last.
    """

    def __init__(self, in_channels: int, channels: int, bins: int, pool: str):
        super().__init__(in_channels, channels, kernel=1)
        self.bins = bins
        self.pool = pool

    def forward(self, c5: Tensor) -> Tensor:
        height, width = c5.shape[2:]
        weights = prroi_weights if self.pool == "prroi" else average_weights
        rows = weights(self.bins, height, c5.device).to(c5.dtype)
        columns = weights(self.bins, width, c5.device).to(c5.dtype)
        pooled = rows @ c5 @ columns.T  # (N, C, bins, bins)
        conv, norm, relu = self
        if self.pool == "pspnet":
            return resize(relu(norm(conv(pooled))), (height, width))
        # As released, BN after the resize. Their 1x1 convolution comes after it, too: the two
        # commute, so ours comes first, on the small map.
        return relu(norm(resize(conv(pooled), (height, width))))


class PPM(nn.Module):
    """Pyramid Pooling Module, C5 -> P5, after PSPNet's (Zhao et al., CVPR 2017). pool: see
    `UPerNet`; "prroi" is as released."""

    BINS = (1, 2, 3, 6)

    def __init__(self, in_channels: int, channels: int, pool: str):
        super().__init__()
        self.branches = nn.ModuleList(
            PoolingBranch(in_channels, channels, bins, pool) for bins in self.BINS
        )
        self.last = ConvBNReLU(in_channels + len(self.BINS) * channels, channels)

    def forward(self, c5: Tensor) -> Tensor:
        pooled = [branch(c5) for branch in self.branches]
        return self.last(torch.cat([c5, *pooled], dim=1))


# ---------------------------------------------------------------- FPN: C2..C4 and P5 -> P2..P5
class FPN(nn.Module):
    """Feature Pyramid Network's top-down path (Lin et al., CVPR 2017).

    in_channels: of the stages that get a lateral, finest first. only_finest: only the finest of the
        resulting maps has a 3x3 convolution; `forward` then has to be called with it too.
    """

    def __init__(self, in_channels: list[int], channels: int, only_finest: bool = False):
        super().__init__()
        convs = 1 if only_finest else len(in_channels)
        self.laterals = nn.ModuleList(ConvBNReLU(c, channels, kernel=1) for c in in_channels)
        self.convs = nn.ModuleList(ConvBNReLU(channels, channels) for _ in range(convs))

    def forward(self, stages: list[Tensor], p5: Tensor, only_finest: bool = False) -> list[Tensor]:
        """[C2, C3, C4], P5 -> [P2, P3, P4, P5], or just [P2]; from C3 or C4 likewise."""
        top_down = p5
        maps = []
        for lateral, stage in zip(reversed(self.laterals), reversed(stages)):
            x = lateral(stage)
            top_down = resize(top_down, x.shape[2:])
            top_down += x
            maps.append(top_down)  # handed down before its 3x3 convolution
        maps.reverse()
        if only_finest:
            return [self.convs[0](maps[0])]
        return [conv(x) for conv, x in zip(self.convs, maps)] + [p5]


# ---------------------------------------------------------------- fusion: P2..P5 -> the fused map
class Fusion(nn.Module):
    """P2..P5 fused into one map of P2's size, for objects and parts.

    `plain` is the definition; only the tests call it, which hold the two equal. `forward` gives
    the same, up to rounding, with fewer operations: see `ConvOfMaps` at the end of this file.
    """

    def __init__(self, maps: int, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            ConvOfMaps(maps * channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def plain(self, maps: list[Tensor]) -> Tensor:
        """Section 3.1: resized to P2's size, concatenated, one 3x3 convolution, BN, ReLU."""
        conv, norm, relu = self.conv
        resized = [resize(x, maps[0].shape[2:]) for x in maps]
        fused = F.conv2d(torch.cat(resized, dim=1), conv.weight, conv.bias, padding=1)
        return relu(norm(fused))

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv(maps)


# ---------------------------------------------------------------- heads and the network
class Head(nn.Module):
    """A level's own `convs` 3x3 convolutions (BN, ReLU) and its 1x1 classifier:
    (N, in_channels, h, w) -> (N, classes, h, w).

    With `average`, the classifier sees the mean over the map: (N, classes, 1, 1).
    """

    def __init__(
        self, in_channels: int, channels: int, classes: int, convs: int, average: bool = False
    ):
        super().__init__()
        self.conv = nn.Sequential()
        for _ in range(convs):
            self.conv.append(ConvBNReLU(in_channels, channels))
            in_channels = channels
        self.average = average
        self.classifier = nn.Conv2d(in_channels, classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.average:
            x = x.mean(dim=(2, 3), keepdim=True)
        return self.classifier(x)


class UPerNet(nn.Module):
    """The network of figure 4.

    classes: level -> number of classes, for any of scene, object, part, material, texture; for part
        a dict, object's class index -> number of its parts, the object's background (index 0)
        counted.
    backbone: "resnet18", "resnet34", "resnet50" or "resnet101" (resnet.py beside this file), or a
        module with `.channels` that returns four maps C2..C5 of these widths, C2 at stride 4.
    channels: the width of everything after the backbone.
    head_conv: a 3x3 convolution before each classifier, as in the paper; other code bases have
        none. The texture's always has four.
    pool: the PPM's pooling. "prroi": the authors' Precise RoI pooling; "adaptive": average pooling
        in its place, as in their ADE20K network; "pspnet": average pooling, and BN and ReLU before
        the resize, as in mmsegmentation.
    ppm, fpn, fusion, output_stride: the rows of the paper's table 2. `fpn` is the finest level
        built (2, 3 or 4; 0 for none, with all heads on P5). Without `fusion` the object head sits
        on that level; without `ppm` P5 is a 1x1 lateral of C5 (ours).
    stem, output_stride: as in `resnet.ResNet`, for a backbone given by name (ours: "7x7").
    test_size: for evaluation: the short side, the longest side, and the multiple to which images
        are stretched: the authors' 8 or 32, mmsegmentation's 1, each rounded as in their code.
        None: they are padded to a multiple of 32.

    Parameters are named `backbone.*`, `ppm.*`, `fpn.*`, `fusion.*`, `heads.<level>.*`; those of a
    backbone given by name and of all after it are in channels_last, which is faster.
    `part_slices[object index]` are that object's channels in the part logits. Raises ValueError for
    other arguments.
    """

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
        test_size: tuple = (450, 1200, None),  # section 3.1; train.py's: `test_and_largest_size`
    ):
        super().__init__()
        check_arguments(classes, pool, fpn)
        self.arguments = {
            "classes": classes,
            "backbone": backbone,
            "channels": channels,
            "head_conv": head_conv,
            "pool": pool,
            "ppm": ppm,
            "fpn": fpn,
            "fusion": fusion,
            "stem": stem,
            "output_stride": output_stride,
        }
        self.test_size = tuple(test_size)
        self.classes = {level: classes[level] for level in LEVELS if level in classes}
        if isinstance(backbone, str):
            backbone = named_backbone(backbone, stem, output_stride)
        self.backbone = backbone
        c2_width, c3_width, c4_width, c5_width = backbone.channels

        self.ppm = PPM(c5_width, channels, pool) if ppm else ConvBNReLU(c5_width, channels, 1)
        self.fpn_level = fpn
        self.fpn = None
        self.fusion = None
        if fpn:
            laterals = [c2_width, c3_width, c4_width][fpn - 2 :]
            self.fpn = FPN(laterals, channels, only_finest=not fusion)
            if fusion:
                self.fusion = Fusion(len(laterals) + 1, channels)

        # Figure 4: object and part on the fused map, material on P2. Ours, for the rows of table 2
        # without P2: material where object is.
        self.on_fused = {"object", "part"} if fpn == 2 else {"object", "part", "material"}
        self.heads = make_heads(self.classes, c2_width, channels, convs=1 if head_conv else 0)
        self.part_slices = part_slices(classes.get("part", {}))
        self.register_buffer("mean", IMAGENET_MEAN.clone())
        self.register_buffer("std", IMAGENET_STD.clone())
        for module in (self.ppm, self.fpn, self.fusion, self.heads):
            if module is not None:
                module.apply(initialise)
                module.to(memory_format=torch.channels_last)

    @property
    def network(self) -> dict:
        """The arguments: `UPerNet(**net.network)` with the state dict is the same network. A
        backbone that was given as a module is shared by the two."""
        return {**self.arguments, "test_size": self.test_size}

    def forward(self, images: Tensor, levels: list[str] | None = None) -> dict[str, Tensor]:
        """Logits of the levels that are asked for (default: all), computing only what they need.

        images: (N, 3, H, W), RGB in [0, 1], H and W at least 32. In training mode batch norm needs
            more than one value a channel: a single image must have a side above 32, and
            `pool="pspnet"` needs two images.
        Returns a dict:
          scene              (N, classes)
          object, material   (N, classes, H/4, W/4), rounded up by our backbone
          part               (N, sum of part counts, H/4, W/4), an object's at `part_slices[object]`
          texture            (N, classes), the mean over the map
          texture_map        (N, classes, H/4, W/4)
        Raises ValueError for a level that the network does not have, for images that are not as
        above (values are looked at on the CPU alone), and for a backbone that does not return four
        maps, the first at stride 4.
        """
        if levels is None:
            levels = list(self.classes)
        check_images(images, levels, self.classes)
        stages = self.backbone((images - self.mean) / self.std)
        check_stages(stages, self.backbone.channels, images)
        c2, c3, c4, c5 = stages
        quarter = c2.shape[2:]  # (H/4, W/4)
        logits = {}

        if "texture" in levels:  # section 3: on C2, and no gradient into the backbone
            logits["texture_map"] = self.heads["texture"](c2.detach())
            logits["texture"] = logits["texture_map"].mean(dim=(2, 3))  # of the image (ours)
        if set(levels) == {"texture"}:
            return logits

        p5 = self.ppm(c5)
        if "scene" in levels:
            logits["scene"] = self.heads["scene"](p5).flatten(1)  # this head averages over P5
        if set(levels) <= {"scene", "texture"}:
            return logits

        # Without a level on the fused map, P3 and P4 need no 3x3 convolution.
        fuse = self.fusion is not None and not self.on_fused.isdisjoint(levels)
        pyramid = [p5]
        if self.fpn is not None:
            pyramid = self.fpn([c2, c3, c4][self.fpn_level - 2 :], p5, only_finest=not fuse)
        finest = pyramid[0]  # P2, but in other rows of table 2
        fused = self.fusion(pyramid) if fuse else finest
        for level in ("object", "part", "material"):
            if level in levels:
                y = self.heads[level](fused if level in self.on_fused else finest)
                logits[level] = y if y.shape[2:] == quarter else resize(y, quarter)
        return logits


def make_heads(classes, c2, channels, convs):
    """A head for each level, on maps of `channels`; the texture's on C2."""
    heads = nn.ModuleDict()
    for level, count in classes.items():
        if level == "scene":
            heads[level] = Head(channels, channels, count, convs, average=True)
        elif level == "texture":  # "several" convolutions in the paper; four are our choice
            heads[level] = Head(c2, channels, count, convs=4)
        elif level == "part":
            heads[level] = Head(channels, channels, sum(count.values()), convs)
        else:
            heads[level] = Head(channels, channels, count, convs)
    return heads


def initialise(module):
    """Kaiming normal, biases of norms 1e-4: as released, outside of the backbone."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.bias, 1e-4)


def named_backbone(name, stem, output_stride):
    try:
        from .resnet import ResNet  # the two files copied into a package
    except ImportError:
        from resnet import ResNet

    depths = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
    if name not in depths:
        raise ValueError(f"backbone {name!r} is not one of {', '.join(depths)}, or a module")
    return ResNet(depths[name], stem, output_stride).to(memory_format=torch.channels_last)


def part_slices(parts: dict[int, int]) -> dict[int, slice]:
    """Object's index -> its channels in the part logits, which hold one object after another."""
    slices = {}
    first = 0
    for index, count in parts.items():
        slices[index] = slice(first, first + count)
        first += count
    return slices


# ---------------------------------------------------------------- losses (section 3.1)
def losses(
    logits: dict[str, Tensor], labels: dict[str, Tensor], part_slices: dict[int, slice]
) -> dict[str, Tensor]:
    """The loss of each level in `logits`, before LOSS_WEIGHTS: float32 scalars, 0 without a label.

    labels, with UNLABELLED (-1) where there is none:
      scene, texture     (N,) class indices
      object, material   (N, H/4, W/4) class indices
      part               (N, H/4, W/4) index in the list of parts of the object at that pixel; 0,
                         background, elsewhere
    A loss of 0 stays connected to the graph: the level's parameters get gradients of zero. Every
    level in `logits` needs its entry in `labels`, parts that of object too.
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
    """Cross entropy, the mean over what is labelled; 0 where nothing is."""
    labels = labels.long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def part_loss(
    logits: Tensor, objects: Tensor, parts: Tensor, part_slices: dict[int, slice]
) -> Tensor:
    """Cross entropy over the parts of each object, within its pixels, summed over the objects.

    An object is valid in an image where one of its pixels has a part of its list; there all pixels
    of it count, those without such a part as background. Per object the mean over its
    pixels in all such images of the batch (as released).
    """
    annotated = parts > 0
    present = set(torch.unique(objects[annotated]).tolist())
    total = 0 * logits[0, 0, 0, 0].float()  # connected to the graph, also without a valid object
    for index, channels in part_slices.items():
        if index in present:
            inside = objects == index  # (N, H/4, W/4)
            valid = (inside & annotated).flatten(1).any(dim=1)  # (N,)
            labels = torch.where(inside & valid[:, None, None], parts.long(), UNLABELLED)
            total = total + mean_cross_entropy(logits[:, channels], labels)
    return total


# ---------------------------------------------------------------- from a photo to scores
class View(NamedTuple):
    """A photo as the network sees it, at one size, perhaps mirrored."""

    pixels: "np.ndarray"  # (1, 3, H, W) uint8, RGB, padded
    filled: tuple[int, int]  # (height, width) of it that the photo takes, see `network_input`
    mirrored: bool = False


def rgb_photo(picture: "PIL.Image.Image") -> "PIL.Image.Image":
    """A picture of any mode in RGB, turned as its EXIF data say; of more bands, such as
    transparency, the first three. Raises ValueError for more than 8 bits a channel, whose range
    only its owner knows."""
    from PIL import ImageOps

    deep = re.search(r"(RGBX?A?|LA);16", str(getattr(picture, "tile", "")))
    if deep or picture.mode[0] in "IF":
        raise ValueError("more than 8 bits a channel; save it with 8 bits, in a range you choose")
    try:
        picture = ImageOps.exif_transpose(picture)
    except Exception:  # whatever damaged EXIF data make of the reader
        picture = picture.copy()
    picture.info.pop("transparency", None)  # of which Pillow would warn
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def resized(
    size: tuple[int, int], short: float, longest: float, rounding: Callable = round
) -> tuple[int, int]:
    """(height, width) with the short side at `short`, or less to keep the long one to `longest`.

    rounding: makes whole pixels of a side's length.
    """
    scale = min(short / min(size), longest / max(size))
    return max(1, rounding(size[0] * scale)), max(1, rounding(size[1] * scale))


def half_up(x):
    """Rounded, halves up."""
    return math.floor(x + 0.5)


def input_size(full: tuple[int, int], test_size: tuple) -> tuple[int, int]:
    """The (height, width) at which a network sees a photo of (height, width) `full`.

    test_size: as in `UPerNet`.
    """
    short, longest, multiple = test_size
    if multiple is None:
        return resized(full, short, longest)
    rounding = half_up if multiple == 1 else math.floor  # mmsegmentation's, the authors'
    height, width = resized(full, short, longest, rounding)
    return math.ceil(height / multiple) * multiple, math.ceil(width / multiple) * multiple


def pad_to_32(n):
    """Up to a multiple of the network's coarsest stride."""
    return math.ceil(n / 32) * 32


def network_input(photo: "PIL.Image.Image", test_size: tuple) -> View:
    """A photo in RGB, resized and padded as `test_size` says, see `UPerNet`."""
    size = input_size((photo.height, photo.width), test_size)
    if test_size[2] is None:  # ours: padded, as training does
        height = pad_to_32(size[0])
        width = pad_to_32(size[1])
        filled = size
    else:  # as released: the maps cover the photo, also where 4 does not divide it
        height = max(32, size[0])
        width = max(32, size[1])
        filled = (4 * math.ceil(size[0] / 4), 4 * math.ceil(size[1] / 4))
    return View(padded_image(photo, size, height, width)[None], filled)


def padded_image(photo, size, height, width, top=0, left=0):
    """A window of (height, width) at (top, left) of the photo resized to `size`, padded right and
    below with the mean colour: (3, height, width) uint8.
    """
    import numpy as np
    from PIL import Image

    h = min(size[0] - top, height)
    w = min(size[1] - left, width)
    across = photo.width / size[1]  # the photo's own pixels for one of the resized photo
    down = photo.height / size[0]
    box = (left * across, top * down, (left + w) * across, (top + h) * down)
    canvas = Image.new("RGB", (width, height), MEAN_COLOUR)
    canvas.paste(photo.resize((w, h), Image.Resampling.BILINEAR, box=box))
    return np.ascontiguousarray(np.asarray(canvas).transpose(2, 0, 1))


def views_of(
    photo: "PIL.Image.Image", test_size: tuple, sizes: list[int] | None = None, flip: bool = False
) -> list[View]:
    """The photo at `test_size`, or at each of the short sides `sizes`; `flip`: mirrored too."""
    from PIL import ImageOps

    views = []
    for size in view_sizes(test_size, sizes):
        views.append(network_input(photo, size))
        if flip:
            view = network_input(ImageOps.mirror(photo), size)
            views.append(view._replace(mirrored=True))
    return views


def view_sizes(test_size, sizes):
    """`UPerNet.test_size` for each short side in `sizes`, by default its own. A size that is asked
    for has no cap on the long side, but for released networks, which keep theirs."""
    _, longest, multiple = test_size
    if not sizes:
        return [test_size]
    if multiple is None:
        longest = math.inf
    return [(short, longest, multiple) for short in sizes]


def autocast(device, amp):
    """The context in which a network runs in mixed precision, if any."""
    return torch.autocast(device.type, amp) if amp else contextlib.nullcontext()


def predict(
    net: UPerNet, views: list[View], levels: list[str], amp: torch.dtype | None = None
) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """(level -> scores of one image, `filled` of the maps among them for `class_map`).

    Scene, texture: probabilities (K,), the mean over the views. Maps (K, h, w): of one view the
    network's logits, float32; of several the mean of their probabilities, each one's softmax
    resized to a quarter of the largest view.
    """
    if len(views) == 1:
        scores = logits_of(net, views[0], levels, amp)
        for level in TAGS:
            if level in scores:
                scores[level] = scores[level].softmax(dim=0)
        return scores, views[0].filled
    height = max(math.ceil(view.filled[0] / 4) for view in views)
    width = max(math.ceil(view.filled[1] / 4) for view in views)
    total = collections.defaultdict(float)
    for view in views:
        for level, logits in logits_of(net, view, levels, amp).items():
            value = probabilities(logits, level, net.part_slices) / len(views)
            if level not in TAGS:
                value = upsample(value, view.filled, (height, width))
                if view.mirrored:
                    value = value.flip(2)
            total[level] = total[level] + value
    return dict(total), (4 * height, 4 * width)


def logits_of(net, view, levels, amp):
    """The network's answer to one view, without the batch's axis, in float32. Raises
    FloatingPointError if it is not finite."""
    device = net.mean.device
    with torch.inference_mode(), autocast(device, amp):
        logits = net(torch.from_numpy(view.pixels).to(device) / 255, levels)
    for level, value in logits.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"{level}: the network's answer is not finite")
    return {level: value[0].float() for level, value in logits.items()}


def probabilities(logits, level, part_slices):
    """The softmax of logits (K, ..) over the classes; of parts over those of each object."""
    if level != "part":
        return logits.softmax(dim=0)
    return torch.cat([logits[channels].softmax(dim=0) for channels in part_slices.values()])


# ---------------------------------------------------------------- from scores to classes
def upsample(maps: Tensor, filled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Maps (K, h, w), a cell for 4x4 pixels of the input -> (K, *size), unpadded, in float32 or
    more, without gradients.

    filled: the (height, width) of the input that the picture takes; `size`: the one asked for.
    Where the maps cover just that, `F.interpolate(maps[None], size, mode="bilinear")[0]`; else a
    cell takes 4 * size / filled pixels, and the cells beyond the picture are cut off.
    """
    maps = maps.detach().to(torch.promote_types(maps.dtype, torch.float32))
    sizes = []
    scales = []
    for cells, pixels, wanted in zip(maps.shape[1:], filled, size):
        scale = None  # the maps cover just the picture: PyTorch's own scale
        if 4 * cells != pixels:
            scale = 4 * wanted / pixels
            if wanted == cells:  # such an axis PyTorch would copy, whatever the scale
                wanted += 1  # cut off below
        sizes.append(wanted)
        scales.append(scale)
    # F.interpolate takes either a size or scales, this both.
    upsampled = torch.ops.aten.upsample_bilinear2d(maps[None], sizes, False, *scales)[0]
    return upsampled[:, : size[0], : size[1]]


def class_map(scores: Tensor, filled: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """The best class of every pixel, (height, width) int64; ties go to the lowest index.

    `upsample(scores, filled, size).argmax(dim=0)` of finite scores, but for ties within rounding, a
    class at a time: it takes a few maps of the photo's size, and a few times the memory of the
    scores.
    """
    scores = scores.detach().to(torch.promote_types(scores.dtype, torch.float32)).contiguous()
    best = torch.zeros(size, dtype=torch.int64, device=scores.device)
    top = torch.full(size, -torch.inf, dtype=scores.dtype, device=scores.device)
    for k in possible_winners(scores):
        value = upsample(scores[k : k + 1], filled, size)[0]
        best.masked_fill_(value > top, k)
        torch.maximum(top, value, out=top)
    return best


def possible_winners(scores: Tensor) -> list[int]:
    """Of the classes of maps (K, h, w) those that may be the best somewhere, once upsampled.

    A pixel's value lies between those of the four cells around it. So a class whose highest of the
    four is everywhere below another's lowest is nowhere the best.
    """
    padded = F.pad(scores[None], (0, 1, 0, 1), mode="replicate")[0]
    lowest = torch.minimum(padded[:, 1:], padded[:, :-1])
    lowest = torch.minimum(lowest[:, :, 1:], lowest[:, :, :-1])  # (K, h, w), of four cells
    highest = torch.maximum(padded[:, 1:], padded[:, :-1])
    highest = torch.maximum(highest[:, :, 1:], highest[:, :, :-1])
    beaten = (highest < lowest.amax(dim=0)).flatten(1).all(dim=1)
    return (~beaten).nonzero().flatten().tolist()


def part_map(scores: Tensor, objects: Tensor, part_slices: dict, filled: tuple) -> Tensor:
    """The best part of every pixel among those of the object that `objects` (H, W) has there, as
    `part_channels`."""
    parts = torch.zeros_like(objects)
    present = torch.unique(objects).tolist()
    for index, channels in part_slices.items():
        if index in present:
            best = class_map(scores[channels], filled, tuple(objects.shape))
            parts = torch.where(objects == index, best, parts)
    return part_channels(objects, parts, part_slices)


def part_channels(objects: Tensor, parts: Tensor, part_slices: dict[int, slice]) -> Tensor:
    """(object, index in its list of parts) of every pixel -> channel of the part logits, -1 for
    background: (H, W)."""
    channels = torch.full_like(objects, -1)
    for index in torch.unique(objects[parts > 0]).tolist():
        here = (objects == index) & (parts > 0)
        channels[here] = part_slices[index].start + parts[here]
    return channels


def parse(
    net: UPerNet,
    photo: "PIL.Image.Image | np.ndarray",
    levels: list[str] | None = None,
    amp: torch.dtype | None = None,
    sizes: list[int] | None = None,
    flip: bool = False,
) -> "dict[str, np.ndarray]":
    """All that the network sees in a photo, at the photo's size. Sets eval mode.

    photo: a PIL image, which is turned as its EXIF data say, or a uint8 array (H, W, 3), RGB.
    amp: torch.bfloat16 or float16 for mixed precision.
    sizes, flip: short sides and mirror images to average over, by default `net.test_size` alone.
    Returns a dict: object, material, texture_map: (H, W) class indices; part: (H, W) channels of
    the part logits within the predicted object, -1 for none; scene, texture: (K,) probabilities.
    Raises ValueError for another array and for photos of more than 8 bits a channel,
    FloatingPointError if the network's answer is not finite.
    """
    from PIL import Image

    if not isinstance(photo, Image.Image):
        if str(photo.dtype) != "uint8" or photo.shape[2:] != (3,):
            raise ValueError(f"a photo of shape {photo.shape}, {photo.dtype}: not (H, W, 3) uint8")
        photo = Image.fromarray(photo)
    photo = rgb_photo(photo)
    net.eval()
    if levels is None:
        levels = list(net.classes)
    needed = list(dict.fromkeys(["object", *levels])) if "part" in levels else levels
    full = (photo.height, photo.width)
    scores, filled = predict(net, views_of(photo, net.test_size, sizes, flip), needed, amp)
    parsed = {}
    for level, value in scores.items():
        if level in TAGS:
            parsed[level] = value
        elif level != "part":
            parsed[level] = class_map(value, filled, full)
    if "part" in levels:
        parsed["part"] = part_map(scores["part"], parsed["object"], net.part_slices, filled)
    if "object" not in levels:
        parsed.pop("object", None)
    return {level: value.cpu().numpy() for level, value in parsed.items()}


# ---------------------------------------------------------------- loading: our checkpoints
def read_file(path: str) -> dict:
    """The dictionary in a file of tensors and plain values; no code in it is run.

    Raises ValueError, with the file's name, for a file that is missing, damaged or holds other
    objects.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from None
    except Exception as e:  # damaged bytes can trip the reader anywhere
        reason = f"no PyTorch weights, or damaged ({type(e).__name__})"
        name = re.search(r"GLOBAL ([\w.]+)", str(e))
        if name:
            reason = (
                f"holds a {name[1]}, which is no tensor and could run code; if you trust the file "
                "save its weights alone (mmsegmentation's tools/misc/publish_model.py does)"
            )
        raise ValueError(f"{path}: {reason}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no dictionary of weights")
    return content


def build(network: dict, state: dict, path: str) -> UPerNet:
    """UPerNet(**network) in eval mode with the tensors of `state`. Raises ValueError with the
    file's name if they do not fit."""
    try:
        with torch.device("meta"):  # takes no memory before the file is known to fit
            net = UPerNet(**network)
        net.load_state_dict({"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **state}, assign=True)
    except (AttributeError, RuntimeError, TypeError, ValueError) as e:
        reason = " ".join(str(e).split())[:400]
        raise ValueError(f"{path}: no network of ours ({reason})") from None
    return net.float().to(memory_format=torch.channels_last).eval()


def load(path: str, device: str = "cpu") -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) from a checkpoint of train.py.

    The vocabulary maps each level to its class names; for part, object name -> part names,
    "background" first. Raises ValueError, with the file's name and what is wrong, for anything
    else.
    """
    net, checkpoint = read_checkpoint(path)
    return net.to(device), checkpoint["vocabulary"]


def read_checkpoint(path: str) -> tuple[UPerNet, dict]:
    """(network in eval mode, the whole content of the file); see `load`."""
    checkpoint = {"arguments": {}, "split": {}, "trained": {}, **read_file(path)}
    for key in ("model", "network", "vocabulary"):
        if key not in checkpoint:
            raise ValueError(
                f"{path}: not a checkpoint of train.py, without {key}; load_mmseg reads theirs"
            )
    net = build(checkpoint["network"], checkpoint["model"], path)
    try:
        counts = class_counts(checkpoint["vocabulary"])
    except (AttributeError, KeyError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: no vocabulary of ours ({e}), see `load`") from None
    if counts != net.classes:
        raise ValueError(f"{path}: names of {counts} classes, a network of {net.classes}")
    return net, checkpoint


def class_counts(vocabulary: dict) -> dict:
    """The `classes` argument of the network for a vocabulary."""
    counts = {}
    for level in LEVELS:
        if level == "part" and "part" in vocabulary:
            objects = vocabulary["object"]
            counts["part"] = {objects.index(name): len(p) for name, p in vocabulary["part"].items()}
        elif level in vocabulary:
            counts[level] = len(vocabulary[level])
    return counts


def channel_names(vocabulary: dict) -> dict[str, list[str]]:
    """Level -> class names; for part a name for every channel of the part logits, "car: wheel"."""
    names = dict(vocabulary)
    if "part" in vocabulary:
        names["part"] = []
        for name, parts in vocabulary["part"].items():
            names["part"] += [f"{name}: {part}" for part in parts]
    return names


# ---------------------------------------------------------------- loading: released weights
# Rewriting of others' keys as ours, rule by rule; a key that ends empty is left out.
AUTHORS = [
    (r"^ppm_conv\.", "ppm.branches."),
    (r"^ppm_last_conv\.", "ppm.last."),
    (r"^fpn_in\.", "fpn.laterals."),
    (r"^fpn_out\.(\d)\.0\.", r"fpn.convs.\1."),
    (r"^conv_fusion\.", "fusion.conv."),
    (r"^conv_last\.0\.", "fusion.conv."),  # conv_last is in their ADE20K network,
    (r"^conv_last\.1\.", "heads.object.classifier."),
    (r"^(\w+)_head\.0\.", r"heads.\1.conv.0."),  # the heads in the paper's
    (r"^(\w+)_head\.[12]\.", r"heads.\1.classifier."),  # the scene's is 2, after the mean
    # Their synchronised batch norm's own sums.
    (r".*\.(_tmp_running_mean|_tmp_running_var|_running_iter)$", ""),
]
MMSEG = [
    (r"^backbone\.stem\.0\.", "backbone.conv1."),
    (r"^backbone\.stem\.1\.", "backbone.bn1."),
    (r"^backbone\.stem\.3\.", "backbone.conv2."),
    (r"^backbone\.stem\.4\.", "backbone.bn2."),
    (r"^backbone\.stem\.6\.", "backbone.conv3."),
    (r"^backbone\.stem\.7\.", "backbone.bn3."),
    (r"^decode_head\.psp_modules\.(\d)\.1\.", r"ppm.branches.\1."),
    (r"^decode_head\.bottleneck\.", "ppm.last."),
    (r"^decode_head\.lateral_convs\.", "fpn.laterals."),
    (r"^decode_head\.fpn_convs\.", "fpn.convs."),
    (r"^decode_head\.fpn_bottleneck\.", "fusion.conv."),
    (r"^decode_head\.conv_seg\.", "heads.object.classifier."),
    (r"\.conv\.weight$", ".0.weight"),
    (r"\.bn\.(\w+)$", r".1.\1"),
    (r"^auxiliary_head\..*", ""),  # for training only
]


def renamed(state, rules):
    """The state dict under the keys that the rules make of its own."""
    result = {}
    for key, value in state.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        if key:
            result[key] = value
    return result


def load_release(encoder: str, decoder: str, labels: str) -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) of a network of the authors', from its two .pth files.

    The network of the paper (unifiedparsing), with `labels` their folder `joint_dataset` of class
    tables: 336 objects and 26 materials with a background at index 0, 427 part channels, 365
    scenes. Or their ADE20K network (semantic-segmentation-pytorch), 150 objects, with `labels`
    their `object150_info.csv`. Raises ValueError with the name of the file that is wrong.
    """
    body = read_file(encoder)
    top = read_file(decoder)
    if "conv1.weight" not in body or "ppm_last_conv.0.weight" not in top:
        raise ValueError(f"{encoder}, {decoder}: not the authors' encoder and decoder, in order")
    state = {f"backbone.{key}": value for key, value in body.items()}
    state.update(top)
    if "conv_last.1.weight" in top:
        names = [first_synonym(row["Name"]) for row in read_table(labels, "Name")]
        vocabulary = {"object": distinct(names)}
        options = {"head_conv": False, "pool": "adaptive", "test_size": (450, 1000, 32)}
    else:
        vocabulary = joint_vocabulary(labels)
        options = {"head_conv": True, "pool": "prroi", "test_size": (450, 1000, 8)}
        # Its input is BGR in [0, 255] minus a mean: as constants of RGB in [0, 1], and conv1 with
        # its input channels in reverse.
        state["mean"] = torch.tensor([122.7717, 115.9465, 102.9801]).view(3, 1, 1) / 255
        state["std"] = torch.full((3, 1, 1), 1 / 255)
        state["backbone.conv1.weight"] = body["conv1.weight"].flip(1)
    network = {
        "classes": class_counts(vocabulary),
        "backbone": f"resnet{depth_of(body)}",
        "channels": len(top["ppm_last_conv.0.weight"]),
        "stem": "deep",
        **options,
    }
    net = build(network, renamed(state, AUTHORS), f"{encoder}, {decoder}, {labels}")
    return net, vocabulary


def joint_vocabulary(folder):
    """The vocabulary of the authors' folder `joint_dataset`."""
    vocabulary = {}
    for level in ("scene", "object", "material"):
        rows = read_table(Path(folder, f"{level}.csv"), "name")
        vocabulary[level] = [row["name"] for row in rows]
    vocabulary["object"][0] = "background"
    vocabulary["material"][0] = "background"
    vocabulary["part"] = {}
    for row in read_table(Path(folder, "object_part_hierarchy.csv"), "object_name", "part_names"):
        parts = row["part_names"].split(";")
        if row["object_name"] not in vocabulary["object"]:
            raise ValueError(f"{folder}: has parts of {row['object_name']}, which is no object")
        vocabulary["part"][row["object_name"]] = ["background", *parts[1:]]
    return vocabulary


def read_table(path, *columns):
    """The rows of a CSV file. Raises ValueError, with its name, if it cannot be read or lacks a
    column."""
    try:
        rows = list(csv.DictReader(Path(path).read_text("utf-8").splitlines(), restval=""))
    except (OSError, UnicodeDecodeError) as e:
        raise ValueError(f"{path}: {e}") from None
    if not rows or not set(columns) <= set(rows[0]):
        raise ValueError(f"{path}: not a table with the columns {', '.join(columns)}")
    return rows


def load_mmseg(path: str, names: list[str] | None = None) -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) from one of mmsegmentation's UPerNet checkpoints, with
    ResNet-18, 50 or 101.

    names: the classes; by default the file's, else "class 1", .. Raises ValueError for other files,
    and for those that were trained with aligned corners.
    """
    content = read_file(path)
    state = content.get("state_dict", content)
    for key in ("decode_head.conv_seg.weight", "decode_head.fpn_bottleneck.conv.weight"):
        if key not in state:
            raise ValueError(
                f"{path}: not mmsegmentation's UPerNet, without {key}; load reads ours"
            )
    classes = len(state["decode_head.conv_seg.weight"])
    meta = content.get("meta", {})
    if names is None:
        names = meta.get("CLASSES") or meta.get("dataset_meta", {}).get("classes")
    if names is None:
        names = [f"class {k}" for k in range(1, classes + 1)]
    if re.search(r"align_corners\s*=\s*True", f"{meta.get('config')} {meta.get('cfg')}"):
        raise ValueError(
            f"{path}: trained with align_corners=True, which is not supported; take one of 512x512"
        )
    if len(names) != classes:
        raise ValueError(f"{path}: has {classes} classes, not {len(names)}")
    network = {
        "classes": {"object": classes},
        "backbone": f"resnet{depth_of(state)}",
        "channels": len(state["decode_head.fpn_bottleneck.conv.weight"]),
        "head_conv": False,
        "pool": "pspnet",
        "stem": "v1c",
        "test_size": (512, 2048, 1),  # as they evaluate: the aspect kept, no padding
    }
    net = build(network, renamed(state, MMSEG), path)
    return net, {"object": distinct(names)}


def depth_of(state):
    """The depth of the ResNet in a state dict of others: 18, 50 or 101."""
    if any("layer3.22.conv1." in key for key in state):
        return 101
    if any("layer1.0.conv3." in key for key in state):
        return 50
    return 18


def first_synonym(name):
    """ "car" of "car;auto" or "car, auto"."""
    return re.split("[,;]", name)[0].strip()


def distinct(names):
    """The names, with their number, from 1, behind those that occur more than once."""
    names = list(names)
    result = []
    for number, name in enumerate(names, start=1):
        if names.count(name) > 1:
            name = f"{name} ({number})"
        result.append(name)
    return result


# ---------------------------------------------------------------- the fast way for the fusion
class ConvOfMaps(nn.Conv2d):
    """A 3x3 convolution of the concatenation of several maps, each (N, C, h, w), resized to the
    first one's size: (N, out_channels, H, W)."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        finest, *coarser = maps
        weights = self.weight.split([x.shape[1] for x in maps], dim=1)
        y = F.conv2d(finest, weights[0], self.bias, padding=1)
        return y + conv_of_upsampled(coarser, weights[1:], finest.shape[2:])


def conv_of_upsampled(maps: list[Tensor], weights: list[Tensor], size: tuple[int, int]) -> Tensor:
    """`sum(F.conv2d(resize(x, size), w, padding=1) for x, w in zip(maps, weights))`, up to
    rounding, for a quarter of the operations or less and without the upsampled maps.

    A 3x3 convolution is the sum over its taps (t, u) of the 1x1 convolution weight[t, u] of the map
    shifted by (t, u). 1x1 convolutions commute with shifting and upsampling, which are a matrix
    rows[t] along the height times a matrix columns[u] along the width. So, for each map,

        y = torch.einsum("octu,nchw->ntuohw", weight, x)  # nine 1x1 convolutions of the small map
        y = torch.einsum("uWw,ntuohw->ntohW", columns, y)
        y = torch.einsum("tHh,ntohW->noHW", rows, y)

    These lines do just that, with the channels last and the sums over maps and taps t in one
    product.
    """
    height, width = size
    n = maps[0].shape[0]
    channels = weights[0].shape[0]
    all_rows = []
    stretched = []
    for x, weight in zip(maps, weights):
        h, w = x.shape[2:]
        rows = shifted_upsampling(h, height, x)  # (3, H, h)
        columns = shifted_upsampling(w, width, x)  # (3, W, w)
        columns = columns.permute(1, 2, 0).flatten(1)  # (W, w u)
        for t in range(3):
            taps = weight[:, :, t].permute(2, 0, 1).flatten(0, 1)  # (u o, c)
            y = F.conv2d(x, taps[:, :, None, None])  # (n, u o, h, w)
            y = y.permute(0, 2, 3, 1).reshape(n * h, -1, channels)  # (n h, w u, o)
            y = columns @ y  # (n h, W, o)
            stretched.append(y.view(n, h, width * channels))
            all_rows.append(rows[t])
    y = torch.cat(all_rows, dim=1) @ torch.cat(stretched, dim=1)  # (n, H, W o)
    return y.view(n, height, width, channels).permute(0, 3, 1, 2)  # (n, o, H, W)


def shifted_upsampling(n, size, like):
    """`resize` along one axis, from n to `size`, as a matrix, shifted by -1, 0 and 1 with zeros at
    the border, as the three taps of a padded convolution see it: (3, size, n), typed as `like`.
    """
    # Computed in float32 at least, and rounded once.
    one_hot = torch.eye(n, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    matrix = F.interpolate(one_hot[None], size=size, mode="linear", align_corners=False)[0].T
    padded = F.pad(matrix, (0, 0, 1, 1)).to(like.dtype)  # (size + 2, n)
    return torch.stack([padded[0:size], padded[1 : size + 1], padded[2 : size + 2]])


# ---------------------------------------------------------------- checks
def check_arguments(classes, pool, fpn):
    if not classes or not set(classes) <= set(LEVELS):
        raise ValueError(f"classes {classes}: its keys are not some of {', '.join(LEVELS)}")
    if pool not in ("prroi", "adaptive", "pspnet"):
        raise ValueError(f"pool {pool!r} is not prroi, adaptive or pspnet")
    if fpn not in (0, 2, 3, 4):
        raise ValueError(f"fpn {fpn!r} is not 0, 2, 3 or 4")


def check_images(images, levels, known):
    unknown = sorted(set(levels) - set(known))
    if unknown:
        raise ValueError(f"no head for {', '.join(unknown)}: this network has {', '.join(known)}")
    if torch.compiler.is_compiling():
        return
    fits = images.ndim == 4 and images.shape[1] == 3 and min(images.shape[2:]) >= 32
    fits = fits and images.is_floating_point()
    if fits and images.device.type == "cpu":  # elsewhere looking at values waits for the GPU
        low, high = images.detach().aminmax()
        fits = low >= -0.01 and high <= 1.01
    if not fits:
        raise ValueError(
            f"images {tuple(images.shape)} of {images.dtype}: not (N, 3, H, W), RGB floats in "
            "[0, 1], H and W at least 32"
        )


def check_stages(stages, channels, images):
    if torch.compiler.is_compiling():
        return
    shapes = [tuple(getattr(stage, "shape", ())) for stage in stages]
    fits = [shape[1:2] for shape in shapes] == [(width,) for width in channels]
    if not fits or abs(4 * shapes[0][3] - images.shape[3]) > 3:  # rounded up or down
        raise ValueError(
            f"the backbone returned maps of {shapes} for images of {tuple(images.shape)}: needed "
            f"are four, C2..C5 of widths {channels}, the first at stride 4"
        )
