"""The explorer's page in a browser: it decodes as Python does, shows the row that is clicked, and downloads rows."""

import json
import time
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from helpers.browser import errors_said, open_browser
from helpers.explorer import QUOTED, mixed_data, mixed_table, mixed_vae
from torch import nn

import pyro_vae as pv
from pyro_vae.core.standardize import Standardize
from pyro_vae.plots.explorer_page import SCRIPT
from pyro_vae.plots.page_decoder import page_decoder

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    with open_browser() as driver:
        yield driver


def as_json(written):
    """Arrays as lists, for a page without Bokeh."""
    return json.loads(json.dumps(written, default=lambda array: array.ravel().tolist()))


KINDS = pv.likelihoods
MAKERS = {
    "Normal": KINDS.Normal,
    "StudentT": partial(KINDS.StudentT, df=5.0),
    "Laplace": KINDS.Laplace,
    "HeteroscedasticNormal": KINDS.HeteroscedasticNormal,
    "Bernoulli": KINDS.Bernoulli,
    "ContinuousBernoulli": KINDS.ContinuousBernoulli,
    "Binomial": partial(KINDS.Binomial, total_count=8),
    "Poisson": KINDS.Poisson,
    "NegativeBinomial": KINDS.NegativeBinomial,
    "Categorical": partial(KINDS.Categorical, levels=4),
    "ZeroInflated": partial(KINDS.ZeroInflated, counts=KINDS.NegativeBinomial),
}


def decoder_of(maker, net=lambda outputs: pv.nn.mlp(3, [7], outputs), features=5):
    """A likelihood on a network, wide enough for so many features."""
    outputs = features * maker(nn.Identity()).numbers
    torch.manual_seed(1)
    decoder = maker(net(outputs)).double()
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(parameter.float())  # as precise as the page's weights
    return decoder.eval()


def compare(browser, decoder, z, context=None, features=5):
    """Decode in the page and in Python."""
    browser.get("data:text/html,<title>decode</title>")
    written = as_json(page_decoder(decoder, features))
    given = [] if context is None else context.tolist()
    call = f"{SCRIPT.read_text(encoding='utf-8')}; return [...explorer.decode(...arguments)]"
    found = [browser.execute_script(call, row.tolist(), given, written) for row in z]
    with torch.no_grad():
        p = decoder(z, *(() if context is None else (context.expand(len(z), -1),)))
    codes = isinstance(decoder, KINDS.Categorical)
    expected = p.base_dist.probs.argmax(-1).double() if codes else p.mean
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    return expected


@pytest.mark.parametrize("name", MAKERS)
def test_the_page_decodes_each_likelihood_as_python_does(browser, name):
    z = 3 * torch.randn(20, 3, dtype=torch.float64)
    expected = compare(browser, decoder_of(MAKERS[name]), z)
    assert expected.std(0).min() > 1e-3, "the means differ"


def test_every_other_likelihood_is_refused_by_name():
    left = {"Blocks", "DiscretizedLogisticMixture", "Hurdle", "Likelihood", "taking"}
    assert set(KINDS.__all__) - set(MAKERS) == left
    for maker in (partial(KINDS.Hurdle, counts=KINDS.Poisson), KINDS.DiscretizedLogisticMixture):
        with pytest.raises(pv.errors.ModelError, match="the page cannot run this decoder, since it contains a"):
            page_decoder(decoder_of(maker), 5)


def test_the_mean_of_a_continuous_bernoulli_is_right_about_a_half(browser):
    decoder = decoder_of(KINDS.ContinuousBernoulli, lambda outputs: nn.Linear(3, outputs))
    compare(browser, decoder, torch.randn(1, 3, dtype=torch.float64) * torch.logspace(-9, 1, 30).double()[:, None])


ACTIVATIONS = [nn.ReLU, nn.Tanh, nn.Sigmoid, nn.SiLU, nn.Softplus, nn.LeakyReLU, nn.ELU]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.__name__)
def test_the_page_runs_each_activation(browser, activation):
    decoder = decoder_of(KINDS.Normal, lambda n: pv.nn.mlp(3, [7, 6], n, activation=activation, norm=nn.LayerNorm))
    compare(browser, decoder, 4 * torch.randn(5, 3, dtype=torch.float64))


