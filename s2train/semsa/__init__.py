"""SemSA: choose each head's attention pattern by its effect on the loss.

It measures which blocks of attention matter to the loss, and chooses patterns under a budget. `profiling` runs a dense
checkpoint forward and backward, and sums the effects of removing blocks and of candidate rules into a
`profile.Profile`. `solving` chooses a rule for each head; `choosing` writes the layout. `verification` and `frontier`
compare the estimates with what masking does. The method is that of MoA (arXiv 2406.14909).
"""
