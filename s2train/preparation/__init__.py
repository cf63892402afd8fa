"""From text files to Megatron indexed datasets."""
