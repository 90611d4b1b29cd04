"""Tables of scikit-learn as a user has them, with header, index and label: latents, gaps and scores by defaults."""

import warnings

import numpy as np
import pandas as pd
import pytest
from sklearn import datasets

from pyro_vae.cli import main
from pyro_vae.errors import ConstantColumnsWarning

pytestmark = pytest.mark.slow

NAMES = ("wine", "breast_cancer", "diabetes", "iris", "digits")


@pytest.fixture(scope="module", params=NAMES)
def run(request, tmp_path_factory):
    """A run by defaults, the table, and its held-out rows."""
    folder = tmp_path_factory.mktemp(request.param)
    frame = getattr(datasets, f"load_{request.param}")(as_frame=True).frame
    frame.to_csv(folder / "table.csv")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantColumnsWarning)  # corners of digits
        assert (
            main(["fit", "--data", str(folder / "table.csv"), "--label", "target", "--out", str(folder / "run")]) == 0
        )
    assert main(["encode", str(folder / "run"), "--out", str(folder / "latents.csv")]) == 0
    held_out = pd.read_csv(folder / "latents.csv", index_col=0).index
    return request.param, folder, frame.drop(columns="target"), held_out


def call(folder, command, table):
    path, out = folder / f"{command}_in.csv", folder / f"{command}.parquet"
    table.to_csv(path)
    out.unlink(missing_ok=True)
    assert main([command, str(folder / "run"), "--data", str(path), "--out", str(out)]) == 0
    return pd.read_parquet(out)


def test_latents_and_scores_are_those_of_the_user_s_rows(run):
    _, folder, table, held_out = run
    assert len(held_out) == round(0.2 * len(table))
    latents = call(folder, "encode", table)
    assert latents.index.tolist() == table.index.tolist()
    assert np.isfinite(latents.to_numpy()).all()
    scores = call(folder, "score", table.loc[held_out])
    assert scores.index.tolist() == held_out.tolist()
    assert (scores.khat < 0.7).mean() > 0.5


def test_gaps_are_filled_better_than_by_column_means(run):
    """A tenth of the held-out values is blanked; those that were observed come back as they were."""
    name, folder, table, held_out = run
    whole = table.loc[held_out]
    gaps = np.random.default_rng(0).random(whole.shape) < 0.1
    gaps[gaps.all(1)] = False
    filled = call(folder, "impute", whole.mask(gaps))[list(table.columns)]
    np.testing.assert_array_equal(filled.to_numpy()[~gaps], whole.to_numpy(float)[~gaps])
    rest = table.drop(index=held_out)
    sd = np.where(rest.std() > 0, rest.std(), 1.0)
    error = (((filled - whole) / sd).to_numpy()[gaps] ** 2).mean()
    of_means = (((rest.mean() - whole) / sd).to_numpy()[gaps] ** 2).mean()
    print(f"{name}: standardized squared error {error:.2f}, of column means {of_means:.2f}")
    assert error < 0.9 * of_means


def test_planted_outliers_are_found(run):
    """One value of a held-out row is moved by eight standard deviations: most such rows have a small p-value."""
    name, folder, table, held_out = run
    generator = np.random.default_rng(0)
    odd, sd = table.loc[held_out].to_numpy(float, copy=True), table.std().to_numpy()
    column = generator.choice(np.flatnonzero(sd > 0), len(odd))
    odd[np.arange(len(odd)), column] += 8 * sd[column] * generator.choice([-1, 1], len(odd))
    scores = call(folder, "score", pd.DataFrame(odd, held_out, table.columns))
    found = float((scores.p_value <= 0.05).mean())
    print(f"{name}: {found:.2f} of {len(odd)} outliers have p ≤ 0.05")
    assert found > 0.5
