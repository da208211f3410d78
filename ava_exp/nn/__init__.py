"""Layers: plain tensors and plain values.

Shape suffixes used throughout the package:

    B sequences    T positions     N tokens = B·T    D hidden size    V vocabulary
    H query heads  K kv heads      C head size       F expert or FFN width
    E experts      k experts per token               S key positions (cache included)
"""
