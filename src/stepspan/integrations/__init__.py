"""Integrations with other libraries. Importing one imports its library only where its docstring says so."""
