"""Tables as people have them: each file and frame becomes the right table, or is refused in the right sentence."""

import base64
import csv
import gzip
import re
import sys
import types
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.io
import scipy.sparse
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pyarrow import parquet

import pyro_vae as pv
from pyro_vae.data import Data, load, mask_nan, rows_of
from pyro_vae.data.columns import numbers_of
from pyro_vae.data.fingerprint import Trained
from pyro_vae.data.precision import coarse_columns, narrow, unrounded
from pyro_vae.data.values import matched
from pyro_vae.errors import DataError, SettingsError

SQUARE = [[1.0, 2.0], [3.0, 4.0]]
NAN = float("nan")


@dataclass(frozen=True)
class Case:
    """Data, how they are to be read, and what must come of them.

    Args:
        title: what is awkward.
        data: the text or bytes of the file, what writes it, or what makes data in memory.
        name: of the file; none for data in memory.
        options: of ``load``.
        x: the numbers, NaN where missing.
        has: other attributes of the data.
        says: fragments of what is said of the reading, or of the error if ``x`` is not given.
    """

    title: str
    data: str | bytes | Callable[..., Any]
    name: str | None = "a.csv"
    options: dict[str, Any] = field(default_factory=dict)
    x: list[list[float]] | None = None
    has: dict[str, Any] = field(default_factory=dict)
    says: tuple[str, ...] = ()


def text(title: str, data: str | bytes, x: Any = SQUARE, *says: str, name: str = "a.csv", has: Any = None, **options):
    """A file of text that becomes a table."""
    return Case(title, data, name, options, x, has or {}, says)


def bad(title: str, data: Any, *says: str, name: str | None = "a.csv", **options) -> Case:
    """Data that are refused."""
    return Case(title, data, name, options, None, {}, says)


def made(title: str, make: Callable[[], Any], x: Any = SQUARE, *says: str, has: Any = None, **options) -> Case:
    """Data in memory that become a table."""
    return Case(title, make, None, options, x, has or {}, says)


