"""The labels of rows and classes are what the file says: no code of missing values, and no other number."""

import numpy as np
import pandas as pd
import pytest
import torch

import pyro_vae as pv
from pyro_vae.data import load
from pyro_vae.data.text import read_text
from pyro_vae.errors import DataError

COUNTED = pd.DataFrame({"a": np.arange(130) + 0.5, "b": np.arange(130) - 0.25})


def written(tmp_path, text):
    path = tmp_path / "a.csv"
    path.write_text(text)
    return path


@pytest.mark.parametrize("code", ["0", "9", "99", "129"])
@pytest.mark.parametrize("index", [None, "id"])
def test_a_missing_code_among_the_row_labels_is_a_label(code, index, tmp_path):
    table = COUNTED if index is None else COUNTED.rename_axis(index)
    table.to_csv(tmp_path / "a.csv")
    frame = table.reset_index(names=index or "Unnamed: 0")
    for source in (tmp_path / "a.csv", frame, frame.astype({index or "Unnamed: 0": str})):
        data = load(source, index=index, missing=code)
        assert data.columns == ["a", "b"]
        assert [*map(str, data.row_labels.tolist())] == [*map(str, range(130))]


AS_WRITTEN = {
    "leading zeros": (["01234", "501"], ["01234", "501"]),
    "numbers that are equal": (["007", "7"], ["007", "7"]),
    "wells": (["1E5", "1E05"], ["1E5", "1E05"]),
    "an empty one": (["97", "", "98"], ["97", "", "98"]),
    "Namibia": (["NA", "DE", "nan"], ["NA", "DE", "nan"]),
    "outer spaces": ([" x ", "y  "], ["x", "y"]),
    "integers": (["7", "10", "-3"], [7, 10, -3]),
    "integers that repeat": (["7", "7"], [7, 7]),
    "integers above 2⁶³": (["18446744073709551615", "1"], [2**64 - 1, 1]),
    "integers above 2⁶⁴": (["18446744073709551616", "1"], ["18446744073709551616", "1"]),
    "large and negative": (["9223372036854775808", "-1"], ["9223372036854775808", "-1"]),
    "times": (["0.5", "1.5", "1.5"], [0.5, 1.5, 1.5]),
    "times of two digits": (["0.50", "1.5"], ["0.50", "1.5"]),
    "minus zero": (["-0", "0"], ["-0", "0"]),
    "infinite": (["inf", "1.5"], ["inf", "1.5"]),
    "booleans": (["TRUE", "True"], ["TRUE", "True"]),
    "digits of another script": (["٣", "3"], ["٣", "3"]),
}


@pytest.mark.parametrize(("ids", "expected"), AS_WRITTEN.values(), ids=AS_WRITTEN)
@pytest.mark.parametrize("header", ["id,a,b", ",a,b", "a,b"], ids=["named", "unnamed", "one cell more"])
def test_row_labels_keep_what_is_written(header, ids, expected, tmp_path):
    lines = [f"{name},{i},{i + 0.5}" for i, name in enumerate(ids)]
    data = load(written(tmp_path, "\n".join([header, *lines])), index="id" if "id" in header else None, missing="NA")
    assert data.columns == ["a", "b"]
    assert data.x[:, 0].tolist() == [*range(len(ids))]
    assert data.row_labels.tolist() == expected


def test_the_last_column_holds_row_labels_and_short_rows_are_refused(tmp_path):
    assert load(written(tmp_path, "a,id\n1,07\n2,7\n"), index="id").row_labels.tolist() == ["07", "7"]
    with pytest.raises(DataError, match="row 1 has 1 value, but the table has 2 columns"):
        load(written(tmp_path, "a,id\n1,07\n2\n"), index="id")


def test_times_with_decimal_commas_are_numbers(tmp_path):
    data = load(written(tmp_path, "t;a;b\n0,5;1,5;2,5\n1,5;3,5;4,5\n"), index="t")
    assert data.row_labels.tolist() == [0.5, 1.5]
    data = load(written(tmp_path, "t;a;b\n0,5;1,5;2,5\n0.5;3,5;4,5\n"), index="t")
    assert data.row_labels.tolist() == ["0,5", "0.5"]


