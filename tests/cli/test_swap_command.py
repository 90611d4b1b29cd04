"""``pyro-vae swap`` when something is wrong: what is refused, carried past, stopped and told."""

import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from helpers.checks import linear_gaussian

import pyro_vae as pv
from pyro_vae.cli import main
from pyro_vae.cli import swap as cli_swap
from pyro_vae.compare.swap import rank, ranking_figure, ranking_table, with_failures
from pyro_vae.errors import DataError
from pyro_vae.evidence.exact import LinearGaussian

FAST = ["--epochs", "2", "--hidden", "[4]", "--latent_dim", "2", "--particles", "10", "--batch_size", "16"]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("data.npy", np.random.default_rng(0).normal(size=(60, 3)))
    return tmp_path


@pytest.fixture
def trained(monkeypatch):
    """The VAEs that the command has begun to train."""
    begun = []
    whole = cli_swap.train

    def train(settings, vae, data, **more):
        begun.append(type(vae.prior).__name__)
        return whole(settings, vae, data, **more)

    monkeypatch.setattr(cli_swap, "train", train)
    return begun


def swap(*flags, data="data.npy"):
    return main(["swap", "--data", data, "--out", "run", *FAST, *flags])


def ranking():
    with xr.open_dataset("run/ranking.nc", engine="h5netcdf") as ranked:
        return ranked.load()


def refused(capsys, *, code=2):
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1
    assert said[0].startswith("pyro-vae: ")
    assert not Path("run").exists()
    return said[0]


# --- Before any training ---

SECOND = "[StandardNormal, Laplace]"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--likelihoods", "[Normal, Poisson]"], "data.npy: row 0, column"),
        (["--likelihoods", "[Normal, Bernoulli]"], "but Bernoulli takes 0 and 1"),
        (["--priors", "[StandardNormal, StudentT]", "--elbo", "AnalyticKL"], "StudentT: the KL of Normal from"),
        (["--priors", "[StandardNormal, Laplace]", "--elbo", "HandDerivedELBO"], "Laplace: HandDerivedELBO is"),
        (["--priors", SECOND, "--optimizer.lr=-1"], "the optimizer cannot be used (Invalid learning rate: -1.0)"),
        (["--priors", "[StandardNormal, StandardNormal]"], "priors holds pyro_vae.priors.StandardNormal twice"),
        (["--likelihoods", "[Normal, {class_path: Normal, init_args: {scale: 1.0}}]"], "Normal twice; leave one out"),
        (["--held_out", "0.01"], "the held-out part holds 1 datum; standard errors need at least 2"),
    ],
)
def test_what_is_wrong_with_one_combination_is_found_before_any_is_trained(flags, message, folder, trained, capsys):
    assert swap(*flags) == 2
    assert message in refused(capsys)
    assert not trained


def test_what_the_file_holds_is_refused_by_its_row_there(folder, capsys):
    """Whether the row is drawn for training or held out, and in a file of held-out data."""
    x = np.arange(120.0).reshape(40, 3)
    for row in (0, 7, 23, 39):
        bad = x.copy()
        bad[row, 1] = -1
        np.save("bad.npy", bad)
        np.save("good.npy", x)
        expected = f"bad.npy: row {row}, column 1 is -1, but Poisson takes"
        for command in ("fit", "compare", "swap"):
            flag = ["--likelihoods", "[Poisson]"] if command == "swap" else ["--likelihood", "Poisson"]
            own = FAST if command == "swap" else FAST[:6]
            assert main([command, "--data", "bad.npy", "--out", "run", *own, *flag]) == 2
            assert expected in refused(capsys)
            if command != "compare":
                held_out = ["--data", "good.npy", "--validation_data", "bad.npy"]
                assert main([command, *held_out, "--out", "run", *own, *flag]) == 2
                assert expected in refused(capsys)


@pytest.mark.filterwarnings("ignore:Poisson. for")
def test_data_to_compare_on_are_refused_by_their_row(folder, capsys):
    counts = np.arange(120.0).reshape(40, 3)
    np.save("counts.npy", counts)
    assert main(["fit", "--data", "counts.npy", "--out", "trained", *FAST[:6], "--likelihood", "Poisson"]) == 0
    counts[30, 2] = 0.5
    np.save("other.npy", counts)
    capsys.readouterr()
    flags = ["--run", "trained", "--data", "other.npy", "--out", "run", "--draws", "2", "--rows", "10"]
    assert main(["compare", *flags]) == 2
    assert "other.npy: row 30, column 2 is 0.5, but Poisson takes" in refused(capsys)


@pytest.mark.filterwarnings("always::pyro_vae.errors.DuplicateRowsWarning")
def test_duplicated_rows_are_told_of_in_one_line(folder, capsys):
    rows = np.random.default_rng(1).normal(size=(20, 3))
    np.save("held.npy", np.tile(rows, (3, 1)))
    assert swap("--validation_data", "held.npy") == 0
    said = capsys.readouterr()
    lines = [line for line in said.err.splitlines() if "distinct" in line]
    assert "pyro-vae: x: only 20 of 60 rows are distinct; standard errors are clustered by distinct row" in lines
    assert "60 data in 20 distinct rows" in said.out.replace("\n", " ")