def zipped(**files: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in files.items():
                archive.writestr(name.replace("_", "."), content)

    return write


class Streamed:
    """A table of some library that has Arrow's protocol and nothing else, as polars."""

    def __init__(self, **columns: Any) -> None:
        self.table = pa.table(columns)

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


class Interchanged:
    """A table of some library that has the older protocol only."""

    def __init__(self, **columns: Any) -> None:
        self.table = pa.table(columns)

    def __dataframe__(self, *args, **more):
        return self.table.__dataframe__(*args, **more)


class Annotated:
    """As much of an AnnData as is read."""

    obs_names, var_names = pd.Index(["cell1", "cell2"]), pd.Index(["gene1", "gene2"])
    X, layers = scipy.sparse.csr_array(SQUARE), {"counts": np.array([[5, 6], [7, 8]])}
    obs = pd.DataFrame({"kind": ["T", "B"]}, index=obs_names)


def frame(**columns: Any) -> Callable[[], pd.DataFrame]:
    return lambda: pd.DataFrame(columns)


AB = {"columns": ["a", "b"]}
EITHER = "may be names or data"
DIGITS = "\n".join([",".join(map(str, range(12))), ",".join("9" * 12), ",".join("7" * 12)])
F = {"columns": ["f0", "f1"]}
IRIS = "5.1,3.5,setosa\n4.9,3.0,setosa\n6.3,3.3,virginica\n5.8,2.7,virginica\n"

DIALECTS = [
    text("commas", "a,b\n1,2\n3,4\n", SQUARE, "read 2 rows, 2 columns", has=AB),
    text("semicolons", "a;b\n1;2\n3;4\n", SQUARE, "separated by semicolons", has=AB),
    text("semicolons and decimal commas", "a;b\n1,5;2\n3;4,25\n", [[1.5, 2], [3, 4.25]], "decimal commas", has=AB),
    text("decimal commas without a header", "1,5;2,5\n3,5;4,5\n", [[1.5, 2.5], [3.5, 4.5]], "no header", has=F),
    text("tabs", "a\tb\n1\t2\n3\t4\n", SQUARE, "separated by tabs", name="a.tsv", has=AB),
    text("tabs in a .txt", "a\tb\n1\t2\n3\t4\n", SQUARE, "separated by tabs", name="a.txt", has=AB),
    text("spaces, as savetxt writes", "1.0 2.0\n3.0 4.0\n", SQUARE, "separated by spaces", name="a.txt", has=F),
    text("aligned by several spaces", "  a    b\n  1    2\n 3.0   4\n", SQUARE, "spaces", name="a.txt", has=AB),
    text("bars", "a|b\n1|2\n3|4\n", SQUARE, "separated by bars", has=AB),
    text("spaces behind commas", "a, b\n1, 2\n3, 4\n", SQUARE, has=AB),
    text("a separator asked for", "a:b\n1:2\n3:4\n", SQUARE, sep=":", has=AB),
    text("a separator by its name", "a\tb\n1\t2\n3\t4\n", SQUARE, sep="tabs", has=AB),
    text("decimals asked for", "a;b\n1,000;2,000\n3;4\n", SQUARE, decimal=",", has=AB),
    text(
        "a comment above",
        "# made on Monday, by hand\na,b\n1,2\n3,4\n",
        SQUARE,
        "1 line above the table skipped",
        has=AB,
    ),
    text("comments and a blank line above", "\n# one\n#two, too\n\na,b\n1,2\n3,4\n", SQUARE, "4 lines above", has=AB),
    text("a quote in a comment", '# units: s,"m\n"a","b"\n1,2\n3,4\n', SQUARE, "1 line above", has=AB),
    bad("a name twice", "a, a \n1.5,2\n3,4\n", "2 columns have the name 'a'; rename them"),
    bad("a comment in between", "a,b\n1,2\n# a pause\n3,4\n", "row 1 starts with #; delete comments below"),
    bad("a comment behind numbers", "a,b\n1,2\n3,4 # tired\n", "row 1, column 'b' is '4 # tired', not a number"),
    text(
        "an error of Excel in the first column",
        "a,b\n1,2\n#N/A,6\n9,#N/A\n",
        [[1, 2], [NAN, 6], [9, NAN]],
        missing="nan",
    ),
    text("the same in the first line", "#N/A,2\n3,4\n", [[NAN, 2], [3, 4]], missing="nan", has=F),
    bad("another error of Excel", "a,b\n#DIV/0!,2\n3,4\n", "row 0, column 'a' is '#DIV/0!', not a number"),
    text(
        "text with #", "# made by hand\na,b\n1,S#1\n3,S#2\n", [[1], [3]], label="b", has={"label_names": ["S#1", "S#2"]}
    ),
    bad("points between thousands", "a;c;b\n1,5;2,5;1.234\n", "column 'b' has '1.234', but the decimals are commas"),
    text(
        "dates beside decimal commas",
        "d;a;b\n01.02.2020;1,5;2,5\n02.02.2020;3,5;4,5\n",
        [[1.5, 2.5], [3.5, 4.5]],
        index="d",
    ),
    text("versions as labels", "d;a;b\n1.1;1,5;2,5\n1.2;3,5;4,5\n", [[1.5, 2.5], [3.5, 4.5]], label="d"),
    bad(
        "points as decimals beside commas", "a;c;b\n1,5;2,5;1.2\n", "column 'b' has '1.2', but the decimals are commas"
    ),
    bad("points between thousands, twice", "a;b\n" + "1,5;1.234,5\n" * 4, "'1.234,5', but the decimals are commas"),
    text("quoted names with commas in them", '"a, cm","b"\n1,2\n3,4\n', SQUARE, has={"columns": ["a, cm", "b"]}),
    text("a byte order mark", "\ufeffa,b\n1,2\n3,4\n".encode(), SQUARE, has=AB),
    text("UTF-16, as Excel saves text", "a\tb\n1\t2\n3\t4\n".encode("utf-16"), SQUARE, name="a.txt", has=AB),
    text("Windows and old Mac lines", "a,b\r\n1,2\r\n3,4\r\n", SQUARE, has=AB),
    text("names in other scripts", "größe,重さ\n1,2\n3,4\n", SQUARE, has={"columns": ["größe", "重さ"]}),
    text("gzipped", gzip.compress(b"a;b\n1;2\n3;4\n"), SQUARE, "semicolons", name="a.csv.gz", has=AB),
    Case("zipped", zipped(a_csv="a;b\n1;2\n3;4\n"), "a.zip", {}, SQUARE, AB, ("semicolons",)),
    bad("two tables in a zip", zipped(a_csv="a\n1\n", b_csv="b\n1\n"), "['a.csv', 'b.csv']", name="a.zip"),
    bad("no zip at all", b"abc", "cannot be read", "not a zip file", name="a.zip"),
    text("a separator behind each value", "a,b\n1,2,\n3,4,\n", SQUARE, has=AB),
    text("a separator behind the header too", "a,b,\n1,2,\n3,4,\n", SQUARE, "1 empty column left out", has=AB),
    text("a single column", "a\n1\n3\n", [[1], [3]], has={"columns": ["a"]}),
    text("integers first and fractions later", "a\n" + "1\n" * 3 + "1.5\n", [[1], [1], [1], [1.5]]),
    text("quoted decimal commas", 'a,b\n"1,5",2\n"3,5",4\n', [[1.5, 2], [3.5, 4]], sep=",", decimal=","),
    bad("a separator that is the decimal point", "a.b\n1.2\n", "both '.'", sep="."),
    bad("a separator of two characters", "a::b\n1::2\n", "sep is '::'", "one character", sep="::"),
    bad("thousands", 'a,b\n"1,234",2\n"3,456",4\n', "column 'a' is '1,234'", "not a number"),
    bad("percents", "a,b\n5%,2\n10%,4\n5%,2\n10%,4\n", "column 'a' is '5%', not a number"),
    bad("two labels", "a,b\n1,2\n3,4\n", "index is 0; give the name of a column", index=0),
    bad("a header of 0", "a,b\n1,2\n3,4\n", "header is 0; give True or False", header=0),
    bad("a short row", "a;b\n1;2\n3\n", "row 1 has 1 value, but", "2 columns"),
    bad("a short row where missing values are taken", "a b\n1 2\n3\n", "row 1 has 1 value", missing="nan"),
    bad("a long first row", "a,b\n1,2,3\n4,5\n", "row 1 has 2 values"),
]

GROUPS = "name;group;value\na;x;1,5\nb;y;2,7\n"
DECIMAL = [[1.5], [2.7]]
SEPARATORS = [
    text("a date and a decimal comma", "Datum;Wert\n1.1.20;1,5\n2.1.20;2,7\n", DECIMAL, "semicolons", index="Datum"),
    text("a name and a decimal comma", "name;value\na;1,5\nb;2,7\n", DECIMAL, "decimal commas", index="name"),
    text("two names and a decimal comma", GROUPS, DECIMAL, "semicolons", index="name", drop="group"),
    text("a decimal comma behind a tab", "a\tb\nx\t1,5\ny\t2,7\n", DECIMAL, "tabs", name="a.tsv", index="a"),
    text("a decimal comma behind a bar", "a|b, m\nx|1,5\ny|2,7\n", DECIMAL, "bars", index="a"),
    text("no header and a decimal comma", "1.1.20;1,5\n2.1.20;2,7\n", DECIMAL, "semicolons", "no header", index="f0"),
    text("a name with a comma", "Datum, Zeit;b\n1.1.20;1,5\n2.1.20;2,7\n", DECIMAL, "semicolons", index="Datum, Zeit"),
    text("spaces in a name and in cells", "patient name,age\nP 1,34\nP 2,40\n", [[34], [40]], index="patient name"),
    text("quoted semicolons", '"a;b","c;d"\n"x;y","3;4"\n"x;y","3;4"\n', [[0, 0]] * 2, has={"columns": ["a;b", "c;d"]}),
    text("three decimals and a zero", "a\tb\n1\t1,234\n2\t0,345\n", [[1, 1.234], [2, 0.345]], "decimal commas"),
    text("three decimals between semicolons", "a;b\n1;1,234\n2;2,345\n", [[1, 1.234], [2, 2.345]], "decimal commas"),
    text("one column, decimal asked for", "value\n1,5\n2,7\n", DECIMAL, decimal=","),
    text("one column, separator asked for", "value\n1,5\n2,7\n", [[5], [7]], sep=",", has={"row_labels": [1, 2]}),
    text("one column and row names of R", '"x"\n"1" 5\n"2" 7\n', [[5], [7]], has={"row_labels": [1, 2]}),
    text("the same with commas", '"x"\n"1",5\n"2",7\n', [[5], [7]], has={"row_labels": [1, 2]}),
    text("the same with names", "x\nr1,5\nr2,7\n", [[5], [7]], has={"row_labels": ["r1", "r2"]}),
    text("R's write.csv2", '"";"x"\n"r1";1,5\n"r2";2,7\n', DECIMAL, has={"row_labels": ["r1", "r2"]}),
    text("row names of R, decimal commas", '"x"\n"r1";1,5\n"r2";2,7\n', DECIMAL, has={"row_labels": ["r1", "r2"]}),
    text("Excel's line sep=", "sep=;\na;b\n1;2\n3;4\n", SQUARE, "semicolons", "1 line above the table skipped", has=AB),
    text("the same for tabs", "\ufeffsep=\t\r\na\tb\r\n1\t2\r\n3\t4\r\n", SQUARE, "tabs", "1 line above", has=AB),
    text("Excel's line and a comment", '"sep=|"\n# x\na|b\n1|2\n3|4\n', SQUARE, "2 lines above", has=AB),
    bad("one column of decimal commas", "value\n1,5\n2,7\n", "'1,5' may be one number or two; give decimal or sep"),
    bad("one column of thousands", "value\n1 234\n2 345\n", "'1 234' may be one number or two"),
    bad("one column of thousands and commas", "value\n1,234.5\n2,345.5\n", "'1,234.5' may be one number or two"),
    bad("decimal commas or thousands", "a\tb\nx\t1,234\ny\t2,345\n", "'1,234' may be decimal or between thousands"),
    bad("thousands with spaces", "a;b\n1 234;1,5\n2 345;2,5\n", "column 'a' is '1 234', not a number"),
    bad("thousands with spaces beside commas", "a,b\n1 234,1\n2 345,2\n", "column 'a' is '1 234', not a number"),
    bad("the same below a name with a space", "Net x,b\n1 234,1\n2 345,2\n", "may be separated by commas or spaces"),
    bad("commas or semicolons", "a x;o;1,5\nb;p;2,7\n", "may be separated by semicolons or commas; give sep"),
    bad("commas or spaces", "1,5 a\n2,5 b\n", "may be separated by spaces or commas; give sep"),
    bad("row labels and a short row", "a\nx,1\ny\n", "row 1 has 1 value, but the table has 1 column and row labels;"),
    bad(
        "an end without a separator", "a,b\n1,2,\n3,4,\n5,6\n",
        "row 2 has 2 values, but the table has 2 columns and a separator at the end of each row;",
    ),
]  # fmt: skip

HEADERS = [
    bad("two names of pandas above fractions", "0,1\n1.0,2.0\n3.0,4.0\n", EITHER),
    text("three names of pandas above fractions", "0,1,2\n1.5,2.0,9.0\n3.0,4.0,9.5\n", [[1.5, 2, 9], [3, 4, 9.5]]),
    text("an index and a header of 0, 1", ",0,1\n0,1,2\n1,3,4\n", SQUARE, "row labels", has={"columns": ["0", "1"]}),
    bad("years above fractions and whole numbers", "2001,2002\n1.5,2\n3,4\n", EITHER),
    text("countries and years", "land,2001,2002\nA,1,2\nB,3,4\n", index="land", has={"columns": ["2001", "2002"]}),
    bad("1, 2 above fractions", "1,2\n1.5,0.3\n", EITHER),
    text("one column without a header", "5\n1.5\n2.7\n", [[5], [1.5], [2.7]], "no header", has={"columns": ["f0"]}),
    text("a column that pandas named 0, with an index", ",0\n0,1.5\n1,2.5\n", [[1.5], [2.5]], has={"columns": ["0"]}),
    text("a year, with an index of text", ",2019\na,1.5\nb,2.5\n", [[1.5], [2.5]], has={"row_labels": ["a", "b"]}),
    bad("one column below 0", "0\n1.5\n2.5\n", EITHER),
    text("numbers that only look like years", "2001,1999\n3,4\n", [[2001, 1999], [3, 4]], has=F),
    text("no header, two integers in turn", "1,2\n3,4\n", SQUARE, "no header", has=F),
    text("no header, a gap in the first row", "NA,2\n3,4\n", [[NAN, 2], [3, 4]], missing="nan", has=F),
    text("a header asked for", "5,3\n1,2\n3,4\n", SQUARE, header=True, has={"columns": ["5", "3"]}),
    text("no header asked for", "0,1\n2,3\n", [[0, 1], [2, 3]], header=False, has=F),
    text(
        "iris without a header", IRIS, [[5.1, 3.5], [4.9, 3], [6.3, 3.3], [5.8, 2.7]], "labels from column 'f2'",
        label="f2", has={"labels": [0, 0, 1, 1], "label_names": ["setosa", "virginica"]},
    ),
    text("names with spaces around", " a , b\n1,2\n3,4\n", has=AB),
]  # fmt: skip

NOTE, EITHER = "the first line names the columns", "may be names or data; give header"
SPECTRA = "class,400,402,404\na,.1,.2,.3\nb,.1,.3,.3\na,.1,.3,.5\n"
SPECTRUM = [[0.1, 0.2, 0.3], [0.1, 0.3, 0.3], [0.1, 0.3, 0.5]]
FINE = ",".join(str(400 + i / 2) for i in range(10))
FIRST_LINES = [
    bad("a series that starts with 0, 1", "0,1\n0.1,0.995\n0.2,0.98\n", EITHER),
    bad("whole numbers above mixed ones", "100,200,300\n1.5,2.5,3.5\n2,3,4\n", EITHER),
    bad("wavelengths in the range of the values", "200,250,300\n223.0,79.2,739.1\n413.5,120.3,2.8\n", EITHER),
    bad("text and a number above the like", "group,450\nA,0.1\nB,0.2\nA,0.3\n", EITHER),
    bad("doses beside text", "dose,0,10,20\nA,1.5,2.5,30\nB,4,50,6\nA,1,2,3\n", EITHER),
    bad("genes by number, below an empty cell", ",30,10,20\n7,15,22,3\n9,31,4,25\n5,14,14,14\n", EITHER, missing="nan"),
    text("an option names the header", "dose,0,10,20\nA,1,2,30\nB,4,50,6\n", [[1, 2, 30], [4, 50, 6]], index="dose"),
    text("all pixels named", DIGITS, [[9] * 12, [7] * 12], NOTE),
    text("a class named y beside y and n", "y,a\ny,0\nn,1\nn,3\n", [[0], [1], [3]], label="y"),
    text("MNIST with its label", "label,0,1\n5,0,9\n4,9,0\n", [[0, 9], [9, 0]], NOTE, label="label"),
    text("MNIST without a header", "5,0,0\n4,9,0\n", [[0, 0], [9, 0]], "no header", label="f0"),
    text("years beside names", "land,2001,2002\nA,1,2\nB,3,4\n", SQUARE, NOTE, index="land"),
    text("years beside an index that counts", ",2001,2002\n0,1,2\n1,3,4\n", SQUARE, has={"row_labels": [0, 1]}),
    text("years beside an index of text", ",2001,2002\nx,1,2\ny,3,4\n", SQUARE, has={"row_labels": ["x", "y"]}),
    text("numbers above row names", '"1" "2"\n"x" 1 2\n"y" 3 4\n', SQUARE, NOTE, has={"row_labels": ["x", "y"]}),
    text("wavelengths", "400,402,404\n.1,.2,.3\n.1,.3,.3\n.1,.3,.5\n", SPECTRUM, NOTE),
    text("wavelengths beside a class", SPECTRA, SPECTRUM, NOTE, label="class", has={"label_names": ["a", "b"]}),
    text("wavelengths in fractions", f"{FINE}\n.1,.2{',.3' * 8}\n", [[0.1, 0.2, *[0.3] * 8]], NOTE),
    text("few wavelengths in fractions", "400.5,401.0,401.5\n.1,.3,.3\n", [[0.1, 0.3, 0.3]], header=True),
    bad("the same, not asked for", "400.5,401.0,401.5\n.1,.3,.3\n", EITHER),
    bad("a row that increases", "1.0,2.0,3.0\n0.0,0.0,0.0\n", EITHER),
    text("wavelengths above whole numbers", "n,40.5,41.0,41.5\n1,7,5,6\n", [[1, 7, 5, 6]], NOTE),
    text("rows of numpy.arange", "1.0 2.0 3.0\n4.0 5.0 6.0\n", [[1, 2, 3], [4, 5, 6]], "no header", name="a.txt"),
    text("whole numbers and a class", "4,5,x\n7,2,y\n1,1,x\n", [[4, 5], [7, 2], [1, 1]], "no header", label="f2"),
    text("counting numbers and a class", "1,2,x\n1.5,2,y\n3,1,x\n", [[1, 2], [1.5, 2], [3, 1]], label="f2"),
    text("a date and zero", "1.1.20,0\n2.1.20,1.5\n", [[0], [1.5]], "no header", index="f0"),
    text("a mark before 1, 2", "?,1,2\n3,4,6\n", [[NAN, 1, 2], [3, 4, 6]], missing="?"),
    text("NA before 1, 2", "NA,1,2\n3,4,6\n", [[NAN, 1, 2], [3, 4, 6]], missing="nan"),
    text("NA before a class", "NA,1,x\n3,2,y\n4,9,x\n", [[NAN, 1], [3, 2], [4, 9]], missing="nan", label="f2"),
    text("a name missing", "a,,b\n1,2,3\n", [[1, 2, 3]], has={"columns": ["a", "Unnamed: 1", "b"]}),
    text(
        "passengers", "Id,Name,Age,Fare\n1,A,22,7.5\n2,B,,8\n", [[22, 7.5], [NAN, 8]], index="Id", drop="Name",
        missing="nan",
    ),
    text("categories with names", "sex,smokes\nf,no\nm,yes\nf,no\nm,yes\n", [[0, 0], [1, 1]] * 2),
    text("categories, header given", "p,x\ne,x\np,y\ne,y\n", [[1, 0], [0, 0], [1, 1], [0, 1]], header=False),
    bad("a table of 0 and 1", "0,1\n1,0\n0,0\n", "the first line ('0', '1') " + EITHER),
    bad("0 1 2 3 above whole numbers", "0 1 2 3\n5 4 3 2\n", EITHER, name="a.txt"),
    bad("names of pandas above whole numbers", "0,1,2\n0,1,2\n3,4,5\n", EITHER),
    bad("a column that starts with 0", "0\n1\n0\n", "the first line ('0') " + EITHER),
    bad("1, 2, 3 above pixels", "1,2,3\n0,255,0\n", EITHER),
    bad("whole numbers and another class", "4,5,x\n7,2,y\n", EITHER),
    bad("mushrooms", "p,x,s,n\ne,x,s,y\np,x,y,y\n", "('p', 'x', 's', 'n') " + EITHER),
    bad("votes", "republican,n,y,n\ndemocrat,y,y,y\n", EITHER),
    bad("names of samples", "s1,x\ns2,y\ns3,z\n", EITHER),
    bad("a name missing among categories", "name,,class\nA,q,x\nB,r,y\n", EITHER),
    bad("an empty cell before 1, 2", ",1,2\n7,1,2\n9,5,4\n", EITHER),
    bad("uneven wavelengths", "400,402,405\n.1,.2,.3\n.1,.3,.3\n", EITHER),
    bad("uneven wavelengths beside a class", SPECTRA.replace("404", "407"), EITHER),
    bad("a size above, as scikit-learn's iris", "4,2,setosa,virginica\n5.1,3.5,1.4,0\n4.9,3.0,1.4,0\n", EITHER),
]  # fmt: skip

DAY = pd.to_datetime(["2020-01-01"])
LABELS = [
    text(
        "an unnamed index", ",a,b\n7,1,2\n9,3,4\n", SQUARE, "row labels from the unnamed first column",
        has={**AB, "row_labels": [7, 9]},
    ),
    text("an unnamed index of text", ",a,b\nx,1,2\ny,3,4\n", has={**AB, "row_labels": ["x", "y"]}),
    text("row names of R", '"a" "b"\n"x" 1 2\n"y" 3 4\n', name="a.txt", has={**AB, "row_labels": ["x", "y"]}),
    text("an unnamed column that repeats", ",a\n1,2\n1,4\n", [[2], [4]], has={"row_labels": [1, 1]}),
    text("an unnamed column wanted as data", ",a\n1,2\n3,4\n", SQUARE, index="", has={"row_labels": None}),
    text("an index by name", "id,a,b\nx,1,2\ny,3,4\n", index="id", has={**AB, "row_labels": ["x", "y"]}),
    text("a column that counts", "n,a\n1,5\n2,7\n3,6\n", [[1, 5], [2, 7], [3, 6]], "'n' counts the rows", "index='n'"),
    text("columns dropped", "id,a,t,b\nx,1,u,2\ny,3,v,4\n", drop="id, t", has=AB),
    text("columns chosen, in another order", "b,t,a\n2,u,1\n4,v,3\n", columns=["a", "b"], has=AB),
    text("labels that are integers", "a,b,y\n1,2,5\n3,4,9\n", label="y", has={**AB, "labels": [5, 9]}),
    text("a label among the columns", "a,b,y\n1,2,5\n3,4,9\n", columns="a,b,y", label="y", has={"labels": [5, 9]}),
    bad("a column used twice", "a,b\n1,2\n", "'a' is given 2 times among index, label and drop", index="a", drop="a"),
    bad("no name", "a,b\n1,2\n", "no column ''", label=""),
    bad("names that are empty", lambda: pa.table([[1.0], [2.0]], ["", ""]), "2 columns have the name ''", name=None),
    made("labels that are infinite", frame(a=[1, 3], y=[np.inf, 2]), [[1], [3]], label="y", has={"labels": [1, 0]}),
    made("labels of bytes", frame(a=[1], y=[b"\xff"]), [[1]], label="y", has={"label_names": ["\\xff"]}),
    made("labels of dates", frame(a=[1], y=DAY), [[1]], label="y", has={"label_names": ["2020-01-01"]}),
    text("a column dropped twice", "a,b\n1,2\n", [[2]], drop="a,a"),
    made("an index in half precision", frame(a=np.array([1, 3], np.float16), b=[2, 4]), [[2], [4]], index="a"),
    made("an index of another byte order", frame(**{"": np.array([7, 9], ">i8"), "a": [1, 3]}), [[1], [3]]),
    made("an unnamed column of lists", frame(**{"": [[1], [2]], "a": [1, 3]}), [[1], [3]], "row labels"),
    bad("an index that is not there", "a,b\n1,2\n", "no column 'id'; the columns are 'a', 'b'", index="id"),
    bad("a column to drop that is not there", "a,b\n1,2\n", "no column 'c'", drop="c"),
    bad("labels that are fractions", "a,y\n1,2.5\n", "label column 'y' contains fractions", label="y"),
    bad("a row without a label", "a,y\n1,u\n2,\n", "row 1 has no label in column 'y'", label="y"),
    bad("names of rows without index", "id,a\nx1,1\nx2,2\n", "column 'id' is 'x1', not a number", "index"),
    bad("nothing left", "a\n1\n", "1 rows and 0 columns", drop="a"),
]  # fmt: skip

MISSING = [
    text("question marks", "a,b\n1,?\n3,4\n", [[1, NAN], [3, 4]], "1 of 4 values is missing", missing="?"),
    text("a number for missing", "a,b\n1,-999\n-999.0,4\n", [[1, NAN], [NAN, 4]], "2 of 4 values", missing="NA,-999"),
    text("empty cells", "a,b\n1,\n,4\n", [[1, NAN], [NAN, 4]], missing="nan"),
    text("missing allowed and none there", "a,b\n1,2\n3,4\n", missing="nan", has={"mask": None}),
    bad("a gap", "a,b\n1,\n3,4\n", "1 of 4 values is not finite", "column 'b' (nan)", "missing='nan'"),
    text("a code with a space behind", "a,b\n1,x \n3,4\n", [[1, NAN], [3, 4]], missing="x"),
    made(
        "a number for missing in single precision",
        frame(a=np.array([-9999.9, 1], np.float32), b=[2, 4]),
        [[NAN, 2], [1, 4]],
        missing="-9999.9",
    ),
    made(
        "a number for missing among Arrow's",
        frame(a=pd.array([-9, 1], "int64[pyarrow]"), b=[2, 4]),
        [[NAN, 2], [1, 4]],
        missing="-9",
    ),
    made("a huge code", frame(a=[1, 3], b=[2, 4]), missing=[10**400]),
    bad("a row of gaps", "a,b\n,\n3,4\n", "row 0 has no observed value", missing="nan"),
    made("a number for missing in an array", lambda: np.array([[1, -9], [3, 4]]), [[1, NAN], [3, 4]], missing=[-9]),
    made("pd.NA", frame(a=pd.array([1, None], "Int64"), b=[2, 4]), [[1, 2], [NAN, 4]], missing=[]),
    made("None among objects", frame(a=pd.Series([1, None], dtype=object), b=[2, 4]), [[1, 2], [NAN, 4]], missing=[]),
]

PRECISE = 1700000000 + np.arange(1000.0)
CATEGORIES = pd.Categorical(["m", "l", None], ["s", "m", "l"])
TYPES = [
    made("integers, booleans and floats", frame(a=[1, 3], b=[True, False]), [[1, 1], [3, 0]], has=AB),
    made("nullable", frame(a=pd.array([1, 3], "Int64"), b=pd.array([True, False], "boolean")), [[1, 1], [3, 0]]),
    made("numbers of Arrow", frame(a=pd.array([1, 3], "int64[pyarrow]"), b=pd.array([2.0, 4.0], "double[pyarrow]"))),
    made("decimals", frame(a=[Decimal("1.5"), Decimal(3)], b=[2, 4]), [[1.5, 2], [3, 4]]),
    made("numbers as text", frame(a=["1", "3"], b=["2", " 4 "])),
    made("sparse columns", frame(a=pd.arrays.SparseArray([0.0, 3.0]), b=[2, 4]), [[0, 2], [3, 4]]),
    made(
        "categories keep their order", frame(a=CATEGORIES, b=[4, 5, 6]), [[1, 4], [2, 5], [NAN, 6]],
        "column 'a' as codes of 3 categories",
        missing=[], has={"categories": {"a": ["s", "m", "l"]}},
    ),
    made("few texts", frame(a=list("vuvu")), [[1], [0], [1], [0]], "codes of 2", has={"categories": {"a": ["u", "v"]}}),
    text("TRUE and FALSE", "a,b\nTRUE,2\nFALSE,4\n", [[1, 2], [0, 4]]),
    bad("many texts", frame(a=list("abcd")), "row 0, column 'a' is 'a', not a number", "drop it", name=None),
    bad("dates", frame(a=pd.to_datetime(["2020-01-01", "2020-01-02"])), "column 'a'", "datetime64", name=None),
    bad("durations", frame(a=pd.to_timedelta([1, 2], "s")), "column 'a'", "timedelta64", name=None),
    bad("complex numbers", frame(a=[1j, 2.0]), "column 'a' has type complex128", name=None),
    bad("fields of several numbers", lambda: np.zeros(3, [("a", "f4", 2)]), "field 'a' has type", name=None),
    bad("fields of bytes", lambda: np.zeros(3, [("a", "V4")]), "field 'a' has type |V4", name=None),
    bad("an array of dates", lambda: np.zeros((3, 2), "M8[D]"), "have type datetime64", name=None, index="f0"),
    bad("half a character", frame(a=pd.Series(["\ud800", "x"], dtype=object)), "UnicodeEncodeError", name=None),
    bad("the same in an array", lambda: np.array([["\ud800", 1.0]], object), "not Unicode", name=None, index="f0"),
    bad("a field of bytes", lambda: np.array([(b"\xff",)], [("a", "S3")]), "is b'\\xff', not a number", name=None),
    bad("lists in cells", frame(a=[[1, 2], [3]]), "row 0, column 'a' is [1, 2]", name=None),
    bad("infinity", frame(a=[1.0, np.inf]), "column 'a' (inf", name=None),
    made("seconds since 1970", frame(t=PRECISE), PRECISE[:, None].tolist()),
]  # fmt: skip

LIBRARIES = [
    made("a Series", lambda: pd.Series([1, 3], name="a"), [[1], [3]], has={"columns": ["a"]}),
    made("a frame of columns 0, 1", lambda: pd.DataFrame(SQUARE), has={"columns": ["0", "1"], "row_labels": None}),
    made(
        "a frame with an index of text", lambda: pd.DataFrame(SQUARE, index=["x", "y"], columns=["a", "b"]), SQUARE,
        "row labels from the index", has={**AB, "row_labels": ["x", "y"]},
    ),
    made("a filtered frame", lambda: pd.DataFrame({"a": range(9)})[6::2], [[6], [8]], has={"row_labels": [6, 8]}),
    made("an index of dates", lambda: pd.DataFrame(SQUARE, index=pd.to_datetime(["2020-01-01", "2021-01-01"]))),
    made(
        "an index of several levels", lambda: pd.DataFrame(SQUARE, pd.MultiIndex.from_tuples([("x", 1), ("y", 2)])),
        has={"row_labels": ["x, 1", "y, 2"]},
    ),
    made("a frame whose index was written", frame(**{"Unnamed: 0": [5, 6], "a": [1, 3]}), [[1], [3]]),
    made("a table of Arrow", lambda: pa.table({"a": [1, 3], "b": [2.0, 4.0]}), has=AB),
    made("polars, by Arrow's protocol", lambda: Streamed(a=[1, 3], b=[2.0, 4.0]), has=AB),
    made("the older protocol", lambda: Interchanged(a=[1, 3], b=[2.0, 4.0]), has=AB),
    made("a dict of columns", lambda: {"a": [1, 3], "b": [2, 4]}, has=AB),
    made("a structured array", lambda: np.array([(1, 2.0), (3, 4.0)], [("a", "i4"), ("b", "f8")]), has=AB),
    made("an array", lambda: np.array(SQUARE), SQUARE, "read 2 rows, 2 columns", has={"columns": None}),
    made("a column of an array as label", lambda: np.array([[1, 2, 7], [3, 4, 8]]), label="f2", has={"labels": [7, 8]}),
    made("an array of xarray", lambda: xr.DataArray(SQUARE), has={"columns": None}),
    made("images of xarray", lambda: xr.DataArray(np.ones((2, 3, 3)), dims=["i", "h", "w"]), [[1] * 9] * 2),
    made(
        "an array of xarray with names", lambda: xr.DataArray(SQUARE, {"gene": ["a", "b"]}, ["cell", "gene"]), has=AB
    ),
    made("a tensor", lambda: torch.tensor(SQUARE, requires_grad=True)),
    made("a tensor in bfloat16", lambda: torch.tensor(SQUARE, dtype=torch.bfloat16)),
    made("a sparse matrix", lambda: scipy.sparse.csr_array(SQUARE)),
    made("a sparse tensor", lambda: torch.tensor(SQUARE).to_sparse()),
    made("lists", lambda: SQUARE),
    made("AnnData", Annotated, has={"columns": ["gene1", "gene2"], "row_labels": ["cell1", "cell2"]}),
    made("a layer of AnnData", Annotated, [[5, 6], [7, 8]], key="counts", label="kind", has={"labels": [1, 0]}),
    bad("a layer that is not there", Annotated, "no layer 'raw'", "counts", name=None, key="raw"),
    bad("a large sparse matrix", lambda: scipy.sparse.csr_array((10**6, 10**4)), "74.5 GiB", "stream", name=None),
    bad("a dataset of xarray", lambda: xr.Dataset({"a": ("i", [1.0])}), "Dataset is not an array", name=None),
    bad("a column twice", lambda: pd.DataFrame(SQUARE, columns=["a", "a"]), "2 columns have the name 'a'", name=None),
    bad("columns of images", lambda: np.zeros((2, 3, 3)), "no named columns", name=None, drop="a"),
    bad("a separator of a frame", frame(a=[1]), "sep does not apply", name=None, sep=";"),
]  # fmt: skip


def as_parquet(**columns: Any) -> Callable[[Path], None]:
    return lambda path: pd.DataFrame(columns, index=["x", "y"]).to_parquet(path)


def as_matlab(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: scipy.io.savemat(path, arrays)


def as_npz(**arrays: Any) -> Callable[[Path], None]:
    return lambda path: np.savez(path, **arrays)


INDEXED, LABELLED = as_parquet(a=[1, 3], b=[2, 4]), as_parquet(a=[1, 3], b=["u", "v"])
FILES = [
    Case("an index in Parquet", INDEXED, "a.parquet", {}, SQUARE, {**AB, "row_labels": ["x", "y"]}),
    Case("labels in Parquet", LABELLED, "a.parquet", {"label": "b"}, [[1], [3]], {"labels": [0, 1]}),
    Case("MATLAB's", as_matlab(x=np.array(SQUARE), y=np.array([[1], [2]])), "a.mat", {}, SQUARE, {"labels": [1, 2]}),
    Case("MATLAB's by key", as_matlab(p=np.eye(2), q=np.array(SQUARE)), "a.mat", {"key": "q"}, SQUARE),
    Case("an .npz by key", as_npz(p=np.eye(2), q=np.array(SQUARE)), "a.npz", {"key": "q"}, SQUARE),
    bad("MATLAB's of 7.3", b"MATLAB 7.3 MAT-file".ljust(124) + b"\0\2IM" + b"\x89HDF" * 9, "7.3", "-v7", name="a.mat"),
    bad("a damaged .mat", b"abc" * 99, "not a valid .mat file", name="a.mat"),
    bad("a key that is not there", as_npz(p=np.eye(2)), "['p'] but not q", name="a.npz", key="q"),
    bad("a separator of an array", as_npz(p=np.eye(2)), "sep does not apply", name="a.npz", sep=";"),
    bad("a key of text", "a\n1\n", "key does not apply", key="q"),
]  # fmt: skip

CASES = [*DIALECTS, *SEPARATORS, *HEADERS, *FIRST_LINES, *LABELS, *MISSING, *TYPES, *LIBRARIES, *FILES]


def given_data(case: Case, folder: Path) -> Any:
    if case.name is None:
        return case.data()
    path = folder / case.name
    if callable(case.data):
        case.data(path)
    else:
        path.write_bytes(case.data if isinstance(case.data, bytes) else case.data.encode())
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_each_table_is_read_right_or_refused_in_a_sentence(case, tmp_path):
    source = given_data(case, tmp_path)
    if case.x is None:
        with pytest.raises((DataError, SettingsError)) as caught:
            load(source, **case.options)
        assert "\n" not in str(caught.value)
        assert all(part in str(caught.value) for part in case.says), str(caught.value)
        return
    data = load(source, **case.options)
    x = data.x.double() if data.mask is None else data.x.double().masked_fill(~data.mask, NAN)
    expected = torch.tensor(case.x, dtype=torch.float64)
    if data.x.dtype == torch.float32:
        expected = expected.float().double()
    torch.testing.assert_close(x, expected, rtol=0, atol=0, equal_nan=True)
    assert all(part in data.summary for part in case.says), data.summary
    for name, value in case.has.items():
        found = getattr(data, name)
        assert (found.tolist() if isinstance(found, np.ndarray | torch.Tensor) else found) == value, name


def test_the_table_is_long_and_each_title_once():
    assert len({case.title for case in CASES}) == len(CASES) >= 60


# Tables that pandas writes.

CELLS = st.floats(allow_nan=False, allow_infinity=False, width=32)
NUMBERS = {"na", "nan", "none", "null", "inf", "infinity", "true", "false"}
TEXTS = st.text(st.characters(categories=["L"]), min_size=1, max_size=5).filter(
    lambda text: text.casefold() not in NUMBERS
)


WRITTEN = given(
    values=hnp.arrays(np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=5), elements=CELLS),
    names=st.lists(TEXTS, min_size=5, max_size=5, unique=True) | st.none(),
    index=st.booleans(), sep=st.sampled_from([",", ";", "\t", "|"]), comma=st.booleans(),
    suffix=st.sampled_from([".csv", ".txt", ".csv.gz", ".csv.zip"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
    end=st.sampled_from(["\n", "\r\n"]), asked=st.booleans(),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC]),
)  # fmt: skip


@settings(max_examples=60, deadline=None, database=None)
@WRITTEN
def test_what_pandas_writes_in_any_dialect_comes_back(tmp_path_factory, **written):
    comes_back(tmp_path_factory.getbasetemp(), **written)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None, database=None)
