"""Where the mass of p is: a target and starting points in, Gaussians and their mixtures out."""
