"""ResNets for small images (He et al. 2016, section 4.2).

A shortcut that changes the width is a 1 x 1 convolution with BatchNorm, as in the code of the paper that is
reproduced. He et al. pad with zeros instead.
"""

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two 3 x 3 convolutions with a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.stride = stride
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        # every second pixel, as a stride of the 1 x 1 convolution, whose backward pass crashes in PyTorch 2.7.0
        if self.stride > 1:
            x = F.avg_pool2d(x, 1, self.stride)
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class ResNet(nn.Module):
    """ResNet-20, 32, 56 and other depths, from images (B, C, H, W) to logits (B, classes).

    Args:
        depth: Number of layers, 6n + 2: n blocks of two convolutions in each of three stages.
        classes: Number of classes.
        width: Channels of the first stage. The second stage has twice and the third four times as many.
        channels: Channels of the images, whose height and width may be any from 4 pixels.

    Raises:
        ValueError: If depth is not 6n + 2.
    """

    def __init__(self, depth: int, classes: int, width: int = 16, channels: int = 3):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth {depth}; expected 6n + 2, such as 20, 32 or 56")
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.stages = nn.Sequential()
        inputs = width
        for stage in range(3):
            outputs = width * 2**stage
            for block in range((depth - 2) // 6):
                self.stages.append(Block(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        out = self.stages(F.relu(self.bn1(self.conv1(x))))
        return self.fc(out.mean((2, 3)))