@WRITTEN
def test_what_pandas_writes_in_any_dialect_comes_back_2000_times(tmp_path_factory, **written):
    comes_back(tmp_path_factory.getbasetemp(), **written)


def comes_back(folder, *, values, names, index, sep, comma, suffix, encoding, end, asked, quoting):
    path = folder / f"written{suffix}"
    table = pd.DataFrame(np.array(values, np.float64))
    if names is not None:
        table.columns = names[: table.shape[1]]
    decimal = "," if comma and sep != "," else "."
    options = {"sep": sep if sep != "\t" else "tabs", "decimal": decimal, "header": True}
    how = {"index": index, "encoding": encoding, "lineterminator": end, "quoting": quoting}
    table.to_csv(path, sep=sep, decimal=decimal, **how)
    try:
        data = load(path, **(options if asked or table.shape[1] == 1 else {}))  # a single column shows no separator
    except DataError as error:
        if not re.search("may be (names or data|separated by|decimal|one number or two)", str(error)):
            raise
        data = load(path, **options)
    np.testing.assert_array_equal(data.x.double().numpy(), table.to_numpy())
    assert data.columns == [str(name) for name in table.columns]
    assert (data.row_labels is None) == (not index)


WIDE = [f"gene_number_{i:05}" for i in range(10_000)]


