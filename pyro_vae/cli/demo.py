"""``pyro-vae demo``: train the note's VAE on real data, compare its two ELBOs, and check the ELBO exactly."""

from functools import partial
from pathlib import Path

import torch
from jsonargparse import Namespace

from pyro_vae import likelihoods, nn, posteriors, priors
from pyro_vae.cli.report import in_double, save_comparison, save_fit, show_comparison, show_fit
from pyro_vae.cli.run_folder import RunFolder, folder_for
from pyro_vae.compare.elbos import compare_elbos, note_elbos
from pyro_vae.core.device import seeded
from pyro_vae.core.format import Console
from pyro_vae.core.vae import VAE
from pyro_vae.data import digits, split
from pyro_vae.elbo import STL
from pyro_vae.evidence.exact import LinearGaussian
from pyro_vae.train.fit import fit


def note_vae(features: int, latents: int, hidden: list[int]) -> VAE:
    """Build the VAE of the note: N(0, I) prior, Gaussian likelihood with learned s, diagonal normal guide.

    Args:
        features: D, the number of features.
        latents: d, the number of latents.
        hidden: widths of the hidden layers of both networks; an empty list makes the VAE linear.

    References:
        | Auto-Encoding Variational Bayes (Kingma & Welling, 2013), https://arxiv.org/abs/1312.6114

    Example:
        >>> note_vae(64, 8, [128]).prior().event_shape
        torch.Size([8])
    """
    return VAE(
        prior=priors.StandardNormal(latents),
        decoder=likelihoods.Normal(nn.mlp(latents, hidden, features), scale=0.5, learn_scale=True),
        encoder=posteriors.DiagNormal(nn.mlp(features, hidden, 2 * latents)),
    )


def linear_check(x: torch.Tensor, *, latents: int = 2, epochs: int = 40, seed: int = 0) -> tuple[float, float]:
    """Train a linear VAE by SVI, and compute its ELBO and the largest possible one.

    With linear networks the model is probabilistic PCA, and the variational family contains its posterior, so
    the trained ELBO must reach the maximum of the log-likelihood. Both are exact, not sampled. The gradients are
    those of STL, whose noise vanishes as the guide becomes exact.

    Args:
        x: data, shape ``(datum, feature)``.
        latents: d, the number of latents.
        epochs: the number of epochs at each of four decreasing learning rates.
        seed: of the initial weights, the order of the data and the noise.

    Returns:
        The trained ELBO and the largest log-likelihood of probabilistic PCA, in nats per datum.

    References:
        | Don't Blame the ELBO! (Lucas et al., 2019), https://arxiv.org/abs/1911.02469
        | Sticking the Landing (Roeder, Wu & Duvenaud, 2017), https://arxiv.org/abs/1703.09194

    Example:
        >>> _ = torch.manual_seed(0)
        >>> x = LinearGaussian(torch.randn(4, 1).double(), torch.zeros(4).double(), 0.5).sample(200)
        >>> trained, best = linear_check(x, latents=1, epochs=25)
        >>> -0.05 < trained - best <= 0
        True
    """
    x = x.double()
    best = LinearGaussian.fit(x, latents).log_marginal(x).mean().item()
    with seeded(seed, torch.device("cpu")):
        vae = note_vae(x.shape[1], latents, []).double()
    quarter = -(-len(x) // 4)
    for rate in (5e-2, 2e-2, 5e-3, 1e-3):
        adam = partial(torch.optim.Adam, lr=rate, fused=True)
        fit(
            vae, x, elbo=STL(), optimizer=adam, epochs=epochs, batch_size=quarter, seed=seed, progress=False,
            device="cpu",
        )  # fmt: skip
    with torch.no_grad():
        return LinearGaussian.of(vae).elbo(x, vae.encoder(x)).mean().item(), best


def demo(out: str | None = None, *, epochs: int = 200, seed: int = 0, device: str = "auto") -> Path:
    """Train the note's VAE on handwritten digits, compare and check its ELBOs, and draw the figures.

    Args:
        out: a new folder for the results; by default runs/demo, with a number added if that name is taken.
        epochs: passes over the training data.
        seed: the seed of the split, the initial weights, the order of the data and the noise.
        device: auto (CUDA if available), cpu or cuda.

    Returns:
        The folder.
    """
    console = Console()
    data = digits()
    train, test = split(data, seed=seed)
    with RunFolder(folder_for("demo", out)) as run, run.locked():
        console.print(
            f"{data.source}: {len(train.x)} to train on, {len(test.x)} held out, {data.x.shape[1]} pixels each"
        )
        with seeded(seed, torch.device("cpu")):
            vae = note_vae(data.x.shape[1], 8, [128])
        adam = partial(torch.optim.Adam, lr=2e-3, fused=True)
        result = fit(vae, train.x, validation_data=test.x, optimizer=adam, epochs=epochs, seed=seed, device=device)
        show_fit(result, console)
        save_fit(run, result, test)
        if not result.interrupted:
            comparison = compare_elbos(in_double(vae), test.x, note_elbos(), seed=seed)
            show_comparison(comparison, console)
            save_comparison(run, comparison)
            console.print(_linear_verdict(*linear_check(data.x, seed=seed)), soft_wrap=True)
        run.show(console)
    return run.path


def run_demo(settings: Namespace) -> int:
    """Run the demo with the settings of ``pyro-vae demo``."""
    demo(settings.out, epochs=settings.epochs, seed=settings.seed, device=settings.device)
    return 0


def _linear_verdict(trained: float, best: float) -> str:
    return (
        f"Linear-Gaussian check: a linear VAE trained by SVI reaches an ELBO of {trained:.4f} nats per datum; the "
        f"exact maximum, the log-likelihood of probabilistic PCA, is {best:.4f} ({best - trained:.4f} above; both "
        "numbers are closed forms, without sampling error)."
    )
