"""Mean of the weights of `lite` students that began with the same weights.

    python tests/benchmarks/average.py OUT.safetensors ONE.safetensors OTHER.safetensors ...

Models that were fine-tuned from one ancestor in different ways lie in one valley: the mean of their
weights serves between them, often better (Wortsman et al., "Model soups", ICML 2022). The networks
may see different numbers of the scene; the mean sees the most. The card is the first one's and
names the others.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, replace

import torch

from uknowpan.models.checkpoints import load_model, save_checkpoint
from uknowpan.models.network import FSAStudentLite, LiteConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output")
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    loaded = [load_model(path) for path in arguments.models]
    configs = [LiteConfig(**card.config) for _, card in loaded]
    config = replace(configs[0], scene_features=max(c.scene_features for c in configs))
    network = FSAStudentLite(config)
    weights = [model.state_dict() for model, _ in loaded]
    mean = {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    network.load_state_dict(mean)
    card = loaded[0][1]
    others = [other.training for _, other in loaded[1:]]
    training = {**card.training, "averaged_with": others}
    save_checkpoint(arguments.output, network, replace(card, config=asdict(config), training=training))


if __name__ == "__main__":
    main()