CLASSES = {
    "leading zeros": (["007", "7", "07", "7"], [0, 2, 1, 2], ["007", "07", "7"]),
    "powers of ten": (["1E5", "100000", "1E5", "1e5"], [1, 0, 1, 2], ["100000", "1E5", "1e5"]),
    "integers": (["3", "1", "3", "2"], [3, 1, 3, 2], None),
    "integers as floats": (["1.0", "2.0", "1.0", "2.0"], [1, 2, 1, 2], None),
    "booleans": (["TRUE", "FALSE", "TRUE", "TRUE"], [1, 0, 1, 1], ["FALSE", "TRUE"]),
    "outer spaces": (["u ", "u", "v", "v "], [0, 0, 1, 1], ["u", "v"]),
}


@pytest.mark.parametrize(("classes", "labels", "names"), CLASSES.values(), ids=CLASSES)
@pytest.mark.parametrize("leading", [False, True], ids=["", "rows one cell longer"])
def test_class_labels_keep_what_is_written(leading, classes, labels, names, tmp_path):
    lines = [f"{'r,' * leading}{i},{i + 0.5},{name}" for i, name in enumerate(classes)]
    data = load(written(tmp_path, "\n".join(["a,b,y", *lines])), label="y")
    assert data.labels.tolist() == labels
    assert data.label_names == names


@pytest.mark.parametrize("classes", [["0.50", "1.25"], ["1", "2.5"], ["1,0", "2,5"], ["1", "NA"]])
def test_class_labels_that_are_fractions_or_missing_are_refused(classes, tmp_path):
    text = "a;b;y\n" + "".join(f"{i},5;{i},25;{name}\n" for i, name in enumerate(classes))
    if "," not in classes[0]:
        text = text.replace(",", ".")
    with pytest.raises(DataError, match=r"contains fractions, but labels are|row 1 has no label"):
        load(written(tmp_path, text), label="y")


UNNAMED = {
    "two tables in one": (pd.concat([COUNTED[:3], COUNTED[:3]]), [0, 1, 2] * 2),
    "a bootstrap sample": (COUNTED.iloc[[5, 5, 1]], [5, 5, 1]),
    "a missing one": (COUNTED[:3].set_axis(["x", None, "y"]), ["x", "", "y"]),
    "a missing number": (COUNTED[:3].set_axis([97, np.nan, 99]), ["97", "", "99"]),
}


@pytest.mark.parametrize(("table", "labels"), UNNAMED.values(), ids=UNNAMED)
def test_an_unnamed_first_column_holds_the_row_labels(table, labels, tmp_path):
    path = tmp_path / "a.csv"
    table.rename(index={97.0: "97", 99.0: "99"}).to_csv(path)
    for source in (path, table, table.reset_index(names="Unnamed: 0"), table.reset_index(names="")):
        data = load(source)
        assert data.columns == ["a", "b"]
        assert data.row_labels.tolist() == labels


def test_an_unnamed_first_column_is_data_if_it_is_said_to_be(tmp_path):
    path = written(tmp_path, ",a\n1,2\n1,4\n")
    for chosen in ({"index": ""}, {"columns": ["Unnamed: 0", "a"]}):
        data = load(path, **chosen)
        assert data.row_labels is None
        assert data.x.tolist() == [[1, 2], [1, 4]]
        assert load(path, like=data).x.tolist() == [[1, 2], [1, 4]]
        assert load(path, like=data, index="").columns == ["Unnamed: 0", "a"]
    assert load(path, label="Unnamed: 0").labels.tolist() == [1, 1]
    assert load(path, drop="Unnamed: 0").row_labels is None


def test_an_unnamed_first_column_is_no_data_beside_other_row_labels(tmp_path):
    data = load(written(tmp_path, ",id,a\n0,u,2.5\n1,v,4.5\n"), index="id")
    assert data.columns == ["a"]
    assert data.row_labels.tolist() == ["u", "v"]
    assert "row labels from column 'id'; the unnamed first column left out" in data.summary
    saved = COUNTED.reset_index(names="Unnamed: 0")
    assert load(saved[saved.a > 100]).columns == ["a", "b"]


def test_an_index_that_was_saved_several_times_is_no_data(tmp_path):
    COUNTED.to_csv(tmp_path / "1.csv")
    for i in range(1, 4):
        pd.read_csv(tmp_path / f"{i}.csv").to_csv(tmp_path / f"{i + 1}.csv")
        data = load(tmp_path / f"{i + 1}.csv")
        assert data.columns == ["a", "b"]
        assert "'Unnamed: 0' left out" in data.summary


