"""Search a space of architectures and use the best one as a model.

    python examples/search_and_load.py                     # under a minute on a laptop
    python examples/search_and_load.py --budget laptop     # the search of the README

Stop it at any time (Ctrl-C) and start it again: the study goes on where it stopped.
"""

from __future__ import annotations

import argparse

import torch

import hybridnas


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", default="smoke", help="smoke, laptop, workstation or paper")
    parser.add_argument("--trials", type=int, default=8, help="finished trials that end the search")
    parser.add_argument("--runs", default="runs", help="folder in which studies lie")
    arguments = parser.parse_args()

    study = hybridnas.create_study(
        space="mamba_moe", budget=arguments.budget, data="stdlib", runs=arguments.runs, n_trials=arguments.trials
    )
    study.run()

    columns = ["number", "preset", "pattern", "state", "val_loss", "active_params"]
    print(study.to_dataframe()[columns].sort_values("val_loss").to_string(index=False))
    best = study.best
    print(f"best: {best.arch.pattern}, validation loss {best.scores['val_loss']:.4f} nats per byte")
    print(f"report: {study.report()}")

    model = best.model()
    prompt = torch.tensor([list(b"def ")])
    text = model.generate(prompt, max_new_tokens=60, temperature=0.8, seed=0)
    print(bytes(text[0].tolist()).decode(errors="replace"))


if __name__ == "__main__":
    main()
