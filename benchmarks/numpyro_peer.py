"""NumPyro's SVI on the same architecture: a pass over the data as one jitted ``lax.fori_loop``."""

from collections.abc import Callable
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro.infer import SVI, RenyiELBO, Trace_ELBO, TraceMeanField_ELBO

from benchmarks.cases import LEARNING_RATE, Case


def _layers(key: jax.Array, widths: list[int]) -> list[tuple[jax.Array, jax.Array]]:
    """Torch's way of drawing first weights."""
    layers = []
    for before, after in pairwise(widths):
        key, one, two = random.split(key, 3)
        bound = before**-0.5
        draw = [random.uniform(k, s, minval=-bound, maxval=bound) for k, s in ((one, (before, after)), (two, (after,)))]
        layers.append((draw[0], draw[1]))
    return layers


def _mlp(layers: list[tuple[jax.Array, jax.Array]], x: jax.Array) -> jax.Array:
    for weight, bias in layers[:-1]:
        x = jax.nn.relu(x @ weight + bias)
    return x @ layers[-1][0] + layers[-1][1]


def epoch(case: Case, x: np.ndarray) -> Callable[[], float]:
    """One pass over the data, jitted as a whole; its mean objective, nats per datum."""
    jax.config.update("jax_default_matmul_precision", "highest")  # on a GPU it would take TF32, which torch does not
    widths = list(case.hidden)
    first = random.split(random.PRNGKey(0), 3)
    encoder = _layers(first[0], [case.features, *widths, 2 * case.latent])
    decoder = _layers(first[1], [case.latent, *widths[::-1], case.features])

    def model(x: jax.Array) -> None:
        layers = numpyro.param("decoder", decoder)
        with numpyro.plate("data", case.batch):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([case.latent]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=_mlp(layers, z)).to_event(1), obs=x)

    def guide(x: jax.Array) -> None:
        layers = numpyro.param("encoder", encoder)
        with numpyro.plate("data", case.batch):
            loc, log_scale = jnp.split(_mlp(layers, x), 2, -1)
            numpyro.sample("z", dist.Normal(loc, jnp.exp(log_scale)).to_event(1))

    losses = {"trace": Trace_ELBO, "analytic": TraceMeanField_ELBO, "iwae50": lambda: RenyiELBO(0.0, 50)}
    svi = SVI(model, guide, numpyro.optim.Adam(LEARNING_RATE), losses[case.estimator]())
    data = jnp.asarray(x)
    state = svi.init(first[2], data[: case.batch])

    @jax.jit
    def one(state, key, data):  # type: ignore[no-untyped-def]
        order = random.permutation(key, len(data)).reshape(case.steps, case.batch)

        def body(i, carry):  # type: ignore[no-untyped-def]
            state, total = carry
            state, loss = svi.update(state, data[order[i]])
            return state, total + loss

        return lax.fori_loop(0, case.steps, body, (state, 0.0))

    keys = iter(random.split(random.PRNGKey(1), 10_000))

    def one_pass() -> float:
        nonlocal state
        state, total = one(state, next(keys), data)
        return -float(total) / case.steps / case.batch

    return one_pass
