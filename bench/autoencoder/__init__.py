"""The paper's experiments by one command: ``python -m bench.autoencoder``. The guide's page on experiments explains it."""
