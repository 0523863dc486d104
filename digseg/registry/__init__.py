"""MLflow: runs, the packaged model with its lineage, and looking models up. No other package imports
MLflow."""

from __future__ import annotations

import os

# MLflow reads these when it is imported. A server that does not answer must be reported in seconds, not
# minutes; nothing about the user's work is sent to third parties; progress bars of artifact copies and the
# addresses of runs only clutter job logs.
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