@pytest.mark.parametrize("end", ["", ";"])
@pytest.mark.parametrize("first", ["", "# made by hand\n# in two\n# or three lines\n"])
def test_a_header_that_is_longer_than_the_first_block_is_read(tmp_path, first, end):
    values = np.arange(20_000.0).reshape(2, -1) / 4
    rows = "".join(";".join(str(value).replace(".", ",") for value in row) + end + "\n" for row in values)
    (tmp_path / "a.csv").write_text(first + ";".join(WIDE) + "\n" + rows)
    data = load(tmp_path / "a.csv", missing="nan")
    assert (data.columns, data.mask, data.row_labels) == (WIDE, None, None)
    np.testing.assert_array_equal(data.x, values)
    (tmp_path / "b.csv").write_text(first + ";".join(map(str, range(20_000, 30_000))) + "\n" + rows)
    assert load(tmp_path / "b.csv", missing="nan").columns == [*map(str, range(20_000, 30_000))]


def test_text_without_line_breaks_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr("pyro_vae.data.text.LONGEST_HEAD", 2**18)
    (tmp_path / "a.csv").write_text("12," * 2**17)
    with pytest.raises(DataError, match=r"a\.csv: its first three lines have more than 256 KiB; save the numbers as"):
        load(tmp_path / "a.csv")


