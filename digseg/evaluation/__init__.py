"""Metrics, inference and reports over a trained model."""
