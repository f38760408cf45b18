"""stepspan: the bridge between machine-learning training and OpenTelemetry."""

__version__ = "0.1.0"
