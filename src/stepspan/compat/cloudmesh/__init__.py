"""cloudmesh-ai's Telemetry: the calls of its manual, its files and databases, and OpenTelemetry behind them."""
