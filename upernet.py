"""UPerNet: one network for scene, objects, parts, materials and textures (Xiao et al., ECCV 2018, section 3, figure 4).

    from upernet import UPerNet, load
    net = UPerNet({"scene": 365, "object": 335, "part": {11: 4, 20: 7}, "material": 25, "texture": 47})  # class counts
    net(images)["object"]                      # images (N, 3, H, W), RGB in [0, 1] -> logits (N, 335, H/4, W/4)
    net(images, levels=["scene", "material"])  # computes what these two need and no more
    net, vocabulary = load("ckpt.pt")          # or load_release(..), load_mmseg(..): others' released weights

    python upernet.py                          # parameters, multiply-adds, milliseconds on this machine

This file and resnet.py work on their own, copied anywhere; with `backbone=` a module, this file alone.
In comments, "released" is what the authors' code does, and "ours" what neither the paper nor that code says."""

import argparse, csv, functools, itertools, re, statistics, timeit, warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEVELS = ("scene", "object", "part", "material", "texture")
LOSS_WEIGHTS = {"scene": 0.25, "object": 1.0, "part": 0.5, "material": 1.0, "texture": 1.0}  # released; texture's: ours
UNLABELLED = -1  # in every label map and list of labels
IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)  # of RGB in [0, 1]
IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)


# ---------------------------------------------------------------- pieces
class ConvBNReLU(nn.Sequential):
    """Section 3.1: every convolution except the classifiers is followed by batch norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int = 3):
        conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        super().__init__(conv, nn.BatchNorm2d(out_channels), nn.ReLU(inplace=True))

    def norm_relu(self, y: Tensor) -> Tensor:
        return self[2](self[1](y))


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Bilinear, corners not aligned: (N, C, h, w) -> (N, C, *size)."""
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def prroi_weights(bins: int, n: int, device: torch.device) -> Tensor:
    """Precise RoI pooling of n samples along one axis (Jiang et al., ECCV 2018), as a matrix (bins, n).
    Bin b is the mean, from b*n/bins to (b+1)*n/bins, of the curve that is linear between the samples at 0..n-1 and falls
    to zero one beyond: a sum of triangles, of height 1 on [-1, 1] around each sample. So the last bin's weights sum to
    less than one."""
    edges = torch.arange(bins + 1, device=device) * n / bins
    t = (edges[:, None] - torch.arange(n, device=device)).clamp(-1, 1)  # (bins + 1, n)
    area = torch.where(t < 0, (t + 1) ** 2 / 2, 1 - (1 - t) ** 2 / 2)  # of each triangle, left of the edge
    return (area[1:] - area[:-1]) * bins / n


