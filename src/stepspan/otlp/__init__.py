"""OTLP: ids, the mapping of events to records, encoders, and transports that turn a request into an outcome."""
