"""Score a module of your own on multi-query associative recall (Zoology), beside attention and Mamba.

    python examples/mqar_own_module.py --tokens 400000

Any ``nn.Module`` from token ids (B, L) to logits (B, L, V) will do; it needs nothing of hybridnas.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn

import hybridnas


class GRULanguageModel(nn.Module):
    """Two layers of torch's GRU between an embedding and a head."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.rnn = nn.GRU(width, width, num_layers=2, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.rnn(self.embedding(ids))
        return self.head(hidden)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000, help="training tokens of each model")
    parser.add_argument("--width", type=int, default=64, help="width of each model [channels]")
    arguments = parser.parse_args()

    task = {"kind": "mqar", "vocab_size": 64, "seq_len": 32, "n_pairs": 4}
    torch.manual_seed(0)
    models = {
        "GRU (torch)": GRULanguageModel(64, arguments.width),
        "attention": hybridnas.build("AFAF", d_model=arguments.width, vocab_size=64),
        "Mamba": hybridnas.build("MM", d_model=arguments.width, vocab_size=64),
    }
    for name, model in models.items():
        result = hybridnas.fit(model, data=task, tokens=arguments.tokens, batch_size=32, lr=3e-3)
        last = result.evals[-1]
        n_params = sum(p.numel() for p in model.parameters())
        print(f"{name:12}  {n_params:9,} parameters  loss {last.valid_loss:.3f}  accuracy {100 * last.accuracy:.1f} %")


if __name__ == "__main__":
    main()
