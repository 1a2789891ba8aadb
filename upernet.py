"""UPerNet: one network for scene, objects, parts, materials and textures (section 3 of the paper).

    from upernet import UPerNet, load
    classes = {"scene": 365, "object": 335, "part": {11: 4, 20: 7}, "material": 25, "texture": 47}
    net = UPerNet(classes)
    net(images)["object"]                      # images (N, 3, H, W) -> logits (N, 335, H/4, W/4)
    net(images, levels=["scene", "material"])  # computes what these two need and no more
    net, vocabulary = load("ckpt.pt")          # or load_release(..), load_mmseg(..)

    python upernet.py                          # parameters, multiply-adds, milliseconds

The modules stand in the order of figure 4, from C5 upwards. This file and resnet.py work on their
own, copied anywhere; with `backbone=` a module, this file alone. In comments, "released" is what
the authors' code does, and "ours" what neither the paper nor that code says.
"""

import argparse
import csv
import re
import statistics
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = ("scene", "object", "part", "material", "texture")
TAGS = ("scene", "texture")  # label whole images, the others pixels
# As released, but for texture, which the released code lacks.
LOSS_WEIGHTS = {"scene": 0.25, "object": 1.0, "part": 0.5, "material": 1.0, "texture": 1.0}
UNLABELLED = -1  # in every label map and list of labels
# Ours; the released network has constants of its own, see `load_release`.
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of RGB in [0, 1]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


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
    """A branch of the PPM: pooled to bins x bins, resized to C5's size, 1x1 convolution, BN, ReLU:
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
        rows = weights(self.bins, height, c5.device)
        columns = weights(self.bins, width, c5.device)
        # torch.einsum("bh,nchw,dw->ncbd", rows, c5, columns), as a single product
        both = torch.einsum("bh,dw->bdhw", rows, columns).flatten(2).flatten(0, 1)
        pooled = both.to(c5.dtype) @ c5.flatten(2).mT  # (bins * bins, h w) @ (N, h w, C)
        pooled = pooled.mT.unflatten(2, (self.bins, self.bins))  # (N, C, bins, bins)
        conv, norm, relu = self
        if self.pool == "pspnet":
            return resize(relu(norm(conv(pooled))), (height, width))
        # As released, BN after the resize; the convolution commutes with it and is cheaper before.
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
def shifted_upsampling(n: int, size: int, like: Tensor) -> Tensor:
    """`resize` along one axis, from n to `size`, as a matrix, shifted by -1, 0 and 1 with zeros at
    the border, as the three taps of a padded convolution see it: (3, size, n), typed as `like`.
    """
    # Computed in float32 at least, and rounded once.
    one_hot = torch.eye(n, dtype=torch.promote_types(like.dtype, torch.float32), device=like.device)
    matrix = F.interpolate(one_hot[None], size=size, mode="linear", align_corners=False)[0].T
    padded = F.pad(matrix, (0, 0, 1, 1)).to(like.dtype)  # (size + 2, n)
    return torch.stack([padded[0:size], padded[1 : size + 1], padded[2 : size + 2]])


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


class ConvOfMaps(nn.Conv2d):
    """A 3x3 convolution of the concatenation of several maps, each (N, C, h, w), resized to the
    first one's size: (N, out_channels, H, W)."""

    def forward(self, maps: list[Tensor]) -> Tensor:
        finest, *coarser = maps
        weights = self.weight.split([x.shape[1] for x in maps], dim=1)
        y = F.conv2d(finest, weights[0], self.bias, padding=1)
        # On a CPU 256 output channels at a time, whose intermediate maps fit into the cache.
        at_once = 256 if y.device.type == "cpu" else self.out_channels
        coarse = []
        for k in range(0, self.out_channels, at_once):
            some = [weight[k : k + at_once] for weight in weights[1:]]
            coarse.append(conv_of_upsampled(coarser, some, finest.shape[2:]))
        y += torch.cat(coarse, dim=1)
        return y


