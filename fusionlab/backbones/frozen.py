"""What every backbone shares: its own dropout stays off, also while its adapters train."""

from __future__ import annotations

from torch import nn


class FrozenBackbone(nn.Module):
    """A frozen model whose ``train()`` reaches the dropout of its adapters only."""

    def train(self, mode: bool = True) -> FrozenBackbone:
        """Let the adapters' dropout follow ``mode``; the rest of the model stays in evaluation mode."""
        super().train(False)
        for name, module in self.named_modules():
            if ".lora_dropout." in name:
                module.train(mode)
        return self