# --- Divergence and Ctrl-C ---

EXPLODES = """
import torch
import pyro_vae as pv


class Explodes(pv.priors.Normal):
    def forward(self, context=None):
        if self.training and self.loc.requires_grad and torch.is_grad_enabled():
            self.loc.data.fill_(float("nan"))
        return super().forward(context)
"""


def test_a_divergence_of_one_is_marked_and_the_others_are_ranked(folder, capsys):
    Path("exploding.py").write_text(EXPLODES)
    assert swap("--priors", "[StandardNormal, exploding.Explodes, Laplace]") == 0
    told = capsys.readouterr()
    assert "pyro-vae: Explodes: the loss became nan at step 1 (epoch 1)" in told.err
    assert [line for line in told.out.splitlines() if "Explodes" in line and "diverged" in line]
    ranked = ranking()
    assert ranked.model.values.tolist()[2] == "Explodes"
    assert ranked.log_evidence.notnull().values.tolist() == [True, True, False]
    assert ranked.note.values[2].startswith("the loss became nan at step 1")
    assert ranked.note.values[:2].tolist() == ["", ""]


def test_where_all_diverge_that_is_said(folder, capsys):
    assert swap("--priors", SECOND, "--optimizer", "torch.optim.SGD", "--optimizer.lr", "1e30") == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert "every combination diverged; the first error: the loss became" in last
    assert not Path("run").exists()


@pytest.mark.parametrize("at", [1, 2])
def test_ctrl_c_ends_the_grid_and_ranks_what_is_wholly_trained(at, folder, trained, monkeypatch, capsys):
    begun, whole = trained, cli_swap.train

    def interrupting(settings, vae, data, **more):
        sent = []

        def interrupt(*_):
            if len(begun) == at and torch.is_grad_enabled() and not sent:  # in a step, where fit waits for its end
                sent.append(os.kill(os.getpid(), signal.SIGINT))

        vae.prior.register_forward_pre_hook(interrupt)
        return whole(settings, vae, data, **more)

    monkeypatch.setattr(cli_swap, "train", interrupting)
    assert swap("--priors", "[StandardNormal, Laplace, Normal]") == 130
    assert len(begun) == at, "no other is begun"
    said = capsys.readouterr().err
    assert f"interrupted: {at - 1} of 3 combinations are trained" in said
    if at == 1:
        assert not Path("run").exists()
    else:
        assert ranking().model.values.tolist() == ["StandardNormal"]


# --- Names and units ---


def test_parts_of_one_name_are_told_by_their_path(folder):
    for module in ("namesake", "another"):
        Path(f"{module}.py").write_text("import pyro_vae as pv\n\n\nclass Namesake(pv.priors.Laplace):\n    pass\n")
    assert swap("--priors", "[namesake.Namesake, another.Namesake, Normal]") == 0
    assert set(ranking().model.values) == {"namesake.Namesake", "another.Namesake", "Normal"}


def test_one_combination_is_named_by_all_its_parts(folder):
    assert swap() == 0
    assert ranking().model.values.tolist() == ["StandardNormal · Normal(learn_scale=True) · DiagNormal"]


def test_probabilities_among_densities_are_told(folder, capsys):
    np.save("bits.npy", np.random.default_rng(0).integers(0, 2, (60, 3)))
    assert swap("--likelihoods", "[Normal, Bernoulli]", data="bits.npy") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "Densities and probabilities are not in the same units" in shown
    assert "Bernoulli (probability)" in shown
    ranked = ranking()
    assert dict(zip(ranked.model.values, ranked.kind.values, strict=True)) == {
        "Normal": "density",
        "Bernoulli": "probability",
    }
    figure = ranking_figure(ranked)
    assert "not in the same units" in figure.get_supxlabel()
    assert swap("--out", "again", "--likelihoods", "[Poisson, Bernoulli]", data="bits.npy") == 0
    assert "not in the same units" not in capsys.readouterr().out


def test_blocks_that_mix_them_in_other_columns_are_told_too():
    x = torch.randint(2, (10, 4)).float()  # too few rows for atoms, which are another matter

    def vae(likelihood):
        torch.manual_seed(0)
        encoder = pv.posteriors.DiagNormal(pv.nn.mlp(4, [4], 4))
        return pv.VAE(prior=pv.priors.StandardNormal(2), decoder=likelihood, encoder=encoder)

    def blocks(*kinds):
        return vae(pv.likelihoods.Blocks(pv.nn.mlp(2, [4], 4), [(kind, 2) for kind in kinds]))

    normal, counts = pv.likelihoods.Normal, pv.likelihoods.Poisson
    pairs = {
        "same": (blocks(normal, counts), blocks(pv.likelihoods.Laplace, pv.likelihoods.Bernoulli), False),
        "other columns": (blocks(normal, counts), blocks(counts, normal), True),
        "numbers": (blocks(normal, counts), vae(normal(pv.nn.mlp(2, [4], 4))), True),
        "counts": (blocks(counts, counts), vae(counts(pv.nn.mlp(2, [4], 4))), False),
    }
    for name, (a, b, mixed) in pairs.items():
        ranked = rank({"a": a, "b": b}, x, num_particles=5)
        assert bool(ranked.attrs["caution"]) == mixed, name
    assert set(ranked.kind.values) == {"probability"}


