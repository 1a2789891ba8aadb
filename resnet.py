"""ResNet-18/34/50/101 that returns the stages C2..C5 (He et al., CVPR 2016): the backbone of UPerNet.

    from resnet import ResNet, load_imagenet
    net = ResNet(50)
    load_imagenet(net)
    c2, c3, c4, c5 = net(images)  # at 1/4, 1/8, 1/16 and 1/32 of the images' size

State-dict keys are torchvision's; with `stem="deep"` those of the authors' own encoder."""

from torch import Tensor, nn
from torch.nn.functional import relu

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}  # residual blocks in C2..C5
# Widths of the stem's convolutions: torchvision's, the authors' release's, mmsegmentation's ResNet-v1c.
STEMS = {"7x7": (64,), "deep": (64, 64, 128), "v1c": (32, 32, 64)}


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False)


def downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection on the shortcut, where a block changes the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut: ResNet-18 and 34. `dilations` are those of the two."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilations: tuple[int, int]):
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride, dilations[0])
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, 1, dilations[1])
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = downsample(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        y += x if self.downsample is None else self.downsample(x)
        return relu(y, inplace=True)


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and a shortcut: ResNet-50 and 101. The 3x3 has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilations: tuple[int, int]):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride, dilations[0])
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = downsample(in_channels, 4 * width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = relu(self.bn1(self.conv1(x)), inplace=True)
        y = relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        y += x if self.downsample is None else self.downsample(x)
        return relu(y, inplace=True)


class ResNet(nn.Module):
    """The four stages of a ResNet, without its classifier.
    depth: 18, 34, 50 or 101. stem: "7x7", or three 3x3 convolutions, "deep" or "v1c" (see STEMS).
    output_stride: 32, or 16 or 8, where the last one or two stages are dilated instead of strided (DilatedNet).
    `channels` are the widths of C2..C5. Raises ValueError for any other argument."""

    def __init__(self, depth: int = 50, stem: str = "7x7", output_stride: int = 32):
        super().__init__()
        if depth not in BLOCKS or stem not in STEMS or output_stride not in (8, 16, 32):
            known = f"depth is one of {list(BLOCKS)}, stem of {list(STEMS)}, output_stride of [8, 16, 32]"
            raise ValueError(f"ResNet({depth!r}, {stem!r}, {output_stride!r}): {known}")
        self.depth, self.stem, self.stops_early = depth, stem, True  # forward takes `last`
        block = BasicBlock if depth < 50 else Bottleneck
        self.channels = [width * block.expansion for width in (64, 128, 256, 512)]
        kernel, in_channels = 7 if stem == "7x7" else 3, 3
        for k, width in enumerate(STEMS[stem], start=1):
            conv = nn.Conv2d(in_channels, width, kernel, 2 if k == 1 else 1, padding=kernel // 2, bias=False)
            self.add_module(f"conv{k}", conv)
            self.add_module(f"bn{k}", nn.BatchNorm2d(width))
            in_channels = width
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)
        total_stride, dilation = 4, 1  # so far; dilation replaces the strides beyond output_stride
        for stage, blocks in enumerate(BLOCKS[depth]):
            stride, previous = (1 if stage == 0 else 2), dilation
            if total_stride * stride > output_stride:  # the first 3x3 convolution keeps the previous dilation
                dilation, stride = dilation * stride, 1
            total_stride *= stride
            layers = [block(in_channels, 64 * 2**stage, stride, (previous, dilation))]
            in_channels = self.channels[stage]
            layers += [block(in_channels, 64 * 2**stage, 1, (dilation, dilation)) for _ in range(blocks - 1)]
            self.add_module(f"layer{stage + 1}", nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor, last: int = 5) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> [C2, .., C<last>], each (N, channels, H / stride, W / stride)."""
        for k in range(1, len(STEMS[self.stem]) + 1):
            x = relu(getattr(self, f"bn{k}")(getattr(self, f"conv{k}")(x)), inplace=True)
        x = self.maxpool(x)  # (N, 64 or 128, H/4, W/4)
        stages = []
        for layer in (self.layer1, self.layer2, self.layer3, self.layer4)[: last - 1]:
            x = layer(x)
            stages.append(x)
        return stages


def load_imagenet(net: ResNet) -> None:
    """Loads torchvision's ImageNet weights (IMAGENET1K_V1). ValueError for a stem without them, OSError if offline."""
    from torchvision.models import get_model_weights

    if net.stem != "7x7":
        raise ValueError(f"torchvision has ImageNet weights for the 7x7 stem only, not for {net.stem!r}")
    weights = get_model_weights(f"resnet{net.depth}")["IMAGENET1K_V1"].get_state_dict(progress=True, check_hash=True)
    net.load_state_dict({key: value for key, value in weights.items() if not key.startswith("fc.")})
