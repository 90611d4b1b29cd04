"""Networks: any number of batch dimensions, images of any size, and what the settings do."""

import pyro
import pytest
import torch
from torch import nn

import pyro_vae as pv
from pyro_vae.errors import ModelError, SettingsError
from pyro_vae.nn import conv_decoder, conv_encoder, mlp

IMAGES = [(1, 28, 28), (3, 8, 8), (2, 7, 5), (1, 1, 1)]
BATCHES = [(), (4,), (2, 4), (3, 2, 4), (0,)]


@pytest.mark.parametrize("batch", BATCHES, ids=str)
@pytest.mark.parametrize("hidden", [[], [4], [4, 6, 8]], ids=str)
@pytest.mark.parametrize("image", IMAGES, ids=str)
def test_convolutions_take_and_give_flat_images_of_any_size(image, hidden, batch):
    pixels = torch.Size(image).numel()
    encoder = conv_encoder(image, hidden, 5)
    decoder = conv_decoder(5, hidden[::-1], image, outputs_per_feature=2)
    features = encoder(torch.randn(*batch, pixels))
    assert features.shape == (*batch, 5)
    assert decoder(features).shape == (*batch, 2 * pixels)


@pytest.mark.parametrize(
    "net", [lambda: conv_encoder((2, 7, 5), [4, 6], 5), lambda: conv_decoder(70, [6, 4], (2, 7, 5))], ids=["in", "out"]
)
def test_a_batch_is_its_rows(net):
    net, rows = net().double(), torch.randn(2, 3, 70).double()
    whole = net(rows)
    for i in range(2):
        for j in range(3):
            assert torch.allclose(net(rows[i, j]), whole[i, j], atol=1e-12, rtol=0)


def test_the_encoder_sees_channels_height_and_width_in_this_order():
    """Against convolutions of an image written out."""
    net, image = conv_encoder((2, 7, 5), [4], 3).double(), torch.randn(2, 7, 5).double()
    convolution, linear = net.body[0], net.body[-1]
    hidden = nn.functional.conv2d(image[None], convolution.weight, convolution.bias, stride=2, padding=1).relu()
    assert torch.allclose(net(image.flatten()), linear(hidden.flatten()), atol=1e-12)
    turned = image.transpose(1, 2).flatten()
    assert not torch.allclose(net(turned), linear(hidden.flatten()), atol=1e-3), "power"


def test_the_decoder_gives_one_parameter_after_the_other():
    """Bias of the last layer alone: the first half of the channels is the first parameter."""
    net = conv_decoder(4, [3], (2, 7, 5), outputs_per_feature=2)
    with torch.no_grad():
        net.body[-2].weight.zero_()
        net.body[-2].bias.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    first, second = net(torch.randn(6, 4)).chunk(2, -1)
    images = first.unflatten(-1, (2, 7, 5)), second.unflatten(-1, (2, 7, 5))
    assert (images[0][:, 0] == 1).all()
    assert (images[0][:, 1] == 2).all()
    assert (images[1][:, 0] == 3).all()
    assert (images[1][:, 1] == 4).all()


def test_a_gradient_reaches_every_parameter():
    for net, width in ((conv_encoder((2, 7, 5), [4, 6], 5), 70), (conv_decoder(5, [6, 4], (2, 7, 5)), 5)):
        torch.manual_seed(0)
        net(torch.randn(4, width)).square().sum().backward()
        assert all(p.grad.abs().max() > 0 for p in net.parameters())


def test_convolutions_make_a_vae_with_vectorized_particles():
    torch.manual_seed(0)
    vae = pv.VAE(
        prior=pv.priors.StandardNormal(3),
        decoder=pv.likelihoods.Normal(conv_decoder(3, [8, 4], (1, 7, 5))),
        encoder=pv.posteriors.DiagNormal(conv_encoder((1, 7, 5), [4, 8], 6)),
    ).double()
    x = torch.randn(4, 35).double()
    vae.check(x)
    assert pv.elbo.log_weights(vae.model, vae.guide, x, num_particles=7).shape == (7, 4)
    loss = pyro.infer.Trace_ELBO(num_particles=7, vectorize_particles=True).loss(vae.model, vae.guide, x)
    assert loss > 0
    with pytest.raises(ModelError, match="rows of 36 numbers and was built for 1 × 7 × 5"):
        vae.check(torch.zeros(4, 36))


def test_the_norm_stands_before_the_activation_of_each_hidden_layer():
    kinds = [type(layer) for layer in mlp(3, [4, 5], 2, norm=nn.LayerNorm, activation=nn.Tanh)]
    assert kinds == [nn.Linear, nn.LayerNorm, nn.Tanh, nn.Linear, nn.LayerNorm, nn.Tanh, nn.Linear]
    assert [type(layer) for layer in mlp(3, [], 2, norm=nn.LayerNorm)] == [nn.Linear]
    assert [type(layer) for layer in mlp(3, [4], 2)] == [nn.Linear, nn.ReLU, nn.Linear]
    net, rows = mlp(3, [4], 2, norm=nn.LayerNorm).double(), torch.randn(2, 5, 3).double()
    assert torch.allclose(net(rows)[1, 2], net(rows[1, 2]), atol=1e-12)


@pytest.mark.parametrize(
    "make",
    [
        lambda: mlp(3, [0], 2),
        lambda: conv_encoder((0, 7, 5), [4], 3),
        lambda: conv_encoder((1, 7, 5), [0], 3),
        lambda: conv_decoder(0, [4], (1, 7, 5)),
        lambda: conv_decoder(3, [4], (1, 7, 5), outputs_per_feature=0),
    ],
)
def test_sizes_below_one_are_refused(make):
    with pytest.raises(SettingsError, match="at least 1"):
        make()


def test_rows_of_another_width_are_refused():
    with pytest.raises(ModelError, match="rows of 4 numbers and was built for 5"):
        conv_decoder(5, [4], (1, 7, 5))(torch.zeros(2, 4))