@pytest.mark.parametrize("wrapper", ["standardized", "without", "plain"])
def test_the_page_hands_the_context_on(browser, wrapper):
    units = Standardize(torch.tensor([100.0, 2.0]), torch.tensor([10.0, 0.5]))
    nets = {
        "standardized": lambda n: pv.nn.StandardizedContext(pv.nn.mlp(5, [7], n), 3, units),
        "without": lambda n: pv.nn.WithoutContext(pv.nn.mlp(3, [7], n), 3),
        "plain": lambda n: pv.nn.mlp(5, [7], n),
    }
    z, context = torch.randn(4, 3, dtype=torch.float64), torch.tensor([107.0, 1.5], dtype=torch.float64)
    compare(browser, decoder_of(KINDS.Normal, nets[wrapper]), z, context)


def test_columns_come_back_in_the_units_of_the_data(browser):
    data = mixed_data()
    vae = mixed_vae(data).double()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.copy_(parameter.float())
    z = torch.randn(6, 3, dtype=torch.float64)
    browser.get("data:text/html,<title>decode</title>")
    call = f"{SCRIPT.read_text(encoding='utf-8')}; return [...explorer.decode(...arguments)]"
    written = as_json(page_decoder(vae.decoder, 5))
    found = np.array([browser.execute_script(call, row.tolist(), [], written) for row in z])
    with torch.no_grad():
        parts = vae.decoder(z).base_dist.parts
    np.testing.assert_allclose(found[:, :4], torch.cat([part.mean for part in parts[:3]], -1), rtol=1e-5)
    np.testing.assert_array_equal(found[:, 4], parts[3].probs.argmax(-1)[:, 0])


# --- The page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed():
    data = mixed_data(80)
    vae = mixed_vae(data)
    return data, vae, pv.plots.explore(vae, data, title="Mixed", num_particles=25, draws=5)


@pytest.fixture
def opened(browser, mixed, tmp_path):
    """The page, open in a browser that downloads to a folder."""
    path = tmp_path / "page.html"
    path.write_text(mixed[2], encoding="utf-8")
    browser.execute_cdp_cmd(
        "Browser.setDownloadBehavior", {"behavior": "allow", "downloadPath": str(tmp_path / "downloads")}
    )
    browser.get(path.as_uri())
    wait_for(lambda: browser.execute_script("return explorer.state()?.rows.data.x.some(v => v != 0)"))
    wait_for(lambda: browser.execute_script("return Number.isFinite(explorer.state().figure.x_range.start)"))
    yield browser
    assert not errors_said(browser)
    assert browser.execute_script("return window.taken") is None, "a name was run as a script"


def wait_for(holds, seconds=20):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


PIXEL = """const view = Bokeh.index.find_one(explorer.state().figure), box = view.el.getBoundingClientRect();
    return [box.left + view.frame.x_scale.compute(arguments[0]), box.top + view.frame.y_scale.compute(arguments[1])]"""


def pixel(browser, x, y):
    """Where on the screen a place of the figure lies, given in data units."""
    return [round(place) for place in browser.execute_script(PIXEL, float(x), float(y))]


def click(browser, x, y):
    from selenium.webdriver import ActionChains

    actions = ActionChains(browser)
    actions.w3c_actions.pointer_action.move_to_location(*pixel(browser, x, y)).click()
    actions.perform()


def drag(browser, start, end):
    """Drag the mouse between two places, by way of their middle."""
    from selenium.webdriver import ActionChains

    actions = ActionChains(browser)
    mouse = actions.w3c_actions.pointer_action
    mouse.move_to_location(*pixel(browser, *start)).pointer_down()
    for part in (0.1, 0.5, 1.0):
        mouse.move_to_location(*pixel(browser, *(start + part * (end - start)))).pause(0.1)
    mouse.pointer_up()
    actions.perform()


def state(browser, expression):
    return browser.execute_script(f"const page = explorer.state(); return {expression}")


def places(browser):
    return np.array(state(browser, "[[...page.rows.data.x], [...page.rows.data.y]]")).T