# What is done with them.


def test_a_frame_is_taken_wherever_data_are():
    table = pd.DataFrame({"a": [1.0, 3.0], "b": [2.0, np.nan]})
    assert mask_nan(table).mask.tolist() == [[True, True], [True, False]]
    with pytest.raises(DataError, match="column 'b'"):
        rows_of(table)
    assert rows_of(table[["a"]]).x.tolist() == [[1.0], [3.0]]


def test_rows_keep_their_labels():
    data = load(pd.DataFrame(SQUARE, index=["x", "y"]))
    assert data.rows(torch.tensor([1])).row_labels.tolist() == ["y"]


OLD = pd.DataFrame({"a": [1.0, 2.0], "b": [3.0, 4.0], "c": pd.Categorical(["u", "v"])})


def test_new_data_are_matched_by_the_names_of_columns_and_categories():
    old = load(OLD)
    new = OLD[["c", "b", "a"]].astype({"c": pd.CategoricalDtype(["v", "u"])})
    data = load(new, like=old)
    assert data.x.tolist() == old.x.tolist()
    assert data.columns == old.columns
    assert "columns in the order of data" in data.summary
    assert matched(load(new), old).x.tolist() == old.x.tolist()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="b"), "column 'b' of data is missing"),
        (lambda t: t.rename(columns={"b": "B"}), "column 'b' of data is missing .there are 'a', 'B', 'c'"),
        (lambda t: t.assign(d=1.0), "column 'd' is not in data; drop it"),
        (lambda t: t.assign(c=["u", "w"]), "column 'c' is 'w', not one of its categories 'u', 'v'"),
    ],
)
def test_new_data_of_other_columns_are_refused(change, message):
    with pytest.raises(DataError, match=message):
        load(change(OLD), like=load(OLD))