def test_a_separator_at_the_start_of_each_line_makes_no_row_labels(tmp_path):
    data = load(written(tmp_path, ",a,b\n,1,2\n,3,4\n"))
    assert data.row_labels is None
    assert data.columns == ["a", "b"]


def test_unsigned_row_labels_do_not_become_negative():
    table = pd.DataFrame({"id": pd.array([2**64 - 1, 1], "UInt64"), "a": [1.0, 2.0]})
    assert load(table, index="id").row_labels.tolist() == [2**64 - 1, 1]


@pytest.mark.parametrize("option", ["columns", "context"])
def test_a_column_listed_twice_is_refused(option):
    with pytest.raises(DataError, match=f"column 'a' is given 2 times in {option}; give it once"):
        load(COUNTED, **{option: ["a", "b", "a"]})


@pytest.mark.parametrize("cell", ["1.234", "1.234,5"])
def test_points_between_thousands_are_refused_in_context_too(cell, tmp_path):
    path = written(tmp_path, "a;b;w\n" + f"1,5;2,5;{cell}\n" * 4)
    with pytest.raises(DataError, match=r"column 'w' has '1\.234.*', but the decimals are commas"):
        load(path, context="w")


BLANK = {
    "between": ("a\n1.5\n\n2.5\n", "row 1 is blank"),
    "of spaces": ("a\n1.5\n2.5\n  \n\n3.5\n", "row 2 is blank"),
    "without a header": ("1.5\n\n2.5\n", "row 1 is blank"),
    "below the header": ("a\n\n2.5\n", "row 0 is blank"),
    "with a comment above": ("# c\n\na\n1.5\n\n2.5\n", "row 1 is blank"),
}


@pytest.mark.parametrize(("text", "says"), BLANK.values(), ids=BLANK)
@pytest.mark.parametrize("missing", [None, "nan"])
def test_a_blank_line_between_the_rows_of_a_single_column_is_refused(text, says, missing, tmp_path):
    with pytest.raises(DataError, match=rf"^\S+: {says}; write nan"):
        load(written(tmp_path, text), missing=missing)


@pytest.mark.parametrize("text", ["\n\na\n1.5\n2.5\n\n \n", '"a\n\nb"\n1.5\n2.5\n', "a\r\n1.5\r\n2.5\r\n\r\n"])
def test_blank_lines_around_a_single_column_are_ignored(text, tmp_path):
    assert load(written(tmp_path, text)).x.tolist() == [[1.5], [2.5]]


def test_a_huge_cell_of_a_single_column_is_refused_in_a_sentence(tmp_path):
    with pytest.raises(DataError, match=r"not a table \(.*check its quotes"):
        load(written(tmp_path, "a\n1.5\n" + "7" * 2**18 + "\n"))


def test_a_quoted_empty_cell_of_a_single_column_is_missing(tmp_path):
    pd.DataFrame({"a": [1.5, None, 2.5, None]}).to_csv(tmp_path / "a.csv", index=False)
    frame, _ = read_text(tmp_path / "a.csv")
    assert frame.a.isna().tolist() == [False, True, False, True]


@pytest.mark.parametrize("known", [None, {"a": ["1"]}])
def test_categories_of_one_text_are_refused(known):
    table = pd.DataFrame({"a": pd.Categorical([1, "1", 1, "1"]), "b": [1.5, 2.5, 3.5, 4.5]})
    like = None if known is None else pv.data.Data(torch.empty(0), columns=["a", "b"], categories=known)
    with pytest.raises(DataError, match="column 'a' has two categories with the text '1'"):
        load(table, like=like)


@pytest.mark.parametrize("names", [["FALSE", "TRUE", "unknown"], ["true", "false", "?"]])
def test_booleans_are_the_categories_of_their_text(names, tmp_path):
    like = load(pd.DataFrame({"a": names * 3, "b": np.arange(9) / 2}))
    data = load(written(tmp_path, "a,b\nTRUE,0.5\nFALSE,1.5\n"), like=like)
    assert [like.categories["a"][int(code)].upper() for code in data.x[:, 0]] == ["TRUE", "FALSE"]


def test_booleans_of_two_categories_are_refused():
    like = load(pd.DataFrame({"a": ["TRUE", "true", "FALSE"] * 3, "b": np.arange(9) / 2}))
    with pytest.raises(DataError, match="is True, not one of its categories 'FALSE', 'TRUE', 'true'"):
        load(pd.DataFrame({"a": [True, False], "b": [0.5, 1.5]}), like=like)
