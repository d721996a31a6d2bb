"""Plans: which kernel runs each layer on a platform, why not a better one, what it costs. Torch-free."""
