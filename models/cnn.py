"""The small student of Table 3."""

from collections import OrderedDict

from torch import nn


def build_cnn(num_classes):
    """A plain convolutional network: images (b, 3, 32, 32) -> logits (b, num_classes).

    Three stages of two 3x3 convolutions with 32, 64 and 128 channels, each followed by batch norm and ReLU; 2x2 max
    pooling between stages, global average pooling and one linear layer after the last: 0.29 million parameters. An
    nn.Sequential(layer1, layer2, layer3, head), the layers at full, half and quarter resolution as a ResNet's.
    """
    stages, channels = [], 3
    for i, width in enumerate((32, 64, 128), 1):
        parts = [nn.MaxPool2d(2)] if i > 1 else []
        for _ in range(2):
            parts += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                      nn.ReLU(inplace=True)]
            channels = width
        stages.append((f"layer{i}", nn.Sequential(*parts)))
    head = nn.Sequential(OrderedDict(pool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(),
                                     fc=nn.Linear(channels, num_classes)))
    return nn.Sequential(OrderedDict([*stages, ("head", head)]))
