"""PriorNet: a plain CNN that predicts the sharp image and the variance of its error."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from uknowpan.models.published.layers import check_images, unrounded
from uknowpan.models.published.uknow.blocks import box_highpass
from uknowpan.models.training.bounds import check_bounds, count


@dataclass(frozen=True)
class PriorConfig:
    """Shape of a `PriorNet`; the defaults are the published widths."""

    bands: int = count()
    """C, the bands of the MS."""
    width: int = count(64)
    """Channels of the hidden layers."""
    blocks: int = 4
    """Residual blocks of three convolutions."""
    variance_floor: float = 1e-6
    """Added to the variance, in squared units of lms: at [0, 1] a 1-sigma of 0.001, about two
    digital numbers of 11 bits. The release has none (0), and its likelihood no lower bound."""
    highpass_pan: bool = False
    """Simulate the release, whose in-place 5x5 high-pass overwrites the PAN, so that the network
    never sees its brightness. By default PAN enters raw and high-pass, one more channel."""

    def __post_init__(self) -> None:
        check_bounds(self)


class PriorNet(nn.Module):
    """Mean and variance of the sharp image, from lms and pan.

    As published (`highpass_pan=True`) it has 457,616 parameters for 8 bands and 450,696 for 4;
    the raw PAN of the default adds 9 * width, that is 576. The network is local: its reach is
    3 * blocks + 2 pixels, and 2 more for the high-pass.

    Source: U-Know-DiffPAN (CVPR 2025), the uncertainty-aware prior.
    """

    pixel_multiple = 1

    def __init__(self, config: PriorConfig):
        super().__init__()
        self.config = config
        width = config.width
        channels = config.bands + (1 if config.highpass_pan else 2)
        self.entry = nn.Conv2d(channels, width, 3, padding=1)
        self.blocks = nn.ModuleList(nn.Sequential(*[_conv_relu(width) for _ in range(3)]) for _ in range(config.blocks))
        self.head = nn.Conv2d(width, 2 * config.bands, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and module.bias is not None:
                nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="relu")
                nn.init.zeros_(module.bias)
        # Untrained, the network predicts the LMS with a 1-sigma of 0.03. The release starts at
        # random, a hundred times as far from the truth.
        nn.init.zeros_(self.head.weight)
        assert self.head.bias is not None
        variance = torch.full((config.bands,), 1e-3)
        with torch.no_grad():
            self.head.bias[config.bands :] = torch.log(torch.expm1(variance))

    def forward(self, lms: Tensor, pan: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (B, C, H, W) in the units of lms, and variance (B, C, H, W) in their square.

        Args:
            lms: (B, C, H, W), about [0, 1].
            pan: (B, 1, H, W), about [0, 1], raw.

        Raises:
            ValueError: shapes that do not fit the configuration or each other.
        """
        check_images("PriorNet", self.config.bands, "lms", lms, {"pan": (pan, 1)})
        pans = [box_highpass(pan)] if self.config.highpass_pan else [box_highpass(pan), pan]
        h = F.relu(self.entry(torch.cat([lms, *pans], dim=1)))
        for block in self.blocks:
            h = h + block(h)
        # Back to the precision of lms: autocast's bfloat16 has 8 bits for mean and variance.
        residual, raw = unrounded(self.head, h).to(lms.dtype).chunk(2, dim=1)
        return lms + residual, F.softplus(raw) + self.config.variance_floor


def _conv_relu(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU())
