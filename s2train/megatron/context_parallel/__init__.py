"""Context parallel for any layout: queries stay where they are, keys and values come to them.

Megatron splits a sequence zig-zag: of 2·cp chunks, rank r holds chunks r and 2·cp − 1 − r, so that every rank has
as much causal work. A layout may keep any far block: dense layers gather all keys and values (`gathering`), sparse
ones exchange the blocks that they keep (`shares`: which; `transfer`: the exchange; `attention`: with them).
"""
