"""Networks as a sequence of a stem, blocks 1 .. K, named layer1 .. layerK, and a head, to be cut after any block n."""

from collections import OrderedDict

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from models.losses import MASKED
from utils.errors import UserError

# Up to this image size a torchvision ResNet has a 3x3 stem without pooling, as is usual on CIFAR;
# the ImageNet stem would leave 2x2 positions of a 32x32 image to the last block.
SMALL_IMAGE = 64


def _in_sequence(stem, layers, head):
    named = [("stem", stem), *((f"layer{i}", layer) for i, layer in enumerate(layers, 1)), ("head", head)]
    return nn.Sequential(OrderedDict(named))


def _head(pool, fc):
    return nn.Sequential(OrderedDict(pool=pool, flatten=nn.Flatten(), fc=fc))


def _torchvision_resnet(name):
    """He et al. (2016), section 4.1, with torchvision's definition and initialisation."""

    def build(num_classes, image_size):
        net = torchvision.models.get_model(name, num_classes=num_classes, weights=None)
        stem = [("conv1", net.conv1), ("bn1", net.bn1), ("relu", net.relu)]
        if image_size <= SMALL_IMAGE:
            conv = nn.Conv2d(3, 64, kernel_size=3, padding=1, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            stem[0] = ("conv1", conv)
        else:
            stem.append(("maxpool", net.maxpool))
        return _in_sequence(nn.Sequential(OrderedDict(stem)), [net.layer1, net.layer2, net.layer3, net.layer4],
                            _head(net.avgpool, net.fc))

    return build


class PaddedShortcut(nn.Module):
    """Option A of He et al. (2016): every stride-th position, new channels zero; no parameters."""

    def __init__(self, in_channels, out_channels, stride):
        super().__init__()
        self.stride = stride
        before = (out_channels - in_channels) // 2
        self.padding = (0, 0, 0, 0, before, out_channels - in_channels - before)

    def forward(self, x):
        return F.pad(x[:, :, ::self.stride, ::self.stride], self.padding)


def _cifar_resnet(depth):
    """ResNet of depth 6n + 2 for 32x32 images: three blocks of n residual units, 16, 32 and 64 channels
    (He et al., 2016, section 4.2)."""

    def build(num_classes, image_size):
        n, channels, layers = (depth - 2) // 6, 16, []
        stem = nn.Sequential(OrderedDict(conv1=nn.Conv2d(3, 16, 3, padding=1, bias=False),
                                         bn1=nn.BatchNorm2d(16), relu=nn.ReLU(inplace=True)))
        for width, stride in ((16, 1), (32, 2), (64, 2)):
            shortcut = PaddedShortcut(channels, width, stride) if width > channels else None
            first = BasicBlock(channels, width, stride, shortcut)
            layers.append(nn.Sequential(first, *(BasicBlock(width, width) for _ in range(n - 1))))
            channels = width
        net = _in_sequence(stem, layers, _head(nn.AdaptiveAvgPool2d(1), nn.Linear(64, num_classes)))
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return net

    return build


def _cnn(num_classes, image_size):
    """A plain convolutional network, the small student of Table 3: 0.29 million parameters.

    Three layers of two 3x3 convolutions with 32, 64 and 128 channels, each followed by batch norm and ReLU; 2x2 max
    pooling between them. The layers stand at full, half and quarter resolution, as a ResNet's; the stem is empty.
    """
    layers, channels = [], 3
    for width in (32, 64, 128):
        parts = [nn.MaxPool2d(2)] if layers else []
        for _ in range(2):
            parts += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width),
                      nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.Sequential(*parts))
    return _in_sequence(nn.Sequential(), layers, _head(nn.AdaptiveAvgPool2d(1), nn.Linear(channels, num_classes)))


# name -> (num_classes, image_size) -> nn.Sequential(stem, layer1, ..., layerK, head). Its head is
# nn.Sequential(pool, flatten, fc). An architecture is added here.
ARCHITECTURES = {
    "cnn": _cnn,
    "resnet8": _cifar_resnet(8),
    "resnet20": _cifar_resnet(20),
    "resnet32": _cifar_resnet(32),
    "resnet44": _cifar_resnet(44),
    "resnet56": _cifar_resnet(56),
    "resnet18": _torchvision_resnet("resnet18"),
    "resnet34": _torchvision_resnet("resnet34"),
    "resnet50": _torchvision_resnet("resnet50"),
}


def build_network(arch, num_classes, image_size):
    """A freshly initialised network: images (b, 3, image_size, image_size) -> logits (b, num_classes)."""
    return ARCHITECTURES[arch](num_classes, image_size)


def split_network(network, split_at=None):
    """Cut after block n = split_at, or K if that is None: (lower, upper) = (stem + layer1..n, layer n+1..K + head).

    Both share the network's modules and keep their names, so that upper(lower(x)) is network(x) and
    their state_dicts together are the network's. Raises UserError unless 1 <= n <= K.
    """
    blocks = len(network) - 2
    split_at = blocks if split_at is None else split_at
    if not 1 <= split_at <= blocks:
        raise UserError(f"--split_at {split_at} is out of range: this network can be cut after blocks 1 to {blocks}")
    lower, upper = network[:split_at + 1], network[split_at + 1:]
    lower.training = upper.training = network.training  # a slice is a new module, in train mode at first
    return lower, upper


def join_network(lower, upper):
    """The network that split_network cut into these parts."""
    return nn.Sequential(OrderedDict([*lower.named_children(), *upper.named_children()]))


def before_last_layer(upper):
    """The upper part, or a network, without its last linear layer, which reads (b, d) of it."""
    return nn.Sequential(*upper[:-1], *upper[-1][:-1])


@torch.no_grad()
def take_rows(fc, classes):
    """The rows (k, d + 1) of k classes of a last layer, d weights and a bias each. In it, in place, these classes get a
    probability of 0."""
    rows = torch.cat([fc.weight[classes], fc.bias[classes, None]], 1)
    fc.weight[classes], fc.bias[classes] = 0.0, MASKED
    return rows


@torch.no_grad()
def put_rows(fc, classes, rows, path):
    """Give a last layer, in place, the rows that `take_rows` took from it. Raises UserError when those of the file
    `path` have another shape."""
    if rows.shape != (len(classes), fc.in_features + 1):
        raise UserError(f"{path} does not fit its own description: {tuple(rows.shape)} rows for {len(classes)} classes "
                        f"of {fc.in_features} features")
    fc.weight[classes], fc.bias[classes] = rows[:, :-1].to(fc.weight), rows[:, -1].to(fc.bias)