def test_blocks_from_yaml(folder):
    np.save("mixed.npy", np.c_[np.random.default_rng(0).normal(size=(60, 2)), np.arange(60) % 3])
    Path("swap.yaml").write_text(
        """
likelihoods:
- Normal
- class_path: Blocks
  init_args:
    blocks:
    - [Normal, 2]
    - - class_path: pyro_vae.likelihoods.Categorical
        init_args: {levels: 3}
      - 1
"""
    )
    assert swap("--config", "swap.yaml", data="mixed.npy") == 0
    ranked = ranking()
    name = next(str(name) for name in ranked.model.values if name != "Normal")
    assert name == "Blocks(blocks=[[Normal, 2], [Categorical(levels=3), 1]])"
    assert ranked.kind.sel(model=name) == "both"
    fit = ["fit", "--data", "mixed.npy", "--out", "fitted", *FAST[:6], "--likelihood", "Blocks"]
    assert main([*fit, "--likelihood.blocks", "[[Normal, 1], [HeteroscedasticNormal, 1], [Poisson, 1]]"]) == 0
    elbos = "[STL, {class_path: Renyi, init_args: {alpha: 2.0}}]"
    compare = ["compare", "--run", "fitted", "--out", "compared", "--draws", "2", "--particles", "[1]"]
    assert main([*compare, "--elbos", elbos]) == 0, "it is made again"
    with xr.open_dataset("compared/comparison.nc", engine="h5netcdf") as comparison:
        assert [name.split("(")[0] for name in comparison.estimator.values] == ["STL", "Renyi"]


def test_blocks_of_other_columns_are_refused(folder, capsys):
    fit = ["fit", "--data", "data.npy", "--out", "run", *FAST[:6], "--likelihood", "Blocks"]
    assert main([*fit, "--likelihood.blocks", "[[Normal, 1], [Poisson, 1]]"]) == 2
    assert "the blocks have 2 columns for 3 features; make them equal" in refused(capsys)


# --- The ranking itself ---


def three():
    """Models, best first, and data of the first."""
    right = linear_gaussian()
    models = [LinearGaussian(right.weight, right.bias, right.scale * wrong) for wrong in (1.0, 1.2, 1.5)]
    return models, right.sample(100)


def test_errors_and_differences_belong_to_their_model():
    """Each with a Monte-Carlo error of its own: the best is exact, the others are guided by a diagonal normal."""
    models, x = three()
    vaes = {str(i): model.as_vae(diagonal=i > 0) for i, model in reversed(list(enumerate(models)))}
    ranked = rank(vaes, x, num_particles=50)
    assert ranked.model.values.tolist() == ["0", "1", "2"]
    for name, vae in vaes.items():
        own = pv.log_evidence(vae, x, num_particles=50)
        assert ranked.mcse.sel(model=name) == pytest.approx(float((own.mcse**2).mean()) ** 0.5, rel=1e-9)
        assert ranked.log_evidence.sel(model=name) == pytest.approx(float(own.log_evidence.mean()), rel=1e-12)
        assert ranked.se.sel(model=name) == pytest.approx(float(own.log_evidence.std(ddof=1)) / 10, rel=1e-9)
    assert ranked.mcse.values[0] < 1e-9 < ranked.mcse.values[1] != ranked.mcse.values[2]


def test_the_figures_bars_are_two_standard_errors_about_the_differences():
    models, x = three()
    ranked = rank({str(i): model.as_vae() for i, model in enumerate(models)}, x)
    ranked = with_failures(ranked, {"lost": "the loss became nan"})
    axes = ranking_figure(ranked).axes[0]
    (container,) = axes.containers
    points, _, (bars,) = container
    assert points.get_xdata()[:3] == pytest.approx(ranked.difference.values[:3])
    assert points.get_ydata().tolist() == [0, 1, 2, 3]
    for i, ((left, _), (right, _)) in enumerate(bars.get_segments()[:3]):
        middle, error = ranked.difference.values[i], ranked.difference_se.values[i]
        assert (left, right) == pytest.approx((middle - 2 * error, middle + 2 * error))
    assert ranked.difference_se.values[1] > 0
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2", "lost (diverged)"]
    assert ranking_table(ranked).row_count == 4


def test_one_datum_is_no_ranking_and_data_are_looked_at_first():
    models, x = three()
    with pytest.raises(DataError, match="x holds 1 datum"):
        rank({"a": models[0].as_vae()}, x[:1])
    poisson = models[0].as_vae()
    poisson.decoder = pv.likelihoods.Poisson(poisson.decoder.net)
    with pytest.raises(DataError, match="but Poisson takes"):
        rank({"a": models[0].as_vae(), "b": poisson}, x)