def test_a_click_on_a_row_shows_it_beside_its_reconstruction(opened, mixed):
    data, vae, _ = mixed
    at = places(opened)
    apart = np.linalg.norm((at[:, None] - at[None]) / np.ptp(at, 0), axis=-1) + np.eye(len(at))
    i = int(apart.min(1).argmax())  # the loneliest row
    click(opened, *at[i])
    wait_for(lambda: state(opened, "page.about.text").startswith(f"Row r{i}, label <b>place"))
    built, table = pv.reconstruct(vae, data, draws=5), mixed_table(80).drop(columns="site")
    lines = state(opened, "page.table.text").split("<tr>")[2:]
    cells = [[cell.split("</td>")[0] for cell in line.split("<td>")[1:]] for line in lines]
    assert [cell[0] for cell in cells][1:3] == ["a,&#34;b&#34;", "visits"]
    for j, cell in enumerate(cells[:4]):
        own, mean, sd = table.iloc[i, j], built.x.values[i, j], built.x_sd.values[i, j]
        assert abs(float(cell[1]) - mean) < 0.1 * sd
        assert (cell[2] == "–") if np.isnan(own) else abs(float(cell[2]) - own) < 1e-5 * max(1, abs(own))
        assert abs(float(cell[3]) / sd - 1) < 0.05
    assert cells[4][1].startswith(["blue", "green", "red"][int(built.x.values[i, 4])] + " (probability ")
    assert cells[4][2] == table.iloc[i, 4]
    drawn = state(opened, "page.beside.data.mean")
    center, unit = np.nanmean(data.x.where(data.mask, torch.nan), 0), np.nanstd(data.x.where(data.mask, torch.nan), 0)
    np.testing.assert_allclose(drawn, ((built.x.values[i] - center) / unit)[:4], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "axes", [("component 1", "component 2"), ("z0", "z2"), ("z1", "visits"), ("component 1", "z0")]
)
def test_a_click_on_an_empty_place_decodes_it(opened, mixed, axes):
    data, vae, _ = mixed
    names = state(opened, "page.choices.map(choice => choice.name)")
    for menu, name in zip(("x_axis", "y_axis"), axes, strict=True):
        opened.execute_script(f"explorer.state().{menu}.value = arguments[0]", str(names.index(name)))
    time.sleep(0.5)
    at = places(opened)
    rng = np.random.default_rng(0)
    spots = at.min(0) + np.ptp(at, 0) * rng.uniform(0.05, 0.95, size=(500, 2))
    far = np.linalg.norm((spots[:, None] - at[None]) / np.ptp(at, 0), axis=-1).min(1)
    click(opened, *spots[far.argmax()])
    wait_for(lambda: state(opened, "page.about.text").startswith("Decoded at"))
    z = np.array(state(opened, "[...page.latents]"))
    x, y = state(opened, "[page.mark.data.x[0], page.mark.data.y[0]]")
    lines = state(opened, "page.choices.map(one => one.direction ? [[...one.direction], one.offset] : null)")
    for name, place in zip(axes, (x, y), strict=True):
        if line := lines[names.index(name)]:
            assert abs(np.dot(line[0], z) - line[1] - place) < 1e-9, "z has the coordinates of the click"
    middle = pv.encode(vae, data).z.values.mean(0)
    across = np.array([lines[names.index(name)][0] for name in axes if lines[names.index(name)]])
    moved = z - middle
    rest = moved - across.T @ np.linalg.lstsq(across.T, moved, rcond=None)[0]
    np.testing.assert_allclose(rest, 0, atol=1e-5, err_msg="z moves in no other direction")
    with torch.no_grad():
        parts = vae.decoder(torch.tensor(z).float()[None]).base_dist.parts
    decoded = state(opened, "[...page.decoded]")
    np.testing.assert_allclose(decoded[:4], torch.cat([part.mean for part in parts[:3]], -1)[0], rtol=1e-5, atol=1e-5)
    assert decoded[4] == parts[3].probs.argmax()