def test_new_data_may_lack_labels_and_have_an_index():
    old = load(OLD.assign(y=["m", "n"]), label="y")
    assert load(OLD.rename(index={0: "r0", 1: "r1"}), label="y", like=old).row_labels.tolist() == ["r0", "r1"]


def test_columns_and_categories_are_kept_with_what_a_vae_was_trained_on():
    known = Trained.on(np.arange(3, dtype=np.uint64), columns=["a"], categories={"a": ["u"]})
    again = Trained.from_text(known.as_text())
    assert (again.columns, again.categories) == (["a"], {"a": ["u"]})
    assert Trained.on(np.arange(2, dtype=np.uint64), again).columns == ["a"]
    with pytest.raises(DataError, match="not text"):
        Trained.from_text(known.as_text().replace('["a"]', "[3]"))


def test_unix_times_keep_their_distinct_values(tmp_path):
    pd.DataFrame({"t": PRECISE.astype(int)}).to_csv(tmp_path / "a.csv", index=False)
    np.save(tmp_path / "a.npy", PRECISE[:, None].astype(int))
    for source in (tmp_path / "a.csv", tmp_path / "a.npy", PRECISE[:, None]):
        assert len(load(source).x.unique()) == 1000
    assert len(rows_of(PRECISE[:, None].astype(int)).x.unique()) == 1000
    assert load(pd.DataFrame({"t": [16777210, 16777211]})).x.dtype == torch.float32, "exact in single precision"


def test_a_file_of_anndata_is_read_by_anndata_or_says_how_to_install_it(tmp_path, monkeypatch):
    path = tmp_path / "cells.h5ad"
    h5py.File(path, "w").close()
    monkeypatch.setitem(sys.modules, "anndata", None)
    with pytest.raises(DataError, match=r"cells.h5ad: reading .h5ad needs anndata; pip install pyro-vae\[anndata\]"):
        load(path)
    module = types.ModuleType("anndata")
    module.read_h5ad = {path: Annotated()}.__getitem__
    monkeypatch.setitem(sys.modules, "anndata", module)
    data = load(path, key="counts", label="kind")
    assert (data.source, data.x.tolist(), data.labels.tolist()) == (str(path), [[5, 6], [7, 8]], [1, 0])
    assert load(path, label="none", like=data).labels is None, "new data may lack labels"
    with pytest.raises(DataError, match=r"cells.h5ad: there is no layer 'raw'; it has \['counts'\]"):
        load(path, key="raw")
    with pytest.raises(SettingsError, match="sep does not apply"):
        load(path, sep=";")
    damaged = tmp_path / "damaged.h5ad"
    damaged.write_bytes(b"of nothing")
    with pytest.raises(DataError, match=r"damaged.h5ad: not a valid HDF5 file"):
        load(damaged)


