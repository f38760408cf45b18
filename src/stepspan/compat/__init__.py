"""Four systems that speak through stepspan: for each, its front and the reader of its files, together in one place."""