def test_brushed_rows_are_downloaded(opened, mixed, tmp_path):
    data, vae, _ = mixed
    at = places(opened)
    low, high = np.quantile(at, [0.2, 0.8], 0)
    drag(opened, low, high)
    wait_for(lambda: "selected" in state(opened, "page.download.label"))
    inside = np.flatnonzero(((at > low) & (at < high)).all(1))
    chosen = sorted(state(opened, "[...page.rows.selected.indices]"))
    assert 0 < len(chosen) < 80
    assert len({*chosen} ^ {*inside.tolist()}) <= 2, "but for rows on the border, half a pixel off"
    assert state(opened, "page.download.label") == f"Download the selected {len(chosen)} rows (CSV)"
    button = "return Bokeh.index.find_one(explorer.state().download).shadow_el.querySelector('button')"
    opened.execute_script(button).click()
    file = tmp_path / "downloads" / "rows.csv"
    wait_for(file.exists)
    found = pd.read_csv(file, index_col="row")
    table = mixed_table(80).iloc[chosen]
    assert found.index.tolist() == table.index.tolist()
    assert found["label"].tolist() == table["site"].tolist()
    own = found.iloc[:, 1:6]
    assert own.columns.tolist() == [*table.columns[:5]]
    assert QUOTED in own
    pd.testing.assert_frame_equal(own, table.iloc[:, :5], check_dtype=False, check_names=False, rtol=1e-6)
    z = pv.encode(vae, data).z.values[chosen]
    np.testing.assert_allclose(found[["z0", "z1", "z2"]], z, rtol=1e-6, atol=1e-7)
    score = pv.score(vae, data, num_particles=25, draws=5)
    np.testing.assert_allclose(found["log_px"], score.log_px.values[chosen], rtol=1e-6)


def test_each_colour_and_axis_can_be_chosen(opened):
    names = state(opened, "page.choices.map(choice => choice.name)")
    fills = set()
    for i in range(len(names)):
        opened.execute_script("explorer.state().colour.value = arguments[0]", str(i))
        colours = state(opened, "page.rows.data.fill")
        assert all(colour.startswith("#") for colour in colours)
        assert len(set(colours)) > 1, names[i]
        fills.add(tuple(colours))
    assert len(fills) == len(names)
    at = names.index("colour")
    opened.execute_script("explorer.state().colour.value = arguments[0]", str(at))
    assert "missing" in state(opened, "page.legend.text"), "one row has no colour"
    assert "&#60;b&#62;" not in state(opened, "page.legend.text")


def test_where_the_decoder_cannot_run_the_nearest_stored_point_is_shown(browser, tmp_path):
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(2),
        decoder=KINDS.ContinuousBernoulli(pv.nn.conv_decoder(2, [4], (1, 8, 8))),
        encoder=pv.posteriors.DiagNormal(pv.nn.mlp(64, [8], 4)),
    )
    data = pv.data.digits().rows(torch.arange(30))
    path = tmp_path / "page.html"
    path.write_text(pv.plots.explore(vae, data, num_particles=25, draws=5), encoding="utf-8")
    browser.get(path.as_uri())
    wait_for(lambda: browser.execute_script("return explorer.state()?.rows.data.x.some(v => v != 0)"))
    browser.execute_script("explorer.show_row(7)")
    pixels = state(browser, "[...page.left_source.data.image[0]]")
    levels = 255 - np.array(pixels, np.uint32).reshape(8, 8)[::-1] % 256
    np.testing.assert_allclose(levels / 255, data.x[7].reshape(8, 8), atol=0.5 / 255 + 1e-6)
    spots = np.array(state(browser, "[...page.grid.places]")).reshape(-1, 2)
    x, y = spots[100] + 0.2 * (spots[101] - spots[100])
    z = browser.execute_script("explorer.show_place(...arguments); return [...explorer.state().latents]", x, y)
    assert state(browser, "[page.mark.data.x[0], page.mark.data.y[0]]") == spots[100].tolist()
    with torch.no_grad():
        expected = vae.decoder(torch.tensor(z).float()).mean
    np.testing.assert_allclose(state(browser, "[...page.decoded]"), expected, atol=0.5 / 255 + 1e-5)
    assert not errors_said(browser)
