"""Tables as polars and anndata themselves make them."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.errors import DataError

polars = pytest.importorskip("polars")


def test_a_table_of_polars_with_gaps_codes_and_a_label():
    table = polars.DataFrame({
        "a": [1, 3, 5], "b": [2.0, None, 4.0], "kind": ["u", "v", "u"],
        "small": polars.Series([1, 2, 3], dtype=polars.Int8),
        "code": polars.Series(["x", "y", "x"], dtype=polars.Categorical),
    })  # fmt: skip
    data = pv.data.load(table, missing="nan", label="kind")
    assert data.columns == ["a", "b", "small", "code"]
    assert data.x.tolist() == [[1, 2, 1, 0], [3, 0, 2, 1], [5, 4, 3, 0]]
    assert data.mask.tolist() == [[True] * 4, [True, False, True, True], [True] * 4]
    assert data.categories == {"code": ["x", "y"]}
    assert data.label_names == ["u", "v"]


def test_a_column_of_polars_and_one_that_has_no_values_yet():
    table = polars.DataFrame({"a": [1.5, 2.5]})
    data = pv.data.load(table["a"])
    assert (data.columns, data.x.tolist()) == (["a"], [[1.5], [2.5]])
    with pytest.raises(DataError, match="a LazyFrame is lazy and has no values; give the result of its collect\\(\\)"):
        pv.data.load(table.lazy())


def names(letter, number):
    return [f"{letter}{i}" for i in range(number)]


def test_cells_in_memory_and_in_a_file(tmp_path):
    anndata = pytest.importorskip("anndata", reason="anndata 0.12 takes no pandas 3, which the tested set has")
    counts = np.random.default_rng(0).poisson(2, (20, 6))
    cells = anndata.AnnData(
        X=np.log1p(counts).astype(np.float32),
        obs=pd.DataFrame({"type": pd.Categorical(["a", "b"] * 10), "age": np.arange(20.0)}, names("c", 20)),
        var=pd.DataFrame(index=names("g", 6)), layers={"counts": counts},
    )  # fmt: skip
    anndata.settings.allow_write_nullable_strings = True  # pandas 3 knows no other ones
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for source in (cells, tmp_path / "cells.h5ad"):
        data = pv.data.load(source, key="counts", label="type", context="age")
        assert torch.equal(data.x, torch.from_numpy(counts).float())
        assert data.columns == names("g", 6)
        assert data.row_labels.tolist() == names("c", 20)
        assert data.labels.tolist() == [0, 1] * 10
        assert data.context[:, 0].tolist() == list(range(20))
        assert pv.data.load(source).x.numpy() == pytest.approx(np.log1p(counts), rel=1e-6)
    with pytest.raises(DataError, match="there is no layer 'raw'; it has \\['counts'\\]"):
        pv.data.load(tmp_path / "cells.h5ad", key="raw")
