"""What several GPUs of one host give: parity, scaling, context parallel traffic, balance (`launch/scaling.py`)."""
