"""The networks: one file per family, and :mod:`excite.networks.catalog`, which names them without importing torch."""
