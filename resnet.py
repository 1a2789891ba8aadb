"""ResNet-18/34/50/101 that returns the stages C2..C5 (He et al., CVPR 2016): UPerNet's backbone.

    from resnet import ResNet, load_imagenet
    net = ResNet(50)
    load_imagenet(net)
    c2, c3, c4, c5 = net(images)  # at strides 4, 8, 16 and 32

State-dict keys are torchvision's; with `stem="deep"` those of the authors' own encoder.
"""

from torch import Tensor, nn
from torch.nn.functional import relu

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
STEMS = {  # widths of the convolutions before layer1
    "7x7": (64,),  # torchvision's, our default
    "deep": (64, 64, 128),  # the authors' release: three 3x3 convolutions
    "v1c": (32, 32, 64),  # mmsegmentation's ResNet-v1c, likewise
}


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels, out_channels, 3, stride, padding=dilation, dilation=dilation, bias=False
    )


def downsample(in_channels: int, out_channels: int, stride: int) -> nn.Sequential | None:
    """The projection on the shortcut, where a block changes the shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
        nn.BatchNorm2d(out_channels),
    )


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
    """1x1, 3x3, 1x1 convolutions and a shortcut: ResNet-50 and 101.

    The stride sits on the 3x3 convolution, as in torchvision; its dilation is the first of the two.
    """

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

    depth: 18, 34, 50 or 101.
    stem: "7x7", or three 3x3 convolutions, "deep" or "v1c" (see STEMS).
    output_stride: 32, or 16 or 8, where the last one or two stages are dilated instead of strided
        (DilatedNet).
    `channels` are the widths of C2..C5. Raises ValueError for any other argument.
    """

    def __init__(self, depth: int = 50, stem: str = "7x7", output_stride: int = 32):
        super().__init__()
        if depth not in BLOCKS:
            raise ValueError(f"depth {depth!r} is not one of {list(BLOCKS)}")
        if stem not in STEMS:
            raise ValueError(f"stem {stem!r} is not one of {list(STEMS)}")
        if output_stride not in (8, 16, 32):
            raise ValueError(f"output_stride {output_stride!r} is not 8, 16 or 32")
        self.depth = depth
        self.stem = stem
        self.output_stride = output_stride
        self.block = BasicBlock if depth < 50 else Bottleneck

        widths = STEMS[stem]
        if stem == "7x7":
            self.conv1 = nn.Conv2d(3, widths[0], 7, 2, padding=3, bias=False)
        else:
            self.conv1 = conv3x3(3, widths[0], stride=2)
        self.bn1 = nn.BatchNorm2d(widths[0])
        if stem != "7x7":
            self.conv2 = conv3x3(widths[0], widths[1])
            self.bn2 = nn.BatchNorm2d(widths[1])
            self.conv3 = conv3x3(widths[1], widths[2])
            self.bn3 = nn.BatchNorm2d(widths[2])
        self.maxpool = nn.MaxPool2d(3, 2, padding=1)

        # Of the stage that is being built.
        self.in_channels = widths[-1]
        self.stride = 4
        self.dilation = 1
        blocks = BLOCKS[depth]
        self.layer1 = self.make_layer(64, blocks[0], stride=1)
        self.layer2 = self.make_layer(128, blocks[1], stride=2)
        self.layer3 = self.make_layer(256, blocks[2], stride=2)
        self.layer4 = self.make_layer(512, blocks[3], stride=2)
        self.channels = [width * self.block.expansion for width in (64, 128, 256, 512)]

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def make_layer(self, width: int, blocks: int, stride: int) -> nn.Sequential:
        """The next stage. Beyond `output_stride` dilation takes the place of the stride, though the
        stage's first 3x3 convolution keeps the dilation of the stage before."""
        previous_dilation = self.dilation
        if self.stride * stride > self.output_stride:
            self.dilation *= stride
            stride = 1
        self.stride *= stride
        layers = [self.block(self.in_channels, width, stride, (previous_dilation, self.dilation))]
        self.in_channels = width * self.block.expansion
        for _ in range(blocks - 1):
            layers.append(self.block(self.in_channels, width, 1, (self.dilation, self.dilation)))
        return nn.Sequential(*layers)

    def forward(self, x: Tensor) -> list[Tensor]:
        """Normalised images (N, 3, H, W) -> [C2, C3, C4, C5], each (N, channels, H/stride,
        W/stride), sizes rounded up."""
        x = relu(self.bn1(self.conv1(x)), inplace=True)
        if self.stem != "7x7":
            x = relu(self.bn2(self.conv2(x)), inplace=True)
            x = relu(self.bn3(self.conv3(x)), inplace=True)
        x = self.maxpool(x)  # (N, 64 or 128, H/4, W/4)
        c2 = self.layer1(x)
        c3 = self.layer2(c2)
        c4 = self.layer3(c3)
        c5 = self.layer4(c4)
        return [c2, c3, c4, c5]


def load_imagenet(net: ResNet) -> None:
    """Loads torchvision's ImageNet weights (IMAGENET1K_V1: ours, the paper names none).

    Raises ValueError for a stem that has none, OSError if they cannot be downloaded.
    """
    from torchvision.models import get_model_weights

    if net.stem != "7x7":
        raise ValueError(f"torchvision has no ImageNet weights for the stem {net.stem!r}")
    weights = get_model_weights(f"resnet{net.depth}")["IMAGENET1K_V1"]
    state = weights.get_state_dict(progress=True, check_hash=True)
    net.load_state_dict({key: value for key, value in state.items() if not key.startswith("fc.")})
