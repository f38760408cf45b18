"""OTLP on the wire: where a signal goes, how records become the bytes of a request, and what its answer means.

    endpoint      arguments and the standard variables, read once: where and how each signal goes
    json          records as the body of one request in OTLP/JSON
    protobuf      the same in protobuf, packed by hand
    sdk_records   records of other instrumentation, under their own scopes, in both forms
    sdk_objects   objects of the OpenTelemetry SDK as OTLP JSON, and back
    rules         what every encoder keeps, so that one record is the same telemetry in all of them
    transport     opens the transport of a protocol: `http` or `grpc`
    outcome       what became of a request; `answers` has the table from an answer to an outcome

What the records are is `stepspan.mapping`'s.
"""
