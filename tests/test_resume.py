"""A run that was killed and resumed ends with the weights of one that never was, to the bit."""

import pytest
import torch
from members import FEATURES, LATENTS

import pyro_vae as pv
from pyro_vae._checkpoints import Checkpoints

ROWS, BATCH, EPOCHS = 60, 8, 4  # 8 steps an epoch, the last of 4 rows
X = torch.randn(70, FEATURES, generator=torch.Generator().manual_seed(3))


class Killed(BaseException):
    """What ends a process, as far as another can tell."""


class Kill(pv.callbacks.Callback):
    """Ends the process after a step."""

    def __init__(self, step):
        self.every, self.last = 1, step

    def step(self, run):
        if run.step == self.last:
            raise Killed


def vae_of(drop=0.1):
    torch.manual_seed(0)
    return pv.VAE(
        prior=pv.priors.StandardNormal(LATENTS),
        decoder=pv.likelihoods.Normal(pv.nn.mlp(LATENTS, [8], FEATURES), learn_scale=True),
        encoder=pv.posteriors.DiagNormal(
            torch.nn.Sequential(
                torch.nn.BatchNorm1d(FEATURES), torch.nn.Dropout(drop), *pv.nn.mlp(FEATURES, [8], 2 * LATENTS)
            )
        ),
    )


def trained(folder, *, killed_at=None, resume=False, vae=None, **settings):
    vae = vae or vae_of()
    made = {name: value() if name in ("elbo",) else value for name, value in settings.items()}
    callbacks = [pv.callbacks.Callback()] if killed_at is None else [Kill(killed_at)]
    where = {"resume": folder} if resume else {}
    if folder is not None:
        where["checkpoints"] = Checkpoints(folder, steps=1, minutes=None)
    return pv.fit(
        vae, X[:ROWS], validation_data=X[ROWS:], batch_size=BATCH, epochs=EPOCHS, progress=False,
        callbacks=callbacks, **where, **{"engine": "eager", **made},
    )  # fmt: skip


def same(first, second):
    a, b = first.vae.state_dict(), second.vae.state_dict()
    apart = [name for name in a if not torch.equal(a[name], b[name])]
    numbers = [name for name in first.history.data_vars if name != "seconds"]
    return not apart and first.history[numbers].equals(second.history[numbers])


@pytest.mark.parametrize("engine", ["eager", "compiled"])
@pytest.mark.parametrize("step", [1, 7, 8, 9, 20, 31])
def test_killed_after_any_step(engine, step, tmp_path):
    whole = trained(None, engine=engine)
    with pytest.raises(Killed):
        trained(tmp_path, engine=engine, killed_at=step)
    again = trained(tmp_path, engine=engine, resume=True)
    assert same(whole, again)
