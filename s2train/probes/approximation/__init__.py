"""Measures what approximate attention changes in a trained model: its loss, its outputs, its assumptions."""