class Fusion(nn.Module):
    """P2..P5 fused into one map of P2's size, for objects and parts.

    `plain` is the paper's line. It takes over half of the operations of a network for objects, so
    `forward` computes the same with fewer.
    """

    def __init__(self, maps: int, channels: int):
        super().__init__()
        self.conv = nn.Sequential(
            ConvOfMaps(maps * channels, channels, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        return self.conv(maps)

    def plain(self, maps: list[Tensor]) -> Tensor:
        """Section 3.1: resized to P2's size, concatenated, one 3x3 convolution, BN, ReLU."""
        conv, norm, relu = self.conv
        resized = [resize(x, maps[0].shape[2:]) for x in maps]
        fused = F.conv2d(torch.cat(resized, dim=1), conv.weight, conv.bias, padding=1)
        return relu(norm(fused))


# ---------------------------------------------------------------- heads and the network
class Head(nn.Module):
    """A level's own convolutions and its classifier: (N, in_channels, h, w) -> (N, classes, h, w).

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
    head_conv: a 3x3 convolution before each classifier but the texture's, which has four, as in the
        paper; other code bases have none.
    pool: the PPM's pooling. "prroi": the authors' Precise RoI pooling; "adaptive": average pooling
        in its place, as in their ADE20K network; "pspnet": average pooling, and BN and ReLU before
        the resize, as in mmsegmentation.
    ppm, fpn, fusion, output_stride: the rows of the paper's table 2. `fpn` is the finest level
        built (2, 3 or 4; 0 for none, with all heads on P5). Without `fusion` the object head sits
        on that level; without `ppm` P5 is a 1x1 lateral of C5.
    stem, output_stride: as in `resnet.ResNet`, for a backbone given by name.
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
        test_size: tuple = (450, 1200, None),  # section 3.1
    ):
        super().__init__()
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
        check_arguments(classes, channels, pool, fpn, test_size)
        self.classes = {level: classes[level] for level in LEVELS if level in classes}
        if isinstance(backbone, str):
            backbone = named_backbone(backbone, stem, output_stride)
        self.backbone = backbone
        widths = getattr(backbone, "channels", None)
        if widths is None or len(widths) != 4:
            raise ValueError(f"backbone.channels {widths}: not the widths of C2..C5")
        c2_width, c3_width, c4_width, c5_width = widths

        self.ppm = PPM(c5_width, channels, pool) if ppm else ConvBNReLU(c5_width, channels, 1)
        self.fpn_level = fpn
        self.fpn = None
        self.fusion = None
        if fpn:
            laterals = [c2_width, c3_width, c4_width][fpn - 2 :]
            self.fpn = FPN(laterals, channels, only_finest=not fusion)
            if fusion:
                self.fusion = Fusion(len(laterals) + 1, channels)

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
          part               (N, sum of part counts, H/4, W/4); softmax within `part_slices[object]`
          texture            (N, classes), the mean over texture_map (N, classes, H/4, W/4)
        Raises ValueError for a level that the network does not have, for images that are not as
        above, and for a backbone that does not return four maps, the first at stride 4.
        """
        if levels is None:
            levels = list(self.classes)
        self.check_images(images, levels)
        stages = self.backbone((images - self.mean) / self.std)
        self.check_stages(stages, images)
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
            logits["scene"] = self.heads["scene"](p5).flatten(1)
        if set(levels) <= {"scene", "texture"}:
            return logits

        # Figure 4: object and part on the fused map, material on P2. Ours, for the rows of table 2
        # without P2: material where object is.
        on_fused = {"object", "part"}
        if self.fpn_level != 2:
            on_fused.add("material")
        fuse = self.fusion is not None and not on_fused.isdisjoint(levels)
        pyramid = [p5]
        if self.fpn is not None:
            pyramid = self.fpn([c2, c3, c4][self.fpn_level - 2 :], p5, only_finest=not fuse)
        finest = pyramid[0]  # P2, but in other rows of table 2
        fused = self.fusion(pyramid) if fuse else finest
        for level in ("object", "part", "material"):
            if level in levels:
                y = self.heads[level](fused if level in on_fused else finest)
                logits[level] = y if y.shape[2:] == quarter else resize(y, quarter)
        return logits

    def check_images(self, images: Tensor, levels: list[str]) -> None:
        unknown = sorted(set(levels) - set(self.classes))
        if unknown:
            known = ", ".join(self.classes)
            raise ValueError(f"no head for {', '.join(unknown)}: this network has {known}")
        described = f"images {tuple(images.shape)} of {images.dtype}"
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"{described}: not (N, 3, H, W)")
        if not images.is_floating_point():
            raise ValueError(f"{described}: not floats, RGB in [0, 1]")
        if images.shape[2] < 32 or images.shape[3] < 32:
            raise ValueError(f"{described}: height and width must be at least 32")
        # Values are looked at where that does not wait for a GPU.
        if images.device.type == "cpu" and not torch.compiler.is_compiling():
            low, high = images.detach().aminmax()
            if low < -0.01 or high > 1.01:
                raise ValueError(
                    f"{described}: values in [{low:.3g}, {high:.3g}], not RGB in [0, 1]"
                )

    def check_stages(self, stages: list[Tensor], images: Tensor) -> None:
        if torch.compiler.is_compiling():
            return
        if isinstance(stages, dict):
            raise ValueError("the backbone returned a dict: needed is a list of four maps, C2..C5")
        shapes = [tuple(stage.shape) for stage in stages]
        fits = [shape[1] for shape in shapes] == list(self.backbone.channels)
        if fits:
            off = [
                abs(4 * cells - pixels) for cells, pixels in zip(shapes[0][2:], images.shape[2:])
            ]
            fits = max(off) < 4  # rounded up or down
        if not fits:
            raise ValueError(
                f"the backbone returned maps of {shapes} for images of {tuple(images.shape)}: "
                f"needed are four, C2..C5 of widths {self.backbone.channels}, the first at stride 4"
            )


def make_heads(classes: dict, c2: int, channels: int, convs: int) -> nn.ModuleDict:
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


def initialise(module: nn.Module) -> None:
    """Kaiming normal, biases of norms 1e-4: as released, outside of the backbone."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.constant_(module.bias, 1e-4)


def named_backbone(name: str, stem: str, output_stride: int) -> nn.Module:
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


def check_arguments(classes: dict, channels: int, pool: str, fpn: int, test_size: tuple) -> None:
    """Raises ValueError unless they are as UPerNet takes them."""
    if not classes or not set(classes) <= set(LEVELS):
        raise ValueError(f"classes {classes}: its keys are not some of {', '.join(LEVELS)}")
    parts = classes.get("part", {})
    if "part" in classes and (not isinstance(parts, dict) or not parts):
        raise ValueError(f"classes: part {parts!r}, not a dict, object's index -> number of parts")
    counts = [count for level, count in classes.items() if level != "part"]
    for count in [channels, *counts, *parts.values()]:
        if not isinstance(count, int) or count < 1:
            raise ValueError(f"classes {classes}, channels {channels!r}: not numbers above 0")
    if not set(parts) <= set(range(classes.get("object", 0))):
        raise ValueError(f"classes: part {parts} has an index that no object has")
    if pool not in ("prroi", "adaptive", "pspnet"):
        raise ValueError(f"pool {pool!r} is not prroi, adaptive or pspnet")
    if fpn not in (0, 2, 3, 4):
        raise ValueError(f"fpn {fpn!r} is not 0, 2, 3 or 4")
    short, longest, multiple = test_size
    if not 0 < short <= longest or (multiple is not None and multiple < 1):
        raise ValueError(
            f"test_size {test_size} is not (short side, longest side, multiple or None)"
        )


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
    A loss of 0 stays connected to the graph: the level's parameters get gradients of zero. Raises
    ValueError for a level without labels, and for maps of another size.
    """
    needed = {level.removesuffix("_map") for level in logits}
    if "part" in needed:
        needed.add("object")
    missing = needed - set(labels)
    if missing:
        raise ValueError(
            f"no labels of {', '.join(sorted(missing))} (parts need those of object): ask the "
            "network for levels=.. alone"
        )
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
    if labels.shape != logits[:, 0].shape:
        raise ValueError(
            f"labels of shape {tuple(labels.shape)} for logits of {tuple(logits.shape)}: label "
            "maps are at a quarter of the images' size"
        )
    labels = labels.long()
    total = F.cross_entropy(logits.float(), labels, ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def part_loss(
    logits: Tensor, objects: Tensor, parts: Tensor, part_slices: dict[int, slice]
) -> Tensor:
    """Cross entropy over the parts of each object, within its pixels, summed over the objects.

    An object is valid in an image where at least one of its pixels has a part; there all its pixels
    count, those without a part as background. Per object the mean over its pixels in all such
    images of the batch (as released).
    """
    if parts.shape != objects.shape:
        raise ValueError(f"parts of shape {tuple(parts.shape)}, objects of {tuple(objects.shape)}")
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


# ---------------------------------------------------------------- loading: our checkpoints
def read_file(path: str) -> dict:
    """The dictionary in a file of tensors and plain values; no code in it is run.

    Raises ValueError, with the file's name, for a file that is missing, damaged or holds other
    objects.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as e:
        raise ValueError(f"{path}: {e.strerror or e}") from None
    except Exception as e:  # damaged bytes can trip the reader anywhere
        refused = re.search(r"GLOBAL ([\w.]+)|[Uu]nsupported (?:global|class) ([\w.]+)", str(e))
        if refused is None:
            raise ValueError(
                f"{path}: no PyTorch weights, or damaged ({type(e).__name__})"
            ) from None
        name = refused[1] or refused[2]
        raise ValueError(
            f"{path}: holds a {name}, which is no tensor and could run code; if you trust the file "
            "save its weights alone (mmsegmentation's tools/misc/publish_model.py does): "
            "torch.save(torch.load(FILE, weights_only=False)['state_dict'], NEW)"
        ) from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not a dictionary of weights")
    return content


def check_state_dict(state: dict, path: str) -> None:
    """Raises ValueError, with the file's name, unless it maps names to plain, dense tensors."""
    if not isinstance(state, dict):
        raise ValueError(f"{path}: holds no dictionary of weights")
    for key, value in state.items():
        is_dense = isinstance(value, Tensor) and value.layout == torch.strided
        if not isinstance(key, str) or not is_dense or value.is_meta or value.is_quantized:
            raise ValueError(f"{path}: {key} is not a plain tensor")


def build(network: dict, state: dict, path: str) -> UPerNet:
    """UPerNet(**network) in eval mode with the tensors of `state`.

    Raises ValueError with the file's name and the first key that does not fit.
    """
    check_state_dict(state, path)
    try:
        with torch.device("meta"):  # takes no memory before the file is known to fit
            net = UPerNet(**network)
    except Exception as e:  # a damaged or hostile file may ask for anything
        raise ValueError(f"{path}: no network of ours ({type(e).__name__}: {e})") from None
    state = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD, **state}
    wanted = net.state_dict()
    for key in state:
        if key not in wanted:
            raise ValueError(f"{path}: {key} is not in this network")
    for key, value in wanted.items():
        if key not in state:
            raise ValueError(f"{path}: {key} is missing")
        tensor = state[key]
        if tensor.shape != value.shape:
            raise ValueError(f"{path}: {key} is not a tensor of shape {tuple(value.shape)}")
        if not tensor.isfinite().all():
            raise ValueError(f"{path}: {key} holds values that are not finite")
        state[key] = tensor.to(value.dtype)
    net.load_state_dict(state, assign=True)
    return net.to(memory_format=torch.channels_last).eval()


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
    try:
        network = dict(checkpoint["network"])
        if "test_size" not in network:  # a checkpoint of an earlier edition
            arguments = checkpoint["arguments"]
            middle = statistics.median_high(arguments["sizes"])
            network["test_size"] = (middle, arguments["max_size"], None)
        check_content(checkpoint, network["classes"])
    except Exception as e:  # a damaged or hostile file may hold anything
        reason = f"{type(e).__name__}: {e}"
        raise ValueError(
            f"{path}: not a checkpoint of train.py ({reason}); load_mmseg reads theirs"
        ) from None
    return build(network, checkpoint["model"], path), checkpoint


def check_content(checkpoint: dict, classes: dict) -> None:
    """Raises ValueError for names, images or class numbers that do not fit; a wrong type somewhere
    raises what it does.

    classes: of the network.
    """
    vocabulary = checkpoint["vocabulary"]
    counts = class_counts(vocabulary)
    if counts != classes:
        raise ValueError(f"names of {counts} classes, a network of {classes}")
    lists = [*vocabulary.values(), *checkpoint["split"].values(), *checkpoint["trained"].values()]
    for names in lists:
        for name in names:
            if not isinstance(name, str):
                raise ValueError(f"{name} is no name")
    for level, numbers in checkpoint["arguments"].get("numbers", {}).items():
        if len(numbers) != len(vocabulary.get(level, numbers)):
            raise ValueError(f"{len(numbers)} numbers of {level} classes")
        if not all(number in range(2**16) for number in numbers):
            raise ValueError(f"{level} numbers of {numbers}")


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


def renamed(state: dict, rules: list[tuple[str, str]]) -> dict:
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
    for path, state, key in (
        (encoder, body, "conv1.weight"),
        (decoder, top, "ppm_last_conv.0.weight"),
    ):
        if key not in state:
            raise ValueError(
                f"{path}: {key} is missing; of the authors' two files the encoder comes first"
            )
        check_state_dict(state, path)
        if state[key].ndim != 4:
            raise ValueError(f"{path}: {key} is no convolution")
    state = {f"backbone.{key}": value for key, value in body.items()}
    state.update(top)
    if "conv_last.1.weight" in top:
        names = [first_synonym(row["Name"]) for row in read_table(labels, "Name")]
        vocabulary = {"object": distinct(names)}
        options = {"head_conv": False, "pool": "adaptive", "test_size": (450, 1000, 32)}
    else:
        vocabulary = joint_vocabulary(labels)
        options = {"head_conv": True, "pool": "prroi", "test_size": (450, 1000, 8)}
        # Its input is BGR in [0, 255] minus a mean: as constants of RGB in [0, 1], and a turned
        # conv1.
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


def joint_vocabulary(folder: str) -> dict:
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


def read_table(path: str | Path, *columns: str) -> list[dict[str, str]]:
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
    try:
        classes = len(state["decode_head.conv_seg.weight"])
        channels = len(state["decode_head.fpn_bottleneck.conv.weight"])
        meta = dict(content.get("meta", {}))
        dataset_meta = dict(meta.get("dataset_meta", {}))
        if names is None:
            names = meta.get("CLASSES") or dataset_meta.get("classes")
        if names is None:
            names = [f"class {k}" for k in range(1, classes + 1)]
        names = [str(name) for name in names]
    except (KeyError, IndexError, TypeError, ValueError) as e:
        raise ValueError(f"{path}: not mmsegmentation's UPerNet ({e}); load reads ours") from None
    check_state_dict(state, path)
    if re.search(r"align_corners\s*=\s*True", f"{meta.get('config')} {meta.get('cfg')}"):
        raise ValueError(
            f"{path}: trained with align_corners=True, which is not supported; take one of 512x512"
        )
    if len(names) != classes:
        raise ValueError(f"{path}: has {classes} classes, not {len(names)}")
    network = {
        "classes": {"object": classes},
        "backbone": f"resnet{depth_of(state)}",
        "channels": channels,
        "head_conv": False,
        "pool": "pspnet",
        "stem": "v1c",
        "test_size": (512, 2048, 1),  # as they evaluate: the aspect kept, no padding
    }
    net = build(network, renamed(state, MMSEG), path)
    return net, {"object": distinct(names)}


def depth_of(state: dict) -> int:
    """The depth of the ResNet in a state dict of others: 18, 50 or 101."""
    if any("layer3.22.conv1." in key for key in state):
        return 101
    if any("layer1.0.conv3." in key for key in state):
        return 50
    return 18


def first_synonym(name: str) -> str:
    """ "car" of "car;auto" or "car, auto"."""
    return re.split("[,;]", name)[0].strip()


def distinct(names: list[str]) -> list[str]:
    """The names, with their number, from 1, behind those that occur more than once."""
    names = list(names)
    result = []
    for number, name in enumerate(names, start=1):
        if names.count(name) > 1:
            name = f"{name} ({number})"
        result.append(name)
    return result


# ---------------------------------------------------------------- speed
def measure(net: nn.Module, images: Tensor, training: bool, bf16: bool = False) -> float:
    """Milliseconds of a call of a network, in training with its gradients: the median of five. For
    others' networks too, which return a tensor, see README."""
    net.train(training)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        autocast = torch.autocast(images.device.type, torch.bfloat16, enabled=bf16)
        with torch.inference_mode(not training), autocast:
            logits = net(images)
        if isinstance(logits, dict):
            logits = logits["object"]
        if training:
            net.zero_grad()
            logits.float().logsumexp(dim=1).mean().backward()
        logits.flatten()[0].item()  # waits for a GPU
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times[1:])


def main(argv: list[str] | None = None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(
        description="Parameters, multiply-adds and milliseconds, here.", usage=argparse.SUPPRESS
    )
    parser.add_argument(
        "--size", type=int, default=512, metavar="N", help="side of the image (512)"
    )
    side = max(64, parser.parse_args(argv).size)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"150 objects, 512 channels, one {side}x{side} image, float32, {device}")
    print("backbone     M parameters    GMAC  ms, inference   ms, training")
    for backbone in ("resnet18", "resnet50", "resnet101"):
        net = UPerNet({"object": 150}, backbone).to(device).eval()
        images = torch.rand(1, 3, side, side, device=device)
        with FlopCounterMode(display=False) as counter, torch.inference_mode():
            net(images)
        gmac = counter.get_total_flops() / 2e9
        millions = sum(p.numel() for p in net.parameters()) / 1e6
        inference = measure(net, images, training=False)
        training = measure(net, images, training=True)
        print(f"{backbone:12s} {millions:12.1f} {gmac:7.1f} {inference:14.1f} {training:14.1f}")


if __name__ == "__main__":
    main()
