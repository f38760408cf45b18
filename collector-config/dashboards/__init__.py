"""The dashboards and recording rules of `collector-config/stack/`, as code. `make dashboards` writes them.

`rules` says what Prometheus records, `panels` what a panel looks like, and one module a dashboard what is on it.
"""
