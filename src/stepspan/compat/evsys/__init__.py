"""evsys log stores: the contract, the built-in stores, the registry, and the reader of a run directory.

`stepspan.stores` is the public face.
"""
