"""Prediction for users: files in, masks out."""
