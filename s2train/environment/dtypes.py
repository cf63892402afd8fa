"""Names torch's dtypes by `train.precision`."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
