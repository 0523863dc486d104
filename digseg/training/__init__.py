"""The training loop: trainer, engine, schedule, averaged weights, checkpoints. No Ray, no MLflow."""
