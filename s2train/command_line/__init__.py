"""Command lines: composing settings, their help, and one clear error."""