def test_a_data_set_stays_itself():
    data = Data(torch.tensor(SQUARE))
    assert load(data) is data


NUMBERED = load(pd.DataFrame({"a": pd.Categorical([1, 2, 3], [1, 2, 3]), "b": [0.5, 1.5, 2.5]}))


@pytest.mark.parametrize("again", [[1, 2], [1.0, 2.0], ["1", "2"], pd.array([1, 2], "Int64"), pd.Categorical([1, 2])])
def test_numbers_are_coded_by_the_names_of_known_categories(again):
    new = pd.DataFrame({"a": again, "b": [0.5, 1.5]})
    for data in (load(new, like=NUMBERED), matched(load(new), NUMBERED)):
        assert data.x[:, 0].tolist() == [0.0, 1.0]
        assert data.categories == {"a": ["1", "2", "3"]}


def test_numbers_are_coded_by_name_through_a_file(tmp_path):
    known = load(pd.DataFrame({"a": pd.Categorical([1.0, 2.5, 0.1]), "b": pd.Categorical([True, False, True])}))
    assert known.categories == {"a": ["0.1", "1.0", "2.5"], "b": ["False", "True"]}
    pd.DataFrame({"a": [1, 0.1, 2.5], "b": [True, False, True]}).to_csv(tmp_path / "a.csv", index=False)
    assert load(tmp_path / "a.csv", like=known).x.tolist() == [[1.0, 1.0], [0.0, 0.0], [2.0, 1.0]]


def test_a_number_with_two_names_is_refused():
    known = load(pd.DataFrame({"a": pd.Categorical(["01", "001"]), "b": [1, 2]}))
    assert load(pd.DataFrame({"a": ["01", "001"], "b": [1, 2]}), like=known).x[:, 0].tolist() == [1.0, 0.0]
    with pytest.raises(DataError, match="column 'a' is 1, not one of its categories '001', '01'"):
        load(pd.DataFrame({"a": [1, 1], "b": [1, 2]}), like=known)


@pytest.mark.parametrize("read", [lambda t, like: load(t, like=like), lambda t, like: matched(load(t), like)])
def test_a_column_of_numbers_is_not_taken_for_categories_nor_the_other_way(read):
    with pytest.raises(DataError, match=r"row 0, column 'a' is 0.*, not one of its categories '1', '2', '3'"):
        read(pd.DataFrame({"a": [0, 1], "b": [0.5, 1.5]}), NUMBERED)
    numbers = load(pd.DataFrame({"a": [1, 2], "b": [0.5, 1.5]}))
    with pytest.raises(DataError, match="column 'a' contains categories, but numbers in data; make them alike"):
        read(pd.DataFrame({"a": pd.Categorical([1, 2]), "b": [0.5, 1.5]}), numbers)


def test_spaces_around_the_names_of_categories_do_not_matter():
    spaced = load(pd.DataFrame({"a": pd.Categorical([" x", "y", " x"])}))
    assert (spaced.x[:, 0].tolist(), spaced.categories) == ([0.0, 1.0, 0.0], {"a": [" x", "y"]})
    assert load(pd.DataFrame({"a": ["x", " y ", " x"]}), like=spaced).x[:, 0].tolist() == [0.0, 1.0, 0.0]
    both = load(pd.DataFrame({"a": pd.Categorical([" x", "x"])}))
    assert both.x[:, 0].tolist() == [0.0, 1.0]


def test_what_is_not_observed_is_not_looked_up_among_the_categories():
    like = load(pd.DataFrame({"a": ["g", "r"] * 2}))
    data = Data(torch.tensor([[0.0], [1.0], [9.0]]), mask=torch.tensor([[False], [True], [False]]), columns=["a"])
    assert matched(replace(data, categories={"a": ["b", "r"]}), like).x[1].tolist() == [1.0]
    with pytest.raises(DataError, match="column 'a' contains 'b', not one of the known categories 'g', 'r'"):
        matched(replace(data, categories={"a": ["b", "r"]}, mask=torch.tensor([[True], [True], [False]])), like)
    with pytest.raises(DataError, match=r"column 'a' contains 9\.0, not one of the known categories"):
        matched(replace(data, categories={"a": ["g", "x"]}, mask=torch.tensor([[True], [False], [True]])), like)


@pytest.mark.parametrize("table", [{"a": 1.0}, {"a": [1, 2], "b": [1]}, {"a": np.zeros((2, 2))}], ids=str)
def test_a_dict_that_is_no_table_is_refused_in_a_sentence(table):
    for use in (load, rows_of, mask_nan):
        with pytest.raises(DataError, match="data: the dict is not a table; give each column as a list with one value"):
            use(table)


@pytest.mark.parametrize(("shape", "fields"), [((), 1), ((0, 0), 1), ((2, 1), 1), ((0, 3), 0), ((2,), 0)], ids=str)
def test_a_structured_array_that_is_no_table_is_refused_in_a_sentence(shape, fields):
    for use in (load, rows_of, mask_nan):
        with pytest.raises(
            DataError, match=rf"data: the structured array has shape {re.escape(str(shape))} and {fields} "
        ):
            use(np.zeros(shape, [("a", "f4")][:fields]))


def test_a_structured_array_with_an_unnamed_field_of_fields_is_refused_in_a_sentence():
    fields = np.zeros(2, [("a", [("b", "i4")]), ("c", "f8")])
    fields.dtype.names = "", "c"
    with pytest.raises(DataError, match=r"data: field '' has type .*; give each field one number"):
        load(fields)


def test_numbers_whose_parts_have_names_are_numbers():
    halves = np.array([1, 2**16], "<i4").view(("<i4", {"low": ("<i2", 0), "high": ("<i2", 2)}))
    fields = np.zeros(2, [("a", halves.dtype), ("b", "f8")])
    fields["a"] = halves
    for table in ({"a": halves, "b": [0.0, 0.0]}, fields):
        assert load(table).x.tolist() == [[1, 0], [2**16, 0]]


# A mask beside a table.

UNDER = pd.DataFrame({"b": ["x", "u", "v"], "a": [1, 2, 99]})
SEEN = np.array([[False, True], [True, True], [True, False]])


def fitted_on(table):
    vae = pv.exact.LinearGaussian(torch.ones(table.shape[1], 1), torch.zeros(table.shape[1]), 0.5).as_vae()
    pv.fit(vae, table, epochs=1, progress=False, engine="eager", device="cpu")
    return vae


@pytest.mark.parametrize("index", [False, True])
def test_a_mask_follows_the_columns_of_its_table_and_hides_what_may_be_anything(index):
    vae = fitted_on(pd.DataFrame({"a": [1.0, 2.0, 3.0, 4.0], "b": ["u", "v", "u", "v"]}))
    frame = UNDER.reset_index(names="") if index else UNDER
    expected = [[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]], [[True, False], [True, True], [False, True]]
    rows = pv.data.rows_for(vae, frame, mask=SEEN)
    assert (rows.x.tolist(), rows.mask.tolist()) == expected
    coded = Data(torch.tensor([[7.0, 1.0], [0.0, 2.0], [1.0, 99.0]]), columns=["b", "a"], categories={"b": ["u", "v"]})
    rows = pv.data.rows_for(vae, coded, mask=SEEN)
    assert (rows.x.tolist(), rows.mask.tolist()) == expected
    with pytest.raises(DataError, match=r"mask has type bool and shape \(3, 1\); give booleans of .* \(3, 2\)"):
        pv.data.rows_for(vae, UNDER, mask=SEEN[:, :1])


def test_nan_is_refused_where_a_mask_says_that_it_was_observed():
    table = pd.DataFrame({"a": [1.0, np.nan, 3.0], "b": [np.nan, 2.0, 4.0]})
    seen = np.array([[True, True], [False, True], [True, True]])
    assert rows_of(table, mask=table.notna().to_numpy()).x.tolist() == [[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]]
    with pytest.raises(DataError, match="not finite, the first in row 0, column 'b'"):
        rows_of(table, mask=seen)
    assert pv.data.mean_and_sd(table, mask=table.notna().to_numpy()).center.tolist() == [2.0, 3.0]


