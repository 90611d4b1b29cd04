"""A typo on the command line is told with the flag to type, or with the members that there are."""

import pytest

from pyro_vae.cli import main

FIT = ["fit", "--data", "x.npy", "--out", "run"]

TYPOS = [
    ([*FIT, "--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs? See pyro-vae fit --help"),
    ([*FIT, "--lr", "0.1"], "--lr 0.1; did you mean --optimizer.lr?"),
    ([*FIT, "--hiden", "[3]"], "did you mean --hidden?"),
    (["check", "run", "--row", "3"], "did you mean --rows?"),
    ([*FIT, "--hidden", "64"], "hidden: expected list, got 64; write --hidden [64]; see pyro-vae fit --help"),
    ([*FIT, "--hidden", "64,32"], "write --hidden [64,32];"),
    ([*FIT, "--prior", "StandrdNormal"], "there is no class StandrdNormal; did you mean StandardNormal?"),
    (
        [*FIT, "--prior", "Cauchy"],
        "there is no class Cauchy; there are ContextNormal, Flow, GaussianMixture, GumbelSoftmax,",
    ),
    ([*FIT, "--elbo", "iwae"], "did you mean IWAE?"),
    ([*FIT, "--elbo", "Nope"], "; there are AnalyticKL, Beta, CIWAE, DReG, ELBO,"),
    ([*FIT, "--likelihood", "Bernouli"], "did you mean Bernoulli?"),
    (["fitt"], "invalid choice: 'fitt' (choose from"),
    (["fitt"], "; did you mean pyro-vae fit? See pyro-vae --help"),
    (["train"], "; did you mean pyro-vae fit?"),
    ([*FIT, "--engine", "compile"], "did you mean --engine compiled?"),
    ([*FIT, "--prior.componets", "3"], "; did you mean --prior.components?"),
    ([*FIT, "--prior", "GaussianMixture", "--prior.componets", "3"], "; did you mean --prior.components?"),
    ([*FIT, "--optimizer", "adm"], "did you mean Adam?"),
]


@pytest.mark.parametrize(("typed", "sentence"), TYPOS, ids=[" ".join(typed[-2:]) for typed, _ in TYPOS])
def test_what_was_meant_is_said(typed, sentence, capsys):
    assert main(typed) == 2
    told = capsys.readouterr().err
    assert sentence in told
    assert told.count("\n") == 1
