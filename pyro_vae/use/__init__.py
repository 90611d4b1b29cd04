"""What a trained VAE is used for: latents, reconstructions, imputations, samples and scores as labelled tables."""
