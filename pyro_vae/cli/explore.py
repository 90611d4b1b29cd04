"""``pyro-vae explore``: write a page to explore the latent space, the rows and the decoder of a trained VAE."""

from jsonargparse import Namespace

from pyro_vae.cli.load_run import trained_run
from pyro_vae.cli.tables import new_file, validate_new
from pyro_vae.core.format import Console
from pyro_vae.core.validation import whole
from pyro_vae.evidence.psis import LEAST
from pyro_vae.train.checkpoint.tensor_file import staged


def run_explore(settings: Namespace) -> int:
    """Write the explorer page of a run."""
    from pyro_vae import plots
    from pyro_vae.plots.explorer_page import validate_bokeh

    for name, least in {"rows": 2, "num_particles": LEAST, "draws": 2}.items():
        whole(name, settings[name], least)
    validate_bokeh()
    path = new_file("explore", settings.out, settings.run, [".html"])
    _, vae, held_out, _ = trained_run(settings.run, settings.data, settings.missing, settings.trust)
    page = plots.explore(
        vae, held_out, title=f"Explore {settings.run}", rows=settings.rows, num_particles=settings.num_particles,
        draws=settings.draws, seed=settings.seed, progress=True,
    )  # fmt: skip
    with staged(path, lambda _: validate_new(path)) as part:
        part.write_text(page, encoding="utf-8")
    Console().print(f"Written to {path} ({len(page.encode()) / 1e6:.1f} MB); open it in a browser", soft_wrap=True)
    return 0
