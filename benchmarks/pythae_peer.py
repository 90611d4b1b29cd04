"""pythae's trainer on the same architecture; its KL is in closed form, its IWAE has 50 samples."""

import logging
import tempfile
from collections.abc import Callable

import numpy as np
import torch
from pythae.data.datasets import BaseDataset
from pythae.models import IWAE, VAE, IWAEConfig, VAEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from torch import Tensor

from benchmarks.cases import LEARNING_RATE, Case


class Encoder(BaseEncoder):
    def __init__(self, net: torch.nn.Module, latent: int) -> None:
        BaseEncoder.__init__(self)
        self.net, self.latent_dim = net, latent

    def forward(self, x: Tensor) -> ModelOutput:
        loc, log_scale = self.net(x).chunk(2, -1)
        return ModelOutput(embedding=loc, log_covariance=2 * log_scale)


class Decoder(BaseDecoder):
    def __init__(self, net: torch.nn.Module) -> None:
        BaseDecoder.__init__(self)
        self.net = net

    def forward(self, z: Tensor) -> ModelOutput:
        return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))


def trainer(case: Case, x: np.ndarray) -> Callable[[], float]:
    """One epoch of its trainer; the mean objective, nats per datum."""
    from benchmarks.contestants import networks

    logging.disable(logging.INFO)
    settings = {"input_dim": (case.features,), "latent_dim": case.latent, "reconstruction_loss": "bce"}
    nets = networks(case)
    parts = {"encoder": Encoder(nets[0], case.latent), "decoder": Decoder(nets[1])}
    if case.estimator == "iwae50":
        model = IWAE(IWAEConfig(number_samples=50, **settings), **parts)
    else:
        model = VAE(VAEConfig(**settings), **parts)
    config = BaseTrainerConfig(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=case.batch, learning_rate=LEARNING_RATE,
        num_epochs=10_000, seed=0,
    )  # fmt: skip
    rows = BaseDataset(torch.from_numpy(x), torch.zeros(len(x)))
    own = BaseTrainer(model, rows, training_config=config)
    own.prepare_training()
    epochs = iter(range(1, 10_000))
    return lambda: -float(own.train_step(next(epochs)))
