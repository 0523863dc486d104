"""The training loop: trainer, engine, schedule, averaged weights, checkpoints. Knows neither Ray nor MLflow."""
