"""The YAML files, shipped as package `lightning_em.configs`."""
