"""Validation of settings before anything is allocated."""
