"""Train one architecture on a folder of your own text, export it, load it again and generate.

python examples/own_data.py --text 'docs/**/*.md' --pattern '(ME)x2'
"""

from __future__ import annotations

import argparse

import torch

import hybridnas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a file, a folder or a glob of text files")
    parser.add_argument("--pattern", default="(ME)x2", help="the architecture as a pattern string")
    parser.add_argument("--tokens", type=int, default=200_000, help="training tokens")
    parser.add_argument("--out", default="runs/own_data", help="folder of the run and of the exported model")
    arguments = parser.parse_args()

    arch = hybridnas.Arch.from_pattern(arguments.pattern, d_model=64, vocab_size=256, n_experts=4)
    cost = arch.cost(seq_len=256)
    print(f"{arch.pattern}: {cost.params:,} parameters, {cost.active_params:,} active per token")

    data = {"kind": "text", "path": arguments.text}
    result = hybridnas.fit(arch, data=data, tokens=arguments.tokens, seq_len=128, folder=arguments.out)
    print(f"validation loss {result.evals[-1].valid_loss:.4f} nats per byte; the run lies in {arguments.out}")

    result.model.save_pretrained(f"{arguments.out}/model")
    model = hybridnas.HybridLM.from_pretrained(f"{arguments.out}/model")
    prompt = torch.tensor([list(b"The ")])
    text = model.generate(prompt, max_new_tokens=80, top_p=0.9, seed=0)
    print(bytes(text[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
