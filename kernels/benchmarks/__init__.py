"""Speed of the kernels beside their peers, in one process on the same inputs."""
