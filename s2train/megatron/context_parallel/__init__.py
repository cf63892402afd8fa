"""Context parallel for any layout: queries stay, keys and values are exchanged.

Megatron splits a sequence zig-zag: of 2·cp chunks, rank r holds chunks r and 2·cp − 1 − r, so that all ranks have the
same causal work. A layout may keep any distant block. Dense layers gather all keys and values (`all_gather`); sparse
layers exchange only the blocks that they keep (`exchange_plan`: which blocks; `kv_exchange`: the exchange;
`attention`: computing with them). Packed documents begin at any token: `documents` divides them, and
`document_plan` and `document_exchange` exchange what sparse layers keep of them.
"""