def average_weights(bins: int, n: int, device: torch.device) -> Tensor:
    """Adaptive average pooling along one axis, as PyTorch defines it, as a matrix (bins, n)."""
    b, i = torch.arange(bins, device=device)[:, None], torch.arange(n, device=device)
    inside = (b * n // bins <= i) & (i < ((b + 1) * n + bins - 1) // bins)
    return inside / inside.sum(dim=1, keepdim=True)


# ---------------------------------------------------------------- the network, from C5 upwards
class PPM(nn.Module):
    """Pyramid Pooling Module on C5 (PSPNet's, Zhao et al., CVPR 2017): C5 -> P5. Pools by `rows @ c5 @ columns.T`."""

    BINS = (1, 2, 3, 6)

    def __init__(self, in_channels: int, channels: int, pool: str):
        super().__init__()
        self.pool = pool
        self.branches = nn.ModuleList(ConvBNReLU(in_channels, channels, 1) for _ in self.BINS)
        self.last = ConvBNReLU(in_channels + len(self.BINS) * channels, channels)

    def forward(self, c5: Tensor) -> Tensor:
        size, weights, maps = c5.shape[2:], prroi_weights if self.pool == "prroi" else average_weights, [c5]
        for bins, branch in zip(self.BINS, self.branches):
            rows, columns = (weights(bins, n, c5.device).to(c5.dtype) for n in size)
            both = (rows[:, None, :, None] * columns[:, None, :]).flatten(2).flatten(0, 1)  # (bins * bins, h w)
            pooled = (both @ c5.flatten(2).mT).mT.unflatten(2, (bins, bins))  # (N, C, bins, bins)
            if self.pool == "pspnet":
                maps.append(resize(branch(pooled), size))
            else:  # as released: batch norm after the resize, with which the 1x1 convolution commutes (cheaper before)
                maps.append(branch.norm_relu(resize(branch[0](pooled), size)))
        return self.last(torch.cat(maps, dim=1))


class FPN(nn.Module):
    """Feature Pyramid Network's top-down path (Lin et al., CVPR 2017): C<finest>..C4 and P5 -> P<finest>..P5. It hands
    down the maps before their 3x3 convolution; with `all_maps=False` only the finest map has one."""

    def __init__(self, in_channels: list[int], channels: int, all_maps: bool):
        super().__init__()
        self.laterals = nn.ModuleList(ConvBNReLU(c, channels, 1) for c in in_channels)
        self.convs = nn.ModuleList(ConvBNReLU(channels, channels) for _ in range(len(in_channels) if all_maps else 1))

    def forward(self, stages: list[Tensor], p5: Tensor, only_finest: bool = False) -> list[Tensor]:
        """[P<finest>, .., P5], or with `only_finest` [P<finest>], without the other maps' 3x3 convolutions."""
        top_down, maps = p5, [p5]
        for i in reversed(range(len(self.laterals))):
            lateral = self.laterals[i](stages[i])
            top_down = resize(top_down, lateral.shape[2:]).add_(lateral)
            if i == 0 or not only_finest:
                maps.insert(0, self.convs[i](top_down))
        return maps[:1] if only_finest else maps


def shifted_upsampling(n: int, size: int, x: Tensor) -> Tensor:
    """(3, size, n): `resize` along one axis, from n to `size`, as a matrix, shifted by -1, 0 and 1 with zeros coming
    in at the border: what the three taps of a padded convolution see."""
    one_hot = torch.eye(n, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)[None]
    matrix = F.interpolate(one_hot, size=size, mode="linear", align_corners=False)[0].T  # (size, n)
    padded = F.pad(matrix, (0, 0, 1, 1)).to(x.dtype)
    return torch.stack([padded[t : t + size] for t in range(3)])


def conv_of_upsampled(maps: list[Tensor], weights: list[Tensor], size: tuple[int, int]) -> Tensor:
    """`sum(F.conv2d(resize(x, size), w, padding=1) for x, w in zip(maps, weights))`, up to rounding, for a quarter of
    the operations or less and without the upsampled maps.

    A 3x3 convolution is the sum over its taps (t, u) of the 1x1 convolution w[t, u] of the map shifted by (t, u).
    1x1 convolutions commute with upsampling and shifting, which are a matrix A[t] along the height times a matrix
    B[u] along the width. So each small map x goes through the 1x1 convolutions, and the result is the sum over the
    maps and t of A[t] @ (sum over u of B[u] @ (w[t, u] x))."""
    (height, width), n = size, len(maps[0])
    a = torch.cat([m for x in maps for m in shifted_upsampling(x.shape[2], height, x)], dim=1)  # (H, sum of 3h)
    b = [shifted_upsampling(x.shape[3], width, x).permute(1, 2, 0).flatten(1) for x in maps]  # each (W, 3w)
    at_once = 128 if maps[0].device.type == "cpu" else len(weights[0])  # output channels: intermediates fit the cache
    outputs = []
    for group in zip(*(w.split(at_once) for w in weights)):
        c, rows = len(group[0]), []
        for x, w, columns in zip(maps, group, b):
            for t in range(3):
                y = F.conv2d(x, w[:, :, t].permute(2, 0, 1).reshape(3 * c, -1, 1, 1))  # (n, 3c, h, w), taps u first
                y = y.permute(0, 2, 3, 1).reshape(n * x.shape[2], -1, c)  # (n h, 3w, c)
                rows.append((columns @ y).view(n, x.shape[2], width * c))  # (n, h, W c)
        outputs.append((a @ torch.cat(rows, dim=1)).view(n, height, width, c))  # sums over t and over the maps
    return torch.cat(outputs, dim=3).permute(0, 3, 1, 2)  # (n, C, H, W)


class Fusion(nn.Module):
    """P<finest>..P5, resized to the finest and concatenated, through one 3x3 convolution: the map of objects and parts.
    That is `self.conv(torch.cat([maps[0], *(resize(p, maps[0].shape[2:]) for p in maps[1:])], dim=1))`, two thirds of
    the whole network's operations; `conv_of_upsampled` computes the coarser maps' share."""

    def __init__(self, maps: int, channels: int):
        super().__init__()
        self.conv = ConvBNReLU(maps * channels, channels)

    def forward(self, maps: list[Tensor]) -> Tensor:
        weights = self.conv[0].weight.split([p.shape[1] for p in maps], dim=1)
        fused = F.conv2d(maps[0], weights[0], padding=1)
        fused += conv_of_upsampled(maps[1:], weights[1:], maps[0].shape[2:])
        return self.conv.norm_relu(fused)


class Head(nn.Module):
    """A level's own convolutions and its classifier; with `average` the mean over the map in between (scene)."""

    def __init__(self, in_channels: int, channels: int, classes: int, convs: int, average: bool = False):
        super().__init__()
        widths = [in_channels] + [channels] * convs
        self.conv = nn.Sequential(*(ConvBNReLU(a, b) for a, b in zip(widths, widths[1:])))
        self.average = average
        self.classifier = nn.Conv2d(widths[-1], classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return self.classifier(x.mean(dim=(2, 3), keepdim=True) if self.average else x)


class UPerNet(nn.Module):
    """The network of figure 4. Raises ValueError for arguments other than these:

    classes: level -> number of classes, for any of scene, object, part, material, texture; for part a dict, object's
        class index -> number of its parts, with the object's background (index 0) counted.
    backbone: "resnet18", "resnet34", "resnet50", "resnet101" (resnet.py beside this file), or a module with
        `.channels`, the widths of the four maps C2..C5 that its forward returns. channels: the width of all after it.
    head_conv: a 3x3 convolution before each classifier, as in the paper; most other code bases have none.
    pool: the PPM's pooling. "prroi": the authors' Precise RoI pooling; "adaptive": average pooling in its place, as in
        their ADE20K network; "pspnet": average pooling, and BN and ReLU before the resize, as in mmsegmentation.
    ppm, fpn, fusion, output_stride: the rows of the paper's table 2. `fpn` is the finest level built (2, 3 or 4; 0 for
        none, with all heads on P5). Without `fusion` the object head sits on that level; without `ppm` P5 is a 1x1
        lateral of C5. stem, output_stride: as in `resnet.ResNet`, for a backbone given by name.

    Parameters are named `backbone.*`, `ppm.*`, `fpn.*`, `fusion.*`, `heads.<level>.*`. `part_slices[object index]` are
    that object's channels in the part logits. `network` holds the arguments, `test_size` the short side, the longest
    side, and the multiple to which images are stretched (None: padded) for evaluation."""

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
        self.network = {key: value for key, value in locals().items() if key not in ("self", "__class__")}
        super().__init__()
        parts = classes.get("part", {})
        counts = [channels, *(n for level, n in classes.items() if level != "part")]
        counts += [*parts.values()] if isinstance(parts, dict) and (parts or "part" not in classes) else [0]
        if not classes or set(classes) - set(LEVELS) or not all(isinstance(n, int) and n > 0 for n in counts):
            raise ValueError(f"classes {classes}, channels {channels}: numbers above 0, for any of {', '.join(LEVELS)}")
        if not set(parts) <= set(range(classes.get("object", 0))):
            raise ValueError(f"classes {classes}: part has a key that is no index of an object")
        if pool not in ("prroi", "adaptive", "pspnet") or fpn not in (0, 2, 3, 4):
            raise ValueError(f"pool {pool!r} must be prroi, adaptive or pspnet, and fpn {fpn!r} 0, 2, 3 or 4")
        self.classes = {level: classes[level] for level in LEVELS if level in classes}
        self.fpn_level, self.test_size = fpn, (450, 1200, None)  # section 3.1
        if isinstance(backbone, str):
            from resnet import ResNet

            if not re.fullmatch(r"resnet\d{2,3}", backbone):
                raise ValueError(f"backbone {backbone!r}: resnet18, resnet34, resnet50, resnet101, or a module")
            backbone = ResNet(int(backbone[6:]), stem, output_stride).to(memory_format=torch.channels_last)
        self.backbone = backbone
        c2, *_, c5 = backbone.channels
        self.ppm = PPM(c5, channels, pool) if ppm else ConvBNReLU(c5, channels, 1)
        self.fpn = FPN(backbone.channels[fpn - 2 : 3], channels, all_maps=fusion) if fpn else None
        self.fusion = Fusion(6 - fpn, channels) if fpn and fusion else None
        # Figure 4: object and part sit on the fused map, material on P2; without P2, material sits beside object.
        self.on_fused = ("object", "part") if fpn == 2 else ("object", "part", "material")
        self.heads, ends = nn.ModuleDict(), itertools.accumulate(parts.values())
        self.part_slices = {index: slice(end - n, end) for (index, n), end in zip(parts.items(), ends)}
        for level, n in self.classes.items():
            n = sum(parts.values()) if level == "part" else n
            # Texture: "several" convolutions in the paper, not in the released code; four are our choice.
            width, convs = (c2, 4) if level == "texture" else (channels, int(head_conv))
            self.heads[level] = Head(width, channels, n, convs, average=level == "scene")
        self.register_buffer("mean", IMAGENET_MEAN.clone())
        self.register_buffer("std", IMAGENET_STD.clone())
        for module in filter(None, (self.ppm, self.fpn, self.fusion, self.heads)):
            for m in module.modules():  # as released; the biases of classifiers are PyTorch's
                if isinstance(m, nn.Conv2d):
                    nn.init.kaiming_normal_(m.weight, nonlinearity="relu")
                elif isinstance(m, nn.BatchNorm2d):
                    nn.init.constant_(m.bias, 1e-4)
            module.to(memory_format=torch.channels_last)  # faster; a caller's own backbone keeps its layout

    def forward(self, images: Tensor, levels: list[str] | None = None) -> dict[str, Tensor]:
        """Logits of the levels that are asked for (default: all), computing only what they need.

        images: (N, 3, H, W), RGB in [0, 1], H and W at least 32. In training mode batch norm needs more than one value
            a channel: a single image must have a side above 32, and `pool="pspnet"` needs two images.
        Returns a dict:
          scene              (N, classes)
          object, material   (N, classes, H/4, W/4), rounded up by our backbone
          part               (N, sum of part counts, H/4, W/4); softmax within `part_slices[object]`
          texture            (N, classes), the mean over texture_map (N, classes, H/4, W/4)
        Raises ValueError for a level that the network does not have, and for images that are not as above."""
        levels = list(self.classes) if levels is None else levels
        if unknown := set(levels) - set(self.classes):
            raise ValueError(f"no head for {', '.join(sorted(unknown))}: this network has {', '.join(self.classes)}")
        self.check(images)
        only_texture, ours = set(levels) == {"texture"}, getattr(self.backbone, "stops_early", False)  # resnet.py's
        x = (images - self.mean) / self.std
        x = x.contiguous(memory_format=torch.channels_last) if ours else x
        stages = self.backbone(x, last=2) if ours and only_texture else self.backbone(x)  # C2..
        quarter, logits = stages[0].shape[2:], {}
        if "texture" in levels:  # section 3: on C2, and no gradient into the backbone
            logits["texture_map"] = self.heads["texture"](stages[0].detach())
            logits["texture"] = logits["texture_map"].mean(dim=(2, 3))
        if only_texture:
            return logits
        p5 = self.ppm(stages[-1])
        if "scene" in levels:
            logits["scene"] = self.heads["scene"](p5).flatten(1)
        if maps := [level for level in ("object", "part", "material") if level in levels]:
            fuse = self.fusion is not None and any(level in self.on_fused for level in maps)
            pyramid = self.fpn(stages[self.fpn_level - 2 : 3], p5, only_finest=not fuse) if self.fpn else [p5]
            fused = self.fusion(pyramid) if fuse else pyramid[0]
            for level in maps:
                y = self.heads[level](fused if level in self.on_fused else pyramid[0])
                logits[level] = y if y.shape[2:] == quarter else resize(y, quarter)
        return logits

    def check(self, images: Tensor) -> None:
        """Raises ValueError for images that `forward` does not take; looks at values unless a GPU had to wait."""
        found, floats = f"images {tuple(images.shape)} of {images.dtype}", images.is_floating_point()
        if images.ndim != 4 or images.shape[1] != 3 or any(n < 32 for n in images.shape[2:]) or not floats:
            raise ValueError(f"{found}: not (N, 3, H, W), one image too; floats in [0, 1]; H and W of 32 or more")
        if not (torch.compiler.is_compiling() or images.is_meta or images.is_cuda and torch.is_grad_enabled()):
            low, high = (value.item() for value in images.detach().aminmax())
            if low < -0.01 or high > 1.01:
                raise ValueError(f"{found}: values in [{low:.3g}, {high:.3g}], not RGB in [0, 1]")


# ---------------------------------------------------------------- losses
def losses(logits: dict[str, Tensor], labels: dict[str, Tensor], part_slices: dict[int, slice]) -> dict[str, Tensor]:
    """The loss of each level in `logits`, before LOSS_WEIGHTS: float32 scalars, 0 for a level without a label here.
    labels, with UNLABELLED (-1) where there is none:
      scene, texture     (N,) class indices
      object, material   (N, H/4, W/4) class indices
      part               (N, H/4, W/4) index in the list of parts of the object at that pixel; 0, background, elsewhere
    A loss of 0 stays connected to the graph: the level's parameters get gradients of zero."""
    plain = [level for level in ("scene", "object", "material") if level in logits]
    result = {level: mean_cross_entropy(logits[level], labels[level]) for level in plain}
    if "part" in logits:
        result["part"] = part_loss(logits["part"], labels["object"], labels["part"], part_slices)
    if "texture_map" in logits:  # predicted at every pixel, each with the image's label
        everywhere = labels["texture"][:, None, None].expand(-1, *logits["texture_map"].shape[2:])
        result["texture"] = mean_cross_entropy(logits["texture_map"], everywhere)
    return result


def mean_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy, the mean over what is labelled; 0 where nothing is."""
    total = F.cross_entropy(logits.float(), labels.long(), ignore_index=UNLABELLED, reduction="sum")
    return total / (labels != UNLABELLED).sum().clamp(min=1)


def part_loss(logits: Tensor, objects: Tensor, parts: Tensor, part_slices: dict[int, slice]) -> Tensor:
    """Cross entropy over the parts of each object, within that object's pixels, summed over the objects.
    An object is valid in an image where at least one of its pixels has a part; there all its pixels count, those
    without a part as background. Per object the mean over its pixels in all such images of the batch (as released)."""
    annotated = parts > 0
    total = 0 * logits[0, 0, 0, 0].float().nan_to_num(0, 0, 0)  # connects the head to the graph, an infinite one too
    for index in sorted(part_slices.keys() & torch.unique(objects[annotated]).tolist()):
        inside = objects == index  # (N, H/4, W/4)
        valid = (inside & annotated).flatten(1).any(dim=1)  # (N,)
        labels = torch.where(inside & valid[:, None, None], parts.long(), UNLABELLED)
        total = total + mean_cross_entropy(logits[:, part_slices[index]], labels)
    return total


# ---------------------------------------------------------------- loading: our checkpoints
def read_file(path: str, device: str = "cpu") -> dict:
    """The dictionary in a file of tensors and plain values; no code in it is run. ValueError names the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return {**torch.load(path, map_location=device, weights_only=True)}
    except Exception as e:  # damaged bytes can trip the reader anywhere
        why = e.strerror if getattr(e, "filename", None) else f"no PyTorch weights, or damaged ({type(e).__name__})"
        if "mmengine" in str(e):
            why = "holds objects of mmengine's, which could run code; its tools/misc/publish_model.py takes them out"
        raise ValueError(f"{path}: {why}") from None


def build(network: dict, state: dict, path: str, device: str = "cpu") -> UPerNet:
    """UPerNet(**network) in eval mode with the tensors of `state`; ValueError names the file and first wrong key."""
    with torch.device("meta"):  # takes no memory before the file is known to fit
        net = UPerNet(**network)
    wanted, state = net.state_dict(), {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} | state
    for key in [*wanted, *state]:
        if key not in state or key not in wanted:
            raise ValueError(f"{path}: {key} is {'missing' if key in wanted else 'not in this network'}")
        value, shape = state[key], wanted[key].shape
        if not isinstance(value, Tensor) or value.shape != shape or not value.isfinite().all():
            raise ValueError(f"{path}: {key} is not a finite tensor of shape {tuple(shape)}")
    net.load_state_dict({key: state[key].to(value.dtype) for key, value in wanted.items()}, assign=True)
    return net.to(device, memory_format=torch.channels_last).eval()


def load(path: str, device: str = "cpu") -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) from a checkpoint of train.py.
    The vocabulary maps each level to its class names; for part, object name -> part names, "background" first.
    ValueError, with the file's name and what is wrong, for anything else."""
    net, checkpoint = read_checkpoint(path, device)
    return net, checkpoint["vocabulary"]


def read_checkpoint(path: str, device: str = "cpu") -> tuple[UPerNet, dict]:
    """(network in eval mode, the whole content of the file); see `load`."""
    checkpoint = read_file(path, device)
    try:
        "".join(name for names in checkpoint["vocabulary"].values() for name in names)  # TypeError if one is no text
        if class_counts(checkpoint["vocabulary"]) != checkpoint["network"]["classes"]:
            raise ValueError("its vocabulary does not have the network's classes")
        net = build(checkpoint["network"], checkpoint["model"], path, device)
        arguments = {"sizes": net.test_size[:1], "max_size": net.test_size[1]} | checkpoint.get("arguments", {})
        net.test_size = (int(statistics.median_high(arguments["sizes"])), int(arguments["max_size"]), None)
        return net, checkpoint
    except Exception as e:  # a damaged or hostile file may hold anything
        raise ValueError(f"{path}: not a checkpoint of train.py ({type(e).__name__}: {e})") from None


def class_counts(vocabulary: dict) -> dict:
    """The `classes` argument of the network for a vocabulary."""
    index = {name: i for i, name in enumerate(vocabulary.get("object", ()))}
    parts = {index[name]: len(names) for name, names in vocabulary.get("part", {}).items()}
    return {level: parts if level == "part" else len(vocabulary[level]) for level in LEVELS if level in vocabulary}


# ---------------------------------------------------------------- loading: released weights
AUTHORS = {  # the authors' keys -> ours; conv_last is in their ADE20K network, the heads in the paper's
    r"^ppm_conv\.": "ppm.branches.",
    r"^ppm_last_conv\.": "ppm.last.",
    r"^fpn_in\.": "fpn.laterals.",
    r"^fpn_out\.(\d)\.0\.": r"fpn.convs.\1.",
    r"^(conv_fusion|conv_last\.0)\.": "fusion.conv.",
    r"^conv_last\.1\.": "heads.object.classifier.",
    r"^(\w+)_head\.0\.": r"heads.\1.conv.0.",
    r"^(\w+)_head\.[12]\.": r"heads.\1.classifier.",  # scene's is 2, after the mean
    r".*\.(_tmp_running_mean|_tmp_running_var|_running_iter)$": "",  # their synchronised batch norm's own sums
}
MMSEG = {  # mmsegmentation's keys -> ours; the auxiliary head is for training only
    **{rf"^backbone\.stem\.{3 * k}\.": f"backbone.conv{k + 1}." for k in range(3)},
    **{rf"^backbone\.stem\.{3 * k + 1}\.": f"backbone.bn{k + 1}." for k in range(3)},
    r"^decode_head\.psp_modules\.(\d)\.1\.": r"ppm.branches.\1.",
    r"^decode_head\.bottleneck\.": "ppm.last.",
    r"^decode_head\.lateral_convs\.": "fpn.laterals.",
    r"^decode_head\.fpn_convs\.": "fpn.convs.",
    r"^decode_head\.fpn_bottleneck\.": "fusion.conv.",
    r"^decode_head\.conv_seg\.": "heads.object.classifier.",
    r"\.conv\.weight$": ".0.weight",
    r"\.bn\.(\w+)$": r".1.\1",
    r"^auxiliary_head\..*": "",
}


def renamed(state: dict, table: dict[str, str]) -> dict:
    """The state dict with its keys rewritten by the table's regular expressions, less those that become ""."""
    new_key = lambda key: functools.reduce(lambda k, rule: re.sub(*rule, k), table.items(), key)
    return {new: value for key, value in state.items() if (new := new_key(key))}


def load_release(encoder: str, decoder: str, labels: str) -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) of a network that the authors released, from its two .pth files.
    The network of the paper (unifiedparsing) with `labels` their folder `joint_dataset` of class tables: 336 objects
    and 26 materials with a background at index 0, 427 part channels, 365 scenes. Or their ADE20K network
    (semantic-segmentation-pytorch), 150 objects, with `labels` their `object150_info.csv`. ValueError names the file.
    """
    body, top = read_file(encoder), read_file(decoder)
    for path, state, key in ((encoder, body, "conv1.weight"), (decoder, top, "ppm_last_conv.0.weight")):
        if not isinstance(state.get(key), Tensor):
            raise ValueError(f"{path}: {key} is missing; the encoder comes first, then the decoder")
    paper, vocabulary = "conv_last.1.weight" not in top, {}
    rows = lambda *path: list(csv.DictReader(Path(labels, *path).read_text("utf-8").splitlines()))
    try:
        if paper:
            for level in ("scene", "object", "material"):
                vocabulary[level] = [row["name"] for row in rows(f"{level}.csv")]
            vocabulary["object"][0] = vocabulary["material"][0] = "background"
            parts = {row["object_name"]: row["part_names"].split(";")[1:] for row in rows("object_part_hierarchy.csv")}
            vocabulary["part"] = {name: ["background", *of_object] for name, of_object in parts.items()}
        else:
            vocabulary["object"] = distinct_names([row["Name"] for row in rows()])
        classes = class_counts(vocabulary)
    except Exception as e:
        needed = "folder joint_dataset" if paper else "file object150_info.csv"
        raise ValueError(f"{labels}: not the authors' {needed} for {decoder} ({type(e).__name__}: {e})") from None
    network = {"classes": classes, "head_conv": paper, "pool": "prroi" if paper else "adaptive", "stem": "deep"}
    network |= {"backbone": f"resnet{depth_of(body)}", "channels": len(top["ppm_last_conv.0.weight"])}
    state = {f"backbone.{key}": value for key, value in body.items()} | top
    if paper:  # BGR in [0, 255] minus a mean, as constants of RGB in [0, 1]
        state["mean"] = torch.tensor([122.7717, 115.9465, 102.9801]).view(3, 1, 1) / 255
        state |= {"std": torch.full((3, 1, 1), 1 / 255), "backbone.conv1.weight": body["conv1.weight"].flip(1)}
    net = build(network, renamed(state, AUTHORS), f"{encoder}, {decoder}, {labels}")
    net.test_size = (450, 1000, 8 if paper else 32)
    return net, vocabulary


def load_mmseg(path: str, names: list[str] | None = None) -> tuple[UPerNet, dict]:
    """(network in eval mode, vocabulary) from one of mmsegmentation's UPerNet checkpoints (ResNet-18, 50 or 101).
    names: the classes; by default the file's, else "class 1", .. ValueError for others and for aligned corners."""
    content = read_file(path)
    state, meta = content.get("state_dict", content), content.get("meta", {})
    if "decode_head.fpn_bottleneck.conv.weight" not in state:
        raise ValueError(f"{path}: not mmsegmentation's UPerNet (no decode_head.fpn_bottleneck); load reads ours")
    if re.search(r"align_corners\s*=\s*True", f"{meta.get('config')} {meta.get('cfg')}"):
        raise ValueError(f"{path}: trained with align_corners=True, which is not supported; take one of 512x512")
    classes, channels = len(state["decode_head.conv_seg.weight"]), len(state["decode_head.bottleneck.conv.weight"])
    names = names or meta.get("CLASSES") or (meta.get("dataset_meta") or {}).get("classes")
    names = distinct_names(names or [f"class {k}" for k in range(1, classes + 1)])
    if len(names) != classes:
        raise ValueError(f"{path}: has {classes} classes, not {len(names)}")
    network = {"classes": {"object": classes}, "backbone": f"resnet{depth_of(state)}", "channels": channels}
    net = build(network | {"head_conv": False, "pool": "pspnet", "stem": "v1c"}, renamed(state, MMSEG), path)
    net.test_size = (512, 2048, 1)  # as they evaluate: the aspect kept, no padding
    return net, {"object": names}


