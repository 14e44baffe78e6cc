"""The paper's experiments by one command: ``python -m bench.autoencoder``; the guide has a page on it."""