def test_the_double_precision_of_a_table_is_kept_where_single_would_change_it(tmp_path):
    table = pd.DataFrame({"b": [0.1, 16777217.0, 3.0], "a": [1.0, 2.0, np.nan]})
    table.to_csv(tmp_path / "a.csv", index=False)
    np.save(tmp_path / "a.npy", table.to_numpy())
    for name in ("a.csv", "a.npy"):
        data = load(tmp_path / name, missing="nan")
        assert data.x.dtype == torch.float32
        np.testing.assert_array_equal(data.exact, table.to_numpy())
        np.testing.assert_array_equal(data.rows(torch.tensor([1])).exact, table.to_numpy()[1:2])
    data = matched(load(tmp_path / "a.csv", missing="nan"), load(table[["a", "b"]].fillna(0)))
    np.testing.assert_array_equal(data.exact, table[["a", "b"]].to_numpy())
    assert load(table.round().fillna(0).iloc[[0, 2]]).exact is None


def test_integers_beyond_all_floats_and_text_that_is_not_unicode_are_refused(tmp_path):
    """Both found by ``make fuzz``."""
    path = tmp_path / "long.csv"
    path.write_text("9" * 2000 + "\n")
    with pytest.raises(DataError, match=r"cannot be read as numbers \(OverflowError.*correct its values"):
        pv.data.load(path)
    rows = np.zeros(12, dtype=[("a", "<f8"), ("b", "<U2")])
    rows["b"] = np.frombuffer(np.full(24, 0xD5555555, np.uint32).tobytes(), "<U2")  # beyond Unicode
    np.save(tmp_path / "text.npy", rows)
    with pytest.raises(DataError, match="column 'b' cannot be read as numbers"):
        pv.data.load(tmp_path / "text.npy")


ENDS_SCIPY = (
    "c-r%I4DoSvQZUssQ1EpO(M`+DNmU5QNi0drFUqx2D9A6)tk6+#E=o--Nlj76&$ChpPApOI%P&(fvQRKGurjc;G5|4*%oxZ3j"
    "Gn%HKq`Qdfq@N3b1*<?5MYJ!d4QN1q!b7%fHWb@3B(FO^Bh}lcfJ)rVE^Gt%bVS|cG=qq>{Zjh`^A3ui8)iX?7!@9R+iecaw"
    "gM(?`l1tcIQ3c|Ks3?S?UqD><c(9pW(Rs)&72BvX9lvH})^OV$F}$z1@G}U3F@z`iK3|+P-PC{T|w%aozj!{EGwo-#R~&Fj0"
    "B9fAOBoJvDys?0<hz@Vxu+@%}p1xec+5XZBxNQhQ-y*2DdileX0>t@~gvuf`ni=J|AgF00=H1Hm2ktjj+-C3@f8e@JZRGv{N"
    "c_KSS2wEkRq+CFzf#*!uBbx-V{T|756Ugf&I#`;?a|F=Bb|Cp!y@LG+f_H~b(0v+Ce-mh`t3X`+lmHiy^?mxR!d|-dkiwoi^"
    "_1Emzr3-!7ck20m@gmmAQTk`>Pv2HCtVukwfBDO^I=TC<*@FUp0s|u8`OpHM5gPcQfUktI6OiK$N;5%eW+=^qWDWyTgt9|v4"
    "k*nDrMaLqH<Shd-u=8@"
)
"""A damaged .mat file of ``make fuzz`` that ends the process in scipy 1.x, compressed."""


def test_files_that_end_their_reader_are_refused(tmp_path):
    (tmp_path / "damaged.mat").write_bytes(zlib.decompress(base64.b85decode("".join(ENDS_SCIPY))))
    with pytest.raises(DataError, match=r"damaged\.mat: not a valid \.mat file"):
        pv.data.load(tmp_path / "damaged.mat")


@pytest.mark.parametrize(
    "about", [b"{", b"[]", b"\xff", b'{"index_columns": 3}', b'{"index_columns": ["?"], "columns": []}']
)
def test_damaged_notes_of_pandas_in_a_parquet_file_are_refused(about, tmp_path):
    table = pa.table({"a": [1.0, 2.5]}).replace_schema_metadata({b"pandas": about})
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(DataError, match=r"x\.parquet: cannot be converted to a DataFrame \(\w+Error: .*\); write"):
        load(tmp_path / "x.parquet")


def test_text_in_a_parquet_file_that_is_not_unicode_is_refused(tmp_path):
    table = pa.table({"a": [1.0, 2.5], "row": ["one", "two"]})
    parquet.write_table(table, tmp_path / "x.parquet", compression="none", use_dictionary=False, write_statistics=False)
    assert load(tmp_path / "x.parquet", index="row").row_labels.tolist() == ["one", "two"]
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes().replace(b"two", b"\xffwo"))
    with pytest.raises(DataError, match=r"not a valid Parquet file .*Invalid UTF8 sequence"):
        load(tmp_path / "x.parquet", index="row")


@pytest.mark.parametrize("read", [load, pv.data.stream])
def test_names_in_a_parquet_file_that_are_not_unicode_are_refused(read, tmp_path):
    parquet.write_table(pa.table({"name": [1.0, 2.5], "other": [3.0, 4.0]}), tmp_path / "x.parquet", store_schema=False)
    assert read(tmp_path / "x.parquet").columns == ["name", "other"]
    (tmp_path / "x.parquet").write_bytes((tmp_path / "x.parquet").read_bytes().replace(b"name", b"\xffame"))
    with pytest.raises(DataError, match=r"not a valid Parquet file .*'utf-8' codec"):
        read(tmp_path / "x.parquet")


def test_text_is_converted_once_per_distinct_value_with_the_same_result():
    cells = ["c", " c", "b", None, "b ", "a", "nan.", "a", "c", "a", "b", "1e2x"] * 2
    for values in (cells, ["1", "2.5", None, "1", " 7 ", "3"], ["10000000000000000000", "2", "-3"]):
        text, objects = (pd.Series(values, dtype=dtype) for dtype in ("str", object))
        numbers, names = numbers_of(text, "x", "data")
        expected, expected_names = numbers_of(objects, "x", "data")
        np.testing.assert_array_equal(numbers, expected)
        assert names == expected_names


def test_columns_are_examined_in_blocks_with_the_same_result(monkeypatch):
    x = torch.stack([torch.arange(50.0).double() + offset for offset in (0, 1.7e9, 3e5, 1e12)], 1)
    x[3, 1] = torch.nan
    mask = torch.rand(x.shape, generator=torch.Generator().manual_seed(0)) < 0.9
    whole = coarse_columns(x), coarse_columns(x, mask), narrow(x.numpy()).dtype
    monkeypatch.setattr("pyro_vae.data.precision.BLOCK", 1)
    assert (coarse_columns(x), coarse_columns(x, mask), narrow(x.numpy()).dtype) == whole == ([1, 3], [1, 3], x.dtype)
    last = torch.arange(50.0).reshape(-1, 1)
    assert unrounded(last.numpy() + np.eye(50)[:, 49:] / 3, last) is not None
    observed = torch.ones(50, 2, dtype=torch.bool)
    observed[1:, 1] = False  # one value alone is not coarse
    assert coarse_columns(x[:, [1, 1]], observed) == [0]
    assert torch.equal(unrounded(x[:, :1].numpy() + 0.1, x[:, :1].float() + 0.1), x[:, :1] + 0.1)
    assert unrounded(x[:, :1].numpy(), x[:, :1].float()) is None


def test_reading_does_not_share_memory_with_an_array():
    array = 1.7e9 + np.arange(27.0).reshape(-1, 3)
    data = pv.data.load(array, index="f0", label="f1")
    array[:] = 0
    assert data.x.min() == 1.7e9 + 2
    assert data.row_labels.min() == 1.7e9
    assert data.labels.min() == 1.7e9 + 1