def depth_of(state: dict) -> int:
    """The depth of the ResNet in a state dict of others."""
    marks = {101: "layer3.22.conv1.", 50: "layer1.0.conv3.", 18: ""}
    return next(depth for depth, mark in marks.items() if any(mark in key for key in state))


def distinct_names(entries: list[str]) -> list[str]:
    """Each entry's first synonym ("car" of "car;auto"), with the entry's number, from 1, where two would agree."""
    first = [re.split("[,;]", entry)[0].strip() for entry in entries]
    return [name if first.count(name) == 1 else f"{name} ({k})" for k, name in enumerate(first, start=1)]


# ---------------------------------------------------------------- speed
def main(argv: list[str] | None = None) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    parser = argparse.ArgumentParser(description="Parameters, multiply-adds and milliseconds of the network, here.")
    parser.error = lambda message: parser.exit(2, f"{parser.prog}: {message}\n")
    parser.add_argument("--size", type=int, default=512, metavar="N", help="side of the image, at least 64 (512)")
    side, device = max(64, parser.parse_args(argv).size), "cuda" if torch.cuda.is_available() else "cpu"
    print(f"150 objects, 512 channels, one {side}x{side} image, float32, {device}, {torch.get_num_threads()} threads")
    print(f"{'backbone':12s}{'M parameters':>13s}{'GMAC':>8s}{'ms, inference':>15s}{'ms, training':>15s}")
    for backbone in ("resnet18", "resnet50", "resnet101"):
        net, images = UPerNet({"object": 150}, backbone).to(device), torch.rand(1, 3, side, side, device=device)
        parameters = list(net.parameters())
        inference = torch.inference_mode()(lambda: net.eval()(images)["object"].mean().item())  # waits for a GPU
        training = lambda: torch.autograd.grad(net.train()(images)["object"].mean(), parameters)[0].sum().item()
        with FlopCounterMode(display=False) as counter:
            inference()
        row = [sum(p.numel() for p in parameters) / 1e6, counter.get_total_flops() / 2e9]
        row += [1000 * statistics.median(timeit.repeat(step, repeat=5, number=1)) for step in (inference, training)]
        print(f"{backbone:12s}{row[0]:13.1f}{row[1]:8.1f}{row[2]:15.1f}{row[3]:15.1f}")


if __name__ == "__main__":
    main()
