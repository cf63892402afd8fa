"""Measures several GPUs of one host: parity, scaling, context parallel traffic, balance.

Run it with `launch/scaling.py`.
"""
