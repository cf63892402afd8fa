"""Costs of a model: FLOPs, parameters, memory, traffic, cache, predicted time."""
