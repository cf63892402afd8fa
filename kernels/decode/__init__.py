"""Decode one new token per sequence over paged keys and values."""
