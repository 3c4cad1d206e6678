"""Modules and data of another package whose arguments bear names that mean something else in ours."""

from __future__ import annotations

import own_regressor
import torch
from own_regressor import Planes, Regressor
from torch import Tensor, nn


class Named(Regressor):
    """Args are a torchvision user's, and mean nothing of ours.

    Args:
        heads: of attention.
        weights: which pretrained ones.
        backbone: layers of it.
        evaluation: how the loss is weighed.
        method: how it interpolates.
        learning_rate: of Adam.
    """

    def __init__(
        self,
        heads: int = 4,
        weights: str = "DEFAULT",
        backbone: int = 18,
        evaluation: float = 1.0,
        method: str = "bilinear",
        learning_rate: float = 0.02,
    ) -> None:
        super().__init__(8, learning_rate)
        self.evaluation = evaluation


class Bitfit(Regressor):
    """Whose one method has a name of its own."""

    method = "bitfit"


class Choosing(Regressor):
    """Args say the method.

    Args:
        method: any.
    """

    def __init__(self, method: str = "ia3") -> None:
        super().__init__()
        self.method = method


class Nested(Regressor):
    """Whose activation is a class.

    Args:
        activation: between the layers.
        learning_rate: of Adam.
        scale: of the predictions; it decides scores.
    """

    def __init__(self, activation: nn.Module, learning_rate: float = 0.02, scale: float = 1.0) -> None:
        super().__init__(8, learning_rate)
        self.network[1] = activation
        self.backbone = own_regressor.Network("nested", self.network, {"scale": scale})


class Logging(Regressor):
    """Which logs a metric of its own."""

    def training_step(self, batch: dict[str, dict[str, Tensor]], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("own_loss", loss, batch_size=1)
        return loss


class Drawn(Regressor):
    """Whose base is drawn when it is made, as the seed says, and so is its width of numbers.

    Args:
        seed: of the base's last value.
    """

    def __init__(self, seed: int = 5) -> None:
        super().__init__()
        with torch.no_grad():
            self.network[0].weight.normal_()
            self.network[0].bias.fill_(float(seed))


class Counted(Planes):
    """Args bear names of ours.

    Args:
        tasks: how many.
        images: where pictures are.
        batch_size: samples of each task in a batch.
    """

    def __init__(self, tasks: int = 3, images: str = "", batch_size: int = 8) -> None:
        super().__init__(batch_size)


class ChoosingNested(Nested):
    """Both.

    Args:
        activation: between the layers.
        method: any.
        learning_rate: of Adam.
        scale: of the predictions.
    """

    def __init__(
        self, activation: nn.Module, method: str = "ia3", learning_rate: float = 0.02, scale: float = 1.0
    ) -> None:
        super().__init__(activation, learning_rate, scale)
        self.method = method
