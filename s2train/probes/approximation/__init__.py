"""Measures approximate attention in a trained model: loss, output errors and assumptions."""
