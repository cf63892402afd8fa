"""Composes settings from command lines, and prints help and one-line errors."""
