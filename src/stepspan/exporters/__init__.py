"""Where events go: `jsonl` (the journal, inline and durable), `otlp`, `sdk`, `memory` (each follows the journal)."""
